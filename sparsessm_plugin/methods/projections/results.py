"""What projection pruning did."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from sparsessm_plugin.methods.base import MethodResult
from sparsessm_plugin.methods.projections.permutation import PermutedAxis


@dataclass(frozen=True)
class PrunedProjection:
    """What became of one projection.

    :param name: of the layer, or of a parameter that stands alone in its mixer
    :param kind: its name in its mixer, or ``linear``
    :param shape: of its weight
    :param entries: of its weight
    :param pruned: entries that are zero now, those of earlier stages among them
    :param zero_before: entries that were zero before
    :param sparsity: share of ``pruned``
    :param hessian_trace: of the dense model's Hessian, over the tokens that were looked at for the
        allocation; None where nothing asked for it
    :param relative_error: ``|(W - W') X|^2 / |W X|^2`` for the inputs X that the pruned layers
        before leave, None without data; with a target other than ``own`` W' is not made to keep
        it small
    :param seconds: of its solver
    :param tokens: that it has seen
    :param shared_with: further layers that hold the weight
    """

    name: str
    kind: str
    shape: list[int]
    entries: int
    pruned: int
    zero_before: int
    sparsity: float
    hessian_trace: float | None
    relative_error: float | None
    seconds: float
    tokens: int
    shared_with: list[str]


@dataclass(frozen=True)
class ProjectionTotal:
    """Of all projections.

    :param first_pass_seconds: of looking at the dense model, and of choosing sparsities
    :param seconds: those, and what gathering and solving took
    """

    entries: int
    pruned: int
    sparsity: float
    first_pass_seconds: float
    seconds: float

    @classmethod
    def of_pruned(
        cls, layers: Sequence[PrunedProjection], first_pass_seconds: float, gather_seconds: float
    ) -> "ProjectionTotal":
        """Of all that were pruned."""
        entries = sum(layer.entries for layer in layers)
        pruned = sum(layer.pruned for layer in layers)
        solving = sum(layer.seconds for layer in layers)
        return cls(
            entries,
            pruned,
            pruned / entries if entries else 0.0,
            round(first_pass_seconds, 3),
            round(first_pass_seconds + gather_seconds + solving, 3),
        )


@dataclass(frozen=True)
class ProjectionResult(MethodResult):
    """Of projections: ``layers`` are :class:`PrunedProjection`.

    :param permuted: the orders of channels that were looked at
    """

    permuted: tuple[PermutedAxis, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        found = super().to_dict()
        for layer in found["layers"]:
            if not layer["shared_with"]:
                del layer["shared_with"]
        if self.permuted:
            found["permuted"] = [asdict(axis) for axis in self.permuted]
        return found
