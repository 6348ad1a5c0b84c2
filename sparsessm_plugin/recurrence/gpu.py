"""The selective scan on CUDA, in Triton.

A program owns a block of channels with all their states, in registers, over a chunk of time.
Chunks run side by side, so that one sequence fills the GPU, in three passes: every chunk from
a zero state, only for the state it ends in; from chunk to chunk, what each really starts with
(the recurrence is linear, so the transitions over a chunk are ``exp(A sum dt)``); every chunk
once more, with output and statistics. Each program writes partial sums of its own, which are
added in a fixed order in float64: no atomics, so two runs give the same bits.

Sums inside a chunk are float32, whatever the inputs are. One file because the passes share their
layout of registers and memory.
"""

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from sparsessm_plugin.backends.gpu import by_rows
from sparsessm_plugin.recurrence.quantities import MixerQuantities
from sparsessm_plugin.recurrence.statistics import ScanStatistics

BLOCK = 32  # channels a program: the lanes of a warp
STATES_A_WARP = 16  # states that a thread keeps; more of them take more warps
MOST_WARPS = 16
PROGRAMS = 64  # warps for each multiprocessor that a launch should have, about two full waves
SHORTEST = 16  # steps of the shortest chunk: loading and storing a state must pay off
LOG2_E = tl.constexpr(1.4426950408889634)
_ERROR_MODES = {None: 0, "zero": 1, "memoryless": 2}
_STATISTICS = ("state_energy", "transition", "output_error")
# Never 1 and never a multiple of 16 to the compiler: one binary for all sizes, and loads of
# one channel a lane, which keeps the states of a channel in one thread.
_SIZES = ["length", "chunk", "chunks", "channels", "states", "every", "z_width"]


def scan(
    quantities: MixerQuantities,
    statistics: ScanStatistics | None = None,
    gated: torch.dtype | None = None,
) -> Tensor:
    """Run the recurrence; see :func:`sparsessm_plugin.recurrence.scan`.

    :param gated: give y times the gate instead, in this dtype
    """
    if statistics is not None:
        statistics.begin(quantities)
        if statistics.request.per_step:
            # sequences add to the same steps, one after the other
            rows = [_row(quantities, i) for i in range(len(quantities.u))]
            return torch.cat([_run(row, statistics, gated=gated)[0] for row in rows])
    return _run(quantities, statistics, gated=gated)[0]


def scan_states(quantities: MixerQuantities, every: int) -> tuple[Tensor, Tensor]:
    """Run the recurrence and keep states; see :func:`sparsessm_plugin.recurrence.scan_states`."""
    y, states = scan_kept(quantities, every)
    return y, states.transpose(2, 3)


