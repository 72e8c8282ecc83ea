"""What cannot be private is refused, in words that name it and the remedy."""

from __future__ import annotations

import copy
import math
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from plain_loop import STRATEGIES, assert_same, batch, classifier, engine, expected, step
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from adamix_kernels import DPEngine, PrivacyError, replace_batch_norm


def loss(dp: DPEngine, data: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(dp.model(data[0]), data[1])


# --- arguments -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "settings", "match"),
    [
        (ValueError, {"strategy": "ghost"}, "strategy: is 'ghost'; pass one of 'auto', 'book_keeping'"),
        (ValueError, {"clipping": "soft"}, "clipping: is 'soft'; pass one of 'flat', 'automatic'"),
        (ValueError, {"loss_reduction": "none"}, "loss_reduction: is 'none'; pass one of 'mean', 'sum'"),
        (TypeError, {"noise_multiplier": "1"}, "noise_multiplier: is str; pass a number"),
        (TypeError, {"noise_multiplier": True}, "noise_multiplier: is bool; pass a number"),
        (ValueError, {"noise_multiplier": -1.0}, "noise_multiplier: is -1.0; pass a finite number above 0, or 0"),
        (ValueError, {"noise_multiplier": math.nan}, "noise_multiplier: is nan"),
        (ValueError, {"expected_batch_size": 0}, "expected_batch_size: is 0; pass a finite number above 0$"),
        (ValueError, {"expected_batch_size": math.inf}, "expected_batch_size: is inf"),
        (ValueError, {"loss_scale": 0.0}, "loss_scale: is 0.0"),
        (TypeError, {"max_grad_norm": "1"}, "max_grad_norm: is str; pass a number, a scalar tensor, or a dict"),
        (TypeError, {"max_grad_norm": None}, "max_grad_norm: is NoneType"),
        (TypeError, {"max_grad_norm": True}, "max_grad_norm: is bool"),
        (ValueError, {"max_grad_norm": 0}, "max_grad_norm: is 0; pass a number above 0"),
        (ValueError, {"max_grad_norm": math.nan}, "max_grad_norm: is nan"),
        (ValueError, {"max_grad_norm": math.inf, "noise_multiplier": 1.0}, "max_grad_norm: is inf; pass a finite"),
        (ValueError, {"max_grad_norm": math.inf, "clipping": "automatic"}, "max_grad_norm: is inf; pass a finite"),
        (ValueError, {"max_grad_norm": torch.tensor(-1.0)}, "max_grad_norm: is -1.0"),
        (ValueError, {"max_grad_norm": torch.ones(2)}, r"tensor \[2\]; pass a floating scalar tensor \[\]"),
        (ValueError, {"max_grad_norm": torch.tensor(1)}, "max_grad_norm: is a torch.int64 tensor"),
        (
            ValueError,
            {"max_grad_norm": {"0": 1.0}},
            "max_grad_norm: is a dict with strategy='auto'; pass one number",
        ),
        (
            ValueError,
            {"max_grad_norm": {"0": 1.0, "2": 1.0}, "strategy": "per_layer"},
            "max_grad_norm: has no threshold for layer '3', which is trained; add one",
        ),
        (
            ValueError,
            {"max_grad_norm": {"0": 1.0, "1": 1.0, "2": 1.0, "3": 1.0}, "strategy": "per_layer"},
            "max_grad_norm: '1' is no module with parameters of its own; they are '0', '2', '3'",
        ),
        (
            ValueError,
            {"max_grad_norm": {"0": 1.0, "2": -1.0, "3": 1.0}, "strategy": "per_layer"},
            r"max_grad_norm\['2'\]: is -1.0; pass a finite number above 0",
        ),
        (
            TypeError,
            {"max_grad_norm": {"0": 1.0, "2": "1", "3": 1.0}, "strategy": "per_layer"},
            r"max_grad_norm\['2'\]: is str",
        ),
    ],
)
def test_arguments_are_checked_and_the_model_stays_plain(error: type, settings: dict[str, Any], match: str) -> None:
    model = classifier()
    with pytest.raises(error, match=match):
        engine(model, **settings)
    assert all(type(p) is nn.Parameter for p in model.parameters())


def test_a_threshold_is_checked_when_it_is_set() -> None:
    dp = engine(classifier(), noise_multiplier=1.0)
    for value in (0.0, -1, math.inf, math.nan, torch.tensor(0.0), {"0": 1.0}):
        with pytest.raises(ValueError, match="max_grad_norm"):
            dp.max_grad_norm = value
    with pytest.raises(TypeError, match="max_grad_norm"):
        dp.max_grad_norm = [1.0]
    assert dp.max_grad_norm == 0.7


