"""Which entries stay, given a score of each: shares, n:m groups, and one rule for ties.

**Of equal scores the first position is pruned first**, along the rows and from tensor to tensor,
whatever is chosen by whatever path: unstructured or n:m, on a CPU or a GPU, entries, states or
channels. So a choice depends on scores alone, and every rank and device makes the same one.
"""

import re
from importlib import import_module
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sparsessm_plugin.backends.choice import REFERENCE, backend_for
from sparsessm_plugin.backends.memory import handed
from sparsessm_plugin.errors import SparseSSMError, shown

UNSTRUCTURED = "0:0"
_COUNTED = 16  # the largest groups that are ranked by comparing all pairs


def count_true(mask: Tensor) -> int:
    """How many entries of a bool mask are True.

    Ten times as fast on a CPU as ``sum()``, which first makes an integer of 8 bytes of each.
    """
    return int(torch.count_nonzero(mask))


def check_quoted(structure: Any) -> None:
    """Refuse what YAML makes of an N:M structure without quotes, a sexagesimal number.

    :raises ValueError: showing how to write it
    """
    if isinstance(structure, int):
        raise ValueError(
            f'must be quoted, as in "2:4"; YAML reads it as the number {structure} otherwise'
        )


def parse_structure(structure: str) -> tuple[int, int]:
    """LLM Compressor's ``mask_structure``: ``"n:m"`` prunes n of every m along the inputs.

    :param structure: ``"2:4"``, for instance; ``"0:0"`` is unstructured
    :return: n and m, both 0 if unstructured
    :raises SparseSSMError: anything else
    """
    match = re.fullmatch(r"([0-9]{1,4}):([0-9]{1,4})", structure)
    n, m = (int(match[1]), int(match[2])) if match else (-1, -1)
    if not (0 < n < m or n == m == 0):
        raise SparseSSMError(
            f"mask_structure must be 0:0 or n:m with 0 < n < m (n zeros in every m), "
            f"got {shown(structure)}"
        )
    return n, m


def check_sparsity(sparsity: float | None) -> float | None:
    """The one rule for fields called ``sparsity``: in (0, 1), both excluded, or not given.

    :return: the value as it came
    :raises SparseSSMError: another value
    """
    if sparsity is not None and not 0.0 < sparsity < 1.0:
        raise SparseSSMError(f"must be between 0 and 1, both excluded, got {sparsity}")
    return sparsity


def check_structure(structure: str, size: int, sparsity: float) -> tuple[int, int]:
    """:func:`parse_structure` for a weight.

    :param structure: see :func:`parse_structure`
    :param size: input features, of which groups of m are made
    :param sparsity: must lie between 0 and 1
    :raises SparseSSMError: a value that is not allowed, or groups that do not fit
    """
    if not 0 <= sparsity <= 1:
        raise SparseSSMError(f"sparsity must lie between 0 and 1, got {sparsity}")
    n, m = parse_structure(structure)
    if m and size % m:
        raise SparseSSMError(
            f"mask_structure {structure} needs input features in groups of {m}, got {size}"
        )
    return n, m


def choose_mask(
    scores: Tensor,
    sparsity: float,
    structure: str = UNSTRUCTURED,
    *,
    keep: Tensor | None = None,
    per_row: bool = False,
) -> Tensor:
    """Prune the entries with the lowest scores.

    Unstructured, ``round(sparsity * numel)`` entries go, chosen among all rows and problems, or
    more if ``keep`` leaves fewer. With ``per_row`` rows differ by one entry at most.

    :param scores: (..., out, in) not negative
    :param sparsity: share of the entries to prune; n:m decides it alone
    :param structure: ``"0:0"`` or ``"n:m"``, n zeros in every m inputs
    :param keep: (..., out, in) bool or None; False for entries that are pruned already, which
        count
    :param per_row: compare within rows only
    :return: (..., out, in) bool, True where an entry stays
    :raises SparseSSMError: structure or sparsity is not allowed
    """
    n, m = check_structure(structure, scores.shape[-1], sparsity)
    if keep is not None:
        scores = scores.masked_fill(~keep, -1.0)
    if m:
        mask = keep_in_groups(scores, n, m)
    elif per_row:
        mask = _keep_in_rows(scores, sparsity)
    else:
        gone = round(sparsity * scores.numel())
        mask = keep_largest(scores.flatten(), scores.numel() - gone).view_as(scores)
    return mask if keep is None else mask & keep


