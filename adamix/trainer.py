"""AdaMix, both phases (Golatkar et al., CVPR 2022, arXiv 2203.11481)."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from adamix.config import PRESETS, Config
from adamix.errors import InputError
from adamix.geometry import Whiten
from adamix.ledger import Ledger
from adamix.mechanism import Mechanism
from adamix.models import Trainable, error_rate, trainable
from adamix.privacy import warn_if_weak
from adamix.private_metrics import WARNING, PrivateMetrics
from adamix.private_phase import Step, private_phase
from adamix.public_phase import fit_public
from adamix.recorder import Recorder, fixed_parts, recording
from adamix.rows import (
    Rows,
    UserRows,
    check_classes_present,
    check_disjoint,
    check_private_rows,
    check_rows,
    check_same_shape,
)
from adamix_kernels import Noise, OutsideGuaranteeWarning

#: Rows as callers give them: a pair of tensors or arrays, features `[N, ...]` and class numbers `[N]`.
RowsLike = tuple[Any, Any]
#: Private rows may be a triple: whose rows they are besides, integers `[N]`.
PrivateRowsLike = RowsLike | tuple[Any, Any, Any]


@dataclass(frozen=True)
class Result:
    """A trained classifier and what it cost.

    `model` maps features as given to `fit` to logits, geometry included; `public_state` are its weights after phase 1.
    Errors are percent of the test rows, None without them. `epsilons[t]` is the budget spent after step t + 1.
    With a ledger `epsilon` counts every step charged to the run, also those that an interruption lost, and
    `ledger_epsilon` is that of all runs in the ledger, at its delta.
    """

    model: nn.Module
    public_state: dict[str, Tensor]
    test_error: float | None
    public_error: float | None
    epsilon: float
    delta: float
    noise_multiplier: float
    steps: list[Step]
    epsilons: list[float]
    config: Config
    ledger_epsilon: float | None = None

    def trained_state(self) -> dict[str, Tensor]:
        """The model's tensors, copies."""
        return tensors_of(self.model)


