"""AdaMix for any model: both phases on minibatches, through the engine of `adamix_kernels`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from adamix.deep.compiling import check_uncompiled, is_compiled
from adamix.deep.config import DeepConfig
from adamix.deep.data import Collate, Data, PublicBatches, secret_generators
from adamix.deep.losses import Loss, check_loss, count_classes, default_loss, measure
from adamix.deep.memory import recompute_activations
from adamix.deep.phases import Task, make_engine, mixed_phase, public_phase, try_on_public_rows
from adamix.deep.ranks import RankRecorder, Ranks, recording_on
from adamix.deep.sharding import device_of_job, digest_of_all, is_sharded, rest, shard, unwrapped
from adamix.deep.tuning import Tuned, has_adapters, tune
from adamix.deep.weights import MakeOptimizer, Training, maker
from adamix.errors import InputError
from adamix.ledger import Ledger
from adamix.models import check_module, eval_mode
from adamix.privacy import warn_if_weak
from adamix.private_phase import Step
from adamix.recorder import digest_of
from adamix.rows import check_no_overlap
from adamix_kernels import Noise


@dataclass(frozen=True)
class DeepResult:
    """A trained model and what it cost. Nothing here was computed from private rows but through the mechanism.

    `model` is the one that was passed, trained; `tuned` tells what of it was, and `public_state` holds these parameters
    after phase 1, on the host; of a sharded model they are `DTensor`s, of which each rank has its part. Errors are
    percent of the test rows, losses their mean; None without test rows, errors also where the model is no classifier.
    `public_loss` of a step is NaN where the loss is a sum over rows. The rest is as in `adamix.Result`.
    """

    model: nn.Module
    tuned: Tuned
    public_state: dict[str, Tensor]
    test_error: float | None
    public_error: float | None
    test_loss: float | None
    public_loss: float | None
    epsilon: float
    delta: float
    noise_multiplier: float
    steps: list[Step]
    epsilons: list[float]
    config: DeepConfig
    ledger_epsilon: float | None = None

    def trained_state(self) -> dict[str, Tensor]:
        """The parameters that were trained, by name, copies, sharded as they are: for adapters all that has to be
        kept."""
        rest(self.model)
        named = dict(unwrapped(self.model).named_parameters())
        return {name: named[name].detach().clone().contiguous() for name in self.tuned.names}


class DeepAdaMix:
    """Private training of any model with public data, AdaMix of Golatkar et al. (CVPR 2022) on minibatches.

    Phase 1 trains on public rows. In each step of phase 2 a Poisson batch of private rows and some public rows go
    through one forward and one backward pass: the public rows' norms set the thresholds, of each layer or of all,
    private gradients are clipped to them and get noise, public ones are exact.

    The model is trained in place, in eval mode, in both phases: masks of dropout would tell how many private rows there
    are. It is left in the mode it came in.

    Where torch.distributed is initialised with several processes, all of them train one model: each calls `fit` with
    the same data, and takes its share of every batch. Rank 0 opens the ledger and writes the checkpoints. A model may
    be in DistributedDataParallel, which is no other than one on each rank, or sharded by `fully_shard` over all ranks,
    one mesh dimension or two: no rank has more of it than a part that is computed with, and all write checkpoints, each
    its own part (torch.distributed.checkpoint), which any number of ranks can go on from.

    Args:
        model: samples in dimension 0 of all inputs, kept apart; no BatchNorm, no forward hooks, and a forward pass
            writes no buffer. On the device it is on, it stays.
        loss: `loss(model, batch)`, the losses of the rows `[N]` (best: batches then have a fixed size, and public
            losses are told), or their sum. None: cross-entropy for `(x, label)` rows; for dicts the model's own loss
            (transformers), as a sum.
        collate: makes a batch of a list of rows; None: torch's `default_collate`.
        optimizer: "adamw", "sgd", or a function of the parameters that returns an optimizer; for both phases.
        tune: "full", "head", "bias", "lora", or patterns of parameter names, see `adamix.deep.tune`.
        settings: the fields of `DeepConfig`; `epsilon` and `expected_batch_size` have no default.

    Raises:
        InputError: a setting is wrong; the message says what to pass.

    Example:
        >>> trainer = DeepAdaMix(model, epsilon=3.0, expected_batch_size=256, sample_rate=0.01, tune="lora")
        >>> result = trainer.fit(public=public, private=private, test=test, ledger="rows.ledger")
        >>> result.test_error, result.epsilon
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        loss: Loss | None = None,
        collate: Collate | None = None,
        optimizer: str | MakeOptimizer = "adamw",
        tune: str | Sequence[str] = "full",
        **settings: Any,
    ) -> None:
        named = (
            optimizer if isinstance(optimizer, str) else getattr(optimizer, "__qualname__", type(optimizer).__name__)
        )
        patterns = " ".join(tune) if isinstance(tune, list | tuple) else tune
        self.config = DeepConfig.of({**settings, "optimizer": named, "tune": patterns})
        rate = self.config.learning_rate
        public_rate = self.config.public_learning_rate
        self._make = maker(optimizer, rate)
        self._make_public = maker(optimizer, rate if public_rate is None else public_rate)
        check_module(unwrapped(model))
        check_uncompiled(unwrapped(model))
        self.model, self._loss, self._collate = model, loss or default_loss, collate

    def fit(
        self,
        *,
        public: Any,
        private: Any,
        test: Any = None,
        ledger: Ledger | str | Path | None = None,
        checkpoint: str | Path | None = None,
        checkpoint_every: int = 1,
        resume: bool = False,
        on_public_step: Callable[[int], None] | None = None,
        on_step: Callable[[Step], None] | None = None,
    ) -> DeepResult:
        """Run both phases.

        Args:
            public, private, test: map-style datasets, of `torch.utils.data`, `datasets`, torchvision, or lists: with
                rows `(x, label)`, dicts, or what `collate` takes. No private row may be among the public or the test
                ones: all rows are read once to find out. Test rows are used for nothing but the reported figures, and
                are not protected.
            on_public_step, on_step: called after each step of phase 1 with its number, and of phase 2 with what may
                be published about it.
            ledger, checkpoint, checkpoint_every, resume: as in `AdaMix.fit`. Checkpoints hold the trained parameters
                and the optimizer's state. The model must be built as before; what is trained of it comes from there.

        Raises:
            InputError: rows, model, loss, ledger or checkpoint are wrong; found before anything is charged, except what
                only private rows show when they are loaded again.
        """
        config, model = self.config, unwrapped(self.model)
        warn_if_weak(config)
        device = next(model.parameters()).device
        if config.sharding == "fsdp":
            device = device_of_job(device)
        low = config.precision == "bfloat16"
        if low:
            model.to(torch.bfloat16)
        data = {
            name: Data(
                name,
                given,
                self._collate,
                device=device,
                dtype=torch.bfloat16 if low else None,
                workers=config.num_workers,
            )
            for name, given in (("public", public), ("private", private), ("test", test))
            if name != "test" or given is not None
        }
        if not len(data["public"]):
            raise InputError("public: has no rows; pass some")
        ranks = Ranks.of(self.model)
        ranks.check_equal({**dataclasses.asdict(config), "resume": resume, "checkpoint_every": checkpoint_every})
        ranks.check_equal({"model": _form(model)}, told=False)
        tuned = tune_as(self.model, config)
        if config.sharding == "fsdp":
            shard(self.model, device)
        ranks = Ranks.of(self.model)
        ranks.agree([*model.parameters(), *model.buffers()])
        training = Training(model, self._make_public)
        with eval_mode(model), recompute_activations(model, config.checkpointing):
            task, classes = self._task(data["public"], config, device, ranks)
            with secret_generators(device):
                rows = _compared(data, classes)
            ranks.check_equal(rows, told=False)
            fixed = {
                "public rows": rows["public"],
                "trained parameters": training.size,
                "frozen parameters and buffers": digest_of_all(_rest(model, tuned)),
                "optimizer": type(training.optimizer).__name__,
            }
            of_run = {"every": checkpoint_every, "resume": resume, "fixed": fixed}
            with recording_on(ranks, training, config, ledger, checkpoint, **of_run) as recorder:
                try_on_public_rows(task, training.optimizer, config)
                return self._train(recorder, task, training, tuned, data, classes, on_public_step, on_step)

    def _task(self, public: Data, config: DeepConfig, device: torch.device, ranks: Ranks) -> tuple[Task, int | None]:
        """Also tries the loss, on a few public rows."""

        def context() -> AbstractContextManager[Any]:
            return torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "autocast")

        model = unwrapped(self.model)
        rows = public.rows(range(min(3, len(public))))
        rows = rows * 2 if len(rows) == 1 else rows  # a mean over one row is its sum
        together, alone = public.batch(rows), [public.batch([row]) for row in rows]
        with torch.no_grad(), context():
            by_row = check_loss(model, self._loss, together, alone, exact=config.precision == "float32")
            classes = count_classes(model, together) if self._loss is default_loss else None
        if config.noise_mode == "secure" and not by_row:
            raise InputError(
                "loss: is a sum over rows, with noise_mode='secure': batches are as long as what was drawn then, and "
                "the last bits of public gradients tell of it; return the losses of the rows [N], as token_loss does"
            )
        if (config.compile or is_compiled(self.model)) and not by_row:
            raise InputError(
                "compile: the loss is a sum over rows, whose batches are as long as what was drawn; compiled code "
                "refuses some lengths, which would tell of it. Return the losses of the rows [N], or do not compile"
            )
        batches = PublicBatches(public, config.public_batch_size, config.seed)
        if batches.size < ranks.size:
            raise InputError(
                f"public_batch_size: {batches.size} public rows in a step of {ranks.size} ranks; pass one for each rank"
            )
        called: Any = torch.compile(model) if config.compile else model
        return Task(model, called, self._loss, by_row, batches, context, device, ranks), classes

    def _train(
        self,
        recorder: RankRecorder,
        task: Task,
        training: Training,
        tuned: Tuned,
        data: dict[str, Data],
        classes: int | None,
        on_public_step: Callable[[int], None] | None,
        on_step: Callable[[Step], None] | None,
    ) -> DeepResult:
        config, saved, test = recorder.config, recorder.saved, data.get("test")
        if saved is None:
            public_phase(task, training, config, on_public_step or (lambda _: None))
            anchor = training.weights()
        else:
            anchor = saved.anchor
            training.set_weights(anchor)
        public_state = {name: p.detach().to("cpu", copy=True) for name, p in training.named.items()}

        def figures() -> tuple[float | None, float | None]:
            if test is None:
                return None, None
            return measure(
                task.model, self._loss, test.batches(config.rows_per_pass(task.ranks.size)), classes, task.context
            )

        public_error, public_loss = figures()
        training = Training(task.model, self._make)  # a new optimizer: the moments of phase 1 are not those of phase 2
        if saved is not None:
            training.set_weights(saved.weights)
            training.load_optimizer_state(saved.optimizer, saved.optimizer_state)
        recorder.begin(training, anchor=anchor)
        # Made after a checkpoint was read, of a fresh key: a resumed run shares no noise with the one before.
        noise = Noise(config.noise_seed, config.noise_mode)
        engine = make_engine(task, training.optimizer, config, recorder.noise_multiplier, noise)
        engine.steps = len(recorder.steps)
        try:
            for step in mixed_phase(
                task,
                training,
                data["private"],
                config,
                engine,
                anchor=anchor.to(task.device) if config.anchor else anchor,
                charge=recorder.charge,
                finished=len(recorder.steps),
                last=recorder.last,
            ):
                recorder.finish_step(step, training)
                if on_step is not None:
                    on_step(step)
        finally:
            engine.detach()
        recorder.end()
        epsilons = recorder.epsilons()
        test_error, test_loss = figures()
        rest(task.model)
        return DeepResult(
            model=self.model,
            tuned=tuned,
            public_state=public_state,
            test_error=test_error,
            public_error=public_error,
            test_loss=test_loss,
            public_loss=public_loss,
            epsilon=epsilons[-1],
            delta=config.delta,
            noise_multiplier=recorder.noise_multiplier,
            steps=recorder.steps,
            epsilons=epsilons,
            config=config,
            ledger_epsilon=recorder.ledger_epsilon(),
        )


