"""What a step would take, without computing it: the step itself runs, on meta tensors, and its calls are written down.

Every ATen operation that it makes, and every op of `adamix_kernels`, is recorded with the floating point operations and
bytes it needs: of ATen from `torch.utils.flop_counter` and the sizes of its tensors, of our ops from their `cost`. What
the step holds in memory is followed by the life of its storages, so the rules of the strategies, what they keep and
when they free it, are not told a second time here.
"""

from __future__ import annotations

import math
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from adamix.errors import InputError
from adamix.plan.functions import FLASH, Functions
from adamix.plan.results import RESULTS
from adamix_kernels.nn.parameter import storage, tensors
from adamix_kernels.spec import Op, stand_in

_FLASH_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
FLASH_FLOPS = {
    FLASH: flop_registry[torch.ops.aten._scaled_dot_product_flash_attention],
    _FLASH_BACKWARD: flop_registry[torch.ops.aten._scaled_dot_product_flash_attention_backward],
}

#: Rates are measured by kind. Of other ATen operations the bytes decide: "memory" with new results, else "in place".
KINDS = {
    **dict.fromkeys(("mm", "addmm"), "matmul"),
    **dict.fromkeys(("bmm", "baddbmm"), "bmm"),
    **dict.fromkeys(("convolution", "convolution_backward"), "conv"),
    **{str(x).removeprefix("aten."): "attention" for x in (*FLASH_FLOPS, *flop_registry) if "attention" in str(x)},
    **dict.fromkeys(
        "gelu gelu_backward silu silu_backward tanh exp log erf sigmoid pow softplus cos sin _softmax _log_softmax "
        "_softmax_backward_data _log_softmax_backward_data native_layer_norm native_layer_norm_backward "
        "native_group_norm native_group_norm_backward _fused_rms_norm _fused_rms_norm_backward "
        "native_dropout".split(),
        "special",
    ),
    **dict.fromkeys(("max_pool2d_with_indices", "avg_pool2d", "_adaptive_avg_pool2d"), "pool"),
    **dict.fromkeys(
        "max_pool2d_with_indices_backward avg_pool2d_backward _adaptive_avg_pool2d_backward".split(), "pool backward"
    ),
}
#: Without positions these are other work: the norms read their rows once, the sums are one product.
ROWS = {name: f"{name}, rows" for name in ("linear_norm_sq", "linear_clip_sum")}
_FREE = {
    "empty",
    "empty_like",
    "empty_strided",
    "new_empty",
    "new_empty_strided",
    "detach",
    "_unsafe_view",
    "is_pinned",
}
_LOOK_UPS = {"embedding", "index_select", "gather", "index"}  # read what they write, not the whole table


class Call(NamedTuple):
    """One operation. `kind` is one of `KINDS`, "memory", "in place", or the name of an op of `adamix_kernels`."""

    phase: str  # of the step: "forward", "backward", "update", ..
    kind: str
    dtype: str  # of its arguments, such as "bfloat16"
    flops: int
    bytes: int  # read and written


