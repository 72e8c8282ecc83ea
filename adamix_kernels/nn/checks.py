"""What can be told of a model and an optimizer before training."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

from adamix_kernels.nn.errors import PrivacyError
from adamix_kernels.nn.parameter import PrivateParameter
from adamix_kernels.ops.noise import Noise

STRATEGIES = ("auto", "book_keeping", "two_pass", "per_layer", "materialize")
CLIPPINGS = ("flat", "automatic")
REDUCTIONS = ("mean", "sum")
UNITS = ("sample", "user")


def check_settings(
    strategy: str,
    clipping: str,
    loss_reduction: str,
    noise_multiplier: float,
    expected_batch_size: float,
    loss_scale: float,
) -> None:
    for name, value, known in (
        ("strategy", strategy, STRATEGIES),
        ("clipping", clipping, CLIPPINGS),
        ("loss_reduction", loss_reduction, REDUCTIONS),
    ):
        if not isinstance(value, str) or value not in known:
            raise ValueError(f"{name}: is {value!r}; pass one of {', '.join(map(repr, known))}")
    for name, number, least in (
        ("noise_multiplier", noise_multiplier, 0.0),
        ("expected_batch_size", expected_batch_size, None),
        ("loss_scale", loss_scale, None),
    ):
        if not isinstance(number, int | float) or isinstance(number, bool):
            raise TypeError(f"{name}: is {type(number).__name__}; pass a number")
        if not (number <= sys.float_info.max and (number > 0 or number == least)):
            raise ValueError(f"{name}: is {number}; pass a finite number above 0{', or 0' * (least is not None)}")


def check_unit(unit: str, strategy: str, noise: Noise | None) -> None:
    """What needs the gradients of all samples does not go with a strategy that never has them."""
    if unit not in UNITS:
        raise ValueError(f"unit: is {unit!r}; pass one of {', '.join(map(repr, UNITS))}")
    if noise is not None and not isinstance(noise, Noise):
        raise TypeError(f"noise: is {type(noise).__name__}; pass adamix_kernels.Noise(), or None")
    secure = noise is not None and noise.mode == "secure"
    if strategy == "two_pass" and (secure or unit == "user"):
        raise ValueError(
            f"strategy: is 'two_pass' with {'secure noise' if secure else repr(unit) + ' as unit'}, which need the "
            "gradients of all samples at once; pass 'auto'"
        )


def check_uncompiled(model: nn.Module) -> None:
    """What torch.compile returns is another module around the model, whose hooks are its own."""
    if isinstance(vars(model).get("_orig_mod", model._modules.get("_orig_mod")), nn.Module):
        raise PrivacyError(
            "model: is the result of torch.compile(); make the DPEngine of the model itself, and call the compiled one"
        )


def check_labels(kwargs: Mapping[str, Any], recorded: bool) -> None:
    """A model that is given labels makes its loss itself, of those that it does not ignore."""
    labels = kwargs.get("labels")
    if not isinstance(labels, Tensor) or labels.dim() < 2 or labels.is_floating_point():
        return
    if recorded:
        raise PrivacyError(
            "graphed(): the model is given labels with loss_reduction='mean', and no replay can look for ignored "
            "positions (-100) in them. Pass loss_reduction='sum', and have the model add the losses (transformers: "
            "num_items_in_batch=1), or call backward() without a graph"
        )
    if (labels == -100).any():
        raise PrivacyError(
            "labels: hold ignored positions (-100) with loss_reduction='mean'; the mean over the other positions "
            "depends on how many of them other samples have. Pass loss_reduction='sum', and have the model add the "
            "losses (transformers: num_items_in_batch=1)"
        )


def mixing(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Modules that may carry something of a sample to another, by name."""
    return [(name, m) for name, m in model.named_modules() if isinstance(m, _BatchNorm | _InstanceNorm)]


def check_modules(modules: Sequence[tuple[str, nn.Module]]) -> None:
    for name, module in modules:
        where = f"module {name!r} ({type(module).__name__})"
        if isinstance(module, _BatchNorm) and (module.training or module.running_mean is None):
            raise PrivacyError(
                f"{where} mixes the samples of a batch; replace it by a GroupNorm, for instance with "
                "adamix_kernels.replace_batch_norm(model) before the optimizer is made, or call eval() on it"
            )
        if isinstance(module, _InstanceNorm) and module.track_running_stats and module.training:
            raise PrivacyError(
                f"{where} keeps running statistics of private samples without noise; pass track_running_stats=False"
            )


