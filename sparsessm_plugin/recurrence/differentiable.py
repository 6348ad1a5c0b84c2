"""The selective scan with a gradient, in memory that does not grow with L times N.

The adjoint of a diagonal recurrence is the same recurrence run backwards: with g_t the gradient
of the loss for h_t,

    g_t = C_t dy_t + exp(dt_{t+1} A) g_{t+1}
    d(dt A)_t = g_t exp(dt_t A) h_{t-1},    dB_t = sum_d g_t dt_t u_t,    dC_t = sum_d dy_t h_t

States are not kept but computed again, a few steps at a time, from the few that are.
"""

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numba import njit, prange
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from sparsessm_plugin.backends.choice import backend_for
from sparsessm_plugin.backends.memory import room
from sparsessm_plugin.backends.vectors import MATH, as_array, compiled, exp, threads_of_torch
from sparsessm_plugin.recurrence import cpu, delta_rule, kernels, ssd
from sparsessm_plugin.recurrence.cpu import BLOCK
from sparsessm_plugin.recurrence.quantities import (
    DeltaQuantities,
    GroupedQuantities,
    HeadQuantities,
    MixerQuantities,
)

_EVERY = 16  # steps between two states that the CPU keeps; with N = 16 they are as large as u
_CHUNK = 64  # steps that other devices take together


def scan(quantities: MixerQuantities | DeltaQuantities) -> Tensor:
    """Run the recurrence from a zero state so that all of its quantities get gradients.

    :param quantities: the recurrence's inputs
    :return: y (b, L, D) float32, skip connection included, before the gate
    """
    q = quantities
    if isinstance(q, DeltaQuantities):
        return delta_rule.scan(q)
    if isinstance(q, HeadQuantities):
        triton = _triton_of_heads(q)
        return ssd.scan(_in_float32(q)) if triton is None else triton.scan(q)
    if isinstance(q, GroupedQuantities):
        return torch.cat([scan(group) for _, group in q.groups()], dim=-1)
    if q.u.device.type == "cpu":
        return _CPUScan.apply(q.u, q.dt, q.A, q.B, q.C, q.D)
    if kernels.available(q):
        return kernels.scan(q)
    triton = _triton(q)
    return in_chunks(q) if triton is None else triton.scan(q)


def gated_scan(quantities: MixerQuantities) -> Tensor | None:
    """:func:`scan` times the gate, in the dtype of u, where one kernel does both; else None.

    :param quantities: the recurrence's inputs
    """
    q = quantities
    if isinstance(q, GroupedQuantities):
        parts = [gated_scan(group) for _, group in q.groups()]
        whole = [part for part in parts if part is not None]
        return torch.cat(whole, dim=-1) if len(whole) == len(parts) else None
    triton = _triton(q)
    return None if triton is None else triton.gated_scan(q, q.u.dtype)


def _in_float32(q: HeadQuantities) -> HeadQuantities:
    """What plain torch multiplies has one dtype."""
    if all(x.dtype == q.dt.dtype for x in (q.u, q.B, q.C)):
        return q
    return replace(q, u=q.u.float(), B=q.B.float(), C=q.C.float())


def _triton(q: MixerQuantities) -> Any:
    """The module of Triton's kernels with gradients if it takes these quantities."""
    if backend_for(q.u.device) != "cuda":
        return None
    from sparsessm_plugin.recurrence import gpu_gradient  # Triton is not everywhere

    return gpu_gradient if gpu_gradient.takes(q) else None


def _triton_of_heads(q: HeadQuantities) -> Any:
    """The same for the Mamba-2 layout."""
    if backend_for(q.u.device) != "cuda":
        return None
    from sparsessm_plugin.recurrence import ssd_gpu

    return ssd_gpu if ssd_gpu.takes(q) and ssd_gpu.usable(q) else None


def in_chunks(quantities: MixerQuantities, chunk: int = _CHUNK) -> Tensor:
    """:func:`scan` in plain torch, on any device.

    Inside a chunk an associative scan takes log2(chunk) steps over (b, chunk, D, N); the
    backward pass makes these again, one chunk at a time.

    :param quantities: the recurrence's inputs
    :param chunk: steps a chunk
    """
    q = quantities
    h = q.dt.new_zeros(q.u.shape[0], *q.A.shape)  # (b, D, N)
    outputs = []
    for start in range(0, q.u.shape[1], chunk):
        u, dt, B, C = (x[:, start : start + chunk] for x in (q.u, q.dt, q.B, q.C))
        y, h = checkpoint(
            _chunk, h, u, dt, q.A, B, C, use_reentrant=False, preserve_rng_state=False
        )
        outputs.append(y)
    return torch.cat(outputs, dim=1) + q.D * q.u


def _chunk(
    h: Tensor, u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor
) -> tuple[Tensor, Tensor]:
    """y (b, c, D) without the skip connection, and h (b, D, N) after the chunk."""
    kept = torch.exp(dt[..., None] * A)  # (b, c, D, N)
    added = (dt * u)[..., None] * B[:, :, None]
    # after the step with `reach` r, `kept` and `added` are those of the last r steps together
    reach, length = 1, u.shape[1]
    while reach < length:
        later = kept[:, reach:]
        added = torch.cat([added[:, :reach], added[:, reach:] + later * added[:, :-reach]], 1)
        kept = torch.cat([kept[:, :reach], later * kept[:, :-reach]], 1)
        reach *= 2
    states = added + kept * h[:, None]
    return (states * C[:, :, None]).sum(-1), states[:, -1]


