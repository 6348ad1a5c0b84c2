"""SparseGPT's column loop, and sums of products, on CUDA.

See :mod:`sparsessm_plugin.solvers.kernels`. In the loop a program is one warp, which holds a tile
of rows with all columns of the block in registers. It takes a column out of the tile by a masked
sum, so nothing goes through memory but what each column has lost, and no warp waits for another.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparsessm_plugin.backends.gpu import by_rows
from sparsessm_plugin.backends.largest_gpu import keep_of_block as choose

__all__ = ["choose", "sweep", "window_products"]

_ROWS = 16  # a program: 64 registers a thread for 128 columns
_ROWS_OF_GROUPS = 8  # scores and ranks need registers, too
_LEAST_ROWS, _PROGRAMS = 4, 512  # fewer programs leave multiprocessors idle
_STEPS, _TILE, _CHANNELS = 256, 8, 128  # a program that sums products, and what it loads at once
# Never a constant to the compiler: one binary for all sizes.
_SIZES = ["columns", "out", "size", "step", "start"]


def sweep(
    weight: Tensor,
    kept: Tensor,
    factor: Tensor,
    errors: Tensor,
    start: int,
    stop: int,
    group: int,
    zeros: Tensor,
) -> None:
    """Fill ``errors`` (P, columns, out); see :func:`sparsessm_plugin.solvers.kernels.sweep`."""
    problems, size, out = weight.shape
    factor = factor.contiguous()
    rows = _ROWS_OF_GROUPS if group else _ROWS
    while rows > _LEAST_ROWS and problems * triton.cdiv(out, rows) < _PROGRAMS:
        rows //= 2  # a column takes the less time, the fewer rows a program has
    with torch.cuda.device_of(weight):  # the one Triton launches on
        _sweep[(problems * triton.cdiv(out, rows),)](
            weight,
            kept.view(torch.uint8),
            factor,
            errors,
            zeros,
            stop - start,
            out,
            size,
            0 if len(factor) == 1 else size * size,
            start,
            GROUP=group,
            COLUMNS=triton.next_power_of_2(stop - start),
            ROWS=rows,
            num_warps=1,
        )


def window_products(left: Tensor, right: Tensor, kernel: int, mask: Tensor | None) -> Tensor:
    """See :func:`sparsessm_plugin.solvers.kernels.window_products`."""
    same = left is right
    left = by_rows(left)
    right = left if same else by_rows(right)
    batch, length, channels = left.shape
    parts = triton.cdiv(length, _STEPS)
    sums = torch.empty(
        batch * parts, kernel, kernel, channels, dtype=torch.float32, device=left.device
    )
    with torch.cuda.device_of(left):
        _window_products[(triton.cdiv(channels, _CHANNELS), parts, batch)](
            left,
            right,
            sums if mask is None else mask.contiguous().view(torch.uint8),
            sums,
            length,
            channels,
            left.stride(1),
            right.stride(1),
            KERNEL=kernel,
            SAME=same,
            MASKED=mask is not None,
            STEPS=_STEPS,
            CHANNELS=_CHANNELS,
            TILE=_TILE,
            num_warps=2,
        )
    return sums.sum(0, dtype=torch.float64).permute(2, 0, 1)


@triton.jit(do_not_specialize=["length"])
def _window_products(
    left,
    right,
    mask,
    sums,
    length,
    channels,
    left_width,
    right_width,
    KERNEL: tl.constexpr,
    SAME: tl.constexpr,
    MASKED: tl.constexpr,
    STEPS: tl.constexpr,
    CHANNELS: tl.constexpr,
    TILE: tl.constexpr,
):
    """The windows that end in a part of one sequence; widths are the distances of two rows.

    A window moves over the rows; the rows of a tile are loaded together.
    """
    d = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    begin = tl.program_id(1) * STEPS
    first = tl.program_id(2).to(tl.int64) * length
    a = tl.tuple(())
    b = tl.tuple(())
    for k in tl.static_range(KERNEL - 1):
        t = begin + (k - KERNEL + 1)
        a += (_row(left, first + t, left_width, d, tl.where(t < 0, 0, channels)),)
        if not SAME:
            b += (_row(right, first + t, right_width, d, tl.where(t < 0, 0, channels)),)
    totals = tl.tuple(())
    for _ in tl.static_range(KERNEL * KERNEL):
        totals += (tl.zeros((CHANNELS,), tl.float32),)
    for start in range(0, STEPS, TILE):
        for k in tl.static_range(TILE):
            t = begin + start + k
            a += (_row(left, first + t, left_width, d, tl.where(t < length, channels, 0)),)
            if not SAME:
                b += (_row(right, first + t, right_width, d, tl.where(t < length, channels, 0)),)
        for k in tl.static_range(TILE):
            t = begin + start + k
            real = tl.where(t < length, 1, 0)
            if MASKED:
                seen = tl.load(mask + first + tl.minimum(t, length - 1)) != 0
                real = tl.where(seen, real, 0)
            before = totals
            totals = tl.tuple(())
            for i in tl.static_range(KERNEL):
                own = tl.where(real != 0, a[k + i], 0.0)
                for j in tl.static_range(KERNEL):
                    other = a[k + j] if SAME else b[k + j]
                    totals += (before[i * KERNEL + j] + own * other,)
        a_before = a
        b_before = b
        a = tl.tuple(())
        b = tl.tuple(())
        for k in tl.static_range(KERNEL - 1):
            a += (a_before[TILE + k],)
            if not SAME:
                b += (b_before[TILE + k],)
    slot = (tl.program_id(2) * tl.num_programs(1) + tl.program_id(1)).to(tl.int64)
    for i in tl.static_range(KERNEL * KERNEL):
        at = (slot * (KERNEL * KERNEL) + i) * channels + d
        tl.store(sums + at, totals[i], mask=d < channels)


@triton.jit
def _row(x, row, width, d, channels):
    """(CHANNELS,) float32, zero from so many channels on."""
    return tl.load(x + row * width + d, mask=d < channels, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=_SIZES)
def _sweep(
    weight,
    kept,
    factor,
    errors,
    zeros,
    columns,
    out,
    size,
    step,
    start,
    GROUP: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
):
    """One tile of rows of one problem; ``step`` is from one problem's factor to the next."""
    tiles = tl.cdiv(out, ROWS)
    problem = (tl.program_id(0) // tiles).to(tl.int64)
    row = (tl.program_id(0) % tiles) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)
    inside = (column < columns)[:, None] & (row < out)[None, :]
    at = (problem * size + start + column)[:, None] * out + row[None, :]
    w = tl.load(weight + at, mask=inside, other=0.0)
    k = tl.load(kept + at, mask=inside, other=1) != 0
    below = size.to(tl.int64)  # from one row of the factor to the next
    U = factor + problem * step + start * (below + 1)
    lost = errors + problem * columns * out + row
    if GROUP > 0:
        pivots = tl.load(U + column * (below + 1), mask=column < columns, other=1.0)
        gone = tl.load(zeros + problem)
    for i in range(0, columns):
        if GROUP > 0:  # noqa: SIM102 - decided when it is compiled
            if i % GROUP == 0:
                ratio = w / pivots[:, None]
                score = tl.where(k, ratio * ratio, -1.0)
                rank = tl.zeros((COLUMNS, ROWS), tl.int32)
                for j in range(i, i + GROUP):
                    other = tl.sum(tl.where((column == j)[:, None], score, 0.0), axis=0)[None, :]
                    first = (other == score) & (column > j)[:, None]
                    rank += ((other < score) | first).to(tl.int32)
                members = ((column >= i) & (column < i + GROUP))[:, None]
                k = k & ((rank >= gone) | (members == 0))
        # right of the diagonal, and zero left of it
        u = tl.load(U + i * below + column, mask=column < columns, other=0.0)
        pivot = tl.load(U + i * (below + 1))
        pruned = tl.where((column == i)[:, None] & (k == 0), w, 0.0)
        error = tl.sum(pruned, axis=0) / pivot
        tl.store(lost + i * out, error, mask=row < out)
        w -= u[:, None] * error[None, :]
    tl.store(weight + at, tl.where(k, w, 0.0), mask=inside)
    if GROUP > 0:
        tl.store(kept + at, k.to(tl.uint8), mask=inside)
