"""The gated delta rule in chunks of time (arXiv 2412.06464, section 3.3), in plain torch.

Within a chunk the values that the steps write depend on each other through a unit triangular
system; between chunks only states are handed on. All of it is matrix products and one triangular
solve, so it runs on every device and is differentiable. Nothing has the shape (b, L, dk, dv).
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from sparsessm_plugin.recurrence.quantities import DeltaQuantities

CHUNK = 64


def scan(
    quantities: DeltaQuantities, state: Tensor | None = None, chunk: int = CHUNK
) -> tuple[Tensor, Tensor]:
    """Run the recurrence; see :func:`sparsessm_plugin.recurrence.delta_rule.scan`.

    :param chunk: steps a chunk; memory grows with it as (b, L, H, chunk)
    :return: y (b, L, H dv) and the last state (b, H, dk, dv)
    """
    quantity = quantities
    batch, length, _, dv = quantity.v.shape
    G, dk = quantity.k.shape[2:]
    heads, count = quantity.heads_per_key, -(-length // chunk)

    def chunks(x: Tensor) -> Tensor:
        """(b, L, G or H, ...) -> (b, G, H / G or 1, chunks, c, ...) float32.

        Steps that are made up write nothing and forget nothing.
        """
        x = x.float()
        if length % chunk:
            x = F.pad(x, (0, 0) * (x.ndim - 2) + (0, count * chunk - length))
        return x.unflatten(2, (G, -1)).unflatten(1, (count, chunk)).movedim((3, 4), (1, 2))

    q, k = chunks(quantity.normalized_q), chunks(quantity.normalized_k)
    v, beta, g = (chunks(x) for x in (quantity.v, quantity.beta, quantity.g))
    total = g.cumsum(-1, dtype=torch.float64)  # log of the decay since the chunk began
    future = total.new_full((chunk, chunk), -torch.inf).triu(1)
    # what was written at step s and is left at step t >= s, (b, G, H / G, chunks, t, s)
    lasting = (total[..., :, None] - total[..., None, :]).add(future).exp().to(v.dtype)
    since = total.exp().to(v.dtype)[..., None]
    until = (total[..., -1:] - total).exp().to(v.dtype)[..., None]
    whole = total[..., -1].exp().to(v.dtype)[..., None, None]
    # beta_t (v_t - sum over s < t of what the keys of both steps share), solved for all t at once
    system = beta[..., None] * (k @ k.transpose(-1, -2)) * lasting
    right = torch.cat([v, k * since], dim=-1) * beta[..., None]
    solved = torch.linalg.solve_triangular(system, right, upper=False, unitriangular=True)
    own, before = solved.split([dv, dk], dim=-1)
    inner = (q @ k.transpose(-1, -2)) * lasting
    q, k = q * since, k * until
    S = v.new_zeros(batch, G, heads, dk, dv)
    if state is not None:
        S = state.float().unflatten(1, (G, heads))
    outputs = []
    for i in range(count):
        written = own[..., i, :, :] - before[..., i, :, :] @ S
        outputs.append(q[..., i, :, :] @ S + inner[..., i, :, :] @ written)
        S = whole[..., i, :, :] * S + k[..., i, :, :].transpose(-1, -2) @ written
    y = torch.stack(outputs, dim=3)  # (b, G, H / G, chunks, c, dv)
    y = y.flatten(3, 4)[..., :length, :].flatten(1, 2).transpose(1, 2)
    return y.flatten(2), S.flatten(1, 2)
