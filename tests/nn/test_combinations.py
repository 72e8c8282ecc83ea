"""Ways to train that go together: a step is the one without checkpointing or compiling, and a row adds at most C."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import pytest
import torch
import torch._functorch.config
import torch.nn.functional as F
from plain_loop import STRATEGIES, engine, step
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from adamix_kernels import DPEngine, Noise, PrivacyError, PublicQuantile

ROWS, LIMIT = 9, 0.3
PUBLIC = torch.arange(ROWS) % 3 == 0
OWNERS = [7, 7, 1, 2, 2, 2, 8, 8, 9]  # of as many rows as are private

MIXED: dict[str, Any] = {"private": None, "slice": slice(0, 3), "mask": PUBLIC}


class Part(nn.Module):
    """With dropout as transformers have it, a function that looks at the mode of its module."""

    def __init__(self, chance: float = 0.0) -> None:
        super().__init__()
        self.norm, self.up, self.down, self.chance = nn.LayerNorm(8), nn.Linear(8, 12), nn.Linear(12, 8), chance

    def forward(self, x: Tensor) -> Tensor:
        h = F.dropout(F.gelu(self.up(self.norm(x))), p=self.chance, training=self.training)
        return x + F.dropout(self.down(h), p=self.chance, training=self.training)


class Words(nn.Module):
    def __init__(self, reentrant: bool | None = None, chance: float = 0.0, **how: Any) -> None:
        super().__init__()
        self.words, self.parts, self.head = (
            nn.Embedding(11, 8),
            nn.ModuleList(Part(chance) for _ in range(2)),
            nn.Linear(8, 3),
        )
        self.reentrant, self.how = reentrant, how

    def forward(self, ids: Tensor) -> Tensor:
        h = self.words(ids)
        for part in self.parts:
            h = part(h) if self.reentrant is None else checkpoint(part, h, use_reentrant=self.reentrant, **self.how)
        return self.head(h).mean(1)


def words(*args: Any, **how: Any) -> nn.Module:
    torch.manual_seed(0)
    return Words(*args, **how)


def ids(seed: int, positions: int = 5) -> Tensor:
    return torch.randint(11, (ROWS, positions), generator=torch.Generator().manual_seed(seed))


def loss_of(out: Tensor, weight: Tensor | None = None) -> Tensor:
    rows = (out * torch.linspace(-1, 2, 3)).sum(1) + 0.3 * out.square().sum(1)
    return (rows if weight is None else rows * weight).sum()


def secret() -> Noise:
    return Noise._with_key(bytes(range(32)), "secure")


def backward(
    dp: DPEngine,
    call: Callable[[Tensor], Tensor],
    seed: int,
    rows: Any,
    owners: Any,
    half: bool = False,
    weight: Tensor | None = None,
) -> None:
    """One pass, with whatever it has to be within."""
    private = ROWS if rows is None else ROWS - 3
    with ExitStack() as within:
        if owners is not None:
            within.enter_context(dp.users(owners[:private]))
        if rows is not None:
            within.enter_context(dp.mixed(rows, weight=0.5))
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            out = call(ids(seed))
        dp.backward(loss_of(out.float(), weight))


def settings_of(strategy: str, mode: str, unit: str, rows: Any, adaptive: bool) -> dict[str, Any]:
    """Of an engine; adaptive thresholds need public rows."""
    limit = PublicQuantile(0.5) if adaptive and rows is not None else LIMIT
    noise = secret() if mode == "secure" else Noise(seed=5)
    return {
        "strategy": strategy,
        "unit": unit,
        "max_grad_norm": limit,
        "noise": noise,
        "noise_multiplier": 0.7,
        "expected_batch_size": 8.0,
        "loss_reduction": "sum",
    }


def close(got: dict[str, Tensor], want: dict[str, Tensor], rtol: float = 1e-6, atol: float = 1e-6) -> None:
    assert got.keys() == want.keys()
    for name, value in want.items():
        torch.testing.assert_close(
            got[name], value, rtol=rtol, atol=atol, msg=lambda text, name=name: f"{name}: {text}"
        )


CELLS = [
    cell
    for cell in itertools.product(STRATEGIES, ("fast", "secure"), ("sample", "user"), MIXED)
    if cell[0] != "two_pass" or cell[1:3] == ("fast", "sample")
]


@pytest.mark.parametrize("reentrant", [False, True], ids=["checkpoint", "reentrant checkpoint"])
@pytest.mark.parametrize("strategy, mode, unit, mixed", CELLS)
def test_recomputed_parts_change_nothing(strategy: str, mode: str, unit: str, mixed: str, reentrant: bool) -> None:
    """With secure noise, users, public rows and autocast; over two passes a step, and two steps; noise included."""
    rows = MIXED[mixed]
    for half in (False, True):
        found = []
        for kind in (None, reentrant):
            dp = engine(words(kind), **settings_of(strategy, mode, unit, rows, adaptive=True))
            dp.optimizer.param_groups[0]["lr"] = 0.1
            releases = []
            for number in range(2):
                backward(dp, dp.model, number, rows, OWNERS if unit == "user" else None, half)
                backward(dp, dp.model, 9 + number, rows, [x + 100 for x in OWNERS] if unit == "user" else None, half)
                releases.append(step(dp))
            found.append(releases)
        for got, want in zip(*found, strict=True):
            close(got, want)


@pytest.mark.parametrize("strategy, mode, unit, mixed", [cell for cell in CELLS if cell[3] != "slice"])
def test_a_row_or_user_adds_at_most_the_threshold(strategy: str, mode: str, unit: str, mixed: str) -> None:
    """Among others that stay as they are; recomputed, and in half precision. The row's loss is large."""
    rows = MIXED[mixed]
    private = (~rows).nonzero().flatten() if rows is not None else torch.arange(ROWS)
    one = private[:2] if unit == "user" else private[3:4]
    for reentrant, half in ((False, True), (True, False)):
        sums = []
        for factor in (1e4, 0.0):
            settings = settings_of(strategy, mode, unit, rows, adaptive=True)
            dp = engine(words(reentrant), **{**settings, "noise_multiplier": 0.0, "expected_batch_size": 1.0})
            backward(dp, dp.model, 3, rows, OWNERS if unit == "user" else None, half, _weights(one, factor))
            limit = torch.stack([*dp.thresholds.values()]).norm() if strategy == "per_layer" else dp.thresholds
            sums.append(step(dp))
        moved = torch.stack([(sums[0][n].double() - sums[1][n].double()).norm() for n in sums[0]]).norm()
        moved *= 1 if rows is None else 1 + 0.5 * 3  # the mean is over the expected batch size and public rows
        assert 0.9 * limit < moved <= limit * (1 + 1e-6) + 1e-7, (float(moved), float(limit))


