"""Phase 1: the ball park, from public rows alone and so at no cost in privacy."""

from __future__ import annotations

import torch
from torch import Tensor

from adamix.errors import InputError
from adamix.models import Trainable
from adamix.rows import Rows


def fit_public(model: Trainable, rows: Rows, *, l2: float, steps: int) -> None:
    """Minimise the mean loss of `rows` plus l2/2 ||w - start||^2 from the model's present weights, by L-BFGS.

    Raises:
        InputError: the weights do not stay finite, as with features of extreme size.
    """
    parameters = [p for p in model.module.parameters() if p.requires_grad]
    start = [p.detach().clone() for p in parameters]
    optimizer = torch.optim.LBFGS(parameters, max_iter=steps, tolerance_grad=1e-7, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        pull = sum(((p - s).square().sum() for p, s in zip(parameters, start, strict=True)), torch.zeros(()))
        loss = model.loss(rows) + l2 / 2 * pull
        loss.backward()
        return loss

    optimizer.step(closure)
    optimizer.zero_grad()
    if not all(p.isfinite().all() for p in parameters):
        raise InputError(
            "public: the fit to the public rows gives weights that are not finite; scale x to about 1, raise public_l2"
        )
