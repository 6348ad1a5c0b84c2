"""Which key dims of a gated delta net go: scores, and the sums that they read.

Shapes: G key heads, dk entries of a key and of a query. Keys and queries are normalised, so that
a key dim which is removed changes what the others say.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from sparsessm_plugin.registry import Registry
from sparsessm_plugin.selection.subsets import choose

_EPSILON = 1e-9  # of the mean diagonal entry of a Gram matrix, so that it has a triangular root
_SWAP = 1.2  # how much larger the volume of the kept columns must become for a swap
_MOST_SWAPS = 1000


class KeyDimStatistics:
    """Sums over the calibration steps, in float64, filled batch by batch with :meth:`add`."""

    def __init__(self) -> None:
        # (G, dk) sum of |q_i k_i|
        self.products: Tensor | None = None
        # (G, dk, dk) sums of q q^T and of k k^T
        self.q_gram: Tensor | None = None
        self.k_gram: Tensor | None = None

    def add(self, q: Tensor, k: Tensor) -> None:
        """Add steps.

        :param q: (T, G, dk) normalised queries
        :param k: (T, G, dk) normalised keys
        """
        self.products = _plus(self.products, (q * k).abs().sum(0))
        self.q_gram = _plus(self.q_gram, torch.einsum("tgi,tgj->gij", q, q))
        self.k_gram = _plus(self.k_gram, torch.einsum("tgi,tgj->gij", k, k))

    def is_finite(self) -> bool:
        """Whether every sum is a finite number."""
        kept = (v for v in vars(self).values() if isinstance(v, Tensor))
        return all(bool(torch.isfinite(t).all()) for t in kept)


@dataclass(frozen=True)
class KeyDimInputs:
    """What a score of key dims may use.

    :param statistics: sums of the calibration; None for scores that need no data
    :param q_norm: (G, dk) norm of the projection's row that makes an entry of the query
    :param k_norm: (G, dk) likewise of the key
    :param remove: key dims that go, in each key head
    """

    statistics: KeyDimStatistics | None
    q_norm: Tensor
    k_norm: Tensor
    remove: int


@dataclass(frozen=True)
class KeyDimCriterion:
    """How key dims are chosen.

    :param score: (G, dk), lower goes first; None where sets that other criteria propose are
        judged by what they do to the mixer's output
    :param statistics: the fields of :class:`KeyDimStatistics` that it reads; empty if it needs
        no data
    """

    score: Callable[[KeyDimInputs], Tensor] | None
    statistics: frozenset[str] = frozenset()

    @property
    def needs_data(self) -> bool:
        """Whether it looks at calibration data."""
        return self.score is None or bool(self.statistics)


KEY_DIM_CRITERIA: Registry[KeyDimCriterion] = Registry(
    "saliency of key dims", "sparsessm_plugin.criteria"
)
KEY_DIM_CRITERIA.register("output_energy", KeyDimCriterion(None))


def register_key_dim_criterion(
    name: str, *statistics: str
) -> Callable[[Callable[[KeyDimInputs], Tensor]], Callable[[KeyDimInputs], Tensor]]:
    """Decorator: make a score known as a criterion for key dims.

    :param statistics: see :class:`KeyDimCriterion`
    """

    def register(score: Callable[[KeyDimInputs], Tensor]) -> Callable[[KeyDimInputs], Tensor]:
        KEY_DIM_CRITERIA.register(name, KeyDimCriterion(score, frozenset(statistics)))
        return score

    return register


@register_key_dim_criterion("magnitude")
def magnitude(inputs: KeyDimInputs) -> Tensor:
    """norm(q row) * norm(k row)."""
    return inputs.q_norm * inputs.k_norm


@register_key_dim_criterion("last")
def last(inputs: KeyDimInputs) -> Tensor:
    """The last key dims score lowest: a baseline that looks at nothing."""
    order = torch.arange(inputs.q_norm.shape[1], 0, -1, dtype=torch.float64)
    return order.to(inputs.q_norm.device).expand_as(inputs.q_norm)


@register_key_dim_criterion("random")
def random(inputs: KeyDimInputs) -> Tensor:
    """Drawn anew for each key head, the same in every run and mixer: a baseline."""
    drawn = torch.rand(inputs.q_norm.shape, generator=torch.Generator().manual_seed(0))
    return drawn.to(inputs.q_norm.device)


@register_key_dim_criterion("qk", "products")
def query_key(inputs: KeyDimInputs) -> Tensor:
    """E |q_i k_i| of normalised queries and keys of the same step."""
    statistics = inputs.statistics
    assert statistics is not None
    assert statistics.products is not None
    return statistics.products


@register_key_dim_criterion("pairs", "q_gram", "k_gram")
def pairs_of_steps(inputs: KeyDimInputs) -> Tensor:
    """The set whose loss changes q_t k_s and k_t k_s least, over all pairs of steps t and s.

    The delta rule reads queries and keys in these products alone. Removing a set S changes them by
    ``1_S^T (Q * K + K * K) 1_S`` in square, with Q and K the Gram matrices, before anything is
    normalised anew. One for what stays, zero for the others.
    """
    q_gram, k_gram = _grams(inputs)
    score = torch.ones(q_gram.shape[:2], device=q_gram.device)
    for head, (Q, K) in enumerate(zip(q_gram, k_gram, strict=True)):
        score[head, choose((Q * K + K * K).cpu(), inputs.remove).to(score.device)] = 0.0
    return score


@register_key_dim_criterion("rrqr", "q_gram", "k_gram")
def rank_revealing(inputs: KeyDimInputs) -> Tensor:
    """Strong rank-revealing QR of each head's queries and keys (after arXiv 2602.04852).

    The columns of the matrix with a row for each query and key of the calibration that span it
    best stay: one for these, zero for the others. Our reading of the paper, not its code.
    """
    q_gram, k_gram = _grams(inputs)
    score = torch.zeros(q_gram.shape[:2], device=q_gram.device)
    for head, gram in enumerate(q_gram + k_gram):
        score[head, strong_rrqr(gram, len(gram) - inputs.remove)] = 1.0
    return score


def _grams(inputs: KeyDimInputs) -> tuple[Tensor, Tensor]:
    statistics = inputs.statistics
    assert statistics is not None
    assert statistics.q_gram is not None
    assert statistics.k_gram is not None
    return statistics.q_gram, statistics.k_gram


def strong_rrqr(gram: Tensor, keep: int, factor: float = _SWAP) -> list[int]:
    """Columns that a strong rank-revealing QR puts first (Gu and Eisenstat 1996, algorithm 4).

    Pivoted QR first; then a column in front is swapped with one behind it as long as that makes
    the volume of those in front larger by more than a factor.

    :param gram: (n, n) A^T A of the matrix A whose columns are chosen
    :param keep: columns in front, 1 to n - 1
    :param factor: f of the paper, more than 1
    :return: ascending indices
    """
    gram = gram.double().cpu()
    n = len(gram)
    gram = gram + _EPSILON * gram.diagonal().mean().clamp(min=1e-30) * torch.eye(n).double()
    order = _pivots(gram, keep)
    for _ in range(_MOST_SWAPS):
        R = torch.linalg.cholesky(gram[order][:, order]).T
        inverse = torch.linalg.inv(R[:keep, :keep])
        coupling = inverse @ R[:keep, keep:]  # (keep, n - keep)
        rows, columns = inverse.norm(dim=1), R[keep:, keep:].norm(dim=0)
        growth = coupling.square() + (rows[:, None] * columns[None, :]).square()
        best = int(growth.argmax())
        if float(growth.flatten()[best]) <= factor**2:
            break
        i, j = best // (n - keep), keep + best % (n - keep)
        order[i], order[j] = order[j], order[i]
    return sorted(order[:keep])


def _pivots(gram: Tensor, keep: int) -> list[int]:
    """The order of a QR with column pivoting, as far as it matters."""
    left = gram.clone()  # what the columns in front do not span
    order: list[int] = []
    for _ in range(keep):
        diagonal = left.diagonal().clone()
        diagonal[order] = -torch.inf
        i = int(diagonal.argmax())
        order.append(i)
        left = left - torch.outer(left[:, i], left[i]) / left[i, i].clamp(min=1e-300)
    return order + [i for i in range(len(gram)) if i not in order]


def _plus(total: Tensor | None, value: Tensor) -> Tensor:
    return value.double() if total is None else total + value.double()
