"""Both phases: what a step is, that one row moves it by the threshold at most, and what a run costs."""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from small import EXACT, PRIVATE, PUBLIC, TEST, blobs, conv_net, fit, plain_steps, vector
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.nn.functional import cross_entropy
from torch.utils.data import Subset, TensorDataset

from adamix import InputError, calibrate, spent
from adamix.datasets import digits
from adamix.deep import DeepAdaMix, token_loss
from adamix.deep.data import Data, PublicBatches
from adamix_kernels import PrivacyError

pytestmark = pytest.mark.filterwarnings("ignore:epsilon. inf", "ignore:noise_seed")


def gradients(model: nn.Module, x: Tensor, y: Tensor) -> list[list[Tensor]]:
    """Of each row, of each layer."""
    found = []
    for i in range(len(y)):
        grads = torch.autograd.grad(cross_entropy(model(x[i : i + 1]), y[i : i + 1]), list(model.parameters()))
        found.append([torch.cat([g.flatten() for g in grads[k : k + 2]]) for k in range(0, len(grads), 2)])
    return found


def rows_of_step(step: int, size: int = 8) -> tuple[Tensor, Tensor]:
    rows = PublicBatches(Data("public", PUBLIC), size, 0).rows(2, step)
    return torch.stack([x for x, _ in rows]), torch.stack([y for _, y in rows])


@pytest.mark.parametrize("strategy", ["per_layer", "book_keeping", "materialize"])
@pytest.mark.parametrize("micro", [60, 17])  # 8 + 40 rows in one pass, and in five
def test_a_step_is_the_clipped_sum_and_the_public_one(strategy: str, micro: int) -> None:
    model = conv_net().double()
    before = copy.deepcopy(model)
    double = [TensorDataset(d.tensors[0].double(), d.tensors[1]) for d in (PUBLIC, PRIVATE)]
    result = fit(
        model, public=double[0], private=double[1], strategy=strategy, micro_batch_size=micro, steps=1, public_steps=0,
        optimizer=plain_steps, public_weight=0.5, quantile=0.5, expected_batch_size=37,
    )  # fmt: skip
    x, y = rows_of_step(1)
    public = gradients(before, x.double(), y)
    private = gradients(before, *double[1].tensors)
    if strategy != "per_layer":
        public, private = ([[torch.cat(row)] for row in part] for part in (public, private))
    layers = len(public[0])
    taus = [torch.stack([row[k].norm() for row in public]).sort().values[3] for k in range(layers)]
    assert result.steps[0].thresholds == pytest.approx([float(t) for t in taus], rel=1e-4)
    clipped = [sum(row[k] * (taus[k] / row[k].norm()).clamp(max=1) for row in private) for k in range(layers)]
    expected = [(c + 0.5 * sum(row[k] for row in public)) / (37 + 0.5 * 8) for k, c in enumerate(clipped)]
    moved = torch.cat(
        [(a - b).detach().flatten() for a, b in zip(before.parameters(), model.parameters(), strict=True)]
    )
    torch.testing.assert_close(moved, torch.cat(expected), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("strategy", ["per_layer", "book_keeping"])
def test_one_row_moves_a_step_by_the_threshold_at_most(strategy: str) -> None:
    """Also a row far out, and one that overflows: that one adds nothing."""
    settings = {"strategy": strategy, "steps": 1, "optimizer": plain_steps, "public_weight": 1.0}
    without = fit(**settings)
    parts = [(0, 40), (40, 48), (48, 243)]  # convolution, norm, linear
    for scale in (3.0, 1e4, 1e18, 3e38):
        row = TensorDataset(torch.full((1, 1, 4, 4), scale), torch.tensor([2]))
        with_it = fit(private=torch.utils.data.ConcatDataset([PRIVATE, row]), **settings)
        taus = without.steps[0].thresholds
        assert with_it.steps[0].thresholds == taus, "a private row has no say in them"
        moved = (vector(with_it) - vector(without)) * (40 + 8)
        assert moved.isfinite().all()
        norms = [moved.norm()] if strategy != "per_layer" else [moved[a:b].norm() for a, b in parts]
        for norm, tau in zip(norms, taus, strict=True):
            assert norm <= tau * (1 + 1e-4) + 1e-4
        if scale < 1e5:
            assert max(norms) > 0.5 * min(taus), "it is seen"


def test_both_phases_gain_on_real_data() -> None:
    pytest.importorskip("sklearn")
    found = digits()
    x, x_test = (torch.from_numpy(part).view(-1, 1, 8, 8) for part in (found.x, found.x_test))
    y, y_test = torch.from_numpy(found.y), torch.from_numpy(found.y_test)
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.GroupNorm(4, 16),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(256, 10),
    )
    with torch.no_grad():
        untrained = 100 * float((model(x_test).argmax(1) != y_test).float().mean())
    trainer = DeepAdaMix(
        model, epsilon=3.0, delta=1e-4, steps=25, expected_batch_size=1300, public_batch_size=40, public_steps=40,
        learning_rate=1e-2,
    )  # fmt: skip
    result = trainer.fit(
        public=TensorDataset(x[:40], y[:40]), private=TensorDataset(x[40:], y[40:]), test=TensorDataset(x_test, y_test)
    )
    assert result.public_error is not None and result.test_error is not None
    assert result.public_error < untrained - 40 and result.test_error < result.public_error - 4
    assert result.test_loss is not None and result.public_loss is not None and result.test_loss < result.public_loss
    with torch.no_grad():
        assert result.test_error == pytest.approx(100 * float((model(x_test).argmax(1) != y_test).float().mean()))
    assert all(p.__class__ is nn.Parameter for p in model.parameters()), "the engine is off"


