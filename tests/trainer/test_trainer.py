"""`AdaMix(...).fit(...)` as a user meets it."""

from __future__ import annotations

import copy
import math
import random
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from adamix import AdaMix, InputError, Rows, models
from adamix.geometry import Whiten
from adamix.mechanism import Mechanism, clipped_sums
from adamix.models import SoftmaxHead, Trainable, trainable
from adamix.private_phase import Step

pytestmark = pytest.mark.filterwarnings("ignore:noise_seed")


def blobs(count: int, seed: int, classes: int = 4, width: int = 8) -> Rows:
    generator = torch.Generator().manual_seed(seed)
    y = torch.arange(count) % classes
    return Rows(torch.randn(count, width, generator=generator) + 2.2 * torch.eye(classes, width)[y], y)


class Mixing(nn.Linear):
    def __init__(self) -> None:
        super().__init__(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x - x.mean(0))


class Wanton(nn.Linear):
    """Random in eval mode too."""

    def __init__(self) -> None:
        super().__init__(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x + 1e-9 * torch.rand_like(x))


class Keeping(nn.Linear):
    """Keeps an activation, so that it cannot be copied afterwards."""

    def __init__(self) -> None:
        super().__init__(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        self.last = super().forward(x)
        return self.last


def hooked() -> nn.Module:
    model = nn.Linear(8, 4)
    model.register_forward_hook(lambda *_: None)
    return model


class Alternating(nn.Sequential):
    """Its gradient depends on how often it was called, and it moves Python's generator."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(8, 4))
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        random.random()
        return super().forward(x) * (1 if self.calls % 2 else -1)  # type: ignore[no-any-return]


class Counting(nn.Sequential):
    """Dropout, and a counter of forward passes."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(8, 8), nn.Dropout(0.5), nn.Linear(8, 4))
        self.seen = 0

    def forward(self, x: Tensor) -> Tensor:
        self.seen += 1
        return super().forward(x)  # type: ignore[no-any-return]


def look_and_release_nothing(self: Mechanism, model: Any, rows: Rows, *_: Any) -> Tensor:
    list(model.grad_sample(rows))
    return torch.zeros(model.size)


PUBLIC, PRIVATE, TEST = blobs(8, 0), blobs(600, 1), blobs(800, 2)


def fit(model: nn.Module | None = None, **settings: Any) -> Any:
    trainer = AdaMix(model, **{"epsilon": 3.0, "expected_batch_size": 600, "noise_seed": 0, **settings})
    return trainer.fit(public=PUBLIC, private=PRIVATE, test=TEST)


def test_private_rows_help() -> None:
    result = fit()
    assert result.test_error < result.public_error - 5
    assert 3.0 - 1e-6 <= result.epsilon <= 3.0 and result.delta == 1e-5
    assert len(result.steps) == len(result.epsilons) == 20 and result.epsilons[-1] == result.epsilon


def test_a_module_trains_in_place_and_keeps_its_form() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Dropout(0.1), nn.Linear(12, 4))
    keys, before = list(model.state_dict()), model[0].weight.detach().clone()
    result = fit(model, geometry=None, clipping="per_layer")
    assert result.model is model and list(model.state_dict()) == keys
    assert not torch.equal(model[0].weight, before)
    assert result.test_error <= result.public_error
    assert len(result.steps[0].thresholds) == 2


def test_images_go_through_a_small_network() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(1, 3, 3), nn.GroupNorm(1, 3), nn.ReLU(), nn.Flatten(), nn.Linear(108, 4))
    images = [Rows(rows.x.repeat(1, 8).view(-1, 1, 8, 8), rows.y) for rows in (PUBLIC, PRIVATE, TEST)]
    trainer = AdaMix(network, epsilon=3.0, expected_batch_size=600, geometry=None, steps=3)
    result = trainer.fit(public=images[0], private=images[1], test=images[2])
    assert math.isfinite(result.test_error) and len(result.steps) == 3


def test_frozen_parameters_stay() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4))
    model[0].requires_grad_(False)
    before = model[0].weight.clone()
    fit(model, geometry=None, steps=2)
    assert torch.equal(model[0].weight, before)


