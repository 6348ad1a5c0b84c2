"""Exactly so many of the largest scores on CUDA, by digits of their bits: nobody waits for it.

Sorting, or gathering what stays, moves all entries several times. Here they are only read: each
pass counts the values of one digit among the entries that share the digits before it, which gives
the score of the last entry that stays. Where more entries have that score than may stay, the last
ones do, as in :mod:`sparsessm_plugin.selection.masks`. Few entries are held by one program,
which finds the score bit by bit.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

MOST = 2**31 - 2**20  # entries of one selection, whose indices are whole numbers of 32 bits
_FEW = 2**15  # entries that one program holds in registers
_EACH = 1024  # of these, those of a warp
# Entries at once, how often a program that counts takes so many, and programs that are enough.
_BLOCK, _TILES, _PROGRAMS = 1024, 16, 1024
_TILE = 2048  # entries of a program that compares
_PASSES = 4  # of 8 bits
# Never a constant to the compiler: one binary for all sizes.
_SIZES = ["count", "inner", "out", "pitch", "step", "problems", "rows", "columns", "tiles"]
_SIZES += ["from_row", "from_column"]
_MOVING = ["counts"]  # a part of a tensor, wherever it begins


class _Where(NamedTuple):
    """Which entries are chosen among, as kernels take it.

    :param inner: entries of a problem, its first ones
    :param out: entries that share a divisor
    :param pitch: from one problem to the next
    :param step: from one problem's divisors to the next
    :param problems: among whose entries one choice is made
    """

    inner: int
    out: int
    pitch: int
    step: int
    problems: int


class _Layout(NamedTuple):
    """Where entries lie that are compared by position, row by row, as kernels take it."""

    rows: int
    columns: int
    from_row: int
    from_column: int


def keep_largest(scores: Tensor, counts: Tensor) -> Tensor:
    """The largest scores of every row: (S, n) bool. Of equal ones the last are kept.

    :param scores: (S, n) float32, bfloat16 or float16
    :param counts: (S,) int32 on their device
    """
    scores = scores.contiguous()
    kept = torch.empty_like(scores, dtype=torch.bool)
    size = scores.shape[1]
    layout = _Layout(triton.cdiv(size, _TILE), _TILE, _TILE, 1)
    _keep(scores, scores, scores, kept, counts, _Where(size, size, size, 0, 1), layout)
    return kept


def keep_of_block(
    weight: Tensor,
    kept: Tensor,
    pivots: Tensor,
    start: int,
    stop: int,
    counts: Tensor,
    allowed: Tensor | None,
) -> None:
    """Fill a block of ``kept``; see :func:`sparsessm_plugin.solvers.kernels.choose`."""
    total, size, out = weight.shape
    columns = stop - start
    step = pivots.stride(0) if len(pivots) > 1 else 0
    _keep(
        weight[:, start:],
        pivots[:, start:],
        weight if allowed is None else allowed[:, start:],
        kept[:, start:],
        counts,
        _Where(columns * out, out, size * out, step, total // len(counts)),
        _Layout(out, columns, 1, out),
        divided=True,
        masked=allowed is not None,
    )


def _keep(
    x: Tensor,
    divisor: Tensor,
    allowed: Tensor,
    kept: Tensor,
    counts: Tensor,
    where: _Where,
    layout: _Layout,
    divided: bool = False,
    masked: bool = False,
) -> None:
    """Launch what chooses among the first ``inner`` entries of every problem."""
    groups, count = len(counts), where.problems * where.inner
    kept, allowed = kept.view(torch.uint8), allowed.view(torch.uint8) if masked else allowed
    read, fixed = (x, divisor, allowed), {"DIVIDED": divided, "MASKED": masked}
    with torch.cuda.device_of(x):  # the one Triton launches on
        if count <= _FEW:
            size = max(triton.next_power_of_2(count), 32)
            _keep_few[(groups,)](
                *read,
                counts,
                kept,
                count,
                *where,
                layout.columns if divided else 1,
                0,
                COUNT=size,
                BITS=size.bit_length() - 1,
                num_warps=max(1, size // _EACH),
                **fixed,
            )
            return
        columns = triton.next_power_of_2(layout.columns)
        rows = max(1, _TILE // columns)
        tiles = where.problems * triton.cdiv(layout.rows, rows)
        tallies = torch.zeros(groups, _PASSES, 256, dtype=torch.int32, device=x.device)
        rest = torch.empty(groups * (2 * _PASSES + tiles), dtype=torch.int32, device=x.device)
        states, ties = rest[: 2 * groups * _PASSES], rest[2 * groups * _PASSES :]
        found = (counts, tallies, states)
        turns = max(1, min(_TILES, count // _BLOCK, groups * count // (_BLOCK * _PROGRAMS)))
        for turn in range(_PASSES):
            _tally[(triton.cdiv(count, _BLOCK * turns), groups)](
                *read,
                *found,
                count,
                *where,
                turns,
                PASS=turn,
                PASSES=_PASSES,
                BLOCK=_BLOCK,
                **fixed,
            )
        for writes in (False, True):
            _compare[(tiles, groups)](
                *read,
                *found,
                ties,
                kept,
                *where,
                *layout,
                tiles,
                WRITES=writes,
                PASSES=_PASSES,
                ROWS=rows,
                COLUMNS=columns,
                **fixed,
            )


@triton.jit
def _key(x, divisor, allowed, at, divisor_at, inside, DIVIDED: tl.constexpr, MASKED: tl.constexpr):
    """Whole numbers in the order of the scores ``x``, or ``(x / divisor)^2``; -1 if not allowed."""
    score = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    if DIVIDED:
        # rounded as torch does
        score = tl.div_rn(score, tl.load(divisor + divisor_at, mask=inside, other=1.0))
        score = score * score
    if MASKED:
        score = tl.where(tl.load(allowed + at, mask=inside, other=0) != 0, score, -1.0)
    bits = tl.where(score == 0.0, 0.0, score).to(tl.int32, bitcast=True)  # -0.0 is 0.0
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _after(tallies, before, need, shift):
    """Take a digit from its tallies.

    :return: the digits up to this one; how many entries with them are to stay, and there are
    """
    i = tl.arange(0, 256)
    found = tl.load(tallies + i)
    at_least = tl.sum(found, axis=0) - tl.cumsum(found, axis=0) + found
    digit = tl.maximum(tl.sum((at_least >= need).to(tl.int32), axis=0) - 1, 0)
    own = tl.sum(tl.where(i == digit, found, 0), axis=0)
    higher = tl.sum(tl.where(i == digit, at_least, 0), axis=0) - own
    return before | (digit << shift), need - higher, own


@triton.jit
def _state(counts, states, group, PASS: tl.constexpr, PASSES: tl.constexpr):
    """Digits before a pass, and how many entries with them are to stay."""
    if PASS == 0:
        need = tl.load(counts + group)
        digits = tl.full([], 0, tl.int32)
    else:
        digits = tl.load(states + (group * PASSES + PASS) * 2)
        need = tl.load(states + (group * PASSES + PASS) * 2 + 1)
    return digits, need


@triton.jit(do_not_specialize=_SIZES, do_not_specialize_on_alignment=_MOVING)
def _tally(
    x,
    divisor,
    allowed,
    counts,
    tallies,
    states,
    count,
    inner,
    out,
    pitch,
    step,
    problems,
    tiles,
    PASS: tl.constexpr,
    PASSES: tl.constexpr,
    BLOCK: tl.constexpr,
    DIVIDED: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Count how often a digit has each value, among the entries that share those before it."""
    group = tl.program_id(1)
    own_tallies = tallies + group * PASSES * 256
    digits = tl.full([], 0, tl.int32)
    if PASS > 0:
        before, need = _state(counts, states, group, PASS - 1, PASSES)
        digits, need, _ = _after(own_tallies + (PASS - 1) * 256, before, need, 32 - 8 * PASS)
        if tl.program_id(0) == 0:
            tl.store(states + (group * PASSES + PASS) * 2, digits)
            tl.store(states + (group * PASSES + PASS) * 2 + 1, need)
    i = tl.arange(0, 256)
    found = tl.zeros((256,), tl.int32)
    for tile in range(tiles):
        e = (tl.program_id(0) * tiles + tile) * BLOCK + tl.arange(0, BLOCK)
        own = e < count
        problem = e // inner
        offset = e - problem * inner
        problem = (group * problems + problem).to(tl.int64)
        at = problem * pitch + offset
        key = _key(x, divisor, allowed, at, problem * step + offset // out, own, DIVIDED, MASKED)
        key = key ^ -2147483648  # in the order of numbers without a sign
        if PASS > 0:
            own = own & ((key >> (32 - 8 * PASS)) == (digits >> (32 - 8 * PASS)))
        value = tl.where(own, (key >> (24 - 8 * PASS)) & 255, 0)
        others = tl.sum((own == 0).to(tl.int32), axis=0)
        found += tl.histogram(value, 256) - tl.where(i == 0, others, 0)
    tl.atomic_add(own_tallies + PASS * 256 + i, found, mask=found > 0)


@triton.jit(do_not_specialize=_SIZES, do_not_specialize_on_alignment=_MOVING)
def _compare(
    x,
    divisor,
    allowed,
    counts,
    tallies,
    states,
    ties,
    kept,
    inner,
    out,
    pitch,
    step,
    problems,
    rows,
    columns,
    from_row,
    from_column,
    tiles,
    WRITES: tl.constexpr,
    PASSES: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DIVIDED: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Write which entries stay, or count those in a tile that have the last score that does.

    A tile is some rows of a problem: its entries are neighbours in the order of positions.
    """
    group = tl.program_id(1)
    tile = tl.program_id(0)
    before, need = _state(counts, states, group, PASSES - 1, PASSES)
    last, places, tied = _after(tallies + (group * PASSES + PASSES - 1) * 256, before, need, 0)
    last = last ^ -2147483648
    if WRITES or places < tied:
        in_problem = tiles // problems
        problem = (group * problems + tile // in_problem).to(tl.int64)
        row = (tile % in_problem) * ROWS + tl.arange(0, ROWS)[None, :]
        column = tl.arange(0, COLUMNS)[:, None]
        offset = column * from_column + row * from_row
        inside = (column < columns) & (row < rows) & (offset < inner)
        at = problem * pitch + offset
        key = _key(x, divisor, allowed, at, problem * step + offset // out, inside, DIVIDED, MASKED)
        tie = ((key == last) & inside).to(tl.int32)
        in_row = tl.sum(tie, axis=0)
        if not WRITES:
            tl.store(ties + group * tiles + tile, tl.sum(in_row, axis=0))
        else:
            stays = (key >= last).to(tl.int32)
            if places < tied:
                # this one and those behind it: in the tiles, rows and columns that follow
                behind = tl.sum(in_row, axis=0) - tl.cumsum(in_row, axis=0)
                behind = behind[None, :] + in_row[None, :] - tl.cumsum(tie, axis=0) + tie
                for first in range(0, tiles, 1024):
                    other = first + tl.arange(0, 1024)
                    later = (other > tile) & (other < tiles)
                    found = tl.load(ties + group * tiles + other, mask=later, other=0)
                    behind += tl.sum(found, axis=0)
                stays = tl.where((tie == 1) & (behind > places), 0, stays)
            tl.store(kept + at, stays.to(tl.uint8), mask=inside)


@triton.jit
def _few(e, group, inner, out, pitch, step, problems):
    """Where entries of a selection lie, and their divisors."""
    own = e // inner
    offset = e - own * inner
    problem = (group * problems + own).to(tl.int64)
    return problem * pitch + offset, problem * step + offset // out


@triton.jit
def _position(e, inner, out, columns):
    """In the order that decides between equal scores: by problem, row and column."""
    own = e // inner
    offset = e - own * inner
    return (own * out + offset % out) * columns + offset // out


@triton.jit(do_not_specialize=[*_SIZES, "nothing"], do_not_specialize_on_alignment=_MOVING)
def _keep_few(
    x,
    divisor,
    allowed,
    counts,
    kept,
    count,
    inner,
    out,
    pitch,
    step,
    problems,
    columns,
    nothing,
    COUNT: tl.constexpr,
    BITS: tl.constexpr,
    DIVIDED: tl.constexpr,
    MASKED: tl.constexpr,
):
    """All of it in one program: the last score that stays, and where it does, bit by bit.

    :param nothing: 0, of which the compiler knows nothing: it computes addresses anew, and
        registers hold scores alone in between
    """
    group = tl.program_id(0)
    e = tl.arange(0, COUNT)
    at, divisor_at = _few(e, group, inner, out, pitch, step, problems)
    key = _key(x, divisor, allowed, at, divisor_at, e < count, DIVIDED, MASKED)
    key = tl.where(e < count, key, -2147483648)
    need = tl.load(counts + group)
    one = tl.full([], 1, tl.int32)
    bits = tl.full([], 0, tl.int32)
    for i in range(32):
        more = bits | (one << (31 - i))
        enough = tl.sum((key >= (more ^ -2147483648)).to(tl.int32), axis=0) >= need
        bits = tl.where(enough, more, bits)
    last = bits ^ -2147483648
    places = need - tl.sum((key > last).to(tl.int32), axis=0)
    first = tl.full([], 0, tl.int32)
    e += nothing
    if tl.sum((key == last).to(tl.int32), axis=0) > places:
        position = _position(e, inner, out, columns)
        position = tl.where((key == last) & (e < count), position, -1)
        for i in range(BITS):
            later = first | (one << (BITS - 1 - i))
            enough = tl.sum((position >= later).to(tl.int32), axis=0) >= places
            first = tl.where(enough, later, first)
    e += nothing
    at, _ = _few(e, group, inner, out, pitch, step, problems)
    stays = (key > last) | ((key == last) & (_position(e, inner, out, columns) >= first))
    tl.store(kept + at, stays.to(tl.uint8), mask=e < count)