@pytest.mark.parametrize("rate", [1.0, 0.25])
def test_the_accounting_is_that_of_the_package(rate: float) -> None:
    result = fit(epsilon=2.0, delta=1e-3, sample_rate=rate, expected_batch_size=round(40 * rate), steps=2)
    assert result.noise_multiplier == calibrate(2.0, delta=1e-3, steps=2, sample_rate=rate)
    expected = [spent(result.noise_multiplier, delta=1e-3, steps=t, sample_rate=rate) for t in (1, 2)]
    assert result.epsilons == expected and result.epsilon == expected[-1] <= 2.0


def test_noise_has_the_size_that_was_accounted_for() -> None:
    """Public rows and the pull are off, so that a step is the noisy sum alone."""
    settings = {"epsilon": 1.0, "delta": 1e-3, "steps": 1, "public_steps": 0, "public_weight": 0, "noise_seed": 0}
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 500), nn.Linear(500, 3))
    before = torch.cat([p.detach().flatten() for p in model.parameters()])
    result = fit(model, private=[], optimizer=plain_steps, strategy="per_layer", expected_batch_size=7, **settings)
    moved = 7 * (vector(result) - before) / result.noise_multiplier
    for part, tau in zip((moved[: 17 * 500], moved[17 * 500 :]), result.steps[0].thresholds, strict=True):
        assert float(part.std()) == pytest.approx(math.sqrt(2) * tau, rel=0.06)


def test_batches_may_be_empty_and_so_may_the_private_set() -> None:
    for private, rate in ((PRIVATE, 1e-12), ([], 1.0), ([], 0.5)):
        result = fit(private=private, sample_rate=rate, delta=1e-20)
        assert len(result.steps) == 3 and vector(result).isfinite().all()
        torch.testing.assert_close(vector(result), vector(fit(private=[])))


def test_thresholds_are_chosen_every_so_many_steps() -> None:
    found = [step.thresholds for step in fit(steps=5, threshold_every=2).steps]
    assert found[0] == found[1] != found[2] == found[3] != found[4]
    fixed = fit(quantile=None, max_grad_norm=0.3, strategy="auto")
    assert {step.thresholds for step in fixed.steps} == {(0.3,)}


def test_the_anchor_pulls_towards_phase_1() -> None:
    free, pulled = fit(optimizer=plain_steps), fit(optimizer=plain_steps, anchor=1e9)
    start = torch.cat([x.flatten() for x in pulled.public_state.values()])
    assert (vector(free) - start).norm() > 1e-2 and (vector(pulled) - start).norm() < 1e-6
    half = fit(optimizer=plain_steps, anchor=1.0, steps=1)
    torch.testing.assert_close(vector(half) - start, (vector(fit(optimizer=plain_steps, steps=1)) - start) / 2)


