"""ALPS (arXiv 2406.07831): the support by ADMM, then the weights on it by conjugate gradients."""

import torch
from torch import Tensor

from sparsessm_plugin.backends.lanes import Lane
from sparsessm_plugin.backends.memory import handed
from sparsessm_plugin.backends.precision import Factor, add_half_product, tf32
from sparsessm_plugin.selection.masks import (
    UNSTRUCTURED,
    check_structure,
    count_true,
    parse_structure,
)
from sparsessm_plugin.solvers.alternation import UNIT_OF_PULL, alternation, half_sum
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
# errors between 0.2 % less and 0.4 % more. It has settled once fewer entries changed than this
# share: waiting until none did took a tenth more steps, for errors that were the same to 0.01 %.
_FIRST_PENALTY = 0.03
_UPDATE_EVERY = 4
_GROWTH = ((0.1, 1.4), (0.005, 1.3), (0.0, 1.15))
_SETTLED = 0.001
# The penalties that one factorisation serves lie up to a factor above and below its own. Their
# Chebyshev series is cut off after so many terms: 1e-5 of it within a factor of 2, and 1 % at both
# ends within 8, where products are rounded to TF32 anyway and a factorisation costs 15 of them.
_REACH, _REACH_OF_TF32 = 2.0, 8.0
_TERMS = 7
# A row's conjugate gradients end when a step takes less than this share of the error left.
_TOLERANCE = 3e-5


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
    lane = Lane(weight.device)  # SparseGPT's many small kernels run beside ADMM's few large ones
    with lane.work():
        start, mask = surgeon(weight, hessian, inverse, sparsity, structure, keep, block_size)
        surgical = finish(weight, start, mask, hessian)

    dense = weight.to(start.dtype)

    def refined(start: Tensor, mask: Tensor) -> Solved:
        found = _descend(dense, inverse.hessian, mask, start, cg_steps, _TOLERANCE)
        return finish(weight, found, mask, hessian)

    allowed = may_stay(weight, inverse.dead, keep)
    if weight.shape[-1] <= MOST_INPUTS:
        lane.join()
        few = finish(weight, *best_support(weight, inverse, sparsity, structure, allowed), hessian)
        return min(surgical, few, key=lambda solved: solved.error)
    found: Solved | None = None
    if admm_steps and _leaves_a_choice(allowed, sparsity, structure):
        found = refined(*_admm(dense, inverse, sparsity, structure, allowed, admm_steps))
    lane.join()
    best = surgical if found is None else min(surgical, found, key=lambda solved: solved.error)
    if best is surgical:
        best = min(best, refined(start, mask), key=lambda solved: solved.error)
    return best


def _leaves_a_choice(allowed: Tensor, sparsity: float, structure: str) -> bool:
    """Whether more entries may stay than do."""
    n, m = parse_structure(structure)
    if m:
        return bool((allowed.unflatten(-1, (-1, m)).sum(-1) > m - n).any())
    return count_true(allowed) > allowed.numel() - round(sparsity * allowed.numel())


