"""Samples of functions that take sequences `[T, B, *]`, steps first."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from adamix_kernels.nn.errors import PrivacyError
from adamix_kernels.nn.parameter import Private
from adamix_kernels.nn.rules import Rules, plain, trains


def samples_first(rules: Rules, x: Any, what: str, known: bool, *targets: Any) -> Tensor:
    """`[B, T, *]` of `[T, B, *]`; `known` tells that the caller has transposed it, so that dimension 1 is meant.

    Else T = B is refused: layers before and after it take dimension 0 for the samples, and a model that does not
    transpose between them would not be noticed.
    """
    steps, samples = x.shape[:2]
    if rules.batch_size not in (None, samples):
        raise PrivacyError(
            f"{rules.names(targets)}: {what} gets {list(x.shape)}, whose dimension 1 are the samples to it, but the "
            f"batch has {rules.batch_size}; pass batch_first=True to the module"
        )
    if isinstance(x, Private):
        return rows_first(rules, x, what) if trains(x) else plain(x).transpose(0, 1)
    if not known and rules.batch_size is not None and steps == samples > 1:
        raise PrivacyError(
            f"{rules.names(targets)}: {what} gets {list(x.shape)}, as many steps as samples, and takes dimension 1 for "
            "the samples where other layers take dimension 0; pass batch_first=True to the module"
        )
    return x.transpose(0, 1)


def rows_first(rules: Rules, x: Any, what: str) -> Tensor:
    """Rows per sample `[B, *, *]` of a private tensor that is expanded to `[*, B, *]`."""
    samples = x.shape[1]
    if samples != 1 and x.stride(1):
        raise PrivacyError(
            f"{rules.names([x])}: {what} gets it as rows {list(x.shape)} of samples; make them of one row by expand()"
        )
    return rules.rows(rules.derive(x.transpose(0, 1), x), x.dim(), samples)