def test_the_mode_of_the_model_comes_back_and_dropout_is_off() -> None:
    runs = []
    for _ in range(2):
        model = conv_net()
        model.insert(4, nn.Dropout(0.5))
        model[3].eval()
        runs.append(vector(fit(model)))
        assert model.training and model[4].training and not model[3].training
    assert torch.equal(*runs)


def test_a_compiled_model_trains_as_it_does_uncompiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    found = []
    for given in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Flatten(), nn.Linear(16, 3))
        found.append(vector(fit(model, compile=given, optimizer=plain_steps, steps=2, public_steps=1)))
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-6)


def _whole(model: nn.Sequential) -> None:
    model.compile()


def _parts(model: nn.Sequential) -> None:
    for part in model:
        part.compile(backend="aot_eager")


@pytest.mark.parametrize("compile_it", [None, _whole, _parts], ids=["compile=True", "model.compile()", "parts"])
def test_models_compiled_in_every_way(compile_it: Callable[[Any], None] | None) -> None:
    """By torch's own compiler for C++, inductor, too."""
    torch._dynamo.reset()
    counters.clear()
    found = []
    for given in (False, True):
        model = conv_net()
        if given and compile_it is not None:
            compile_it(model)
        of_run = {"compile": given and compile_it is None, "steps": 2, "public_steps": 1}
        found.append(vector(fit(model, optimizer=plain_steps, **of_run)))
    torch.testing.assert_close(*found, rtol=1e-5, atol=2e-6)
    assert counters["frames"]["ok"], "compiled code ran"


@pytest.mark.parametrize("in_place", [False, True])
def test_compiled_models_whose_rows_would_show(in_place: bool) -> None:
    """What compiled code refuses depends on the number of rows, which is fixed with losses by row alone."""
    model = conv_net()
    if in_place:
        model[-1].compile()
    with pytest.raises(InputError, match="compile: the loss is a sum over rows"):
        fit(model, compile=not in_place, loss=lambda m, b: cross_entropy(m(b[0]), b[1], reduction="sum"))


def test_the_result_of_torch_compile_is_refused() -> None:
    for model in (torch.compile(conv_net()), nn.Sequential(nn.Identity(), torch.compile(conv_net()))):
        with pytest.raises(
            InputError, match=r"is the result of torch\.compile\(\); pass the model itself with compile"
        ):
            fit(model)


