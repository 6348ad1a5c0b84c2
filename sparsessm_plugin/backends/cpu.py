"""What a mixer does to single channels, in numba: one pass over memory each.

Inputs are float32 and may be rows of a wider tensor. Threads share out the time steps; what a
step gets does not depend on their number.
"""

import numpy as np
from numba import prange
from torch import Tensor

from sparsessm_plugin.backends import vectors
from sparsessm_plugin.backends.memory import room
from sparsessm_plugin.backends.vectors import as_array, as_rows, compiled, threads_of_torch

_STEPS = 32  # a task of a thread
_BLOCK = 512  # channels at once: all that is read and written of them stays in the first cache


def convolve(x: Tensor, weight: Tensor, bias: Tensor | None, mask: Tensor | None) -> Tensor:
    """silu of a causal depthwise convolution over time.

    :param x: (b, L, D), zero before its first position
    :param weight: (D, 1, K)
    :param bias: (D,) or None
    :param mask: (b, L) bool, False where the result is zero; None where it is nowhere
    :return: (b, L, D)
    """
    batch, length, channels = x.shape
    out = room(batch, length, channels)
    rows, width = as_rows(x)
    with threads_of_torch():
        _convolve(
            rows,
            width,
            as_array(weight[:, 0].T),
            _bias(bias, channels),
            np.ones((batch, length), np.bool_) if mask is None else as_array(mask),
            out.numpy(),
        )
    return out


def softplus(x: Tensor, bias: Tensor | None) -> Tensor:
    """(b, L, D) ``log(1 + exp(x + bias))``.

    :param x: (b, L, D)
    :param bias: (D,) or None
    """
    batch, length, channels = x.shape
    out = room(batch, length, channels)
    rows, width = as_rows(x)
    with threads_of_torch():
        _softplus(
            rows,
            width,
            _bias(bias, channels),
            out.view(batch * length, channels).numpy(),
        )
    return out


def _bias(bias: Tensor | None, channels: int) -> np.ndarray:
    return np.zeros(channels, np.float32) if bias is None else as_array(bias.float())


@compiled
def _convolve(x, width, weight, bias, mask, out):
    batch, length, channels = out.shape
    kernel = weight.shape[0]
    tasks = (length + _STEPS - 1) // _STEPS  # a sequence
    for task in prange(batch * tasks):
        i = task // tasks
        begin = (task - i * tasks) * _STEPS
        total = np.empty(_BLOCK, np.float32)
        for first in range(0, channels, _BLOCK):
            last = min(channels, first + _BLOCK)
            for t in range(begin, min(length, begin + _STEPS)):
                if not mask[i, t]:
                    out[i, t, first:last] = 0
                    continue
                total[: last - first] = bias[first:last]
                for k in range(max(0, kernel - 1 - t), kernel):
                    at = (i * length + t + k - kernel + 1) * width
                    seen = x[at + first : at + last]
                    tap = weight[k, first:last]
                    for d in range(last - first):
                        total[d] += tap[d] * seen[d]
                for d in range(last - first):
                    total[d] = vectors.silu(total[d])
                out[i, t, first:last] = total[: last - first]


@compiled
def _softplus(x, width, bias, out):
    count, channels = out.shape
    for task in prange((count + _STEPS - 1) // _STEPS):
        total = np.empty(_BLOCK, np.float32)
        for first in range(0, channels, _BLOCK):
            last = min(channels, first + _BLOCK)
            added = bias[first:last]
            for t in range(task * _STEPS, min(count, (task + 1) * _STEPS)):
                total[: last - first] = x[t * width + first : t * width + last]
                for d in range(last - first):
                    total[d] = vectors.softplus(total[d] + added[d])
                out[t, first:last] = total[: last - first]