class _Resolvent:
    """``penalty (H + penalty)^-1`` for penalties that grow, from few factorisations.

    With y an eigenvalue of ``Y = middle (H + middle)^-1``, which lies in (0, 1), that of another
    penalty k times as large is ``y k / (1 + (k - 1) y)``: the second factor is smooth, and its
    Chebyshev series is short. So a penalty costs a sum of matrices that are there, and only one
    that lies too far above the last factorisation's costs the next.

    :param hessian: (..., in, in) with a unit diagonal
    :param half: whether to multiply, and to give, float16 in units of :data:`UNIT_OF_PULL`
    """

    def __init__(self, hessian: Tensor, half: bool = False):
        self._hessian = hessian
        self._half = half
        self._reach = _REACH_OF_TF32 if hessian.is_cuda else _REACH
        self._middle = 0.0
        self._basis = hessian[None]

    def at(self, penalty: float) -> Tensor:
        """(..., in, in) ``penalty (H + penalty)^-1``."""
        if penalty > self._reach * self._middle:
            self._middle = self._reach * penalty
            self._basis = self._around(self._middle)
        shares = _shares(penalty / self._middle)
        series = handed(shares, self._basis.dtype, self._basis.device)
        if self._half:
            return half_sum(self._basis, series)
        return (series @ self._basis.flatten(1)).view_as(self._hessian)

    def _around(self, penalty: float) -> Tensor:
        """(_TERMS, ..., in, in) ``Y T_j(2 Y - 1)``, T_j the Chebyshev polynomials."""
        shifted = self._hessian.clone()
        shifted.diagonal(dim1=-2, dim2=-1).add_(penalty)
        root, failed = inverse_root(shifted)
        if bool(failed.any()):  # a few directions hold nearly all: float32 has too few digits
            root = inverse_root(shifted.double())[0].to(shifted)
        basis = torch.empty(_TERMS, *shifted.shape, dtype=shifted.dtype, device=shifted.device)
        torch.mul(square_of_root(root), penalty, out=basis[0])
        del shifted, root
        Y = self._factor(basis[0])
        for j in range(1, _TERMS):  # T_1(x) = x, T_(j+1)(x) = 2 x T_j(x) - T_(j-1)(x)
            last, following = basis[j - 1], basis[j]
            if j == 1:
                following.copy_(last)
            else:
                torch.add(basis[j - 2], last, alpha=2, out=following)
            factor = 2.0 if j == 1 else 4.0
            if self._half:
                scale = factor / UNIT_OF_PULL**2
                add_half_product(following, Y, self._factor(last), scale, beta=-1.0)
            else:
                with tf32():
                    following.neg_().add_(Y @ last, alpha=factor)
        return basis

    def _factor(self, x: Tensor) -> Tensor:
        """A matrix of the basis, whose entries are at most about 1, as products take it."""
        return (x * UNIT_OF_PULL).half() if self._half else x


def _shares(ratio: float) -> Tensor:
    """(_TERMS,) float64 Chebyshev coefficients of ``ratio / (1 + (ratio - 1) y)`` on [0, 1]."""
    count = 64  # of points: the series is exact to rounding, and then cut off
    angles = torch.pi * (torch.arange(count, dtype=torch.float64) + 0.5) / count
    values = ratio / (1 + (ratio - 1) * (1 + angles.cos()) / 2)
    order = torch.arange(_TERMS, dtype=torch.float64)
    series = 2 / count * (order[:, None] * angles).cos() @ values
    series[0] /= 2
    return series


def _admm(
    weight: Tensor,
    inverse: InverseCholesky,
    sparsity: float,
    structure: str,
    allowed: Tensor,
    steps: int,
) -> tuple[Tensor, Tensor]:
    """Algorithm 1 of the paper: weight and mask, (..., out, in) both.

    W' and its sparse copy D are pulled together by a penalty p that grows, ever slower as the
    support settles. Inputs are scaled to unit energy, so one first penalty fits every layer.

    A step of the paper solves ``W' (H + p) = W H + p (D - U)``, with U the scaled dual. With
    ``B = W + U``, that is ``W' + U = B + (D - B) p (H + p)^-1``: what is multiplied is only the
    difference of two weights that become alike, so rounding it to float16 or TF32, which have
    equally many digits, does little. Which of the entries that are worth about the same stay
    depends on rounding: of the support on a checkpoint 0.7 % differ from float64 in float32, and 2
    to 5 % in TF32, while errors after refinement are the same, to 0.1 % in the mean of a kind of
    projection.
    """
    size = inverse.hessian.diagonal(dim1=-2, dim2=-1).sqrt()[..., None, :]  # (..., 1, in)
    hessian = (inverse.hessian / size / size.mT).to(weight.dtype)
    size = size.to(weight.dtype)
    keep = None if bool(allowed.all()) else allowed
    state = alternation(weight * size, sparsity, structure, keep)
    resolvent = _Resolvent(hessian, state.half)
    penalty, growth = _FIRST_PENALTY, torch.inf  # at first there is no dual
    pull = resolvent.at(penalty)
    for step in range(1, steps + 1):
        base, rest = state.split(1 / growth)
        growth = 1.0
        if state.half:
            total = add_half_product(base, rest, pull, 1 / (state.unit * UNIT_OF_PULL))
        else:
            with tf32():
                total = _add_product(base, rest, pull)
        state.project(total)
        if step % _UPDATE_EVERY == 0:
            share = state.changed()
            if share < _SETTLED:
                break
            growth = next(growth for least, growth in _GROWTH if share >= least)
            penalty *= growth
            pull = resolvent.at(penalty)
    sparse, mask = state.result()
    return sparse.div_(size), mask


