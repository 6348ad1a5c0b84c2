"""The selective scan that also accumulates statistics: one interface, several backends."""

import warnings
from collections.abc import Callable
from functools import cache
from importlib import import_module

import torch
from torch import Tensor

from sparsessm_plugin.errors import SparseSSMError
from sparsessm_plugin.mixers.base import HeadQuantities, MixerAdapter, MixerQuantities
from sparsessm_plugin.scan import kernels, ssd
from sparsessm_plugin.scan.statistics import PrunedValue, ScanStatistics, StatisticsRequest

__all__ = [
    "BACKENDS",
    "PrunedValue",
    "ScanStatistics",
    "StatisticsRequest",
    "backend_for",
    "read_out",
    "scan",
    "scan_products",
    "scan_states",
]

Backend = Callable[[MixerQuantities, ScanStatistics | None], Tensor]

# One implementation a device type: a module with `scan`, `scan_states` and, where there are
# devices of the type that it cannot use, `check`. Devices that are not named here use the
# reference, which is plain torch.
BACKENDS = {"cpu": "sparsessm_plugin.scan.cpu", "cuda": "sparsessm_plugin.scan.gpu"}
REFERENCE = "sparsessm_plugin.scan.reference"
# Largest N for which a kernel keeps N^2 sums next to the states.
MOST_PRODUCTS = 32


@cache
def backend_for(device: torch.device) -> str:
    """Name of the module that scans on a device.

    It is the reference, with one warning a process, where the device type has a backend that
    this device cannot use: no Triton, or an old GPU.
    """
    name = BACKENDS.get(device.type, REFERENCE)
    try:
        check = getattr(import_module(name), "check", None)
        if check is not None:
            check(device)
    except Exception as error:  # whatever a compiler may fail with
        _warn_once(device.type, f"{type(error).__name__}: {error}")
        return REFERENCE
    return name


_warned: set[str] = set()


def _warn_once(device_type: str, reason: str) -> None:
    if device_type not in _warned:
        _warned.add(device_type)
        warnings.warn(
            f"scans on {device_type} run in plain torch, which is much slower: {reason}",
            RuntimeWarning,
            stacklevel=4,
        )


def scan(
    quantities: MixerQuantities,
    statistics: ScanStatistics | None = None,
    backend: str | None = None,
) -> Tensor:
    """Run the selective recurrence from a zero state and accumulate statistics on the way.

    No tensor with both a batch and a time axis has a state axis; a GPU keeps states of the ends
    of chunks, which are the longer the more work there is. Differentiable only through
    mamba-ssm and the reference; see :mod:`sparsessm_plugin.scan.differentiable`.

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
    implementation: Backend = import_module(backend or backend_for(quantities.u.device)).scan
    return implementation(quantities, statistics)


def read_out(
    adapter: MixerAdapter, quantities: MixerQuantities, statistics: ScanStatistics | None = None
) -> Tensor:
    """Run the recurrence up to what out_proj multiplies.

    :param adapter: of the mixer that the quantities come from
    :param quantities: the recurrence's inputs
    :param statistics: accumulators to add this batch to, or None
    :return: (b, L, D) float32; where the quantities are in half precision and kernels of this
        package run, in that
    """
    dtype = quantities.u.dtype
    name = backend_for(quantities.u.device)
    on_cpu = name == BACKENDS["cpu"] and not torch.is_grad_enabled()
    if adapter.has_state_transitions and (
        on_cpu or (dtype.itemsize == 2 and name == BACKENDS["cuda"])
    ):
        return import_module(name).scan(quantities, statistics, gated=dtype)
    return adapter.out_input(quantities, scan(quantities, statistics))


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
    name = backend or backend_for(quantities.u.device)
    return import_module(name).scan_states(quantities, every)


def scan_products(
    quantities: MixerQuantities, weight: Tensor, every: int, backend: str | None = None
) -> tuple[Tensor, Tensor, Tensor] | None:
    """Run the recurrence and sum up, without keeping states, what they add to the output.

    With ``phi_n = weight_t[d] C_{t,n} h_t[d,n]``, over channels and the steps t = every - 1,
    2 every - 1, ... that are no padding.

    :param quantities: the recurrence's inputs
    :param weight: (b, L, D) what the scan output is multiplied with
    :param every: look at every so many steps
    :param backend: module to use instead of the device's own
    :return: float64 sums of phi_n phi_m (N, N), of weight u phi_n by channel (D, N), and of
        h_n^2 (N,); None for Mamba-2, many states, and where the backend cannot
    """
    if isinstance(quantities, HeadQuantities) or quantities.A.shape[1] > MOST_PRODUCTS:
        return None
    module = import_module(backend or backend_for(quantities.u.device))
    function = getattr(module, "scan_products", None)
    return None if function is None else function(quantities, weight, every)