def test_a_layer_that_is_thawed_without_a_threshold() -> None:
    model = classifier()
    model[0].requires_grad_(False)
    dp = engine(model, strategy="per_layer", max_grad_norm={"2": 1.0, "3": 1.0})
    loss(dp, batch()).backward()
    step(dp)
    model[0].requires_grad_(True)
    with pytest.raises(ValueError, match="has no threshold for layer '0'"):
        loss(dp, batch()).backward()


# --- models and optimizers -------------------------------------------------------------------------------------------


def test_two_engines_on_one_model() -> None:
    model = classifier()
    engine(model)
    with pytest.raises(PrivacyError, match=r"parameter '0.weight' belongs to another DPEngine; call detach\(\)"):
        engine(model)


def test_other_parameter_classes() -> None:
    class Odd(nn.Parameter):
        pass

    model = nn.Linear(2, 2)
    model.weight = Odd(model.weight.data)
    with pytest.raises(PrivacyError, match=r"parameter 'weight' is a Odd; only plain torch.nn.Parameter"):
        engine(model)


@pytest.mark.parametrize(
    ("module", "shape"),
    [
        (nn.BatchNorm1d(6), (4, 6)),
        (nn.BatchNorm2d(6), (4, 6, 3, 3)),
        (nn.BatchNorm3d(6), (4, 6, 2, 2, 2)),
        (nn.SyncBatchNorm(6), (4, 6, 3, 3)),
        (nn.BatchNorm1d(6, affine=False), (4, 6)),
    ],
)
def test_batch_norm_and_its_replacement(module: nn.Module, shape: tuple[int, ...]) -> None:
    model = nn.Sequential(nn.Identity(), nn.Sequential(module), nn.Flatten(), nn.LazyLinear(2))
    with torch.no_grad():
        model.eval()(torch.ones(shape))
    model.train()
    with pytest.raises(PrivacyError, match=r"module '1.0' \(.*BatchNorm.*\) mixes the samples.*replace_batch_norm"):
        engine(model)
    fixed = replace_batch_norm(model)
    assert fixed is model and isinstance(model[1][0], nn.GroupNorm)
    assert model[1][0].num_groups == 6 and model[1][0].affine == module.affine
    dp = engine(model)
    dp.model(torch.randn(shape)).sum().backward()
    step(dp)
    assert isinstance(replace_batch_norm(nn.BatchNorm1d(35), groups=8), nn.GroupNorm)
    assert replace_batch_norm(nn.BatchNorm1d(35), groups=8).num_groups == 7


def test_batch_norm_that_is_switched_on_later() -> None:
    model = nn.Sequential(nn.Linear(5, 3), nn.BatchNorm1d(3)).double()
    model[1].eval()
    dp = engine(model)
    loss(dp, batch()).backward()
    step(dp)
    model.train()
    with pytest.raises(PrivacyError, match=r"module '1' \(BatchNorm1d\) mixes the samples of a batch"):
        dp.model(batch()[0])


def test_functional_batch_norm() -> None:
    class Mixes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(5))

        def forward(self, x: Tensor) -> Tensor:
            return F.batch_norm(x, None, None, self.scale, training=True)

    with pytest.raises(PrivacyError, match=r"'scale': batch_norm\(\) mixes the samples"):
        engine(Mixes()).model(torch.randn(4, 5))


def test_running_statistics() -> None:
    with pytest.raises(PrivacyError, match=r"module '0' \(InstanceNorm1d\) keeps running statistics"):
        engine(nn.Sequential(nn.InstanceNorm1d(3, track_running_stats=True), nn.Linear(2, 2)))


def test_a_parameter_without_the_optimizer() -> None:
    model = classifier()
    optimizer = torch.optim.SGD(model[0].parameters(), lr=0.1)
    with pytest.raises(PrivacyError, match=r"parameter '2.weight' is trainable but not in the optimizer.*Add it"):
        DPEngine(model, optimizer, max_grad_norm=1.0, noise_multiplier=1.0, expected_batch_size=1.0)


def test_an_optimizer_of_more_than_the_model() -> None:
    model = classifier()
    optimizer = torch.optim.SGD([*model.parameters(), nn.Parameter(torch.ones(1))], lr=0.1)
    with pytest.raises(PrivacyError, match="optimizer: 1 of its parameters are not the model's"):
        DPEngine(model, optimizer, max_grad_norm=1.0, noise_multiplier=1.0, expected_batch_size=1.0)


