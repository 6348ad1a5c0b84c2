"""The column loop of SparseGPT within a block: one interface, a backend for each device type.

The loop is a chain of small updates, so what it costs in plain torch is launches: about six a
column. Rows do not meet in it, so a backend walks many tiles of rows side by side, each from the
first column to the last.
"""

from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from sparsessm_plugin.backends.choice import REFERENCE, backend_for
from sparsessm_plugin.selection.masks import keep_largest_of_each

# Columns that are walked in one go: their rows' tile fits registers, or the first-level cache.
WIDTH = 128

_BACKENDS = {"cpu": "sparsessm_plugin.solvers.cpu", "cuda": "sparsessm_plugin.solvers.gpu"}


def _kernels(device: torch.device) -> Any:
    """The module with a device's kernels, where those of the scan run; None where none does."""
    name = _BACKENDS.get(device.type)
    return None if name is None or backend_for(device) == REFERENCE else import_module(name)


def sweep(
    weight: Tensor,
    kept: Tensor,
    factor: Tensor,
    start: int,
    stop: int,
    group: int = 0,
    zeros: Tensor | None = None,
) -> Tensor:
    """Prune a block's columns one by one, each made up for by those of the block that follow.

    With ``group``, the ``zeros`` entries of least ``(w_j / U_jj)^2`` go of every so many columns,
    chosen when the columns before are final. Works in place.

    :param weight: (P, in, out) contiguous, float32 or float64
    :param kept: (P, in, out) contiguous bool, the mask; with ``group`` what may stay, and the
        mask afterwards
    :param factor: (P, in, in), or (1, in, in) for all problems: upper Cholesky factor of the
        inverse Hessian
    :param start: first column
    :param stop: last column + 1
    :param group: columns of a group, which divides ``start`` and ``stop``; 0: the mask is given
    :param zeros: (P,) int32 zeros of every group
    :return: (P, stop - start, out) what each column has lost, over its pivot
    """
    if zeros is None:  # nobody reads them
        zeros = torch.empty(len(weight), dtype=torch.int32, device=weight.device)
    kernels = _kernels(weight.device)
    if kernels is None:
        return sweep_reference(weight, kept, factor, start, stop, group, zeros)
    errors = torch.empty_like(weight[:, start:stop], memory_format=torch.contiguous_format)
    kernels.sweep(weight, kept, factor, errors, start, stop, group, zeros)
    return errors


def choose(
    weight: Tensor,
    kept: Tensor,
    pivots: Tensor,
    start: int,
    stop: int,
    counts: Tensor,
    allowed: Tensor | None,
) -> None:
    """Keep so many entries of a block of columns, those of the largest ``(w_j / U_jj)^2``.

    They are compared among all rows of so many problems that follow each other as there are for
    each count. Of equal ones the last stay, by problem, row and column.

    :param weight: (P, in, out) contiguous, float32 or float64
    :param kept: (P, in, out) contiguous bool, of which the block is overwritten
    :param pivots: (P, in), or (1, in) for all problems
    :param start: first column
    :param stop: last column + 1
    :param counts: (G,) int32 on the weight's device; G divides P
    :param allowed: (P, in, out) contiguous bool, of which at least so many are True, or None
    """
    fits = weight.is_cuda and weight.dtype == torch.float32
    kernels = _kernels(weight.device) if fits else None
    if kernels is not None:
        kernels.choose(weight, kept, pivots, start, stop, counts, allowed)
        return
    total, _, out = weight.shape
    scores = (weight[:, start:stop] / pivots[:, start:stop, None]).square_()
    if allowed is not None:
        scores.masked_fill_(~allowed[:, start:stop], -1)
    chosen = keep_largest_of_each(scores.mT.reshape(len(counts), -1), counts)
    kept[:, start:stop] = chosen.view(total, out, stop - start).mT


def window_products(left: Tensor, right: Tensor, kernel: int, mask: Tensor | None) -> Tensor | None:
    """:func:`sparsessm_plugin.solvers.objective.window_gram` in one kernel.

    :param left: (b, L, D); in half precision, too
    :param right: likewise
    :param kernel: K, width of a window
    :param mask: (b, L) bool, the windows' ends that count, or None for all
    :return: (D, K, K) float64 of sums in float32; None where no kernel runs
    """
    kernels = _kernels(left.device) if left.is_cuda else None
    return None if kernels is None else kernels.window_products(left, right, kernel, mask)


def summing_dtype(x: Tensor) -> torch.dtype:
    """float32, or float64 if the tensor is."""
    return torch.promote_types(x.dtype, torch.float32)


def sweep_reference(
    weight: Tensor,
    kept: Tensor,
    factor: Tensor,
    start: int,
    stop: int,
    group: int,
    zeros: Tensor,
) -> Tensor:
    """:func:`sweep` in plain torch, which the backends are tested against."""
    block, mask, U = weight[:, start:stop], kept[:, start:stop], factor[:, start:stop, start:stop]
    pivots = U.diagonal(dim1=1, dim2=2)[..., None]  # (P, columns, 1)
    errors = torch.zeros_like(block)
    for i in range(stop - start):
        if group and i % group == 0:
            members = slice(i, i + group)
            scores = (block[:, members] / pivots[:, members]).square()
            scores = scores.masked_fill(~mask[:, members], -1)
            rank = scores.argsort(stable=True, dim=1).argsort(1)
            mask[:, members] &= rank >= zeros[:, None, None]
        # [H^-1]_jj of the columns that are left, in the OBS update, is the pivot squared
        error = (block[:, i] / pivots[:, i]).masked_fill(mask[:, i], 0)
        block[:, i:] -= U[:, i, i:, None] * error[:, None]
        block[:, i].masked_fill_(~mask[:, i], 0)
        errors[:, i] = error
    return errors
