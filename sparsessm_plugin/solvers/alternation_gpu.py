"""What ADMM keeps between its steps, on CUDA: few passes over its tensors a step.

See :mod:`sparsessm_plugin.solvers.alternation`. Where the mask is all entries above a threshold,
no mask is written, and the threshold is not sorted for: entries are counted above 16 values around
the last threshold, then above 16 values within the interval that this leaves, and between these
two it is interpolated. The number of kept entries is right to a few; at the end it is exact.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparsessm_plugin.selection.masks import choose_mask, parse_structure

_BLOCK, _TILES = 1024, 16  # entries at once, and how often a program that counts takes so many
# Likewise where each entry is compared with all values; fewer where programs are short of work.
_COUNTED, _COUNTED_TILES, _PROGRAMS = 512, 32, 1024
# In half precision the largest weight is stored as up to 2^11, and differences up to 32 of it fit;
# what is 2^-25 of the largest or more keeps all its digits.
_LARGEST, _MOST = 11, 65504.0
_RUNGS = 16  # values that entries are counted above
# Around the last threshold, half of them on each side, each so many times as far away as the one
# before: from 1e-5 of it to 78 %.
_LADDER = {"RUNGS": _RUNGS, "NEAREST": 1e-5, "LOG_FURTHER": math.log2(5.0)}


class AlternationOnGPU:
    """See :class:`sparsessm_plugin.solvers.alternation.Alternation`."""

    half = True

    def __init__(
        self, weight: Tensor, sparsity: float, structure: str, keep: Tensor | None
    ) -> None:
        self._weight = weight.contiguous()
        self._rule = (sparsity, structure)
        self._keep = keep
        self._allowed = self._weight if keep is None else keep.contiguous().view(torch.uint8)
        self._zeros, self._group = parse_structure(structure)
        self._kept = weight.numel() - round(sparsity * weight.numel())
        mask = choose_mask(weight.abs(), sparsity, structure, keep=keep)
        self._before = mask.contiguous().view(torch.uint8)
        self._total = self._weight
        self._spare: Tensor | None = None  # of a step before, to be written to
        device = weight.device
        self._rungs = torch.empty(_RUNGS, dtype=torch.float32, device=device)
        self._counts = torch.zeros(2 * _RUNGS, dtype=torch.int32, device=device)
        largest = float(weight.abs().amax())
        power = _LARGEST - math.ceil(math.log2(largest)) if 0 < largest < math.inf else 0
        self.unit = 2.0 ** max(-100, min(100, power))
        # the largest magnitude that goes, to begin with; it moves in shares of itself
        gone = weight.abs().masked_fill_(mask if keep is None else mask | ~keep, 0)
        self._threshold = torch.maximum(gone.amax(), 0.01 * weight.abs().mean()).reshape(1)
        with torch.cuda.device_of(self._rungs):
            _begin[(1,)](self._threshold, self._rungs, **_LADDER, num_warps=1)

    def split(self, scale: float) -> tuple[Tensor, Tensor]:
        """See :class:`sparsessm_plugin.solvers.alternation.Alternation`."""
        rest = torch.empty_like(self._weight, dtype=torch.float16)
        base = torch.empty_like(self._weight) if self._spare is None else self._spare
        with torch.cuda.device_of(rest):
            _split[(triton.cdiv(rest.numel(), _BLOCK),)](
                self._total,
                self._weight,
                self._allowed,
                self._threshold,
                base,
                rest,
                scale,
                self.unit,
                rest.numel(),
                MOST=_MOST,
                **self._pattern(),
            )
        self._spare = None if self._total is self._weight else self._total
        return base, rest

    def project(self, total: Tensor) -> None:
        """See :class:`sparsessm_plugin.solvers.alternation.Alternation`."""
        self._total = total
        if not self._group:
            self._find_threshold()

    def changed(self) -> float:
        """See :class:`sparsessm_plugin.solvers.alternation.Alternation`."""
        counts = torch.zeros(2, dtype=torch.int32, device=self._total.device)
        with torch.cuda.device_of(counts):
            _compare[(triton.cdiv(self._total.numel(), _BLOCK * _TILES),)](
                self._total,
                self._allowed,
                self._threshold,
                self._before,
                counts,
                self._total.numel(),
                TILES=_TILES,
                **self._pattern(),
            )
        changed, kept = counts.tolist()
        return float(changed / max(1, kept))

    def result(self) -> tuple[Tensor, Tensor]:
        """See :class:`sparsessm_plugin.solvers.alternation.Alternation`."""
        mask = choose_mask(self._total.abs(), *self._rule, keep=self._keep)
        return self._total * mask, mask

    def _pattern(self) -> dict[str, int]:
        return {
            "GROUP": self._group,
            "ZEROS": self._zeros,
            "KEEP": int(self._keep is not None),
            "BLOCK": _BLOCK,
        }

    def _find_threshold(self) -> None:
        count = self._total.numel()
        tiles = max(2, min(_COUNTED_TILES, count // (_COUNTED * _PROGRAMS) // 2 * 2))
        with torch.cuda.device_of(self._rungs):
            for narrowed in (False, True):
                _count[(triton.cdiv(count, _COUNTED * tiles),)](
                    self._total,
                    self._allowed,
                    self._rungs,
                    self._counts,
                    self._kept,
                    count,
                    tiles,
                    KEEP=int(self._keep is not None),
                    NARROWED=narrowed,
                    RUNGS=_RUNGS,
                    BLOCK=_COUNTED,
                )
            # one warp: another could read what this one has written over already
            _settle[(1,)](
                self._threshold, self._rungs, self._counts, self._kept, **_LADDER, num_warps=1
            )


@triton.jit
def _around(threshold, RUNGS: tl.constexpr, NEAREST: tl.constexpr, LOG_FURTHER: tl.constexpr):
    """(RUNGS,) values around a threshold, in ascending order."""
    i = tl.arange(0, RUNGS)
    above = i >= RUNGS // 2
    step = tl.where(above, i - RUNGS // 2, RUNGS // 2 - 1 - i).to(tl.float32)
    away = tl.exp2(step * LOG_FURTHER) * NEAREST
    return threshold * tl.where(above, 1.0 + away, 1.0 - away)


@triton.jit
def _bounds(values, found, kept):
    """The interval in which as many entries stay as are to: its ends, and what each would keep."""
    enough = found >= kept
    lowest, highest = tl.min(values, axis=0), tl.max(values, axis=0)
    low = tl.maximum(tl.max(tl.where(enough, values, lowest), axis=0), lowest)
    high = tl.minimum(tl.min(tl.where(enough, highest, values), axis=0), highest)
    most = tl.max(tl.where(values == low, found, 0), axis=0)
    least = tl.max(tl.where(values == high, found, 0), axis=0)
    return low, high, most, least


@triton.jit
def _begin(threshold, rungs, RUNGS: tl.constexpr, NEAREST: tl.constexpr, LOG_FURTHER: tl.constexpr):
    found = _around(tl.load(threshold), RUNGS, NEAREST, LOG_FURTHER)
    tl.store(rungs + tl.arange(0, RUNGS), found)


@triton.jit(do_not_specialize=["kept"])
def _settle(
    threshold,
    rungs,
    counts,
    kept,
    RUNGS: tl.constexpr,
    NEAREST: tl.constexpr,
    LOG_FURTHER: tl.constexpr,
):
    """The threshold by both counts; values for the next one, and no counts."""
    i = tl.arange(0, RUNGS)
    low, high, _, _ = _bounds(tl.load(rungs + i), tl.load(counts + i), kept)
    values = low + (high - low) * (i.to(tl.float32) / (RUNGS - 1))
    low, high, most, least = _bounds(values, tl.load(counts + RUNGS + i), kept)
    share = (most - kept).to(tl.float32) / tl.maximum(most - least, 1).to(tl.float32)
    found = low + (high - low) * tl.minimum(tl.maximum(share, 0.0), 1.0)
    tl.store(threshold, found)
    tl.store(rungs + i, _around(found, RUNGS, NEAREST, LOG_FURTHER))
    tl.store(counts + i, tl.zeros((RUNGS,), tl.int32))
    tl.store(counts + RUNGS + i, tl.zeros((RUNGS,), tl.int32))


@triton.jit(do_not_specialize=["kept", "count", "tiles"])
def _count(
    total,
    allowed,
    rungs,
    counts,
    kept,
    count,
    tiles,
    KEEP: tl.constexpr,
    NARROWED: tl.constexpr,
    RUNGS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Add up how many entries are larger than each value, or than values between two of them.

    A thread counts for itself, with a register a value and entry of a tile: adding up among
    threads in each tile took nine times as long as reading it. ``tiles`` is even.
    """
    values = tl.tuple(())
    found = tl.tuple(())
    if NARROWED:
        i = tl.arange(0, RUNGS)
        low, high, _, _ = _bounds(tl.load(rungs + i), tl.load(counts + i), kept)
    for k in tl.static_range(RUNGS):
        if NARROWED:
            values += (low + (high - low) * (k / (RUNGS - 1)),)
        else:
            values += (tl.load(rungs + k),)
        found += (tl.zeros((BLOCK,), tl.int32),)
    first = tl.program_id(0).to(tl.int64) * (BLOCK * tiles)
    for tile in range(0, tiles, 2):
        at = first + tile * BLOCK + tl.arange(0, BLOCK)
        score = _score(total, allowed, at, at < count, KEEP)
        other = _score(total, allowed, at + BLOCK, at + BLOCK < count, KEEP)
        before = found
        found = tl.tuple(())
        for k in tl.static_range(RUNGS):
            more = (score > values[k]).to(tl.int32) + (other > values[k]).to(tl.int32)
            found += (before[k] + more,)
    for k in tl.static_range(RUNGS):
        tl.atomic_add(counts + NARROWED * RUNGS + k, tl.sum(found[k], axis=0))


