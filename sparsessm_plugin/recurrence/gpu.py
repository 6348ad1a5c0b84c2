"""The selective scan on CUDA, in Triton.

A program is one warp, which owns a block of channels with all their states, in registers: a thread
keeps a few states of a channel, and some lanes share the channel. Where there are too few of them
to fill the GPU, time is cut into chunks that run side by side, in three passes: every chunk from
a zero state, only for the state it ends in; from chunk to chunk, what each really starts with
(the recurrence is linear, so the transitions over a chunk are ``exp(A sum dt)``); every chunk
once more, with output and statistics. Each program writes partial sums of its own, which are
added in a fixed order in float64: no atomics, so two runs give the same bits. Sums of every step
apart take more memory than all inputs together, so a program takes several sequences at once,
reads what is there and writes the sums of all of these.

Sums inside a chunk are float32, whatever the inputs are. One file because the passes share their
layout of registers and memory.
"""

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparsessm_plugin.backends.gpu import by_rows
from sparsessm_plugin.recurrence.quantities import MixerQuantities
from sparsessm_plugin.recurrence.statistics import ScanStatistics

WARP = 32
HELD, MOST_HELD = 4, 16  # states that a thread keeps
LANES = 4  # of a channel until threads keep the most: channels that lie together are read together
STEPS = 4  # whose inputs are loaded at once, while the steps before are computed
SEQUENCES = 2  # that a program takes at once where every step has sums of its own
WARPS = 20  # for each multiprocessor that a launch should have
SHORTEST = 16  # steps of the shortest chunk: loading and storing a state must pay off
BLOCK = 32  # channels a program of :func:`scan_products`, of which a warp has so many states
STATES_A_WARP = 16
PRODUCT_WARPS = 256  # in place of ``WARPS``
LOG2_E = tl.constexpr(1.4426950408889634)
_ERROR_MODES = {None: 0, "zero": 1, "memoryless": 2}
_STATISTICS = ("state_energy", "transition", "output_error")
# Never 1 and never a multiple of 16 to the compiler: one binary for all sizes, and loads of
# one channel a lane, which keeps the states of a channel in few threads.
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
            # groups of sequences add to the same steps, one after the other
            groups = _groups(len(quantities.u))
            ran = [_run(_rows(quantities, own), statistics, gated=gated)[0] for own in groups]
            return ran[0] if len(ran) == 1 else torch.cat(ran)
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


def _groups(sequences: int) -> list[slice]:
    """All sequences, as many at once as a program takes: a power of two, so that few compile."""
    groups: list[slice] = []
    start, size = 0, SEQUENCES
    while start < sequences:
        while start + size > sequences:
            size //= 2
        groups.append(slice(start, start + size))
        start += size
    return groups


def _rows(q: MixerQuantities, which: slice) -> MixerQuantities:
    cut = {name: getattr(q, name)[which] for name in ("u", "dt", "B", "C", "z")}
    return MixerQuantities(**cut, A=q.A, D=q.D, mask=None if q.mask is None else q.mask[which])


def scan_products(
    quantities: MixerQuantities, weight: Tensor, every: int
) -> tuple[Tensor, Tensor, Tensor]:
    """See :func:`sparsessm_plugin.recurrence.scan_products`."""
    # the smallest side of a matrix product is 16
    work = _Work(quantities, least_states=16, warps=PRODUCT_WARPS)
    starts, _ = work.starts(error_mode=0)
    blocks = triton.cdiv(work.channels, BLOCK)
    slots = work.batch * work.chunks
    gram = work.room(slots, blocks, work.block_n, work.block_n)
    skip, energy = (work.room(slots, work.N, work.channels) for _ in range(2))
    with torch.cuda.device_of(starts):
        _sum_products[(blocks, work.chunks, work.batch)](
            *work.inputs,
            weight.detach().contiguous(),
            work.mask,
            starts,
            gram,
            skip,
            energy,
            *work.sizes,
            every,
            MASKED=quantities.mask is not None,
            BLOCK_N=work.block_n,
            BLOCK_D=BLOCK,
            num_warps=work.block_n // STATES_A_WARP,
        )
    return (
        gram.sum((0, 1), dtype=torch.float64)[: work.N, : work.N],
        skip.sum(0, dtype=torch.float64).t(),
        energy.sum((0, 2), dtype=torch.float64),
    )