def _weights(rows: Tensor, factor: float) -> Tensor:
    found = torch.ones(ROWS)
    found[rows] = factor
    return found


COMPILED = [
    ("auto", "secure", "sample", "mask", None, False),
    ("per_layer", "secure", "user", "slice", None, False),
    ("auto", "fast", "user", "mask", None, True),
    ("materialize", "secure", "user", "private", False, False),
    ("book_keeping", "fast", "sample", "slice", False, True),
    ("per_layer", "fast", "sample", "mask", False, False),
    ("two_pass", "fast", "sample", "slice", None, False),
    ("two_pass", "fast", "sample", "private", False, False),
    ("auto", "secure", "sample", "slice", True, False),
    ("per_layer", "fast", "user", "private", True, False),
    ("two_pass", "fast", "sample", "mask", True, False),
]


@pytest.mark.parametrize("cell", COMPILED, ids=str)
def test_compiled_steps_of_all_kinds(cell: tuple[Any, ...]) -> None:
    strategy, mode, unit, mixed, reentrant, half = cell
    rows, found = MIXED[mixed], []
    for given in (False, True):
        torch._dynamo.reset()
        dp = engine(words(reentrant if given else None), **settings_of(strategy, mode, unit, rows, adaptive=True))
        call: Any = torch.compile(dp.model, backend="aot_eager") if given else dp.model
        with torch._functorch.config.patch(donated_buffer=strategy != "two_pass"):
            for number in range(2):  # passes of one step
                owners = [x + 100 * number for x in OWNERS] if unit == "user" else None
                backward(dp, call, number, rows, owners, half)
        found.append(step(dp))
    close(found[1], found[0], rtol=1e-5, atol=2e-6)


# --- functions that look at the mode of their module ------------------------------------------------------------------

WAYS = [(strategy, mixed) for strategy in STRATEGIES for mixed in ("private", "mask")]


