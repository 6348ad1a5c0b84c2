"""The layer-wise objective that all projection solvers share, and the Hessian made invertible.

A projection reads inputs x (in,) of the calibration; its Hessian is ``H = sum x x^T``. A pruned
weight W' costs ``tr((W - W') H (W - W')^T)``, the squared output error summed over the
calibration. Leading dimensions are independent problems: a depthwise conv1d has a weight
(D, 1, K) and a Hessian (D, K, K).
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F

from sparsessm_plugin.backends.precision import Factor, exact_dtype, tf32
from sparsessm_plugin.errors import SparseSSMError, SparseSSMWarning
from sparsessm_plugin.solvers.kernels import summing_dtype, window_products

DAMPENING = 0.01  # of the mean diagonal entry, as SparseGPT and GPTQ have it
_FIRST_RAISE = 1e-8  # where raising starts if no dampening was asked for
_LAST_RAISE = 10.0  # a sum of x x^T needs far less, whatever its rounding errors
_Factors = TypeVar("_Factors")
_LEAF = 1280  # inputs up to which a GPU factorises in one go


@dataclass(frozen=True)
class Solved:
    """A pruned weight and what it costs.

    :param weight: as the dense one in shape and dtype, exactly zero where ``mask`` is False
    :param mask: same shape, bool; True where a weight may stay
    :param dense: the weight that was pruned
    :param hessian: of its inputs
    """

    weight: Tensor
    mask: Tensor
    dense: Tensor
    hessian: Tensor

    @cached_property
    def squared_error(self) -> Tensor:
        """``error`` as a tensor without dimensions, which a GPU may still compute: float64."""
        return objective(self.dense, self.weight, self.hessian).sum()

    @property
    def error(self) -> float:
        """``tr((W - W') H (W - W')^T)`` of ``weight`` as it is stored, over all problems."""
        return float(self.squared_error)

    @cached_property
    def relative_error(self) -> float:
        """``error`` over ``tr(W H W^T)``; 0 if the dense output is zero."""
        return relative_error(self.dense, self.weight, self.hessian)


class InverseCholesky(NamedTuple):
    """The inverse of a dampened Hessian, as a factor.

    :param factor: (..., in, in) upper triangular U with ``U^T U = (H + damp)^-1``, float64 unless
        asked for otherwise
    :param hessian: (..., in, in) ``H + damp``, likewise
    :param dead: (..., in) bool, inputs that were always zero
    :param dampening_frac: (...) what was needed, at least what was asked for
    """

    factor: Tensor
    hessian: Tensor
    dead: Tensor
    dampening_frac: Tensor


def row_errors(weight: Tensor, pruned: Tensor, hessian: Tensor) -> Tensor:
    """``(w - w') H (w - w')^T`` of every row: (..., out) float64.

    :param weight: (..., out, in) dense
    :param pruned: (..., out, in)
    :param hessian: (..., in, in) sum of x x^T
    """
    # In float64: a good solver leaves an error that H's large directions do not see, so the
    # terms of this sum cancel. Split products err by about 2^-21 of the terms, which may be a
    # thousand times the sum where one direction holds all of H but a thousandth: then single rows
    # are off by a thousandth, to either side.
    dtype = exact_dtype(hessian, weight, pruned)
    return _squares(weight.to(dtype) - pruned.to(dtype), Factor(hessian.to(dtype)))


def _squares(change: Tensor, hessian: Factor) -> Tensor:
    return hessian.squares(change).clamp(min=0)


def objective(weight: Tensor, pruned: Tensor, hessian: Tensor) -> Tensor:
    """``tr((W - W') H (W - W')^T)`` of every problem: (...) float64.

    :param weight: (..., out, in) dense
    :param pruned: (..., out, in)
    :param hessian: (..., in, in) sum of x x^T
    """
    return row_errors(weight, pruned, hessian).sum(-1)


def relative_error(weight: Tensor, pruned: Tensor, hessian: Tensor) -> float:
    """The objective over the dense output's energy ``tr(W H W^T)``, both summed over all problems.

    :param weight: (..., out, in) dense
    :param pruned: (..., out, in)
    :param hessian: (..., in, in) sum of x x^T
    """
    dtype = exact_dtype(hessian, weight, pruned)
    dense, factor = weight.to(dtype), Factor(hessian.to(dtype))
    squares = [_squares(x, factor).sum(-1).sum() for x in (dense - pruned.to(dtype), dense)]
    error, total = torch.stack(squares).tolist()
    return relative(error, total)


def relative(error: float, total: float) -> float:
    """A squared error over the square of what it is an error of; 0 if that is zero."""
    return error / total if total else 0.0


def finish(weight: Tensor, pruned: Tensor, mask: Tensor, hessian: Tensor) -> Solved:
    """Store a result in the dense weight's dtype.

    :param weight: (..., out, in) dense
    :param pruned: (..., out, in) in any precision
    :param mask: (..., out, in) bool, True where a weight may stay
    :param hessian: (..., in, in) sum of x x^T
    """
    limits = torch.finfo(weight.dtype)
    stored = pruned.clamp(limits.min, limits.max).to(weight.dtype)
    stored = torch.where(mask, stored, torch.zeros_like(stored))
    return Solved(stored, mask, weight, hessian)


def check(weight: Tensor, hessian: Tensor, keep: Tensor | None = None) -> None:
    """Refuse what no solver can work with.

    :param weight: (..., out, in)
    :param hessian: (..., in, in)
    :param keep: None or a mask (..., out, in) bool
    :raises SparseSSMError: shapes that do not fit, entries that are not finite, or a diagonal
        that no sum of squares can have
    """
    wanted = (*weight.shape[:-2], weight.shape[-1], weight.shape[-1])
    if weight.dim() < 2 or not weight.numel():
        raise SparseSSMError(f"a weight must be (..., out, in), got {tuple(weight.shape)}")
    if tuple(hessian.shape) != wanted:
        raise SparseSSMError(
            f"the Hessian of a weight {tuple(weight.shape)} must be {wanted}, "
            f"got {tuple(hessian.shape)}"
        )
    if keep is not None and (keep.shape != weight.shape or keep.dtype != torch.bool):
        raise SparseSSMError(
            f"a mask must be bool and {tuple(weight.shape)}, got {keep.dtype} {tuple(keep.shape)}"
        )
    if not torch.isfinite(weight).all():
        count = int((~torch.isfinite(weight)).sum())
        raise SparseSSMError(f"the weight has {count} entries that are not finite")
    _check_hessian(hessian)


def _check_hessian(hessian: Tensor) -> None:
    if not torch.isfinite(hessian).all():
        count = int((~torch.isfinite(hessian)).sum())
        raise SparseSSMError(
            f"the Hessian has {count} entries that are not finite; the calibration overflowed"
        )
    lowest = float(hessian.diagonal(dim1=-2, dim2=-1).min())
    if lowest < 0:
        raise SparseSSMError(f"the Hessian's diagonal must not be negative, got {lowest:g}")


def dampen(
    hessian: Tensor,
    dampening_frac: float | Tensor = DAMPENING,
    dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor]:
    """H plus a multiple of the identity; inputs that were always zero stand alone.

    :param hessian: (..., in, in) sum of x x^T
    :param dampening_frac: of the mean diagonal entry over inputs that are not dead; a number
        or (...)
    :param dtype: of the sum
    :return: (..., in, in), and dead inputs (..., in) bool
    """
    H = hessian.to(dtype)
    H = (H + H.mT) / 2
    diagonal = H.diagonal(dim1=-2, dim2=-1)
    dead = diagonal == 0
    live = (~dead).sum(-1).clamp(min=1)
    mean = diagonal.sum(-1) / live
    mean = torch.where(mean > 0, mean, torch.ones_like(mean))
    # SparseGPT sets a dead diagonal entry to 1; the mean of the others is the same in any unit
    frac = dampening_frac.to(mean) if isinstance(dampening_frac, Tensor) else dampening_frac
    added = dead * mean[..., None] + (frac * mean)[..., None]
    return H + torch.diag_embed(added), dead


def damped_inverse_cholesky(
    hessian: Tensor, dampening_frac: float = DAMPENING, dtype: torch.dtype = torch.float64
) -> InverseCholesky:
    """The Cholesky factor of ``(H + damp)^-1`` along which SparseGPT walks.

    See arXiv 2301.00774, Section 3. Dampening is raised tenfold, with one warning, until the
    factor exists; that needs an indefinite or singular H and little dampening.

    :param hessian: (..., in, in) sum of x x^T
    :param dampening_frac: of the mean diagonal entry over inputs that are not dead
    :param dtype: float32 where a few digits do; what has no factor then is computed in float64
    :raises SparseSSMError: H is not finite, has a negative diagonal entry, or is so indefinite
        that no dampening helps
    """
    _check_hessian(hessian)
    if dtype == torch.float32:
        hasty, exists = hasty_inverse_cholesky(hessian, dampening_frac)
        if bool(exists):
            return hasty
    # what a singular H of this precision may have for pivots by rounding alone
    noise = hessian.shape[-1] * torch.finfo(hessian.dtype).eps

    def factorise(fracs: Tensor) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor]:
        H, dead = dampen(hessian, fracs)
        factor, failed = _inverse_factor(H, noise * (fracs < noise))
        return (factor, H, dead), failed

    found, fracs = with_dampening(factorise, hessian, dampening_frac)
    return InverseCholesky(*found, fracs)


def hasty_inverse_cholesky(
    hessian: Tensor, dampening_frac: float = DAMPENING
) -> tuple[InverseCholesky, Tensor]:
    """Such a factor in float32, and whether there is one: () bool; nobody waits for a GPU.

    :param hessian: (..., in, in) sum of x x^T, finite
    :param dampening_frac: of the mean diagonal entry over inputs that are not dead
    """
    H, dead = dampen(hessian, dampening_frac, torch.float32)
    factor, failed = _inverse_factor(H, torch.zeros((), device=H.device))
    fracs = torch.full(failed.shape, dampening_frac, dtype=torch.float64, device=H.device)
    exists = ~failed.any() & torch.isfinite(factor).all()
    return InverseCholesky(factor, H, dead, fracs), exists


def with_dampening(
    factorise: Callable[[Tensor], tuple[_Factors, Tensor]], hessian: Tensor, dampening_frac: float
) -> tuple[_Factors, Tensor]:
    """Factorise with the dampening asked for, raised tenfold where that does not suffice.

    :param factorise: dampening (...) of each problem -> what is wanted, and (...) bool, True
        where there is no factor
    :param hessian: (..., in, in)
    :param dampening_frac: of the mean diagonal entry
    :return: what is wanted, and (...) float64 the dampening that it took; one warning if more
    :raises SparseSSMError: no dampening helps
    """
    if not dampening_frac >= 0:
        raise SparseSSMError(f"dampening_frac must not be negative, got {dampening_frac}")
    fracs = torch.full(
        hessian.shape[:-2], dampening_frac, dtype=torch.float64, device=hessian.device
    )
    while True:
        found, failed = factorise(fracs)
        if not failed.any():
            break
        if float(fracs[failed].max()) >= _LAST_RAISE:
            raise SparseSSMError(
                f"the Hessian is no sum of x x^T: it cannot be inverted with dampening of "
                f"{float(fracs[failed].max()):g} of its mean diagonal entry"
            )
        fracs = torch.where(failed, (10 * fracs).clamp(min=_FIRST_RAISE), fracs)
    if (fracs > dampening_frac).any():
        warnings.warn(
            f"a Hessian could not be inverted; dampening was raised from {dampening_frac:g} to "
            f"{float(fracs.max()):g} of its mean diagonal entry. More calibration data may help",
            SparseSSMWarning,
            stacklevel=3,
        )
    return found, fracs


def _inverse_factor(H: Tensor, least: Tensor) -> tuple[Tensor, Tensor]:
    """Upper Cholesky factor of H^-1, and (...) bool where there is none.

    :param H: (..., in, in)
    :param least: (...) that pivots must exceed, in units of the diagonal
    """
    # In float64, as H spans many orders of magnitude. One factorisation, of H with its inputs in
    # the opposite order, and one triangular inverse, n^3 (1/3 + 1): 0.2 TFLOP for 5120 inputs.
    # in units of the diagonal, so that inputs of very different size do no harm
    size = H.diagonal(dim1=-2, dim2=-1).sqrt()
    scaled = H / size[..., :, None] / size[..., None, :]
    inverse, failed = inverse_root(scaled.flip(-1, -2), least)
    # J H J = L L^T makes H^-1 = (J L^-1 J)^T (J L^-1 J), and J L^-1 J is upper triangular
    return inverse.flip(-1, -2).triu() / size[..., None, :], failed


def inverse_root(
    H: Tensor, least: Tensor | float = 0.0, leaf: int | None = None
) -> tuple[Tensor, Tensor]:
    """The inverse of H's Cholesky factor L, and where there is none.

    On a GPU large matrices are taken apart into halves, where nearly all operations are products
    of matrices: twice as fast as a factorisation and a triangular inverse of the whole.

    :param H: (..., in, in)
    :param least: (...) that the squares of L's diagonal entries must exceed
    :param leaf: the largest matrix that is factorised as a whole; by default what is fastest
    :return: (..., in, in) lower triangular ``L^-1``, and (...) bool
    """
    n = H.shape[-1]
    if leaf is None:
        leaf = _LEAF if H.is_cuda and H.dim() == 2 else n
    if n <= leaf:
        lower, info = torch.linalg.cholesky_ex(H)
        failed = (info > 0) | (lower.diagonal(dim1=-2, dim2=-1).amin(-1).square() <= least)
        eye = torch.eye(n, dtype=H.dtype, device=H.device)
        lower = torch.where(failed[..., None, None], eye, lower)
        return torch.linalg.solve_triangular(lower, eye.expand_as(lower), upper=False), failed
    half = n // 2
    # L = [[A, 0], [B, C]] has the inverse [[A^-1, 0], [-C^-1 B A^-1, C^-1]]
    top, top_failed = inverse_root(H[..., :half, :half], least, leaf)
    below = Factor(top.mT).after(H[..., half:, :half])
    rest = H[..., half:, half:] - Factor(below.mT).after(below)
    rest, rest_failed = inverse_root(rest, least, leaf)
    root = torch.zeros_like(H)
    root[..., :half, :half], root[..., half:, half:] = top, rest
    root[..., half:, :half] = -Factor(Factor(top).after(below)).after(rest)
    return root, top_failed | rest_failed


def square_of_root(root: Tensor, parts: int | None = None) -> Tensor:
    """``root^T root`` of a lower triangular (..., n, n) root, without most of the zeros' part.

    :param parts: how many blocks of rows it is made in; by default what is fastest
    """
    n = root.shape[-1]
    if parts is None:
        parts = 4 if root.is_cuda and n > _LEAF else 1
    if parts == 1:
        return Factor(root).after(root.mT.contiguous())
    result = torch.zeros_like(root)
    ends = [n * part // parts for part in range(parts + 1)]
    for start, end in pairwise(ends):
        below = root[..., start:, :]  # above these rows, columns from start on are zero
        columns = below[..., start:end].mT.contiguous()
        result[..., start:end, :end] = Factor(below[..., :end]).after(columns)
    return result.tril() + result.tril(-1).mT


def dense_target(weight: Tensor, gram: Tensor, cross: Tensor, inverse: InverseCholesky) -> Tensor:
    """The weight that gives the dense model's outputs from the inputs that a pruned prefix gives.

    ``W* = W (X_dense X^T + damp) (X X^T + damp)^-1`` is least squares of ``W X_dense`` on X with
    a ridge towards W: no change where the prefix changed nothing, nor for dead inputs. Prune W*
    or a mean of W and W* in place of W.

    :param weight: (..., out, in) dense
    :param gram: (..., in, in) ``X X^T`` of the inputs as they are now
    :param cross: (..., in, in) ``X_dense X^T``, rows by the dense input
    :param inverse: of ``gram``, dampened
    :return: (..., out, in) float32, float64 if the weight is
    :raises SparseSSMError: shapes that do not fit, or entries that are not finite
    """
    check(weight, gram)
    if cross.shape != gram.shape or not torch.isfinite(cross).all():
        raise SparseSSMError(
            f"the cross product must be finite and {tuple(gram.shape)}, got {tuple(cross.shape)}"
        )
    # Split products leave W*'s output within 2e-4 of itself if the sum's condition is 1e6.
    dtype = exact_dtype(gram, cross, weight)
    dense, U = weight.to(dtype), inverse.factor.to(dtype)
    moved = Factor(cross.to(dtype) - gram.to(dtype)).after(dense)
    change = Factor(U).after(Factor(U.mT).after(moved))
    return (dense + change).to(working_dtype(weight, gram))


def working_dtype(weight: Tensor, hessian: Tensor) -> torch.dtype:
    """float32, or float64 if either tensor is."""
    return torch.promote_types(torch.promote_types(weight.dtype, hessian.dtype), torch.float32)


# -- products on tensor cores ------------------------------------------------------------------


def gram(left: Tensor, right: Tensor) -> Tensor:
    """``sum left right^T`` over the calibration, on tensor cores where there are some.

    TF32 rounds every input by less than 2^-10 of itself, each on its own. That adds about
    ``2^-22 sum_j (w - w')_j^2 H_jj`` to the error that a pruned weight has with these sums,
    thousands of times less than dampening adds.

    Products of half precision are exact in float32.

    :param left: (tokens, in) float32, on CUDA also bfloat16 or float16
    :param right: likewise
    :return: (in, in) float32
    """
    if left.dtype.itemsize == 2:
        return torch.mm(left.T, right, out_dtype=torch.float32)
    with tf32():
        return left.T @ right


def window_gram(left: Tensor, right: Tensor, kernel: int, mask: Tensor | None = None) -> Tensor:
    """``sum left right^T`` over the windows that a causal depthwise convolution reads.

    :param left: (b, L, D), zero before its first position
    :param right: likewise
    :param kernel: K, width of a window
    :param mask: (b, L) bool, the outputs that count, or None for all
    :return: (D, K, K) float32
    """
    length, dtype = left.shape[1], summing_dtype(left)
    found = window_products(left, right, kernel, mask)
    if found is not None:
        return found.to(dtype)
    if mask is not None:  # outputs at padding are not used, though inputs there may be read
        left, right = (F.pad(x, (0, 0, kernel - 1, 0)) for x in (left, right))
        rows = []
        for i in range(kernel):
            seen = left[:, i : i + length] * mask[..., None]
            products = [
                (seen * right[:, j : j + length]).sum((0, 1), dtype=dtype) for j in range(kernel)
            ]
            rows.append(torch.stack(products, -1))
        return torch.stack(rows, -2)
    # An entry depends on the lag j - i, but for the last positions: K long sums, or 2 K - 1 of
    # two tensors, instead of K^2.
    result = torch.zeros(left.shape[-1], kernel, kernel, dtype=dtype, device=left.device)
    for lag in range(min(kernel, length)):
        _fill_diagonal(result, left, right, lag)
        if lag and left is not right:
            _fill_diagonal(result.mT, right, left, lag)
    return result.triu() + result.triu(1).mT if left is right else result


def _fill_diagonal(result: Tensor, left: Tensor, right: Tensor, lag: int) -> None:
    """Entries [:, j - lag, j] of :func:`window_gram`, for lag >= 0."""
    kernel, count = result.shape[-1], left.shape[1] - lag
    body = max(0, count - (kernel - 1))  # what all windows read
    products = left[:, : left.shape[1] - lag] * right[:, lag:]
    total = products[:, :body].sum((0, 1), dtype=summing_dtype(left))
    ends = left[:, body:count].to(result.dtype) * right[:, body + lag :].to(result.dtype)
    ends = ends.sum(0)
    for j in range(lag, kernel):
        read = max(0, count - (kernel - 1 - j) - body)
        result[:, j - lag, j] = total + ends[:read].sum(0)
