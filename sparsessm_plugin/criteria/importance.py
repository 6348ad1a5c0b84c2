"""Importance of weights from their gradients, one threshold over many tensors, and the schedule.

Taylor's first order (arXiv 2505.08299): setting a weight w to zero changes the loss by about
w dL/dw. Every pruned value of this package's gradient-aware method is 0, that of A_log among
them, so the distance of a weight from its pruned value is |w|.
"""

import math
from collections.abc import Iterable, Mapping
from typing import Literal

import torch
from torch import Tensor

from sparsessm_plugin.errors import SparseSSMError
from sparsessm_plugin.selection.masks import count_true

Importance = Literal["weight_x_gradient", "weight_x_gradient_norm", "magnitude"]
Schedule = Literal["cubic", "linear"]

_INFINITY = 0x7F800000  # the bits of float32 infinity; those of smaller numbers are smaller


def importance(weight: Tensor, gradient: Tensor | None, power: float = 1.0) -> Tensor:
    """``|w| |g|^power``, without a gradient ``|w|``.

    :param weight: any shape
    :param gradient: of the same shape: the mean gradient, or the norm of many
    :param power: how much the gradient counts
    :return: float32, not negative
    """
    score = weight.float().abs()
    return score if gradient is None else score * gradient.float().abs().pow(power)


def sparsity_after(
    rounds_done: int, rounds: int, start: float, end: float, schedule: Schedule = "cubic"
) -> float:
    """Sparsity after some of the rounds, ``s_f + (s_0 - s_f) (1 - t / T)^3``; linear without 3.

    :param rounds_done: t, 0 to T
    :param rounds: T, at least 1
    :param start: s_0
    :param end: s_f
    """
    left = 1 - rounds_done / rounds
    return end + (start - end) * left ** (3 if schedule == "cubic" else 1)


def choose_pruned(
    scores: Mapping[str, Tensor],
    sparsity: float,
    *,
    groups: Mapping[str, str] | None = None,
    min_keep: float = 0.0,
    pruned: Mapping[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """Prune the entries with the lowest scores of many tensors, all compared with one another.

    Exactly ``round(sparsity * entries)`` of a group go. What is pruned already stays so and
    counts; if that is more, nothing is added. Equal scores go in the order of their position.

    :param scores: by name, float32 of any shapes, finite and not negative
    :param sparsity: share to prune, in [0, 1]
    :param groups: name -> group with a threshold of its own; by default there is one group
    :param min_keep: share of every tensor that stays whatever it scores: its best entries
    :param pruned: bool of the scores' shapes, True where an entry is pruned already
    :return: bool by name, True where an entry is pruned
    :raises SparseSSMError: a score is not finite, or ``min_keep`` leaves too little to prune
    """
    members: dict[str, list[str]] = {}
    for name in scores:
        members.setdefault(groups[name] if groups is not None else "", []).append(name)
    chosen: dict[str, Tensor] = {}
    for group, names in members.items():
        bits = [_ranked(n, scores[n], min_keep, (pruned or {}).get(n)) for n in names]
        entries = sum(b.numel() for b in bits)
        count = max(round(sparsity * entries), _count(bits, -1))
        if count > _count(bits, _INFINITY - 1):
            raise SparseSSMError(
                f"{count} of {entries} entries{f' of {group}' if group else ''} cannot be pruned "
                f"while min_keep {min_keep:g} of each tensor stays"
            )
        for name, mask in zip(names, _lowest(bits, count), strict=True):
            chosen[name] = mask.view(scores[name].shape)
    return {name: chosen[name] for name in scores}


def _ranked(name: str, score: Tensor, min_keep: float, pruned: Tensor | None) -> Tensor:
    """Scores (n,) as int32 of the same order; -1 where pruned already, infinity where kept."""
    values = score.detach().float().flatten()
    if not bool(torch.isfinite(values.sum(dtype=torch.float64))):
        raise SparseSSMError(f"the importance of {name} holds NaN or infinite values")
    # the bits of floats that are not negative are ordered as the floats are; abs for -0.0
    bits = values.abs().view(torch.int32).clone()
    if pruned is not None:
        bits[pruned.flatten()] = -1
    floor = min(math.ceil(min_keep * bits.numel()), count_true(bits >= 0))
    if floor:
        # the highest that many, the last of equal ones, since the first of these go first
        gone = _lowest([bits], bits.numel() - floor)[0]
        bits[~gone] = _INFINITY
    return bits


def _count(bits: Iterable[Tensor], bound: int) -> int:
    return sum(count_true(b <= bound) for b in bits)


def _lowest(bits: list[Tensor], count: int) -> list[Tensor]:
    """Masks of the ``count`` lowest of all entries, by bisection; no sorted copy is made."""
    low, high = -2, _INFINITY  # fewer than count are <= low, at least count are <= high
    if count <= 0:
        return [torch.zeros_like(b, dtype=torch.bool) for b in bits]
    while high - low > 1:
        middle = (low + high) // 2
        if _count(bits, middle) >= count:
            high = middle
        else:
            low = middle
    masks = [b < high for b in bits]
    missing = count - sum(int(mask.sum()) for mask in masks)
    for b, mask in zip(bits, masks, strict=True):
        ties = (b == high).nonzero().flatten()[:missing]
        mask[ties] = True
        missing -= len(ties)
    return masks
