"""The selective scan on the CPU, in numba.

Channels are independent, so threads share them out in blocks, and inside a block they are
the vector lanes: the state of a block stays in the first-level cache over the whole
sequence. A block's accumulators belong to one thread, which makes the result independent
of the number of threads to the last bit.
"""

import numpy as np
import torch
from numba import prange
from torch import Tensor

from sparsessm_plugin.backends.memory import room
from sparsessm_plugin.backends.vectors import (
    as_array,
    as_rows,
    compiled,
    exp,
    silu,
    threads_of_torch,
)
from sparsessm_plugin.recurrence.quantities import MixerQuantities
from sparsessm_plugin.recurrence.statistics import ScanStatistics

BLOCK = 64  # channels a block; a multiple of every vector width

# rows of a step, and of a state
_STEP, _ENTERED, _DRIVE, _GAIN, _SKIP, _FORGETS, _OUT = range(7)
_A, _H, _PRUNED, _ENERGY, _TRANSITION, _ERROR = range(6)
_ERROR_MODES = {None: 0, "zero": 1, "memoryless": 2}
_NOTHING = np.zeros((0, 0, 0), np.float32)
_NOTHING_SUMMED = np.zeros((0, 0), np.float64)


def scan(
    quantities: MixerQuantities,
    statistics: ScanStatistics | None = None,
    gated: torch.dtype | None = None,
) -> Tensor:
    """Run the recurrence; see :func:`sparsessm_plugin.recurrence.scan`.

    :param gated: give y times the gate instead, in this dtype
    """
    y = _run(quantities, statistics, room(0, 0, 0, 0), 0, gated is not None)
    return y if gated is None else y.to(gated)


