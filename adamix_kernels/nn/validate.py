"""The engine on one batch, against the slow way: one sample at a time, with torch's own gradients."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from adamix_kernels.nn.combine import combine
from adamix_kernels.nn.errors import PrivacyError
from adamix_kernels.nn.factors import Factors
from adamix_kernels.nn.parameter import PrivateParameter, tensors
from adamix_kernels.nn.passes import Passes
from adamix_kernels.nn.report import ParameterReport, Report, flops, held, kept_bytes, kind, sample_bytes, size_of

if TYPE_CHECKING:
    from adamix_kernels.nn.engine import DPEngine

Loss = Callable[[nn.Module, Any], Tensor]

#: What gradients computed in two orders may differ by, of their norm.
TOLERANCE = {torch.float64: 1e-5, torch.float32: 5e-3, torch.float16: 2e-2, torch.bfloat16: 1e-1}
#: Norms of a parameter below this share of the sample's whole norm are held to an error of that share only.
SHARE = 1e-3


def validate(engine: DPEngine, batch: Any, loss: Loss | None = None) -> Report:
    """Compare the engine's norms and clipped sums on a batch with those of one sample at a time.

    This is how a wrong batch dimension, or a loss in which samples meet, is found. Weights, gradients, buffers, random
    number generators and what the engine has summed stay as they are. Nothing here has noise: the report is private.

    Args:
        engine: as in `dp.validate(batch)`.
        batch: a tensor, a tuple of arguments or a dict of keyword arguments of the model. A tensor in it whose
            dimension 0 is as long as that of the first has a row for each sample.
        loss: `loss(model, batch)`, a scalar with the engine's reduction. None takes the output's `loss` if it has one,
            else the outputs weighted by fixed numbers.

    Raises:
        PrivacyError: names the parameter whose norms or sums differ by more than rounding.
    """
    if engine.shards is not None:
        raise PrivacyError(
            "validate(): a sharded model is not run one sample at a time; validate it before fully_shard()"
        )
    batch = tree_map(
        lambda x: x.detach().requires_grad_(x.requires_grad) if isinstance(x, Tensor) else x, _plain(batch)
    )
    rows = [x for x in tree_leaves(batch) if isinstance(x, Tensor) and x.dim() > 0]
    if not rows or not rows[0].shape[0]:
        raise ValueError("batch: holds no tensor with a row for each sample; pass a tensor, a tuple or a dict of them")
    samples = rows[0].shape[0]
    run = loss or (lambda model, batch: _default_loss(engine, model, batch))
    recorder = _Recorder(engine)
    with _undisturbed(engine) as notes, torch.enable_grad():
        engine._passes = recorder
        (run(engine.model, batch) * engine.loss_scale).backward()
        oracle = _Oracle(engine, samples)
        with engine.public():
            for b in range(samples):
                oracle.add(b, run(engine.model, _sample(batch, samples, b)), recorder)
    found = {p._dp_name: record for record in recorder.found for p in record.parameters}
    reports = [oracle.compare(name, p, found.get(name)) for name, p in engine._attached.owned if p.requires_grad]
    return Report(samples, engine.strategy, reports, recorder.memory(), notes)


@dataclass
class _Found:
    parameters: tuple[PrivateParameter, ...]
    factors: Factors
    norm: Tensor  # [B]
    coef: Tensor  # [B]
    sums: list[Tensor]
    scale: float

    @property
    def dtype(self) -> torch.dtype:
        """The coarsest in which its gradients were computed."""
        kinds = [x.dtype for x in (*self.parameters, *held(self.factors)) if x.is_floating_point()]
        return max(kinds, key=lambda kind: torch.finfo(kind).eps)


class _Recorder(Passes):
    """Backward passes that end in records instead of the engine's sums."""

    def __init__(self, engine: DPEngine) -> None:
        super().__init__(engine)
        self.twice = True  # of "two_pass", the first
        self.found: list[_Found] = []

    def _complete(self, now: Any, layer: str) -> None:
        """Nothing is freed early."""

    def _finish(self) -> None:
        now, self._now = self._now, None
        if now is None:
            return
        engine = self._engine
        groups: list[tuple[str | None, Any]] = list(now.records.items())
        if engine.strategy != "per_layer":
            groups = [(None, [record for _, records in groups for record in records])]
        scale = engine._sums.scale(now.samples or 0)
        with torch.no_grad(), torch._C.DisableTorchFunctionSubclass():
            for layer, records in groups:
                parts = combine(records)
                norms = [factors.norm_sq().double() for _, factors in parts]
                coef = engine._sums.coef(torch.stack(norms).sum(0), layer) if norms else torch.zeros(0)
                self.found += [
                    _Found(ps, factors, norm.sqrt() / scale, coef, factors.clip_sum(coef), scale)
                    for (ps, factors), norm in zip(parts, norms, strict=True)
                ]

    def memory(self) -> dict[str, int]:
        one = max((kept_bytes(record.factors) for record in self.found), default=0)
        kept = {x.untyped_storage().data_ptr(): size_of(x) for r in self.found for x in held(r.factors)}
        made = sum(sample_bytes(r.factors.samples, p) for r in self.found for p in r.parameters)
        name = "auto" if self._engine.strategy == "auto" else "book_keeping"
        return {name: sum(kept.values()), "materialize": made, "two_pass": one, "per_layer": one}


