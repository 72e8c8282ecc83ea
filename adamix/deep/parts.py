"""Checkpoints of a sharded model: rank 0 writes what they say, and each rank its part of the tensors."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, zeros

from adamix.checkpoint import Checkpoint, none_in
from adamix.deep.config import DeepConfig
from adamix.deep.sharding import local
from adamix.deep.weights import Training
from adamix.errors import InputError
from adamix.models import Weights
from adamix.parts import load_parts, newest, save_parts
from adamix.recorder import Recorder

_NONE = torch.empty(0)


class PartsRecorder(Recorder[DeepConfig]):
    """That of rank 0. A checkpoint that is due is not written but left in `due`, for all ranks to write."""

    due: Checkpoint | None = None
    found: dict[str, Any] | None = None  # the record that it goes on from

    def take_due(self) -> Checkpoint | None:
        due, self.due = self.due, None
        return due

    def _load(self, folder: Path) -> Checkpoint:
        tensors = {"weights", "anchor", "start", "optimizer"}
        known = {f.name for f in dataclasses.fields(Checkpoint)} - tensors
        record = self.found = newest(folder, {*known, "optimizer_tensors"})
        if record is None:
            raise none_in(folder)
        return Checkpoint(**{key: record[key] for key in known}, weights=_NONE, anchor=_NONE, start=_NONE)

    def _save(self, view: Weights) -> None:
        self.due = Checkpoint(**self._record(), weights=_NONE, anchor=_NONE, start=_NONE)


def save(folder: Path, due: Checkpoint | None, finished: int, training: Training, anchor: Tensor) -> None:
    """By all ranks.

    Args:
        due: on rank 0 what it says.
        anchor: this rank's part of the phase-1 weights.
    """
    optimizer, state = training.optimizer_state()
    like = next(iter(training.named.values()))
    record = {"optimizer_state": state, "optimizer_tensors": {key: _form(x, like) for key, x in optimizer.items()}}
    if due is not None:
        beside = {"weights", "anchor", "start", "optimizer", "optimizer_state"}
        record |= {key: value for key, value in vars(due).items() if key not in beside}
    save_parts(folder, finished, _tree(training, training.tensors_of(anchor), optimizer), record)


def load(folder: Path, saved: Checkpoint, record: dict[str, Any], training: Training) -> Checkpoint:
    """By all ranks: `saved`, which was made of `record`, with this rank's parts of its tensors.

    The trained parameters take on the weights.
    """
    like = next(iter(training.named.values()))
    anchor = training.tensors_of(torch.zeros_like(training.weights()))
    optimizer = {key: _empty(form, like) for key, form in record["optimizer_tensors"].items()}
    load_parts(folder, record, _tree(training, anchor, optimizer))
    known = torch.cat([local(x).cpu().flatten().float() for x in anchor.values()])
    return dataclasses.replace(saved, weights=training.weights(), anchor=known, start=known, optimizer=optimizer)


def _tree(training: Training, anchor: dict[str, Tensor], optimizer: dict[str, Tensor]) -> dict[str, Any]:
    weights = {name: p.detach() for name, p in training.named.items()}
    return {"weights": weights, "anchor": anchor, "optimizer": optimizer}


def _form(x: Tensor, like: Tensor) -> list[Any]:
    """Type, shape, and whether it is sharded as the parameters are."""
    if isinstance(x, DTensor) and (not isinstance(like, DTensor) or x.placements != like.placements):
        raise InputError(
            f"optimizer: its state is placed as {x.placements}, unlike the parameters, which a checkpoint cannot hold; "
            "pass 'adamw' or 'sgd', or no checkpoint"
        )
    return [str(x.dtype).removeprefix("torch."), list(x.shape), isinstance(x, DTensor)]


def _empty(form: list[Any], like: Tensor) -> Tensor:
    dtype, shape, sharded = getattr(torch, form[0]), form[1], form[2]
    if not sharded:
        return torch.zeros(shape, dtype=dtype)
    assert isinstance(like, DTensor)
    return zeros(shape, dtype=dtype, device_mesh=like.device_mesh, placements=like.placements)