def test_a_linear_start_is_the_start() -> None:
    """A zero-shot classifier as the start of phase 1, kept by a strong L2 towards it."""
    head = nn.Linear(8, 4)
    given = head.weight.detach().clone()
    result = fit(head, geometry=None, public_l2=1e4, steps=1)
    torch.testing.assert_close(result.public_state["weight"], given, atol=1e-3, rtol=0)


@pytest.mark.parametrize(
    "settings",
    [
        {"quantile": None, "max_grad_norm": 0.5},
        {"subspace_rank": 5},
        {"subspace_energy": 0.9},
        {"geometry": None},
        {"public_weight": 0.0},
        {"anchor": 1e-2},
        {"warm_start": False},
        {"learning_rate": 2.0},
        {"sample_rate": 0.2, "expected_batch_size": 120},
    ],
    ids=lambda s: next(iter(s)),
)
def test_every_part_can_be_switched(settings: dict[str, Any]) -> None:
    plain, other = fit(steps=5), fit(steps=5, **settings)
    assert 3.0 - 2e-4 <= other.epsilon <= 3.0
    assert any(
        not torch.equal(a, b)
        for a, b in zip(plain.model.parameters(), other.model.parameters(), strict=False)
        if a.shape == b.shape
    )
    assert other.test_error < 75, "chance level"


def test_noise_is_fresh_unless_seeded() -> None:
    weights = [fit(noise_seed=seed, steps=1).model[1].weight for seed in (None, None, 7, 7)]
    assert not torch.equal(weights[0], weights[1])
    assert torch.equal(weights[2], weights[3])
    assert not torch.equal(fit(noise_seed=None, noise_mode="secure", steps=1).model[1].weight, weights[0])


def test_no_privacy_is_said_loudly() -> None:
    with pytest.warns(UserWarning, match="NO NOISE is added"):
        result = fit(epsilon=math.inf)
    assert result.epsilon == math.inf and result.noise_multiplier == 0


def test_an_empty_private_set_is_one_more_neighbour() -> None:
    trainer = AdaMix(epsilon=1.0, expected_batch_size=100, steps=2)
    result = trainer.fit(public=PUBLIC, private=(torch.zeros(0, 8), torch.zeros(0, dtype=torch.int64)))
    assert result.test_error is None and bool(result.model[1].weight.isfinite().all())


def test_what_leaves_depends_on_private_rows_through_noise_only() -> None:
    """Published metrics of step 1 and phase 1 are the same whatever the private rows are."""
    others = Rows(blobs(600, 9).x, (blobs(600, 9).y + 1) % 4)
    seen: list[tuple[Step, dict[str, torch.Tensor]]] = []
    for private in (PRIVATE, others):
        trainer = AdaMix(epsilon=1.0, expected_batch_size=600, noise_seed=0)
        steps: list[Step] = []
        result = trainer.fit(public=PUBLIC, private=private, on_step=steps.append)
        assert steps == result.steps
        seen.append((steps[0], result.public_state))
    assert seen[0][0] == seen[1][0]
    assert all(torch.equal(seen[0][1][k], seen[1][1][k]) for k in seen[0][1])


