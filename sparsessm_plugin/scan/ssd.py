"""The scan of the Mamba-2 layout, chunk by chunk in matrix products.

State-space duality (arXiv 2405.21060, Listing 1): inside a chunk the recurrence is a masked
product of C and B, between chunks only states are handed on. In plain torch, so it runs on
every device and is differentiable; on a CPU it is what transformers' fallback computes, in
matrix products instead of broadcast sums.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

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
    count = -(-length // chunk)

    def chunks(x: Tensor) -> Tensor:
        """(b, L, ...) -> (b, chunks, c, ...); steps that are made up add and forget nothing."""
        padded = F.pad(x, (0, 0) * (x.ndim - 2) + (0, count * chunk - length))
        return padded.unflatten(1, (count, chunk))

    # (b, G, H / G, chunks, c, ...): a group's heads side by side, time next to last
    dt = chunks(q.dt).unflatten(-1, (G, heads)).permute(0, 3, 4, 1, 2)
    u = chunks(q.u).unflatten(-1, (G, heads, P)).permute(0, 3, 4, 1, 2, 5)
    B, C = (chunks(x).permute(0, 3, 1, 2, 4)[:, :, None] for x in (q.B, q.C))  # (b, G, 1, ...)
    x = u * dt[..., None]
    # log of exp(dt A), summed in float64: a step that forgets everything leaves a large sum
    # behind it, and what the small steps after it add would be lost in float32
    total = (dt * q.A.view(G, heads, 1, 1)).cumsum(-1, dtype=torch.float64)
    # what entered at step s and is left at step t >= s
    future = torch.ones(chunk, chunk, dtype=torch.bool, device=x.device).triu(1)
    lasting = (total[..., :, None] - total[..., None, :]).to(x.dtype)  # (..., t, s)
    lasting = lasting.masked_fill(future, -torch.inf).exp()
    y = ((C @ B.transpose(-1, -2)) * lasting) @ x  # (b, G, h, chunks, c, P)
    left = (total[..., -1:] - total).exp().to(x.dtype)[..., None] * x
    added = left.transpose(-1, -2) @ B  # (b, G, h, chunks, P, N)
    kept = total[..., -1].exp().to(x.dtype)[..., None, None]
    h = x.new_zeros(batch, G, heads, P, N)
    before = []
    for k in range(count):
        before.append(h)
        h = torch.addcmul(added[..., k, :, :], h, kept[..., k, :, :])  # one kernel a chunk
    start = torch.stack(before, dim=3)  # (b, G, h, chunks, P, N)
    y = y + (C @ start.transpose(-1, -2)) * total.exp().to(x.dtype)[..., None]
    y = y + u * q.D.view(G, heads, 1, 1, 1)
    y = y.permute(0, 3, 4, 1, 2, 5).reshape(batch, count * chunk, D)[:, :length]
    if not keep_states:
        return y, None
    ends = torch.stack([*before[1:], h], dim=1)[:, : length // chunk]
    return y, ends.reshape(batch, length // chunk, D, N)