class _Work:
    """What every kernel needs: the inputs as they are read, and how they are shared out.

    :param least_states: a program has at least so many, the rest of them zero
    :param warps: for each multiprocessor that a launch should have
    :param sequences: that a program takes at once
    """

    def __init__(
        self, q: MixerQuantities, least_states: int = 4, warps: int = WARPS, sequences: int = 1
    ):
        self.batch, self.length, self.channels = q.u.shape
        self.N, self.device = q.A.shape[1], q.u.device
        self.block_n = max(least_states, triton.next_power_of_2(self.N))
        tiling = _tiling(self.block_n)
        self.options = {**tiling, "num_warps": 1}
        self.blocks = triton.cdiv(self.channels, tiling["BLOCK_D"])
        programs = self.blocks * (self.batch // sequences)
        self.steps = max(STEPS, tiling["LANES"])
        wanted = warps * _processors(self.device) // programs
        self.chunk = self.steps * triton.cdiv(_chunk(self.length, wanted), self.steps)
        self.chunks = triton.cdiv(self.length, self.chunk)
        self.sizes = (self.length, self.chunk, self.chunks, self.channels, self.N)

        # rows of a power of two, float32, aligned: a thread loads its states in vectors
        BC = self.room(self.batch, self.length, 2, self.block_n)
        for i, own in enumerate((q.B, q.C)):
            BC[:, :, i, : self.N] = own.detach()
        if self.block_n > self.N:
            BC[..., self.N :] = 0
        A = q.A.detach().float().t().contiguous()  # (N, D): channels are the lanes
        u = q.u.detach().contiguous()
        self.inputs = (u, q.dt.detach().contiguous(), A, BC)
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
                    *self.inputs,
                    *between,
                    *self.sizes,
                    ERROR=error_mode,
                    STEPS=self.steps,
                    **self.options,
                )
                _hand_on[(self.blocks, self.batch)](
                    self.inputs[2], *between, *self.sizes, ERROR=error_mode, **self.options
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
    per_step = request is not None and request.per_step
    sequences = len(q.u) if per_step else 1
    work = _Work(q, sequences=sequences)
    steps = work.options["LANES"] if per_step else work.steps
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
        _scan[(work.blocks, work.chunks, work.batch // sequences)](
            *work.inputs,
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
            PER_STEP=per_step,
            MASKED=q.mask is not None,
            KEEP=0 if not every else steps if every % steps == 0 else 1,
            UNEVEN=work.length % steps != 0,
            SEQUENCES=sequences,
            STEPS=steps,
            **work.options,
        )
    for name, total in _accumulators(statistics).items():
        if total.ndim == 2:
            total += sums[name].sum(0, dtype=torch.float64).t()
    return y, kept


def _accumulators(statistics: ScanStatistics | None) -> dict[str, Tensor]:
    found = {name: getattr(statistics, name, None) for name in _STATISTICS}
    return {name: total for name, total in found.items() if total is not None}


def _tiling(states: int) -> dict[str, int]:
    """How a warp is shared out: lanes a channel, states a lane, and channels.

    :param states: a power of two
    """
    lanes = min(WARP, max(1, min(LANES, states // HELD), states // MOST_HELD))
    return {"LANES": lanes, "HELD": states // lanes, "BLOCK_D": WARP // lanes}


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
# Shapes in memory: u, dt, y (b, L, D), and z, whose rows are z_width apart; A (N, D); BC
# (b, L, 2, BLOCK_N); states and sums (..., N, D). In registers (HELD, WARP): a thread is a column,
# which has HELD states of a channel; columns first count channels, then lanes. What lies outside
# of N and D is zero and stays. What has no states is loaded for LANES steps at once, (WARP,), each
# lane one of them, so that no lane computes what another has.


@triton.jit
def _tile(A, channels, states, LANES: tl.constexpr, HELD: tl.constexpr, BLOCK_D: tl.constexpr):
    """Channel d and lane of each column, states n, where entries lie in (N, D), and A log2(e)."""
    column = tl.arange(0, LANES * BLOCK_D)
    d = tl.program_id(0) * BLOCK_D + column % BLOCK_D
    lane = column // BLOCK_D
    n = (lane * HELD)[None, :] + tl.arange(0, HELD)[:, None]
    d_in = d < channels
    inside = (n < states) & d_in[None, :]
    entry = n * channels + d[None, :]
    a = tl.load(A + entry, mask=inside, other=0.0) * LOG2_E
    return d, lane, d_in, n, inside, entry, a


@triton.jit
def _load(
    x,
    width,
    last,
    d,
    lane,
    d_in,
    sequence,
    SEQUENCES: tl.constexpr,
    STEPS: tl.constexpr,
    LANES: tl.constexpr,
):
    """The next steps of some sequences, as they lie in memory: (WARP,) for every LANES steps.

    :param width: from one row to the next
    :param last: the last row that there is, from x on
    :param sequence: from one sequence to the next
    """
    rows = tl.tuple(())
    for i in tl.static_range(0, STEPS, LANES):
        at = tl.minimum(i + lane, last) * width + d
        for s in tl.static_range(SEQUENCES):
            rows += (tl.load(x + s * sequence + at, mask=d_in, other=0.0),)
    return rows


@triton.jit
def _of_lane(x, lane: tl.constexpr, LANES: tl.constexpr, BLOCK_D: tl.constexpr):
    """What one lane has of (WARP,), in all of its channel."""
    if LANES == 1:
        return x
    which = tl.full((LANES, BLOCK_D), lane, tl.int32)
    return tl.reshape(tl.gather(tl.reshape(x, (LANES, BLOCK_D)), which, 0), (LANES * BLOCK_D,))


@triton.jit
def _load_BC(
    BC,
    last,
    rows,
    SEQUENCES: tl.constexpr,
    STEPS: tl.constexpr,
    LANES: tl.constexpr,
    HELD: tl.constexpr,
):
    """B, then C of each of the next steps of some sequences, (HELD, LANES); see :func:`_load`."""
    found = tl.tuple(())
    for i in tl.static_range(STEPS):
        for s in tl.static_range(SEQUENCES):
            row = BC + (tl.minimum(i, last) + s * rows) * (2 * LANES * HELD)
            found += (_load_row(row, LANES, HELD), _load_row(row + LANES * HELD, LANES, HELD))
    return found


@triton.jit
def _load_row(row, LANES: tl.constexpr, HELD: tl.constexpr):
    """(HELD, LANES) of a row (BLOCK_N,) in memory; a lane's states lie together."""
    return tl.load(row + tl.arange(0, LANES)[None, :] * HELD + tl.arange(0, HELD)[:, None])


@triton.jit
def _to_columns(x, LANES: tl.constexpr, HELD: tl.constexpr, BLOCK_D: tl.constexpr):
    """What each column has of (HELD, LANES)."""
    x = tl.broadcast_to(x[:, :, None], (HELD, LANES, BLOCK_D))
    return tl.reshape(x, (HELD, LANES * BLOCK_D))


@triton.jit
def _over_lanes(x, LANES: tl.constexpr, BLOCK_D: tl.constexpr):
    """The sum of (WARP,) over a channel's lanes, in each of them."""
    total = tl.sum(tl.reshape(x, (LANES, BLOCK_D)), axis=0)[None, :]
    return tl.reshape(tl.broadcast_to(total, (LANES, BLOCK_D)), (LANES * BLOCK_D,))


@triton.jit(do_not_specialize=_SIZES)
def _end_chunks(
    u,
    dt,
    A,
    BC,
    ends,
    pruned_ends,
    elapsed,
    length,
    chunk,
    chunks,
    channels,
    states,
    ERROR: tl.constexpr,
    STEPS: tl.constexpr,
    LANES: tl.constexpr,
    HELD: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """The state every chunk but the last ends in from a zero state, and its sum of dt."""
    BLOCK_N: tl.constexpr = LANES * HELD
    d, lane, d_in, _, inside, entry, a = _tile(A, channels, states, LANES, HELD, BLOCK_D)
    first = tl.program_id(2).to(tl.int64) * length + tl.program_id(1) * chunk

    h = tl.zeros_like(a)
    h_pruned = tl.zeros_like(a)
    total = tl.zeros((LANES * BLOCK_D,), tl.float32)
    at = first * channels
    xs = _load(u + at, channels, chunk, d, lane, d_in, 0, 1, STEPS, LANES)
    deltas = _load(dt + at, channels, chunk, d, lane, d_in, 0, 1, STEPS, LANES)
    BC += first * (2 * BLOCK_N)
    for step in range(0, chunk, STEPS):
        # the next steps are loaded while these are computed; behind the last, these once more
        at = (first + tl.minimum(step + STEPS, chunk - STEPS)) * channels
        next_xs = _load(u + at, channels, chunk, d, lane, d_in, 0, 1, STEPS, LANES)
        next_deltas = _load(dt + at, channels, chunk, d, lane, d_in, 0, 1, STEPS, LANES)
        for k in tl.static_range(STEPS // LANES):
            delta = deltas[k].to(tl.float32)
            share = delta * xs[k].to(tl.float32)
            total += delta
            for i in tl.static_range(LANES):
                b = _load_row(BC + (step + k * LANES + i) * (2 * BLOCK_N), LANES, HELD)
                b = _to_columns(b, LANES, HELD, BLOCK_D)
                now = _of_lane(delta, i, LANES, BLOCK_D)
                drive = _of_lane(share, i, LANES, BLOCK_D)[None, :] * b
                h = tl.exp2(now[None, :] * a) * h + drive
                if ERROR == 1:
                    h_pruned = tl.exp2(now * -LOG2_E)[None, :] * h_pruned + drive
        xs = next_xs
        deltas = next_deltas

    slot = tl.program_id(2).to(tl.int64) * (chunks - 1) + tl.program_id(1)
    total = _over_lanes(total, LANES, BLOCK_D)
    tl.store(elapsed + slot * channels + d, total, mask=d_in & (lane == 0))
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
    LANES: tl.constexpr,
    HELD: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Turn, in place, what :func:`_end_chunks` left into the state the next chunk starts with."""
    d, _, d_in, _, inside, entry, a = _tile(A, channels, states, LANES, HELD, BLOCK_D)

    h = tl.zeros_like(a)
    h_pruned = tl.zeros_like(a)
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


@triton.jit(do_not_specialize=_SIZES)
def _scan(
    u,
    dt,
    A,
    BC,
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
    UNEVEN: tl.constexpr,
    SEQUENCES: tl.constexpr,
    STEPS: tl.constexpr,
    LANES: tl.constexpr,
    HELD: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One chunk with the state it really starts with: output, kept states, statistics.

    UNEVEN says that STEPS do not divide the length; KEEP, of how many steps one may be kept. With
    PER_STEP, sums are those of all SEQUENCES.
    """
    BLOCK_N: tl.constexpr = LANES * HELD
    NEEDS_Z: tl.constexpr = GATED or ERROR > 0
    PICKS: tl.constexpr = MASKED or UNEVEN
    AHEAD: tl.constexpr = SEQUENCES == 1  # registers for B and C of the next steps, too
    d, lane, d_in, n, inside, entry, a = _tile(A, channels, states, LANES, HELD, BLOCK_D)
    skip = tl.load(D + d, mask=d_in, other=0.0).to(tl.float32)

    c_index = tl.program_id(1)
    sequence = tl.program_id(2).to(tl.int64) * SEQUENCES
    begin = c_index * chunk
    steps = tl.minimum(chunk, length - begin)
    first = sequence * length + begin
    tile = states * channels
    rows = length.to(tl.int64)  # from one sequence to the next
    # the first chunk starts from zero
    handed = (n < tl.where(c_index > 0, states, 0)) & d_in[None, :]
    hs = tl.tuple(())
    pruned_hs = tl.tuple(())
    for s in tl.static_range(SEQUENCES):
        at = ((sequence + s) * (chunks - 1) + tl.maximum(c_index - 1, 0)) * tile + entry
        hs += (tl.load(starts + at, mask=handed, other=0.0),)
        if ERROR == 1:
            pruned_hs += (tl.load(pruned_starts + at, mask=handed, other=0.0),)
    energy_sum = tl.zeros_like(a)
    transition_sum = tl.zeros_like(a)
    error_sum = tl.zeros_like(a)
    if PER_STEP:
        at = begin.to(tl.int64) * tile + entry
        if ENERGY:
            next_energy = tl.load(energy + at, mask=inside, other=0.0)
        if TRANSITION:
            next_transition = tl.load(transition + at, mask=inside, other=0.0)
        if ERROR > 0:
            next_error = tl.load(error + at, mask=inside, other=0.0)

    wide = rows * channels
    z_wide = rows * z_width
    at = first * channels
    last = steps - 1
    xs = _load(u + at, channels, last, d, lane, d_in, wide, SEQUENCES, STEPS, LANES)
    deltas = _load(dt + at, channels, last, d, lane, d_in, wide, SEQUENCES, STEPS, LANES)
    if NEEDS_Z:
        at = first * z_width
        zs = _load(z + at, z_width, last, d, lane, d_in, z_wide, SEQUENCES, STEPS, LANES)
    bc = BC + first * (2 * BLOCK_N)
    if AHEAD:
        bcs = _load_BC(bc, steps - 1, rows, 1, STEPS, LANES, HELD)
    for step in range(0, steps, STEPS):
        # the next steps are loaded while these are computed; behind the last, these once more
        ahead = tl.minimum(step + STEPS, (steps - 1) // STEPS * STEPS)
        last = steps - 1 - ahead
        if AHEAD:
            next_bc = bc + ahead * (2 * BLOCK_N)
            next_bcs = _load_BC(next_bc, last, rows, 1, STEPS, LANES, HELD)
        at = (first + ahead) * channels
        next_xs = _load(u + at, channels, last, d, lane, d_in, wide, SEQUENCES, STEPS, LANES)
        next_deltas = _load(dt + at, channels, last, d, lane, d_in, wide, SEQUENCES, STEPS, LANES)
        if NEEDS_Z:
            at = (first + ahead) * z_width
            next_zs = _load(z + at, z_width, last, d, lane, d_in, z_wide, SEQUENCES, STEPS, LANES)
        for k in tl.static_range(STEPS // LANES):
            own = step + k * LANES + lane  # the step that a lane has
            shares = tl.tuple(())
            gains = tl.tuple(())
            picked = tl.tuple(())
            outs = tl.tuple(())
            for s in tl.static_range(SEQUENCES):
                x = xs[k * SEQUENCES + s].to(tl.float32)
                shares += (deltas[k * SEQUENCES + s].to(tl.float32) * x,)
                outs += (skip * x,)
                if NEEDS_Z:
                    gate = zs[k * SEQUENCES + s].to(tl.float32)
                    gains += (gate * tl.sigmoid(gate),)
                if PICKS:
                    real = tl.where(own < steps, 1, 0)
                    if MASKED:
                        seen = first + s * rows + tl.minimum(own, steps - 1)
                        real = tl.where(tl.load(mask + seen) != 0, real, 0)
                    picked += (real,)
            for i in tl.static_range(LANES):
                t = begin + step + k * LANES + i
                if PER_STEP:
                    next_at = tl.minimum(t + 1, begin + steps - 1).to(tl.int64) * tile + entry
                    if ENERGY:
                        energy_sum = next_energy
                        next_energy = tl.load(energy + next_at, mask=inside, other=0.0)
                    if TRANSITION:
                        transition_sum = next_transition
                        next_transition = tl.load(transition + next_at, mask=inside, other=0.0)
                    if ERROR > 0:
                        error_sum = next_error
                        next_error = tl.load(error + next_at, mask=inside, other=0.0)
                if not AHEAD:
                    at_bc = bc + tl.minimum(step + k * LANES + i, steps - 1) * (2 * BLOCK_N)
                    here = _load_BC(at_bc, 0, rows, SEQUENCES, 1, LANES, HELD)
                before = hs
                pruned_before = pruned_hs
                outs_before = outs
                hs = tl.tuple(())
                pruned_hs = tl.tuple(())
                outs = tl.tuple(())
                for s in tl.static_range(SEQUENCES):
                    if AHEAD:
                        b = _to_columns(bcs[2 * (k * LANES + i)], LANES, HELD, BLOCK_D)
                        c = _to_columns(bcs[2 * (k * LANES + i) + 1], LANES, HELD, BLOCK_D)
                    else:
                        b = _to_columns(here[2 * s], LANES, HELD, BLOCK_D)
                        c = _to_columns(here[2 * s + 1], LANES, HELD, BLOCK_D)
                    delta = deltas[k * SEQUENCES + s].to(tl.float32)
                    delta = _of_lane(delta, i, LANES, BLOCK_D)
                    dA = tl.exp2(delta[None, :] * a)
                    drive = _of_lane(shares[s], i, LANES, BLOCK_D)[None, :] * b
                    if PICKS:
                        real = _of_lane(picked[s], i, LANES, BLOCK_D)[None, :] != 0
                    if ENERGY:
                        value = before[s] * before[s]
                        if PICKS:
                            value = tl.where(real, value, 0.0)
                        energy_sum += value
                    if TRANSITION:
                        value = dA
                        if PICKS:
                            value = tl.where(real, value, 0.0)
                        transition_sum += value
                    h = dA * before[s] + drive
                    hs += (h,)
                    out = _over_lanes(tl.sum(h * c, axis=0), LANES, BLOCK_D)
                    outs += (outs_before[s] + tl.where(lane == i, out, 0.0),)
                    if KEEP == 1 or (KEEP > 1 and k * LANES + i == STEPS - 1):  # noqa: SIM102
                        if (t + 1) % every == 0 and t < length:
                            place = (sequence + s) * (length // every) + t // every
                            tl.store(kept + place * tile + entry, h, mask=inside)
                    if ERROR > 0:
                        h_pruned = drive
                        if ERROR == 1:
                            left = tl.exp2(delta * -LOG2_E)[None, :]
                            h_pruned = left * pruned_before[s] + drive
                            pruned_hs += (h_pruned,)
                        gain = _of_lane(gains[s], i, LANES, BLOCK_D)[None, :]
                        value = c * gain * (h_pruned - h)
                        value = value * value
                        if PICKS:
                            value = tl.where(real, value, 0.0)
                        error_sum += value
                if PER_STEP:
                    step_at = t.to(tl.int64) * tile + entry
                    step_in = inside
                    if UNEVEN:
                        step_in = (n < tl.where(t < length, states, 0)) & d_in[None, :]
                    if ENERGY:
                        tl.store(energy + step_at, energy_sum, mask=step_in)
                    if TRANSITION:
                        tl.store(transition + step_at, transition_sum, mask=step_in)
                    if ERROR > 0:
                        tl.store(error + step_at, error_sum, mask=step_in)
            for s in tl.static_range(SEQUENCES):
                out = outs[s]
                if GATED:
                    out *= gains[s]
                written = d_in
                if UNEVEN:
                    written = d_in & (own < steps)
                y_at = (first + s * rows + step) * channels + (k * LANES + lane) * channels + d
                tl.store(y + y_at, out, mask=written)
        xs = next_xs
        if AHEAD:
            bcs = next_bcs
        deltas = next_deltas
        if NEEDS_Z:
            zs = next_zs

    if not PER_STEP:
        at = (sequence * chunks + c_index) * tile + entry
        if ENERGY:
            tl.store(energy + at, energy_sum, mask=inside)
        if TRANSITION:
            tl.store(transition + at, transition_sum, mask=inside)
        if ERROR > 0:
            tl.store(error + at, error_sum, mask=inside)


@triton.jit
def _matrix(A, channels, states, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr):
    """:func:`_tile` as a matrix, (BLOCK_N, BLOCK_D)."""
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
def _sum_products(
    u,
    dt,
    A,
    BC,
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
    d, d_in, n, inside, entry, a = _matrix(A, channels, states, BLOCK_N, BLOCK_D)

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
    next_b = tl.load(BC + first * (2 * BLOCK_N) + n)
    for step in range(0, steps):
        x = next_x
        delta = next_delta
        b = next_b
        row = first + tl.minimum(step + 1, steps - 1)
        next_x = _at(u, row, channels, d, d_in)
        next_delta = _at(dt, row, channels, d, d_in)
        next_b = tl.load(BC + row * (2 * BLOCK_N) + n)

        h = tl.exp2(delta[None, :] * a) * h + (delta * x)[None, :] * b[:, None]
        if (begin + step + 1) % every == 0:
            real = 1
            if MASKED:
                real = tl.load(mask + first + step).to(tl.int32)
            if real != 0:
                gain = _at(weight, first + step, channels, d, d_in)
                c = tl.load(BC + (first + step) * (2 * BLOCK_N) + BLOCK_N + n)
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
