"""The scan of the Mamba-2 layout, chunk by chunk in matrix products.

State-space duality (arXiv 2405.21060, Listing 1): inside a chunk the recurrence is a masked
product of C and B, between chunks only states are handed on. In plain torch, so it runs on
every device and is differentiable; on a CPU it is what transformers' fallback computes, in
matrix products instead of broadcast sums.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from sparsessm_plugin.recurrence.quantities import HeadQuantities

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
        if length % chunk:
            x = F.pad(x, (0, 0) * (x.ndim - 2) + (0, count * chunk - length))
        return x.unflatten(1, (count, chunk))

    dt, u = chunks(q.dt), chunks(q.u).unflatten(-1, (H, P))
    B, C = (chunks(x).transpose(2, 3) for x in (q.B, q.C))  # (b, chunks, G, c, N)
    x = u * dt[..., None]  # (b, chunks, c, H, P)
    # log of exp(dt A), summed in float64: a step that forgets everything leaves a large sum
    # behind it, and what the small steps after it add would be lost in float32
    total = (dt.transpose(2, 3) * q.A[:, None]).cumsum(-1, dtype=torch.float64)
    # what entered at step s and is left at step t >= s, (b, chunks, H, t, s)
    future = x.new_full((chunk, chunk), -torch.inf).triu(1)
    lasting = (total[..., :, None] - total[..., None, :]).to(x.dtype).add_(future).exp_()
    lasting = lasting.unflatten(2, (G, heads))
    inner = (C @ B.transpose(-1, -2))[:, :, :, None] * lasting
    y = (inner.flatten(2, 3) @ x.transpose(2, 3)).transpose(2, 3)
    # B and C belong to all heads of a group: side by side these are one matrix each
    left = (total[..., -1:] - total).exp().to(x.dtype).transpose(2, 3)[..., None] * x
    left = left.unflatten(3, (G, heads)).flatten(4).permute(0, 1, 3, 4, 2)
    added = (left @ B).unflatten(3, (heads, P))  # (b, chunks, G, H / G, P, N)
    kept = total[..., -1].exp().to(x.dtype).unflatten(2, (G, heads))[..., None, None]
    h = x.new_zeros(batch, G, heads, P, N)
    before = []
    for more, share in zip(added.unbind(1), kept.unbind(1), strict=True):
        before.append(h)
        h = torch.addcmul(more, h, share)  # one kernel a chunk
    start = torch.stack(before, dim=1).flatten(3, 4)  # (b, chunks, G, H / G * P, N)
    entered = (C @ start.transpose(-1, -2)).transpose(2, 3).reshape(x.shape)
    y = y + entered * total.exp().to(x.dtype).transpose(2, 3)[..., None]
    y = y + u * q.D[:, None]
    y = y.reshape(batch, count * chunk, D)[:, :length]
    if not keep_states:
        return y, None
    ends = torch.stack([*before[1:], h], dim=1)[:, : length // chunk]
    return y, ends.reshape(batch, length // chunk, D, N)