def scan_kept(
    quantities: MixerQuantities, every: int, gated: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    """:func:`scan_states` with states (b, L // every, N, D), as they lie in memory.

    :param gated: give y times the gate instead, in this dtype
    """
    return _run(quantities, None, every, gated)


def _row(q: MixerQuantities, i: int) -> MixerQuantities:
    cut = {name: getattr(q, name)[i : i + 1] for name in ("u", "dt", "B", "C", "z")}
    return MixerQuantities(**cut, A=q.A, D=q.D, mask=None if q.mask is None else q.mask[i : i + 1])


def scan_products(
    quantities: MixerQuantities, weight: Tensor, every: int
) -> tuple[Tensor, Tensor, Tensor]:
    """See :func:`sparsessm_plugin.recurrence.scan_products`."""
    work = _Work(quantities, least_states=16)  # the smallest side of a matrix product
    starts, _ = work.starts(error_mode=0)
    programs = (work.batch * work.chunks, work.blocks)
    gram = work.room(*programs, work.block_n, work.block_n)
    skip, energy = (work.room(programs[0], work.N, work.channels) for _ in range(2))
    with torch.cuda.device_of(starts):
        _sum_products[(work.blocks, work.chunks, work.batch)](
            *work.inputs,
            work.C,
            weight.detach().contiguous(),
            work.mask,
            starts,
            gram,
            skip,
            energy,
            *work.sizes,
            every,
            MASKED=quantities.mask is not None,
            **work.options,
        )
    return (
        gram.sum((0, 1), dtype=torch.float64)[: work.N, : work.N],
        skip.sum(0, dtype=torch.float64).t(),
        energy.sum((0, 2), dtype=torch.float64),
    )


class _Work:
    """What every kernel needs: the inputs as they are read, and how they are shared out."""

    def __init__(self, q: MixerQuantities, least_states: int = 4):
        self.batch, self.length, self.channels = q.u.shape
        self.N, self.device = q.A.shape[1], q.u.device
        self.block_n = max(least_states, triton.next_power_of_2(self.N))
        warps = min(MOST_WARPS, max(1, self.block_n // STATES_A_WARP))
        self.blocks = triton.cdiv(self.channels, BLOCK)
        rows = self.batch * self.blocks * warps
        self.chunk = _chunk(self.length, PROGRAMS * _processors(self.device) // rows)
        self.chunks = triton.cdiv(self.length, self.chunk)
        self.sizes = (self.length, self.chunk, self.chunks, self.channels, self.N)
        self.options = {"BLOCK_N": self.block_n, "BLOCK_D": BLOCK, "num_warps": warps}

        # rows of a power of two are loaded whole, in vectors
        B, self.C = (F.pad(t.detach(), (0, self.block_n - self.N)).contiguous() for t in (q.B, q.C))
        self.A = q.A.detach().float().t().contiguous()  # (N, D): channels are the lanes
        u = q.u.detach().contiguous()
        self.inputs = (u, q.dt.detach().contiguous(), self.A, B)
        self.mask = u if q.mask is None else q.mask.contiguous().view(torch.uint8)

    def room(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=self.device)

    def starts(self, error_mode: int) -> tuple[Tensor, Tensor]:
        """(b, chunks - 1, N, D) states that all chunks but the first start with; h, then h'."""
        handed = self.chunks - 1
        starts = self.room(self.batch, handed, self.N, self.channels)
        pruned_starts = torch.empty_like(starts) if error_mode == 1 else starts
        if handed:
            between = (starts, pruned_starts, self.room(self.batch, handed, self.channels))
            with torch.cuda.device_of(starts):
                _end_chunks[(self.blocks, handed, self.batch)](
                    *self.inputs, *between, *self.sizes, ERROR=error_mode, **self.options
                )
                _hand_on[(self.blocks, self.batch)](
                    self.A, *between, *self.sizes, ERROR=error_mode, **self.options
                )
        return starts, pruned_starts


def _run(
    q: MixerQuantities,
    statistics: ScanStatistics | None,
    every: int = 0,
    gated: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """y (b, L, D), times the gate with ``gated``, and, with ``every``, h (b, L // every, N, D)."""
    request = statistics.request if statistics is not None else None
    error_mode = _ERROR_MODES[request.output_error if request is not None else None]
    work = _Work(q)
    y = work.room(work.batch, work.length, work.channels, dtype=gated or torch.float32)
    z = by_rows(q.z.detach())
    kept = work.room(work.batch, work.length // every, work.N, work.channels) if every else y
    sums = {}  # of each chunk, (b chunks, N, D), or the accumulators of steps, (L, N, D)
    for name, total in _accumulators(statistics).items():
        if total.ndim == 3:
            sums[name] = total.transpose(1, 2)
            assert sums[name].is_contiguous()
        else:
            sums[name] = work.room(work.batch * work.chunks, work.N, work.channels)
    starts, pruned_starts = work.starts(error_mode)
    with torch.cuda.device_of(y):
        _scan[(work.blocks, work.chunks, work.batch)](
            *work.inputs,
            work.C,
            q.D.detach().contiguous(),
            z,
            work.mask,
            starts,
            pruned_starts,
            y,
            kept,
            *(sums.get(name, y) for name in _STATISTICS),
            *work.sizes,
            every,
            z.stride(1),
            ERROR=error_mode,
            GATED=gated is not None,
            ENERGY="state_energy" in sums,
            TRANSITION="transition" in sums,
            PER_STEP=request is not None and request.per_step,
            MASKED=q.mask is not None,
            KEEP=every > 0,
            **work.options,
        )
    for name, total in _accumulators(statistics).items():
        if total.ndim == 2:
            total += sums[name].sum(0, dtype=torch.float64).t()
    return y, kept


def _accumulators(statistics: ScanStatistics | None) -> dict[str, Tensor]:
    found = {name: getattr(statistics, name, None) for name in _STATISTICS}
    return {name: total for name, total in found.items() if total is not None}


def _chunk(length: int, wanted: int) -> int:
    """Steps a chunk, so that about so many are made, all of one length but the last."""
    chunks = max(1, min(wanted, length // SHORTEST))
    return triton.cdiv(length, chunks)


@cache
def _processors(device: torch.device) -> int:
    if device.type != "cuda":  # Triton's interpreter
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count


# -- kernels -----------------------------------------------------------------------------
#
# Shapes in memory: u, dt, y (b, L, D), and z, whose rows are z_width apart; A (N, D); B, C
# (b, L, BLOCK_N); states and sums (..., N, D). In registers: (BLOCK_N, BLOCK_D). What lies outside
# of N and D is zero and stays.


@triton.jit
def _tile(A, channels, states, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr):
    """The program's channels d and states n, where entries lie in (N, D), and A log2(e)."""
    d = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    n = tl.arange(0, BLOCK_N)
    d_in = d < channels
    inside = (n < states)[:, None] & d_in[None, :]
    entry = n[:, None] * channels + d[None, :]
    a = tl.load(A + entry, mask=inside, other=0.0) * LOG2_E
    return d, d_in, n, inside, entry, a


@triton.jit
def _at(x, row, width, i, inside):
    """Row of a (rows, width) tensor in float32."""
    return tl.load(x + row * width + i, mask=inside, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=_SIZES)
def _end_chunks(
    u,
    dt,
    A,
    B,
    ends,
    pruned_ends,
    elapsed,
    length,
    chunk,
    chunks,
    channels,
    states,
    ERROR: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """The state every chunk but the last ends in from a zero state, and its sum of dt."""
    d, d_in, n, inside, entry, a = _tile(A, channels, states, BLOCK_N, BLOCK_D)
    first = tl.program_id(2).to(tl.int64) * length + tl.program_id(1) * chunk

    h = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    h_pruned = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    total = tl.zeros((BLOCK_D,), tl.float32)
    # the next step is loaded while this one is computed
    next_x = _at(u, first, channels, d, d_in)
    next_delta = _at(dt, first, channels, d, d_in)
    next_b = tl.load(B + first * BLOCK_N + n).to(tl.float32)
    for step in range(0, chunk):
        x = next_x
        delta = next_delta
        b = next_b
        row = first + tl.minimum(step + 1, chunk - 1)
        next_x = _at(u, row, channels, d, d_in)
        next_delta = _at(dt, row, channels, d, d_in)
        next_b = tl.load(B + row * BLOCK_N + n).to(tl.float32)

        drive = (delta * x)[None, :] * b[:, None]
        h = tl.exp2(delta[None, :] * a) * h + drive
        if ERROR == 1:
            h_pruned = tl.exp2(delta * -LOG2_E)[None, :] * h_pruned + drive
        total += delta

    slot = tl.program_id(2).to(tl.int64) * (chunks - 1) + tl.program_id(1)
    tl.store(elapsed + slot * channels + d, total, mask=d_in)
    at = slot * states * channels + entry
    tl.store(ends + at, h, mask=inside)
    if ERROR == 1:
        tl.store(pruned_ends + at, h_pruned, mask=inside)


@triton.jit(do_not_specialize=_SIZES)
def _hand_on(
    A,
    ends,
    pruned_ends,
    elapsed,
    length,
    chunk,
    chunks,
    channels,
    states,
    ERROR: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Turn, in place, what :func:`_end_chunks` left into the state the next chunk starts with."""
    d, d_in, _, inside, entry, a = _tile(A, channels, states, BLOCK_N, BLOCK_D)

    h = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    h_pruned = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    first = tl.program_id(1).to(tl.int64) * (chunks - 1)
    for c in range(0, chunks - 1):
        total = tl.load(elapsed + (first + c) * channels + d, mask=d_in, other=0.0)
        at = (first + c) * states * channels + entry
        h = tl.exp2(total[None, :] * a) * h + tl.load(ends + at, mask=inside, other=0.0)
        tl.store(ends + at, h, mask=inside)
        if ERROR == 1:
            left = tl.load(pruned_ends + at, mask=inside, other=0.0)
            h_pruned = tl.exp2(total * -LOG2_E)[None, :] * h_pruned + left
            tl.store(pruned_ends + at, h_pruned, mask=inside)


@triton.jit
def _add_step(sums, at, value, inside):
    """Add to one step of the (L, N, D) sums; no other program adds to this step's channels."""
    before = tl.load(sums + at, mask=inside, other=0.0)
    tl.store(sums + at, before + value, mask=inside)


@triton.jit(do_not_specialize=_SIZES)
def _scan(
    u,
    dt,
    A,
    B,
    C,
    D,
    z,
    mask,
    starts,
    pruned_starts,
    y,
    kept,
    energy,
    transition,
    error,
    length,
    chunk,
    chunks,
    channels,
    states,
    every,
    z_width,
    ERROR: tl.constexpr,
    GATED: tl.constexpr,
    ENERGY: tl.constexpr,
    TRANSITION: tl.constexpr,
    PER_STEP: tl.constexpr,
    MASKED: tl.constexpr,
    KEEP: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One chunk with the state it really starts with: output, kept states, statistics."""
    d, d_in, n, inside, entry, a = _tile(A, channels, states, BLOCK_N, BLOCK_D)
    skip = tl.load(D + d, mask=d_in, other=0.0).to(tl.float32)

    c_index = tl.program_id(1)
    sequence = tl.program_id(2).to(tl.int64)
    begin = c_index * chunk
    steps = tl.minimum(chunk, length - begin)
    first = sequence * length + begin
    # the first chunk starts from zero
    handed = (n < tl.where(c_index > 0, states, 0))[:, None] & d_in[None, :]
    at = (sequence * (chunks - 1) + tl.maximum(c_index - 1, 0)) * states * channels + entry
    h = tl.load(starts + at, mask=handed, other=0.0)
    h_pruned = h
    if ERROR == 1:
        h_pruned = tl.load(pruned_starts + at, mask=handed, other=0.0)
    energy_sum = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    transition_sum = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    error_sum = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)

    # the next step is loaded while this one is computed
    next_x = _at(u, first, channels, d, d_in)
    next_delta = _at(dt, first, channels, d, d_in)
    if GATED or ERROR > 0:
        next_z = _at(z, first, z_width, d, d_in)
    next_b = tl.load(B + first * BLOCK_N + n).to(tl.float32)
    next_c = tl.load(C + first * BLOCK_N + n).to(tl.float32)
    for step in range(0, steps):
        x = next_x
        delta = next_delta
        if GATED or ERROR > 0:
            gain = next_z * tl.sigmoid(next_z)
        b = next_b
        c = next_c
        row = first + tl.minimum(step + 1, steps - 1)
        next_x = _at(u, row, channels, d, d_in)
        next_delta = _at(dt, row, channels, d, d_in)
        if GATED or ERROR > 0:
            next_z = _at(z, row, z_width, d, d_in)
        next_b = tl.load(B + row * BLOCK_N + n).to(tl.float32)
        next_c = tl.load(C + row * BLOCK_N + n).to(tl.float32)

        t = begin + step
        step_at = t.to(tl.int64) * states * channels + entry
        if MASKED:
            real = tl.load(mask + first + step) != 0
        dA = tl.exp2(delta[None, :] * a)
        drive = (delta * x)[None, :] * b[:, None]
        if ENERGY:
            value = h * h
            if MASKED:
                value = tl.where(real, value, 0.0)
            if PER_STEP:
                _add_step(energy, step_at, value, inside)
            else:
                energy_sum += value
        if TRANSITION:
            value = dA
            if MASKED:
                value = tl.where(real, value, 0.0)
            if PER_STEP:
                _add_step(transition, step_at, value, inside)
            else:
                transition_sum += value
        h = dA * h + drive
        out = tl.sum(h * c[:, None], axis=0) + skip * x
        if GATED:
            out *= gain
        tl.store(y + (first + step) * channels + d, out, mask=d_in)
        if KEEP:  # noqa: SIM102 - known when compiling, and the next only when running
            if (t + 1) % every == 0:
                place = sequence * (length // every) + t // every
                tl.store(kept + place * states * channels + entry, h, mask=inside)
        if ERROR > 0:
            if ERROR == 1:
                h_pruned = tl.exp2(delta * -LOG2_E)[None, :] * h_pruned + drive
            else:
                h_pruned = drive
            value = c[:, None] * gain[None, :] * (h_pruned - h)
            value = value * value
            if MASKED:
                value = tl.where(real, value, 0.0)
            if PER_STEP:
                _add_step(error, step_at, value, inside)
            else:
                error_sum += value

    if not PER_STEP:
        at = (sequence * chunks + c_index) * states * channels + entry
        if ENERGY:
            tl.store(energy + at, energy_sum, mask=inside)
        if TRANSITION:
            tl.store(transition + at, transition_sum, mask=inside)
        if ERROR > 0:
            tl.store(error + at, error_sum, mask=inside)


@triton.jit(do_not_specialize=_SIZES)
def _sum_products(
    u,
    dt,
    A,
    B,
    C,
    weight,
    mask,
    starts,
    gram,
    skip,
    energy,
    length,
    chunk,
    chunks,
    channels,
    states,
    every,
    MASKED: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One chunk of :func:`scan_products`; gram is (b, chunks, blocks, BLOCK_N, BLOCK_N)."""
    d, d_in, n, inside, entry, a = _tile(A, channels, states, BLOCK_N, BLOCK_D)

    c_index = tl.program_id(1)
    sequence = tl.program_id(2).to(tl.int64)
    begin = c_index * chunk
    steps = tl.minimum(chunk, length - begin)
    first = sequence * length + begin
    # the first chunk starts from zero
    handed = (n < tl.where(c_index > 0, states, 0))[:, None] & d_in[None, :]
    at = (sequence * (chunks - 1) + tl.maximum(c_index - 1, 0)) * states * channels + entry
    h = tl.load(starts + at, mask=handed, other=0.0)
    gram_sum = tl.zeros((BLOCK_N, BLOCK_N), tl.float32)
    skip_sum = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    energy_sum = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)

    # the next step is loaded while this one is computed
    next_x = _at(u, first, channels, d, d_in)
    next_delta = _at(dt, first, channels, d, d_in)
    next_b = tl.load(B + first * BLOCK_N + n).to(tl.float32)
    for step in range(0, steps):
        x = next_x
        delta = next_delta
        b = next_b
        row = first + tl.minimum(step + 1, steps - 1)
        next_x = _at(u, row, channels, d, d_in)
        next_delta = _at(dt, row, channels, d, d_in)
        next_b = tl.load(B + row * BLOCK_N + n).to(tl.float32)

        h = tl.exp2(delta[None, :] * a) * h + (delta * x)[None, :] * b[:, None]
        if (begin + step + 1) % every == 0:
            real = 1
            if MASKED:
                real = tl.load(mask + first + step).to(tl.int32)
            if real != 0:
                gain = _at(weight, first + step, channels, d, d_in)
                c = tl.load(C + (first + step) * BLOCK_N + n).to(tl.float32)
                phi = h * c[:, None] * gain[None, :]
                # ieee: in TF32, states that cancel each other would not
                gram_sum += tl.dot(phi, tl.trans(phi), input_precision="ieee")
                skip_sum += phi * (gain * x)[None, :]
                energy_sum += h * h

    slot = sequence * chunks + c_index
    m = tl.arange(0, BLOCK_N)
    square = n[:, None] * BLOCK_N + m[None, :]
    block = slot * tl.num_programs(0) + tl.program_id(0)
    tl.store(gram + block * BLOCK_N * BLOCK_N + square, gram_sum)
    at = slot * states * channels + entry
    tl.store(skip + at, skip_sum, mask=inside)
    tl.store(energy + at, energy_sum, mask=inside)
