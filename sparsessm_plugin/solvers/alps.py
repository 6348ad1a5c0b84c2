"""ALPS (arXiv 2406.07831): the support by ADMM, then the weights on it by conjugate gradients."""

import torch
from torch import Tensor

from sparsessm_plugin.backends.precision import Factor, tf32
from sparsessm_plugin.selection.masks import UNSTRUCTURED, check_structure, choose_mask
from sparsessm_plugin.solvers.exhaustive import MOST_INPUTS, best_support
from sparsessm_plugin.solvers.kernels import summing_dtype
from sparsessm_plugin.solvers.objective import (
    DAMPENING,
    InverseCholesky,
    Solved,
    check,
    damped_inverse_cholesky,
    finish,
    inverse_root,
    row_errors,
    square_of_root,
)
from sparsessm_plugin.solvers.projections import register_solver
from sparsessm_plugin.solvers.sparsegpt import may_stay, surgeon

# Section 3.2 of the paper: the penalty at first, after how many steps it grows, and by how much
# if at least this share of the kept entries changed. The paper starts at 0.1; a lower start was
# measured to be better where few directions dominate (4 % on x_proj), and as good elsewhere. It
# grows every 3 steps, by 1.3, 1.2 or 1.1; every 4 was measured to end after as many steps with
# errors between 0.2 % less and 0.4 % more, and a new penalty is what costs most (see _Shifted).
_FIRST_PENALTY = 0.03
_UPDATE_EVERY = 4
_GROWTH = ((0.1, 1.4), (0.005, 1.3), (0.0, 1.15))
# A row's conjugate gradients end when a step takes less than this share of the error left.
_TOLERANCE = 1e-5


@register_solver(updates=True, needs_hessian=True)
def alps(
    weight: Tensor,
    hessian: Tensor,
    sparsity: float,
    structure: str = UNSTRUCTURED,
    *,
    keep: Tensor | None = None,
    block_size: int = 128,
    dampening_frac: float = DAMPENING,
    inverse: InverseCholesky | None = None,
    admm_steps: int = 150,
    cg_steps: int = 40,
) -> Solved:
    """Search the support by ADMM, refine the weights on it, and never be worse than SparseGPT.

    Should ADMM's support be no better than SparseGPT, which is rare, or leave no choice, that of
    SparseGPT is refined; the best by the objective is returned. Of few inputs all supports are
    compared instead.

    :param weight: (..., out, in); leading dimensions are problems that share the sparsity
    :param hessian: (..., in, in) sum of x x^T
    :param sparsity: share of zeros over all problems; n:m decides it alone. Weights of dead
        inputs are zeros too, so there may be more
    :param structure: ``"0:0"`` or ``"n:m"``, n zeros in every m inputs
    :param keep: None or (..., out, in) bool; False for entries that must be zero, which count
    :param block_size: of SparseGPT
    :param dampening_frac: added to H's diagonal, of its mean
    :param inverse: of the Hessian with that, where it is there already
    :param admm_steps: at most; it stops when the support stays
    :param cg_steps: at most
    :raises SparseSSMError: an argument that is not allowed
    """
    check(weight, hessian, keep)
    check_structure(structure, weight.shape[-1], sparsity)
    inverse = inverse or damped_inverse_cholesky(hessian, dampening_frac)
    start, mask = surgeon(weight, hessian, inverse, sparsity, structure, keep, block_size)
    surgical = best = finish(weight, start, mask, hessian)

    dense = weight.to(start.dtype)

    def refined(start: Tensor, mask: Tensor) -> Solved:
        found = refine_on_support(
            dense, inverse.hessian, mask, cg_steps, start=start, tolerance=_TOLERANCE
        )
        return finish(weight, found, mask, hessian)

    allowed = may_stay(weight, inverse.dead, keep)
    if weight.shape[-1] <= MOST_INPUTS:
        found = finish(
            weight, *best_support(weight, inverse, sparsity, structure, allowed), hessian
        )
        return min(surgical, found, key=lambda solved: solved.error)
    free = choose_mask(torch.ones_like(start), sparsity, structure, keep=allowed)
    if admm_steps and not torch.equal(free, allowed):  # else there is nothing to choose
        found = refined(*_admm(dense, inverse, sparsity, structure, allowed, admm_steps))
        best = min(best, found, key=lambda solved: solved.error)
    if best is surgical:
        best = min(best, refined(start, mask), key=lambda solved: solved.error)
    return best


class _Shifted:
    """Solve ``X (H + penalty) = wanted`` for one penalty and several right-hand sides.

    For n inputs the factorisation and its triangular inverse cost n^3 (1/3 + 1). An
    eigendecomposition serves all penalties, of which there are about 13, but costs more than
    20 n^3 and much of that at the speed of memory: seconds for 5120 inputs on an H100, where one
    of these takes 10 ms.

    :param hessian: (..., in, in) with a unit diagonal
    :param tall: whether the inverse pays off: another n^3, and half the products of a step
    """

    def __init__(self, hessian: Tensor, penalty: float, tall: bool):
        shifted = hessian.clone()
        shifted.diagonal(dim1=-2, dim2=-1).add_(penalty)
        root, failed = inverse_root(shifted)
        if bool(failed.any()):  # a few directions hold nearly all: float32 has too few digits
            root = inverse_root(shifted.double())[0].to(hessian)
        # (H + penalty)^-1 = root^T root
        self._factors = [square_of_root(root)] if tall else [root.mT.contiguous(), root]

    def solve(self, wanted: Tensor) -> Tensor:
        """(..., out, in) X.

        In TF32 where there is such a thing: ADMM only chooses the support. With inputs rounded to
        that on a checkpoint, the mean error after refinement rose by 0.1 % for x_proj and changed
        by less than 0.04 % for all others.
        """
        with tf32():
            for factor in self._factors:
                wanted = wanted @ factor
        return wanted


