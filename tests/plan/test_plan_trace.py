"""The trace of a step on meta tensors, against the step itself: its products, its memory, and what its ops return."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from plan_models import WORKS
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.flop_counter import FlopCounterMode

from adamix.deep.memory import recompute_activations
from adamix.errors import InputError
from adamix.plan import Job, Setting, preset, resolve
from adamix.plan.allocated import peak_allocated
from adamix.plan.rates import BY_FLOPS
from adamix.plan.results import RESULTS
from adamix.plan.steps import OPTIMIZERS, PRECISIONS, STRATEGIES, attach, trace_step
from adamix.plan.trace import FLASH_FLOPS, Trace
from adamix_kernels.spec import OPS, device_type, stand_in

#: A machine on which a process takes nothing before its first tensor.
NOTHING = dataclasses.replace(preset("h200"), reserved=0)
#: A machine on which nothing but products takes time.
ARITHMETIC = dataclasses.replace(
    NOTHING,
    device="cpu",
    curves={f"{kind}.float32": [(1.0, 1e-12), (1e15, 1e-12 if kind == "pool" else 1e3)] for kind in BY_FLOPS},
)
CASES = [(name, case) for name in RESULTS for case in OPS[name].cases()]


@pytest.mark.parametrize(("name", "case"), CASES, ids=[f"{name}, {case.name}" for name, case in CASES])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_results_are_those_of_the_references(name: str, case: Any, dtype: torch.dtype) -> None:
    given = case.build(torch.Generator().manual_seed(0))
    given = tree_map(lambda x: x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x, given)
    arguments = {**OPS[name]._defaults, **given}

    def described(out: Any) -> Any:
        return [
            (x.shape, x.dtype) if isinstance(x, Tensor) else x for x in tree_leaves(out, is_leaf=lambda x: x is None)
        ]

    assert described(RESULTS[name](arguments)) == described(OPS[name](**given))


def real_step(name: str, setting: Setting, watch: Callable[[Callable[[], None]], Any]) -> int:
    """The second step, given to `watch`. Gives the bytes of what stays: model, rows, what the first step has made."""
    work, samples = WORKS[name]
    model = work.build().to(PRECISIONS[setting.precision])
    x, y = work.batch(samples + setting.public_rows)
    x = x.to(PRECISIONS[setting.precision]) if x.is_floating_point() else x
    chosen = OPTIMIZERS[setting.optimizer](model.parameters(), lr=1e-3)
    engine = attach(model, chosen, setting, samples)

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=setting.precision == "autocast"):
            loss = work.loss(model, x, y)
        public = engine is not None and setting.public_rows
        with engine.mixed(slice(0, setting.public_rows)) if engine and public else contextlib.nullcontext():
            loss.backward() if engine is None else engine.backward(loss)
        del loss
        chosen.step()
        chosen.zero_grad()

    with recompute_activations(model, setting.checkpointing):
        step()
        watch(step)
    state = [s for state in chosen.state.values() for s in state.values()]
    return sum(
        t.untyped_storage().nbytes()
        for t in [*map(torch.Tensor.detach, model.parameters()), *model.buffers(), x, y, *state]
    )


def within(context: contextlib.AbstractContextManager[Any]) -> Callable[[Callable[[], None]], None]:
    def watch(step: Callable[[], None]) -> None:
        with context:
            step()

    return watch


def allocated(name: str, setting: Setting) -> int:
    """Bytes that torch's allocator has given out at the peak of a real step, on one thread: products of bfloat16 that
    several share are summed in scratch of each."""
    peaks: list[int] = []
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        stays = real_step(name, setting, lambda step: peaks.append(peak_allocated(step)))
    finally:
        torch.set_num_threads(threads)
    return stays + peaks[0]


OPTIONS = {
    "autocast": {"precision": "autocast"},
    "bfloat16": {"precision": "bfloat16"},
    "public rows": {"public_rows": 8},
    "secure": {"noise_mode": "secure"},
    "public rows, secure": {"public_rows": 8, "noise_mode": "secure"},
    "public rows, autocast": {"public_rows": 8, "precision": "autocast"},
}


@pytest.mark.parametrize("name", ["mlp", "transformer"])
@pytest.mark.parametrize("strategy", [None, "auto", "per_layer"])
@pytest.mark.parametrize("option", OPTIONS)
def test_memory_with_options_is_that_of_the_real_step(name: str, strategy: str | None, option: str) -> None:
    setting = Setting(strategy, device="cpu", **OPTIONS[option])
    planned = Job(WORKS[name][0], setting, WORKS[name][1]).memory(WORKS[name][1], NOTHING).total
    assert planned / allocated(name, setting) == pytest.approx(1, abs=0.01)


@pytest.fixture
def gpt2(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a model of transformers, which knows how to compute activations again."""
    pytest.importorskip("transformers")
    shape = {"model_type": "gpt2", "n_embd": 64, "n_layer": 4, "n_head": 2, "vocab_size": 99, "n_positions": 64}
    dropout = dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop"), 0.0)
    (tmp_path / "config.json").write_text(json.dumps(shape | dropout))
    monkeypatch.setitem(WORKS, "gpt2", (resolve(str(tmp_path)), 8))
    return "gpt2"


