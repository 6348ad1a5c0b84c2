"""ALPS (arXiv 2406.07831): the support by ADMM, then the weights on it by conjugate gradients."""

import torch
from torch import Tensor

from sparsessm_plugin.solvers.masks import UNSTRUCTURED, check_structure, choose_mask
from sparsessm_plugin.solvers.objective import (
    DAMPENING,
    InverseCholesky,
    Solved,
    check,
    damped_inverse_cholesky,
    finish,
    row_errors,
)
from sparsessm_plugin.solvers.sparsegpt import may_stay, surgeon

# Section 3.2 of the paper: the penalty at first, after how many steps it grows, and by how much
# if at least this share of the kept entries changed. The paper starts at 0.1; a lower start was
# measured to be better where few directions dominate (4 % on x_proj), and as good elsewhere.
_FIRST_PENALTY = 0.03
_UPDATE_EVERY = 3
_GROWTH = ((0.1, 1.3), (0.005, 1.2), (0.0, 1.1))


def alps(
    weight: Tensor,
    hessian: Tensor,
    sparsity: float,
    structure: str = UNSTRUCTURED,
    *,
    keep: Tensor | None = None,
    block_size: int = 128,
    dampening_frac: float = DAMPENING,
    admm_steps: int = 150,
    cg_steps: int = 40,
) -> Solved:
    """Search the support by ADMM, refine the weights on it, and never be worse than SparseGPT.

    The best of three by the objective is returned: ADMM's support, SparseGPT's support refined
    by conjugate gradients, and SparseGPT as it is.

    :param weight: (..., out, in); leading dimensions are problems that share the sparsity
    :param hessian: (..., in, in) sum of x x^T
    :param sparsity: share of zeros over all problems; n:m decides it alone. Weights of dead
        inputs are zeros too, so there may be more
    :param structure: ``"0:0"`` or ``"n:m"``, n zeros in every m inputs
    :param keep: None or (..., out, in) bool; False for entries that must be zero, which count
    :param block_size: of SparseGPT
    :param dampening_frac: added to H's diagonal, of its mean
    :param admm_steps: at most; it stops when the support stays
    :param cg_steps: at most
    :raises SparseSSMError: an argument that is not allowed
    """
    check(weight, hessian, keep)
    check_structure(structure, weight.shape[-1], sparsity)
    inverse = damped_inverse_cholesky(hessian, dampening_frac)
    start, mask = surgeon(weight, hessian, inverse, sparsity, structure, keep, block_size)
    best = finish(weight, start, mask, hessian)

    dense = weight.to(start.dtype)
    candidates = [(start, mask)]
    allowed = may_stay(weight, inverse.dead, keep)
    free = choose_mask(torch.ones_like(start), sparsity, structure, keep=allowed)
    if admm_steps and not torch.equal(free, allowed):  # else there is nothing to choose
        candidates.append(_admm(dense, inverse, sparsity, structure, allowed, admm_steps))
    for start, mask in candidates:
        refined = refine_on_support(dense, inverse.hessian, mask, cg_steps, start=start)
        found = finish(weight, refined, mask, hessian)
        best = min(best, found, key=lambda solved: solved.error)
    return best


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
    scaled = inverse.hessian / size / size.mT
    values, vectors = torch.linalg.eigh(scaled)
    values, vectors, scaled, size = (t.to(weight.dtype) for t in (values, vectors, scaled, size))
    values = values.clamp(min=0)
    # (H + penalty)^-1 as a matrix costs in^3 for every new penalty, then a product less a step
    tall = _UPDATE_EVERY * weight.shape[-2] > weight.shape[-1]

    def project(scores: Tensor) -> Tensor:
        return choose_mask(scores.square(), sparsity, structure, keep=allowed)

    dense = weight * size
    target = dense @ scaled
    mask = project(dense)
    sparse, dual = dense * mask, torch.zeros_like(dense)
    before, penalty = mask, _FIRST_PENALTY
    solver: Tensor | None = None
    for step in range(1, steps + 1):
        wanted = target - dual + penalty * sparse
        if tall:
            if solver is None:
                solver = (vectors / (values + penalty)[..., None, :]) @ vectors.mT
            full = wanted @ solver
        else:
            full = ((wanted @ vectors) / (values + penalty)[..., None, :]) @ vectors.mT
        free = full + dual / penalty
        mask = project(free)
        sparse = free * mask
        dual += penalty * (full - sparse)
        if step % _UPDATE_EVERY == 0:
            changed = int((mask != before).sum())
            if not changed:
                break
            share = changed / max(1, int(mask.sum()))
            penalty *= next(growth for least, growth in _GROWTH if share >= least)
            before, solver = mask, None
    return sparse / size, mask


def refine_on_support(
    weight: Tensor, hessian: Tensor, mask: Tensor, steps: int = 40, *, start: Tensor | None = None
) -> Tensor:
    """Least squares of the dense output on a fixed support, of every row: useful for any mask.

    Conjugate gradients with H's diagonal as preconditioner, residuals projected on the support
    (arXiv 2406.07831, Algorithm 2). No row becomes worse than where it starts.

    :param weight: (..., out, in) dense
    :param hessian: (..., in, in) sum of x x^T, dampened if a ridge towards ``weight`` is wanted
    :param mask: (..., out, in) bool, True where a weight may stay
    :param steps: at most; a row of k weights is exact after k, were it not for rounding
    :param start: (..., out, in) to start from, ``weight`` on the mask by default
    :return: (..., out, in) float32, float64 if the weight is; exactly zero outside the mask
    :raises SparseSSMError: an argument that is not allowed
    """
    check(weight, hessian, mask)
    dtype = torch.promote_types(weight.dtype, torch.float32)
    dense = weight.to(dtype)
    first = (dense if start is None else start.to(dtype)).masked_fill(~mask, 0)
    # in units of the mean diagonal entry, so that products neither under- nor overflow
    diagonal = hessian.double().diagonal(dim1=-2, dim2=-1)
    unit = diagonal.mean(-1).clamp(min=torch.finfo(torch.float64).tiny)[..., None]
    H = (hessian.double() / unit[..., None]).to(dtype)
    diagonal = (diagonal / unit).to(dtype)[..., None, :]
    inverse = torch.where(diagonal > 0, 1 / diagonal.clamp(min=1e-30), torch.zeros_like(diagonal))

    x = first.clone()
    residual = ((dense - x) @ H).masked_fill(~mask, 0)
    z = residual * inverse
    direction = z
    rz = (residual * z).sum(-1, keepdim=True)
    # where the sum of squares is as small as rounding of the whole output makes it
    small = torch.finfo(dtype).eps ** 2 * (dense.square() * diagonal).sum(-1, keepdim=True)
    for _ in range(steps):
        active = rz > small
        if not active.any():
            break
        product = direction @ H
        curvature = (direction * product).sum(-1, keepdim=True)
        active &= curvature > 0
        length = torch.where(active, rz / curvature, torch.zeros_like(rz))
        x = x + length * direction
        residual = residual - (length * product).masked_fill(~mask, 0)
        z = residual * inverse
        previous, rz = rz, (residual * z).sum(-1, keepdim=True)
        direction = z + torch.where(active, rz / previous, torch.zeros_like(rz)) * direction
    better = row_errors(dense, x, hessian) <= row_errors(dense, first, hessian)
    return torch.where(better[..., None], x, first)