def _add_product(base: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """``base + left @ right``, in place of ``base``."""
    if base.dim() == 2:
        return base.addmm_(left, right)
    parts = (x.flatten(0, -3) for x in (base, left, right))
    return next(parts).baddbmm_(*parts).view_as(base)


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
    dense = weight.to(summing_dtype(weight))
    first = (dense if start is None else start.to(dense)).masked_fill(~mask, 0)
    found = _descend(dense, hessian, mask, first, steps, tolerance)
    better = row_errors(dense, found, hessian) <= row_errors(dense, first, hessian)
    return torch.where(better[..., None], found, first)


def _descend(
    dense: Tensor, hessian: Tensor, mask: Tensor, start: Tensor, steps: int, tolerance: float
) -> Tensor:
    """:func:`refine_on_support` up to rounding, from a start that is zero outside the mask."""
    dtype = dense.dtype
    # in units of the mean diagonal entry, so that products neither under- nor overflow
    diagonal = hessian.double().diagonal(dim1=-2, dim2=-1)
    unit = diagonal.mean(-1).clamp(min=torch.finfo(torch.float64).tiny)[..., None]
    H = (hessian.double() / unit[..., None]).to(dtype)
    diagonal = (diagonal / unit).to(dtype)[..., None, :]
    inverse = torch.where(diagonal > 0, 1 / diagonal.clamp(min=1e-30), torch.zeros_like(diagonal))

    factor = Factor(H)
    support = mask.to(dtype)
    # where the sum of squares is as small as rounding of the whole output makes it
    small = torch.finfo(dtype).eps ** 2 * (dense.square() * diagonal).sum(-1, keepdim=True)
    x, left_over = start.clone(), steps
    # Where products are split in three, steps take one of them, and what the residual has become is
    # looked at once in between: it is what steps correct, and what rounding took from them.
    for _ in range(2 if factor.is_split else 1):
        lost = dense - x
        residual = factor.after(lost)
        left = (lost.mul_(residual)).sum(-1, keepdim=True)  # a row's error
        residual.mul_(support)
        z = residual * inverse
        direction = z
        rz = (residual * z).sum(-1, keepdim=True)
        active = rz > small
        while left_over:
            left_over -= 1
            product = factor.roughly_after(direction)
            curvature = (direction * product).sum(-1, keepdim=True)
            active &= curvature > 0
            length = torch.where(active, rz / curvature, torch.zeros_like(rz))
            x.addcmul_(length, direction)
            residual = residual.addcmul_(product.mul_(length), support, value=-1)
            z = residual * inverse
            previous, rz = rz, (residual * z).sum(-1, keepdim=True)
            share = torch.where(active, rz / previous, torch.zeros_like(rz))
            direction = z.addcmul(share, direction)
            taken = length * previous
            active &= (rz > small) & (taken > tolerance * left)
            if not bool(active.any()):
                break
            left = left - taken
    return x
