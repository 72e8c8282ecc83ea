"""From factors of single uses to clipped sums: one backward pass is one batch of samples, each clipped once.

A pass ends with autograd's outermost graph task: checkpointing that recomputes in a nested backward pass belongs to the
pass around it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from adamix_kernels.nn.clipped import add_clipped, clip, take_public, total_norm_sq
from adamix_kernels.nn.combine import combine, gathered
from adamix_kernels.nn.errors import PrivacyError
from adamix_kernels.nn.factors import Factors, PerSample, owned, smaller
from adamix_kernels.nn.parameter import Derived, PrivateParameter, names, untraced
from adamix_kernels.ops.noise import capturing

if TYPE_CHECKING:
    from adamix_kernels.nn.compiled_ops import Arrived
    from adamix_kernels.nn.engine import DPEngine
    from adamix_kernels.nn.tap import Use

#: Factors, and the parameters they are gradients of.
Record = tuple[tuple[PrivateParameter, ...], Factors]


@dataclass
class _Pass:
    task: int
    number: int
    samples: int | None = None
    records: dict[str, list[Record]] = field(default_factory=dict)  # by layer
    norms: list[Tensor] = field(default_factory=list)  # [B] squared, of parts of the model
    layers: dict[str, str] = field(default_factory=dict)  # by parameter
    closed: set[str] = field(default_factory=set)
    forwards: set[int] = field(default_factory=set)


class Passes:
    """The backward passes of an engine, one at a time."""

    _recording: ClassVar[Passes | None] = None  # whose passes graphed() captures, which count when they are replayed

    def __init__(self, engine: DPEngine) -> None:
        self._engine = engine
        self._parents: dict[int, int] = {}  # of nested graph tasks
        self._now: _Pass | None = None
        self._number = 0
        self._expected: dict[tuple[str, bool], int] = {}  # uses of a layer that wait for a gradient
        self._pass_of: dict[int, int] = {}  # by forward pass
        self._received: dict[tuple[str, bool], int] = {}
        self._through: dict[int, set[int]] = {}  # forward passes whose outputs a graph task has come through
        self._norm_sq: Tensor | None = None  # of the first of two backward passes
        self.coef: Tensor | None = None  # of the second
        self.twice = False
        self.stale = 0  # forward passes so far were before the last step

    def forget(self) -> None:
        """Drop what was not turned into sums: the loop has thrown it away."""
        self._now = None
        self._parents.clear()
        self._pass_of.clear()
        self._through.clear()

    def drop(self) -> None:
        """The model's zero_grad()."""
        self._engine._forget()

    @property
    def recorded(self) -> bool:
        return Passes._recording is self

    @contextmanager
    def recording(self) -> Iterator[None]:
        Passes._recording = self
        try:
            yield
        finally:
            Passes._recording = None

    @staticmethod
    def check_unrecorded(what: str) -> None:
        if Passes._recording is not None:
            raise PrivacyError(
                f"{what}: within the loss_fn of graphed(), which captures one private forward and backward pass; call "
                "it outside"
            )

    def forget_forwards(self) -> None:
        """A step was taken: no gradient is awaited from forward passes before it."""
        self._expected.clear()
        self.stale = self._engine._forwards.count

    def run_twice(self, loss: Tensor) -> None:
        """Two backward passes over the same graph: for the norms, then for the sums."""
        self.twice, self._norm_sq = True, None
        try:
            loss.backward(retain_graph=True)
            self._expected = dict(self._received)
            if self._norm_sq is not None:
                sums = self._engine._sums
                self.coef = sums.coef(sums.private_norms(self._norm_sq, None), None)
            loss.backward()
        finally:
            self.twice, self.coef = False, None

    def expect(self, use: Use) -> None:
        for layer in use.layers:
            key = layer, use.task != -1
            self._expected[key] = self._expected.get(key, 0) + 1
        if use.task != -1:
            self._enter(use.task)

    def come_through(self, forward: int) -> None:
        """A backward pass has reached the outputs of a forward pass: parts that it recomputes belong to that."""
        self._through.setdefault(torch._C._current_graph_task_id(), set()).add(forward)

    def _enter(self, task: int) -> _Pass:
        """The pass that a graph task belongs to; its end is awaited."""
        while task in self._parents:
            task = self._parents[task]
        if self._now is None or self._now.task != task:
            if self._engine.is_public:
                raise PrivacyError(
                    "a private forward pass is followed by backward() within public(); put both inside or both outside"
                )
            if self._engine.strategy == "two_pass" and not self.twice:
                raise PrivacyError("strategy 'two_pass' needs two backward passes: call dp.backward(loss)")
            if Passes._recording not in (None, self):
                raise PrivacyError(
                    "backward(): goes through the model of another DPEngine within the loss_fn of graphed(), and would "
                    "count there when it is captured and never when it is replayed; call backward() without a graph"
                )
            if capturing() and not self.recorded:
                raise PrivacyError(
                    "backward(): is captured in a CUDA graph, whose replays would make sums of other samples that the "
                    "engine does not count; run it outside the capture, or capture it by dp.graphed()"
                )
            if self.coef is None:
                self._number += 1
                self._received.clear()
                self._engine._sums.begin_pass()
            self._now = _Pass(task, self._number)  # what an aborted backward pass left is dropped
            torch.autograd.Variable._execution_engine.queue_callback(lambda: self._end(task))
        return self._now

    @untraced
    def receive(
        self, use: Use | Arrived, targets: Sequence[Tensor], build: Callable[[], Factors], lent: Sequence[Tensor] = ()
    ) -> None:
        """The gradient of one use has come. What is `lent` is not to be kept: compiled code writes over it."""
        if lent and self.recorded:
            raise PrivacyError(
                "graphed(): the model is compiled, whose backward pass is not captured; leave torch.compile out, or "
                "call backward() without a graph"
            )
        task = torch._C._current_graph_task_id()
        if use.task not in (-1, task):
            self._parents[task] = use.task
        now = self._enter(task)
        forwards = self._through.get(now.task, set()) if use.forward is None else {use.forward}
        earlier = {use.spent_in} | {self._pass_of.setdefault(forward, now.number) for forward in forwards}
        if earlier - {None, now.number}:
            raise PrivacyError(
                f"{names(targets)}: a second backward() goes through one forward pass; a sample would be clipped twice "
                "and count twice. Add the losses and call backward() once, or run forward() again on other samples"
            )
        use.spent_in = now.number
        now.forwards |= forwards
        if len(now.forwards) > 1 and not self._engine.joint_forwards:
            raise PrivacyError(
                f"{names(targets)}: one backward() goes through several forward passes; their rows b would "
                "be clipped as one sample. If they are other samples, call backward() for each; if they are the same, "
                "pass joint_forwards=True to the DPEngine"
            )
        for record in self._records(targets, build, lent):
            self._add(now, record)
        if lent:
            return  # compiled code does not tell how many uses are to come: its layers are closed at the end
        for layer in use.layers:
            key = layer, use.task != -1
            self._expected[key] = self._expected.get(key, 0) - 1
            self._received[key] = self._received.get(key, 0) + 1
            if self._expected[key] == 0:
                self._complete(now, layer)

    def _records(self, targets: Sequence[Tensor], build: Callable[[], Factors], lent: Sequence[Tensor]) -> list[Record]:
        factors = build()
        if self._engine.strategy == "materialize":
            factors = PerSample(factors.grad_sample())
        elif self._engine.strategy != "book_keeping" and self._engine._subspace is None and not self.recorded:
            # not where public and private ones meet, which must be of one kind, nor in a graph, where gradients one by
            # one are slow (`PerSample`)
            factors = smaller(factors)
        if lent:
            factors = owned(factors, lent)
        plain = tuple(target for target in targets if isinstance(target, PrivateParameter))
        if len(plain) == len(targets):
            return [(plain, factors)]
        records: list[Record] = []
        for target, grads in zip(targets, factors.grad_sample(), strict=True):
            if isinstance(target, PrivateParameter):
                records.append(((target,), PerSample([grads])))
            else:
                records.append(pull(target, grads))
        return records

    def _add(self, now: _Pass, record: Record) -> None:
        parameters, factors = record
        if now.samples not in (None, factors.samples):
            raise PrivacyError(
                f"{names(parameters)}: {factors.samples} samples come to it but {now.samples} to parameters before; "
                "dimension 0 of every input must be the batch"
            )
        if now.samples is None:
            now.samples = factors.samples
            self._engine._sums.take_split(now.samples)
        layer = now.layers.setdefault(parameters[0]._dp_name, self._engine.layers[parameters[0]._dp_name])
        if any(now.layers.setdefault(p._dp_name, layer) != layer for p in parameters):
            raise PrivacyError(
                f"{names(parameters)}: used together and apart; their layers cannot be told from each other"
            )
        if layer in now.closed:
            raise PrivacyError(
                f"{names(parameters)}: used again in a part that is recomputed, after its layer was clipped; pass "
                "use_reentrant=False to checkpoint(), or strategy='book_keeping'"
            )
        now.records.setdefault(layer, []).append(record)

    def _complete(self, now: _Pass, layer: str) -> None:
        """All gradients of a layer have come: what needs no other layer is done now, and its memory freed."""
        if not self._engine.keeps_factors and layer in now.records:
            now.closed.add(layer)
            self._close(now, layer)

    def _close(self, now: _Pass, layer: str) -> None:
        engine, parts = self._engine, combine(now.records.pop(layer))
        if engine.strategy == "per_layer":
            now.norms.append(clip(engine, parts, layer))
            return
        now.norms.append(total_norm_sq([factors.norm_sq() for _, factors in parts]))
        if self.coef is not None:
            take_public(engine, parts, None)
            add_clipped(engine, parts, engine._sums.released(self.coef), None)

    @untraced
    def _end(self, task: int) -> None:
        if self._now is None or self._now.task == task:  # else one on another thread has begun since
            self._finish()

    def _finish(self) -> None:
        """The end of a pass: everything left is clipped and summed."""
        now, self._now = self._now, None
        self._parents.clear()
        if now is None:
            return
        with torch.no_grad(), torch._C.DisableTorchFunctionSubclass():
            if self._engine.keeps_factors and now.records:
                parts = combine([record for records in now.records.values() for record in records])
                now.records.clear()
                if self._engine._subspace is None:
                    parts = gathered(parts)
                now.norms.append(clip(self._engine, parts, None))
            for layer in list(now.records):
                self._close(now, layer)
            if now.norms:
                norm_sq = total_norm_sq(now.norms)
                if self.coef is None:
                    self._norm_sq = norm_sq
                else:
                    self._check_repeats(norm_sq)
            sums = self._engine._sums
            if self._norm_sq is not None and self.coef is not None:
                sums.end_pass(sums.private_norms(self._norm_sq, None))
            elif self._norm_sq is not None and now.norms and not self.twice:
                sums.end_pass(self._norm_sq)

    def _check_repeats(self, norm_sq: Tensor) -> None:
        """The norms of the first of two backward passes must bound the gradients of the second."""
        first = self._norm_sq
        if first is None or (first.isfinite() & ~(norm_sq <= first * (1 + 2e-5))).any():
            raise PrivacyError(
                "strategy 'two_pass': samples have larger gradients in the second backward pass than in the first, "
                "whose norms clip them; a recomputed part draws other random numbers, or a hook does not do the same "
                "twice. Pass preserve_rng_state=True to checkpoint(), or strategy='per_layer' or 'book_keeping'"
            )


def pull(target: Tensor, grads: Tensor) -> Record:
    """Gradients `[B, *]` with respect to a derived tensor, taken to its parameters."""
    assert isinstance(target, Derived)
    if target._dp_pull is not None:
        return target._dp_pull(grads)
    bases = tuple(base for base in target._dp_bases if base.requires_grad)
    engine = target._dp_engine
    if not len(grads):
        return bases, PerSample([grads.new_zeros(0, *base.shape) for base in bases])
    with engine._attached.pulling():
        pulled = torch.autograd.grad(
            target, bases, grads.to(target.dtype), retain_graph=True, is_grads_batched=True, materialize_grads=True
        )
    return bases, PerSample(list(pulled))
