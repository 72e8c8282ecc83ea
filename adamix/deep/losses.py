"""The loss of each row of a batch: it must depend on no other row."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from adamix.deep.data import LABELS, labels_of
from adamix.errors import InputError
from adamix.storage import one_line

#: `loss(model, batch)`: the losses of the rows, `[N]`, or their sum, `[]`.
Loss = Callable[[nn.Module, Any], Tensor]


def default_loss(model: nn.Module, batch: Any) -> Tensor:
    """Cross-entropy of `(x, label)` batches, `[N]`; of dicts the model's own loss, summed over rows.

    A model of transformers makes its loss a mean over the tokens that are not padding, which depends on the other rows'
    lengths; `num_items_in_batch=1` makes it a sum.
    """
    if isinstance(batch, Mapping):
        return own_loss(model, batch)
    if not isinstance(batch, tuple | list) or len(batch) != 2:
        raise InputError(
            f"loss: a batch is {type(batch).__name__}, neither a pair (x, label) nor a dict; pass loss=(model, batch) "
            "-> losses of the rows [N]"
        )
    losses = cross_entropy(scores(model, batch).float(), batch[1], reduction="none")
    return losses.flatten(1).mean(1) if losses.dim() > 1 else losses


def own_loss(model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
    """The `loss` of a model of transformers, a sum over rows and their tokens, `[]`."""
    if not LABELS & batch.keys():
        raise InputError(f"loss: rows have no 'labels' (they have {', '.join(batch)}); add them, or pass loss=")
    named = {("labels" if key in LABELS else key): value for key, value in batch.items()}
    loss = getattr(model(**named, num_items_in_batch=1), "loss", None)
    if not isinstance(loss, Tensor):
        raise InputError("loss: the model returns no 'loss'; pass loss=(model, batch) -> losses of the rows [N]")
    return loss


def token_loss(model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
    """Of a causal language model: for each row the mean cross-entropy of its own tokens, `[N]`.

    `labels` are those of the same position (`input_ids`, -100 where there is none), as transformers has them.
    """
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    logits = model(**inputs).logits[:, :-1].float()
    labels = batch["labels"][:, 1:]
    losses = cross_entropy(logits.transpose(1, 2), labels, reduction="none")  # 0 where a label is -100
    return losses.sum(1) / (labels != -100).sum(1).clamp(min=1)


def scores(model: nn.Module, batch: Any) -> Tensor:
    """Logits of a batch, a pair or a dict."""
    if isinstance(batch, Mapping):
        output = model(**{key: value for key, value in batch.items() if key not in LABELS})
    else:
        output = model(**batch[0]) if isinstance(batch[0], Mapping) else model(batch[0])
    found = getattr(output, "logits", output)
    if not isinstance(found, Tensor):
        raise InputError(f"model: its output is {type(output).__name__}; return logits, or pass loss=")
    return found


def count_classes(model: nn.Module, batch: Any) -> int | None:
    """Of a classifier, with one label a row; None of anything else."""
    labels = labels_of(batch)
    if not isinstance(labels, Tensor) or labels.dim() != 1 or labels.is_floating_point():
        return None
    found = scores(model, batch)
    return found.shape[1] if found.dim() == 2 else None


@torch.no_grad()
def check_loss(model: nn.Module, loss: Loss, together: Any, alone: list[Any], exact: bool) -> bool:
    """Try the loss on public rows: on a batch, and on each of its rows by itself.

    Args:
        exact: the model computes in float32; otherwise a few percent are let through.

    Returns:
        whether it gives the losses of the rows, `[N]`, rather than their sum.

    Raises:
        InputError: it fails, is not finite, or the loss of a row depends on the others.
    """
    try:
        whole = loss(model, together)
        singles = [loss(model, batch) for batch in alone]
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"loss: it fails on {len(alone)} public rows ({one_line(error)}); see its message") from error
    if not isinstance(whole, Tensor) or whole.shape not in {(), (len(alone),)} or not whole.is_floating_point():
        found = list(whole.shape) if isinstance(whole, Tensor) else type(whole).__name__
        raise InputError(f"loss: gives {found} for {len(alone)} rows; return the losses of the rows [N], or their sum")
    by_row = torch.stack([x.reshape(()) for x in singles]).float()
    whole = whole.float()
    if not by_row.isfinite().all() or not whole.isfinite().all():
        raise InputError("loss: is not finite on public rows; check the model and the scale of the rows")
    expected = by_row if whole.dim() else by_row.sum()
    if not torch.allclose(whole, expected, rtol=1e-3 if exact else 5e-2, atol=1e-4 if exact else 5e-2):
        raise InputError(
            "loss: on a batch it is not the sum over rows taken alone, so that a row's gradient depends on the others "
            "(a mean over rows or tokens, dropout, or a layer that mixes rows); return the losses of the rows [N]"
        )
    return whole.dim() == 1


@torch.no_grad()
def measure(
    model: nn.Module, loss: Loss, batches: Any, classes: int | None, context: Callable[[], AbstractContextManager[Any]]
) -> tuple[float | None, float]:
    """Wrong predictions in percent, None where there are no classes; and the mean loss of a row."""
    wrong, total, count = 0, 0.0, 0
    for batch in batches:
        with context():
            total += float(loss(model, batch).float().sum())
            labels = labels_of(batch)
            if classes is not None:
                wrong += int((scores(model, batch).argmax(1) != labels).sum())
        count += len(next(iter(batch.values())) if isinstance(batch, Mapping) else batch[0])
    if not count:
        raise InputError("test: has no rows; pass some, or None")
    return (None if classes is None else 100 * wrong / count), total / count