def test_whitening() -> None:
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(3000) % 3
    mixing = torch.diag(torch.tensor([5.0, 1.0, 0.2, 1.0, 1.0]))
    x = (torch.randn(3000, 5, generator=generator)) @ mixing + 0.5 * torch.eye(3, 5)[y] + 7
    z = Whiten(x, y)(x)
    torch.testing.assert_close(z.norm(dim=1), torch.ones(3000))
    within = z - torch.stack([z[y == c].mean(0) for c in range(3)])[y]
    before = (x - torch.stack([x[y == c].mean(0) for c in range(3)])[y]).var(0)
    assert float(within.var(0).max() / within.var(0).min()) < 0.1 * float(before.max() / before.min())
    assert bool((Whiten(x, y)(x * 1e30).norm(dim=1) > 0.99).all()), "squares beyond float32 do not matter"
    few, labels = x[:9, :].double(), y[:9]
    unit = torch.nn.functional.normalize(few - few.mean(0), dim=1)
    spread = unit - torch.stack([unit[labels == c].mean(0) for c in range(3)])[labels]
    covariance = spread.T @ spread / 9
    values, vectors = torch.linalg.eigh(covariance + covariance.trace() / 5 * torch.eye(5))
    expected = torch.nn.functional.normalize(unit @ (vectors * values**-0.5) @ vectors.T, dim=1)
    torch.testing.assert_close(Whiten(few, labels)(few.float()).double(), expected, rtol=1e-4, atol=1e-5)
    one_each = Whiten(x[:3], y[:3])(x)
    assert bool(one_each.isfinite().all()), "one row per class has no spread"
    assert bool(Whiten(x, y)(Whiten(x, y).mean[None]).isfinite().all())


def arrays(**changes: Any) -> dict[str, Any]:
    return {"public": PUBLIC, "private": PRIVATE, "test": TEST, **changes}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"private": (PRIVATE.x, PRIVATE.y[:-1])}, "private: x has 600 rows but y has 599; pass one label per row"),
        ({"private": (PRIVATE.x[:, :5], PRIVATE.y)}, r"private: rows have shape \[5\] but public rows have \[8\]"),
        ({"private": (PRIVATE.x, PRIVATE.y + 3)}, "private: y has label .* labels must be in 0..3"),
        ({"private": (PUBLIC.x, PUBLIC.y)}, "overlap|both public and private|also"),
        ({"public": (PUBLIC.x.where(PUBLIC.x < 2, torch.nan), PUBLIC.y)}, "public: x has NaN"),
        ({"public": (PUBLIC.x[:3], torch.tensor([0, 1, 3]))}, "class"),
        ({"test": 3}, "test: expected a pair"),
    ],
)
def test_bad_rows_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message) as raised:
        AdaMix(epsilon=1.0, expected_batch_size=600).fit(**arrays(**changes))
    assert "\n" not in str(raised.value)


def test_numpy_rows_are_taken() -> None:
    data = {name: (rows.x.double().numpy(), rows.y.numpy().astype(np.int32)) for name, rows in arrays().items()}
    assert AdaMix(epsilon=1.0, expected_batch_size=600, steps=1).fit(**data).test_error is not None


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"epsilon": 0.0}, "epsilon: 0.0 is not valid here; pass a number in .0, 1000."),
        ({"epsilon": math.nan}, "epsilon: nan"),
        ({"delta": 0.0}, "delta: 0.0"),
        ({"delta": 1.0}, "delta: 1.0"),
        ({"sample_rate": 1.5}, "sample_rate: 1.5 .* 1 is full batch"),
        ({"steps": 0}, "steps: 0"),
        ({"quantile": 0.0}, "quantile: 0.0"),
        ({"quantile": None}, "max_grad_norm: None"),
        ({"max_grad_norm": 1.0}, "max_grad_norm: 1.0 .* drop it, or pass quantile=None"),
        ({"clipping": "ghost"}, "clipping: 'ghost'"),
        ({"clipping": "per_layer", "subspace_rank": 3}, "clipping: 'per_layer' .* a subspace spans all layers"),
        ({"subspace_rank": 0}, "subspace_rank: 0"),
        ({"subspace_energy": 1.2}, "subspace_energy: 1.2"),
        ({"geometry": "zca"}, "geometry: 'zca'"),
        ({"public_weight": -1.0}, "public_weight: -1.0"),
        ({"learning_rate": 0.0}, "learning_rate: 0.0"),
        ({"logit_noise": 0.0}, "logit_noise: 0.0"),
        ({"anchor": -1.0}, "anchor: -1.0"),
        ({"noise_mode": "secure", "noise_seed": 1}, "noise_seed: 1 .* secure noise takes no seed"),
        ({"noise_mode": "strong"}, "noise_mode: 'strong'"),
        ({"public_l2": -1.0}, "public_l2: -1.0"),
        ({"expected_batch_size": 0}, "expected_batch_size: 0"),
        ({"expected_batch_size": math.inf}, "expected_batch_size: inf is not valid here; pass a whole number"),
        ({"epsilon": "3"}, "epsilon: '3' is not valid here; pass a number"),
        ({"steps": 2.5}, "steps: 2.5 is not valid here; pass a whole number"),
        ({"steps": True}, "steps: True"),
        ({"subspace_rank": 2.5}, "subspace_rank: 2.5 .* a whole number or None"),
        ({"warm_start": 1}, "warm_start: 1 is not valid here; pass True or False"),
        ({"noise_seed": 2.5}, "noise_seed: 2.5"),
        ({"max_grad_norm": 1e300, "quantile": None}, "max_grad_norm: 1e[+]300"),
        ({"sigma": 3.0}, "sigma: no such setting; the settings are epsilon"),
    ],
)
def test_bad_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message) as raised:
        AdaMix(**{"epsilon": 1.0, "expected_batch_size": 10, **settings})
    assert "\n" not in str(raised.value)


