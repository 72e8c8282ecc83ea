"""Checkpoints of which each rank of a job writes and reads its own part, by torch.distributed.checkpoint."""

from __future__ import annotations

import contextlib
import hashlib
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save

from adamix import durable
from adamix.errors import InputError
from adamix.storage import one_line

_FORMAT = 2
_KEPT = 2


def on_first(action: Callable[[], Any], group: Any = None) -> Any:
    """What `action` returns on rank 0, which alone runs it, on all ranks once it has succeeded; pickled in between.

    Raises:
        InputError: on all ranks, what was raised on rank 0; or this rank is not in the group, and would go on at once.
    """
    if dist.get_rank(group) < 0:
        raise InputError(f"group: rank {dist.get_rank()} is not in it; call this on its members alone")
    known: list[Any] = [None, None]
    if dist.get_rank(group) == 0:
        try:
            known = [action(), None]
        except Exception as error:  # whatever it is, no rank may go on
            known = [None, f"{error}" if isinstance(error, InputError) else f"{type(error).__name__}: {error}"]
    dist.broadcast_object_list(known, group=group, group_src=0)
    if known[1] is not None:
        raise InputError(known[1])
    return known[0]


def save_parts(folder: str | Path, finished: int, state: dict[str, Any], record: dict[str, Any]) -> None:
    """A checkpoint after `finished` steps, by all ranks, each its own part; then all but the last two are removed.

    `step-N` is a folder of torch.distributed.checkpoint; it counts once `step-N.json` is there, which rank 0 writes
    when all of it is on the disk, with the checksums of its files.

    Args:
        state: tensors, in nested dicts.
        record: what is in the JSON beside, of rank 0.

    Raises:
        InputError: on all ranks: it cannot be written; the checkpoints that were there still load.
    """
    path = _folder_of(folder, finished)

    def make_room() -> None:
        durable.make_folder(path.parent)
        if path.exists() and not path.with_suffix(".json").exists():
            shutil.rmtree(path)  # what a crash left, perhaps of other ranks

    on_first(make_room)
    _together(lambda: dcp_save(state, checkpoint_id=path))
    files = _checksums(path)

    def seal() -> None:
        durable.sync_folder(path)
        written = {part.relative_path for part in FileSystemReader(path).read_metadata().storage_data.values()}
        if unread := written - files.keys():
            raise InputError(
                f"checkpoint: {path / min(unread)} cannot be read again; let all ranks write to one folder, on a disk "
                "that they share, and resume"
            )
        sealed = {**record, "format": _FORMAT, "metadata_sha256": _digest(path / ".metadata"), "files": files}
        durable.replace_file(path.with_suffix(".json"), durable.seal(sealed))
        for old in _finished(path.parent)[:-_KEPT]:
            with contextlib.suppress(OSError):
                durable.remove(old)  # first: a folder alone is no checkpoint
                shutil.rmtree(old.with_suffix(""))

    on_first(seal)


def newest(folder: str | Path, keys: set[str]) -> dict[str, Any] | None:
    """The record of the newest checkpoint, with its `finished`; None if there is none. For one process.

    Args:
        keys: what it must hold; other programs write checkpoints of this kind as well.

    Its metadata are a pickle, which is read only if it is the one that was written; that whoever can write the folder
    is trusted remains.

    Raises:
        InputError: it is damaged, or of another program.
    """
    found = _finished(Path(folder)) if Path(folder).exists() else []
    if not found:
        return None
    path = found[-1]
    try:
        record, _ = durable.unseal(path.read_bytes())
    except (OSError, ValueError) as error:
        raise InputError(
            f"checkpoint: {path} is damaged ({one_line(error)}); remove it to use the one before"
        ) from error
    if "metadata_sha256" not in record:
        raise InputError(f"checkpoint: {path} is of a model that is not sharded; go on with it as it was")
    if missing := keys - record.keys():
        raise InputError(
            f"checkpoint: {path} holds no {min(missing)!r}: DeepAdaMix and adamix.distributed.save do not read each "
            "other's; go on with the one that wrote it"
        )
    if record["finished"] != _number(path):
        raise InputError(f"checkpoint: {path} is of step {record['finished']}; give it back its name, or remove it")
    metadata = path.with_suffix("") / ".metadata"
    if record["format"] != _FORMAT or not metadata.exists() or record["metadata_sha256"] != _digest(metadata):
        raise InputError(f"checkpoint: {path.with_suffix('')} is not as it was written; remove {path}")
    return record


def load_parts(folder: str | Path, record: dict[str, Any], state: dict[str, Any]) -> None:
    """Fill the tensors of `state` with those of the checkpoint that `newest` gave the record of, each rank its part.

    Raises:
        InputError: on all ranks: it is not as it was written, or does not hold these tensors.
    """
    path = _folder_of(folder, record["finished"])
    found = _checksums(path)
    for name, checksum in record["files"].items():
        if found.get(name) != checksum:
            raise InputError(
                f"checkpoint: {path / name} is not as it was written; remove {path.with_suffix('.json')} to use the "
                "one before"
            )
    _together(lambda: dcp_load(state, checkpoint_id=path))


def write_whole(folder: Path, states: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Each of the `states` of a sharded model as one safetensors file of this name, in a folder that is made anew.

    No rank gathers a tensor: each writes its rows, and rank 0 copies them together from file to file.

    Raises:
        InputError: on all ranks: it cannot be written.
    """
    on_first(lambda: _empty(folder))
    for name, state in states.items():
        made = folder / f"{name}-parts"
        writer = HuggingFaceStorageWriter(str(made), save_distributed=True, enable_consolidation=True)
        _together(lambda state=state, writer=writer: dcp_save(dict(state), storage_writer=writer))  # type: ignore[misc]

        def move(name: str = name, made: Path = made) -> None:
            (whole,) = made.glob("*.safetensors")
            durable.rename(whole, folder / f"{name}.safetensors")
            shutil.rmtree(made)

        on_first(move)


def _empty(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    durable.make_folder(folder)


def _together(action: Callable[[], Any]) -> None:
    """torch.distributed.checkpoint raises on all ranks what one of them met."""
    try:
        action()
    except CheckpointException as error:
        reasons = "; ".join(f"rank {rank}: {reason[0]}" for rank, reason in error.failures.items())
        raise InputError(f"checkpoint: {reasons}") from error


def _checksums(path: Path) -> dict[str, str]:
    """SHA-256 of the files of tensors, of which each rank reads a share; one that cannot be read has none."""
    names = sorted(p.name for p in path.glob("*.distcp"))
    own = {}
    for name in names[dist.get_rank() :: dist.get_world_size()]:
        with contextlib.suppress(OSError):
            own[name] = _digest(path / name)
    shares: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(shares, own)
    return {name: checksum for share in shares for name, checksum in share.items()}


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _folder_of(folder: str | Path, finished: int) -> Path:
    return Path(folder) / f"step-{finished:07d}"


def _finished(folder: Path) -> list[Path]:
    """The JSON files, oldest first."""
    return sorted((p for p in folder.iterdir() if re.fullmatch(r"step-\d{7,}\.json", p.name)), key=_number)


def _number(path: Path) -> int:
    return int(path.stem.removeprefix("step-"))