@pytest.mark.parametrize("precision", ["float32", "autocast"])
@pytest.mark.parametrize("strategy", [None, "auto", "per_layer"])
def test_checkpointing_is_that_of_the_real_step(gpt2: str, strategy: str | None, precision: str) -> None:
    """In an ordinary step each product, of which those of the blocks are made again; memory to 5 %, with and without:
    where gradients meet in GPT-2's activation function, torch adds in place what a plan holds twice."""
    work, samples = WORKS[gpt2]
    setting = Setting(strategy, optimizer="sgd", precision=precision, device="cpu", checkpointing=True)
    job = Job(work, setting, samples)
    assert job.memory(samples, NOTHING).total / allocated(gpt2, setting) == pytest.approx(1, abs=0.05)
    kept = Job(work, dataclasses.replace(setting, checkpointing=False), samples)
    assert job.memory(samples, NOTHING).total < 0.8 * kept.memory(samples, NOTHING).total
    ratio = job.estimate(samples, ARITHMETIC).time.total / kept.estimate(samples, ARITHMETIC).time.total
    assert 1.2 < ratio < 4 / 3  # of four products forward and backward one more
    if strategy is None:
        real = Trace("cpu")
        real_step(gpt2, setting, within(real))
        products, found = (
            Counter({call: n for call, n in alike(trace).items() if call[0] in BY_FLOPS})
            for trace in (job.traced(samples).trace, real)
        )
        assert products == found


def test_checkpointing_of_other_models_is_refused() -> None:
    with pytest.raises(InputError, match="checkpointing: the model is none of transformers"):
        trace_step(WORKS["mlp"][0], Setting(checkpointing=True), 4)


@pytest.mark.parametrize("name", WORKS)
@pytest.mark.parametrize("strategy", [None, *STRATEGIES])
def test_memory_is_that_of_the_real_step(name: str, strategy: str | None) -> None:
    """Of what torch allocates to 1 %. What oneDNN copies within convolutions depends on the processor."""
    work, samples = WORKS[name]
    setting = Setting(strategy, device="cpu")
    share = Job(work, setting, samples).memory(samples, NOTHING).total / allocated(name, setting)
    assert (0.9 if name == "cnn" else 0.99) <= share <= (1.2 if name == "cnn" else 1.01)


@pytest.mark.parametrize("name", ["mlp", "cnn"])
def test_products_are_those_of_the_real_step(name: str) -> None:
    """Of the ordinary step exactly; attention on a CPU is not in torch's counter."""
    work, samples = WORKS[name]
    counter = FlopCounterMode(display=False)
    setting = Setting(None, device="cpu")
    real_step(name, setting, within(counter))
    trace = trace_step(work, setting, samples).trace
    found = sum(call.flops * n for call, n in trace.calls.items() if call.kind != "pool")  # which multiplies nothing
    assert found == counter.get_total_flops()


@pytest.mark.parametrize("name", WORKS)
@pytest.mark.parametrize("precision", ["float32", "autocast"])
def test_calls_are_those_of_the_real_step(name: str, precision: str) -> None:
    """Of an ordinary step each ATen operation, in the type in which it is made: what autocast casts, too."""
    setting = Setting(None, optimizer="sgd", precision=precision, device="cpu")
    real = Trace("cpu")
    real_step(name, setting, within(real))
    planned = trace_step(WORKS[name][0], setting, WORKS[name][1]).trace

    assert alike(planned) == alike(real)


