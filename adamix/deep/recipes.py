"""The recipes that ship with the package: a file of settings, a model, and rows from folders."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from torch import nn

from adamix.deep.config import DeepConfig
from adamix.deep.losses import Loss, token_loss
from adamix.deep.sources import (
    ImageFolder,
    TextLines,
    check_folder,
    made_up_images,
    made_up_lines,
    open_tokenizer,
)
from adamix.errors import InputError
from adamix.storage import one_line, require

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

RECIPES = ("vit", "lm")
#: The size of the sets that --tiny makes up.
_TINY_ROWS = {"public": 32, "private": 192, "test": 48}


@dataclass(frozen=True)
class Job:
    """What `DeepAdaMix` is called with: the data sets by name, test possibly missing."""

    model: nn.Module
    data: dict[str, Any]
    loss: Loss | None
    source: str


def load_recipe(name: str, *, tiny: bool = False) -> tuple[dict[str, Any], dict[str, Any]]:
    """The shape of the model, and settings of `DeepConfig`."""
    text = resources.files("adamix").joinpath("recipes", f"{name}.toml").read_text()
    found = tomllib.loads(text)
    small = found["tiny"] if tiny else {}
    settings = found["settings"] | small.get("settings", {})
    if unknown := settings.keys() - DeepConfig.__dataclass_fields__.keys():
        raise InputError(f"recipe: {name} sets {min(unknown)}, which is no setting")
    return found["model"] | small.get("model", {}), settings


def prepare(
    name: str,
    shape: dict[str, Any],
    paths: dict[str, str | None],
    *,
    model: str | None = None,
    tokenizer: str | None = None,
    tiny: bool = False,
) -> Job:
    """Open the data and make the model.

    Args:
        name: "vit" or "lm".
        shape: of the model, as `load_recipe` gives it.
        paths: of "public", "private" and "test" rows; all None with `tiny`: rows that are made up.
        model: folder with pretrained weights of transformers; None: random ones.
        tokenizer: folder of one of transformers; None: that of the model, else bytes.

    Raises:
        InputError: a folder or a package is missing, or the model cannot be made.
    """
    made_up = tiny and not any(paths.values())
    if not made_up and not (paths["public"] and paths["private"]):
        raise InputError(
            "public, private: pass both, " + ("or neither, to train on rows that are made up" if tiny else "folders")
        )
    if model is not None:
        check_folder("model", model)
    return (_vit if name == "vit" else _lm)(shape, paths, made_up, model, tokenizer)


def _vit(shape: dict[str, Any], paths: dict[str, str | None], made_up: bool, path: str | None, _: Any) -> Job:
    size = shape["image_size"]
    if made_up:
        data: dict[str, Any] = {name: made_up_images(count, size, name) for name, count in _TINY_ROWS.items()}
        classes = 3
    else:
        public = ImageFolder("public", str(paths["public"]), size)
        data = {"public": public}
        data |= {n: ImageFolder(n, p, size, public.class_names) for n in ("private", "test") if (p := paths[n])}
        classes = len(public.class_names)
    transformers = _transformers()

    def build() -> nn.Module:
        if path is not None:
            auto = transformers.AutoModelForImageClassification
            return auto.from_pretrained(path, num_labels=classes, ignore_mismatched_sizes=True, **_LOCAL)
        return transformers.ViTForImageClassification(transformers.ViTConfig(num_labels=classes, **shape))

    return Job(_built(build), data, None, _source(made_up, paths))


def _lm(
    shape: dict[str, Any], paths: dict[str, str | None], made_up: bool, path: str | None, tokenizer: str | None
) -> Job:
    shape = dict(shape)
    length, architecture = shape.pop("length"), shape.pop("architecture")
    words = open_tokenizer(tokenizer or (path if path and (Path(path) / "tokenizer_config.json").is_file() else None))
    if made_up:
        lines = {name: made_up_lines(count, length, name) for name, count in _TINY_ROWS.items()}
        data = {name: TextLines(name, found, words, length) for name, found in lines.items()}
    else:
        data = {name: TextLines.read(name, p, words, length) for name, p in paths.items() if p}
    transformers = _transformers()

    def build() -> nn.Module:
        if path is not None:
            return transformers.AutoModelForCausalLM.from_pretrained(path, **_LOCAL)
        given = {"vocab_size": words.size, "max_position_embeddings": length, "bos_token_id": 0, "eos_token_id": 0}
        if "intermediate_size" not in shape and architecture != "gpt2":
            given["intermediate_size"] = 4 * shape["hidden_size"]
        config = transformers.AutoConfig.for_model(architecture, **given, **shape)
        return transformers.AutoModelForCausalLM.from_config(config)

    model = _built(build)
    model.config.use_cache = False  # type: ignore[union-attr]
    known = model.get_input_embeddings().num_embeddings  # type: ignore[operator]
    if words.size > known:
        raise InputError(f"tokenizer: has {words.size} tokens, the model {known}; pass the model's own, --tokenizer")
    return Job(model, data, token_loss, _source(made_up, paths))


#: Nothing is fetched, and weights are float32 until the trainer says otherwise.
_LOCAL = {"local_files_only": True, "dtype": torch.float32}


def _transformers() -> Any:
    return require("transformers", "adamix[deep]", "this recipe")


def _built(build: Any) -> nn.Module:
    """Random weights are the same every time: a resumed run needs those that are not trained."""
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model: nn.Module = build()
    except Exception as error:  # transformers raises many types
        raise InputError(f"model: cannot be made ({one_line(error)}); name a folder with pretrained weights") from error
    return model


def _source(made_up: bool, paths: dict[str, str | None]) -> str:
    return "made up" if made_up else f"user data from {paths['public']}; licence not stated"
