"""Which part of a space stays: a subspace by descent, or entries one after the other."""

from collections.abc import Callable

import torch
from torch import Tensor

_DAMPING = 1e-6  # of a covariance, relative to its mean diagonal entry


def best_subspace(loss: Callable[[Tensor], Tensor], start: Tensor, steps: int) -> Tensor:
    """The subspace with the least loss near the one that a basis spans.

    :param loss: of a basis (M, K), differentiable; depends on the space that it spans alone
    :param start: (M, K) float64, orthonormal
    :param steps: of L-BFGS
    :return: (M, K) orthonormal; the start, if no step has helped
    """
    basis = start.detach().clone().contiguous().requires_grad_(True)
    optimizer = torch.optim.LBFGS(
        [basis], max_iter=steps, history_size=10, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = loss(basis)
        value.backward()
        return value

    with torch.inference_mode(False), torch.enable_grad():
        before = float(loss(basis.detach()))
        optimizer.step(closure)
    found = torch.linalg.qr(basis.detach()).Q
    return found if float(loss(found)) < before else start


def best_entries(fitted: list[tuple[Tensor, Tensor]], pairs: Tensor, keep: int) -> Tensor:
    """Which entries stay, by greedy elimination of those that cost least.

    :param fitted: covariance C and metric G, (M, M) each, of everything that is fitted again:
        losing S costs tr(G e e^T) of what the rest cannot tell of n (optimal brain surgeon)
    :param pairs: (M, M) cost of what is not: losing S costs the sum over S x S
    :param keep: K
    :return: (K,) ascending
    """
    gone = torch.zeros(len(pairs), dtype=torch.bool, device=pairs.device)
    inverses, metrics = [], []
    for covariance, metric in fitted:
        damping = _DAMPING * covariance.diagonal().mean() + 1e-30
        inverses.append(torch.linalg.inv(covariance + damping * torch.eye(len(pairs)).to(pairs)))
        metrics.append(metric.clone())
    lost = pairs.diagonal().clone()  # by each entry, beside those that are gone
    for _ in range(len(pairs) - keep):
        cost = lost.clone()
        for inverse, metric in zip(inverses, metrics, strict=True):
            cost += metric.diagonal() / inverse.diagonal().clamp(min=1e-300)
        i = int(cost.masked_fill(gone, torch.inf).argmin())
        gone[i] = True
        lost += pairs[i] + pairs[:, i]
        for k, (inverse, metric) in enumerate(zip(inverses, metrics, strict=True)):
            through, column = inverse[i] / inverse[i, i], metric[:, i].clone()
            metric -= torch.outer(column, through) + torch.outer(through, column)
            metric += column[i] * torch.outer(through, through)
            inverses[k] = inverse - torch.outer(inverse[:, i], through)
            inverses[k][i, i] = 1
    return (~gone).nonzero().flatten()


def leading_subspace(operators: list[Tensor], keep: int) -> Tensor:
    """The orthonormal basis (M, K) of the space in which a sum of symmetric operators is largest.

    :param operators: (M, M) each, positive semidefinite
    """
    total = torch.stack([(o + o.T) / 2 for o in operators]).sum(0)
    return torch.linalg.eigh(total).eigenvectors.flip(1)[:, :keep].contiguous()
