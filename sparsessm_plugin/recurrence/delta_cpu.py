"""The gated delta rule on the CPU, in numba.

Values are independent of each other, so threads share them out in blocks of one head of one
sequence. The state of a block, dk x 32 numbers, stays in the first-level cache over the whole
sequence and is walked through once a step: what the next key expects of the state is summed while
the state is written. The result does not depend on the number of threads.
"""

import numpy as np
import torch
from numba import prange
from torch import Tensor

from sparsessm_plugin.backends.memory import room
from sparsessm_plugin.backends.vectors import as_array, compiled, threads_of_torch
from sparsessm_plugin.recurrence.quantities import DeltaQuantities

_BLOCK = 32  # values a block: vector lanes
_ROWS = 4  # of the state at once, so that sums over keys are read and written less often


def scan(quantities: DeltaQuantities, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Run the recurrence; see :func:`sparsessm_plugin.recurrence.delta_rule.scan`.

    :return: y (b, L, H dv) and the last state (b, H, dk, dv)
    """
    batch, length, H, dv = quantities.v.shape
    dk = quantities.k.shape[-1]
    rows = -(-dk // _ROWS) * _ROWS
    # rows of zeros write nothing and read nothing
    keys, queries = (
        as_array(torch.nn.functional.pad(x.detach(), (0, rows - dk)))
        for x in (quantities.normalized_k, quantities.normalized_q)
    )
    y, last = room(batch, length, H, dv), room(batch, H, dk, dv)
    first = room(0, 0, 0, 0) if state is None else state.detach().float()
    with threads_of_torch():
        _scan(
            queries,
            keys,
            as_array(quantities.v.float()),
            as_array(quantities.beta.float()),
            as_array(quantities.g.float().exp()),
            as_array(first),
            state is not None,
            y.numpy(),
            last.numpy(),
        )
    return y.flatten(2), last


@compiled
def _scan(q, k, v, beta, decay, first, has_first, y, last):
    batch, length, H, dv = y.shape
    dk = last.shape[2]
    rows = k.shape[3]
    heads = H // k.shape[2]
    blocks = (dv + _BLOCK - 1) // _BLOCK
    for task in prange(batch * H * blocks):
        i = task // (H * blocks)
        h = task // blocks - i * H
        begin = (task % blocks) * _BLOCK
        width = min(_BLOCK, dv - begin)
        g = h // heads
        S = np.zeros((rows, _BLOCK), np.float32)
        expected = np.zeros(_BLOCK, np.float32)  # S^T k of the step to come, before its decay
        change = np.zeros(_BLOCK, np.float32)
        out = np.zeros(_BLOCK, np.float32)
        if has_first:
            for n in range(dk):
                for p in range(width):
                    S[n, p] = first[i, h, n, begin + p]
                    expected[p] += S[n, p] * k[i, 0, g, n]
        for t in range(length):
            a, b = decay[i, t, h], beta[i, t, h]
            for p in range(width):
                change[p] = b * (v[i, t, h, begin + p] - a * expected[p])
            out[:] = 0
            expected[:] = 0
            key, query, coming = k[i, t, g], q[i, t, g], k[i, min(t + 1, length - 1), g]
            for n in range(0, rows, _ROWS):
                k0, k1, k2, k3 = key[n], key[n + 1], key[n + 2], key[n + 3]
                q0, q1, q2, q3 = query[n], query[n + 1], query[n + 2], query[n + 3]
                e0, e1, e2, e3 = coming[n], coming[n + 1], coming[n + 2], coming[n + 3]
                for p in range(_BLOCK):
                    c = change[p]
                    s0 = a * S[n, p] + k0 * c
                    s1 = a * S[n + 1, p] + k1 * c
                    s2 = a * S[n + 2, p] + k2 * c
                    s3 = a * S[n + 3, p] + k3 * c
                    S[n, p] = s0
                    S[n + 1, p] = s1
                    S[n + 2, p] = s2
                    S[n + 3, p] = s3
                    out[p] += (q0 * s0 + q1 * s1) + (q2 * s2 + q3 * s3)
                    expected[p] += (e0 * s0 + e1 * s1) + (e2 * s2 + e3 * s3)
            for p in range(width):
                y[i, t, h, begin + p] = out[p]
        for n in range(dk):
            for p in range(width):
                last[i, h, n, begin + p] = S[n, p]
