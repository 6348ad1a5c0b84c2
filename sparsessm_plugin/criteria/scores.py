"""Saliency scores of the entries of A_log: statistics in, scores out.

All scores share one signature and stand in one table, :data:`SALIENCIES`, which
:func:`register_saliency` fills. Lower means pruned first. With per-step statistics the result has a
leading time axis.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

from torch import Tensor

from sparsessm_plugin.recurrence.statistics import PrunedValue, StatisticsRequest
from sparsessm_plugin.registry import Registry

_Score = Callable[["SaliencyInputs"], Tensor]


@dataclass(frozen=True)
class SaliencyInputs:
    """What a score is computed from; leading dimensions (...) are () or (T,).

    :param A_log: (D, N) float32
    :param out_norm: (D,) norms of the columns of out_proj
    :param state_energy: (..., D, N) S_t, see :class:`StatisticsRequest`
    :param transition: (..., D, N) E_t
    :param output_error: (..., D, N)
    """

    A_log: Tensor
    out_norm: Tensor
    state_energy: Tensor | None = None
    transition: Tensor | None = None
    output_error: Tensor | None = None

    def steps(self, start: int, stop: int) -> "SaliencyInputs":
        """The same inputs for the time steps [start, stop)."""

        def cut(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor[start:stop]

        return replace(
            self,
            state_energy=cut(self.state_energy),
            transition=cut(self.transition),
            output_error=cut(self.output_error),
        )


@dataclass(frozen=True)
class Saliency:
    """One criterion.

    :param score: the scores of a layer
    :param statistics: the statistics it needs, before the aggregation has its say
    :param aggregations: how its scores may be aggregated over time, the default first;
        empty where there is no time axis
    :param additive: scores may be summed over time and batch while they are collected
    :param source: where it comes from
    """

    score: Callable[[SaliencyInputs], Tensor]
    statistics: StatisticsRequest
    aggregations: tuple[str, ...]
    additive: bool
    source: str

    @property
    def needs_data(self) -> bool:
        """Whether it looks at calibration data."""
        return self.statistics.needs_scan

    def request(self, aggregation: str | None, pruned_value: PrunedValue) -> StatisticsRequest:
        """The statistics to collect for an aggregation and a meaning of "pruned"."""
        request = self.statistics
        if request.output_error is not None:
            request = replace(request, output_error=pruned_value)
        per_step = request.needs_scan and not (self.additive and aggregation == "mean")
        return replace(request, per_step=per_step)


SALIENCIES: Registry[Saliency] = Registry("saliency of A_log", "sparsessm_plugin.criteria")
_OVER_TIME = ("frequency", "time_weighted", "mean", "l2")


def register_saliency(
    name: str,
    *,
    source: str,
    statistics: StatisticsRequest | None = None,
    aggregations: tuple[str, ...] = (),
    additive: bool = False,
) -> Callable[[_Score], _Score]:
    """Decorator: make a score known as a criterion for A_log; see :class:`Saliency`."""

    def register(score: _Score) -> _Score:
        entry = Saliency(score, statistics or StatisticsRequest(), aggregations, additive, source)
        SALIENCIES.register(name, entry)
        return score

    return register


@register_saliency("magnitude", source="baseline")
def magnitude(inputs: SaliencyInputs) -> Tensor:
    """abs(A_log)."""
    return inputs.A_log.abs()


@register_saliency(
    "hessian",
    source="SparseSSM paper, Theorem 1 and Algorithm 1",
    statistics=StatisticsRequest(state_energy=True),
    aggregations=_OVER_TIME,
    additive=True,
)
def hessian(inputs: SaliencyInputs) -> Tensor:
    """A_log^2 S_t: the diagonal Hessian of SparseSSM's Theorem 1 (arXiv 2506.09613)."""
    return inputs.A_log.square() * _need(inputs.state_energy)


@register_saliency(
    "transition",
    source="SparseSSM, the authors' published code",
    statistics=StatisticsRequest(state_energy=True, transition=True),
    aggregations=("time_weighted", "frequency", "mean", "l2"),
    additive=False,  # a product of two sums over the batch
)
def transition(inputs: SaliencyInputs) -> Tensor:
    """(sum_b exp(dt_t A))^2 S_t: what the authors of SparseSSM published as code."""
    return _need(inputs.transition).square() * _need(inputs.state_energy)


@register_saliency(
    "output_error",
    source="this package",
    statistics=StatisticsRequest(output_error="zero"),
    aggregations=("mean", "frequency", "time_weighted", "l2"),
    additive=True,
)
def output_error(inputs: SaliencyInputs) -> Tensor:
    """Squared change of the mixer's output when this entry alone is pruned.

    A is diagonal, so an entry's state depends on no other entry and one more recurrence
    gives every entry's exact effect on the gated scan output; out_proj enters through the
    norm of the channel's column, which leaves out only the products between channels.
    """
    return _need(inputs.output_error) * inputs.out_norm.square()[:, None]


def _need(statistic: Tensor | None) -> Tensor:
    if statistic is None:
        raise ValueError("the statistic that this saliency needs was not collected")
    return statistic
