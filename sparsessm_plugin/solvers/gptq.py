"""GPTQ under a fixed mask: quantize a layer's weights so that its zeros stay zeros.

GPTQ (arXiv 2210.17323, Algorithm 1) rounds a weight matrix column by column and lets the columns
to come make up for what rounding has changed, by the optimal-brain-surgeon update of the
layer-wise objective tr((W - Q) H (W - Q)^T). That update reaches pruned entries too. Here each
column is rounded and then masked, and the error that is passed on holds both: what the grid cannot
represent, and what the columns before would have put where the mask wants a zero. It is the joint
step of SparseGPT (arXiv 2301.00774, Section 3.5) with the mask given.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from sparsessm_plugin.solvers.objective import DAMPENING, with_dampening

# fake quantization: values, scale and zero point, all (rows, n) or broadcastable -> (rows, n)
Quantize = Callable[[Tensor, Tensor, Tensor | None], Tensor]
# new scale and zero point, (rows, 1) each, for a group of columns (rows, width)
Rescale = Callable[[Tensor], tuple[Tensor, Tensor | None]]


@dataclass(frozen=True)
class QuantizedWeight:
    """What :func:`masked_gptq` has found.

    :param weight: (rows, columns) values on the grid, in the dtype of the Hessian
    :param scale: as given, or of each group as it was recomputed
    :param zero_point: likewise
    :param error: tr((W - Q) H (W - Q)^T), in the units of the Hessian
    :param dampening: share of the mean diagonal with which the Hessian could be factorised
    """

    weight: Tensor
    scale: Tensor
    zero_point: Tensor | None
    error: float
    dampening: float


def masked_gptq(
    weight: Tensor,
    hessian: Tensor,
    keep: Tensor,
    quantize: Quantize,
    scale: Tensor,
    zero_point: Tensor | None = None,
    *,
    block_size: int = 128,
    dampening: float = DAMPENING,
    activation_order: bool = False,
    rescale: Rescale | None = None,
) -> QuantizedWeight:
    """Quantize a weight matrix by GPTQ (arXiv 2210.17323, Algorithm 1) under a mask.

    Computes in the dtype of the Hessian. Without a mask, and in float32, the result is that of
    LLM Compressor's GPTQ. Columns whose input is always zero become zero.

    :param weight: (rows, columns); left as it is
    :param hessian: (columns, columns), X X^T up to a factor; left as it is
    :param keep: (rows, columns) bool, False where the result must be zero
    :param quantize: rounds values to the grid of a scale and a zero point; must turn zero into zero
    :param scale: (rows or 1, groups); group g is for columns g * columns / groups and following:
        one group per channel or tensor, as many as columns for a scale of each entry
    :param zero_point: as ``scale``, None for symmetric grids
    :param block_size: columns after which the updates reach the rest of the matrix; changes
        speed, not the result
    :param dampening: added to the diagonal, as a share of its mean; raised tenfold with one
        warning for as long as the Hessian cannot be factorised
    :param activation_order: go through the columns by descending diagonal of the Hessian; the
        groups stay those of the columns' own order
    :param rescale: gives a group a new grid, from its weights as they have become, when the
        sweep reaches it; not together with ``activation_order``
    :raises ValueError: shapes that do not fit, or options that exclude each other
    """
    rows, columns = weight.shape
    groups = scale.shape[-1]
    if keep.shape != weight.shape or hessian.shape != (columns, columns):
        raise ValueError(
            f"weight {tuple(weight.shape)}, mask {tuple(keep.shape)} and Hessian "
            f"{tuple(hessian.shape)} do not fit together"
        )
    if scale.ndim != 2 or scale.shape[0] not in (1, rows) or columns % groups:
        raise ValueError(
            f"scale {tuple(scale.shape)} does not fit the weight {tuple(weight.shape)}; it must be "
            "(rows or 1, groups), with groups a divisor of the columns"
        )
    if rescale is not None and activation_order:
        raise ValueError("rescale goes through whole groups, activation_order takes them apart")
    width = columns // groups
    dense = weight.to(hessian.dtype)
    W = dense.clone()
    H = hessian.clone()
    dead = H.diagonal() == 0
    H.diagonal()[dead] = 1.0
    W[:, dead] = 0.0
    scale = scale.expand(rows, groups)
    zero_point = None if zero_point is None else zero_point.expand(rows, groups)
    group_of = torch.arange(columns, device=W.device) // width
    order = None
    if activation_order:
        order = torch.argsort(H.diagonal(), descending=True)
        W, keep, H, group_of = W[:, order], keep[:, order], H[order][:, order], group_of[order]
    if rescale is not None:
        scale = scale.clone()
        zero_point = None if zero_point is None else zero_point.clone()
        # a group's weights must be up to date in all its columns when it gets its grid
        block_size = max(block_size // width, 1) * width
    factor, used = _inverse_factor(H, dampening)

    for start in range(0, columns, block_size):
        stop = min(start + block_size, columns)
        block = W[:, start:stop]
        errors = torch.zeros_like(block)
        for i in range(stop - start):
            column = start + i
            g = group_of[column : column + 1]
            if rescale is not None and column % width == 0:
                kept = block[:, i : i + width] * keep[:, column : column + width]
                new_scale, new_zero = rescale(kept)
                scale[:, g] = new_scale.to(scale.dtype)
                if zero_point is not None and new_zero is not None:
                    zero_point[:, g] = new_zero.to(zero_point.dtype)
            w = block[:, i : i + 1].clone()
            z = None if zero_point is None else zero_point[:, g]
            q = quantize(w, scale[:, g], z).to(W.dtype)
            q = torch.where(keep[:, column : column + 1], q, torch.zeros_like(q))
            # Algorithm 1: E_j = (w_j - q_j) / [H^-1]_jj, W_{j:} -= E_j [H^-1]_{j,j:}, with
            # the rows of the upper Cholesky factor in the place of H^-1
            error = (w - q) / factor[column, column]
            errors[:, i : i + 1] = error
            block[:, i:] -= error * factor[column, column:stop]
            block[:, i : i + 1] = q
        W[:, stop:] -= errors @ factor[start:stop, stop:]

    if order is not None:
        W = W[:, torch.argsort(order)]
    difference = dense - W
    left = float(((difference @ hessian) * difference).sum(dtype=torch.float64))
    return QuantizedWeight(W, scale, zero_point, left, used)


def _inverse_factor(H: Tensor, dampening: float) -> tuple[Tensor, float]:
    """Upper Cholesky factor of (H + damp)^-1 and the dampening that it took; spoils H."""
    mean = H.diagonal().mean()
    diagonal = H.diagonal().clone()

    def factorise(frac: Tensor) -> tuple[Tensor, Tensor]:
        H.diagonal().copy_(diagonal + float(frac) * mean)
        lower, failed = torch.linalg.cholesky_ex(H)
        factor = lower
        if not failed:
            factor, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
        return factor, (failed > 0) | ~factor.isfinite().all()

    factor, used = with_dampening(factorise, H, dampening)
    return factor, float(used)
