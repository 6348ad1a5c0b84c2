"""The scan of the Mamba-2 layout with its gradient on CUDA, in Triton.

In plain torch, see ``ssd``, what the steps of a chunk hand to each other is written to memory for
every head, in both directions and in float64 while logarithms are subtracted. Here a program owns
a head's chunk and keeps it in registers. With l_t the logarithm of what is left at step t of a
state from the chunk's beginning, S that state, G the gradient for the state at its end, X = dt u,
and M_ts = exp(l_t - l_s) C_t B_s for s <= t,

    y_t = sum_s M_ts X_s + exp(l_t) C_t S
    dX_s = sum_t M_ts dy_t + exp(l_end - l_s) B_s G

and so on for B, C and l. Between chunks only states are handed on, forwards or backwards. No two
programs add to the same number: two runs give the same bits. One file because the kernels of both
directions read their inputs with the same functions.
"""

import warnings
from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from sparsessm_plugin.backends.choice import answers, by_itself
from sparsessm_plugin.errors import SparseSSMWarning
from sparsessm_plugin.recurrence import ssd
from sparsessm_plugin.recurrence.quantities import HeadQuantities

STEPS = 64  # of a chunk
MOST_CHANNELS = 128  # of a head
_STATES = 64  # that are in registers at once
_NUMBERS = 1024  # of a state that a program hands on
_WARPS = 8
# Of a tile's sides. Hopper multiplies in groups of 4 warps, and Triton divides the columns of a
# product of 64 rows between the two groups here. Of 16 columns each would take 8, and that TF32
# instruction (m64n8k8) is known to read past its rows of shared memory, which Triton does not pad
# (https://github.com/triton-lang/triton/pull/7981, /issues/10629): an illegal access where they
# are the last, after which the process cannot use the GPU.
_SHORTEST = 4 * _WARPS
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Never 1 and never a multiple of 16 to the compiler: one binary for all lengths and heads. Rows of
# channels and states may be such multiples, and are then loaded in vectors.
_SIZES = ["length", "chunks", "heads", "shared_by"]


def takes(quantities: HeadQuantities) -> bool:
    """Whether the kernels have code for these shapes and dtypes."""
    q = quantities
    alike = all(x.dtype in _DTYPES for x in (q.u, q.dt, q.A, q.B, q.C, q.D))
    channels = q.u.shape[-1] // max(1, len(q.A))
    return alike and q.u.numel() > 0 and 0 < channels <= MOST_CHANNELS and q.B.shape[-1] > 0