class Trace(TorchDispatchMode):
    """The calls of what runs inside, and the bytes it holds, by what they are for.

    Args:
        device: "cpu" or "cuda", the type of device that is planned for.
    """

    def __init__(self, device: str) -> None:
        super().__init__()
        self.device, self.phase, self._default = device, "", ""
        self.calls: Counter[Call] = Counter()
        self.peaks: dict[str, dict[str, int]] = {}  # by phase: bytes by purpose, where their sum was largest
        self._held: dict[int, tuple[str, int, Any]] = {}  # by storage: purpose, bytes, weak reference
        self._now: Counter[str] = Counter()
        self._sum = 0  # of it
        self._purpose: str | None = None
        self._recording = True
        self._whether_all: Callable[[], Tensor | None] = lambda: None  # what was asked last

    # --- memory ------------------------------------------------------------------------------------------------------

    def hold(self, purpose: str, *values: Any) -> None:
        """What tensors are for; those that are held already for something else are not counted twice."""
        for x in tensors(values):
            if x.is_meta:
                whole, key = x.untyped_storage(), storage(x)
                if key in self._held:
                    old, size, reference = self._held[key]
                    self._now[old] -= size
                else:
                    size, reference = whole.nbytes(), weakref.ref(whole, partial(self._free, key))
                    self._sum += size
                self._held[key] = purpose, size, reference
                self._now[purpose] += size
        self._note()

    def _free(self, key: int, _: Any) -> None:
        purpose, size, _ = self._held.pop(key)
        self._now[purpose] -= size
        self._sum -= size

    def _note(self, copies: int = 0) -> None:
        """A peak, if it is one; with what an operation allocates for itself and frees."""
        if self.phase not in self.peaks or self._sum + copies > sum(self.peaks[self.phase].values()):
            found = {purpose: size for purpose, size in self._now.items() if size}
            self.peaks[self.phase] = found | ({"copies within convolutions": copies} if copies else {})

    def _follow(self, out: Any) -> None:
        new = [x for x in tensors(out) if x.is_meta and storage(x) not in self._held]
        if new:
            self.hold(self._purpose or self._default, new)

    # --- calls -------------------------------------------------------------------------------------------------------

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.aten._local_scalar_dense.default and args[0].is_meta:
            return _value(args[0], args[0] is self._whether_all())
        out = func(*args, **kwargs)
        if func._overloadpacket is torch.ops.aten.all:
            self._whether_all = weakref.ref(out)
        if self._recording:
            self._follow(out)
            self._record(func, args, kwargs, out)
            if self.device == "cpu":
                self._note(_copies(func, args, out))
        return out

    def _record(self, func: Any, args: Any, kwargs: Any, out: Any) -> None:
        name = func._schema.name.removeprefix("aten::")
        given = tensors(args, kwargs)
        made = tensors(out)
        known = {storage(x) for x in given}
        if name in _FREE or (not func._schema.is_mutable and any(storage(x) in known for x in made)):
            return  # a view
        count = FLASH_FLOPS.get(func._overloadpacket) or flop_registry.get(func._overloadpacket)
        if name in _LOOK_UPS:
            given = made
        moved = sum(_bytes(x) for x in (*given, *made))
        flops = count(*args, **kwargs, out_val=out) if count is not None else _windows(name, args, made)
        kind = KINDS.get(name, "in place" if func._schema.is_mutable else "memory")
        self.calls[Call(self.phase, kind, _dtype(given or made), int(flops), moved)] += 1

    def run_op(self, op: Op[..., Any], arguments: dict[str, Any]) -> Any:
        """An op of `adamix_kernels`: its cost is recorded, its results are made without computing them."""
        if op.name not in RESULTS:
            raise InputError(f"model: calls {op.name}, which is not planned for; see adamix.plan.results")
        self._recording = False  # making them is no call of the step
        out = RESULTS[op.name](arguments)
        self._recording = True
        self._purpose = "sums" if "clip_sum" in op.name else None  # they live until the step
        self._follow(out)
        self._purpose = None
        self._record_op(op, arguments)
        return out

    def _record_op(self, op: Op[..., Any], arguments: dict[str, Any]) -> None:
        cost = op.cost(**arguments)
        given = tensors(*(arguments[name] for name in op.shapes))
        rows = op.name in ROWS and arguments["activations"].dim() == 2
        kind = ROWS[op.name] if rows else op.name
        self.calls[Call(self.phase, kind, _dtype(given), int(cost.flops), int(cost.bytes))] += 1

    def only(self, run: Callable[[], Any]) -> Call:
        """The call that `run` consists of. One of ATen is made, one of an op is not."""
        with self, stand_in(self._record_op, self.device):
            run()
        return max(self.calls, key=lambda call: (call.flops, call.bytes))

    @contextmanager
    def of(self, phase: str, purpose: str) -> Iterator[None]:
        """What runs inside is a part of the step; what it makes is held for `purpose`."""
        self.phase, self._default = phase, purpose
        self._note()
        with self, Functions(self.device), stand_in(self.run_op, self.device):
            yield


#: Images of so few channels are read as they are.
_PLAIN_CHANNELS = 4


def _copies(func: Any, args: Sequence[Any], out: Any) -> int:
    """Bytes that oneDNN allocates within a convolution on a CPU, beside the results: it reads and writes images in
    blocks of channels, and torch copies them from and to rows. Seen with AVX-512; what cuDNN takes is not known."""
    name = func._schema.name
    if name == "aten::convolution":
        return _blocked(args[0]) + _bytes(out)
    if name == "aten::convolution_backward":
        wants_input, wants_weight = args[-1][:2]
        return max(2 * _bytes(args[1]) * wants_input, (_blocked(args[1]) + _bytes(args[0])) * wants_weight)
    return 0


def _blocked(x: Tensor) -> int:
    return _bytes(x) if x.shape[1] > _PLAIN_CHANNELS else 0


def _windows(name: str, args: Sequence[Any], made: Sequence[Tensor]) -> int:
    """Numbers that a pooling looks at, which its time goes by: a window for each result."""
    if KINDS.get(name) != "pool":
        return 0
    if name == "_adaptive_avg_pool2d":
        return int(args[0].numel())
    window = args[1] if len(args[1]) == 2 else (args[1][0], args[1][0])
    return made[0].numel() * window[0] * window[1]


def _value(x: Tensor, whether_all: bool) -> Any:
    """Checks of a tensor pass: all is well, and nothing else is so. What else reads a value cannot be planned."""
    if x.dtype == torch.bool:
        return whether_all
    raise InputError("model: looks at the values of a tensor, which a plan has not; pass a model whose way is fixed")


def _bytes(x: Tensor) -> int:
    """Expanded ones are as large as what they show."""
    size = math.prod(n for n, step in zip(x.shape, x.stride(), strict=True) if step) * x.element_size()
    return size if x.numel() else 0


def _dtype(tensors: Sequence[Tensor]) -> str:
    """The narrowest floating type, in which products are made."""
    kinds = [x.dtype for x in tensors if x.is_floating_point()]
    return str(min(kinds, key=lambda kind: kind.itemsize, default=torch.float32)).removeprefix("torch.")