def test_required_settings() -> None:
    with pytest.raises(InputError, match="expected_batch_size: missing; pass the number of private rows"):
        AdaMix(epsilon=1.0)
    with pytest.raises(InputError, match="epsilon: missing"):
        AdaMix(expected_batch_size=10)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (nn.Sequential(nn.Linear(8, 4), nn.BatchNorm1d(4)), "model: 1 is BatchNorm1d, which mixes the samples"),
        (nn.Linear(8, 4).requires_grad_(False), "model: it has no trainable parameter"),
        (nn.Linear(8, 3), "public: y has label 3 .* labels must be in 0..2"),
        (nn.Sequential(nn.Linear(8, 3)), r"model: its output for 3 rows is \[3, 3\]; return logits \[N, 4\]"),
        (nn.Sequential(nn.Linear(8, 4), nn.Flatten(0)), r"model: its output for 3 rows is \[12\]"),
        (nn.Linear(7, 4), r"model: it fails on rows of shape \[3, 8\]"),
        (nn.Linear(8, 4).double(), "model: it fails on rows of shape"),
        (nn.LazyLinear(4), "model: parameter weight has no shape yet"),
        (Mixing(), "model: its output for a row changes with the other rows"),
        (Wanton(), "model: per-sample gradients of it failed .* randomness"),
        (hooked(), "model: the model has forward hooks, which would see private rows"),
        (Keeping(), "model: it fails on rows .* see its message"),
        (len, "model: is builtin_function_or_method; pass an nn.Module"),
    ],
)
def test_models_that_cannot_be_private_are_refused(model: Any, message: str) -> None:
    before = copy.deepcopy(model.state_dict()) if isinstance(model, nn.Module) else {}
    with pytest.raises(InputError, match=message) as raised:
        fit(model, geometry=None)
    assert "\n" not in str(raised.value)
    for name, value in before.items():
        if not isinstance(value, nn.UninitializedParameter):
            assert torch.equal(model.state_dict()[name], value), "nothing was trained"


def test_private_rows_leave_no_trace_in_generators_modes_or_state() -> None:
    """With the release made nothing, runs on 600 and on 599 private rows are the same, dropout and counters or not."""
    outcomes = []
    for count in (600, 599, 0):
        torch.manual_seed(0)
        model = Counting()
        model.train()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Mechanism, "release", look_and_release_nothing)
            trainer = AdaMix(model, epsilon=1.0, expected_batch_size=600, geometry=None, steps=3, noise_seed=0)
            result = trainer.fit(public=PUBLIC, private=Rows(PRIVATE.x[:count], PRIVATE.y[:count]), test=TEST)
        weights = [p.tolist() for p in model.parameters()]
        outcomes.append((result.steps, weights, model.seen, torch.get_rng_state().tolist()))
        assert model.training and model[1].training
    assert outcomes[0] == outcomes[1] == outcomes[2] and model.seen > 0


