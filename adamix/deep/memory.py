"""Activations that are computed again in the backward pass instead of being kept."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from adamix.errors import InputError


@contextmanager
def recompute_activations(model: nn.Module, wanted: bool, **options: Any) -> Iterator[None]:
    """Checkpointing of a model of transformers within, where `wanted`.

    Its layers do so in training mode only. They alone are put into it, not what they are made of, so that dropout
    stays off. `options` are those of torch.utils.checkpoint.checkpoint.

    Raises:
        InputError: the model knows no checkpointing.
    """
    if not wanted:
        yield
        return
    kind = next((k for k in ("activation", "gradient") if hasattr(model, f"{k}_checkpointing_enable")), None)
    if kind is None:  # "gradient" is the name in older releases
        raise InputError(
            "checkpointing: the model is none of transformers; wrap its blocks with torch.utils.checkpoint in its "
            "forward, with use_reentrant=False, and pass False"
        )
    getattr(model, f"{kind}_checkpointing_enable")(
        **{f"{kind}_checkpointing_kwargs": {"use_reentrant": False, **options}}
    )
    layers = [m for m in model.modules() if getattr(m, "gradient_checkpointing", False) is True]
    modes = [m.training for m in layers]
    try:
        for layer in layers:
            layer.training = True
        yield
    finally:
        for layer, mode in zip(layers, modes, strict=True):
            layer.training = mode
        getattr(model, f"{kind}_checkpointing_disable")()