@triton.jit
def _score(total, allowed, at, inside, KEEP: tl.constexpr):
    """Magnitudes; -1 where there is no entry, or it must be zero."""
    score = tl.where(inside, tl.abs(tl.load(total + at, mask=inside, other=0.0)), -1.0)
    if KEEP:
        score = tl.where(tl.load(allowed + at, mask=inside, other=0) != 0, score, -1.0)
    return score


@triton.jit
def _stays(
    total,
    allowed,
    threshold,
    at,
    inside,
    GROUP: tl.constexpr,
    ZEROS: tl.constexpr,
    KEEP: tl.constexpr,
):
    """Which entries the pattern keeps; of equal ones in a group the last."""
    score = _score(total, allowed, at, inside, KEEP)
    if GROUP == 0:
        stays = score > tl.load(threshold)
    else:
        first = at // GROUP * GROUP
        rank = tl.zeros_like(score).to(tl.int32)
        for j in tl.static_range(GROUP):
            other = _score(total, allowed, first + j, inside, KEEP)
            lower = (other < score) | ((other == score) & (first + j < at))
            rank += lower.to(tl.int32)
        stays = (rank >= ZEROS) & (score >= 0.0)
    return stays


@triton.jit(do_not_specialize=["scale", "unit", "count"])
def _split(
    total,
    weight,
    allowed,
    threshold,
    base,
    rest,
    scale,
    unit,
    count,
    GROUP: tl.constexpr,
    ZEROS: tl.constexpr,
    KEEP: tl.constexpr,
    BLOCK: tl.constexpr,
    MOST: tl.constexpr,
):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    stays = _stays(total, allowed, threshold, at, inside, GROUP, ZEROS, KEEP)
    value = tl.load(total + at, mask=inside, other=0.0)
    moved = tl.load(weight + at, mask=inside, other=0.0) + tl.where(stays, 0.0, value * scale)
    tl.store(base + at, moved, mask=inside)
    change = (tl.where(stays, value, 0.0) - moved) * unit
    change = tl.minimum(tl.maximum(change, -MOST), MOST)
    tl.store(rest + at, change.to(tl.float16), mask=inside)