def _admm(
    weight: Tensor,
    inverse: InverseCholesky,
    sparsity: float,
    structure: str,
    allowed: Tensor,
    steps: int,
) -> tuple[Tensor, Tensor]:
    """Algorithm 1 of the paper: weight and mask, (..., out, in) both.

    W' and its sparse copy D are pulled together by a penalty that grows, ever slower as the
    support settles. Inputs are scaled to unit energy, so one first penalty fits every layer.
    """
    size = inverse.hessian.diagonal(dim1=-2, dim2=-1).sqrt()[..., None, :]  # (..., 1, in)
    scaled = (inverse.hessian / size / size.mT).to(weight.dtype)
    size = size.to(weight.dtype)
    tall = _UPDATE_EVERY * weight.shape[-2] > weight.shape[-1]
    keep = None if bool(allowed.all()) else allowed

    def project(free: Tensor) -> Tensor:
        return choose_mask(free.abs(), sparsity, structure, keep=keep)

    free = weight * size
    target = Factor(scaled).after(free)
    mask = project(free)
    dual = torch.zeros_like(free)  # the paper's V over the penalty
    sparse = free.masked_fill(~mask, 0)
    before, penalty = mask, _FIRST_PENALTY
    solver: _Shifted | None = None
    for step in range(1, steps + 1):
        solver = solver or _Shifted(scaled, penalty, tall)
        free = solver.solve(torch.add(target, sparse - dual, alpha=penalty)).add_(dual)
        mask = project(free)
        # V is what the projection took: its step, penalty * (W' - D), adds up to that
        dual = free * ~mask  # on a CPU eight times as fast as masked_fill
        sparse = free.sub_(dual)
        if step % _UPDATE_EVERY == 0:
            changed = int(torch.count_nonzero(mask != before))
            if not changed:
                break
            share = changed / max(1, int(torch.count_nonzero(mask)))
            growth = next(growth for least, growth in _GROWTH if share >= least)
            penalty *= growth
            dual /= growth
            before, solver = mask, None
    return sparse / size, mask


def refine_on_support(
    weight: Tensor,
    hessian: Tensor,
    mask: Tensor,
    steps: int = 40,
    *,
    start: Tensor | None = None,
    tolerance: float = 0.0,
) -> Tensor:
    """Least squares of the dense output on a fixed support, of every row: useful for any mask.

    Conjugate gradients with H's diagonal as preconditioner, residuals projected on the support
    (arXiv 2406.07831, Algorithm 2). No row becomes worse than where it starts.

    :param weight: (..., out, in) dense
    :param hessian: (..., in, in) sum of x x^T, dampened if a ridge towards ``weight`` is wanted
    :param mask: (..., out, in) bool, True where a weight may stay
    :param steps: at most; a row of k weights is exact after k, were it not for rounding
    :param start: (..., out, in) to start from, ``weight`` on the mask by default
    :param tolerance: a row is done when a step takes less than this share of its error
    :return: (..., out, in) float32, float64 if the weight is; exactly zero outside the mask
    :raises SparseSSMError: an argument that is not allowed
    """
    check(weight, hessian, mask)
    dtype = summing_dtype(weight)
    dense = weight.to(dtype)
    first = (dense if start is None else start.to(dtype)).masked_fill(~mask, 0)
    # in units of the mean diagonal entry, so that products neither under- nor overflow
    diagonal = hessian.double().diagonal(dim1=-2, dim2=-1)
    unit = diagonal.mean(-1).clamp(min=torch.finfo(torch.float64).tiny)[..., None]
    H = (hessian.double() / unit[..., None]).to(dtype)
    diagonal = (diagonal / unit).to(dtype)[..., None, :]
    inverse = torch.where(diagonal > 0, 1 / diagonal.clamp(min=1e-30), torch.zeros_like(diagonal))

    factor = Factor(H)
    errors = row_errors(dense, first, hessian)
    left = (errors / unit).to(dtype)[..., None]
    x = first.clone()
    support = mask.to(dtype)
    residual = factor.after(dense - x).mul_(support)
    z = residual * inverse
    direction = z
    rz = (residual * z).sum(-1, keepdim=True)
    # where the sum of squares is as small as rounding of the whole output makes it
    small = torch.finfo(dtype).eps ** 2 * (dense.square() * diagonal).sum(-1, keepdim=True)
    active = rz > small
    for _ in range(steps):
        product = factor.after(direction)
        curvature = (direction * product).sum(-1, keepdim=True)
        active &= curvature > 0
        length = torch.where(active, rz / curvature, torch.zeros_like(rz))
        x.addcmul_(length, direction)
        residual = residual.addcmul(length * product, support, value=-1)
        z = residual * inverse
        previous, rz = rz, (residual * z).sum(-1, keepdim=True)
        direction = z + torch.where(active, rz / previous, torch.zeros_like(rz)) * direction
        taken = length * previous
        active &= (rz > small) & (taken > tolerance * left)
        if not bool(active.any()):
            break
        left = left - taken
    better = row_errors(dense, x, hessian) <= errors
    return torch.where(better[..., None], x, first)
