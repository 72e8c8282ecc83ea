"""What is planned for: a model on the meta device, which has shapes and no memory, its inputs and its loss."""

from __future__ import annotations

import copy
import importlib
import math
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adamix.errors import InputError
from adamix.storage import one_line, require
from adamix_kernels import replace_batch_norm


@dataclass(frozen=True)
class Work:
    """A model and what it is trained on.

    Args:
        name: for the reader.
        build: makes the model; it is called under `torch.device("meta")`.
        batch: makes the inputs and targets of so many samples.
        loss: the mean over the samples, of the model, inputs and targets.
    """

    name: str
    build: Callable[[], nn.Module]
    batch: Callable[[int], tuple[Any, Tensor]]
    loss: Callable[[nn.Module, Any, Tensor], Tensor]


def _vit(width: int, layers: int, heads: int) -> dict[str, Any]:
    return {
        "model_type": "vit",
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "intermediate_size": 4 * width,
        "num_labels": 1000,
    }


def _gpt2(width: int, layers: int, heads: int) -> dict[str, Any]:
    return {"model_type": "gpt2", "n_embd": width, "n_layer": layers, "n_head": heads}


def _llama(width: int, layers: int, heads: int, inner: int) -> dict[str, Any]:
    return {
        "model_type": "llama",
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "intermediate_size": inner,
        "vocab_size": 32000,
    }


#: Settings of transformers' configurations, from the papers: Dosovitskiy et al. 2021 (arXiv 2010.11929), Radford et al.
#: 2019, Touvron et al. 2023 (arXiv 2302.13971); llama-1.3b has the width and depth of GPT-3's 1.3B (arXiv 2005.14165).
SHAPES: dict[str, dict[str, Any]] = {
    "vit-b16": _vit(768, 12, 12),
    "vit-l16": _vit(1024, 24, 16),
    "vit-h14": _vit(1280, 32, 16) | {"patch_size": 14},
    "resnet50": {"model_type": "resnet", "num_labels": 1000},
    "gpt2": _gpt2(768, 12, 12),
    "gpt2-medium": _gpt2(1024, 24, 16),
    "gpt2-large": _gpt2(1280, 36, 20),
    "gpt2-xl": _gpt2(1600, 48, 25),
    "llama-1.3b": _llama(2048, 24, 16, 5504),
    "llama-7b": _llama(4096, 32, 32, 11008),
    "llama-13b": _llama(5120, 40, 40, 13824),
}
_IMAGES, _TEXT = "ImageClassification", "CausalLM"


def resolve(
    model: str,
    *,
    sequence_length: int | None = None,
    image_size: int | None = None,
    input_shape: tuple[int, ...] | None = None,
) -> Work:
    """The model that a text names.

    Args:
        model: a name of `SHAPES`; a folder with a transformers `config.json`, or that file; or "module:function", which
            returns an nn.Module.
        sequence_length: tokens of a sample, for models of text; default 1024, or what the model can take if it is less.
        image_size: pixels a side, for models of images; default what the configuration says.
        input_shape: of one sample of a "module:function" that takes floating-point tensors, such as (3, 32, 32).

    Raises:
        InputError: names the argument, what was given and what to pass.
    """
    for name, value in (("sequence_length", sequence_length), ("image_size", image_size)):
        if value is not None and value < 1:
            raise InputError(f"{name}: {value} is not valid here; pass a whole number above 0")
    if model in SHAPES:
        if input_shape is not None:
            raise InputError(f"input_shape: {model} has its own; pass sequence_length or image_size")
        settings = dict(SHAPES[model])
        transformers = require("transformers", "transformers", f"the shape {model}")
        config = transformers.AutoConfig.for_model(settings.pop("model_type"), **settings)
        return _of_config(model, config, sequence_length, image_size)
    path = Path(model)
    if path.exists():
        transformers = require("transformers", "transformers", f"the model {model}")
        try:
            config = transformers.AutoConfig.from_pretrained(path, local_files_only=True)
        except Exception as error:
            raise InputError(f"model: {model} has no configuration of transformers ({one_line(error)})") from error
        return _of_config(path.name, config, sequence_length, image_size)
    if ":" in model:
        return _of_function(model, sequence_length, image_size, input_shape)
    raise InputError(
        f"model: {model!r} is none of {', '.join(SHAPES)}, no file or folder, and no module:function; pass one of them"
    )