@triton.jit(do_not_specialize=["count"])
def _compare(
    total,
    allowed,
    threshold,
    before,
    counts,
    count,
    GROUP: tl.constexpr,
    ZEROS: tl.constexpr,
    KEEP: tl.constexpr,
    BLOCK: tl.constexpr,
    TILES: tl.constexpr,
):
    """Count what differs from the mask before, which is overwritten, and what stays."""
    changed = tl.zeros((BLOCK,), tl.int32)
    kept = tl.zeros((BLOCK,), tl.int32)
    first = tl.program_id(0).to(tl.int64) * (BLOCK * TILES)
    for tile in range(TILES):
        at = first + tile * BLOCK + tl.arange(0, BLOCK)
        inside = at < count
        stays = _stays(total, allowed, threshold, at, inside, GROUP, ZEROS, KEEP) & inside
        last = tl.load(before + at, mask=inside, other=0) != 0
        tl.store(before + at, stays.to(tl.uint8), mask=inside)
        changed += (stays != last).to(tl.int32)
        kept += stays.to(tl.int32)
    tl.atomic_add(counts, tl.sum(changed, axis=0))
    tl.atomic_add(counts + 1, tl.sum(kept, axis=0))


def half_sum(matrices: Tensor, weights: Tensor, unit: float) -> Tensor:
    """See :func:`sparsessm_plugin.solvers.alternation.half_sum`."""
    out = torch.empty_like(matrices[0], dtype=torch.float16)
    size, count = out.numel(), len(matrices)
    with torch.cuda.device_of(out):
        _half_sum[(triton.cdiv(size, _BLOCK),)](
            matrices, weights, out, size, unit, COUNT=count, BLOCK=_BLOCK
        )
    return out


@triton.jit(do_not_specialize=["size", "unit"])
def _half_sum(matrices, weights, out, size, unit, COUNT: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    total = tl.zeros((BLOCK,), tl.float32)
    step = size.to(tl.int64)
    for j in tl.static_range(COUNT):
        total += tl.load(weights + j) * tl.load(matrices + j * step + at, mask=inside, other=0.0)
    tl.store(out + at, (total * unit).to(tl.float16), mask=inside)
