"""Rules of recurrent layers: torch's own forward pass, and a backward pass that sees the gates of every step.

The forward pass saves the hidden states alone. From them the gates of all steps are computed again by one product, and
only the chain from step to step is run one by one: it gives the backprops of both weights for all steps at once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from adamix_kernels.nn.errors import PrivacyError
from adamix_kernels.nn.parameter import Private, tensors
from adamix_kernels.nn.rules import Rules, plain, rule, trains
from adamix_kernels.nn.rules_layers import linear_factors, wide
from adamix_kernels.nn.sequences import rows_first, samples_first
from adamix_kernels.nn.tap import Use


class Weights(NamedTuple):
    """Of one layer in one direction, as the module orders them."""

    ih: Any  # [G H, I]
    hh: Any  # [G H, P], where P = H without a projection
    ih_bias: Any = None
    hh_bias: Any = None
    hr: Any = None  # [P, H], the projection of an LSTM

    def pairs(self) -> list[list[Any]]:
        return [[self.ih, self.ih_bias], [self.hh, self.hh_bias], *([[self.hr]] if self.hr is not None else [])]


class Steps(NamedTuple):
    """What the backward pass is given: a batch, all steps."""

    weights: Weights
    inputs: Tensor  # [B, T, G H], their part of the gates
    hidden: Tensor  # [B, T, P], after each step
    previous: Tensor  # [B, T, P], before it
    cell: Tensor | None  # [B, H], before the first step
    grad: Tensor  # [B, T, P], from above alone
    last_grad: Tensor | None  # [B, H], of the last cell


class Backprops(NamedTuple):
    """Of the gates: of the part that comes from inputs, and of that from hidden states."""

    ih: Tensor  # [B, T, G H]
    hh: Tensor  # [B, T, G H]
    first: Tensor  # [B, P], of the hidden state before the first step
    first_cell: Tensor | None = None  # [B, H]
    projected: tuple[Tensor, Tensor] | None = None  # what was projected [B, T, H], and its backprops [B, T, P]


def _recurrent_part(s: Steps) -> Tensor:
    return F.linear(s.previous, s.weights.hh, s.weights.hh_bias)


def _chain(s: Steps, local: Tensor, keep: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Where a step is `[G H]` local derivatives times the gradient of its hidden state: these, backprops, the first."""
    width = s.hidden.shape[-1]
    local = local.unflatten(-1, (-1, width))  # [B, T, G, H]
    grads, backprops, grad = torch.empty_like(s.grad), torch.empty_like(local), torch.zeros_like(s.grad[:, 0])
    for t in range(s.grad.shape[1] - 1, -1, -1):
        grad = torch.add(s.grad[:, t], grad, out=grads[:, t])
        torch.mul(grad[:, None], local[:, t], out=backprops[:, t])
        back = backprops[:, t].flatten(1) @ s.weights.hh
        grad = back if keep is None else back.addcmul_(grad, keep[:, t])
    return grads, backprops.flatten(2), grad


def _lstm(s: Steps) -> Backprops:
    assert s.cell is not None
    gates = (s.inputs + _recurrent_part(s)).unflatten(-1, (4, -1))
    i, f, o = gates[:, :, 0].sigmoid(), gates[:, :, 1].sigmoid(), gates[:, :, 3].sigmoid()
    g = gates[:, :, 2].tanh()
    before, cell = torch.empty_like(i), s.cell
    added = i * g
    for t in range(i.shape[1]):
        before[:, t] = cell
        cell = torch.addcmul(added[:, t], f[:, t], cell)
    tanh = torch.addcmul(added, f, before).tanh()
    of_cell = torch.stack([g * i * (1 - i), before * f * (1 - f), i * (1 - g * g)], 2)
    of_out, through = tanh * o * (1 - o), o * (1 - tanh * tanh)
    backprops, heads = torch.empty_like(gates), torch.empty_like(s.grad)
    grad = torch.zeros_like(s.grad[:, 0])
    grad_cell = torch.zeros_like(s.cell) if s.last_grad is None else s.last_grad
    for t in range(i.shape[1] - 1, -1, -1):
        grad = torch.add(s.grad[:, t], grad, out=heads[:, t])
        grad = grad if s.weights.hr is None else grad @ s.weights.hr
        grad_cell = torch.addcmul(grad_cell, grad, through[:, t])
        torch.mul(grad_cell[:, None], of_cell[:, t], out=backprops[:, t, :3])
        torch.mul(grad, of_out[:, t], out=backprops[:, t, 3])
        grad_cell = grad_cell * f[:, t]
        grad = backprops[:, t].flatten(1) @ s.weights.hh
    both = backprops.flatten(2)
    return Backprops(both, both, grad, grad_cell, None if s.weights.hr is None else (o * tanh, heads))


