"""Which entries of a projection stay, given a score of each."""

import re
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sparsessm_plugin.errors import SparseSSMError, shown

UNSTRUCTURED = "0:0"
_COUNTED = 16  # the largest groups that are ranked by comparing all pairs


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
        mask = _keep_in_groups(scores, n, m)
    elif per_row:
        mask = _keep_in_rows(scores, sparsity)
    else:
        gone = round(sparsity * scores.numel())
        mask = keep_largest(scores.flatten(), scores.numel() - gone).view_as(scores)
    return mask if keep is None else mask & keep


def keep_largest(scores: Tensor, count: int) -> Tensor:
    """Exactly ``count`` of the largest scores (n,): bool (n,). Of equal ones the first are kept."""
    size = len(scores)
    if count <= 0 or count >= size:
        return torch.full_like(scores, count > 0, dtype=torch.bool)
    if scores.is_cuda:  # one selection by many blocks, and no wait for its result
        largest = scores.topk(count, sorted=False).indices
        return torch.zeros_like(scores, dtype=torch.bool).index_fill_(0, largest, True)
    if scores.device.type == "cpu" and scores.dtype in (torch.float32, torch.float64):
        # numpy selects in vector instructions, ten times as fast as torch
        at = size - count - 1
        threshold = float(np.partition(scores.detach().numpy(), at)[at])
    else:
        threshold = float(scores.kthvalue(size - count).values)
    mask = scores > threshold  # which is the largest score that goes
    missing = count - int(torch.count_nonzero(mask))
    if missing:
        ties = (scores == threshold).nonzero().flatten()
        mask[ties[:missing]] = True
    return mask


def keep_largest_of_each(scores: Tensor, counts: Tensor) -> Tensor:
    """:func:`keep_largest` of every row of (S, n) scores, each its own of (S,) counts."""
    if not scores.is_cuda:
        rows = zip(scores, counts.tolist(), strict=True)
        return torch.stack([keep_largest(row, count) for row, count in rows])
    order = scores.argsort(dim=1, descending=True, stable=True)
    kept = torch.arange(scores.shape[1], device=scores.device) < counts[:, None]
    return torch.empty_like(kept).scatter_(1, order, kept)


def _keep_in_groups(scores: Tensor, n: int, m: int) -> Tensor:
    groups = scores.unflatten(-1, (-1, m))
    if m > _COUNTED:
        gone = groups.topk(n, dim=-1, largest=False).indices
        return torch.ones_like(groups, dtype=torch.bool).scatter_(-1, gone, False).flatten(-2)
    # m comparisons of whole tensors are far quicker than millions of sorts of m entries
    rank = torch.zeros_like(groups, dtype=torch.uint8)
    for i in range(m):
        entry = groups[..., i : i + 1]
        rank += entry < groups
        rank[..., i + 1 :] += entry == groups[..., i + 1 :]
    return (rank >= n).flatten(-2)


def _keep_in_rows(scores: Tensor, sparsity: float) -> Tensor:
    size = scores.shape[-1]
    rows = scores.reshape(-1, size)
    # cumulative, so that the total is that of all rows together
    ends = [round(sparsity * size * r) for r in range(len(rows) + 1)]
    gone = torch.tensor(ends, device=scores.device).diff()
    kept = torch.arange(size, device=scores.device) >= gone[:, None]
    return torch.empty_like(kept).scatter_(1, rows.argsort(-1), kept).view_as(scores)