def usable(quantities: HeadQuantities) -> bool:
    """Whether they compile on this GPU and compute what plain torch does; asked once a shape.

    :raises RuntimeError: if a kernel has failed while it ran, after which nothing computes there
    """
    q = quantities
    return _usable(q.u.device, *_blocks(q.u.shape[-1] // len(q.A), q.B.shape[-1]), _precision())


def scan(quantities: HeadQuantities) -> Tensor:
    """y (b, L, D) float32 as :func:`sparsessm_plugin.recurrence.ssd.scan` gives it.

    :param quantities: as :func:`takes` allows
    """
    q = quantities
    missing = -q.dt.shape[1] % STEPS
    step = q.dt.float() * q.A.float()
    if missing:
        step = F.pad(step, (0, 0, 0, missing))
    step = step.unflatten(1, (-1, STEPS)).transpose(2, 3)  # (b, chunks, H, STEPS)
    return _Scan.apply(q.u, q.dt, step, q.B, q.C, q.D)


class _Scan(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, u: Tensor, dt: Tensor, step: Tensor, B: Tensor, C: Tensor, D: Tensor
    ) -> Tensor:
        logarithm = step.cumsum(-1, dtype=torch.float64).contiguous()  # see ``ssd``
        work = _Work(u, dt, logarithm, B, C, D)
        starts = work.states()
        y = torch.empty(u.shape, dtype=torch.float32, device=u.device)
        with torch.cuda.device_of(u):
            _end_chunks[work.grid](*work.inputs, starts, *work.sizes, C_SIDE=False, **work.options)
            _hand_on[work.passing](logarithm, starts, *work.sizes, BACK=False, **work.handed)
            _outputs[work.grid](
                *work.inputs, work.C, work.D, starts, y, *work.sizes, **work.options
            )
        ctx.save_for_backward(u, dt, logarithm, B, C, D, starts)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, ...]:
        u, dt, logarithm, B, C, D, starts = ctx.saved_tensors
        work = _Work(u, dt, logarithm, B, C, D)
        dy = dy.contiguous()
        ends = work.states()
        batch, length, H = dt.shape
        G, N = B.shape[2:]
        du = torch.empty(u.shape, dtype=u.dtype, device=u.device)
        room = starts.new_empty
        ddt, dstep, dD = room(dt.shape), room(logarithm.shape), room(logarithm.shape[:3])
        dB, dC = room(H, batch, length, N), room(H, batch, length, N)
        with torch.cuda.device_of(u):
            _end_chunks[work.grid](
                dy, dt, logarithm, work.C, ends, *work.sizes, C_SIDE=True, **work.options
            )
            _hand_on[work.passing](logarithm, ends, *work.sizes, BACK=True, **work.handed)
            _gradients[work.grid](
                *work.inputs,
                work.C,
                work.D,
                dy,
                starts,
                ends,
                du,
                ddt,
                dstep,
                dB,
                dC,
                dD,
                *work.sizes,
                **work.options,
            )
        # heads that share B and C, side by side
        dB, dC = (x.unflatten(0, (G, -1)).sum(1).movedim(0, 2).to(B.dtype) for x in (dB, dC))
        dD = dD.sum((0, 1), dtype=torch.float64).to(D.dtype)
        return du, ddt.to(dt.dtype), dstep, dB, dC, dD


class _Work:
    """What every kernel needs: the inputs as they are read, and how they are shared out."""

    def __init__(
        self, u: Tensor, dt: Tensor, logarithm: Tensor, B: Tensor, C: Tensor, D: Tensor
    ) -> None:
        batch, length, D_all = u.shape
        chunks, H = logarithm.shape[1:3]
        G, N = B.shape[2:]
        P = D_all // H
        self.C, self.D = C.detach().contiguous(), D.detach().contiguous()
        detached = (x.detach().contiguous() for x in (u, dt))
        self.inputs = (*detached, logarithm.detach(), B.detach().contiguous())
        self.sizes = (length, chunks, H, H // G, P, N)
        self.grid = (H, chunks, batch)
        self.passing = (triton.cdiv(P * N, _NUMBERS), H, batch)
        block_p, block_n = _blocks(P, N)
        self.handed = {"STEPS": STEPS, "NUMBERS": _NUMBERS}
        self.options = {
            "STEPS": STEPS,
            "BLOCK_P": block_p,
            "BLOCK_N": block_n,
            "PRECISION": _precision(),
            "num_warps": _WARPS,
            "num_stages": 1,
        }
        self._shape = (batch, chunks, H, P, N)
        self._device = u.device

    def states(self) -> Tensor:
        """Room for a state a head and chunk."""
        return torch.empty(self._shape, dtype=torch.float32, device=self._device)


def _blocks(channels: int, states: int) -> tuple[int, int]:
    """Channels and states of a tile, as powers of 2; what a head has less of is masked."""
    block_p, block_n = (max(_SHORTEST, triton.next_power_of_2(n)) for n in (channels, states))
    return block_p, min(_STATES, block_n)


def _precision() -> str:
    """Of products, as torch's own have it: TF32, or three products of TF32 numbers."""
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "tf32x3"


@cache
def _usable(device: torch.device, block_p: int, block_n: int, precision: str) -> bool:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device)

    length, H = 2 * STEPS + 3, 2
    own: dict[str, Any] = {
        "u": normal(1, length, H * block_p),
        "dt": F.softplus(normal(1, length, H) - 2),
        "A": -normal(H).exp(),
        "B": normal(1, length, 1, 2 * block_n),
        "C": normal(1, length, 1, 2 * block_n),
        "D": normal(H),
    }
    weight = normal(1, length, H * block_p)

    def gradients(scan: Any) -> list[Tensor]:
        with by_itself(device), torch.enable_grad():
            leaves = {name: x.clone().requires_grad_(True) for name, x in own.items()}
            y = scan(HeadQuantities(**leaves, z=weight))
            return [y.detach(), *torch.autograd.grad(y, list(leaves.values()), weight)]

    try:
        pairs = zip(gradients(scan), gradients(ssd.scan), strict=True)
        apart = max(float((a - b).norm() / b.norm()) for a, b in pairs)
        if not apart < 0.01:
            raise RuntimeError(f"they are {apart:.2g} from plain torch, relative")
    except torch.OutOfMemoryError:  # says nothing of the kernels
        raise
    except Exception as error:  # whatever a compiler may fail with
        reason = f"{type(error).__name__}: {error}".partition("\n")[0]
        kernels = f"Triton's kernels for tiles of {block_p} channels and {block_n} states"
        if not answers(device):
            raise RuntimeError(
                f"{kernels} of Mamba-2 scans with gradients failed while they ran, and this "
                f"process can no longer use {device}: {reason}"
            ) from error
        warnings.warn(
            f"gradients of Mamba-2 scans run in plain torch, which is slower: {kernels}: {reason}",
            SparseSSMWarning,
            stacklevel=2,
        )
        return False
    return True


# -- kernels -----------------------------------------------------------------------------
#
# A program: a head (axis 0) of a chunk (axis 1) of a sequence (axis 2). Shapes in memory: u, y
# (b, L, H P); dt (b, L, H); logarithm (b, chunks, H, STEPS) float64; B, C (b, L, G, N); states
# (b, chunks, H, P, N); dB, dC (H, b, L, N). Steps behind the last are zero and forget nothing.


@triton.jit
def _of_head(x, length, heads, channels, STEPS: tl.constexpr, BLOCK_P: tl.constexpr):
    """(STEPS, BLOCK_P) float32 of the program's head."""
    t = tl.program_id(1) * STEPS + tl.arange(0, STEPS)
    p = tl.arange(0, BLOCK_P)
    row = (tl.program_id(2).to(tl.int64) * length + t) * heads + tl.program_id(0)
    inside = (t < length)[:, None] & (p < channels)[None, :]
    return tl.load(x + row[:, None] * channels + p[None, :], mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _of_group(x, n, length, heads, shared_by, states, STEPS: tl.constexpr):
    """(STEPS, BLOCK_N) float32 of B or C for the program's head."""
    t = tl.program_id(1) * STEPS + tl.arange(0, STEPS)
    group = tl.program_id(0) // shared_by
    row = (tl.program_id(2).to(tl.int64) * length + t) * (heads // shared_by) + group
    inside = (t < length)[:, None] & (n < states)[None, :]
    return tl.load(x + row[:, None] * states + n[None, :], mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _of_steps(dt, logarithm, length, chunks, heads, STEPS: tl.constexpr):
    """dt (STEPS,), the logarithms (STEPS,) float64, and the last of these."""
    step = tl.arange(0, STEPS)
    t = tl.program_id(1) * STEPS + step
    row = (tl.program_id(2).to(tl.int64) * length + t) * heads + tl.program_id(0)
    delta = tl.load(dt + row, mask=t < length, other=0.0).to(tl.float32)
    at = ((tl.program_id(2).to(tl.int64) * chunks + tl.program_id(1)) * heads) * STEPS
    at += tl.program_id(0) * STEPS
    return delta, tl.load(logarithm + at + step), tl.load(logarithm + at + STEPS - 1)


@triton.jit
def _state_at(chunks, heads, channels, states):
    """Where the state of the program's head and chunk begins."""
    place = (tl.program_id(2).to(tl.int64) * chunks + tl.program_id(1)) * heads
    return (place + tl.program_id(0)) * channels * states


@triton.jit
def _state(x, at, n, channels, states, BLOCK_P: tl.constexpr):
    """(BLOCK_P, BLOCK_N) of a state."""
    p = tl.arange(0, BLOCK_P)
    inside = (p < channels)[:, None] & (n < states)[None, :]
    return tl.load(x + at + p[:, None] * states + n[None, :], mask=inside, other=0.0)


@triton.jit
def _lasting(log, STEPS: tl.constexpr):
    """(t, s) what is left at step t of what entered at step s; nothing of later steps."""
    step = tl.arange(0, STEPS)
    apart = (log[:, None] - log[None, :]).to(tl.float32)
    return tl.where(step[:, None] >= step[None, :], tl.exp(tl.minimum(apart, 0.0)), 0.0)


@triton.jit(do_not_specialize=_SIZES)
def _end_chunks(
    u,
    dt,
    logarithm,
    B,
    ends,
    length,
    chunks,
    heads,
    shared_by,
    channels,
    states,
    C_SIDE: tl.constexpr,
    STEPS: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The state that every chunk ends in from a zero state.

    With C_SIDE, of dy and C: the gradient that every chunk makes for the state it begins with.
    """
    delta, log, last = _of_steps(dt, logarithm, length, chunks, heads, STEPS)
    share = delta * tl.exp((last - log).to(tl.float32))
    if C_SIDE:
        share = tl.exp(log.to(tl.float32))
    x = _of_head(u, length, heads, channels, STEPS, BLOCK_P) * share[:, None]
    at = _state_at(chunks, heads, channels, states)
    p = tl.arange(0, BLOCK_P)
    for first in range(0, states, BLOCK_N):
        n = first + tl.arange(0, BLOCK_N)
        b = _of_group(B, n, length, heads, shared_by, states, STEPS)
        made = tl.dot(tl.trans(x), b, input_precision=PRECISION)
        inside = (p < channels)[:, None] & (n < states)[None, :]
        tl.store(ends + at + p[:, None] * states + n[None, :], made, mask=inside)


@triton.jit(do_not_specialize=_SIZES)
def _hand_on(
    logarithm,
    states_of,
    length,
    chunks,
    heads,
    shared_by,
    channels,
    states,
    BACK: tl.constexpr,
    STEPS: tl.constexpr,
    NUMBERS: tl.constexpr,
):
    """Turn what chunks make into what each begins with; BACK, into what comes from behind it.

    A program: some numbers (axis 0) of the states of a head (axis 1) of a sequence (axis 2).
    """
    i = tl.program_id(0) * NUMBERS + tl.arange(0, NUMBERS)
    size = channels * states
    inside = i < size
    h = tl.zeros((NUMBERS,), tl.float32)
    for step in range(0, chunks):
        c = step
        if BACK:
            c = chunks - 1 - step
        place = (tl.program_id(2).to(tl.int64) * chunks + c) * heads + tl.program_id(1)
        kept = tl.exp(tl.load(logarithm + place * STEPS + STEPS - 1).to(tl.float32))
        at = states_of + place * size + i
        made = tl.load(at, mask=inside, other=0.0)
        tl.store(at, h, mask=inside)
        h = kept * h + made


@triton.jit(do_not_specialize=_SIZES)
def _outputs(
    u,
    dt,
    logarithm,
    B,
    C,
    D,
    starts,
    y,
    length,
    chunks,
    heads,
    shared_by,
    channels,
    states,
    STEPS: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):
    delta, log, _ = _of_steps(dt, logarithm, length, chunks, heads, STEPS)
    at = _state_at(chunks, heads, channels, states)
    both = tl.zeros((STEPS, STEPS), tl.float32)
    entered = tl.zeros((STEPS, BLOCK_P), tl.float32)
    for first in range(0, states, BLOCK_N):
        n = first + tl.arange(0, BLOCK_N)
        b = _of_group(B, n, length, heads, shared_by, states, STEPS)
        c = _of_group(C, n, length, heads, shared_by, states, STEPS)
        start = _state(starts, at, n, channels, states, BLOCK_P)
        both += tl.dot(c, tl.trans(b), input_precision=PRECISION)
        entered += tl.dot(c, tl.trans(start), input_precision=PRECISION)
    x = _of_head(u, length, heads, channels, STEPS, BLOCK_P)
    skip = tl.load(D + tl.program_id(0)).to(tl.float32)
    inner = both * _lasting(log, STEPS) * delta[None, :]
    out = tl.dot(inner, x, input_precision=PRECISION)
    out += entered * tl.exp(log.to(tl.float32))[:, None] + skip * x
    t = tl.program_id(1) * STEPS + tl.arange(0, STEPS)
    p = tl.arange(0, BLOCK_P)
    row = (tl.program_id(2).to(tl.int64) * length + t) * heads + tl.program_id(0)
    inside = (t < length)[:, None] & (p < channels)[None, :]
    tl.store(y + row[:, None] * channels + p[None, :], out, mask=inside)


@triton.jit(do_not_specialize=_SIZES)
def _gradients(
    u,
    dt,
    logarithm,
    B,
    C,
    D,
    dy,
    starts,
    ends,
    du,
    ddt,
    dstep,
    dB,
    dC,
    dD,
    length,
    chunks,
    heads,
    shared_by,
    channels,
    states,
    STEPS: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):
    delta, log, last = _of_steps(dt, logarithm, length, chunks, heads, STEPS)
    since = tl.exp(log.to(tl.float32))
    until = tl.exp((last - log).to(tl.float32))
    at = _state_at(chunks, heads, channels, states)
    x = _of_head(u, length, heads, channels, STEPS, BLOCK_P)
    out = _of_head(dy, length, heads, channels, STEPS, BLOCK_P)
    both = tl.zeros((STEPS, STEPS), tl.float32)
    from_end = tl.zeros((STEPS, BLOCK_P), tl.float32)
    for first in range(0, states, BLOCK_N):
        n = first + tl.arange(0, BLOCK_N)
        b = _of_group(B, n, length, heads, shared_by, states, STEPS)
        c = _of_group(C, n, length, heads, shared_by, states, STEPS)
        end = _state(ends, at, n, channels, states, BLOCK_P)
        both += tl.dot(c, tl.trans(b), input_precision=PRECISION)
        from_end += tl.dot(b, tl.trans(end), input_precision=PRECISION)
    lasting = _lasting(log, STEPS)
    # of dt u, without dt where that is a factor
    to_x = tl.dot(tl.trans(both * lasting), out, input_precision=PRECISION)
    to_x += from_end * until[:, None]
    # of C_t B_s
    shared = tl.dot(out, tl.trans(x), input_precision=PRECISION) * lasting * delta[None, :]
    # of l_t - l_s, which is the sum of dt A over the steps j with s < j <= t: nothing cancels
    step = tl.arange(0, STEPS)
    earlier = step[None, :] < step[:, None]
    behind = tl.where(earlier, 0.0, 1.0)  # (j, t), t >= j
    change = tl.dot(behind, shared * both, input_precision=PRECISION)
    to_step = tl.sum(tl.where(earlier, change, 0.0), axis=1)
    entered = tl.zeros((STEPS,), tl.float32)
    handed = tl.zeros((STEPS,), tl.float32)
    carried = tl.zeros((BLOCK_P,), tl.float32)
    t = tl.program_id(1) * STEPS + tl.arange(0, STEPS)
    sequence = tl.program_id(2).to(tl.int64)
    head = tl.program_id(0)
    of_states = (head.to(tl.int64) * tl.num_programs(2) + sequence) * length + t
    for first in range(0, states, BLOCK_N):
        n = first + tl.arange(0, BLOCK_N)
        b = _of_group(B, n, length, heads, shared_by, states, STEPS)
        c = _of_group(C, n, length, heads, shared_by, states, STEPS)
        start = _state(starts, at, n, channels, states, BLOCK_P)
        end = _state(ends, at, n, channels, states, BLOCK_P)
        by_start = tl.dot(out, start, input_precision=PRECISION) * since[:, None]
        by_end = tl.dot(x, end, input_precision=PRECISION) * (until * delta)[:, None]
        entered += tl.sum(c * by_start, axis=1)
        handed += tl.sum(b * by_end, axis=1)
        carried += tl.sum(start * end, axis=1)
        inside = (t < length)[:, None] & (n < states)[None, :]
        place = of_states[:, None] * states + n[None, :]
        by_start += tl.dot(shared, b, input_precision=PRECISION)
        tl.store(dC + place, by_start, mask=inside)
        by_end += tl.dot(tl.trans(shared), c, input_precision=PRECISION)
        tl.store(dB + place, by_end, mask=inside)
    # what has entered is felt by the steps up to its own, what is handed on by those after it
    to_step += tl.sum(tl.where(earlier, handed[None, :], entered[None, :]), axis=1)
    to_step += tl.sum(carried, axis=0) * tl.exp(last.to(tl.float32))
    slot = (sequence * chunks + tl.program_id(1)) * heads + head
    tl.store(dstep + slot * STEPS + step, to_step)
    tl.store(dD + slot, tl.sum(tl.sum(out * x, axis=1), axis=0))

    row = (sequence * length + t) * heads + head
    tl.store(ddt + row, tl.sum(to_x * x, axis=1), mask=t < length)
    skip = tl.load(D + head).to(tl.float32)
    p = tl.arange(0, BLOCK_P)
    inside = (t < length)[:, None] & (p < channels)[None, :]
    to_u = to_x * delta[:, None] + skip * out
    tl.store(du + row[:, None] * channels + p[None, :], to_u, mask=inside)
