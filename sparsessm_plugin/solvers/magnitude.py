"""The baseline: the smallest weights go, and nothing makes up for them."""

from torch import Tensor

from sparsessm_plugin.selection.masks import UNSTRUCTURED, choose_mask
from sparsessm_plugin.solvers.objective import DAMPENING, Solved, check, finish
from sparsessm_plugin.solvers.projections import register_solver


@register_solver(updates=False, needs_hessian=False)
def magnitude(
    weight: Tensor,
    hessian: Tensor,
    sparsity: float,
    structure: str = UNSTRUCTURED,
    *,
    keep: Tensor | None = None,
    block_size: int = 128,
    dampening_frac: float = DAMPENING,
) -> Solved:
    """Prune by ``|w|``.

    :param weight: (..., out, in); leading dimensions are problems that share the sparsity
    :param hessian: (..., in, in) sum of x x^T; for the error only
    :param sparsity: share of zeros over all problems; n:m decides it alone
    :param structure: ``"0:0"`` or ``"n:m"``, n zeros in every m inputs
    :param keep: None or (..., out, in) bool; False for entries that must be zero, which count
    :param block_size: not used
    :param dampening_frac: not used
    :raises SparseSSMError: an argument that is not allowed
    """
    check(weight, hessian, keep)
    mask = choose_mask(weight.abs().float(), sparsity, structure, keep=keep)
    return finish(weight, weight, mask, hessian)
