"""The column loop of SparseGPT on the CPU, in numba: see :mod:`sparsessm_plugin.solvers.kernels`.

A tile of rows, the vector lanes, stays in the first-level cache over all columns of a block.
Tiles are independent, so the number of threads changes no bit of the result.
"""

import numpy as np
from numba import prange
from torch import Tensor

from sparsessm_plugin.backends.vectors import as_array, compiled, threads_of_torch

LANES = 64  # rows a tile; a multiple of every vector width


def sweep(
    weight: Tensor,
    kept: Tensor,
    factor: Tensor,
    errors: Tensor,
    start: int,
    stop: int,
    group: int,
    zeros: Tensor,
) -> None:
    """Fill ``errors`` (P, columns, out); see :func:`sparsessm_plugin.solvers.kernels.sweep`."""
    U = as_array(factor[:, start:stop, start:stop])
    with threads_of_torch():
        _sweep(weight.numpy(), kept.numpy(), U, errors.numpy(), start, stop, group, as_array(zeros))


@compiled
def _sweep(weight, kept, U, errors, start, stop, group, zeros):
    problems, _, out = weight.shape
    columns = stop - start
    tiles = (out + LANES - 1) // LANES
    shared = len(U) == 1
    for job in prange(problems * tiles):
        p = job // tiles
        first = (job % tiles) * LANES
        width = min(out, first + LANES) - first
        factor = U[0 if shared else p]
        # lanes past `width` hold zeros that are kept: no remainder loops
        w = np.zeros((columns, LANES), weight.dtype)
        k = np.ones((columns, LANES), np.bool_)
        error = np.zeros(LANES, weight.dtype)
        for i in range(columns):
            for r in range(width):
                w[i, r] = weight[p, start + i, first + r]
                k[i, r] = kept[p, start + i, first + r]
        for i in range(columns):
            if group > 0 and i % group == 0:
                score = np.zeros(group, weight.dtype)
                for r in range(width):
                    for a in range(group):
                        ratio = w[i + a, r] / factor[i + a, i + a]
                        score[a] = ratio * ratio if k[i + a, r] else -1
                    for a in range(group):
                        lower = 0
                        for b in range(group):
                            lower += score[b] < score[a] or (score[b] == score[a] and b < a)
                        if lower < zeros[p]:
                            k[i + a, r] = False
            reciprocal = 1 / factor[i, i]
            for r in range(LANES):
                error[r] = 0 if k[i, r] else w[i, r] * reciprocal
            for j in range(i + 1, columns):
                u = factor[i, j]
                for r in range(LANES):
                    w[j, r] -= u * error[r]
            for r in range(width):
                errors[p, i, first + r] = error[r]
        for i in range(columns):
            for r in range(width):
                weight[p, start + i, first + r] = w[i, r] if k[i, r] else 0
                kept[p, start + i, first + r] = k[i, r]
