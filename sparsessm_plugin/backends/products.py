"""Linear layers in oneDNN on CPUs for which MKL has no fast kernels.

torch hands float32 products to MKL, which chooses its kernels by the processor's vendor: on an
AMD EPYC with AVX-512 it reached half of what oneDNN does. The one public way to oneDNN in
float32 is a convolution of width 1.
"""

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from sparsessm_plugin.backends.memory import room

# Multiplications below which finding oneDNN's kernel costs more than it gains.
_SMALLEST = 2**22
# Images from which on torch convolves in oneDNN with a single thread, too.
_IMAGES = 16
# Results from which on :func:`room` is cheaper than memory from torch, and how many of them are
# made at once, to be copied there. Columns, as oneDNN copies the weight for every call.
_LARGE = 2**23
_PIECE = 2**21
_COLUMNS = 64  # a multiple of every kernel's


@cache
def worthwhile() -> bool:
    """Whether this machine's processor is one that MKL is slow on."""
    if torch.backends.cpu.get_cpu_capability() != "AVX512":
        return False
    try:
        vendor = "AuthenticAMD" in Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return False
    return vendor and torch.backends.mkldnn.is_available()


def fast_products(device: torch.device) -> AbstractContextManager[Any]:
    """A context in which large linear layers run in oneDNN, where that is faster.

    For a single call, so that contexts end in the order in which they began.

    :param device: of the layers; the context does nothing if it is not the CPU
    """
    if device.type != "cpu" or torch.is_grad_enabled() or not worthwhile():
        return nullcontext()
    return OneDNNLinear()


def project(projection: Any, x: Tensor) -> Tensor:
    """``projection(x)``, called as a module, in :func:`fast_products`."""
    with fast_products(x.device):
        return projection(x)


class OneDNNLinear(TorchFunctionMode):
    """While it is entered, large float32 ``F.linear`` calls on the CPU run in oneDNN.

    Without gradients only. Results agree to rounding. Any other call is left alone.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func is F.linear and not kwargs and _takes(*args):
            return linear(*args)
        return func(*args, **(kwargs or {}))


def _takes(x: Any, weight: Any, bias: Any = None) -> bool:
    return (
        type(x) is Tensor
        and all(type(t) in (Tensor, torch.nn.Parameter) for t in (weight, bias) if t is not None)
        and not torch.is_grad_enabled()
        and all(
            t.device.type == "cpu" and t.dtype == torch.float32 and t.layout == torch.strided
            for t in (x, weight, bias)
            if t is not None
        )
        and x.ndim > 1
        and weight.ndim == 2
        and x.shape[-1] == weight.shape[1]
        and weight.is_contiguous()
        and x.numel() * len(weight) >= _SMALLEST
        and bool(torch.backends.mkldnn.enabled)
    )


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``F.linear`` as a convolution of width 1 over channels that stand last.

    :param x: (..., in)
    :param weight: (out, in)
    :param bias: (out,) or None
    :return: (..., out)
    """
    rows = x.reshape(-1, x.shape[-1])
    outputs = len(weight)
    if len(rows) * outputs < _LARGE:
        return _convolve(rows, weight, bias).view(*x.shape[:-1], outputs)
    y = room(len(rows), outputs)
    step = max(_COLUMNS, _PIECE // len(rows) // _COLUMNS * _COLUMNS)
    for start in range(0, outputs, step):
        part = slice(start, start + step)
        y[:, part] = _convolve(rows, weight[part], None if bias is None else bias[part])
    return y.view(*x.shape[:-1], outputs)


def _convolve(rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    images = _IMAGES if len(rows) % _IMAGES == 0 else 1
    pixels = rows.contiguous().view(images, 1, -1, rows.shape[1]).permute(0, 3, 1, 2)
    y = F.conv2d(pixels, weight[:, :, None, None], bias)  # (images, out, 1, rows / images)
    return y.permute(0, 2, 3, 1).reshape(len(rows), len(weight))
