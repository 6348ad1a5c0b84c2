"""What a mixer does to single channels, in Triton: one pass over memory each.

Inputs may be any floating-point type and rows of a wider tensor; sums are float32.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

_STEPS, _CHANNELS = 32, 128  # a program
OLDEST = (7, 0)  # compute capability that Triton supports


def check(device: torch.device) -> None:
    """Make sure that kernels compile and run on a device.

    :raises RuntimeError: saying why not
    """
    found = torch.cuda.get_device_capability(device)
    if found < OLDEST:
        raise RuntimeError(
            f"Triton needs compute capability {OLDEST[0]}.{OLDEST[1]}, "
            f"the GPU has {found[0]}.{found[1]}"
        )
    with torch.cuda.device(device):
        probe = torch.zeros(1, device=device)
        _probe[(1,)](probe)  # fails without a C compiler, for one
        if float(probe) != 1.0:
            raise RuntimeError("Triton's kernels compute nothing on this GPU")


def convolve(x: Tensor, weight: Tensor, bias: Tensor | None, mask: Tensor | None) -> Tensor:
    """silu of a causal depthwise convolution over time.

    :param x: (b, L, D), zero before its first position
    :param weight: (D, 1, K)
    :param bias: (D,) or None
    :param mask: (b, L) bool, False where the result is zero; None where it is nowhere
    :return: (b, L, D) of the dtype of x
    """
    batch, length, channels = x.shape
    x = by_rows(x)
    out = torch.empty(batch, length, channels, dtype=x.dtype, device=x.device)
    grid = (triton.cdiv(channels, _CHANNELS), triton.cdiv(length, _STEPS), batch)
    with torch.cuda.device_of(x):
        _convolve[grid](
            x,
            weight.contiguous(),
            out if bias is None else bias,
            out if mask is None else mask.contiguous().view(torch.uint8),
            out,
            length,
            channels,
            x.stride(1),
            KERNEL=weight.shape[-1],
            BIAS=bias is not None,
            MASKED=mask is not None,
            STEPS=_STEPS,
            CHANNELS=_CHANNELS,
        )
    return out


def softplus(x: Tensor, bias: Tensor | None) -> Tensor:
    """(b, L, D) float32 ``log(1 + exp(x + bias))``.

    :param x: (b, L, D)
    :param bias: (D,) or None
    """
    batch, length, channels = x.shape
    x = by_rows(x)
    out = torch.empty(batch, length, channels, dtype=torch.float32, device=x.device)
    grid = (triton.cdiv(channels, _CHANNELS), triton.cdiv(length, _STEPS), batch)
    with torch.cuda.device_of(x):
        _softplus[grid](
            x,
            out if bias is None else bias,
            out,
            length,
            channels,
            x.stride(1),
            BIAS=bias is not None,
            STEPS=_STEPS,
            CHANNELS=_CHANNELS,
        )
    return out


def by_rows(x: Tensor) -> Tensor:
    """(b, L, D) of which all rows lie one after the other, at one distance."""
    regular = x.stride(2) == 1 and (len(x) == 1 or x.stride(0) == x.shape[1] * x.stride(1))
    return x if regular else x.clone(memory_format=torch.contiguous_format)


@triton.jit
def _probe(out):
    tl.store(out, 1.0)


@triton.jit
def _place(length, channels, STEPS: tl.constexpr, CHANNELS: tl.constexpr):
    """Steps and channels of the program, which of them there are, and the first row."""
    d = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    t = tl.program_id(1) * STEPS + tl.arange(0, STEPS)
    inside = (t < length)[:, None] & (d < channels)[None, :]
    return t, d, inside, tl.program_id(2).to(tl.int64) * length


@triton.jit
def _convolve(
    x,
    weight,
    bias,
    mask,
    out,
    length,
    channels,
    width,
    KERNEL: tl.constexpr,
    BIAS: tl.constexpr,
    MASKED: tl.constexpr,
    STEPS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """``width`` is the distance of two rows of x."""
    t, d, inside, first = _place(length, channels, STEPS, CHANNELS)
    total = tl.zeros((STEPS, CHANNELS), tl.float32)
    if BIAS:
        total += tl.load(bias + d, mask=d < channels, other=0.0).to(tl.float32)[None, :]
    for k in tl.static_range(KERNEL):
        s = t + (k - KERNEL + 1)
        seen = inside & (s >= 0)[:, None]
        at = (first + s)[:, None] * width + d[None, :]
        w = tl.load(weight + d * KERNEL + k, mask=d < channels, other=0.0).to(tl.float32)
        total += w[None, :] * tl.load(x + at, mask=seen, other=0.0).to(tl.float32)
    total *= tl.sigmoid(total)
    if MASKED:
        real = tl.load(mask + first + t, mask=t < length, other=0) != 0
        total = tl.where(real[:, None], total, 0.0)
    tl.store(out + (first + t)[:, None] * channels + d[None, :], total, mask=inside)


@triton.jit
def _softplus(
    x,
    bias,
    out,
    length,
    channels,
    width,
    BIAS: tl.constexpr,
    STEPS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    t, d, inside, first = _place(length, channels, STEPS, CHANNELS)
    value = tl.load(x + (first + t)[:, None] * width + d[None, :], mask=inside, other=0.0)
    value = value.to(tl.float32)
    if BIAS:
        value += tl.load(bias + d, mask=d < channels, other=0.0).to(tl.float32)[None, :]
    # log(1 + e) e / ((1 + e) - 1) undoes what rounding 1 + e does to a small e
    e = tl.exp(-tl.abs(value))
    one = 1.0 + e
    small = tl.where(one == 1.0, e, tl.log(one) * e / tl.where(one == 1.0, 1.0, one - 1.0))
    value = tl.maximum(value, 0.0) + small
    tl.store(out + (first + t)[:, None] * channels + d[None, :], value, mask=inside)