@pytest.mark.parametrize("reentrant", [False, True], ids=["checkpoint", "reentrant checkpoint"])
@pytest.mark.parametrize("strategy, mixed", WAYS)
def test_a_recomputed_part_has_the_same_masks(strategy: str, mixed: str, reentrant: bool) -> None:
    """In both modes; also where the batch is as long as its sequences and a forward pass more tells them apart."""
    rows = MIXED[mixed]
    for training, positions in itertools.product((True, False), (5, ROWS)):
        found = []
        for kind in (None, reentrant):
            dp = engine(words(kind, chance=0.4).train(training), **settings_of(strategy, "fast", "sample", rows, True))
            for number in range(2):
                torch.manual_seed(number)
                with ExitStack() as within:
                    if rows is not None:
                        within.enter_context(dp.mixed(rows, weight=0.5))
                    dp.backward(loss_of(dp.model(ids(number, positions))))
            found.append(step(dp))
        close(*found)
        if training:
            torch.manual_seed(5)
            with torch.no_grad():
                assert not torch.equal(dp.model(ids(0)), dp.model(ids(0))), "there is dropout"


@pytest.mark.parametrize("reentrant", [False, True], ids=["checkpoint", "reentrant checkpoint"])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_other_masks_are_clipped_or_refused(strategy: str, reentrant: bool) -> None:
    """With preserve_rng_state=False torch itself recomputes another function; what comes of it is still clipped."""
    dp = engine(words(reentrant, chance=0.4, preserve_rng_state=False), strategy=strategy, loss_reduction="sum")
    refused = 0
    for number in range(8):
        sums = []
        for factor in (1e4, 0.0):
            torch.manual_seed(number)
            try:
                backward(dp, dp.model, number, None, None, weight=_weights(torch.arange(1), factor))
            except PrivacyError as error:
                assert "samples have larger gradients in the second backward pass" in str(error)
                refused += 1
            sums.append(step(dp))
        if strategy != "two_pass":
            moved = torch.stack([(sums[0][n].double() - sums[1][n].double()).norm() for n in sums[0]]).norm()
            assert 0.9 * 0.7 < moved <= 0.7 * (1 + 1e-6) + 1e-7
    assert (refused > 0) == (strategy == "two_pass")


def test_layers_that_are_left_out_at_random_are_left_out_alike() -> None:
    """By a number of the host, as LayerDrop does; a layer that no sample came through has noise alone."""

    class Dropped(Words):
        def forward(self, ids: Tensor) -> Tensor:
            h = self.words(ids)
            for part in self.parts:
                if not self.training or torch.rand([]) > 0.5:
                    h = part(h) if self.reentrant is None else checkpoint(part, h, use_reentrant=self.reentrant)
            return self.head(h).mean(1)

    seen = set()
    for seed in range(6):
        found = []
        for kind in (None, False, True):
            torch.manual_seed(0)
            dp = engine(Dropped(kind, 0.2), **settings_of("auto", "fast", "sample", None, False))
            torch.manual_seed(seed)
            backward(dp, dp.model, seed, None, None)
            seen.add(tuple(f"parts.{i}.up.weight" in dp._sums.totals for i in range(2)))
            found.append(step(dp))
            assert all(x.abs().sum() > 0 for x in found[-1].values())
        close(found[1], found[0])
        close(found[2], found[0])
    assert len(seen) > 1


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("strategy", ["auto", "two_pass", "per_layer"])
def test_a_language_model_with_dropout_is_recomputed_alike(strategy: str, reentrant: bool) -> None:
    transformers = pytest.importorskip("transformers")
    shape = {"vocab_size": 20, "d_model": 16, "decoder_layers": 2, "decoder_ffn_dim": 24, "decoder_attention_heads": 2}
    config = transformers.BartConfig(
        **shape, max_position_embeddings=12, dropout=0.3, attention_dropout=0.3, activation_dropout=0.3, use_cache=False
    )
    found = []
    for recompute in (False, True):
        torch.manual_seed(0)
        model = transformers.BartForCausalLM(config).train()
        if recompute:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        dp = engine(model, strategy=strategy, loss_reduction="sum", noise_multiplier=0.5, noise=Noise(seed=3))
        torch.manual_seed(1)
        tokens = torch.randint(20, (5, 7))
        dp.backward(F.cross_entropy(model(tokens).logits.flatten(0, 1), tokens.flatten(), reduction="sum"))
        assert dp._sums.norm_sq[0].min() > 0.7**2
        found.append(step(dp))
    close(*found)