def test_state_in_python_does_not_widen_what_a_row_can_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "_CHUNK_ELEMENTS", 36)  # one row a chunk
    view = trainable(Alternating())
    sums, states = [], []
    for first in (0, 1):
        random.seed(0)
        rows = Rows(PRIVATE.x[first:20], PRIVATE.y[first:20])
        sums.append(torch.cat(clipped_sums(view, rows, torch.tensor([0.5]), None)))
        states.append(random.random())
    assert float((sums[0] - sums[1]).norm()) <= 0.5 * (1 + 1e-6)
    assert states[0] == states[1]


def test_a_pruned_linear_is_no_softmax_head() -> None:
    model = nn.Linear(8, 4)
    del model.weight
    model.weight_orig = nn.Parameter(torch.zeros(4, 8))
    assert type(trainable(model)) is Trainable
    assert type(trainable(nn.Linear(8, 4))) is SoftmaxHead


def test_dropout_does_not_widen_what_a_row_can_do() -> None:
    torch.manual_seed(0)
    view = trainable(nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Dropout(0.5), nn.Linear(16, 4)).train())
    sums = [
        torch.cat(clipped_sums(view, Rows(PRIVATE.x[i:50], PRIVATE.y[i:50]), torch.tensor([0.5]), None)) for i in (0, 1)
    ]
    assert float((sums[0] - sums[1]).norm()) <= 0.5 * (1 + 1e-6)


def test_tokens_stay_whole_numbers() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(30, 6), nn.Flatten(), nn.Linear(18, 2))
    public, private = (torch.randint(0, 30, (n, 3), generator=torch.Generator().manual_seed(n)) for n in (10, 80))
    trainer = AdaMix(model, epsilon=3.0, expected_batch_size=80, geometry=None, steps=2)
    keep = ~torch.isin(private @ torch.tensor([900, 30, 1]), public @ torch.tensor([900, 30, 1]))
    result = trainer.fit(public=(public, torch.arange(10) % 2), private=(private[keep], private[keep][:, 0] % 2))
    assert len(result.steps) == 2


def test_test_rows_may_not_be_private_rows() -> None:
    trainer = AdaMix(epsilon=1.0, expected_batch_size=600, steps=1)
    with pytest.raises(InputError, match="test: 1 of 5 rows are also private rows"):
        trainer.fit(public=PUBLIC, private=PRIVATE, test=Rows(torch.cat([TEST.x[:4], PRIVATE.x[:1]]), TEST.y[:5]))


def test_geometry_needs_feature_vectors() -> None:
    images = Rows(PUBLIC.x.view(-1, 1, 2, 4), PUBLIC.y)
    with pytest.raises(InputError, match=r"geometry: 'whiten' needs feature vectors \[N, d\]"):
        AdaMix(epsilon=1.0, expected_batch_size=10).fit(public=images, private=(images.x + 1, images.y))
    with pytest.raises(InputError, match="model: None is a softmax head on feature vectors"):
        AdaMix(epsilon=1.0, expected_batch_size=10, geometry=None).fit(public=images, private=(images.x + 1, images.y))


def test_presets_are_whole_methods() -> None:
    paper = AdaMix(preset="paper", epsilon=1.0, expected_batch_size=10).config
    assert (paper.geometry, paper.subspace_energy, paper.anchor, paper.quantile) == (None, 0.95, 1e-3, 0.9)
    assert AdaMix(preset="paper", geometry="whiten", epsilon=1.0, expected_batch_size=10).config.geometry == "whiten", (
        "settings go over it"
    )
    conventional = AdaMix(preset="conventional", epsilon=1.0, expected_batch_size=10).config
    assert not conventional.warm_start and (conventional.max_grad_norm, conventional.learning_rate) == (1.0, 1.0)
    assert (
        AdaMix(preset="adamix", epsilon=1.0, expected_batch_size=10).config
        == AdaMix(epsilon=1.0, expected_batch_size=10).config
    )
    with pytest.raises(InputError, match="preset: 'papers' given; pass one of 'adamix', 'paper', 'conventional'"):
        AdaMix(preset="papers", epsilon=1.0, expected_batch_size=10)
