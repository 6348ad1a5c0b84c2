"""What ADMM keeps between its steps, in ALPS: plain torch, and Triton on a GPU."""

from importlib import import_module
from typing import Protocol

import torch
from torch import Tensor

from sparsessm_plugin.backends.choice import REFERENCE, backend_for
from sparsessm_plugin.selection.masks import choose_mask, count_true, parse_structure

MOST_IN_GROUP = 16  # entries of an n:m group that a kernel ranks
# What matrices whose entries are at most about 1 are stored in as float16: 2^-42 has a digit left.
UNIT_OF_PULL = 2.0**14


def half_sum(matrices: Tensor, weights: Tensor) -> Tensor:
    """``sum_j weights_j matrices_j`` as float16, in units of :data:`UNIT_OF_PULL`.

    :param matrices: (J, ...) float32 contiguous on CUDA, of a sum with entries of at most about 1
    :param weights: (J,) float32 likewise
    """
    total: Tensor = import_module("sparsessm_plugin.solvers.alternation_gpu").half_sum(
        matrices, weights, UNIT_OF_PULL
    )
    return total


class Alternation(Protocol):
    """The sparse weight D and the scaled dual U, where the other is zero each.

    Their sum is one tensor, from which the mask tells them apart: the projection of ``W' + U``
    leaves D, and what it takes is the next U.
    """

    half: bool  # whether products take float16
    unit: float  # what multiplied tensors are in

    def split(self, scale: float) -> tuple[Tensor, Tensor]:
        """``B = W + scale U`` and ``unit (D - B)``, (..., out, in), which the caller may change.

        The second is float16 where ``half``.

        :param scale: of the dual, where the penalty has changed
        """
        ...

    def project(self, total: Tensor) -> None:
        """Take ``W' + U`` apart.

        :param total: (..., out, in), which is kept
        """
        ...

    def changed(self) -> float:
        """How many entries of the mask changed since the last call, per entry that stays."""
        ...

    def result(self) -> tuple[Tensor, Tensor]:
        """D and its mask, (..., out, in) both."""
        ...


def alternation(
    weight: Tensor, sparsity: float, structure: str, keep: Tensor | None
) -> Alternation:
    """Begin with the projection of the dense weight, and no dual.

    :param weight: (..., out, in) W
    :param sparsity: share of zeros; n:m decides it alone
    :param structure: ``"0:0"`` or ``"n:m"``
    :param keep: (..., out, in) bool, False for entries that must be zero, which count; or None
    """
    group = parse_structure(structure)[1]
    fits = weight.dtype == torch.float32 and group <= MOST_IN_GROUP
    if fits and weight.is_cuda and backend_for(weight.device) != REFERENCE:
        kernels = import_module("sparsessm_plugin.solvers.alternation_gpu")
        begun: Alternation = kernels.AlternationOnGPU(weight, sparsity, structure, keep)
        return begun
    return AlternationInTorch(weight, sparsity, structure, keep)


class AlternationInTorch:
    """See :class:`Alternation` and :func:`alternation`."""

    half = False
    unit = 1.0

    def __init__(
        self, weight: Tensor, sparsity: float, structure: str, keep: Tensor | None
    ) -> None:
        self._weight = weight
        self._rule = (sparsity, structure)
        self._keep = keep
        self.project(weight)
        self._before = self._mask

    def split(self, scale: float) -> tuple[Tensor, Tensor]:
        """See :class:`Alternation`."""
        sparse = self._total * self._mask  # on a CPU eight times as fast as masked_fill
        base = torch.add(self._weight, self._total - sparse, alpha=scale)
        return base, sparse.sub_(base)

    def project(self, total: Tensor) -> None:
        """See :class:`Alternation`."""
        self._total = total
        self._mask = choose_mask(total.abs(), *self._rule, keep=self._keep)

    def changed(self) -> float:
        """See :class:`Alternation`."""
        count = count_true(self._mask != self._before)
        self._before = self._mask
        return count / max(1, count_true(self._mask))

    def result(self) -> tuple[Tensor, Tensor]:
        """See :class:`Alternation`."""
        return self._total * self._mask, self._mask
