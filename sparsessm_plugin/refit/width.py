"""What reads a narrower residual stream, fitted to what it read of the wide one.

Notation as in :mod:`sparsessm_plugin.criteria.hidden`: n is what a norm makes of the stream
before its weight, V (M, K) what the narrow stream keeps, C = E n n^T.
"""

import torch
from torch import Tensor


def narrow_scale(covariance: Tensor, basis: Tensor) -> float:
    """Root mean square of the narrow stream where that of the wide one is 1.

    The norm of the narrow stream gives V^T n over this, so its weight takes it up.

    :param covariance: (M, M)
    :param basis: (M, K)
    """
    energy = ((covariance @ basis) * basis).sum() / basis.shape[1]
    return float(energy.clamp(min=0).sqrt())


def lift(covariance: Tensor, basis: Tensor, ridge: float) -> Tensor:
    """B (M, K) with the least E |n - B V^T n|^2: a reader W of n becomes W B.

    :param covariance: (M, M)
    :param basis: (M, K)
    :param ridge: relative to the mean diagonal entry of V^T C V; pulls towards :func:`expand`
    """
    plain = expand(basis)
    across = covariance @ basis
    inner = basis.T @ across
    error = across - plain @ inner
    damping = ridge * inner.diagonal().mean() + 1e-30
    damped = inner + damping * torch.eye(len(inner), dtype=inner.dtype, device=inner.device)
    return plain + torch.cholesky_solve(error.T, torch.linalg.cholesky(damped)).T


def expand(basis: Tensor) -> Tensor:
    """(M, K) what takes V^T n back into the wide stream, with nothing in the rest of it."""
    return basis @ torch.linalg.inv(basis.T @ basis)


def repeated(basis: Tensor, times: int) -> Tensor:
    """(times M, times K) for a norm over several copies of the stream, one after the other."""
    return torch.block_diag(*[basis] * times)
