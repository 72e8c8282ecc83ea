"""The rule of multi-head attention, which packs the weights of three layers into one parameter."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import groupby
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from adamix_kernels.nn.errors import PrivacyError
from adamix_kernels.nn.factors import Factors, PerSample, StackedFactors
from adamix_kernels.nn.parameter import Private, bases
from adamix_kernels.nn.rules import Rules, plain, rule, trains
from adamix_kernels.nn.rules_generic import by_vmap
from adamix_kernels.nn.rules_layers import linear, linear_factors
from adamix_kernels.nn.sequences import samples_first
from adamix_kernels.nn.tap import joint

_WHAT = "multi_head_attention_forward()"


@rule(F.multi_head_attention_forward)
def multi_head_attention_forward(
    rules: Rules,
    query: Any,
    key: Any,
    value: Any,
    embed_dim_to_check: int,
    num_heads: int,
    in_proj_weight: Any,
    in_proj_bias: Any,
    bias_k: Any,
    bias_v: Any,
    add_zero_attn: bool,
    dropout_p: float,
    out_proj_weight: Any,
    out_proj_bias: Any,
    training: bool = True,
    key_padding_mask: Any = None,
    need_weights: bool = True,
    attn_mask: Any = None,
    use_separate_proj_weight: bool = False,
    q_proj_weight: Any = None,
    k_proj_weight: Any = None,
    v_proj_weight: Any = None,
    static_k: Any = None,
    static_v: Any = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
) -> Any:
    """As torch's, with the samples in dimension 0 throughout."""
    weights = (q_proj_weight, k_proj_weight, v_proj_weight) if use_separate_proj_weight else (in_proj_weight,)
    targets = (*weights, in_proj_bias, bias_k, bias_v, out_proj_weight, out_proj_bias)
    _check(rules, (query, key, value), (static_k, static_v, key_padding_mask), targets)
    known = _transposes(rules, targets)
    given = {id(x): samples_first(rules, x, _WHAT, known, *targets) for x in (query, key, value)}
    inputs = [given[id(x)] for x in (query, key, value)]
    if use_separate_proj_weight:
        q, k, v = _separate(rules, inputs, weights, in_proj_bias)
    else:
        q, k, v = _packed(rules, inputs, in_proj_weight, in_proj_bias)
    masks = _Masks(rules, attn_mask, key_padding_mask, q, k, num_heads, is_causal, need_weights)
    samples = q.shape[0]
    if bias_k is not None:
        k, v = (
            torch.cat([x, rules.rows(b, 3, samples) if trains(b) else plain(b).expand(samples, 1, -1)], 1)
            for x, b in ((k, bias_k), (v, bias_v))
        )
    if add_zero_attn:
        k, v = (F.pad(x, (0, 0, 0, 1)) for x in (k, v))
    q, k, v = (x.unflatten(-1, (num_heads, -1)).transpose(1, 2) for x in (q, k, v))
    mask = masks.padded(k.shape[2])
    dropout_p = dropout_p if training else 0.0
    attention: Tensor | None = None
    if need_weights:
        scores = q * math.sqrt(1.0 / q.shape[-1]) @ k.mT
        attention = F.softmax(scores if mask is None else scores + mask, -1)
        attention = F.dropout(attention, dropout_p) if dropout_p else attention
        mixed = attention @ v
        attention = attention.mean(1) if average_attn_weights else attention
    else:
        mixed = F.scaled_dot_product_attention(q, k, v, mask, dropout_p, masks.is_causal)
    out = _project(rules, mixed.transpose(1, 2).flatten(2), out_proj_weight, out_proj_bias)
    return out.transpose(0, 1), attention


@rule(F.scaled_dot_product_attention)
def scaled_dot_product_attention(rules: Rules, *args: Any, **kwargs: Any) -> Any:
    """Learned queries, keys, values or an added bias get a row per sample: dropout then is torch's own."""
    function = F.scaled_dot_product_attention
    leaves, spec = tree_flatten((args, kwargs))
    given = [x for x in leaves if isinstance(x, Tensor)]
    dims, others = max(x.dim() for x in given), [x for x in given if not isinstance(x, Private)]
    batch = next((x for x in others if x.dim() == dims and x.requires_grad), None)
    same = [x for x in given if trains(x) and (x.dim() < dims or x.shape[0] == 1 or x.stride(0) == 0)]
    if batch is None or len(same) != sum(map(trains, given)):
        return by_vmap(rules, function, args, kwargs)
    rules.check_batch(batch, "scaled_dot_product_attention()", *same)
    leaves = [rules.rows(x, dims, len(batch)) if trains(x) else plain(x) for x in leaves]
    args, kwargs = tree_unflatten(leaves, spec)
    return function(*args, **kwargs)


def _check(rules: Rules, inputs: Sequence[Tensor], others: Sequence[Any], targets: Sequence[Any]) -> None:
    shapes = [list(x.shape) for x in inputs]
    if any(len(shape) != 3 for shape in shapes):
        raise PrivacyError(
            f"{rules.names(targets)}: {_WHAT} gets {shapes[0]} without a dimension for samples; pass [B, T, E] "
            "with batch_first=True, B = 1 for one sample"
        )
    if any(shape[1] != shapes[0][1] for shape in shapes):
        raise ValueError(f"query, key, value: are {shapes}; pass as many samples of each")
    static_k, static_v, _ = others
    if static_k is not None or static_v is not None or any(trains(x) for x in others):
        raise PrivacyError(
            f"{rules.names([*targets, *others])}: {_WHAT} with static_k, static_v or a trainable key_padding_mask has "
            "no rule; use scaled_dot_product_attention()"
        )