def test_a_parameter_that_was_replaced_or_added() -> None:
    dp = engine(classifier())
    dp.model[0].weight = nn.Parameter(dp.model[0].weight.detach().clone())
    loss(dp, batch()).backward()
    with pytest.raises(PrivacyError, match=r"parameter '0.weight' is trainable but not in the optimizer"):
        dp.optimizer.step()
    dp.optimizer.add_param_group({"params": [dp.model[0].weight]})
    with pytest.raises(PrivacyError, match=r"parameter '0.weight' was replaced or added after the DPEngine was made"):
        dp.optimizer.step()


def test_an_engine_is_not_pickled_or_copied() -> None:
    dp = engine(classifier())
    for duplicate in (pickle.dumps, copy.copy, copy.deepcopy):
        with pytest.raises(TypeError, match=r"DPEngine: cannot be pickled or copied.*dp.state_dict\(\)"):
            duplicate(dp)


# --- loops -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_second_backward_pass_through_one_forward_pass(strategy: str) -> None:
    x, y = batch()
    dp = engine(classifier(), strategy=strategy)
    logits = dp.model(x)
    first, second = F.cross_entropy(logits, y), logits.square().mean()
    if strategy == "two_pass":
        dp.backward(first + 0 * second)
    else:
        first.backward(retain_graph=True)
    with pytest.raises((PrivacyError, RuntimeError), match=r"second backward\(\) goes through one forward|second time"):
        dp.backward(second)
    assert_same(step(dp), expected(classifier(), (x, y), strategy=strategy))


def test_two_passes_need_the_engines_backward() -> None:
    dp = engine(classifier(), strategy="two_pass")
    with pytest.raises(PrivacyError, match=r"strategy 'two_pass' needs two backward passes: call dp.backward\(loss\)"):
        loss(dp, batch()).backward()


def test_gradients_asked_of_autograd() -> None:
    dp = engine(classifier())
    with pytest.raises(PrivacyError, match=r"torch.autograd.grad\(\) asks for the gradient of a private parameter"):
        torch.autograd.grad(loss(dp, batch()), list(dp.model.parameters()))
    with dp.public():
        assert torch.autograd.grad(loss(dp, batch()), dp.model[0].weight)[0].any()


def test_public_and_private_do_not_meet_in_one_pass() -> None:
    dp = engine(classifier())
    private = loss(dp, batch())
    with dp.public(), pytest.raises(PrivacyError, match=r"a private forward pass is followed by backward\(\) within"):
        private.backward()
    with dp.public():
        public = loss(dp, batch())
    with pytest.raises(PrivacyError, match=r"gets an ordinary gradient, which no rule has clipped"):
        public.backward()
    assert all(p.grad is None for p in dp.model.parameters())


def test_steps_with_a_closure() -> None:
    dp = engine(classifier())
    with pytest.raises(PrivacyError, match=r"optimizer.step\(closure\): backward passes within a step have no noise"):
        dp.optimizer.step(lambda: 0.0)
    with pytest.raises(PrivacyError, match=r"optimizer.step\(closure\)"):
        dp.optimizer.step(closure=lambda: 0.0)


def test_a_step_within_a_backward_pass() -> None:
    dp = engine(classifier())
    x, y = batch()
    x.requires_grad_()
    x.register_hook(lambda grad: dp.optimizer.step())
    with pytest.raises(PrivacyError, match=r"optimizer.step\(\) within backward\(\): the sums are not complete"):
        loss(dp, (x, y)).backward()


def test_a_mean_over_the_labels_that_are_not_ignored() -> None:
    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(5, 3)

        def forward(self, x: Tensor, labels: Tensor | None = None) -> Tensor:
            out = self.head(x)
            return F.cross_entropy(out.flatten(0, 1), labels.flatten(), reduction="sum") if labels is not None else out

    x = torch.randn(4, 6, 5)
    labels = torch.zeros(4, 6, dtype=torch.int64)
    ignored = labels.clone()
    ignored[1, 3:] = -100
    dp = engine(Tokens())
    dp.model(x, labels=labels).backward()
    with pytest.raises(
        PrivacyError, match=r"labels: hold ignored positions.*loss_reduction='sum'.*num_items_in_batch=1"
    ):
        dp.model(x, labels=ignored)
    with torch.no_grad():
        dp.model(x, labels=ignored)
    summed = engine(Tokens(), loss_reduction="sum")
    summed.model(x, labels=ignored).backward()
    assert step(summed)["head.weight"].any()


# --- uses of parameters ----------------------------------------------------------------------------------------------


class Uses(nn.Module):
    def __init__(self, use: Any, *shape: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(*shape) + 0.1)
        self.use = use

    def forward(self, x: Tensor) -> Tensor:
        return self.use(x, self.weight)