def scan_states(quantities: MixerQuantities, every: int) -> tuple[Tensor, Tensor]:
    """Run the recurrence and keep states; see :func:`sparsessm_plugin.recurrence.scan_states`."""
    batch, length, channels = quantities.u.shape
    states = room(batch, length // every, quantities.A.shape[1], channels)
    return _run(quantities, None, states, every), states.transpose(2, 3)


def _run(
    quantities: MixerQuantities,
    statistics: ScanStatistics | None,
    states: Tensor,
    every: int,
    gated: bool = False,
) -> Tensor:
    q = quantities
    if statistics is not None:
        statistics.begin(q)
    request = statistics.request if statistics is not None else None
    error_mode = _ERROR_MODES[request.output_error if request is not None else None]
    mask = q.mask if q.mask is not None else torch.ones(q.u.shape[:2], dtype=torch.bool)
    y = room(*q.u.shape)
    energy, energy_sum = _views(statistics.state_energy if statistics else None)
    transition, transition_sum = _views(statistics.transition if statistics else None)
    error, error_sum = _views(statistics.output_error if statistics else None)

    with threads_of_torch():
        _scan(
            *as_rows(q.u),
            *as_rows(q.dt),
            as_array(q.A),
            *as_rows(q.B),
            *as_rows(q.C),
            as_array(q.D),
            *as_rows(q.z),
            mask.numpy(),
            y.numpy(),
            gated,
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


def _views(accumulator: Tensor | None) -> tuple[np.ndarray, np.ndarray]:
    """The accumulator as (L, N, D) per step or (D, N) summed; the other one is empty."""
    if accumulator is None:
        return _NOTHING, _NOTHING_SUMMED
    if accumulator.ndim == 3:
        return accumulator.transpose(1, 2).numpy(), _NOTHING_SUMMED
    return _NOTHING, accumulator.numpy()


@compiled
def _scan(
    u,
    u_width,
    dt,
    dt_width,
    A,
    B,
    B_width,
    C,
    C_width,
    D,
    z,
    z_width,
    mask,
    y,
    gated,
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
    """Each width is the distance of two rows of the flat array before it."""
    batch, length, channels = y.shape
    N = A.shape[1]
    for block in prange((channels + BLOCK - 1) // BLOCK):
        first = block * BLOCK
        last = min(channels, first + BLOCK)
        width = last - first
        # Lanes past `width` hold zeros and stay zero: no remainder loops. Two arrays, and not one
        # a row, and slices to and from memory: otherwise the compiler, which must rule out that
        # arrays overlap, makes scalar loops.
        rows = np.zeros((7, BLOCK), np.float32)
        # by state: A, h, h' of a pruned entry, and one sequence's sums; sequences in float64
        state = np.zeros((N, 6, BLOCK), np.float32)
        rows[_SKIP, :width] = D[first:last]
        for n in range(N):
            state[n, _A, :width] = A[first:last, n]
        for i in range(batch):
            state[:, _H:] = 0
            for t in range(length):
                real = mask[i, t]
                at = i * length + t
                rows[_STEP, :width] = dt[at * dt_width + first : at * dt_width + last]
                rows[_ENTERED, :width] = u[at * u_width + first : at * u_width + last]
                for d in range(BLOCK):
                    rows[_DRIVE, d] = rows[_STEP, d] * rows[_ENTERED, d]
                    rows[_OUT, d] = rows[_SKIP, d] * rows[_ENTERED, d]
                if gated or error_mode != 0:
                    rows[_GAIN, :width] = z[at * z_width + first : at * z_width + last]
                    for d in range(BLOCK):
                        rows[_GAIN, d] = silu(rows[_GAIN, d])
                if error_mode == 1:
                    for d in range(BLOCK):
                        rows[_FORGETS, d] = exp(-rows[_STEP, d])
                if want_energy and real:
                    for n in range(N):
                        if per_step:
                            sums = energy[t, n, first:last]
                            for d in range(width):
                                sums[d] += state[n, _H, d] * state[n, _H, d]
                        else:
                            for d in range(BLOCK):
                                state[n, _ENERGY, d] += state[n, _H, d] * state[n, _H, d]
                if want_transition and real:
                    for n in range(N):
                        if per_step:
                            sums = transition[t, n, first:last]
                            for d in range(width):
                                sums[d] += exp(rows[_STEP, d] * state[n, _A, d])
                        else:
                            for d in range(BLOCK):
                                state[n, _TRANSITION, d] += exp(rows[_STEP, d] * state[n, _A, d])
                if error_mode == 0:
                    for n in range(N):
                        b = B[at * B_width + n]
                        c = C[at * C_width + n]
                        for d in range(BLOCK):
                            h = (
                                exp(rows[_STEP, d] * state[n, _A, d]) * state[n, _H, d]
                                + rows[_DRIVE, d] * b
                            )
                            state[n, _H, d] = h
                            rows[_OUT, d] += c * h
                else:
                    for n in range(N):
                        b = B[at * B_width + n]
                        c = C[at * C_width + n]
                        c_error = c if real else np.float32(0.0)
                        for d in range(BLOCK):
                            h = (
                                exp(rows[_STEP, d] * state[n, _A, d]) * state[n, _H, d]
                                + rows[_DRIVE, d] * b
                            )
                            state[n, _H, d] = h
                            rows[_OUT, d] += c * h
                            h_pruned = (
                                rows[_FORGETS, d] * state[n, _PRUNED, d] + rows[_DRIVE, d] * b
                            )
                            state[n, _PRUNED, d] = h_pruned
                            e = c_error * (h_pruned - h) * rows[_GAIN, d]
                            state[n, _ERROR, d] += e * e
                        if per_step:
                            error[t, n, first:last] += state[n, _ERROR, :width]
                            state[n, _ERROR] = 0
                if every > 0 and (t + 1) % every == 0:
                    states[i, t // every, :, first:last] = state[:, _H, :width]
                if gated:
                    for d in range(BLOCK):
                        rows[_OUT, d] *= rows[_GAIN, d]
                y[i, t, first:last] = rows[_OUT, :width]
            if not per_step:
                for d in range(width):
                    for n in range(N):
                        if want_energy:
                            energy_sum[first + d, n] += state[n, _ENERGY, d]
                        if want_transition:
                            transition_sum[first + d, n] += state[n, _TRANSITION, d]
                        if error_mode != 0:
                            error_sum[first + d, n] += state[n, _ERROR, d]
