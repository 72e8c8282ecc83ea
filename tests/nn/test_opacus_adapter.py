"""Code written for Opacus gives the same weights, budget and noise on this backend."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

opacus = pytest.importorskip("opacus")
from opacus.schedulers import StepGradClip, StepNoise  # noqa: E402
from opacus.utils.batch_memory_manager import BatchMemoryManager  # noqa: E402
from opacus.validators.errors import UnsupportedModuleError  # noqa: E402

from adamix_kernels.integrations.opacus import GradSampleModule, PrivacyEngine  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
ENGINES = [opacus.PrivacyEngine, PrivacyEngine]


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 6, 3, 2)
        self.norm = nn.GroupNorm(2, 6)
        self.fc = nn.Linear(54, 16)
        self.out = nn.Linear(16, 4)

    def forward(self, x):
        return self.out(torch.tanh(self.fc(F.relu(self.norm(self.conv(x))).flatten(1))))


def parts(batch_size=8, rows=32, lr=0.5):
    torch.manual_seed(0)
    model = Net()
    data = TensorDataset(torch.randn(rows, 1, 8, 8), torch.arange(rows) % 4)
    return model, torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9), DataLoader(data, batch_size=batch_size)


def private(engine_class, *, mode="hooks", clipping="flat", max_grad_norm=0.3, **kwargs):
    model, optimizer, loader = parts(**{k: kwargs.pop(k) for k in ("batch_size", "rows", "lr") if k in kwargs})
    engine = engine_class(accountant="rdp")
    if clipping == "per_layer":
        max_grad_norm = [0.05 * (i + 1) for i, _ in enumerate(model.parameters())]
    reduction = kwargs.get("loss_reduction", "mean")
    settings = dict(noise_multiplier=0.0, poisson_sampling=False, criterion=nn.CrossEntropyLoss(reduction=reduction))
    settings |= kwargs
    made = engine.make_private(
        module=model,
        optimizer=optimizer,
        data_loader=loader,
        max_grad_norm=max_grad_norm,
        clipping=clipping,
        grad_sample_mode=mode,
        **settings,
    )
    criterion = made[2] if len(made) == 4 else settings["criterion"]
    return engine, made[0], made[1], criterion, made[-1]


def train(model, optimizer, criterion, loader, steps=3, micro=1):
    for step, (x, y) in enumerate(loader):
        if step % micro == 0:
            optimizer.zero_grad()
        criterion(model(x), y).backward()
        if step % micro == micro - 1:
            optimizer.step()
        if step + 1 == steps * micro:
            break


def assert_same(models, tolerance=1e-5):
    theirs, ours = (model.state_dict() for model in models)
    assert list(theirs) == list(ours)
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, rtol=tolerance, atol=tolerance, msg=name)


@pytest.mark.parametrize(
    "settings",
    [
        {"mode": "hooks"},
        {"mode": "functorch"},
        {"mode": "ew"},
        {"mode": "ghost"},
        {"mode": "ghost", "loss_reduction": "sum", "lr": 0.05},
        {"mode": "hooks", "loss_reduction": "sum", "lr": 0.05},
        {"clipping": "per_layer"},
    ],
    ids=lambda settings: "-".join(map(str, settings.values())),
)
def test_weights_are_those_of_opacus(settings):
    models = []
    for engine_class in ENGINES:
        _, model, optimizer, criterion, loader = private(engine_class, **settings)
        train(model, optimizer, criterion, loader)
        models.append(model)
    assert_same(models)


def test_epsilon_is_that_of_opacus():
    spent = []
    for engine_class in ENGINES:
        engine, model, optimizer, criterion, loader = private(engine_class, noise_multiplier=1.3, poisson_sampling=True)
        train(model, optimizer, criterion, loader)
        spent.append((engine.get_epsilon(1e-5), engine.accountant.history))
    assert spent[0] == spent[1]


def test_make_private_with_epsilon():
    made = []
    for engine_class in ENGINES:
        model, optimizer, loader = parts()
        engine = engine_class(accountant="rdp")
        _, optimizer, _ = engine.make_private_with_epsilon(
            module=model,
            optimizer=optimizer,
            data_loader=loader,
            target_epsilon=3.0,
            target_delta=1e-5,
            epochs=2,
            max_grad_norm=1.0,
            alphas=[2, 4, 8, 16, 32],
        )
        made.append((optimizer.noise_multiplier, optimizer.expected_batch_size, optimizer.max_grad_norm))
    assert made[0] == made[1]


@pytest.mark.parametrize("clipping", ["flat", "per_layer"])
def test_noise_has_its_standard_deviation(clipping):
    _, model, optimizer, *_ = private(PrivacyEngine, noise_multiplier=2.0, clipping=clipping, lr=1.0)
    optimizer.step()  # no samples: the noise alone
    values = torch.cat([p.grad.flatten() for p in model.parameters()])
    expected = 2.0 * optimizer.max_grad_norm / optimizer.expected_batch_size
    assert optimizer.expected_batch_size == 8
    assert values.std().item() == pytest.approx(expected, rel=5 / math.sqrt(2 * len(values)))


def test_a_noise_generator_repeats_a_run():
    def run(seed):
        generator = torch.Generator().manual_seed(seed)
        _, model, *rest = private(PrivacyEngine, noise_multiplier=1.0, noise_generator=generator)
        train(model, *rest)
        return model.state_dict()["_module.out.weight"]

    assert torch.equal(run(1), run(1))
    assert not torch.equal(run(1), run(2))


@pytest.mark.parametrize("clipping", ["flat", "per_layer"])
def test_batch_memory_manager(clipping):
    models, spent = [], []
    for engine_class in ENGINES:
        engine, model, optimizer, criterion, loader = private(engine_class, clipping=clipping, batch_size=16)
        optimizer.noise_multiplier = 0.0
        with BatchMemoryManager(data_loader=loader, max_physical_batch_size=5, optimizer=optimizer) as small:
            train(model, optimizer, criterion, small, steps=8)
        models.append(model)
        spent.append(engine.accountant.history)
    assert_same(models)
    assert spent[0] == spent[1]


def test_gradient_accumulation_without_poisson_batches():
    models, spent = [], []
    for engine_class in ENGINES:
        engine, model, optimizer, criterion, loader = private(engine_class, batch_size=4)
        train(model, optimizer, criterion, loader, steps=3, micro=2)
        models.append(model)
        spent.append(engine.accountant.history)
    assert_same(models)
    assert spent[0] == spent[1]


@pytest.mark.parametrize("engine_class", ENGINES)
def test_accumulation_of_poisson_batches_is_refused(engine_class):
    _, model, _, criterion, loader = private(engine_class, poisson_sampling=True)
    x, y = loader.dataset[:8]
    criterion(model(x), y).backward()
    with pytest.raises(ValueError, match=r"[Pp]oisson sampling is not compatible with grad accumulation"):
        criterion(model(x), y).backward()


@pytest.mark.parametrize("engine_class", ENGINES)
def test_gradients_must_be_cleared(engine_class):
    _, model, optimizer, criterion, loader = private(engine_class)
    x, y = loader.dataset[:8]
    criterion(model(x), y).backward()
    optimizer.step()
    criterion(model(x), y).backward()
    with pytest.raises(ValueError, match="haven't been cleared"):
        optimizer.step()


def test_what_follows_a_skipped_step_cannot_be_dropped():
    """It is in the sum that waits: run again, its samples would count twice."""
    _, model, optimizer, criterion, loader = private(PrivacyEngine)
    x, y = loader.dataset[:8]
    optimizer.signal_skip_step()
    criterion(model(x), y).backward()
    optimizer.step()
    optimizer.zero_grad()
    criterion(model(x), y).backward()
    for dropping in (optimizer, model):
        with pytest.raises(ValueError, match="the pass is part of the sum already"):
            dropping.zero_grad()


def test_zero_grad_of_the_module_drops_a_backward_pass():
    _, model, optimizer, criterion, loader = private(PrivacyEngine, poisson_sampling=True)
    x, y = loader.dataset[:8]
    for _ in range(2):
        criterion(model(x), y).backward()
        model.zero_grad()
    optimizer.step()
    assert all(not p.grad.any() for p in model.parameters())


def test_empty_batches():
    models = []
    for engine_class in ENGINES:
        engine, model, optimizer, criterion, loader = private(engine_class, poisson_sampling=True)
        x, y = loader.dataset[:0]
        criterion(model(x), y).backward()
        optimizer.step()
        models.append(model)
    assert_same(models)
    assert engine.accountant.history == [(0.0, 0.25, 1)]


def test_closure_and_step_hook():
    _, model, optimizer, criterion, loader = private(PrivacyEngine)
    x, y = loader.dataset[:8]
    seen = []
    optimizer.attach_step_hook(lambda made: seen.append((made, model._module.out.bias.grad.clone())))

    def closure():
        optimizer.zero_grad()
        criterion(model(x), y).backward()

    optimizer.step(closure)
    assert seen[0][0] is optimizer
    assert torch.equal(seen[0][1], model._module.out.bias.grad)


def test_schedulers():
    noise, limits = [], []
    for engine_class in ENGINES:
        optimizer = private(engine_class, noise_multiplier=1.0)[2]
        schedulers = [StepNoise(optimizer, step_size=1, gamma=0.5), StepGradClip(optimizer, step_size=1, gamma=0.1)]
        torch.optim.lr_scheduler.StepLR(optimizer, 1)
        for scheduler in schedulers:
            scheduler.step()
        noise.append(optimizer.noise_multiplier)
        limits.append(optimizer.max_grad_norm)
    assert noise == [0.5, 0.5]
    assert limits == [pytest.approx(0.03)] * 2


def test_checkpoints_of_opacus_load(tmp_path):
    theirs, model, optimizer, criterion, loader = private(opacus.PrivacyEngine, noise_multiplier=1.0)
    train(model, optimizer, criterion, loader)
    theirs.save_checkpoint(path=tmp_path / "state", module=model, optimizer=optimizer, checkpoint_dict={"epoch": 3})
    ours, again, stepped, *_ = private(PrivacyEngine)
    assert ours.load_checkpoint(path=tmp_path / "state", module=again, optimizer=stepped)["epoch"] == 3
    assert_same([model, again], 0)
    assert ours.accountant.history == theirs.accountant.history


def test_the_wrapper_is_that_of_opacus():
    _, model, optimizer, criterion, loader = private(PrivacyEngine)
    assert isinstance(model, opacus.grad_sample.AbstractGradSampleModule)
    assert isinstance(optimizer, opacus.optimizers.DPOptimizer)
    assert isinstance(model._module, Net)
    copied = copy.deepcopy(model)
    copied.cleanup()  # the copy has no engine, and takes none off
    train(model, optimizer, criterion, loader)
    plain = model.to_standard_module()
    assert all(type(p) is nn.Parameter and not {"grad_sample", "_dp_engine"} & set(vars(p)) for p in plain.parameters())


def test_without_a_wrapper():
    model, optimizer, loader = parts()
    hooks, optimizer, _ = PrivacyEngine().make_private(
        module=model,
        optimizer=optimizer,
        data_loader=loader,
        noise_multiplier=1.0,
        max_grad_norm=1.0,
        wrap_model=False,
    )
    train(model, optimizer, nn.CrossEntropyLoss(), loader)
    hooks.cleanup()
    assert all(type(p) is nn.Parameter for p in model.parameters())


def test_made_private_twice():
    """For a second data set; the first engine is taken off."""
    engine, model, optimizer, criterion, loader = private(PrivacyEngine)
    again, stepped, _ = engine.make_private(
        module=model,
        optimizer=optimizer,
        data_loader=loader,
        noise_multiplier=0.0,
        max_grad_norm=0.3,
        poisson_sampling=False,
    )
    assert isinstance(again, GradSampleModule) and again._module is model._module
    train(again, stepped, criterion, loader)
    assert engine.accountant.history == [(0.0, 0.25, 3)]


def test_secure_mode():
    engine = PrivacyEngine(secure_mode=True)
    model, optimizer, loader = parts(batch_size=8, rows=4000)
    model, optimizer, loader = engine.make_private(
        module=model, optimizer=optimizer, data_loader=loader, noise_multiplier=1.0, max_grad_norm=1.0
    )
    assert optimizer.engine.noise.mode == "secure"
    drawn = torch.tensor([len(rows) for rows in loader.batch_sampler], dtype=torch.float64)
    assert len(drawn) == 500
    assert drawn.mean().item() == pytest.approx(8, abs=5 * math.sqrt(8 / 500))
    train(model, optimizer, nn.CrossEntropyLoss(), loader, steps=2)
    with pytest.raises(ValueError, match="prohibited in secure mode"):
        engine.make_private(
            module=model,
            optimizer=optimizer,
            data_loader=loader,
            noise_multiplier=1.0,
            max_grad_norm=1.0,
            noise_generator=torch.Generator(),
        )


def test_the_validator_is_that_of_opacus():
    _, _, loader = parts()
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2))
    with pytest.raises(UnsupportedModuleError):
        PrivacyEngine().make_private(
            module=model,
            optimizer=torch.optim.SGD(model.parameters(), 0.1),
            data_loader=loader,
            noise_multiplier=1.0,
            max_grad_norm=1.0,
        )


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"clipping": "adaptive"}, NotImplementedError, "clipping: is 'adaptive'; pass 'flat' or 'per_layer'"),
        ({"mode": "ghost_fsdp"}, NotImplementedError, "grad_sample_mode: is 'ghost_fsdp'"),
        ({"batch_first": False}, NotImplementedError, "batch_first: is False"),
        ({"rand_on_empty": True}, NotImplementedError, "rand_on_empty: puts a made-up sample"),
        ({"max_grad_norm": [1.0, 2.0]}, ValueError, "max_grad_norm: is a list with clipping='flat'"),
    ],
)
def test_refusals(settings, error, message):
    with pytest.raises(error, match=message):
        private(PrivacyEngine, **settings)


def test_distributed_modules_are_refused():
    class Distributed(opacus.distributed.DifferentiallyPrivateDistributedDataParallel):
        __init__ = nn.Module.__init__

    _, optimizer, loader = parts()
    with pytest.raises(NotImplementedError, match="module: is distributed"):
        PrivacyEngine().make_private(
            module=Distributed(),
            optimizer=optimizer,
            data_loader=loader,
            noise_multiplier=1.0,
            max_grad_norm=1.0,
        )


def test_modules_that_opacus_has_wrapped_are_refused():
    model, optimizer, loader = parts()
    with pytest.raises(NotImplementedError, match="module: is wrapped by Opacus; pass the plain module"):
        PrivacyEngine().make_private(
            module=opacus.GradSampleModule(model),
            optimizer=optimizer,
            data_loader=loader,
            noise_multiplier=1.0,
            max_grad_norm=1.0,
        )


def test_thresholds_must_fit():
    model, optimizer, loader = parts()
    for limit, message in ((1.0, "is one number with clipping='per_layer'"), ([1.0], "has 1 numbers for 8 trainable")):
        with pytest.raises(ValueError, match=message):
            PrivacyEngine().make_private(
                module=model,
                optimizer=optimizer,
                data_loader=loader,
                noise_multiplier=1.0,
                max_grad_norm=limit,
                clipping="per_layer",
            )


def test_per_sample_gradients_are_refused():
    optimizer = private(PrivacyEngine)[2]
    with pytest.raises(NotImplementedError, match="never makes per-sample gradients"):
        _ = optimizer.grad_samples
    with pytest.raises(NotImplementedError, match="call these alone"):
        optimizer.add_noise()
    with pytest.raises(AttributeError, match="one max_grad_norm"):
        _ = optimizer.max_grad_norms
