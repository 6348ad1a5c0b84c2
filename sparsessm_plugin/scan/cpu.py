"""The selective scan on the CPU, in numba.

Channels are independent, so threads share them out in blocks, and inside a block they are
the vector lanes: the state of a block stays in the first-level cache over the whole
sequence. A block's accumulators belong to one thread, which makes the result independent
of the number of threads to the last bit.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
from numba import get_num_threads, njit, prange, set_num_threads
from torch import Tensor

from sparsessm_plugin.mixers.base import MixerQuantities
from sparsessm_plugin.scan.statistics import ScanStatistics

BLOCK = 64  # channels a block; a multiple of every vector width

# Contracting a * b + c is allowed; reordering and assuming no NaN are not.
_MATH = {"contract", "nsz"}
_ERROR_MODES = {None: 0, "zero": 1, "memoryless": 2}
_NOTHING = np.zeros((0, 0, 0), np.float32)
_NOTHING_SUMMED = np.zeros((0, 0), np.float64)


def scan(quantities: MixerQuantities, statistics: ScanStatistics | None = None) -> Tensor:
    """Run the recurrence; see :func:`sparsessm_plugin.scan.scan`."""
    return _run(quantities, statistics, torch.empty(0, 0, 0, 0), 0)


def scan_states(quantities: MixerQuantities, every: int) -> tuple[Tensor, Tensor]:
    """Run the recurrence and keep states; see :func:`sparsessm_plugin.scan.scan_states`."""
    batch, length, channels = quantities.u.shape
    states = torch.empty(batch, length // every, quantities.A.shape[1], channels)
    return _run(quantities, None, states, every), states.transpose(2, 3)


def _run(
    quantities: MixerQuantities, statistics: ScanStatistics | None, states: Tensor, every: int
) -> Tensor:
    q = quantities
    if statistics is not None:
        statistics.begin(q)
    request = statistics.request if statistics is not None else None
    error_mode = _ERROR_MODES[request.output_error if request is not None else None]
    mask = q.mask if q.mask is not None else torch.ones(q.u.shape[:2], dtype=torch.bool)
    y = torch.empty_like(q.u, memory_format=torch.contiguous_format)
    energy, energy_sum = _views(statistics.state_energy if statistics else None)
    transition, transition_sum = _views(statistics.transition if statistics else None)
    error, error_sum = _views(statistics.output_error if statistics else None)

    with threads_of_torch():
        _scan(
            as_array(q.u),
            as_array(q.dt),
            as_array(q.A),
            as_array(q.B),
            as_array(q.C),
            as_array(q.D),
            as_array(q.gate if error_mode else q.u),
            mask.numpy(),
            y.numpy(),
            error_mode,
            request is not None and request.state_energy,
            energy,
            energy_sum,
            request is not None and request.transition,
            transition,
            transition_sum,
            request is not None and request.per_step,
            error,
            error_sum,
            states.numpy(),
            every,
        )
    return y


@contextmanager
def threads_of_torch() -> Iterator[None]:
    """No more of numba's threads than torch may use."""
    threads, torch_threads = get_num_threads(), torch.get_num_threads()
    set_num_threads(min(threads, torch_threads))
    try:
        yield
    finally:
        set_num_threads(threads)
        # where both run on the same OpenMP, numba has just changed torch's number, too
        torch.set_num_threads(torch_threads)


def as_array(tensor: Tensor) -> np.ndarray:
    return tensor.detach().contiguous().numpy()


def _views(accumulator: Tensor | None) -> tuple[np.ndarray, np.ndarray]:
    """The accumulator as (L, N, D) per step or (D, N) summed; the other one is empty."""
    if accumulator is None:
        return _NOTHING, _NOTHING_SUMMED
    if accumulator.ndim == 3:
        return accumulator.transpose(1, 2).numpy(), _NOTHING_SUMMED
    return _NOTHING, accumulator.numpy()


@njit(inline="always", fastmath=_MATH)
def _exp(x):
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


