"""Embedding layers: norms and clipped sums of their gradients, in float64, along the sorted ids.

Equal ids stand together after sorting, so the positions of one row of the weight are a run. Runs are long or short and
many or few, so a program takes neither one nor all of them but a chunk of sorted positions: the runs of one sample that
begin there. The last of them it follows beyond the chunk, so nothing of one sample's is added up in two places, and its
large terms cancel before they meet another's. One program thus takes as many steps as its chunk and, at worst, one
sample have positions. Where a run of several samples crosses chunks, one more kernel adds its parts.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from adamix_kernels.memory import plain
from adamix_kernels.ops._factored import positions_axis
from adamix_kernels.ops._numerics import sum_dtype
from adamix_kernels.triton._partials import finish
from adamix_kernels.triton.launch import config, layers, on
from adamix_kernels.triton.norm import wide


@triton.jit(do_not_specialize=["positions", "chunks", "parts", "padding"])
def run_norms(g, keys, order, partials, positions, width, chunks, parts, padding,
              CHUNK: tl.constexpr, WIDTH: tl.constexpr):  # fmt: skip
    """Squares of WIDTH columns of the runs that begin in a chunk of one sample's positions `[B, T]`, sorted by id.

    Each is above what any float64 sum of it may be: `own_error` holds for every entry, with its own terms' sizes.
    """
    program = tl.program_id(0)
    col = (program % parts) * WIDTH + tl.arange(0, WIDTH)
    first = (program // parts // chunks).to(tl.int64) * positions
    keys, order, g = keys + first, order + first, g + first * width
    p = (program // parts % chunks).to(tl.int64) * CHUNK
    stop = tl.minimum(p + CHUNK, positions)
    twice = (positions + 2).to(tl.float64) * 4.440892098500626e-16  # 2 * own_error: 2^-51
    value = tl.zeros([WIDTH], tl.float64)
    length, total = value, value
    key, row = tl.load(keys + p), tl.load(order + p)
    begins = (p == 0) | (tl.load(keys + p - 1, p > 0, 0) != key)
    mine = p < 0  # not before the first run begins
    while (p < stop) | (mine & (p < positions)):
        for _ in tl.static_range(4):  # so that four loads are under way
            mine = (p < positions) & tl.where(p < stop, mine | begins, mine & ~begins)
            x = wide(tl.load(g + row * width + col, (col < width) & mine & (key != padding), 0.0)).to(tl.float64)
            value += x
            length += tl.abs(x)
            p += 1
            key_after, row = tl.load(keys + p, p < positions, 0), tl.load(order + p, p < positions, 0)
            begins = (p >= positions) | (key_after != key)  # so this one ends
            above = tl.abs(value) + twice * length
            total += tl.where(begins, above * above, 0.0)
            value, length = tl.where(begins, 0.0, value), tl.where(begins, 0.0, length)
            key = key_after
    tl.store(partials + program, tl.sum(total))


@triton.jit(do_not_specialize=["count", "positions", "parts", "rows", "padding"])
def run_sums(g, keys, order, coef, out, scratch, count, positions, width, parts, rows, padding,
             CHUNK: tl.constexpr, WIDTH: tl.constexpr):  # fmt: skip
    """Clipped sums of WIDTH columns, over the samples' runs that begin in a chunk of all positions, sorted by id.

    An id whose run lies in the chunk gets its row of `out [rows, width]`. What the chunk has of an id that began before
    it goes to `scratch [chunks, 2, width]`, [:, 0], and of one that begins in it and goes on to [:, 1].
    """
    program = tl.program_id(0)
    col = (program % parts) * WIDTH + tl.arange(0, WIDTH)
    chunk = (program // parts).to(tl.int64)
    head = scratch + 2 * chunk * width + col
    p = chunk * CHUNK
    stop = tl.minimum(p + CHUNK, count)
    value = tl.zeros([WIDTH], tl.float64)
    total = value
    key, row = tl.load(keys + p), tl.load(order + p)
    sample = row // positions
    new_id = (p == 0) | (tl.load(keys + p - 1, p > 0, 0) != key)
    begins = new_id | (tl.load(order + p - 1, p > 0, 0) // positions != sample)
    mine = p < 0  # not before the first run begins
    fresh = new_id  # whether the id began in this chunk
    while (p < stop) | (mine & (p < count)):
        for _ in tl.static_range(4):  # so that four loads are under way
            inside = p < stop
            mine = (p < count) & tl.where(inside, mine | begins, mine & ~begins)
            fresh = fresh | (inside & new_id)
            c = wide(tl.load(coef + sample, mine, 0.0)).to(tl.float64)
            there = mine & (c > 0) & (key != padding)
            value += wide(tl.load(g + row * width + col, (col < width) & there, 0.0)).to(tl.float64)
            p += 1
            key_after, row = tl.load(keys + p, p < count, 0), tl.load(order + p, p < count, 0)
            sample_after = row // positions
            new_id = (p >= count) | (key_after != key)  # so this one ends
            begins = new_id | (sample_after != sample)
            total += tl.where(begins & (c > 0), c * value, 0.0)
            value = tl.where(begins, 0.0, value)
            done = inside & new_id
            whole = done & fresh & (key >= 0) & (key < rows)  # an id that is none of the rows writes nowhere
            tl.store(out + key.to(tl.int64) * width + col, total.to(out.dtype.element_ty), whole & (col < width))
            tl.store(head, total, done & ~fresh & (col < width))
            total = tl.where(done, 0.0, total)
            key, sample = key_after, sample_after
    goes_on = (stop < count) & (tl.load(keys + stop - 1) == tl.load(keys + stop, stop < count, 0))
    tl.store(head + tl.where(fresh, width, 0), total, goes_on & (col < width))


@triton.jit(do_not_specialize=["count", "parts", "rows"])
def join_runs(keys, scratch, out, count, width, parts, rows, CHUNK: tl.constexpr, WIDTH: tl.constexpr):
    """The row of an id that begins in a chunk and goes on: what each chunk has of it, in order."""
    program = tl.program_id(0)
    col = (program % parts) * WIDTH + tl.arange(0, WIDTH)
    chunk = (program // parts).to(tl.int64)
    start, stop = chunk * CHUNK, chunk * CHUNK + CHUNK  # there is one more chunk
    key = tl.load(keys + stop - 1)
    began = (tl.load(keys + start) != key) | (start == 0) | (tl.load(keys + start - 1, start > 0, 0) != key)
    began = began & (key >= 0) & (key < rows) & (tl.load(keys + stop) == key)
    total = tl.load(scratch + (2 * chunk + 1) * width + col, began & (col < width), 0.0)
    goes_on = began
    while goes_on:
        chunk += 1
        total += tl.load(scratch + 2 * chunk * width + col, col < width, 0.0)
        stop += CHUNK
        goes_on = (stop < count) & (tl.load(keys + stop, stop < count, 0) == key)
    tl.store(out + key.to(tl.int64) * width + col, total.to(out.dtype.element_ty), began & (col < width))


def _launch(width: int, device: torch.device) -> tuple[int, dict[str, int]]:
    """Programs per chunk, and the options."""
    sizes = layers(device)
    block = min(triton.next_power_of_2(width), sizes.embedding_width)
    options = config(device).options(sizes.embedding_warps)
    return triton.cdiv(width, block), {"CHUNK": sizes.embedding_chunk, "WIDTH": block, **options}


def embedding_norm_sq(indices: Tensor, backprops: Tensor, padding_idx: int | None = None) -> Tensor:
    g = positions_axis(plain(backprops))
    samples, positions, width = g.shape
    keys, order = indices.reshape(samples, positions).sort(dim=1, stable=True)
    parts, options = _launch(width, g.device)
    chunks = triton.cdiv(positions, options["CHUNK"])
    partials = torch.empty(samples, chunks * parts, dtype=torch.float64, device=g.device)
    padding = -1 if padding_idx is None else padding_idx
    if partials.numel():
        with on(g.device):
            run_norms[(samples * chunks * parts,)](
                g, keys, order, partials, positions, width, chunks, parts, padding, **options
            )
    return finish(partials, terms=positions * width + 16)


def embedding_clip_sum(
    indices: Tensor, backprops: Tensor, coef: Tensor, num_embeddings: int, padding_idx: int | None = None
) -> Tensor:
    g, factors = positions_axis(plain(backprops)), plain(coef)
    width, count = g.shape[2], indices.numel()
    keys, order = indices.reshape(-1).sort(stable=True)  # by id, then by sample
    out = torch.zeros(num_embeddings, width, dtype=sum_dtype(g), device=g.device)
    if not count or not width:
        return out
    parts, options = _launch(width, g.device)
    chunks = triton.cdiv(count, options["CHUNK"])
    padding = -1 if padding_idx is None else padding_idx
    scratch = torch.empty(chunks, 2, width, dtype=torch.float64, device=g.device)
    with on(g.device):
        run_sums[(chunks * parts,)](
            g, keys, order, factors, out, scratch, count, g.shape[1], width, parts, num_embeddings, padding, **options
        )
        if chunks > 1:
            join_runs[((chunks - 1) * parts,)](keys, scratch, out, count, width, parts, num_embeddings, **options)
    return out
