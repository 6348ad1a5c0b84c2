"""Float32 products on tensor cores: rounded to TF32, or split in two and nearly exact."""

from collections.abc import Iterator
from contextlib import contextmanager

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
        self._parts = split_tf32(matrix) if _splits(matrix) else (matrix,)

    def after(self, x: Tensor) -> Tensor:
        """``x @ matrix`` for x (..., m, k)."""
        if len(self._parts) == 1:
            return x @ self._parts[0]
        high, low = split_tf32(x)
        matrix_high, matrix_low = self._parts
        with tf32():
            if x.dim() == 2:
                return (low @ matrix_high).addmm_(high, matrix_low).addmm_(high, matrix_high)
            return low @ matrix_high + high @ matrix_low + high @ matrix_high


def _splits(matrix: Tensor) -> bool:
    return (
        matrix.is_cuda
        and matrix.dtype == torch.float32
        and torch.cuda.get_device_capability(matrix.device) >= (8, 0)
    )


def split_tf32(x: Tensor) -> tuple[Tensor, Tensor]:
    """A float32 tensor as TF32 numbers and the rest."""
    high = (x.contiguous().view(torch.int32) & -(1 << 13)).view(torch.float32)
    return high, x - high
