"""Float32 products on tensor cores: rounded to TF32, or split in two and nearly exact."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import cache
from typing import Any

import torch
from torch import Tensor


@contextmanager
def tf32() -> Iterator[None]:
    """Let CUDA round what float32 products multiply to 10 bits of mantissa; sums stay float32."""
    settings = torch.backends.cuda.matmul
    before = settings.fp32_precision
    settings.fp32_precision = "tf32"
    try:
        yield
    finally:
        settings.fp32_precision = before


class Factor:
    """The right-hand side of many products that need float32's accuracy.

    On tensor cores, which round to TF32's 10 bits, both sides are split in two and three of the
    four products taken: more than twice as fast as float32 without tensor cores, and about as
    exact (arXiv 2203.03341).

    :param matrix: (..., k, n)
    """

    def __init__(self, matrix: Tensor):
        self._parts: tuple[Tensor, ...] = (matrix,)
        if _splits(matrix):
            # Hopper's tensor cores read TF32 along the dimension that is summed over
            self._parts = tuple(part.mT for part in split_tf32(matrix.mT))

    @property
    def is_split(self) -> bool:
        """Whether :meth:`roughly_after` takes less time than :meth:`after`."""
        return len(self._parts) > 1

    def roughly_after(self, x: Tensor) -> Tensor:
        """``x @ matrix`` in one product: of TF32's 10 bits where the matrix is split."""
        with tf32() if self.is_split else nullcontext():
            return x @ self._parts[0]

    def after(self, x: Tensor) -> Tensor:
        """``x @ matrix`` for x (..., m, k)."""
        if not self.is_split:
            return x @ self._parts[0]
        high, low = split_tf32(x)
        matrix_high, matrix_low = self._parts
        with tf32():
            if x.dim() == 2:
                return (low @ matrix_high).addmm_(high, matrix_low).addmm_(high, matrix_high)
            return low @ matrix_high + high @ matrix_low + high @ matrix_high

    def squares(self, x: Tensor) -> Tensor:
        """``x_i matrix x_i^T`` of every row of x (..., m, k), for a symmetric matrix.

        :return: (..., m) float64
        """
        if not self.is_split:
            return ((x @ self._parts[0]) * x).sum(-1, dtype=torch.float64)
        # x M x^T is (x + low) M high^T + low M low^T: two products do, as there is nothing left to
        # split of high, and the last part is about 2^-22 of what x has if its signs are random.
        high, low = split_tf32(x)
        matrix_high, matrix_low = self._parts
        with tf32():
            product = high @ matrix_low
            if x.dim() == 2:
                product.addmm_(high, matrix_high)
            else:
                product += high @ matrix_high
        return product.mul_(low.add_(x)).sum(-1, dtype=torch.float64)


def _splits(matrix: Tensor) -> bool:
    return (
        matrix.is_cuda
        and matrix.dtype == torch.float32
        and torch.cuda.get_device_capability(matrix.device) >= (8, 0)
    )


def exact_dtype(matrix: Tensor, *others: Tensor) -> torch.dtype:
    """float32 where :class:`Factor` splits the matrix and no tensor has more bits, else float64."""
    wide = any(x.dtype == torch.float64 for x in (matrix, *others))
    return torch.float64 if wide or not _splits(matrix.float()) else torch.float32


def split_tf32(x: Tensor) -> tuple[Tensor, Tensor]:
    """A float32 tensor as TF32 numbers and the rest."""
    x = x.contiguous()
    high = (x.view(torch.int32) & -(1 << 13)).view(torch.float32)
    return high, x - high


def add_half_product(
    total: Tensor, left: Tensor, right: Tensor, alpha: float = 1.0, beta: float = 1.0
) -> Tensor:
    """``beta total + alpha left @ right`` in place of ``total``, on a GPU's tensor cores.

    Half precision has as many bits as TF32, and is multiplied twice as fast. Sums are float32.

    :param total: (..., m, n) float32
    :param left: (..., m, k) float16 or bfloat16
    :param right: (..., k, n) likewise
    """
    if not total.is_cuda:  # products of half precision with wider sums are there on a GPU alone
        return total.mul_(beta).add_(left.float() @ right.float(), alpha=alpha)
    if _halves_add_up(total.device, left.dtype):
        return _add_half_product(total, left, right, alpha, beta)
    left, right = _batches(left, right)
    multiply: Any = torch.mm if total.dim() == 2 else torch.bmm
    product = multiply(left, right, out_dtype=total.dtype)
    return total.mul_(beta).add_(product.view_as(total), alpha=alpha)


def _add_half_product(
    total: Tensor, left: Tensor, right: Tensor, alpha: float, beta: float
) -> Tensor:
    sums, left, right = _batches(total, left, right)
    add: Any = torch.addmm if total.dim() == 2 else torch.baddbmm
    add(sums, left, right, out_dtype=total.dtype, alpha=alpha, beta=beta, out=sums)
    return total


def _batches(*matrices: Tensor) -> list[Tensor]:
    """With one leading dimension at most."""
    return [x if x.dim() == 2 else x.flatten(0, -3) for x in matrices]


@cache
def _halves_add_up(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether what is added to may be wider than the product's sides: torch 2.10 may refuse it."""
    total = torch.ones(1, 16, 16, device=device)
    half = torch.ones_like(total, dtype=dtype)
    try:
        _add_half_product(total, half, half, 1.0, 1.0)
        _add_half_product(total[0], half[0], half[0], 1.0, 1.0)
    except (RuntimeError, TypeError):
        return False
    return bool((total == 33).all())
