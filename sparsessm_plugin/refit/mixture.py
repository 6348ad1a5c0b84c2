"""Rows of B and of C as mixtures of the old ones, fitted together.

In the Mamba-1 layout the scan output is linear in the rows of B and linear in those of C. With
kept transitions k, rows ``B'_k = sum_j P_kj B_j`` and ``C'_k = sum_i Q_ki C_i`` it becomes

    y' = sum_k sum_j sum_i P_kj Q_ki (C_i h_kj) + D u

where h_kj runs with transition k and is driven by B_j. The Gram matrix of the features C_i h_kj
and their products with the dense y - D u are all that the data is needed for: P and Q are then
fitted in turn, each a small least squares problem, as often as it takes, and one set of
transitions is compared with another.

Shapes: K kept transitions, N states; features stand at [k, j, i].
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from sparsessm_plugin.refit.compensation import skip_update, without_skip

RIDGE = 1e-4  # of each diagonal entry
_EXACT = 1e-6  # cost of a fit that few tokens cannot tell from an exact one


@dataclass(frozen=True)
class MixtureProblem:
    """Sums over the calibration steps, float64.

    :param gram: (K, N, N, K, N, N) of the features
    :param cross: (K, N, N) of the features with the dense output
    :param energy: sum of the dense output's square
    """

    gram: Tensor
    cross: Tensor
    energy: float

    def of(self, kept: Tensor) -> "MixtureProblem":
        """The problem with these transitions only, (K',) indices."""
        return MixtureProblem(self.gram[kept][:, :, :, kept], self.cross[kept], self.energy)


class MixtureStatistics:
    """Sums of a :class:`MixtureProblem`, in float64, filled with :meth:`add`.

    The states are K N: transition k driven by B_j, at index ``k N + j``.
    """

    def __init__(self) -> None:
        # (K N K N, N N) sum of v h_kj h_ql C_i C_m at [(k, j, q, l), (i, m)]
        self.products: Tensor | None = None
        # (K N, N) sum of v y h_kj C_i, and the sum of v y^2
        self.cross: Tensor | None = None
        self.energy: Tensor | None = None
        # (D, K N, N) sum of v u h_kj C_i; (D,) sums of v u y and v u^2
        self.skip: Tensor | None = None
        self.skip_cross: Tensor | None = None
        self.skip_energy: Tensor | None = None

    def add(self, h: Tensor, C: Tensor, u: Tensor, weight: Tensor, y: Tensor) -> None:
        """Add sampled steps.

        :param h: (T, D, K N) states
        :param C: (T, N)
        :param u: (T, D)
        :param weight: (T, D) gain * norm(W_out[:, d])
        :param y: (T, D) dense output of the recurrence, without the skip connection
        """
        weighted = h * weight[..., None]
        products = weighted.transpose(1, 2) @ weighted  # (T, K N, K N)
        pairs = (C[:, :, None] * C[:, None, :]).flatten(1)
        self.products = _plus(self.products, products.flatten(1).T @ pairs)
        output, driven = y * weight, u * weight
        along = (weighted * output[..., None]).sum(1)  # (T, K N)
        self.cross = _plus(self.cross, along.T @ C)
        self.energy = _plus(self.energy, output.square().sum())
        skip = (weighted * driven[..., None]).flatten(1).T @ C  # (D K N, N)
        self.skip = _plus(self.skip, skip.view(h.shape[1], h.shape[2], -1))
        self.skip_cross = _plus(self.skip_cross, (driven * output).sum(0))
        self.skip_energy = _plus(self.skip_energy, driven.square().sum(0))

    def problem(self, with_D: bool) -> MixtureProblem:
        """What P and Q must solve.

        :param with_D: leave out what a refitted D takes over
        """
        assert self.products is not None
        assert self.cross is not None
        assert self.energy is not None
        assert self.skip is not None
        assert self.skip_cross is not None
        assert self.skip_energy is not None
        states, N = self.cross.shape
        gram = self.products.view(states, states, N, N).permute(0, 2, 1, 3)
        gram = gram.reshape(states * N, states * N)
        cross, energy = self.cross.flatten(), self.energy
        if with_D:
            skip = self.skip.flatten(1)
            gram = without_skip(gram, skip, self.skip_energy)
            cross = cross - skip.T @ skip_update(self.skip_cross, self.skip_energy)
            energy = energy - self.skip_cross @ skip_update(self.skip_cross, self.skip_energy)
        shape = (states // N, N, N)
        return MixtureProblem(gram.view(*shape, *shape), cross.view(shape), float(energy))


def fit_mixtures(
    problem: MixtureProblem,
    P: Tensor,
    Q: Tensor,
    rounds: int,
    tolerance: float = 0.0,
    ridge: float = RIDGE,
) -> tuple[Tensor, Tensor, float]:
    """Fit the mixtures of C and of B in turn (alternating least squares).

    :param P: (K, N) mixture of B to start from
    :param Q: (K, N) mixture of C to start from
    :param rounds: times that both are fitted, at most
    :param tolerance: stop once a round lowers the cost by less than this share of it
    :param ridge: relative to each diagonal entry; pulls towards the round before, so that
        a direction in which the data says nothing stays
    :return: P, Q and the cost that is left, relative to the dense output's energy
    """
    cost = float("inf")
    for _ in range(rounds):
        before = cost
        by_P = torch.einsum("kjiqlm,ql->kjiqm", problem.gram, P)
        A = torch.einsum("kjiqm,kj->kiqm", by_P, P)
        Q, _ = _solve(A, torch.einsum("kji,kj->ki", problem.cross, P), Q, problem.energy, ridge)
        by_Q = torch.einsum("kjiqlm,qm->kjiql", problem.gram, Q)
        A = torch.einsum("kjiql,ki->kjql", by_Q, Q)
        b = torch.einsum("kji,ki->kj", problem.cross, Q)
        P, cost = _solve(A, b, P, problem.energy, ridge)
        # rounds that go on where nothing is left to fit only follow rounding, to any size
        if before - cost <= tolerance * cost or cost <= _EXACT:
            break
    return P, Q, cost


def _solve(
    A: Tensor, b: Tensor, start: Tensor, energy: float, ridge: float
) -> tuple[Tensor, float]:
    """The (K, N) coefficients with the least cost near ``start``, and that cost."""
    size = start.numel()
    A, b, x = A.reshape(size, size), b.flatten(), start.flatten()
    diagonal = A.diagonal()
    damping = ridge * diagonal + 1e-8 * diagonal.mean() + 1e-30
    x = x + torch.linalg.solve(A + torch.diag(damping), b - A @ x)
    left = energy - 2 * float(b @ x) + float(x @ (A @ x))
    return x.view_as(start), left / energy if energy > 0 else 0.0


def best_mixture(
    problem: MixtureProblem, candidates: Tensor, rounds: int, tolerance: float
) -> tuple[Tensor, Tensor, Tensor, float]:
    """The set of transitions that, with B and C fitted to it, costs least.

    :param problem: over all N transitions
    :param candidates: (sets, K) sets to compare
    :param rounds: rounds of :func:`fit_mixtures` for each
    :param tolerance: see :func:`fit_mixtures`
    :return: the set (K,), P and Q (K, N), and the cost
    """
    unit = torch.eye(len(problem.cross), dtype=problem.cross.dtype, device=problem.cross.device)
    best: tuple[Tensor, Tensor, Tensor, float] | None = None
    for kept in candidates:
        rows = unit[kept]
        P, Q, cost = fit_mixtures(problem.of(kept), rows, rows, rounds, tolerance)
        if best is None or cost < best[3]:
            best = kept, P, Q, cost
    assert best is not None
    return best


def _plus(total: Tensor | None, value: Tensor) -> Tensor:
    return value.double() if total is None else total + value.double()