def check_parameters(named: Iterable[tuple[str, Tensor]], optimizer: Any, owned: set[int] | None = None) -> None:
    """Each trainable parameter is stepped, and is still the one that the engine found, and nothing else is stepped."""
    found = {id(p): (name, p) for name, p in named}
    stepped = {id(p) for group in optimizer.param_groups for p in group["params"]}
    if found.keys() == stepped == owned:
        return
    for key, (name, parameter) in found.items():
        if parameter.requires_grad and key not in stepped:
            raise PrivacyError(
                f"parameter {name!r} is trainable but not in the optimizer: its gradient would be private and without "
                "noise. Add it to the optimizer, or call requires_grad_(False) on it"
            )
        if parameter.requires_grad and owned is not None and key not in owned:
            raise PrivacyError(
                f"parameter {name!r} was replaced or added after the DPEngine was made, which does not see its "
                "gradient; call detach() and make a new engine"
            )
    if stepped - set(found):
        count = len(stepped - set(found))
        raise PrivacyError(
            f"optimizer: {count} of its parameters are not the model's; make the engine of the model that holds all of "
            "them, and the optimizer of model.parameters()"
        )


def check_grads(trained: Sequence[tuple[str, Tensor]], known: set[str]) -> None:
    for name, parameter in trained:
        if parameter.grad is not None and name not in known:
            raise PrivacyError(
                f"parameter {name!r} has a .grad that came neither from public() nor from a step, and may hold private "
                "samples without noise; set it within public() if it does not. torch.distributed.checkpoint makes the "
                "state of an optimizer by such a step: call get_state_dict() within restoring()"
            )


def check_step(args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    """No closure, and no backward pass around it."""
    if any(callable(x) for x in (*args, *kwargs.values())):
        raise PrivacyError("optimizer.step(closure): backward passes within a step have no noise; call step() alone")
    if torch._C._current_graph_task_id() != -1:
        raise PrivacyError("optimizer.step() within backward(): the sums are not complete; call it afterwards")


def check_restoring(grads: Iterable[Tensor | None], sums: Mapping[str, Tensor]) -> None:
    """A step that only makes an optimizer's state."""
    if sums or any(grad is not None and bool(grad.any()) for grad in grads):
        raise PrivacyError(
            "optimizer.step() within restoring(): there are gradients; save or load before a backward pass or after "
            "optimizer.zero_grad(), and train outside of it"
        )


def check_free(model: nn.Module, sharded: bool = False) -> None:
    for name, parameter in model.named_parameters():
        if isinstance(parameter, PrivateParameter):
            raise PrivacyError(
                f"model: parameter {name!r} belongs to another DPEngine; call detach() on that one first"
            )
        if parameter.is_complex():
            raise PrivacyError(
                f"model: parameter {name!r} is complex; only real ones are supported, keep it as one of [*, 2] and "
                "take torch.view_as_complex() of it"
            )
        if type(parameter) is not nn.Parameter and not sharded:
            raise PrivacyError(
                f"model: parameter {name!r} is a {type(parameter).__name__}; only plain torch.nn.Parameter is supported"
            )
        if parameter.grad is not None:
            raise PrivacyError(
                f"model: parameter {name!r} has a gradient already, without noise, to which the first step would add "
                "its own; call optimizer.zero_grad() before making the DPEngine"
            )


def replace_batch_norm(model: nn.Module, groups: int = 32) -> nn.Module:
    """Replace every BatchNorm by a GroupNorm with the same channels, scale and shift; returns the model.

    Args:
        model: changed in place; a model that is itself a BatchNorm cannot be, its replacement is returned.
        groups: at most so many groups; the largest number below that divides the channels.
    """
    if isinstance(model, _BatchNorm):
        return _group_norm(model, groups)
    for name, child in model.named_children():
        replaced = replace_batch_norm(child, groups)
        if replaced is not child:
            setattr(model, name, replaced)
    return model


def _group_norm(module: _BatchNorm, groups: int) -> nn.GroupNorm:
    channels = module.num_features
    count = max(g for g in range(1, min(groups, channels) + 1) if channels % g == 0)
    norm = nn.GroupNorm(count, channels, eps=module.eps, affine=module.affine)
    norm.train(module.training)
    if module.affine:
        norm.to(module.weight.device, module.weight.dtype)
        norm.weight.data.copy_(module.weight.data)
        norm.bias.data.copy_(module.bias.data)
    return norm
