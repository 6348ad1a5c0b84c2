"""What the remaining weights can take over from removed states, in closed form.

The input of out_proj loses ``gain C_n h_n`` for every removed n. It is fitted again, by least
squares over the calibration steps, in what stock weights can express:

- D: ``D_d += a_d`` adds ``gain a_d u_d``.
- C: a kept row may be any mixture of the old ones, ``C'_k = sum_j M_kj C_j``, which adds
  features ``gain h_k C_j``. Their Gram matrix is
  ``sum_t (sum_d v h_k h_q) C_j C_i``: no tensor with a time, a channel and two state axes.
- out_proj: linear regression of the dense mixer's output on the smaller mixer's out_proj input.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

C_RIDGE = 1e-4  # of each diagonal entry
# of out_proj, relative to the mean diagonal entry; with little text the strong ones win
RIDGES = (1e-3, 1e-2, 1e-1, 1.0, 10.0)
USUAL_RIDGE = 1e-2


def without_skip(gram: Tensor, skip: Tensor, skip_energy: Tensor) -> Tensor:
    """The Gram matrix of what a refitted D cannot take over.

    :param gram: (F, F) over features, summed over channels
    :param skip: (D, F) sum over time of feature times the signal that D multiplies; one row
        for every entry of D
    :param skip_energy: (D,) sum of that signal's square
    :return: gram - sum_d skip_d skip_d^T / skip_energy_d
    """
    return gram - skip.T @ (skip * _inverse(skip_energy)[:, None])


def skip_update(lost: Tensor, skip_energy: Tensor) -> Tensor:
    """What to add to D.

    :param lost: (D,) sum over time of the lost signal times the signal that D multiplies
    :param skip_energy: (D,) sum of the latter's square
    """
    return lost * _inverse(skip_energy)


def _inverse(energy: Tensor) -> Tensor:
    # a channel that never carries a signal needs no skip connection
    tiny = torch.finfo(energy.dtype).tiny
    return torch.where(energy > tiny, 1 / energy.clamp(min=tiny), torch.zeros_like(energy))


def mix_C(mixing: Tensor, kept: Tensor, ridge: float = C_RIDGE) -> tuple[Tensor, Tensor]:
    """The rows of C that express the whole scan output with the kept states only.

    :param mixing: (N, N, N, N) Gram matrix of the features h_k C_j at [k, j, q, i]
    :param kept: (sets, K) indices of the states that stay; several sets at once
    :param ridge: relative to each diagonal entry; pulls towards the rows as they are
    :return: M (sets, K, N), and the cost that is left (sets,), relative to nothing
    """
    N = len(mixing)
    K = kept.shape[1]
    flat = mixing.reshape(N * N, N * N)
    columns = torch.arange(N, device=kept.device)
    index = (kept[:, :, None] * N + columns).flatten(1)  # (sets, K N) features that stay
    unit = torch.eye(N, dtype=flat.dtype, device=flat.device).flatten()  # the dense output
    A = flat[index[:, :, None], index[:, None, :]]  # (sets, K N, K N)
    target = flat @ unit  # (N N,) feature times dense output
    start = unit[index]  # rows as they are
    rhs = target[index] - (A @ start[..., None])[..., 0]
    diagonal = A.diagonal(dim1=-2, dim2=-1)
    damping = ridge * diagonal + 1e-8 * diagonal.mean(-1, keepdim=True) + 1e-30
    M = start + torch.linalg.solve(A + torch.diag_embed(damping), rhs[..., None])[..., 0]
    left = unit @ target - 2 * (M * target[index]).sum(-1)
    left = left + (M * (A @ M[..., None])[..., 0]).sum(-1)
    return M.view(-1, K, N), left


def ridge_update(gram: Tensor, cross: Tensor, ridge: float) -> Tensor:
    """The change of a weight that fits an error best.

    :param gram: (in, in) sum of x x^T over the calibration
    :param cross: (out, in) sum of error x^T
    :param ridge: relative to the mean diagonal entry; pulls towards no change
    :return: (out, in)
    """
    damping = ridge * gram.diagonal().mean() + 1e-30
    damped = gram + damping * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    return torch.cholesky_solve(cross.T, torch.linalg.cholesky(damped)).T


class Regression:
    """Sums for the change of a weight (out, in) that takes up an error, in float64."""

    def __init__(self, weight: Tensor) -> None:
        out_features, in_features = weight.shape
        new: dict[str, Any] = {"dtype": torch.float64, "device": weight.device}
        self.gram = torch.zeros(in_features, in_features, **new)
        self.cross = torch.zeros(out_features, in_features, **new)

    def add(self, x: Tensor, error: Tensor) -> None:
        """Add inputs (..., in) and the errors (..., out) that the weight leaves there."""
        x, error = x.flatten(0, -2), error.flatten(0, -2)
        self.gram += (x.T @ x).double()
        self.cross += (error.T @ x).double()

    def __add__(self, other: "Regression") -> "Regression":
        total = Regression(self.cross)
        total.gram, total.cross = self.gram + other.gram, self.cross + other.cross
        return total

    def solve(self, ridge: float) -> Tensor:
        """(out, in) change of the weight; see :func:`ridge_update`."""
        return ridge_update(self.gram, self.cross, ridge)

    def gain(self, change: Tensor) -> float:
        """How much of the squared error a change of the weight takes away."""
        return float((change * (2 * self.cross - change @ self.gram)).sum())


def best_ridge(fitted: Regression, held: Regression, ridges: Sequence[float]) -> float | None:
    """The ridge whose fit to one part of the data helps the other part most.

    :return: one of ``ridges``; None if every fit makes the other part worse
    """
    gains = {ridge: held.gain(fitted.solve(ridge)) for ridge in ridges}
    best = max(gains, key=lambda ridge: gains[ridge])
    return best if gains[best] > 0 else None