class _CPUScan(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor
    ) -> Tensor:
        quantities = MixerQuantities(u=u, dt=dt, A=A, B=B, C=C, D=D, z=u)
        y, states = cpu.scan_states(quantities, _EVERY)
        ctx.save_for_backward(u, dt, A, B, C, D, states)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, ...]:
        u, dt, A, B, C, D, states = ctx.saved_tensors
        batch, length, channels = u.shape
        N, blocks = A.shape[1], -(-channels // BLOCK)
        du, ddt = room(2, batch, length, channels)
        # a block of channels sums for itself: the result depends on no number of threads
        dB, dC = room(2, blocks, batch, length, N)
        dA = torch.zeros(channels, N, dtype=torch.float64)
        dD = torch.zeros(channels, dtype=torch.float32)
        with threads_of_torch():
            _backward(
                *(as_array(x) for x in (u, dt, A, B, C, D, dy, states.transpose(2, 3))),
                _EVERY,
                *(x.numpy() for x in (du, ddt, dA, dB, dC, dD)),
            )
        return du, ddt, dA.float(), dB.sum(0), dC.sum(0), dD


@njit(fastmath=MATH | {"reassoc"})
def _sum(x):
    """Sum in vector instructions; a function of its own, as nothing else may be reordered."""
    total = np.float32(0.0)
    for i in range(BLOCK):
        total += x[i]
    return total


@compiled
def _backward(u, dt, A, B, C, D, dy, starts, every, du, ddt, dA, dB, dC, dD):
    batch, length, channels = u.shape
    N = A.shape[1]
    for block in prange((channels + BLOCK - 1) // BLOCK):
        first = block * BLOCK
        width = min(channels, first + BLOCK) - first
        # lanes past `width` hold zeros and add nothing
        A_block = np.zeros((N, BLOCK), np.float32)
        for d in range(width):
            for n in range(N):
                A_block[n, d] = A[first + d, n]
        h = np.zeros((every + 1, N, BLOCK), np.float32)  # h[s + 1] follows step s
        kept = np.zeros((every, N, BLOCK), np.float32)
        g = np.zeros((N, BLOCK), np.float32)
        dA_seq = np.zeros((N, BLOCK), np.float32)
        dD_seq = np.zeros(BLOCK, np.float32)
        step = np.zeros(BLOCK, np.float32)
        drive = np.zeros(BLOCK, np.float32)
        out = np.zeros(BLOCK, np.float32)
        to_step = np.zeros(BLOCK, np.float32)
        to_drive = np.zeros(BLOCK, np.float32)
        to_B = np.zeros(BLOCK, np.float32)
        to_C = np.zeros(BLOCK, np.float32)
        for i in range(batch):
            g[:] = 0
            dA_seq[:] = 0
            dD_seq[:] = 0
            for chunk in range((length - 1) // every, -1, -1):
                begin = chunk * every
                steps = min(every, length - begin)
                for n in range(N):
                    for d in range(BLOCK):
                        h[0, n, d] = 0
                    if chunk > 0:
                        for d in range(width):
                            h[0, n, d] = starts[i, chunk - 1, n, first + d]
                for s in range(steps):
                    t = begin + s
                    for d in range(width):
                        step[d] = dt[i, t, first + d]
                        drive[d] = step[d] * u[i, t, first + d]
                    for n in range(N):
                        b = B[i, t, n]
                        for d in range(BLOCK):
                            kept[s, n, d] = exp(step[d] * A_block[n, d])
                            h[s + 1, n, d] = kept[s, n, d] * h[s, n, d] + drive[d] * b
                for s in range(steps - 1, -1, -1):
                    t = begin + s
                    for d in range(width):
                        step[d] = dt[i, t, first + d]
                        drive[d] = step[d] * u[i, t, first + d]
                        out[d] = dy[i, t, first + d]
                    for d in range(BLOCK):
                        to_step[d] = 0
                        to_drive[d] = 0
                    for n in range(N):
                        b = B[i, t, n]
                        c = C[i, t, n]
                        for d in range(BLOCK):
                            to_h = g[n, d] + c * out[d]
                            to_C[d] = out[d] * h[s + 1, n, d]
                            to_B[d] = to_h * drive[d]
                            to_drive[d] += to_h * b
                            to_h = to_h * kept[s, n, d]
                            g[n, d] = to_h
                            to_exponent = to_h * h[s, n, d]
                            to_step[d] += to_exponent * A_block[n, d]
                            dA_seq[n, d] += to_exponent * step[d]
                        dB[block, i, t, n] = _sum(to_B)
                        dC[block, i, t, n] = _sum(to_C)
                    for d in range(width):
                        x = u[i, t, first + d]
                        du[i, t, first + d] = to_drive[d] * step[d] + D[first + d] * out[d]
                        ddt[i, t, first + d] = to_step[d] + to_drive[d] * x
                        dD_seq[d] += out[d] * x
            for d in range(width):
                dD[first + d] += dD_seq[d]
                for n in range(N):
                    dA[first + d, n] += dA_seq[n, d]