def alike(trace: Trace) -> Counter[Any]:
    """The calls of all phases."""
    calls: Counter[Any] = Counter()
    for call, n in trace.calls.items():
        calls[call[1:]] += n
    return calls


def note_ops(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """Names and products of the ops that run from now on, however they do it."""
    noted: list[tuple[str, int]] = []
    for op in set(OPS.values()):

        def run(bound: Any, device: Any, op: Any = op, run: Any = op._run) -> Any:
            noted.append((op.name, op.cost(**bound).flops))
            with _disable_current_modes():
                return run(bound, device)

        monkeypatch.setattr(op, "_run", run)
    return noted


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_ops_are_those_of_the_real_step(strategy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every op is called as often, with the same cost."""
    work, samples = WORKS["transformer"]
    real = note_ops(monkeypatch)
    setting = Setting(strategy, optimizer="sgd", device="cpu")
    real_step("transformer", setting, lambda step: step())
    monkeypatch.undo()
    trace = trace_step(work, setting, samples).trace
    planned = sorted(
        (c.kind.split(",")[0], c.flops) for c, n in trace.calls.items() if c.kind.split(",")[0] in OPS for _ in range(n)
    )
    assert planned == sorted(real[len(real) // 2 :])


@pytest.mark.parametrize("name", WORKS)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_ratio_of_times_is_that_of_products(name: str, strategy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a private step to an ordinary one, where products decide: as torch counts them in real steps, and as the ops'
    costs say of what torch does not see."""
    work, samples = WORKS[name]

    def products(setting: Setting) -> int:
        counter = FlopCounterMode(display=False)
        counter.flop_registry = counter.flop_registry | FLASH_FLOPS  # attention on a CPU is not in torch's own
        ops = note_ops(monkeypatch)
        real_step(name, setting, within(counter))
        monkeypatch.undo()
        return counter.get_total_flops() + sum(flops for op, flops in ops[len(ops) // 2 :] if op in BY_FLOPS)

    private = Setting(strategy, optimizer="sgd", device="cpu")
    job = Job(work, private, samples)
    planned = job.estimate(samples, ARITHMETIC).time.total
    ordinary = job.without_privacy().estimate(samples, ARITHMETIC).time.total
    counted = products(private) / products(dataclasses.replace(private, strategy=None))
    assert planned / ordinary == pytest.approx(counted, rel=1e-6)


def test_strategies_keep_what_they_say() -> None:
    """materialize holds per-sample gradients of everything, per_layer of one layer at most."""
    work, samples = WORKS["mlp"]

    def held(strategy: str | None) -> int:
        return Job(work, Setting(strategy, device="cpu"), samples).memory(samples, NOTHING).total

    parameters = sum(p.numel() for p in work.build().parameters())
    assert held("materialize") - held(None) > 3 * samples * parameters
    assert held("per_layer") - held(None) < 2 * 4 * parameters


def test_accumulated_sums_are_held() -> None:
    """Micro-batches after the first find the sums of those before; the calls of one of them are kept."""
    work, _ = WORKS["mlp"]
    setting = Setting("auto", device="cpu")
    one, more = (trace_step(work, setting, 4, accumulate) for accumulate in (False, True))
    parameters = sum(p.numel() for p in work.build().parameters())
    assert more.trace.peaks["private forward"]["sums"] == 4 * parameters
    assert "sums" not in one.trace.peaks["private forward"]
    count = {c: n for c, n in one.trace.calls.items() if c.phase == "private forward"}
    assert count == {c: n for c, n in more.trace.calls.items() if c.phase == "private forward"}


def test_a_model_that_looks_at_values_is_refused() -> None:
    x = torch.ones(3, device="meta")
    trace = Trace("cpu")
    with pytest.raises(InputError, match="looks at the values"), trace.of("forward", "activations"):
        float(x.sum())


def test_what_stands_in_ends_with_its_block() -> None:
    x = torch.ones(3, 4, device="meta")
    seen = []
    with stand_in(lambda op, arguments: seen.append(op.name), "cpu"):
        OPS["grad_norm_sq"](x)
        assert device_type(x) == "cpu"
    assert seen == ["grad_norm_sq"]
    assert device_type(x) == "meta"
    assert OPS["grad_norm_sq"](torch.ones(3, 4)).tolist() == pytest.approx([4.0] * 3)