def _gru(s: Steps) -> Backprops:
    inputs, hidden = s.inputs.chunk(3, -1), _recurrent_part(s).chunk(3, -1)
    r, z = (inputs[0] + hidden[0]).sigmoid(), (inputs[1] + hidden[1]).sigmoid()
    n = torch.addcmul(inputs[2], r, hidden[2]).tanh()
    of_new, of_update = (1 - z) * (1 - n * n), (s.previous - n) * z * (1 - z)
    of_reset = of_new * hidden[2] * r * (1 - r)
    grads, backprops, first = _chain(s, torch.cat([of_reset, of_update, of_new * r], -1), z)
    width = z.shape[-1]
    return Backprops(torch.cat([backprops[..., : 2 * width], grads * of_new], -1), backprops, first)


def _tanh(s: Steps) -> Backprops:
    _, both, first = _chain(s, 1 - s.hidden * s.hidden, None)
    return Backprops(both, both, first)


def _relu(s: Steps) -> Backprops:
    _, both, first = _chain(s, (s.hidden > 0).to(s.hidden.dtype), None)
    return Backprops(both, both, first)


class Recurrence(torch.autograd.Function):
    """One layer in one direction; the targets of `uses`, one use for each product, are its last inputs."""

    @staticmethod
    def forward(
        ctx: Any,
        function: Callable[..., Any],
        backward: Callable[[Steps], Backprops],
        uses: Sequence[Use | None],
        weights: Weights,
        x: Tensor,
        hidden: Tensor,
        cell: Tensor | None,
        *targets: Tensor,
    ) -> tuple[Tensor, ...]:
        flat = [w for w in weights if w is not None]
        states = hidden[None] if cell is None else (hidden[None], cell[None])
        out, *last = function(x, states, flat, weights.ih_bias is not None, 1, 0.0, False, False, True)
        ctx.step, ctx.uses = backward, uses
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, hidden, cell, out, *weights)
        return out, *(state[0] for state in last)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor | None, *last: Tensor | None) -> Any:
        x, hidden, cell, out, *values = ctx.saved_tensors
        with torch.no_grad():
            weights = Weights(*(w if w is None else wide(w) for w in values))
            grads = torch.zeros_like(wide(out)) if grad is None else wide(grad)
            if last[0] is not None:
                grads = torch.cat([grads[:, :-1], grads[:, -1:] + last[0][:, None]], 1)
            previous = torch.cat([hidden[:, None].to(out.dtype), out[:, :-1]], 1)
            of_inputs = F.linear(wide(x), weights.ih, weights.ih_bias)
            first_cell = cell if cell is None else wide(cell)
            last_grad = None if cell is None or last[1] is None else wide(last[1])
            found = ctx.step(Steps(weights, of_inputs, wide(out), wide(previous), first_cell, grads, last_grad))
        products = [(x, found.ih), (previous, found.hh), *([found.projected] if found.projected else [])]
        count = sum(len(use.targets) for use in ctx.uses if use is not None)
        nodes = iter([node for node, _ in ctx.next_functions[-count:]])
        for use, (a, g) in zip(ctx.uses, products, strict=True):
            if use is not None:
                use.receive([next(nodes) for _ in use.targets], [a.to(out.dtype)], g.to(out.dtype))
        to_x = found.ih @ weights.ih if ctx.needs_input_grad[4] else None
        return None, None, None, None, to_x, found.first, found.first_cell, *[None] * count


