"""What the package's numba kernels share: compiling, threads, memory and an exponential."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
from numba import get_num_threads, njit, set_num_threads
from torch import Tensor

# Contracting a * b + c is allowed; reordering and assuming no NaN are not.
MATH = {"contract", "nsz"}


def compiled(function: Callable[..., None]) -> Callable[..., None]:
    """Compile for parallel loops, once for all processes where a cache can be written."""
    options = {"parallel": True, "fastmath": MATH, "boundscheck": False}
    try:
        return njit(cache=True, **options)(function)
    except RuntimeError:  # no folder for the cache: a read-only installation without a home
        return njit(**options)(function)


@contextmanager
def threads_of_torch() -> Iterator[None]:
    """No more of numba's threads than torch may use."""
    # torch first: numba starts its threads when it is asked for their number
    torch_threads, threads = torch.get_num_threads(), get_num_threads()
    set_num_threads(min(threads, torch_threads))
    try:
        yield
    finally:
        set_num_threads(threads)
        # where both run on the same OpenMP, numba has just changed torch's number, too
        torch.set_num_threads(torch_threads)


def as_array(tensor: Tensor) -> np.ndarray:
    return tensor.detach().contiguous().numpy()


def as_rows(tensor: Tensor) -> tuple[np.ndarray, int]:
    """A part of a wider tensor without a copy, for kernels that are compiled for flat arrays.

    :param tensor: (b, L, D)
    :return: its memory from the first entry to the last one, and the distance of two of its
        b L rows
    """
    rows = tensor.detach().flatten(0, 1)  # a view where one distance fits all
    if rows.stride(1) != 1:
        rows = rows.contiguous()
    count, channels = rows.shape
    width = rows.stride(0) if count > 1 else channels
    length = (count - 1) * width + channels if rows.numel() else 0
    return rows.as_strided((length,), (1,)).numpy(), width


@njit(inline="always", fastmath=MATH)
def exp(x):
    """exp(x) for x <= 0 in float32, relative error below 1e-7, in vector instructions.

    The Cephes polynomial on [-log(2)/2, log(2)/2]; 2^k is written into the exponent bits.
    Where exp underflows, below -87, the smallest normal number stands in, about 1e-38.
    """
    # written so that NaN passes through: a comparison with NaN is false
    x = np.float32(-87.0) if x < np.float32(-87.0) else x
    # adding 1.5 * 2^23 rounds to an integer and leaves it in the low mantissa bits
    shifted = x * np.float32(1.44269504088896341) + np.float32(12582912.0)
    k = np.int32(
        (np.float32(shifted).view(np.int32) - np.int32(0x4B400000) + np.int32(127)) << np.int32(23)
    )
    whole = shifted - np.float32(12582912.0)
    r = x - whole * np.float32(0.693359375)  # log(2) in two parts
    r = r + whole * np.float32(2.12194440e-4)
    p = np.float32(1.9875691500e-4)
    p = p * r + np.float32(1.3981999507e-3)
    p = p * r + np.float32(8.3334519073e-3)
    p = p * r + np.float32(4.1665795894e-2)
    p = p * r + np.float32(1.6666665459e-1)
    p = p * r + np.float32(5.0000001201e-1)
    p = p * r * r + r + np.float32(1.0)
    return p * np.int32(k).view(np.float32)


@njit(inline="always", fastmath=MATH)
def silu(x):
    """x / (1 + exp(-x)) in float32."""
    e = exp(-abs(x))
    return x * (np.float32(1.0) if x >= np.float32(0.0) else e) / (np.float32(1.0) + e)


@njit(inline="always", fastmath=MATH)
def softplus(x):
    """log(1 + exp(x)) in float32, relative error below 1e-6.

    log(1 + e) = 2 artanh(s) with s = e / (2 + e) <= 1/3, so that few terms of its series do.
    """
    e = exp(-abs(x))
    s = e / (np.float32(2.0) + e)
    q = s * s
    p = np.float32(2.0 / 13.0)
    p = p * q + np.float32(2.0 / 11.0)
    p = p * q + np.float32(2.0 / 9.0)
    p = p * q + np.float32(2.0 / 7.0)
    p = p * q + np.float32(2.0 / 5.0)
    p = p * q + np.float32(2.0 / 3.0)
    p = p * q + np.float32(2.0)
    # not max(): NaN passes through
    return (np.float32(0.0) if x < np.float32(0.0) else x) + p * s