@pytest.mark.parametrize(
    ("use", "shape", "match"),
    [
        (lambda x, w: F.linear(x.T, w), (2, 4), r"'weight': linear\(\) gets an input of shape \[5, 4\]"),
        (lambda x, w: F.linear(x.sum(0, keepdim=True), w), (2, 5), r"gets an input of shape \[1, 5\]"),
        (lambda x, w: F.linear(x.sum(0), w), (2, 5), r"gets an input of shape \[5\]"),
        (lambda x, w: x * w, (4, 5), r"'weight': mul\(\) meets samples along its own dimension 0"),
        (lambda x, w: x.sum() * w, (4, 5), r"'weight': mul\(\) joins it with a tensor \[\].*weight_decay"),
        (lambda x, w: torch.cat([x, w]), (4, 5), r"'weight': cat\(\) joins it with samples"),
        (lambda x, w: F.embedding(x.long(), w, max_norm=1.0), (4, 5), "'weight': an embedding with max_norm"),
        (lambda x, w: F.embedding_bag(x.long(), w), (4, 5), r"'weight': embedding_bag\(\) has no rule; use an Emb"),
    ],
)
def test_uses_that_tell_no_samples_apart(use: Any, shape: tuple[int, ...], match: str) -> None:
    torch.manual_seed(0)
    dp = engine(Uses(use, *shape))
    x = torch.rand(4, 5, requires_grad=True)
    with pytest.raises(PrivacyError, match=match):
        dp.model(x).sum().backward()
    assert all(p.grad is None for p in dp.model.parameters())


def test_forward_passes_of_different_sizes_in_one_backward_pass() -> None:
    x, y = batch()
    dp = engine(classifier(), joint_forwards=True)
    with pytest.raises(PrivacyError, match=r"samples come to it but [37] to parameters before; dimension 0"):
        (loss(dp, (x[:3], y[:3])) + loss(dp, (x[3:], y[3:]))).backward()
    loss(dp, (x, y)).backward()
    assert_same(step(dp), expected(classifier(), (x, y)))


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_other_samples_in_two_forward_passes_of_one_backward_pass(strategy: str) -> None:
    x, y = batch()
    dp = engine(classifier(), strategy=strategy)
    with pytest.raises(
        PrivacyError, match=r"one backward\(\) goes through several forward passes.*joint_forwards=True"
    ):
        dp.backward(loss(dp, (x[:5], y[:5])) + loss(dp, (x[5:], y[5:])))
    dp.backward(loss(dp, (x, y)))
    assert_same(step(dp), expected(classifier(), (x, y), strategy=strategy))


def test_settings_from_a_file_are_checked() -> None:
    dp = engine(classifier())
    with pytest.raises(ValueError, match=r"noise_multiplier: is -1\.0"):
        dp.load_state_dict({**dp.state_dict(), "noise_multiplier": -1.0})
    with pytest.raises(ValueError, match="max_grad_norm: is 0"):
        dp.load_state_dict({**dp.state_dict(), "max_grad_norm": 0})


class Shared(nn.Module):
    """One weight in two layers, of which another parameter belongs to one."""

    def __init__(self, use: Any) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(5, 5), nn.Linear(5, 5)
        self.use = use

    def forward(self, x: Tensor) -> Tensor:
        return self.use(self, x)


def test_layers_that_cannot_be_told_apart() -> None:
    def both(model: Shared, x: Tensor) -> Tensor:
        return F.linear(model.second(x), model.first.weight, model.second.bias)

    dp = engine(Shared(both), strategy="per_layer")
    with pytest.raises(PrivacyError, match=r"'second.weight', 'second.bias': used together and apart"):
        dp.model(torch.randn(4, 5)).sum().backward()


def test_a_layer_that_is_used_again_after_it_was_clipped() -> None:
    def again(model: Shared, x: Tensor) -> Tensor:
        x = checkpoint(model.first, x, use_reentrant=True)
        return checkpoint(model.first, model.second(x), use_reentrant=True)

    x = torch.randn(4, 5, requires_grad=True)
    dp = engine(Shared(again), strategy="per_layer")
    with pytest.raises(PrivacyError, match=r"used again in a part that is recomputed.*use_reentrant=False"):
        dp.model(x).sum().backward()
    assert not dp._sums.totals


def test_numbers_made_of_parameters_alone_may_be_read() -> None:
    dp = engine(classifier())
    weight, other = dp.model[0].weight, torch.zeros(7, 5, dtype=torch.float64)
    assert not torch.equal(weight, other) and not torch.allclose(other, weight)
    assert (weight == other).shape == (7, 5)
    assert not torch.isnan(weight).any() and weight.norm().item() > 0