def _of_config(name: str, config: Any, sequence_length: int | None, image_size: int | None) -> Work:
    import transformers

    images = (
        getattr(config, "model_type", "")
        in transformers.models.auto.modeling_auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES
    )
    unused = ("sequence_length", sequence_length) if images else ("image_size", image_size)
    if unused[1] is not None:
        raise InputError(f"{unused[0]}: {name} takes {'images' if images else 'text'}; drop it")
    if images:
        size: int = getattr(config, "image_size", 224) if image_size is None else image_size
        if hasattr(config, "image_size"):
            config.image_size = size
        shape = (getattr(config, "num_channels", 3), size, size)
    else:
        most = getattr(config, "max_position_embeddings", 1024)
        length = sequence_length or min(1024, most)
        if length > most:
            raise InputError(f"sequence_length: {name} takes at most {most} tokens, not {length}; pass fewer")
    kind = getattr(transformers, f"AutoModelFor{_IMAGES if images else _TEXT}")

    def build() -> nn.Module:
        try:
            made = kind.from_config(copy.deepcopy(config), attn_implementation="sdpa")
        except ValueError:  # a model without attention
            made = kind.from_config(copy.deepcopy(config))
        if not images:
            made.config.use_cache = False
        return replace_batch_norm(made)

    batch = _images(shape, config.num_labels) if images else _tokens(length)
    title = f"{name}, {'x'.join(map(str, shape))}" if images else f"{name}, {length} tokens"
    return Work(title, build, batch, _classification if images else _next_token)


def _of_function(
    model: str, sequence_length: int | None, image_size: int | None, input_shape: tuple[int, ...] | None
) -> Work:
    given = [x for x in (sequence_length, image_size, input_shape) if x is not None]
    if len(given) != 1:
        raise InputError(
            f"input_shape: {model} does not tell what it takes; pass one of sequence_length (token ids), image_size "
            "(three channels) and input_shape"
        )
    module, _, function = model.partition(":")
    sys.path.insert(0, os.getcwd())
    try:
        made = getattr(importlib.import_module(module), function)
    except Exception as error:
        raise InputError(f"model: {model} cannot be imported ({one_line(error)}); pass module:function") from error
    finally:
        sys.path.pop(0)

    def build() -> nn.Module:
        try:
            found = made()
        except NotImplementedError:
            raise  # of the meta device, which is told elsewhere
        except Exception as error:
            raise InputError(
                f"model: {model}() fails ({one_line(error)}); pass a function without arguments"
            ) from error
        if not isinstance(found, nn.Module):
            raise InputError(f"model: {model}() gives a {type(found).__name__}; it must return a torch.nn.Module")
        return found

    if sequence_length is not None:
        return Work(f"{model}, {sequence_length} tokens", build, _tokens(sequence_length), _next_token)
    shape = input_shape or (3, image_size or 1, image_size or 1)
    return Work(f"{model}, {'x'.join(map(str, shape))}", build, _images(shape, 2), _classification)


def _tokens(length: int) -> Callable[[int], tuple[Any, Tensor]]:
    def batch(samples: int) -> tuple[Any, Tensor]:
        return torch.zeros(samples, length, dtype=torch.int64), torch.zeros(samples, length, dtype=torch.int64)

    return batch


def _images(shape: tuple[int, ...], labels: int) -> Callable[[int], tuple[Any, Tensor]]:
    def batch(samples: int) -> tuple[Any, Tensor]:
        return torch.zeros(samples, *shape), torch.zeros(samples, dtype=torch.int64)

    return batch


def _output(model: nn.Module, x: Tensor) -> Tensor:
    out = model(x)
    return out if isinstance(out, Tensor) else out["logits"] if isinstance(out, Mapping) else out[0]


def _classification(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    out = _output(model, x)
    return F.cross_entropy(out.flatten(1).float(), y)


def _next_token(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    out = _output(model, x)
    return F.cross_entropy(out.flatten(0, 1).float(), y.flatten())


def size(module: nn.Module, trained: bool = False) -> int:
    """Numbers in its parameters, each once."""
    return sum(math.prod(p.shape) for p in module.parameters() if p.requires_grad or not trained)
