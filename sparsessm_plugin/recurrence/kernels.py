"""mamba-ssm's CUDA kernel for scans without statistics, where it is installed."""

from functools import cache
from importlib import import_module
from typing import Any

from torch import Tensor

from sparsessm_plugin.recurrence.quantities import MixerQuantities


@cache
def _selective_scan() -> Any:
    try:
        return import_module("mamba_ssm.ops.selective_scan_interface").selective_scan_fn
    except Exception:  # not installed, or built for another torch
        return None


def available(quantities: MixerQuantities) -> bool:
    """Whether the kernel can take these quantities; it wants one dtype."""
    on_cuda = quantities.u.device.type == "cuda"
    alike = quantities.u.dtype == quantities.dt.dtype
    return on_cuda and alike and quantities.A.shape[1] <= 256 and _selective_scan() is not None


def scan(quantities: MixerQuantities) -> Tensor:
    """y (b, L, D) as :func:`sparsessm_plugin.recurrence.scan` gives it; differentiable."""
    q = quantities
    y = _selective_scan()(
        q.u.transpose(1, 2).contiguous(),
        q.dt.transpose(1, 2).contiguous(),
        q.A.contiguous(),
        q.B.transpose(1, 2).contiguous(),
        q.C.transpose(1, 2).contiguous(),
        q.D,
        delta_softplus=False,
    )
    return y.transpose(1, 2)
