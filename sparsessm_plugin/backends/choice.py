"""Which kernels compute on a device: numba's on a CPU, Triton's on a GPU, plain torch elsewhere."""

import warnings
from functools import cache
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from sparsessm_plugin.errors import SparseSSMWarning

# One module a device type, with kernels for single channels and, where there are devices of the
# type that it cannot use, ``check``. Devices that are not named here use plain torch.
BACKENDS = {"cpu": "sparsessm_plugin.backends.cpu", "cuda": "sparsessm_plugin.backends.gpu"}
REFERENCE = "reference"

_warned: set[str] = set()


@cache
def backend_for(device: torch.device) -> str:
    """The device's type, or :data:`REFERENCE` where only plain torch computes.

    It is the reference, with one warning a process, where the device type has kernels that this
    device cannot use: no Triton, or an old GPU.
    """
    if device.type not in BACKENDS:
        return REFERENCE
    try:
        check = getattr(import_module(BACKENDS[device.type]), "check", None)
        if check is not None:
            check(device)
    except Exception as error:  # whatever a compiler may fail with
        _warn_once(device.type, f"{type(error).__name__}: {error}")
        return REFERENCE
    return device.type


def kernels_for(x: Tensor) -> Any:
    """The module with kernels for single channels of such a tensor; they have no gradients.

    :return: Triton's on a GPU, numba's for float32 on the CPU, None where neither runs
    """
    on_cpu = x.device.type == "cpu"
    if torch.is_grad_enabled() or (on_cpu and x.dtype != torch.float32):
        return None
    name = BACKENDS.get(backend_for(x.device))
    return None if name is None else import_module(name)


def _warn_once(device_type: str, reason: str) -> None:
    if device_type not in _warned:
        _warned.add(device_type)
        warnings.warn(
            f"scans on {device_type} run in plain torch, which is much slower: {reason}",
            SparseSSMWarning,
            stacklevel=4,
        )
