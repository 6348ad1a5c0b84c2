"""The gradient of the selective scan on CUDA, in Triton.

The forward pass keeps the state after every 16th step. The backward pass takes time in chunks of
these 16 steps, which run side by side, in three kernels like the forward pass: what every chunk
hands back to the one before it, if nothing comes from those behind it; from the last chunk to the
first, what each really receives; and every chunk once more, now with both ends known. There one
thread owns a channel and its 16 steps, and takes one state after the other: two scans over time
in registers give the states and their gradients. With kept_t = exp(dt_t A) and g_t the gradient
of the loss for h_t,

    p_t = kept_t h_{t-1},    h_t = p_t + dt_t u_t B_t,    g_t = C_t dy_t + kept_{t+1} g_{t+1}

Sums are float32, those over chunks and blocks of channels float64, in a fixed order: two runs
give the same bits. Memory does not grow with L times N but for one state in 16 steps.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from sparsessm_plugin.backends.gpu import by_rows
from sparsessm_plugin.recurrence import gpu
from sparsessm_plugin.recurrence.gpu import BLOCK, STATES_A_WARP
from sparsessm_plugin.recurrence.quantities import MixerQuantities

STEPS = 16  # of a chunk: what a thread keeps of its channel; with N = 16 states are as large as u
MOST_WARPS = 16
MOST_STATES = 1024  # of a channel, what a program of the first kernel has registers for
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LOG2_E = tl.constexpr(1.4426950408889634)
# Never 1 and never a multiple of 16 to the compiler: see ``gpu``.
_SIZES = ["length", "chunks", "slots", "channels", "states", "z_width"]


def takes(quantities: MixerQuantities) -> bool:
    """Whether the kernels have code for these shapes and dtypes."""
    q = quantities
    alike = all(x.dtype in _DTYPES for x in (q.u, q.dt, q.A, q.B, q.C, q.D))
    return (
        alike and type(q) is MixerQuantities and 0 < q.A.shape[1] <= MOST_STATES and q.u.numel() > 0
    )


def scan(quantities: MixerQuantities) -> Tensor:
    """y (b, L, D) float32 as :func:`sparsessm_plugin.recurrence.scan` gives it; differentiable.

    :param quantities: as :func:`takes` allows
    """
    q = quantities
    return _Scan.apply(q.u, q.dt, q.A, q.B, q.C, q.D, None, None)


def gated_scan(quantities: MixerQuantities, dtype: torch.dtype) -> Tensor:
    """:func:`scan` times the gate, in a dtype; less is kept and moved than by the two apart.

    :param quantities: as :func:`takes` allows
    """
    q = quantities
    return _Scan.apply(q.u, q.dt, q.A, q.B, q.C, q.D, q.z, dtype)


class _Scan(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        u: Tensor,
        dt: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        D: Tensor,
        z: Tensor | None,
        gated: torch.dtype | None,
    ) -> Tensor:
        quantities = MixerQuantities(u=u, dt=dt, A=A, B=B, C=C, D=D, z=u if z is None else z)
        y, states = gpu.scan_kept(quantities, STEPS, gated)
        ctx.save_for_backward(u, dt, A, B, C, D, z, states)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        *inputs, z, states = ctx.saved_tensors
        *found, dz = _backward(inputs, z, states, grad)
        whole = (g.to(x.dtype) for g, x in zip(found, inputs, strict=True))
        return (*whole, None if z is None else dz, None)


def _backward(
    inputs: list[Tensor], z: Tensor | None, kept: Tensor, grad: Tensor
) -> tuple[Tensor, ...]:
    """Gradients of the inputs, and of the gate if there is one.

    :param inputs: u, dt, A, B, C and D
    :param z: (b, L, D) or None
    :param kept: (b, L // STEPS, N, D) states
    :param grad: (b, L, D) of the output
    """
    u, dt, A, B, C, D = (x.detach() for x in inputs)
    batch, length, channels = u.shape
    N = A.shape[1]
    block_n = max(4, triton.next_power_of_2(N))
    blocks, chunks = triton.cdiv(channels, BLOCK), triton.cdiv(length, STEPS)
    warps = min(MOST_WARPS, max(1, block_n // STATES_A_WARP))
    B, C = (F.pad(x, (0, block_n - N)).contiguous() for x in (B, C))
    A_by_state = A.float().t().contiguous()  # (N, D): channels are the lanes
    u, dt, grad, D = (x.contiguous() for x in (u, dt, grad, D))
    gate = grad if z is None else by_rows(z.detach())

    def room(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=u.device)

    # what comes from behind into each chunk; later, what each adds to the gradient of A
    carry = room(batch, chunks, N, channels)
    elapsed = room(batch, max(1, chunks - 1), channels)
    du, ddt = (room(*u.shape, dtype=x.dtype) for x in (u, dt))
    dz = grad if z is None else room(*u.shape, dtype=z.dtype)
    dB, dC = (room(blocks, batch, N, length) for _ in range(2))
    dD = room(batch * chunks, channels)
    sizes = (length, chunks, kept.shape[1], channels, N, gate.stride(1))
    gated = {"GATED": z is not None, "STEPS": STEPS}
    with torch.cuda.device_of(u):
        if chunks > 1:
            whole = {"BLOCK_N": block_n, "BLOCK_D": BLOCK, "num_warps": warps}
            _hand_over[(blocks, chunks - 1, batch)](
                dt, A_by_state, C, grad, gate, carry, elapsed, *sizes, **gated, **whole
            )
            _hand_back[(blocks, batch)](A_by_state, carry, elapsed, *sizes, **whole)
        _gradients[(blocks, chunks, batch)](
            *(u, dt, A_by_state, B, C, D, grad, gate, kept, carry),
            *(du, ddt, dz, dB, dC, dD),
            *sizes,
            **gated,
            BLOCK_N=block_n,
            BLOCK_D=BLOCK,
            num_warps=1,
        )
    dA = carry.sum((0, 1), dtype=torch.float64).t()
    dB, dC = (x.sum(0).transpose(1, 2) for x in (dB, dC))
    return du, ddt, dA, dB, dC, dD.sum(0, dtype=torch.float64), dz


# -- kernels -----------------------------------------------------------------------------
#
# Shapes in memory: u, dt, grad, du, ddt, dz (b, L, D), and z, whose rows are z_width apart;
# A (N, D); B, C (b, L, BLOCK_N); kept (b, slots, N, D); carry (b, chunks, N, D); elapsed
# (b, chunks - 1, D); dB, dC (blocks, b, N, L); dD (b, chunks, D).


@triton.jit(do_not_specialize=_SIZES)
def _hand_over(
    dt,
    A,
    C,
    grad,
    z,
    carry,
    elapsed,
    length,
    chunks,
    slots,
    channels,
    states,
    z_width,
    GATED: tl.constexpr,
    STEPS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """What every chunk but the first hands to the one before it, and its sum of dt."""
    d = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    n = tl.arange(0, BLOCK_N)
    d_in = d < channels
    inside = (n < states)[:, None] & d_in[None, :]
    entry = n[:, None] * channels + d[None, :]
    a = tl.load(A + entry, mask=inside, other=0.0) * LOG2_E
    sequence = tl.program_id(2).to(tl.int64)
    before = tl.program_id(1)  # the chunk that receives it
    begin = (before + 1) * STEPS
    first = sequence * length + begin
    steps = tl.minimum(STEPS, length - begin)

    r = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    total = tl.zeros((BLOCK_D,), tl.float32)
    for step in range(0, steps):
        row = first + (steps - 1 - step)
        delta = tl.load(dt + row * channels + d, mask=d_in, other=0.0).to(tl.float32)
        out = tl.load(grad + row * channels + d, mask=d_in, other=0.0).to(tl.float32)
        if GATED:
            gate = tl.load(z + row * z_width + d, mask=d_in, other=0.0).to(tl.float32)
            out *= gate * tl.sigmoid(gate)
        c = tl.load(C + row * BLOCK_N + n).to(tl.float32)
        r = tl.exp2(delta[None, :] * a) * (r + c[:, None] * out[None, :])
        total += delta

    tl.store(elapsed + (sequence * (chunks - 1) + before) * channels + d, total, mask=d_in)
    at = (sequence * chunks + before) * states * channels + entry
    tl.store(carry + at, r, mask=inside)


@triton.jit(do_not_specialize=_SIZES)
def _hand_back(
    A,
    carry,
    elapsed,
    length,
    chunks,
    slots,
    channels,
    states,
    z_width,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Turn, in place, what :func:`_hand_over` left into what each chunk really receives."""
    d = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    n = tl.arange(0, BLOCK_N)
    d_in = d < channels
    inside = (n < states)[:, None] & d_in[None, :]
    entry = n[:, None] * channels + d[None, :]
    a = tl.load(A + entry, mask=inside, other=0.0) * LOG2_E
    sequence = tl.program_id(1).to(tl.int64)

    r = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    for i in range(0, chunks - 1):
        c = chunks - 2 - i
        place = (sequence * (chunks - 1) + c) * channels + d
        total = tl.load(elapsed + place, mask=d_in, other=0.0)
        at = (sequence * chunks + c) * states * channels + entry
        r = tl.exp2(total[None, :] * a) * r + tl.load(carry + at, mask=inside, other=0.0)
        tl.store(carry + at, r, mask=inside)


@triton.jit
def _follow(kept, value, next_kept, next_value):
    """Two spans of a recurrence x -> kept x + value, the second after the first, as one."""
    return kept * next_kept, next_kept * value + next_value


@triton.jit
def _tile(x, rows, width, d, inside):
    """(STEPS, BLOCK_D) float32 of some rows, so far apart, of a tensor."""
    at = rows[:, None] * width + d[None, :]
    return tl.load(x + at, mask=inside, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=_SIZES)
def _gradients(
    u,
    dt,
    A,
    B,
    C,
    D,
    grad,
    z,
    kept,
    carry,
    du,
    ddt,
    dz,
    dB,
    dC,
    dD,
    length,
    chunks,
    slots,
    channels,
    states,
    z_width,
    GATED: tl.constexpr,
    STEPS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One chunk, state after state; what it adds to the gradient of A takes carry's place."""
    d = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    d_in = d < channels
    skip = tl.load(D + d, mask=d_in, other=0.0).to(tl.float32)
    chunk = tl.program_id(1)
    sequence = tl.program_id(2).to(tl.int64)
    step = tl.arange(0, STEPS)
    t = chunk * STEPS + step
    row = sequence * length + t
    t_in = t < length
    inside = t_in[:, None] & d_in[None, :]
    # the steps before these, and those after them; the first step of the chunk follows `h`
    earlier_in = t_in & (step > 0)
    later_in = t + 1 < length

    x = _tile(u, row, channels, d, inside)
    delta = _tile(dt, row, channels, d, inside)
    out = _tile(grad, row, channels, d, inside)
    if GATED:
        gate = _tile(z, row, z_width, d, inside)
        out *= gate * tl.sigmoid(gate)
    earlier = earlier_in[:, None] & d_in[None, :]
    drive_before = _tile(u, row - 1, channels, d, earlier) * _tile(
        dt, row - 1, channels, d, earlier
    )
    delta_after = _tile(dt, row + 1, channels, d, later_in[:, None] & d_in[None, :])
    drive = delta * x
    to_drive = tl.zeros((STEPS, BLOCK_D), tl.float32)
    to_step = tl.zeros((STEPS, BLOCK_D), tl.float32)
    y = skip[None, :] * x
    # the first chunk starts from zero, and nothing comes from behind the last
    start_in = d < tl.where(chunk > 0, channels, 0)
    end_in = d < tl.where(chunk < chunks - 1, channels, 0)
    start_at = (sequence * slots + tl.maximum(chunk - 1, 0)) * states * channels + d
    carry_at = (sequence * chunks + chunk) * states * channels + d
    part = tl.program_id(0).to(tl.int64) * tl.num_programs(2) + sequence
    sum_at = part * states * length + t

    for n in range(0, states):
        a = tl.load(A + n * channels + d, mask=d_in, other=0.0)
        b = tl.load(B + row * BLOCK_N + n, mask=t_in, other=0.0).to(tl.float32)
        c = tl.load(C + row * BLOCK_N + n, mask=t_in, other=0.0).to(tl.float32)
        b_before = tl.load(B + (row - 1) * BLOCK_N + n, mask=earlier_in, other=0.0).to(tl.float32)
        h = tl.load(kept + start_at + n * channels, mask=start_in, other=0.0)
        r = tl.load(carry + carry_at + n * channels, mask=end_in, other=0.0)
        a2 = a[None, :] * LOG2_E

        here = tl.exp2(delta * a2)
        entered = tl.where((step == 0)[:, None], h[None, :], drive_before * b_before[:, None])
        _, p = tl.associative_scan((here, here * entered), 0, _follow)
        after = tl.exp2(delta_after * a2)
        wanted = c[:, None] * out
        wanted += tl.where((step == STEPS - 1)[:, None], r[None, :], 0.0)
        _, g = tl.associative_scan((after, wanted), 0, _follow, reverse=True)

        to_drive += g * b[:, None]
        gp = g * p
        to_step += gp * a[None, :]
        tl.store(carry + carry_at + n * channels, tl.sum(gp * delta, axis=0), mask=d_in)
        tl.store(dB + sum_at + n * length, tl.sum(g * drive, axis=1), mask=t_in)
        state = p + drive * b[:, None]
        tl.store(dC + sum_at + n * length, tl.sum(out * state, axis=1), mask=t_in)
        if GATED:
            y += c[:, None] * state

    at = row[:, None] * channels + d[None, :]
    tl.store(du + at, to_drive * delta + skip[None, :] * out, mask=inside)
    tl.store(ddt + at, to_step + to_drive * x, mask=inside)
    if GATED:
        gate = _tile(z, row, z_width, d, inside)
        share = tl.sigmoid(gate)
        slope = share * (1.0 + gate * (1.0 - share))
        tl.store(dz + at, _tile(grad, row, channels, d, inside) * y * slope, mask=inside)
    place = (sequence * chunks + chunk) * channels + d
    tl.store(dD + place, tl.sum(out * x, axis=0), mask=d_in)
