"""Models that come compiled."""

from __future__ import annotations

from torch import nn

from adamix.errors import InputError


def check_uncompiled(model: nn.Module) -> None:
    """What torch.compile returns is another module, with other names of parameters.

    Raises:
        InputError: the model, or a part of it, is one.
    """
    for name, module in model.named_modules():
        if "_orig_mod" in module._modules:
            raise InputError(
                f"model: {name or 'the model'} is the result of torch.compile(); pass the model itself with "
                "compile=True, or compile parts of it in place, by their compile()"
            )


def is_compiled(model: nn.Module) -> bool:
    """Whether it, or a part of it, is compiled in place, by `nn.Module.compile`."""
    return any(module._compiled_call_impl is not None for module in model.modules())