def compiled(function: Callable[..., None]) -> Callable[..., None]:
    """Compile for parallel loops, once for all processes where a cache can be written."""
    options = {"parallel": True, "fastmath": _MATH, "boundscheck": False}
    try:
        return njit(cache=True, **options)(function)
    except RuntimeError:  # no folder for the cache: a read-only installation without a home
        return njit(**options)(function)


@compiled
def _scan(
    u,
    dt,
    A,
    B,
    C,
    D,
    gate,
    mask,
    y,
    error_mode,
    want_energy,
    energy,
    energy_sum,
    want_transition,
    transition,
    transition_sum,
    per_step,
    error,
    error_sum,
    states,
    every,
):
    batch, length, channels = u.shape
    N = A.shape[1]
    for block in prange((channels + BLOCK - 1) // BLOCK):
        first = block * BLOCK
        width = min(channels, first + BLOCK) - first
        # lanes past `width` hold zeros and stay zero: no remainder loops
        A_block = np.zeros((N, BLOCK), np.float32)
        for d in range(width):
            for n in range(N):
                A_block[n, d] = A[first + d, n]
        h = np.zeros((N, BLOCK), np.float32)
        h_pruned = np.zeros((N, BLOCK), np.float32)
        step = np.zeros(BLOCK, np.float32)
        drive = np.zeros(BLOCK, np.float32)
        gain = np.zeros(BLOCK, np.float32)
        dA = np.zeros(BLOCK, np.float32)
        dA_pruned = np.zeros(BLOCK, np.float32)
        out = np.zeros(BLOCK, np.float32)
        # one sequence in float32, sequences in float64
        energy_seq = np.zeros((N, BLOCK), np.float32)
        transition_seq = np.zeros((N, BLOCK), np.float32)
        error_seq = np.zeros((N, BLOCK), np.float32)
        for i in range(batch):
            h[:] = 0
            h_pruned[:] = 0
            energy_seq[:] = 0
            transition_seq[:] = 0
            error_seq[:] = 0
            for t in range(length):
                real = mask[i, t]
                for d in range(width):
                    step[d] = dt[i, t, first + d]
                    drive[d] = step[d] * u[i, t, first + d]
                    gain[d] = gate[i, t, first + d]
                for d in range(BLOCK):
                    out[d] = 0
                if error_mode == 1:
                    for d in range(BLOCK):
                        dA_pruned[d] = _exp(-step[d])
                for n in range(N):
                    b = B[i, t, n]
                    c = C[i, t, n]
                    for d in range(BLOCK):
                        dA[d] = _exp(step[d] * A_block[n, d])
                    if real and want_energy:
                        if per_step:
                            for d in range(width):
                                energy[t, n, first + d] += h[n, d] * h[n, d]
                        else:
                            for d in range(BLOCK):
                                energy_seq[n, d] += h[n, d] * h[n, d]
                    if real and want_transition:
                        if per_step:
                            for d in range(width):
                                transition[t, n, first + d] += dA[d]
                        else:
                            for d in range(BLOCK):
                                transition_seq[n, d] += dA[d]
                    for d in range(BLOCK):
                        h[n, d] = dA[d] * h[n, d] + drive[d] * b
                        out[d] += c * h[n, d]
                    if every > 0 and (t + 1) % every == 0:
                        for d in range(width):
                            states[i, t // every, n, first + d] = h[n, d]
                    if error_mode != 0:
                        for d in range(BLOCK):
                            h_pruned[n, d] = dA_pruned[d] * h_pruned[n, d] + drive[d] * b
                        if real and per_step:
                            for d in range(width):
                                e = c * (h_pruned[n, d] - h[n, d]) * gain[d]
                                error[t, n, first + d] += e * e
                        elif real:
                            for d in range(BLOCK):
                                e = c * (h_pruned[n, d] - h[n, d]) * gain[d]
                                error_seq[n, d] += e * e
                for d in range(width):
                    y[i, t, first + d] = out[d] + D[first + d] * u[i, t, first + d]
            if not per_step:
                for d in range(width):
                    for n in range(N):
                        if want_energy:
                            energy_sum[first + d, n] += energy_seq[n, d]
                        if want_transition:
                            transition_sum[first + d, n] += transition_seq[n, d]
                        if error_mode != 0:
                            error_sum[first + d, n] += error_seq[n, d]
