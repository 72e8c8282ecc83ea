"""A training script as `torchrun` starts it; in its first life one rank dies in the midst of a step."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from adamix import distributed
from adamix_kernels import DPEngine, Noise, PoissonSampler

STEPS, ROWS, RATE, SIGMA = 5, 64, 0.25, 1.0


def main(folder: Path, kind: str, dies_at: int) -> None:
    torch.set_num_threads(1)
    backend = "nccl" if torch.cuda.device_count() >= int(os.environ["LOCAL_WORLD_SIZE"]) else "gloo"
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if backend == "nccl" else torch.device("cpu")
    distributed.start(backend)
    torch.manual_seed(0)
    model: nn.Module = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 3)).to(device)
    if kind == "ddp":
        model = DistributedDataParallel(model)
    else:
        fully_shard(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    sampler = PoissonSampler(ROWS, RATE, rank=dist.get_rank(), world_size=dist.get_world_size())
    x, y = torch.randn(ROWS, 8, device=device), torch.arange(ROWS, device=device) % 3
    ledger = distributed.RankLedger(folder / "rows.ledger")
    found = distributed.load(folder / "run", model, optimizer, ledger)
    engine = DPEngine(
        model,
        optimizer,
        max_grad_norm=1.0,
        noise_multiplier=SIGMA,
        expected_batch_size=sampler.expected_batch_size,
        noise=Noise(mode="secure"),
        strategy="per_layer",
    )
    if found is None:
        run = ledger.start_run(noise_multiplier=SIGMA, sample_rate=RATE, steps=STEPS, delta=1e-5)
        finished = 0
    else:
        run, finished = found.run, found.finished
        engine.load_state_dict(found.engine)
        ledger.resume_run(run, STEPS - finished)
    life = int(os.environ["TORCHELASTIC_RESTART_COUNT"])
    (folder / f"key-{life}-{dist.get_rank()}").write_text(str(engine.noise._key))
    for step in range(finished, STEPS):
        charged = ledger.charge(run)
        rows = sampler.draw()
        F.cross_entropy(model(x[rows]), y[rows], reduction="sum").backward()
        if life == 0 and step == dies_at and dist.get_rank() == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        optimizer.step()
        optimizer.zero_grad()
        distributed.save(folder / "run", engine, run, step + 1, ledger)
    ledger.end_run(run)
    ledger.close()
    if dist.get_rank() == 0:
        result = {"life": life, "finished": finished, "charged": charged, "steps": engine.steps}
        (folder / "result.json").write_text(json.dumps(result))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
    distributed.stop()