def tune_as(model: nn.Module, config: DeepConfig) -> Tuned:
    inner = unwrapped(model)
    if config.tune == "lora" and (inner is not model or is_sharded(model)) and not has_adapters(inner):
        raise InputError(
            "tune: 'lora' given for a model that is spread over ranks already, which takes no new parameters; call "
            "adamix.deep.tune(model, 'lora') before fully_shard() or DistributedDataParallel()"
        )
    return tune(inner, config.tune, head=config.head, lora_rank=config.lora_rank)


def _form(model: nn.Module) -> list[tuple[str, str, list[int]]]:
    """Names, types and shapes of its tensors."""
    named = [*model.named_parameters(), *model.named_buffers()]
    return [(name, str(x.dtype), list(x.shape)) for name, x in named]


def _compared(data: dict[str, Data], classes: int | None) -> dict[str, str]:
    """Refuse private rows that are public or test rows; returns a hash of each set, of which only that of the public
    one may be kept."""
    like = data["public"].rows([0])[0]
    digests = {name: rows.digests(like, classes) for name, rows in data.items()}
    check_no_overlap(digests["public"], digests["private"])
    if "test" in digests:
        check_no_overlap(digests["private"], digests["test"], ("private", "test"))
    return {
        name: digest_of(torch.frombuffer(bytearray(repr(found).encode()), dtype=torch.uint8))
        for name, found in digests.items()
    }


def _rest(model: nn.Module, tuned: Tuned) -> list[Tensor]:
    """What is not trained."""
    rest(model)
    trained = {id(p) for name, p in model.named_parameters() if name in set(tuned.names)}
    return [x for x in (*model.parameters(), *model.buffers()) if id(x) not in trained]
