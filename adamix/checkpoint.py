"""Checkpoints of phase 2: pairs of files in a folder, `step-N.safetensors` and `step-N.json`, made whole or not at all.

The tensors are written first, then the JSON that holds their SHA-256 and its own: a pair exists from the instant the
JSON gets its name, by an atomic replace after both are on the disk. The last two pairs are kept. Nothing is unpickled.

No key of the noise is stored. A resumed run draws a fresh one, so the step that was interrupted, whose noise may have
left the process, is taken again with other noise and charged again.
"""

from __future__ import annotations

import contextlib
import hashlib
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load, save
from torch import Tensor

from adamix import durable
from adamix.errors import InputError
from adamix.storage import one_line

FORMAT = 1
_TENSORS = ("weights", "anchor", "start")
#: Before the names of an optimizer's tensors in the file.
_OPTIMIZER = "optimizer."
_KEPT = 2


@dataclass(frozen=True)
class Checkpoint:
    """The state after `finished` steps; all of it may be published as the weights may.

    `weights` now, `anchor` after phase 1, `start` as the model came, each `[P]` float32. `config` as JSON. `fixed`:
    what else must be the same to go on (public rows, shapes). `metrics` of the finished steps. `ledger_count` and
    `ledger_head` are those of the ledger at that instant. `optimizer`: tensors of its state, and `optimizer_state` the
    rest of it as JSON; both empty where there is none.
    """

    run: str
    finished: int
    config: dict[str, Any]
    noise_multiplier: float
    fixed: dict[str, Any]
    metrics: list[dict[str, Any]]
    ledger_count: int
    ledger_head: str
    weights: Tensor
    anchor: Tensor
    start: Tensor
    optimizer: dict[str, Tensor] = field(default_factory=dict)
    optimizer_state: dict[str, Any] = field(default_factory=dict)


def save_checkpoint(folder: str | Path, checkpoint: Checkpoint) -> None:
    """Add a pair to the folder, made if it is not there, then remove all but the last two.

    Raises:
        InputError: it cannot be written; the pairs that were there still load.
    """
    folder = Path(folder)
    try:
        durable.make_folder(folder)
        held = {name: getattr(checkpoint, name) for name in _TENSORS}
        held |= {_OPTIMIZER + name: tensor for name, tensor in checkpoint.optimizer.items()}
        tensors = save({name: tensor.detach().cpu().contiguous().clone() for name, tensor in held.items()})
        record = {key: value for key, value in vars(checkpoint).items() if key not in (*_TENSORS, "optimizer")}
        record |= {"format": FORMAT, "tensors_sha256": hashlib.sha256(tensors).hexdigest()}
        path = folder / f"step-{checkpoint.finished:07d}.json"
        durable.replace_file(path.with_suffix(".safetensors"), tensors)
        durable.replace_file(path, durable.seal(record))
    except OSError as error:
        raise InputError(
            f"checkpoint: {folder} cannot be written ({one_line(error)}); mend that and resume from the one before"
        ) from error
    _prune(folder)


def load_checkpoint(folder: str | Path) -> Checkpoint:
    """The latest pair of the folder.

    Raises:
        InputError: there is none, or it is damaged: an older one is taken only after somebody has looked.
    """
    pairs = _pairs(Path(folder))
    if not pairs:
        raise none_in(folder)
    path, sharded = pairs[-1], False
    try:
        record, _ = durable.unseal(path.read_bytes())
        if sharded := "metadata_sha256" in record:
            raise ValueError("it is of a sharded model")
        data = path.with_suffix(".safetensors").read_bytes()
        if hashlib.sha256(data).hexdigest() != record.pop("tensors_sha256"):
            raise ValueError(f"the checksum of {path.stem}.safetensors is wrong")
        if (found := record.pop("format")) != FORMAT:
            raise ValueError(f"its format is {found}, this version reads {FORMAT}")
        tensors: Any = load(data)
        of_optimizer = {name: tensors.pop(name) for name in list(tensors) if name.startswith(_OPTIMIZER)}
        optimizer = {name.removeprefix(_OPTIMIZER): tensor for name, tensor in of_optimizer.items()}
        if set(tensors) != set(_TENSORS) or record["finished"] != _number(path):
            raise ValueError("it does not hold what its name says")
        if any(t.dim() != 1 or t.dtype != torch.float32 or t.shape != tensors["start"].shape for t in tensors.values()):
            raise ValueError("its tensors are not vectors of one length")
        return Checkpoint(**record, **tensors, optimizer=optimizer)
    except Exception as error:  # a file that somebody made may be wrong in any way
        if sharded:
            raise InputError(
                f"checkpoint: {path} is of a model that was sharded; shard it again to go on, over any number of "
                "processes, also one"
            ) from error
        remedy = f"remove it to resume from {pairs[-2].stem}, whose later steps are charged again" if pairs[1:] else (
            "restore it from a backup; the ledger keeps what was spent"
        )  # fmt: skip
        raise InputError(f"checkpoint: {path} is damaged ({one_line(error)}); {remedy}") from error


def none_in(folder: str | Path) -> InputError:
    return InputError(
        f"checkpoint: {folder} holds none; check the path, or start without resume (an interrupted run without a "
        "checkpoint was not charged)"
    )


def check_unused(folder: str | Path) -> None:
    """Refuse a folder that holds a run, before a new one begins in it."""
    if holds_a_run(folder):
        raise InputError(f"checkpoint: {folder} holds a run already; resume it, or name a new folder")


def holds_a_run(folder: str | Path) -> bool:
    return bool(_pairs(Path(folder)))


def _pairs(folder: Path) -> list[Path]:
    """The JSON files, oldest first; tensors without one were not finished."""
    if not folder.exists():
        return []
    try:
        return sorted((p for p in folder.iterdir() if re.fullmatch(r"step-\d{7,}\.json", p.name)), key=_number)
    except OSError as error:
        raise InputError(f"checkpoint: {folder} cannot be read ({one_line(error)}); name a folder") from error


def _number(path: Path) -> int:
    return int(path.stem.removeprefix("step-"))


def _prune(folder: Path) -> None:
    """A crash in between leaves files too many, a failure as well: neither does harm."""
    for path in _pairs(folder)[:-_KEPT]:
        with contextlib.suppress(OSError):
            durable.remove(path)  # first: tensors alone are no checkpoint
            durable.remove(path.with_suffix(".safetensors"))
