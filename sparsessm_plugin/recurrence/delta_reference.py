"""The gated delta rule in plain torch, one time step after the other.

Slow and obvious: it is what the other implementations are tested against.
"""

import torch
from torch import Tensor

from sparsessm_plugin.recurrence.quantities import DeltaQuantities


def scan(quantities: DeltaQuantities, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Run the recurrence; see :func:`sparsessm_plugin.recurrence.delta_rule.scan`.

    :return: y (b, L, H dv) and the last state (b, H, dk, dv)
    """
    quantity = quantities
    heads = quantity.heads_per_key
    q = quantity.normalized_q.repeat_interleave(heads, dim=2)  # (b, L, H, dk)
    k = quantity.normalized_k.repeat_interleave(heads, dim=2)
    v, beta = quantity.v.float(), quantity.beta.float()
    decay = quantity.g.float().exp()
    batch, length, H, dv = v.shape
    S = v.new_zeros(batch, H, q.shape[-1], dv) if state is None else state.float()
    outputs = []
    for t in range(length):
        S = decay[:, t, :, None, None] * S
        expected = (S * k[:, t, :, :, None]).sum(-2)  # (b, H, dv)
        change = beta[:, t, :, None] * (v[:, t] - expected)
        S = S + k[:, t, :, :, None] * change[:, :, None, :]
        outputs.append((S * q[:, t, :, :, None]).sum(-2))
    return torch.stack(outputs, dim=1).flatten(2), S