def keep_largest(scores: Tensor, count: int) -> Tensor:
    """Exactly ``count`` of the largest scores (n,): bool (n,). Of equal ones the last are kept."""
    size = len(scores)
    if count <= 0 or count >= size:
        return torch.full_like(scores, count > 0, dtype=torch.bool)
    if scores.is_cuda:
        return keep_largest_of_each(scores[None], handed([count], torch.int32, scores.device))[0]
    if scores.device.type == "cpu" and scores.dtype in (torch.float32, torch.float64):
        # numpy selects in vector instructions, ten times as fast as torch
        at = size - count - 1
        threshold = float(np.partition(scores.detach().numpy(), at)[at])
    else:
        threshold = float(scores.kthvalue(size - count).values)
    mask = scores > threshold  # which is the largest score that goes
    missing = count - count_true(mask)
    if missing:
        ties = (scores == threshold).nonzero().flatten()
        mask[ties[-missing:]] = True
    return mask


def keep_largest_of_each(scores: Tensor, counts: Tensor) -> Tensor:
    """:func:`keep_largest` of every row of (S, n) scores, each its own of (S,) counts."""
    if not scores.is_cuda:
        rows = zip(scores, counts.tolist(), strict=True)
        return torch.stack([keep_largest(row, count) for row, count in rows])
    counts = counts.to(scores.device)
    narrow = scores.is_floating_point() and scores.dtype.itemsize <= 4
    if narrow and backend_for(scores.device) != REFERENCE:
        kernels = import_module("sparsessm_plugin.backends.largest_gpu")
        if scores.shape[1] <= kernels.MOST:
            chosen: Tensor = kernels.keep_largest(scores, counts.int())
            return chosen
    order = scores.argsort(dim=1, stable=True)
    kept = torch.arange(scores.shape[1], device=scores.device) >= (
        scores.shape[1] - counts[:, None]
    )
    return torch.empty_like(kept).scatter_(1, order, kept)


def keep_in_groups(scores: Tensor, n: int, m: int) -> Tensor:
    """All but the n lowest of every m entries of the last dimension: bool of the scores' shape."""
    groups = scores.unflatten(-1, (-1, m))
    if m > _COUNTED:
        gone = groups.argsort(dim=-1, stable=True)[..., :n]
        return torch.ones_like(groups, dtype=torch.bool).scatter_(-1, gone, False).flatten(-2)
    return (ranks_in_groups(groups) >= n).flatten(-2)


def ranks_in_groups(groups: Tensor) -> Tensor:
    """How many entries of the last dimension stand below each, of equal ones those before it.

    For a few entries: m comparisons of whole tensors are far quicker than millions of sorts.

    :param groups: (..., m)
    :return: (..., m) uint8
    """
    rank = torch.zeros_like(groups, dtype=torch.uint8)
    for i in range(groups.shape[-1]):
        entry = groups[..., i : i + 1]
        rank += entry < groups
        rank[..., i + 1 :] += entry == groups[..., i + 1 :]
    return rank


def _keep_in_rows(scores: Tensor, sparsity: float) -> Tensor:
    size = scores.shape[-1]
    rows = scores.reshape(-1, size)
    # cumulative, so that the total is that of all rows together
    ends = torch.arange(len(rows) + 1, dtype=torch.float64, device=scores.device)
    gone = (ends * (sparsity * size)).round().long().diff()
    if rows.is_cuda:
        return keep_largest_of_each(rows, size - gone).view_as(scores)
    kept = torch.arange(size, device=scores.device) >= gone[:, None]
    return (
        torch.empty_like(kept).scatter_(1, rows.argsort(dim=-1, stable=True), kept).view_as(scores)
    )
