"""What each state adds to a mixer's output: the sums from which states are chosen.

Shapes: T sampled steps, D channels, N states, G groups (1 in the Mamba-1 layout, but for Zamba);
h (T, D, N), C (T, G, N), u (T, D), weight (T, D).

A removed state n takes ``gain_t[d] C_{t,n} h_t[d,n]`` out of the input of out_proj. With v the
square of ``gain * norm(W_out[:, d])``, removing a set S costs ``1_S^T gram 1_S``: the squared
change of the mixer's output up to products between channels in W_out.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from sparsessm_plugin.registry import Registry


class StateStatistics:
    """Sums over sampled steps, in float64, filled batch by batch with :meth:`add`.

    :param mixing: also keep the sums over products of C rows and states, N^4 numbers, that
        mixing C needs; for one group only
    """

    def __init__(self, mixing: bool = False):
        self.wants_mixing = mixing
        self.samples = 0
        # (G, N, N) sum of v C_n h_n C_m h_m over the group's channels
        self.gram: Tensor | None = None
        # (D, N) sum of v u C_n h_n, and (D,) sum of v u^2: what the skip connection can take over
        self.skip: Tensor | None = None
        self.skip_energy: Tensor | None = None
        # (G, N) sums of h^2 over the group's channels and of C^2
        self.state_energy: Tensor | None = None
        self.C_energy: Tensor | None = None
        # (N, N, N, N) sum of v h_k h_q C_j C_i at [k, j, q, i]; (D, N, N) sum of v u h_k C_j
        self.mixing: Tensor | None = None
        self.mixing_skip: Tensor | None = None
        # (steps, G, N) sum over the batch of A_log^2 h^2, for the vote of the paper
        self.step_score: Tensor | None = None

    def add(self, h: Tensor, C: Tensor, u: Tensor, weight: Tensor) -> None:
        """Add sampled steps.

        :param h: (T, D, N) states
        :param C: (T, G, N)
        :param u: (T, D)
        :param weight: (T, D) gain * norm(W_out[:, d])
        """
        T, D, N = h.shape
        G = C.shape[1]
        self._add_inputs(C, u, weight)
        weighted = (h * weight[..., None]).view(T, G, D // G, N)
        products = weighted.transpose(-1, -2) @ weighted  # (T, G, N, N)
        self.gram = _plus(self.gram, torch.einsum("tgnm,tgn,tgm->gnm", products, C, C))
        driven = u * weight  # (T, D)
        each = weighted * C[:, :, None, :]  # (T, G, D / G, N)
        self.skip = _plus(self.skip, torch.einsum("td,tdn->dn", driven, each.reshape(T, D, N)))
        energy = h.square().view(T, G, D // G, N).sum((0, 2))
        self.state_energy = _plus(self.state_energy, energy)
        if self.wants_mixing:
            pairs = (C[:, 0, :, None] * C[:, 0, None, :]).flatten(1)  # (T, N * N) at [j, i]
            sums = (products[:, 0].flatten(1).T @ pairs).view(N, N, N, N)  # [k, q, j, i]
            self.mixing = _plus(self.mixing, sums.permute(0, 2, 1, 3))
            skip = torch.einsum("td,tdk,tj->dkj", driven, weighted.view(T, D, N), C[:, 0])
            self.mixing_skip = _plus(self.mixing_skip, skip)

    def add_products(
        self, products: tuple[Tensor, Tensor, Tensor], C: Tensor, u: Tensor, weight: Tensor
    ) -> None:
        """Add sampled steps without their states, and nothing for mixing.

        :param products: what :func:`sparsessm_plugin.recurrence.scan_products` returned; the other
            parameters as in :meth:`add`
        """
        gram, skip, state_energy = products
        self._add_inputs(C, u, weight)
        self.gram = _plus(self.gram, gram)
        self.skip = _plus(self.skip, skip)
        self.state_energy = _plus(self.state_energy, state_energy)

    def _add_inputs(self, C: Tensor, u: Tensor, weight: Tensor) -> None:
        self.samples += len(C)
        self.skip_energy = _plus(self.skip_energy, (u * weight).square().sum(0))
        self.C_energy = _plus(self.C_energy, C.square().sum(0))

    def add_steps(self, score: Tensor) -> None:
        """Add one batch to the score that the paper's vote looks at.

        :param score: (steps, G, N); sequences may differ in length from batch to batch
        """
        if self.step_score is None:
            self.step_score = score.double()
            return
        short, long = sorted((self.step_score, score.double()), key=len)
        long = long.clone()
        long[: len(short)] += short
        self.step_score = long

    def is_finite(self) -> bool:
        """Whether every sum is a finite number."""
        kept = (v for v in vars(self).values() if isinstance(v, Tensor))
        return all(bool(torch.isfinite(t).all()) for t in kept)


def _plus(total: Tensor | None, value: Tensor) -> Tensor:
    return value.double() if total is None else total + value.double()


@dataclass(frozen=True)
class StateInputs:
    """What a score of whole states may use.

    :param statistics: sums of the calibration; None for scores that need no data
    :param B_norm: (G, N) norm of the projection's row that makes B_n
    :param C_norm: (G, N) likewise for C_n
    :param remove: states that go, in each group
    """

    statistics: StateStatistics | None
    B_norm: Tensor
    C_norm: Tensor
    remove: int


@dataclass(frozen=True)
class StateCriterion:
    """How states are chosen.

    :param score: (G, N), lower goes first; None where sets of states are judged together by
        what each pair of them adds (:mod:`sparsessm_plugin.selection.subsets`)
    :param statistics: the fields of :class:`StateStatistics` that it reads; empty if it needs
        no data
    """

    score: Callable[[StateInputs], Tensor] | None
    statistics: frozenset[str] = frozenset()

    @property
    def needs_data(self) -> bool:
        """Whether it looks at calibration data."""
        return bool(self.statistics)

    @property
    def needs_steps(self) -> bool:
        """Whether it needs the scores of every step, which are kept for nobody else."""
        return "step_score" in self.statistics


STATE_CRITERIA: Registry[StateCriterion] = Registry(
    "saliency of states", "sparsessm_plugin.criteria"
)
STATE_CRITERIA.register("output_energy", StateCriterion(None, frozenset({"gram"})))


def register_state_criterion(
    name: str, *statistics: str
) -> Callable[[Callable[[StateInputs], Tensor]], Callable[[StateInputs], Tensor]]:
    """Decorator: make a score known as a criterion for states.

    :param statistics: see :class:`StateCriterion`
    """

    def register(score: Callable[[StateInputs], Tensor]) -> Callable[[StateInputs], Tensor]:
        STATE_CRITERIA.register(name, StateCriterion(score, frozenset(statistics)))
        return score

    return register


@register_state_criterion("magnitude")
def magnitude(inputs: StateInputs) -> Tensor:
    """norm(B row) * norm(C row)."""
    return inputs.B_norm * inputs.C_norm


@register_state_criterion("last")
def last(inputs: StateInputs) -> Tensor:
    """The last states score lowest: a baseline that looks at nothing."""
    order = torch.arange(inputs.B_norm.shape[1], 0, -1, dtype=torch.float64)
    return order.to(inputs.B_norm.device).expand_as(inputs.B_norm)


@register_state_criterion("paper", "step_score")
def paper(inputs: StateInputs) -> Tensor:
    """SparseSSM's structured pruning (arXiv 2506.09613; ``structure_ts`` in its code).

    At every step the states with the lowest ``sum over channels of A_log^2 h_t^2`` get a vote;
    those with the most votes go. Ties go to the lower summed score. Steps at which every
    sequence is padding have no vote.
    """
    statistics = inputs.statistics
    assert statistics is not None
    assert statistics.step_score is not None
    score = statistics.step_score  # (steps, G, N)
    lowest = score.argsort(dim=-1, stable=True)[..., : inputs.remove]
    votes = torch.zeros_like(score).scatter_(-1, lowest, 1.0)
    votes = (votes * (score.sum(-1, keepdim=True) > 0)).sum(0)  # (G, N)
    total = score.sum(0)
    order = total.argsort(dim=-1, stable=True)
    rank = order.argsort(dim=-1).double() / total.shape[-1]  # a permutation: nothing is equal
    return rank - votes


@register_state_criterion("ghost", "state_energy", "C_energy")
def controllability_observability(inputs: StateInputs) -> Tensor:
    """mean of h_n^2 times mean of C_n^2 in each group.

    After GHOST (arXiv 2602.11408), which measures controllability and observability jointly
    from forward passes; this is our reading of its abstract, not its code.
    """
    statistics = inputs.statistics
    assert statistics is not None
    assert statistics.state_energy is not None
    assert statistics.C_energy is not None
    return statistics.state_energy * statistics.C_energy


def lowest(score: Tensor, remove: int) -> list[int]:
    """Flat indices of the lowest scores, as many in each group.

    :param score: (G, N)
    :param remove: how many go in each group
    :return: ascending indices into G * N; ties go to the lower index
    """
    N = score.shape[1]
    chosen = score.argsort(dim=1, stable=True)[:, :remove]
    offsets = torch.arange(len(score), device=score.device)[:, None] * N
    return sorted((chosen + offsets).flatten().tolist())
