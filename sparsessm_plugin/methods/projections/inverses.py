"""Inverses of Hessians, each computed once for all projections that read the same input."""

from torch import Tensor

from sparsessm_plugin.solvers.objective import InverseCholesky, damped_inverse_cholesky


class LastInverse:
    """The last Hessian's inverse: projections that share one are solved one after the other.

    :param dampening_frac: see :func:`damped_inverse_cholesky`
    """

    def __init__(self, dampening_frac: float) -> None:
        self._dampening_frac = dampening_frac
        self._source: Tensor | None = None
        self._inverse: InverseCholesky | None = None

    def of(self, source: Tensor, hessian: Tensor) -> InverseCholesky:
        """The inverse, which is there already if the source is that of the last call.

        :param source: the tensor that projections share
        :param hessian: (..., in, in) the same as solvers take it
        :raises SparseSSMError: see :func:`damped_inverse_cholesky`
        """
        if self._inverse is None or source is not self._source:
            self._inverse = None  # before there are two
            self._inverse = damped_inverse_cholesky(hessian, self._dampening_frac)
            self._source = source
        return self._inverse
