"""Privacy by user: all rows of a user are one contribution, sampled, summed and clipped as a whole."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from torch import Tensor

from adamix.rows import UserRows


def sample_users(rows: UserRows, uniform: Tensor, sample_rate: float) -> UserRows:
    """The rows of a Poisson sample of users; `uniform` has a number in [0, 1) for each of `count_users`."""
    _, index = rows.users.unique(return_inverse=True)
    chosen = (uniform < sample_rate)[index]
    return UserRows(rows.x[chosen], rows.y[chosen], rows.users[chosen])


def count_users(rows: UserRows) -> int:
    return len(rows.users.unique())


def sorted_by_user(rows: UserRows) -> UserRows:
    """The rows of each user side by side."""
    order = rows.users.argsort(stable=True)
    return UserRows(rows.x[order], rows.y[order], rows.users[order])


def summed_by_user(chunks: Iterable[Tensor], users: Tensor) -> Iterator[Tensor]:
    """Per-row gradients in chunks `[b, P]` as per-user sums in chunks `[u, P]`.

    A user's rows are added one after the other, so that the last bits of the sum do not tell where a chunk ends, which
    is a matter of the other users.

    Args:
        chunks: together `[N, P]`, of rows as `sorted_by_user` gives them. A user may lie in several chunks.
        users: int64 `[N]` of those rows.
    """
    start, last = 0, None
    kept: Tensor | None = None  # [P], of the user whose rows may go on in the next chunk
    for chunk in chunks:
        if not len(chunk):
            continue
        found, index = users[start : start + len(chunk)].unique_consecutive(return_inverse=True)
        start += len(chunk)
        sums = chunk.new_zeros(len(found), chunk.shape[1])
        if kept is not None and int(found[0]) == last:
            sums[0] = kept
        elif kept is not None:
            yield kept[None]
        sums.index_add_(0, index, chunk)
        kept, last = sums[-1].clone(), int(found[-1])
        if len(sums) > 1:
            yield sums[:-1]
    if kept is not None:
        yield kept[None]
