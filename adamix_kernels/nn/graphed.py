"""A private forward and backward pass as a CUDA graph, replayed on other batches of the same shapes.

Noise and the optimizer's step stay outside, for a replay repeats what was captured. What a pass ends in, clipped sums
and squared norms, lies in static memory that the next replay writes over: it is copied into the step's sums after each.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import Tensor

from adamix_kernels.nn.adaptive import PublicQuantile
from adamix_kernels.nn.errors import PrivacyError
from adamix_kernels.nn.hooks import outside
from adamix_kernels.nn.passes import Passes
from adamix_kernels.nn.probe import undone
from adamix_kernels.nn.sums import StepSums
from adamix_kernels.ops.noise import capturing

if TYPE_CHECKING:
    from adamix_kernels.nn.engine import DPEngine

#: What a pass leaves: its loss and its sums.
Left = tuple[Tensor, StepSums]
#: Runs a pass until nothing is compiled or allocated any more, then once more while it is recorded. Gives what that one
#: has left, and what replays it.
Capture = Callable[[torch.device, Callable[[], Left]], tuple[Left, Callable[[], None]]]

_WARM_UP = 3  # as torch.cuda.make_graphed_callables has it


def cuda_graph(device: torch.device, run: Callable[[], Left]) -> tuple[Left, Callable[[], None]]:
    with torch.cuda.device(device):
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(_WARM_UP):
                run()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            left = run()
    return left, graph.replay


class Graphed:
    """What `DPEngine.graphed` gives: call it with a batch instead of forward and backward."""

    def __init__(
        self, engine: DPEngine, loss_fn: Callable[..., Tensor], batch: Sequence[Any], capture: Capture = cuda_graph
    ) -> None:
        self._engine, self._loss_fn = engine, loss_fn
        check_graphed(engine)
        self._device = next(p.device for _, p in engine._attached.owned)
        for name, x in (*engine.model.named_parameters(), *engine.model.named_buffers()):
            if x.device != self._device or (capture is cuda_graph and not x.is_cuda):
                raise PrivacyError(
                    f"graphed(): needs a CUDA device that holds the whole model, and {name!r} is on {x.device}; move "
                    "the model to one before the engine is made, or call backward() without a graph"
                )
        if not batch:
            raise ValueError("graphed(): got no example; pass the tensors of a batch")
        if torch.is_autocast_enabled(self._device.type):
            raise PrivacyError(
                "graphed(): called within autocast, which may keep weights as they are now; open it within loss_fn"
            )
        self._inputs: list[Tensor] = []
        self._check_tensors(batch)
        self._inputs = [x.detach().clone() for x in batch]
        self._limit = torch.zeros((), dtype=torch.float64, device=self._device)  # the threshold of each replay
        self._set_limit(engine._sums._threshold_now().whole)
        self._state = _state(engine)
        with undone(engine, engine.model, probing=False):
            (self._loss, self._left), self._replay = capture(self._device, self._pass)
        self._check_state()

    def __call__(self, *batch: Tensor) -> Tensor:
        """The loss of a batch, a copy without history, after a backward pass that counts in the step.

        Calls are made on one stream, for they share memory.
        """
        if torch.compiler.is_compiling():
            return outside(self, *batch)
        check_graphed(self._engine)
        self._check_state()
        self._check_tensors(batch)
        self._engine._attached.watch()  # as a forward pass does: dropped gradients are seen, also after a failed step
        sums = self._engine._sums
        with torch.no_grad():
            sums.begin_pass()
            self._set_limit(sums.threshold.whole)
            for static, x in zip(self._inputs, batch, strict=True):
                static.copy_(x)
            self._replay()
            sums.take(self._left)
            return self._loss.clone()

    def _set_limit(self, limit: float | Tensor) -> None:
        if isinstance(limit, Tensor):
            self._limit.copy_(limit)
        else:
            self._limit.fill_(limit)

    def _pass(self) -> Left:
        """An ordinary pass, whose sums go beside those of the step, and whose threshold is read on the device."""
        engine = self._engine
        sums, limit, drawn = engine._sums, engine._max_grad_norm, _draws_of_host(self._device)
        engine._max_grad_norm = self._limit
        try:
            with engine._passes.recording():
                engine._sums = left = StepSums(engine, "sample")
                loss = self._loss_fn(engine.model, *self._inputs)
                if not isinstance(loss, Tensor):
                    raise TypeError(f"loss_fn: gives a {type(loss).__name__}; return the loss, a scalar tensor")
                engine.backward(loss)
            changed = engine._max_grad_norm is not self._limit
        finally:
            engine._sums, engine._max_grad_norm = sums, limit
        if _draws_of_host(self._device) != drawn:
            raise PrivacyError(
                "graphed(): loss_fn or the model draws random numbers on the host, which replays would repeat; draw "
                f"them on {self._device}, or call backward() without a graph"
            )
        if len(left.norm_sq) != 1 or changed:
            what = "sets max_grad_norm" if changed else f"makes {len(left.norm_sq)} private backward passes"
            raise PrivacyError(
                f"graphed(): with its own backward() loss_fn {what}; let it compute the loss of trained parameters "
                "alone, which graphed() takes backward once"
            )
        return loss.detach(), left

    def _check_tensors(self, batch: Sequence[Any]) -> None:
        for i, x in enumerate(batch):
            if not isinstance(x, Tensor):
                raise TypeError(f"graphed(): batch[{i}] is {type(x).__name__}; pass tensors alone")
            if x.device != self._device:
                raise ValueError(f"graphed(): batch[{i}] is on {x.device}, the model on {self._device}; move it there")
        if not self._inputs:
            return
        given, wanted = ([(list(x.shape), x.dtype) for x in of] for of in (batch, self._inputs))
        if given != wanted:
            raise ValueError(
                f"graphed(): the batch is {_shown(given)}, but {_shown(wanted)} was captured; run this one by "
                "forward and backward() without the graph, pad it with rows whose loss has weight 0, or capture again"
            )

    def _check_state(self) -> None:
        now = _state(self._engine)
        changed = [name for name, value in self._state.items() if now[name] != value]
        if changed:
            raise PrivacyError(
                f"graphed(): {changed[0]} changed since the capture, which replays would not see; call dp.graphed() "
                "again"
            )

    def __reduce__(self) -> NoReturn:
        raise TypeError("graphed(): a captured pass cannot be copied or pickled; call dp.graphed() again")


def _draws_of_host(device: torch.device) -> tuple[Any, ...]:
    """The states of its generators; not that of torch where the model itself is there."""
    own = b"" if device.type == "cpu" else bytes(torch.random.get_rng_state().tolist())
    return random.getstate(), own


def _shown(tensors: Sequence[tuple[list[int], torch.dtype]]) -> str:
    return ", ".join(f"{shape} {dtype}" for shape, dtype in tensors) or "nothing"


def _memory(x: Tensor) -> tuple[Any, ...]:
    return x.data_ptr(), x.dtype, x.shape, x.stride()


def _state(engine: DPEngine) -> dict[str, Any]:
    """What a graph holds as it was; by the name that an error gives it."""
    settings = ("strategy", "clipping", "loss_reduction", "loss_scale", "joint_forwards")
    with torch._C.DisableTorchFunctionSubclass():
        named = list(engine.model.named_parameters())
        return {
            **{name: getattr(engine, name) for name in settings},
            "which parameters are trained": [p.requires_grad for _, p in named],
            "the memory of a parameter": [(name, id(p), *_memory(p)) for name, p in named],
            "the memory of a buffer": [(name, *_memory(b)) for name, b in engine.model.named_buffers()],
            "train() or eval() of a module": [module.training for module in engine.model.modules()],
        }


def check_graphed(engine: DPEngine) -> None:
    """What a graph can hold, asked at its capture and at each replay."""
    ordinary = "call backward() without a graph"
    sums, limit = engine._sums, engine.max_grad_norm
    reasons = {
        "the engine is detached; make a new one": not engine._attached.owned,
        f"strategy 'two_pass' compares its passes on the host; pass 'book_keeping' or {ordinary}": (
            engine.strategy == "two_pass"
        ),
        f"strategy 'materialize' makes gradients one by one, which is slow in a graph; pass 'auto', or {ordinary}": (
            engine.strategy == "materialize"
        ),
        f"secure noise chooses its grid on the host; {ordinary}": sums.grid is not None,
        f"unit='user' tells users apart on the host; {ordinary}": sums.users is not None,
        f"max_grad_norm is a PublicQuantile, set within each pass; set a number, or {ordinary}": isinstance(
            limit, PublicQuantile
        ),
        "max_grad_norm is a dict; set one number or scalar tensor": isinstance(limit, Mapping),
        f"a public subspace changes between steps; {ordinary}": engine._subspace is not None,
        f"the engine trains over several ranks; {ordinary}": engine.ranks is not None,
        f"it is called within public(), and its samples are private; for public rows {ordinary}": engine.is_public,
        f"it is called within mixed(), whose rows change; {ordinary}": engine.public_rows is not None,
        "it is called within backward(); call it afterwards": torch._C._current_graph_task_id() != -1,
        "it is called within the loss_fn of another; call it outside": Passes._recording is not None,
        f"Opacus's adapter counts backward passes itself; {ordinary}": type(engine._passes) is not Passes,
        "it is called while another CUDA graph is captured, whose replays would not count; call it outside": (
            capturing()
        ),
    }
    for reason, found in reasons.items():
        if found:
            raise PrivacyError(f"graphed(): {reason}")