class AdaMix:
    """Private training of a classifier with a little public data.

    Args:
        model: None for a softmax head, without bias, sized by the data; or any `nn.Module` that gives logits and keeps
            samples apart, trained in place and in eval mode (dropout is off, see `Trainable`). An `nn.Linear` is a
            softmax head and takes the fast path; its weights, zeros or a zero-shot classifier for instance, are the
            start of phase 1.
        preset: a whole method by name, of `adamix.config.PRESETS`: "adamix", "paper" or "conventional".
        settings: the fields of `Config`, over those of the preset; `epsilon` and `expected_batch_size` have no default.

    Raises:
        InputError: a setting is wrong; the message says what to pass.

    Example:
        >>> result = AdaMix(epsilon=3.0, expected_batch_size=1000).fit(public=(Xp, yp), private=(X, y), test=(Xt, yt))
        >>> result.test_error, result.epsilon
    """

    def __init__(self, model: nn.Module | None = None, *, preset: str = "adamix", **settings: Any) -> None:
        if preset not in PRESETS:
            raise InputError(f"preset: {preset!r} given; pass one of {', '.join(map(repr, PRESETS))}")
        self.model = model
        self.config = Config.of(PRESETS[preset] | settings)

    def fit(
        self,
        *,
        public: RowsLike,
        private: PrivateRowsLike,
        test: RowsLike | None = None,
        on_step: Callable[[Step], None] | None = None,
        ledger: Ledger | str | Path | None = None,
        checkpoint: str | Path | None = None,
        checkpoint_every: int = 1,
        resume: bool = False,
        private_metrics: Callable[[PrivateMetrics], None] | None = None,
    ) -> Result:
        """Run both phases.

        Args:
            public: rows whose use costs nothing; every class has some.
            private: rows protected by (epsilon, delta); none of them may be among the public or the test ones. With
                `(X, y, users)` all rows of a user are protected as one: users are sampled, their rows' gradients added
                before they are clipped, and `expected_batch_size` counts users.
            test: rows to report errors on; used for nothing else, and not protected.
            on_step: called after each private step with what may be published about it.
            ledger: of the private rows, open or as a path: each step is charged in it before its batch and noise are
                drawn, and a run that the budget does not allow is refused. None: you keep count of the runs.
            checkpoint: folder to go on from after an interruption; needs a ledger.
            checkpoint_every: steps between two checkpoints; so many at most are lost, and charged again.
            resume: go on after the last checkpoint, with fresh noise. The settings, the model and the rows must be the
                same, but `steps` may be fewer. The interrupted steps have to fit the budget a second time.
            private_metrics: called in each step with loss, accuracy and clipped fraction of the private rows, which
                are OUTSIDE THE GUARANTEE; `reveal()` reads them.

        Raises:
            InputError: rows of wrong shape or type, NaN or Inf, labels outside the public classes, a class without
                public rows, private rows among the others; a model that `Trainable` refuses; a ledger or checkpoint
                that is missing, damaged, in use or used up. Nothing is trained then. Later: one that cannot be
                written; nothing that was charged is lost.
        """
        config = self.config
        # Token numbers stay whole for a model that asks for them; feature vectors are float32.
        kept = {"keep_integers": config.geometry is None and not isinstance(self.model, nn.Linear | None)}
        public = check_rows("public", public, **kept)
        classes = self._classes(public)
        public = check_rows("public", public, classes, **kept)
        private = check_private_rows(private, classes, **kept)
        test = None if test is None else check_rows("test", test, classes, **kept)
        check_same_shape("private", Rows(private.x, private.y), public)
        if test is not None:
            check_same_shape("test", test, public)
        check_classes_present(public.y, classes)
        check_disjoint(public.x, private.x)
        if test is not None:
            check_disjoint(private.x, test.x, ("private", "test"))
        warn_if_weak(config)
        if private_metrics is not None:
            warnings.warn(WARNING, OutsideGuaranteeWarning, stacklevel=2)

        geometry = Whiten(public.x, public.y) if config.geometry == "whiten" else None
        head = _zero_head(public.x, classes) if self.model is None else self.model
        view = trainable(head)
        fixed = fixed_parts(view, public, classes)
        unit = "user" if isinstance(private, UserRows) else "record"
        with recording(
            config, ledger, checkpoint, every=checkpoint_every, resume=resume, fixed=fixed, unit=unit
        ) as recorder:
            view.check(public._replace(x=_within(geometry, public.x)), classes)
            return self._train(recorder, view, geometry, Rows(*public), private, test, on_step, private_metrics)

    def _train(
        self,
        recorder: Recorder[Config],
        view: Trainable,
        geometry: nn.Module | None,
        public: Rows,
        private: Rows | UserRows,
        test: Rows | None,
        on_step: Callable[[Step], None] | None,
        on_private: Callable[[PrivateMetrics], None] | None,
    ) -> Result:
        config, saved = recorder.config, recorder.saved
        model = view.module if geometry is None else nn.Sequential(geometry, view.module)
        inside_public = public._replace(x=_within(geometry, public.x))
        inside_private = private._replace(x=_within(geometry, private.x))
        if saved is None:
            start = view.weights()
            fit_public(view, inside_public, l2=config.public_l2, steps=config.public_steps)
            anchor = view.weights()
        else:
            start, anchor = (tensor.to(public.x.device) for tensor in (saved.start, saved.anchor))
            view.set_weights(anchor)
        public_state = tensors_of(model)
        public_error = None if test is None else error_rate(model, test)

        if not config.warm_start:
            view.set_weights(start)
        recorder.begin(view, anchor=anchor, start=start)
        # Made after a checkpoint was read, of a fresh key: a resumed run shares no noise with the one before.
        mechanism = Mechanism(recorder.noise_multiplier, Noise(config.noise_seed, config.noise_mode))
        for step in private_phase(
            view,
            inside_public,
            inside_private,
            config,
            mechanism,
            start=start,
            anchor=anchor,
            charge=recorder.charge,
            finished=len(recorder.steps),
            weights=None if saved is None else saved.weights.to(public.x.device),
            last=recorder.last,
            on_private=on_private,
        ):
            recorder.finish_step(step, view)
            if on_step is not None:
                on_step(step)
        recorder.end()
        epsilons = recorder.epsilons()
        return Result(
            model=model,
            public_state=public_state,
            test_error=None if test is None else error_rate(model, test),
            public_error=public_error,
            epsilon=epsilons[-1],
            delta=config.delta,
            noise_multiplier=recorder.noise_multiplier,
            steps=recorder.steps,
            epsilons=epsilons,
            config=config,
            ledger_epsilon=recorder.ledger_epsilon(),
        )

    def _classes(self, public: Rows) -> int:
        if isinstance(self.model, nn.Linear):
            return self.model.out_features
        return int(public.y.max()) + 1


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """The tensors of its state_dict, each a copy of its own (tied weights too)."""
    state = model.state_dict().items()
    return {name: value.detach().clone().contiguous() for name, value in state if isinstance(value, Tensor)}


def _zero_head(x: Tensor, classes: int) -> nn.Linear:
    """Without a bias: measured, it catches more noise than it adds (`benchmarks/defaults.md`)."""
    if x.dim() != 2:
        raise InputError(
            f"model: None is a softmax head on feature vectors [N, d], the rows have shape {list(x.shape[1:])}; "
            "pass an nn.Module for them"
        )
    head = nn.Linear(x.shape[1], classes, bias=False, device=x.device)
    nn.init.zeros_(head.weight)
    return head


def _within(geometry: nn.Module | None, x: Tensor) -> Tensor:
    if geometry is None:
        return x
    with torch.no_grad():
        placed: Tensor = geometry(x)
    return placed