def _run(
    rules: Rules, function: Any, backward: Any, weights: Weights, x: Tensor, hidden: Tensor, cell: Tensor | None
) -> Any:
    uses: list[Use | None] = []
    for pair in weights.pairs():
        targets = [w for w in pair if trains(w)]
        build = linear_factors(False, *(trains(w) for w in (*pair, None)[:2]))
        uses.append(Use(rules.engine, build, targets) if targets else None)
    targets = [target for use in uses if use is not None for target in use.targets]
    detached = Weights(*(plain(w) for w in weights))
    return Recurrence.apply(function, backward, uses, detached, x, hidden, cell, *targets)


def _layers(name: str, backward: Callable[[Steps], Backprops]) -> None:
    function = getattr(torch, name)  # as torch._VF has it
    what = f"{name}()"

    @rule(function)
    def run(rules: Rules, input: Any, hx: Any, params: Any, has_biases: Any, *options: Any) -> Any:
        if not isinstance(has_biases, bool):
            raise PrivacyError(
                f"{rules.names(tensors(input, hx, params, has_biases))}: {what} gets a PackedSequence, whose "
                "dimension 0 is no batch; pass a padded batch, and mask or pick the steps that are wanted"
            )
        depth, dropout, train, bidirectional, batch_first = options
        if isinstance(input, Private):
            raise PrivacyError(
                f"{rules.names([input])}: {what} gets it in place of samples; add it to zeros [B, *] of the batch first"
            )
        if batch_first:
            rules.check_batch(input, what, *params)
        x = input if batch_first else samples_first(rules, input, what, False, *params)
        states = [rows_first(rules, h, what).transpose(0, 1) if trains(h) else plain(h) for h in tensors(hx)]
        directions = 1 + bidirectional
        size = len(params) // (depth * directions)
        last: list[Sequence[Tensor]] = []
        for layer in range(depth):
            x = F.dropout(x, dropout) if layer and dropout and train else x
            outs = []
            for direction in range(directions):
                which = len(last)
                given = params[which * size :][:size]
                weights = Weights(*given[:2], *(given[2:] if has_biases else (None, None, *given[2:])))
                own = [state[which] for state in states]
                cell = own[1] if len(own) > 1 else None
                out, *ends = _run(rules, function, backward, weights, x.flip(1) if direction else x, own[0], cell)
                outs.append(out.flip(1) if direction else out)
                last.append(ends)
            x = torch.cat(outs, -1) if bidirectional else outs[0]
        return x if batch_first else x.transpose(0, 1), *(torch.stack(ends) for ends in zip(*last, strict=True))


def _cell(name: str, layer: str, backward: Callable[[Steps], Backprops]) -> None:
    function = getattr(torch, layer)

    @rule(getattr(torch, name))
    def run(rules: Rules, input: Any, hx: Any, w_ih: Any, w_hh: Any, b_ih: Any = None, b_hh: Any = None) -> Any:
        states = tensors(hx)
        given = [x for x in (input, *states) if isinstance(x, Private)]
        if given:
            raise PrivacyError(
                f"{rules.names(given)}: {name}() gets it in place of samples; add it to zeros [B, *] of the batch first"
            )
        rules.check_batch(input, f"{name}()", w_ih, w_hh, b_ih, b_hh)
        weights = Weights(w_ih, w_hh, b_ih, b_hh)
        _, *last = _run(rules, function, backward, weights, input[:, None], states[0], (*states, None)[1])
        return tuple(last) if len(last) > 1 else last[0]


for _name, _layer, _backward in (
    ("lstm_cell", "lstm", _lstm),
    ("gru_cell", "gru", _gru),
    ("rnn_tanh_cell", "rnn_tanh", _tanh),
    ("rnn_relu_cell", "rnn_relu", _relu),
):
    _layers(_layer, _backward)
    _cell(_name, _layer, _backward)
