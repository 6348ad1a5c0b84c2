"""The selective scan in plain torch, one time step after the other.

Slow and obvious: it is what the other implementations are tested against, and it serves
wherever there is no faster one.
"""

import torch
from torch import Tensor

from sparsessm_plugin.recurrence.quantities import MixerQuantities
from sparsessm_plugin.recurrence.statistics import ScanStatistics


def scan(quantities: MixerQuantities, statistics: ScanStatistics | None = None) -> Tensor:
    """Run the recurrence; see :func:`sparsessm_plugin.recurrence.scan`."""
    q = quantities
    batch, length, channels = q.u.shape
    if statistics is not None:
        statistics.begin(q)
    request = statistics.request if statistics is not None else None
    error_of = request.output_error if request is not None else None
    gate = q.gate if error_of is not None else None

    h = q.u.new_zeros(batch, channels, q.A.shape[1])  # (b, D, N)
    h_pruned = h  # the same recurrence with every entry pruned, each for itself
    outputs = []
    for t in range(length):
        dt = q.dt[:, t, :, None]  # (b, D, 1)
        dA = torch.exp(dt * q.A)  # (b, D, N)
        drive = dt * q.u[:, t, :, None] * q.B[:, t, None, :]  # (b, D, N)
        h_before = h
        h = dA * h + drive
        outputs.append((h * q.C[:, t, None, :]).sum(-1))  # (b, D)

        if statistics is None:
            continue
        real = None if q.mask is None else q.mask[:, t, None, None]  # (b, 1, 1)
        if statistics.state_energy is not None:
            _add(statistics, statistics.state_energy, t, h_before.square(), real)
        if statistics.transition is not None:
            _add(statistics, statistics.transition, t, dA, real)
        if statistics.output_error is not None and gate is not None:
            # a pruned A_log of 0 means A = -1; a memoryless entry forgets at every step
            h_pruned = torch.exp(-dt) * h_pruned + drive if error_of == "zero" else drive
            error = q.C[:, t, None, :] * (h_pruned - h) * gate[:, t, :, None]
            _add(statistics, statistics.output_error, t, error.square(), real)
    return torch.stack(outputs, dim=1) + q.D * q.u


def scan_states(quantities: MixerQuantities, every: int) -> tuple[Tensor, Tensor]:
    """Run the recurrence and keep states; see :func:`sparsessm_plugin.recurrence.scan_states`."""
    q = quantities
    batch, length, channels = q.u.shape
    h = q.u.new_zeros(batch, channels, q.A.shape[1])  # (b, D, N)
    outputs, states = [], []
    for t in range(length):
        dt = q.dt[:, t, :, None]
        h = torch.exp(dt * q.A) * h + dt * q.u[:, t, :, None] * q.B[:, t, None, :]
        outputs.append((h * q.C[:, t, None, :]).sum(-1))
        if (t + 1) % every == 0:
            states.append(h)
    y = torch.stack(outputs, dim=1) + q.D * q.u
    return y, torch.stack(states, dim=1) if states else h.new_zeros(batch, 0, *h.shape[1:])


def _add(
    statistics: ScanStatistics, accumulator: Tensor, t: int, value: Tensor, real: Tensor | None
) -> None:
    if real is not None:
        # where, not a product: NaN at a padded position must not spread
        value = torch.where(real, value, torch.zeros_like(value))
    total = value.sum(dim=0)  # (D, N)
    if statistics.request.per_step:
        accumulator[t] += total
    else:
        accumulator += total
