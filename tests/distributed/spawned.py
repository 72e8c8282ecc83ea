"""Runs functions on the ranks of a job: gloo on processes of this machine, NCCL where each can have a GPU."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

Check = Callable[..., Any]

_context = multiprocessing.get_context("forkserver")  # imports torch once for all ranks
_context.set_forkserver_preload(["rank_checks"])


def device_of(rank: int) -> torch.device:
    return torch.device("cuda", rank) if dist.get_backend() == "nccl" else torch.device("cpu")


def start(rank: int, size: int, folder: Path, backend: str, timeout: float) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    if backend == "nccl":
        torch.cuda.set_device(rank)
    store = dist.FileStore(str(folder / f"store-{size}"), size)
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timedelta(seconds=timeout))


def _run(
    rank: int, size: int, folder: Path, backend: str, checks: Sequence[tuple[str, Check, tuple[Any, ...]]]
) -> None:
    results: dict[str, Any] = {}
    start(rank, size, folder, backend, 60)
    for name, check, arguments in checks:
        began = time.monotonic()
        try:
            results[name] = check(*arguments)
            if rank == 0 and os.environ.get("SHOW"):
                print(f"{size} {time.monotonic() - began:6.2f} s  {name}", flush=True)
        except Exception:  # the others may wait for this rank: it cannot go on
            results[name] = AssertionError(traceback.format_exc())
            break
    if os.environ.get("SHOW"):
        print(f"{size} {time.process_time():6.2f} s of the processor on rank {rank}", flush=True)
    (folder / f"result-{size}-{rank}").write_bytes(pickle.dumps(results))
    if len(results) == len(checks):
        dist.barrier()
        dist.destroy_process_group()


def run(
    size: int,
    folder: Path,
    checks: Sequence[tuple[str, Check, tuple[Any, ...]]],
    backend: str = "gloo",
    limit: float = 300,
) -> list[dict[str, Any]]:
    """What each check gave on each rank; an `AssertionError` is what it raised."""
    ranks = [_context.Process(target=_run, args=(rank, size, folder, backend, checks)) for rank in range(size)]
    for process in ranks:
        process.start()
    end = time.monotonic() + limit
    for process in ranks:
        process.join(max(0.1, end - time.monotonic()))
    for process in ranks:
        if process.is_alive():
            process.kill()
    found = [folder / f"result-{size}-{rank}" for rank in range(size)]
    return [pickle.loads(path.read_bytes()) if path.exists() else {} for path in found]
