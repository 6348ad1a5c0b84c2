"""Inverses of Hessians, each computed once for all projections that read the same input."""

from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress

import torch
from torch import Tensor

from sparsessm_plugin import distributed
from sparsessm_plugin.backends.lanes import Lane
from sparsessm_plugin.errors import SparseSSMError
from sparsessm_plugin.methods.projections.settings import ProjectionSettings
from sparsessm_plugin.methods.projections.statistics import StageSums
from sparsessm_plugin.solvers.objective import InverseCholesky, damped_inverse_cholesky
from sparsessm_plugin.solvers.projections import SOLVERS

_LANE = 1  # ALPS has another


class Inverses:
    """The last Hessian's inverse, and those computed ahead.

    Projections that share a Hessian are solved one after the other.

    :param dampening_frac: see :func:`damped_inverse_cholesky`
    """

    def __init__(self, dampening_frac: float) -> None:
        self._dampening_frac = dampening_frac
        self._source: Tensor | None = None
        self._inverse: InverseCholesky | None = None
        self._ahead: dict[int, tuple[Tensor, InverseCholesky]] = {}

    def compute_ahead(self, hessians: Iterable[Tensor]) -> None:
        """Compute inverses before they are asked for; those that there are not, are asked again.

        :param hessians: (..., in, in); those that solvers take as they are, in float32
        """
        for hessian in hessians:
            if id(hessian) not in self._ahead and hessian.dtype == torch.float32:
                with suppress(SparseSSMError):  # who asks for it says of what projection it is
                    inverse = damped_inverse_cholesky(hessian, self._dampening_frac)
                    self._ahead[id(hessian)] = (hessian, inverse)

    def of(self, source: Tensor, hessian: Tensor) -> InverseCholesky:
        """The inverse, which is there already if the source is that of an earlier call.

        :param source: the tensor that projections share
        :param hessian: (..., in, in) the same as solvers take it
        :raises SparseSSMError: see :func:`damped_inverse_cholesky`
        """
        if id(source) in self._ahead:
            return self._ahead[id(source)][1]
        if self._inverse is None or source is not self._source:
            self._inverse = None  # before there are two
            self._inverse = damped_inverse_cholesky(hessian, self._dampening_frac)
            self._source = source
        return self._inverse


def begin_inverses(
    sums: StageSums, check: Callable[[Mapping[str, Tensor]], None], settings: ProjectionSettings
) -> Inverses:
    """Check sums, and invert the Hessians that a GPU has summed beside what it still sums.

    :param sums: of this rank
    :param check: refuses sums by name
    """
    inverses = Inverses(settings.dampening_frac)
    lane = Lane(next(iter(sums.hessians.values())).device, _LANE)
    with lane.work(sums.hessians_done):
        check(sums.hessians)  # which the GPU answers before it has summed the rest
        if (
            sums.hessians_done is not None
            and SOLVERS[settings.solver].updates
            and distributed.world_size() == 1
        ):
            inverses.compute_ahead(sums.hessians.values())
    lane.join()
    check(sums.crosses)
    return inverses