class _Oracle:
    """Gradients of one sample after another."""

    def __init__(self, engine: DPEngine, samples: int) -> None:
        self._engine = engine
        self._trained = [(name, p) for name, p in engine._attached.owned if p.requires_grad]
        self._norm_sq = {name: torch.zeros(samples, dtype=torch.float64) for name, _ in self._trained}
        self._sums: dict[str, Tensor] = {}

    def add(self, b: int, loss: Tensor, recorder: _Recorder) -> None:
        parameters = [p for _, p in self._trained]
        grads = torch.autograd.grad(loss * self._engine.loss_scale, parameters, allow_unused=True)
        coefs = {p._dp_name: record.coef for record in recorder.found for p in record.parameters}
        for (name, _), grad in zip(self._trained, grads, strict=True):
            if grad is None:
                continue
            value = grad.detach().double() / self._engine.loss_scale
            self._norm_sq[name][b] = value.square().sum().cpu()
            if name in coefs and coefs[name][b] > 0:
                term = value * coefs[name][b].double()
                self._sums[name] = self._sums[name] + term if name in self._sums else term

    def compare(self, name: str, parameter: PrivateParameter, record: _Found | None) -> ParameterReport:
        whole = torch.stack(list(self._norm_sq.values())).sum(0).sqrt()
        if record is None:
            if not bool((self._norm_sq[name] <= (SHARE * whole).square()).all()):
                raise PrivacyError(f"parameter {name!r}: has a gradient, but no rule has seen it; {_REMEDY}")
            return ParameterReport(name, "unused", None, 0, 0, 0, 0.0, 0.0)
        if record.factors.samples != len(whole):
            raise PrivacyError(
                f"parameter {name!r}: {record.factors.samples} samples come to it, not {len(whole)}; {_REMEDY}"
            )
        names = [p._dp_name for p in record.parameters]
        norm = torch.stack([self._norm_sq[each] for each in names]).sum(0).sqrt()
        floor = torch.maximum(norm, SHARE * whole).clamp(min=1e-18)  # the root of the least norm_sq
        difference = (record.norm.cpu() - norm).abs() / floor
        both = norm.isfinite() | record.norm.cpu().isfinite()
        norm_error = float(difference.where(both, 0.0).nan_to_num(math.inf).max())
        got = record.sums[names.index(name)].double() / record.scale
        total = self._sums.get(name, torch.zeros_like(got))
        room = float((record.coef.double().cpu() * floor).where(record.coef.cpu() > 0, 0.0).sum())
        sum_error = float((got - total).norm()) / max(room, 1e-18)
        most = TOLERANCE[record.dtype]
        if not (norm_error <= most and sum_error <= most):
            what, error = ("norms", norm_error) if not norm_error <= most else ("clipped sum", sum_error)
            raise PrivacyError(
                f"parameter {name!r}: its {what} differ from those of one sample at a time by {error:.1e}, more than "
                f"rounding in {str(record.dtype).removeprefix('torch.')} ({most:.0e}); {_REMEDY}"
            )
        return ParameterReport(
            name,
            kind(record.factors),
            None if names[0] == name else names[0],
            flops(record.factors) if names[0] == name else 0,
            kept_bytes(record.factors) if names[0] == name else 0,
            sample_bytes(len(whole), parameter),
            norm_error,
            sum_error,
        )