def _transposes(rules: Rules, targets: Sequence[Any]) -> bool:
    """Whether a module with batch_first=True calls, whose dimension 1 here was its dimension 0."""
    model = rules.engine.model
    for base in bases([x for x in targets if isinstance(x, Private)]):
        owner = base._dp_name
        while owner:
            owner = owner.rpartition(".")[0]
            module = model.get_submodule(owner)
            if isinstance(module, nn.MultiheadAttention):
                return module.batch_first
    return False


def _project(rules: Rules, x: Tensor, weight: Any, bias: Any) -> Tensor:
    if trains(weight) or trains(bias):
        return linear(rules, x, weight, bias)
    return F.linear(x, plain(weight), plain(bias))


def _packed(rules: Rules, inputs: Sequence[Tensor], weight: Any, bias: Any) -> list[Tensor]:
    """Rows of one weight for the query, the key and the value, in one product where these are the same."""
    width = weight.shape[0] // 3
    runs = [list(run) for _, run in groupby(inputs, id)]
    if len(runs) == 1:
        return list(_project(rules, inputs[0], weight, bias).split(width, -1))
    sizes = [width * len(run) for run in runs]
    xs = [rules.cast(run[0]) for run in runs]
    biases = [None] * len(runs) if bias is None else plain(bias).split(sizes)
    outs: Sequence[Tensor] = [F.linear(x, w, b) for x, w, b in zip(xs, plain(weight).split(sizes), biases, strict=True)]
    build_one = linear_factors(False, trains(weight), trains(bias))

    def build(saved: Sequence[Tensor], grads: Any, wanted: Sequence[bool]) -> Factors:
        return StackedFactors([build_one([x], g, wanted) for x, g in zip(saved, grads, strict=True)])

    targets = [x for x in (weight, bias) if trains(x)]
    if targets:
        outs = joint(rules.engine, outs, build, xs, targets)
    return [part for out in outs for part in out.split(width, -1)]


def _separate(rules: Rules, inputs: Sequence[Tensor], weights: Sequence[Any], bias: Any) -> Sequence[Tensor]:
    """A weight for each, but one bias `[3 E]`."""
    biases = [None] * 3 if bias is None else plain(bias).chunk(3)
    outs: Sequence[Tensor] = [
        rules.tap(out, linear_factors(False, True, False), [x], w) if trains(w) else out
        for x, w, out in (
            (x, w, F.linear(x, plain(w), b)) for x, w, b in zip(map(rules.cast, inputs), weights, biases, strict=True)
        )
    ]

    def build(saved: Sequence[Tensor], grads: Any, wanted: Sequence[bool]) -> Factors:
        return PerSample([torch.cat([g.sum(1) for g in grads], 1)])

    return joint(rules.engine, outs, build, [], [bias]) if trains(bias) else outs


class _Masks:
    """What is added to the scores, `[B or 1, heads or 1, T or 1, S]`."""

    def __init__(
        self, rules: Rules, mask: Any, padding: Any, q: Tensor, k: Tensor, heads: int, is_causal: bool, weights: bool
    ) -> None:
        (samples, steps, _), sources = q.shape, k.shape[1]
        if is_causal and mask is None:
            raise ValueError("attn_mask: is None but is_causal is set; pass the causal mask as well, as torch wants it")
        if padding is not None and padding.shape != (samples, sources):
            raise ValueError(f"key_padding_mask: is {list(padding.shape)}; pass [{samples}, {sources}]")
        self.is_causal = is_causal and padding is None
        if self.is_causal and not weights:
            mask = None
        self._mask: Tensor | None = None
        if mask is not None:
            self._mask = self._of_heads(rules, mask, (samples, heads, steps, sources), q.dtype)
        if padding is not None:
            padding = _floating(padding, q.dtype)[:, None, None]
            self._mask = padding if self._mask is None else self._mask + padding

    @staticmethod
    def _of_heads(rules: Rules, mask: Any, shape: tuple[int, int, int, int], dtype: torch.dtype) -> Tensor:
        samples, heads, steps, sources = shape
        if mask.shape not in ((steps, sources), (samples * heads, steps, sources)):
            raise ValueError(
                f"attn_mask: is {list(mask.shape)}; pass [{steps}, {sources}] or "
                f"[{samples * heads}, {steps}, {sources}]"
            )
        if not trains(mask):
            mask = _floating(plain(mask), dtype)
            return mask[None, None] if mask.dim() == 2 else mask.unflatten(0, (samples, heads))
        if mask.dim() == 3:
            raise PrivacyError(f"{rules.names([mask])}: as an attn_mask {list(mask.shape)} has no rule; pass [T, S]")
        return rules.rows(mask, 3, samples)[:, None]

    def padded(self, sources: int) -> Tensor | None:
        """For added keys, which every query sees."""
        return None if self._mask is None else F.pad(self._mask, (0, sources - self._mask.shape[-1]))


def _floating(mask: Tensor, dtype: torch.dtype) -> Tensor:
    if mask.is_floating_point():
        return mask
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(mask, -torch.inf)
