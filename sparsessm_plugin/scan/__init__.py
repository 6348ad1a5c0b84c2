"""The selective scan that also accumulates statistics: one interface, several backends."""

from collections.abc import Callable
from importlib import import_module

from torch import Tensor

from sparsessm_plugin.errors import SparseSSMError
from sparsessm_plugin.mixers.base import HeadQuantities, MixerQuantities
from sparsessm_plugin.scan import kernels, ssd
from sparsessm_plugin.scan.statistics import PrunedValue, ScanStatistics, StatisticsRequest

__all__ = [
    "BACKENDS",
    "PrunedValue",
    "ScanStatistics",
    "StatisticsRequest",
    "scan",
    "scan_states",
]

Backend = Callable[[MixerQuantities, ScanStatistics | None], Tensor]

# One implementation a device type; a module has one function, `scan`. Devices that are
# not named here use the reference, which is plain torch.
BACKENDS = {"cpu": "sparsessm_plugin.scan.cpu"}
REFERENCE = "sparsessm_plugin.scan.reference"


def scan(
    quantities: MixerQuantities,
    statistics: ScanStatistics | None = None,
    backend: str | None = None,
) -> Tensor:
    """Run the selective recurrence from a zero state and accumulate statistics on the way.

    Memory is bounded by (b, D, N): no tensor with both a batch and a time axis has a state
    axis. Differentiable only through the reference backend.

    :param quantities: the recurrence's inputs
    :param statistics: accumulators to add this batch to, or None
    :param backend: module to use instead of the device's own, e.g. :data:`REFERENCE`
    :return: y (b, L, D) float32, skip connection included, before the gate
    """
    if isinstance(quantities, HeadQuantities):
        if statistics is not None:
            raise SparseSSMError(
                "statistics of A_log need one entry a state; Mamba-2 has one a head"
            )
        return ssd.scan(quantities)
    if statistics is None and backend is None and kernels.available(quantities):
        return kernels.scan(quantities)
    name = backend or BACKENDS.get(quantities.u.device.type, REFERENCE)
    implementation: Backend = import_module(name).scan
    return implementation(quantities, statistics)


def scan_states(
    quantities: MixerQuantities, every: int, backend: str | None = None
) -> tuple[Tensor, Tensor]:
    """Run the recurrence and keep the state after every so many steps.

    :param quantities: the recurrence's inputs
    :param every: keep h_t for t = every - 1, 2 every - 1, ... (steps count from 0)
    :param backend: module to use instead of the device's own
    :return: y (b, L, D) as from :func:`scan`, and h (b, L // every, D, N)
    """
    if isinstance(quantities, HeadQuantities):
        y, states = ssd.scan_with_states(quantities, chunk=every)
        assert states is not None
        return y, states
    name = backend or BACKENDS.get(quantities.u.device.type, REFERENCE)
    return import_module(name).scan_states(quantities, every)