def test_a_compiled_language_model_with_a_table_of_positions(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which all rows share, and compiled code cannot take to them."""
    transformers = pytest.importorskip("transformers")
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    shape = {"vocab_size": 20, "n_positions": 6, "n_embd": 16, "n_layer": 1, "n_head": 2}
    config = transformers.GPT2Config(**shape, bos_token_id=0, eos_token_id=0, use_cache=False)
    tokens = torch.randint(20, (40, 6), generator=torch.Generator().manual_seed(0))
    rows = [{"input_ids": row.tolist(), "labels": row.tolist()} for row in tokens]
    found = []
    for given in (False, True):
        torch.manual_seed(0)
        model = transformers.GPT2LMHeadModel(config)
        of_run = {"loss": token_loss, "optimizer": plain_steps, "steps": 2, "public_steps": 1, "compile": given}
        found.append(vector(fit(model, public=rows[:12], private=rows[12:], **of_run)))
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-6)


def test_secure_noise_takes_thresholds_by_layer() -> None:
    result = fit(epsilon=2.0, delta=1e-3, noise_mode="secure")
    assert vector(result).isfinite().all() and len(result.steps[0].thresholds) == 3


def test_precisions() -> None:
    whole = fit(test=TEST)
    for precision in ("autocast", "bfloat16"):
        result = fit(test=TEST, precision=precision)
        assert result.test_loss == pytest.approx(whole.test_loss, rel=0.2), precision
        kind = torch.bfloat16 if precision == "bfloat16" else torch.float32
        assert {p.dtype for p in result.model.parameters()} == {kind}


def test_a_language_model_with_its_own_loss_and_with_one_by_row() -> None:
    transformers = pytest.importorskip("transformers")
    shape = {"vocab_size": 20, "n_positions": 6, "n_embd": 16, "n_layer": 1, "n_head": 2}
    config = transformers.GPT2Config(**shape, bos_token_id=0, eos_token_id=0, use_cache=False)
    tokens = torch.randint(20, (40, 6), generator=torch.Generator().manual_seed(0))
    rows = [{"input_ids": row.tolist(), "labels": row.tolist()} for row in tokens]  # as `datasets` has them
    found = []
    for loss in (None, lambda model, batch: 5 * token_loss(model, batch)):
        torch.manual_seed(0)
        model = transformers.GPT2LMHeadModel(config)
        found.append(fit(model, public=rows[:8], private=rows[8:], loss=loss, anchor=0.1))
    torch.testing.assert_close(vector(found[0]), vector(found[1]), rtol=1e-3, atol=1e-5)
    assert math.isnan(found[0].steps[0].public_loss) and found[1].steps[0].public_loss > 0
    assert found[0].test_error is None is found[0].test_loss


def test_activations_are_computed_again_and_dropout_stays_off() -> None:
    transformers = pytest.importorskip("transformers")
    found, calls = [], []
    for again in (False, True):
        torch.manual_seed(0)
        shape = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
        config = transformers.ViTConfig(**shape, image_size=4, patch_size=2, num_channels=1, num_labels=3)
        config.hidden_dropout_prob = config.attention_probs_dropout_prob = 0.5
        model = transformers.ViTForImageClassification(config)
        layer, seen = model.vit.layers[1].mlp, []
        forward = layer.forward
        layer.forward = lambda *x, forward=forward, seen=seen: seen.append(1) or forward(*x)
        found.append(vector(fit(model, checkpointing=again)))
        calls.append(len(seen))
        assert all(not getattr(m, "gradient_checkpointing", False) for m in model.modules())
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-6)
    assert calls[1] == calls[0] + 2 + 1 + 3, "again in each step of both phases, and in the trial"


# --- what is refused -------------------------------------------------------------------------------------------------


class Counter(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(16, 3)
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.seen += len(x)
        return self.head(x.flatten(1))


class Keeper(Counter):
    def forward(self, x: Tensor) -> Tensor:
        self.last = x
        return self.head(x.flatten(1))


def mean_of_batch(model: nn.Module, batch: Any) -> Tensor:
    return cross_entropy(model(batch[0]), batch[1])


def sum_of_batch(model: nn.Module, batch: Any) -> Tensor:
    return cross_entropy(model(batch[0]), batch[1], reduction="sum")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"model": nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2))}, "model: 1 is BatchNorm2d"),
        ({"model": Counter()}, "model: a forward pass changes 'seen'"),
        ({"model": Keeper()}, "model: a forward pass changes 'last'"),
        ({"model": "resnet"}, "model: is str"),
        ({"loss": mean_of_batch}, "loss: on a batch it is not the sum"),
        ({"loss": lambda m, b: m(b[0])}, r"loss: gives \[3, 3\] for 3 rows"),
        ({"loss": lambda m, b: m(b)}, "loss: it fails on 3 public rows"),
        ({"loss": mean_of_batch, "public": Subset(PUBLIC, [0])}, "loss: on a batch it is not the sum"),
        ({"public": []}, "public: has no rows"),
        ({"public": None}, "public: is NoneType; pass a map-style dataset"),
        ({"private": None}, "private: is NoneType; pass a map-style dataset"),
        ({"tune": None}, "tune: None is not valid here"),
        ({"optimizer": torch.optim.LBFGS}, "optimizer: LBFGS evaluates the loss within a step"),
        ({"public": iter(PUBLIC)}, "public: is .*iterator; pass a map-style dataset"),
        ({"private": Subset(PUBLIC, [3])}, "private: 1 of 1 rows are also public rows"),
        ({"test": Subset(PRIVATE, range(5))}, "test: 5 of 5 rows are also private rows"),
        ({"private": [(torch.full((1, 4, 4), math.nan), 0)]}, "private: row 0 has NaN or Inf"),
        ({"private": [(torch.zeros(1, 4, 4), 3)]}, r"private: the label of row 0 is not a whole number in 0\.\.2"),
        ({"private": [(torch.zeros(1, 4, 4), 0.5)]}, "private: the label of row 0 is not a whole number"),
        ({"private": [{"x": 1}]}, "private: row 0 has not the form of public row 0"),
        ({"public": [(torch.zeros(2), "cat")]}, "public: collate gives tensors of"),
        ({"public": [{"x": torch.zeros(2)}]}, "loss: rows have no 'labels'"),
        ({"loss": sum_of_batch, "noise_mode": "secure"}, "loss: is a sum over rows, with noise_mode='secure'"),
        ({"loss": sum_of_batch, "compile": True}, "compile: the loss is a sum over rows"),
        ({"optimizer": "adam"}, "optimizer: 'adam' is not valid"),
        ({"optimizer": lambda p: p}, "optimizer: gives list"),
        ({"checkpointing": True}, "checkpointing: the model is none of transformers"),
        ({"micro_batch_size": 8}, "micro_batch_size: 8 is not valid here; pass more than public_batch_size, 8"),
        ({"strategy": "ghost"}, "strategy: 'ghost' is not valid"),
        ({"quantile": None}, "max_grad_norm: None is not valid here"),
        ({"quantil": 0.5}, "quantil: no such setting"),
        ({"anchor": -1.0}, "anchor: -1.0 is not valid"),
        ({"precision": "float16"}, "precision: 'float16' is not valid"),
        ({"public_learning_rate": 1e11}, "public: phase 1 gives weights that are not finite"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named(given: dict[str, Any], message: str) -> None:
    charged: list[int] = []
    given = {"on_step": lambda step: charged.append(step.number), "test": TEST, **given}
    if "public_learning_rate" in given:
        given |= {"public_steps": 5, "optimizer": "sgd", "public_learning_rate": 1e12}
    with pytest.raises(InputError, match=f"^{message}"):
        fit(**{**EXACT, **given})
    assert not charged


class Example:
    """A row that is neither a pair nor a dict."""

    def __init__(self, x: Tensor, y: int) -> None:
        self.x, self.y = x, y


def collate_examples(rows: list[Example]) -> tuple[Tensor, Tensor]:
    return torch.stack([row.x for row in rows]), torch.tensor([row.y for row in rows])


def test_rows_of_another_make_need_a_digest() -> None:
    class Examples(list):
        def digest(self, i: int) -> Any:
            return self[i].x.numpy().tobytes()

    public, private = ([Example(x, int(y)) for x, y in rows] for rows in (PUBLIC, PRIVATE))
    with pytest.raises(InputError, match=r"^public: row 0 is Example without numbers or text.*digest\(index\)"):
        fit(public=public, private=private, collate=collate_examples)
    found = vector(fit(public=Examples(public), private=Examples(private), collate=collate_examples))
    assert torch.equal(found, vector(fit()))
    with pytest.raises(InputError, match=r"^private: the label of row 1 is not"):
        wrong = Examples([private[0], Example(private[0].x + 1, 3)])
        fit(public=Examples(public), private=wrong, collate=collate_examples)


def test_what_the_engine_refuses_is_refused_before_anything_is_charged() -> None:
    class Mixer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(16))
            self.head = nn.Linear(16, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head((x.flatten(1).t() * self.scale[:, None]).t())

    with pytest.raises((InputError, PrivacyError), match="scale"):
        fit(Mixer(), on_step=lambda _: pytest.fail("a step was taken"))


def test_a_changing_row_cannot_be_compared() -> None:
    class Augmented(list):
        def __getitem__(self, i: Any) -> Any:
            return torch.rand(1, 4, 4), 0

    with pytest.raises(InputError, match=r"private: row 0 differs when it is loaded again.*digest\(index\)"):
        fit(private=Augmented([1, 2]))

    class Flipped(list):
        """By chance the first rows are alike when they are loaded again."""

        times = 0

        def __getitem__(self, i: Any) -> Any:
            x, y = super().__getitem__(i)
            self.times += i == 15
            return (x.flip(-1) if i == 15 and self.times % 2 else x), y

    with pytest.raises(InputError, match="private: row 15 differs when it is loaded again"):
        fit(private=Flipped(PRIVATE))
    kept = Augmented([1, 2])
    kept.digest = lambda i: i  # type: ignore[attr-defined]
    assert len(fit(private=kept).steps) == 3
    assert blobs(3, 5)[0][0].shape == (1, 4, 4)
