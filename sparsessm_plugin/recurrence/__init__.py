"""The selective scan that also accumulates statistics: one interface, several backends."""

from collections.abc import Iterator
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from sparsessm_plugin.backends.choice import REFERENCE, backend_for
from sparsessm_plugin.errors import SparseSSMError
from sparsessm_plugin.recurrence import delta_rule, kernels, ssd
from sparsessm_plugin.recurrence.quantities import (
    DeltaQuantities,
    GroupedQuantities,
    HeadQuantities,
    MixerQuantities,
)
from sparsessm_plugin.recurrence.statistics import PrunedValue, ScanStatistics, StatisticsRequest

__all__ = [
    "REFERENCE",
    "DeltaQuantities",
    "GroupedQuantities",
    "HeadQuantities",
    "MixerQuantities",
    "PrunedValue",
    "ScanStatistics",
    "StatisticsRequest",
    "by_group",
    "implementation",
    "scan",
    "scan_products",
    "scan_states",
]

# One implementation a backend: a module with `scan` and `scan_states`.
_MODULES = {
    "cpu": "sparsessm_plugin.recurrence.cpu",
    "cuda": "sparsessm_plugin.recurrence.gpu",
    REFERENCE: "sparsessm_plugin.recurrence.reference",
}
# Largest N for which a kernel keeps N^2 sums next to the states.
MOST_PRODUCTS = 32


def implementation(backend: str | None, device: torch.device) -> Any:
    """The module that scans on a device, or that of a backend asked for by name.

    :param backend: its name, or None
    :param device: where the tensors are
    """
    return import_module(_MODULES[backend or backend_for(device)])


def scan(
    quantities: MixerQuantities | DeltaQuantities,
    statistics: ScanStatistics | None = None,
    backend: str | None = None,
) -> Tensor:
    """Run the recurrence from a zero state and accumulate statistics on the way.

    No tensor with both a batch and a time axis has a state axis; a GPU keeps states of the ends
    of chunks, which are the longer the more work there is. Differentiable only through
    mamba-ssm and the reference; see :mod:`sparsessm_plugin.recurrence.differentiable`.

    :param quantities: the recurrence's inputs
    :param statistics: accumulators to add this batch to, or None
    :param backend: to use instead of the device's own: ``cpu``, ``cuda`` or :data:`REFERENCE`
    :return: y (b, L, D) float32, skip connection included, before the gate
    :raises SparseSSMError: statistics of a recurrence whose A_log has no entry for each state
    """
    if isinstance(quantities, DeltaQuantities):
        if statistics is not None:
            raise SparseSSMError("statistics of A_log need the selective recurrence")
        return delta_rule.scan(quantities, backend)
    if isinstance(quantities, HeadQuantities):
        if statistics is not None:
            raise SparseSSMError(
                "statistics of A_log need one entry a state; Mamba-2 has one a head"
            )
        return ssd.scan(quantities)
    if isinstance(quantities, GroupedQuantities):
        ran = [scan(q, part, backend) for q, part in by_group(quantities, statistics)]
        return torch.cat(ran, dim=-1)
    if statistics is None and backend is None and kernels.available(quantities):
        return kernels.scan(quantities)
    y: Tensor = implementation(backend, quantities.u.device).scan(quantities, statistics)
    return y


def scan_states(
    quantities: MixerQuantities, every: int, backend: str | None = None
) -> tuple[Tensor, Tensor]:
    """Run the recurrence and keep the state after every so many steps.

    :param quantities: the recurrence's inputs
    :param every: keep h_t for t = every - 1, 2 every - 1, ... (steps count from 0)
    :param backend: to use instead of the device's own
    :return: y (b, L, D) as from :func:`scan`, and h (b, L // every, D, N)
    """
    if isinstance(quantities, HeadQuantities):
        y, states = ssd.scan_with_states(quantities, chunk=every)
        assert states is not None
        return y, states
    if isinstance(quantities, GroupedQuantities):
        ran = [scan_states(q, every, backend) for _, q in quantities.groups()]
        return torch.cat([y for y, _ in ran], dim=-1), torch.cat([h for _, h in ran], dim=2)
    y, states = implementation(backend, quantities.u.device).scan_states(quantities, every)
    return y, states


def scan_products(
    quantities: MixerQuantities, weight: Tensor, every: int, backend: str | None = None
) -> tuple[Tensor, Tensor, Tensor] | None:
    """Run the recurrence and sum up, without keeping states, what they add to the output.

    With ``phi_n = weight_t[d] C_{t,n} h_t[d,n]``, over channels and the steps t = every - 1,
    2 every - 1, ... that are no padding.

    :param quantities: the recurrence's inputs
    :param weight: (b, L, D) what the scan output is multiplied with
    :param every: look at every so many steps
    :param backend: to use instead of the device's own
    :return: float64 sums of phi_n phi_m (G, N, N) by group, of weight u phi_n by channel (D, N),
        and of h_n^2 (G, N); None for Mamba-2, many states, and where the backend cannot
    """
    if isinstance(quantities, HeadQuantities) or quantities.A.shape[1] > MOST_PRODUCTS:
        return None
    if isinstance(quantities, GroupedQuantities):
        of_groups = []
        for own, q in quantities.groups():
            sums = scan_products(q, weight[..., own], every, backend)
            if sums is None:
                return None
            of_groups.append(sums)
        gram, skip, energy = (torch.cat(each) for each in zip(*of_groups, strict=True))
        return gram, skip, energy
    module = implementation(backend, quantities.u.device)
    function = getattr(module, "scan_products", None)
    if function is None:
        return None
    gram, skip, energy = function(quantities, weight, every)
    return gram[None], skip, energy[None]


def by_group(
    quantities: GroupedQuantities, statistics: ScanStatistics | None
) -> Iterator[tuple[MixerQuantities, ScanStatistics | None]]:
    """The recurrence of each group alone, with its part of the accumulators.

    :param quantities: of all groups
    :param statistics: is written once all groups have been taken
    """
    if statistics is None:
        yield from ((q, None) for _, q in quantities.groups())
        return
    parts = statistics.split(quantities.n_groups)
    yield from ((q, part) for (_, q), part in zip(quantities.groups(), parts, strict=True))
    statistics.join(parts)
