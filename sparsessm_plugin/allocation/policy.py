"""How many zeros each projection of a model gets, by the policy asked for."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from sparsessm_plugin.allocation.losses import curve_for, highest_for
from sparsessm_plugin.allocation.sparsity import (
    optimal_allocation,
    paper_allocation,
    uniform_allocation,
)

Policy = Literal["uniform", "paper", "optimal"]
# kinds that the paper's allocation varies: those at both ends of a mixer, under all their names
_VARYING = (
    *("in_proj", "out_proj", "in_proj_qkv", "in_proj_qkvz", "in_proj_z"),
    *("q_proj", "k_proj", "v_proj", "g_proj", "o_proj"),
)


@dataclass(frozen=True)
class Candidate:
    """A projection that is to get zeros.

    :param name: of the projection
    :param kind: its name in its mixer, or ``linear``
    :param entries: of its weight
    :param zeros: that are there already
    :param hessian_trace: of the dense model's Hessian; None where nothing asks for it
    :param losses: at the sparsities of :func:`curve_for`; None where nothing asks for them
    """

    name: str
    kind: str
    entries: int
    zeros: int
    hessian_trace: float | None = None
    losses: tuple[float, ...] | None = None


def zeros_suffice(candidates: Sequence[Candidate], sparsity: float) -> bool:
    """Whether there are as many zeros as are asked for, before any is made."""
    entries = sum(c.entries for c in candidates)
    return sum(c.zeros for c in candidates) >= sparsity * entries


def allocate(
    candidates: Sequence[Candidate], policy: Policy, sparsity: float, alpha: float | None
) -> dict[str, int]:
    """The zeros of each projection, by name.

    :param policy: ``uniform`` | ``paper``, by ``hessian_trace`` | ``optimal``, by ``losses``
    :param sparsity: share of zeros over all, in (0, 1)
    :param alpha: of ``paper``
    :raises SparseSSMError: see :func:`paper_allocation` and :func:`optimal_allocation`
    """
    if policy == "optimal":
        return dict(zip([c.name for c in candidates], _optimal(candidates, sparsity), strict=True))
    counts = uniform_allocation([c.entries for c in candidates], sparsity)
    zeros = dict(zip([c.name for c in candidates], counts, strict=True))
    if policy == "paper":
        assert alpha is not None
        for kind in _VARYING:
            own = [c for c in candidates if c.kind == kind]
            if own:
                traces = [c.hessian_trace or 0.0 for c in own]
                counts = paper_allocation(traces, [c.entries for c in own], sparsity, alpha)
                zeros.update(zip([c.name for c in own], counts, strict=True))
    return zeros


def _optimal(candidates: Sequence[Candidate], sparsity: float) -> list[int]:
    """Least summed divergence of the predicted tokens, by the error that SparseGPT leaves."""
    if zeros_suffice(candidates, sparsity):
        return [c.zeros for c in candidates]
    return optimal_allocation(
        curve_for(sparsity),
        [c.losses or () for c in candidates],
        [c.entries for c in candidates],
        sparsity,
        lowest=[c.zeros / c.entries for c in candidates],
        highest=highest_for(sparsity),
    )