_REMEDY = (
    "dimension 0 must be the batch wherever it is used, the loss must be a mean or sum over samples as loss_reduction "
    "says, no sample may enter the loss of another, and nothing may be random but dropout modules"
)


@contextmanager
def _undisturbed(engine: DPEngine) -> Iterator[list[str]]:
    """What a forward or backward pass changes is put back. Yields notes for the report."""
    values = {name: getattr(engine, name) for name in ("_passes", "public_rows", "_max_grad_norm")}
    forwards = engine._forwards
    seen = {name: getattr(forwards, name) for name in ("count", "number", "batch_size", "input_storages")}
    sums = engine._sums
    staged, threshold, adaptive = dict(sums.staged), sums.threshold, sums.adaptive
    buffers = [(buffer, buffer.clone()) for buffer in engine.model.buffers()]
    devices = {p.device.index for _, p in engine._attached.owned if p.device.type == "cuda"}
    notes: list[str] = []
    changed: list[tuple[nn.Module, str, Any]] = []
    for module in engine.model.modules():
        own = isinstance(module, nn.modules.dropout._DropoutNd)
        rates = ["p"] if own else [key for key in vars(module) if "drop" in key]
        for key in [key for key in rates if isinstance(getattr(module, key), float) and module.training]:
            changed.append((module, key, getattr(module, key)))
            setattr(module, key, 0.0)  # not eval(): attention reads the rate of its dropout module
    if changed:
        notes.append(f"dropout was off: {len(changed)} modules; its masks cannot be the same for a sample alone")
    engine.public_rows = None
    if adaptive is not None:
        engine._max_grad_norm = 1.0
        notes.append("public rows are to set the threshold: here it was 1")
    try:
        with torch.random.fork_rng([index for index in devices if index is not None]):
            yield notes
    finally:
        for module, key, value in changed:
            setattr(module, key, value)
        with torch.no_grad():
            for buffer, saved in buffers:
                buffer.copy_(saved)
        for name, value in values.items():
            setattr(engine, name, value)
        vars(forwards).update(seen)
        sums.staged.update(staged)
        sums.threshold, sums.adaptive = threshold, adaptive


def _plain(batch: Any) -> Any:
    return dict(batch) if isinstance(batch, Mapping) else batch


def _sample(batch: Any, samples: int, b: int) -> Any:
    return tree_map(
        lambda x: x[b : b + 1] if isinstance(x, Tensor) and x.dim() > 0 and x.shape[0] == samples else x, batch
    )


def _default_loss(engine: DPEngine, model: nn.Module, batch: Any) -> Tensor:
    args = [batch] if isinstance(batch, Tensor) else [] if isinstance(batch, Mapping) else batch
    out = model(*args, **(batch if isinstance(batch, Mapping) else {}))
    own = getattr(out, "loss", None)
    if isinstance(own, Tensor):
        return own
    parts = []
    for i, x in enumerate(x for x in tensors(out) if x.requires_grad and x.dim() > 0):
        weights = torch.randn(x.shape[1:], generator=torch.Generator().manual_seed(i), dtype=torch.float64)
        part = x * weights.to(x)
        parts.append(part.sum() / (len(x) if engine.loss_reduction == "mean" else 1))
    if not parts:
        raise ValueError("loss: the model returns no tensor that depends on its parameters; pass loss=")
    return torch.stack([part.double() for part in parts]).sum()
