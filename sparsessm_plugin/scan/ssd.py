"""The scan of the Mamba-2 layout, chunk by chunk in matrix products.

State-space duality (arXiv 2405.21060, Listing 1): inside a chunk the recurrence is a masked
product of C and B, between chunks only states are handed on. In plain torch, so it runs on
every device and is differentiable; on a CPU it is what transformers' fallback computes, in
matrix products instead of broadcast sums.
"""

import torch
from torch import Tensor

from sparsessm_plugin.mixers.base import HeadQuantities

CHUNK = 64


def scan(quantities: HeadQuantities, chunk: int = CHUNK) -> Tensor:
    """Run the recurrence from a zero state.

    :param quantities: the recurrence's inputs
    :param chunk: steps a chunk; memory grows with it as (H, chunk, chunk) a chunk
    :return: y (b, L, D) float32, skip connection included, before the gate
    """
    y, _ = scan_with_states(quantities, chunk, keep_states=False)
    return y


def scan_with_states(
    quantities: HeadQuantities, chunk: int = CHUNK, keep_states: bool = True
) -> tuple[Tensor, Tensor | None]:
    """The same, and the states at the end of every whole chunk.

    :return: y (b, L, D), and h (b, L // chunk, D, N) or None
    """
    q = quantities
    batch, length, D = q.u.shape
    H = q.A.shape[0]
    G, N = q.B.shape[2:]
    P, heads = D // H, H // G
    # (b, G, H / G, L, ...): a group's heads side by side, time next to last
    u = q.u.view(batch, length, G, heads, P).permute(0, 2, 3, 1, 4)
    dt = q.dt.view(batch, length, G, heads).permute(0, 2, 3, 1)
    drive = u * dt[..., None]
    decay = dt * q.A.view(G, heads, 1)  # log of exp(dt A)
    B, C = q.B.transpose(1, 2), q.C.transpose(1, 2)  # (b, G, L, N)

    h = q.u.new_zeros(batch, G, heads, P, N)
    outputs, states = [], []
    for start in range(0, length, chunk):
        span = slice(start, min(start + chunk, length))
        B_now, C_now, x = B[:, :, span], C[:, :, span], drive[..., span, :]
        # in float64: a step that forgets everything leaves a large sum behind it, and what the
        # small steps after it add would be lost in float32
        total = decay[..., span].cumsum(-1, dtype=torch.float64)  # (b, G, h, c)
        # what entered at step s and is left at step t >= s
        lasting = (total[..., :, None] - total[..., None, :]).to(x.dtype)  # (b, G, h, t, s)
        lasting = lasting.masked_fill(
            torch.ones_like(lasting[0, 0, 0], dtype=torch.bool).triu(1), -torch.inf
        ).exp()
        scores = (C_now @ B_now.transpose(-1, -2))[:, :, None] * lasting
        y = scores @ x  # (b, G, h, c, P)
        y = y + (C_now[:, :, None] @ h.transpose(-1, -2)) * total.exp().to(x.dtype)[..., None]
        left = (total[..., -1:] - total).exp().to(x.dtype)[..., None] * x
        kept = total[..., -1, None, None].exp().to(x.dtype)
        h = h * kept + left.transpose(-1, -2) @ B_now[:, :, None]
        outputs.append(y)
        if keep_states and span.stop - span.start == chunk:
            states.append(h.reshape(batch, D, N))
    y = torch.cat(outputs, dim=-2) + u * q.D.view(G, heads, 1, 1)
    y = y.permute(0, 3, 1, 2, 4).reshape(batch, length, D)
    if not keep_states:
        return y, None
    return y, torch.stack(states, dim=1) if states else q.u.new_zeros(batch, 0, D, N)
