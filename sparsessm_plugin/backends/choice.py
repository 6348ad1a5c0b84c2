"""Which kernels compute on a device: numba's on a CPU, Triton's on a GPU, plain torch elsewhere."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from sparsessm_plugin.errors import SparseSSMWarning

# One module a device type, with kernels for single channels and, where there are devices of the
# type that it cannot use, ``check``. Devices that are not named here use plain torch.
BACKENDS = {"cpu": "sparsessm_plugin.backends.cpu", "cuda": "sparsessm_plugin.backends.gpu"}
# The same functions with gradients, where a device type has them.
_WITH_GRADIENTS = {"cuda": "sparsessm_plugin.backends.gpu_gradient"}
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
    """The module with kernels for single channels of such a tensor.

    :return: Triton's on a GPU, which have gradients where these are recorded; numba's for float32
        on the CPU without gradients; None where neither runs
    """
    half = x.dtype in (torch.bfloat16, torch.float16)
    if x.dtype != torch.float32 and (x.device.type == "cpu" or not half):
        return None
    name = backend_for(x.device)
    modules = _WITH_GRADIENTS if torch.is_grad_enabled() else BACKENDS
    return import_module(modules[name]) if name in modules else None


@contextmanager
def by_itself(device: torch.device) -> Iterator[None]:
    """A context for trying kernels out, whatever computation is the first that asks for them.

    A layer whose activations are checkpointed counts the tensors that are saved in it, and must
    save as many when it is computed again.

    :param device: of the kernels
    """
    with (
        torch.inference_mode(False),
        torch.autocast(device.type, enabled=False),
        torch.autograd.graph.saved_tensors_hooks(Tensor.detach, lambda x: x),
    ):
        yield


def answers(device: torch.device) -> bool:
    """Whether a device still computes: a kernel that fails while it runs on a GPU ends that.

    :param device: waited for
    """
    if device.type != "cuda":
        return True
    try:
        torch.cuda.synchronize(device)
    except RuntimeError:
        return False
    return True


def _warn_once(device_type: str, reason: str) -> None:
    if device_type not in _warned:
        _warned.add(device_type)
        warnings.warn(
            f"scans on {device_type} run in plain torch, which is much slower: {reason}",
            SparseSSMWarning,
            stacklevel=4,
        )
