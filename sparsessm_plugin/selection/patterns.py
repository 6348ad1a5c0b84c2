"""Which entries of A_log are pruned, given their scores: exact counts, ties by position.

Structures are read, and ties decided, as :mod:`sparsessm_plugin.selection.masks` says.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from sparsessm_plugin.errors import SparseSSMError
from sparsessm_plugin.selection.masks import (
    UNSTRUCTURED,
    keep_in_groups,
    keep_largest_of_each,
    parse_structure,
)


@dataclass(frozen=True)
class Unstructured:
    """The lowest ``round(sparsity * D * N)`` entries of a layer."""

    sparsity: float

    def check(self, rows: int, columns: int) -> None:
        """Refuse a sparsity that prunes nothing, or everything, of a matrix of this size.

        :raises SparseSSMError: the count rounds to 0 or to all entries
        """
        count = self.count(rows, columns)
        if not 0 < count < rows * columns:
            raise SparseSSMError(
                f"sparsity {self.sparsity} rounds to {count} of the {rows} x {columns} entries"
            )

    def count(self, rows: int, columns: int) -> int:
        """How many entries of a (rows, columns) matrix are selected."""
        return round(self.sparsity * rows * columns)

    def lowest(self, scores: Tensor) -> Tensor:
        """Bool mask of the lowest entries of each matrix; at equal score the first ones.

        :param scores: (T, D, N)
        :return: (T, D, N) bool
        """
        _, rows, columns = scores.shape
        count = self.count(rows, columns)
        flat = scores.flatten(1)
        if count == 0 or scores.numel() == 0:
            return torch.zeros_like(scores, dtype=torch.bool)
        stay = torch.full((len(flat),), flat.shape[1] - count, device=flat.device)
        return ~keep_largest_of_each(flat, stay).view_as(scores)


@dataclass(frozen=True)
class SemiStructured:
    """N pruned entries in every M consecutive states of a channel.

    LLM Compressor's meaning of ``mask_structure: "N:M"``; for 2:4 and 4:8 it is the same as
    NVIDIA's, which counts the entries that stay.
    """

    n: int
    m: int

    @classmethod
    def parse(cls, text: str) -> "SemiStructured":
        """:func:`parse_structure` of a structure that is not unstructured.

        :raises SparseSSMError: not of that form, or not 0 < n < m
        """
        n, m = parse_structure(text)
        if not m:
            raise SparseSSMError(
                f"mask_structure {UNSTRUCTURED} is unstructured; give sparsity and leave it out"
            )
        return cls(n, m)

    def check(self, rows: int, columns: int) -> None:
        """Refuse a state size that M does not divide.

        :raises SparseSSMError: M does not divide the number of columns
        """
        if columns % self.m:
            raise SparseSSMError(
                f'mask_structure "{self.n}:{self.m}" needs a state size divisible by {self.m}, '
                f"got {columns}"
            )

    def count(self, rows: int, columns: int) -> int:
        """How many entries of a (rows, columns) matrix are selected."""
        return rows * columns // self.m * self.n

    def lowest(self, scores: Tensor) -> Tensor:
        """Bool mask of the lowest N of every M; at equal score the first ones.

        :param scores: (T, D, N)
        :return: (T, D, N) bool
        """
        return ~keep_in_groups(scores, self.n, self.m)


Pattern = Unstructured | SemiStructured


@dataclass(frozen=True)
class Ranking:
    """Scores of a layer; lower is pruned first.

    :param score: (D, N)
    :param tie_break: (D, N) decides between equal scores, the lower one first; entries that
        are equal in both go in the order of their position
    """

    score: Tensor
    tie_break: Tensor | None = None

    def select(self, pattern: Pattern) -> Tensor:
        """(D, N) bool mask of the entries to prune."""
        if self.tie_break is None:
            return pattern.lowest(self.score[None])[0]
        by_tie_break = self.tie_break.flatten().argsort(stable=True)
        order = by_tie_break[self.score.flatten()[by_tie_break].argsort(stable=True)]
        rank = torch.empty_like(order)
        rank[order] = torch.arange(order.numel(), device=order.device)
        return pattern.lowest(rank.reshape(1, *self.score.shape))[0]
