"""Wanda (arXiv 2306.11695): magnitude times the norm of the input; weights stay as they are."""

import torch
from torch import Tensor

from sparsessm_plugin.selection.masks import UNSTRUCTURED, choose_mask
from sparsessm_plugin.solvers.objective import DAMPENING, Solved, check, finish, working_dtype
from sparsessm_plugin.solvers.projections import register_solver


@register_solver(updates=False, needs_hessian=True)
def wanda(
    weight: Tensor,
    hessian: Tensor,
    sparsity: float,
    structure: str = UNSTRUCTURED,
    *,
    keep: Tensor | None = None,
    block_size: int = 128,
    dampening_frac: float = DAMPENING,
) -> Solved:
    """Prune by ``|w_ij| ||x_j||`` (Eq. 1), compared within each output row.

    Several problems at once (a depthwise conv1d, whose rows are too short to be compared within
    themselves) are compared over all channels.

    :param weight: (..., out, in); leading dimensions are problems that share the sparsity
    :param hessian: (..., in, in) sum of x x^T
    :param sparsity: share of zeros over all problems; n:m decides it alone
    :param structure: ``"0:0"`` or ``"n:m"``, n zeros in every m inputs
    :param keep: None or (..., out, in) bool; False for entries that must be zero, which count
    :param block_size: not used
    :param dampening_frac: not used
    :raises SparseSSMError: an argument that is not allowed
    """
    check(weight, hessian, keep)
    # a GPU selects float32 without sorting; on a CPU more bits cost nothing
    dtype = working_dtype(weight, hessian) if weight.is_cuda else torch.float64
    norm = hessian.diagonal(dim1=-2, dim2=-1).to(dtype).sqrt()  # (..., in)
    scores = weight.abs().to(dtype) * norm[..., None, :]
    mask = choose_mask(scores, sparsity, structure, keep=keep, per_row=weight.dim() == 2)
    return finish(weight, weight, mask, hessian)
