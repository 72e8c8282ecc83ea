"""Phase 2: steps on public and private rows together, with threshold and subspace set anew by the public rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from adamix.config import Config
from adamix.mechanism import Mechanism
from adamix.models import Trainable
from adamix.private_metrics import PrivateMetrics, private_metrics
from adamix.rows import Rows, UserRows
from adamix.schedule import make_schedule, public_norms
from adamix_kernels import project, subspace_basis


@dataclass(frozen=True)
class Step:
    """What may be published about one step: nothing here has touched a private row.

    `thresholds` tau_t per layer; `public_loss` mean; `public_clipped`, the share of public rows above the threshold;
    `rank` of the subspace, None without one; `step_size` eta. NaN for what was not measured.
    """

    number: int
    thresholds: tuple[float, ...]
    public_loss: float
    public_clipped: float
    rank: int | None
    step_size: float


def private_phase(
    model: Trainable,
    public: Rows,
    private: Rows | UserRows,
    config: Config,
    mechanism: Mechanism,
    *,
    start: Tensor,
    anchor: Tensor,
    charge: Callable[[], None] = lambda: None,
    finished: int = 0,
    weights: Tensor | None = None,
    last: int | None = None,
    on_private: Callable[[PrivateMetrics], None] | None = None,
) -> Iterator[Step]:
    """Run phase 2, updating `model` in place; yields after each step.

    Args:
        public: rows whose exact gradients set threshold and subspace, and enter the update.
        private: rows seen only through `mechanism`.
        start: the weights the model came with `[P]`, for the rule behind `learning_rate=None`.
        anchor: the phase-1 weights `[P]`.
        charge: called in each step before private rows are touched; what it raises ends the run with nothing drawn.
        finished: steps taken before, after which the weights were `weights` `[P]`. The model must still have those
            that phase 2 began with, on which the step sizes rest.
        last: the number of the last step; None: `config.steps`.
        on_private: called before each release with what is outside the guarantee.
    """
    schedule = make_schedule(model, public, start, config, mechanism.noise_multiplier)
    if weights is not None:
        model.set_weights(weights)
    weight = config.public_weight
    denominator = config.expected_batch_size + weight * len(public.y)
    for number in range(finished + 1, (config.steps if last is None else last) + 1):
        public_sum, norm_sq, loss = model.grad_sum(public)  # norm_sq [layers, N]
        norm_sq = public_norms(norm_sq, config)
        basis = None
        if config.projects:
            grads = torch.cat(list(model.grad_sample(public)))
            basis = subspace_basis(grads, rank=config.subspace_rank, energy=config.subspace_energy)
            norm_sq = project(grads, basis).double().square().sum(1)[None].float()
        thresholds = schedule.thresholds(norm_sq, config)
        charge()
        if on_private is not None:
            on_private(private_metrics(number, model, private, thresholds, basis))
        released = mechanism.release(model, mechanism.sample(private, config.sample_rate), thresholds, basis)

        tau = float(thresholds.double().square().sum().sqrt())
        eta = schedule.step_size(tau)
        direction = (released + weight * public_sum) / denominator
        weights = pulled_step(model.weights(), direction, eta, config.anchor, anchor)
        model.set_weights(weights)
        yield Step(
            number,
            tuple(thresholds.tolist()),
            float(loss) / len(public.y),
            float((norm_sq.sqrt() > thresholds[:, None]).any(0).double().mean()),
            None if basis is None else len(basis),
            eta,
        )


def pulled_step(weights: Tensor, direction: Tensor, step_size: float, pull: float, anchor: Tensor) -> Tensor:
    """w <- w - eta (direction + pull (w - anchor)), the pull taken at the new w: stable for every eta and pull."""
    return (weights - step_size * direction + step_size * pull * anchor) / (1 + step_size * pull)
