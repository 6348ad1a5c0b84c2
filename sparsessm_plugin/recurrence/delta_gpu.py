"""The gated delta rule on CUDA, in Triton.

A program owns some values of a head of one sequence, and keeps their dk rows of the state in
registers over all steps. No two programs add to the same number, so two runs give the same bits.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparsessm_plugin.recurrence.quantities import DeltaQuantities

_ENTRIES = 1024  # of the state in the registers of a program, which is one warp: no barriers
_MOST_VALUES = 64  # a program
# never 1 and never a multiple of 16 to the compiler: one binary for all lengths and heads
_SIZES = ["length", "heads", "key_heads", "dk", "dv"]


def scan(quantities: DeltaQuantities, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Run the recurrence; see :func:`sparsessm_plugin.recurrence.delta_rule.scan`.

    :return: y (b, L, H dv) and the last state (b, H, dk, dv)
    """
    batch, length, H, dv = quantities.v.shape
    G, dk = quantities.k.shape[2:]
    q, k = (x.detach().contiguous() for x in (quantities.normalized_q, quantities.normalized_k))
    v, beta, g = (
        x.detach().float().contiguous() for x in (quantities.v, quantities.beta, quantities.g)
    )
    y = torch.empty(batch, length, H, dv, dtype=torch.float32, device=v.device)
    last = torch.empty(batch, H, dk, dv, dtype=torch.float32, device=v.device)
    rows = triton.next_power_of_2(dk)
    values = max(1, min(_MOST_VALUES, _ENTRIES // rows, triton.next_power_of_2(dv)))
    first = last if state is None else state.detach().float().contiguous()
    with torch.cuda.device_of(v):
        _scan[(triton.cdiv(dv, values), batch * H)](
            q,
            k,
            v,
            beta,
            g,
            first,
            y,
            last,
            length,
            H,
            G,
            dk,
            dv,
            STARTED=state is not None,
            ROWS=rows,
            VALUES=values,
            num_warps=1,
        )
    return y.flatten(2), last


@triton.jit(do_not_specialize=_SIZES)
def _scan(
    q,
    k,
    v,
    beta,
    g,
    first,
    y,
    last,
    length,
    heads,
    key_heads,
    dk,
    dv,
    STARTED: tl.constexpr,
    ROWS: tl.constexpr,
    VALUES: tl.constexpr,
):
    """A program: some values (first axis) of a head of a sequence (second axis)."""
    n = tl.arange(0, ROWS)
    p = tl.program_id(0) * VALUES + tl.arange(0, VALUES)
    task = tl.program_id(1).to(tl.int64)
    h = task % heads
    has_n, has_p = n < dk, p < dv
    inside = has_n[:, None] & has_p[None, :]
    place = task * dk * dv + n[:, None] * dv + p[None, :]  # of the state
    S = tl.zeros((ROWS, VALUES), tl.float32)
    if STARTED:
        S = tl.load(first + place, mask=inside, other=0.0)
    # of the first step; from step to step these move by one row
    at_key = ((task // heads) * length * key_heads + h // (heads // key_heads)) * dk + n
    at_head = (task // heads) * length * heads + h
    for _ in range(length):
        key = tl.load(k + at_key, mask=has_n, other=0.0)
        query = tl.load(q + at_key, mask=has_n, other=0.0)
        value = tl.load(v + at_head * dv + p, mask=has_p, other=0.0)
        S *= tl.exp(tl.load(g + at_head))
        expected = tl.sum(S * key[:, None], 0)
        change = tl.load(beta + at_head) * (value - expected)
        S += key[:, None] * change[None, :]
        tl.store(y + at_head * dv + p, tl.sum(S * query[:, None], 0), mask=has_p)
        at_key += key_heads * dk
        at_head += heads
    tl.store(last + place, S, mask=inside)
