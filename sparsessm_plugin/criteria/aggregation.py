"""From scores at every time step to one score an entry."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from sparsessm_plugin.criteria.scores import Saliency, SaliencyInputs
from sparsessm_plugin.selection.patterns import Pattern, Ranking

# Time steps that are scored at once, so that a GPU has a selection for each multiprocessor, and
# scores that are held at once: selecting from them takes several times their memory.
CHUNK = 128
ENTRIES = 2**24

DecayKind = Literal["power", "discount", "linear", "window"]


@dataclass(frozen=True)
class Decay:
    """Weights over time for ``time_weighted``, normalised to sum 1.

    :param kind: power: (t + 1)^-p; discount: gamma^t; linear: L - t; window: 1 in the first
        ``fraction`` of the steps, 0 after
    :param power: p of ``power``
    :param gamma: gamma of ``discount``
    :param fraction: share of the steps of ``window``
    """

    kind: DecayKind = "power"
    power: float = 1.0
    gamma: float = 0.9
    fraction: float = 0.25

    def weights(self, steps: int) -> Tensor:
        """(L,) float64 weights."""
        t = torch.arange(steps, dtype=torch.float64)
        if self.kind == "power":
            weights = (t + 1).pow(-self.power)
        elif self.kind == "discount":
            weights = torch.pow(torch.tensor(self.gamma, dtype=torch.float64), t)
        elif self.kind == "linear":
            weights = steps - t
        else:
            weights = (t < max(1, math.ceil(self.fraction * steps))).to(torch.float64)
        return weights / weights.sum()


def aggregate(
    saliency: Saliency,
    aggregation: str | None,
    inputs: SaliencyInputs,
    steps: int,
    pattern: Pattern,
    decay: Decay | None = None,
) -> Ranking:
    """Rank the entries of one layer.

    :param saliency: the criterion
    :param aggregation: one of its aggregations, None where there is no time axis
    :param inputs: A_log and the collected statistics, per step or summed over time
    :param steps: L, the number of time steps that were collected
    :param pattern: what ``frequency`` marks at every step
    :param decay: weights of ``time_weighted``
    """
    if aggregation is None:
        return Ranking(saliency.score(inputs))
    if aggregation == "mean" and saliency.additive:
        return Ranking(saliency.score(inputs) / max(steps, 1))  # already summed over time
    scores = _Scores(saliency, inputs, steps)
    return _AGGREGATIONS[aggregation](scores, pattern, decay or Decay())


class _Scores:
    """Per-step scores, produced a few time steps at a time."""

    def __init__(self, saliency: Saliency, inputs: SaliencyInputs, steps: int):
        self.saliency = saliency
        self.inputs = inputs
        self.steps = steps

    def __iter__(self) -> Iterator[tuple[int, Tensor]]:
        """First step and (T, D, N) scores of each chunk."""
        size = max(1, min(CHUNK, ENTRIES // self.inputs.A_log.numel()))
        for start in range(0, self.steps, size):
            stop = min(start + size, self.steps)
            yield start, self.saliency.score(self.inputs.steps(start, stop))

    def zeros(self) -> Tensor:
        return torch.zeros_like(self.inputs.A_log, dtype=torch.float64)


def _frequency(scores: _Scores, pattern: Pattern, decay: Decay) -> Ranking:
    """SparseSSM, Algorithm 1: mark the lowest at every step, prune the most often marked.

    A step at which every score is zero says nothing (the state before the first token is
    zero everywhere) and has no vote. Equal votes go to the lower summed score.
    """
    votes, total = scores.zeros(), scores.zeros()
    for _, chunk in scores:
        # a mask and no index: on a GPU, nothing waits for how many there are
        informative = chunk.amax(dim=(1, 2), keepdim=True) > 0
        votes += (pattern.lowest(chunk) & informative).sum(dim=0)
        total += chunk.sum(dim=0, dtype=torch.float64)
    return Ranking(-votes, tie_break=total)


def _time_weighted(scores: _Scores, pattern: Pattern, decay: Decay) -> Ranking:
    weights = decay.weights(scores.steps)
    total = scores.zeros()
    for start, chunk in scores:
        chunk_weights = weights[start : start + len(chunk)].to(chunk.device)
        total += torch.einsum("t,tdn->dn", chunk_weights, chunk.to(torch.float64))
    return Ranking(total)


def _mean(scores: _Scores, pattern: Pattern, decay: Decay) -> Ranking:
    total = scores.zeros()
    for _, chunk in scores:
        total += chunk.sum(dim=0, dtype=torch.float64)
    return Ranking(total / max(scores.steps, 1))


def _l2(scores: _Scores, pattern: Pattern, decay: Decay) -> Ranking:
    total = scores.zeros()
    for _, chunk in scores:
        total += chunk.to(torch.float64).square().sum(dim=0)
    return Ranking(total.sqrt())


_AGGREGATIONS: dict[str, Callable[[_Scores, Pattern, Decay], Ranking]] = {
    "frequency": _frequency,
    "time_weighted": _time_weighted,
    "mean": _mean,
    "l2": _l2,
}
