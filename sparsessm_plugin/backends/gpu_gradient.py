"""The kernels of ``gpu`` for single channels, with gradients.

Sums over time are float32 within a program and float64 between them, in a fixed order.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from sparsessm_plugin.backends import gpu
from sparsessm_plugin.backends.gpu import _CHANNELS, _STEPS, _place, by_rows

_ROWS = 16  # of a norm that a program walks through on the way back


def convolve(x: Tensor, weight: Tensor, bias: Tensor | None, mask: Tensor | None) -> Tensor:
    """See :func:`sparsessm_plugin.backends.gpu.convolve`; differentiable."""
    return _Convolution.apply(x, weight, bias, mask)


def softplus(x: Tensor, bias: Tensor | None) -> Tensor:
    """See :func:`sparsessm_plugin.backends.gpu.softplus`; differentiable."""
    return _Softplus.apply(x, bias)


def gated_norm(
    y: Tensor, z: Tensor, weight: Tensor, groups: int, epsilon: float, dtype: torch.dtype
) -> Tensor:
    """(b, L, D) in a dtype: RMSNorm over equal groups of the channels of y silu(z); differentiable.

    :param y: (b, L, D) float32
    :param z: (b, L, D)
    :param weight: (D,) of the norm
    :param groups: over which the norm runs apart
    :param epsilon: beside the mean of squares
    :param dtype: of the result
    """
    return _GatedNorm.apply(y, z, weight, groups, epsilon, dtype)


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, mask: Tensor | None
    ) -> Tensor:
        ctx.save_for_backward(x, weight, bias, mask)
        return gpu.convolve(x, weight, bias, mask)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, mask = ctx.saved_tensors
        batch, length, channels = x.shape
        x, grad, weight_there = by_rows(x), grad.contiguous(), weight.contiguous()
        kernel = weight.shape[-1]
        grid = (triton.cdiv(channels, _CHANNELS), triton.cdiv(length, _STEPS), batch)
        to_x = torch.empty(batch, length, channels, dtype=x.dtype, device=x.device)
        before = torch.empty_like(to_x, dtype=torch.float32)  # of what SiLU reads
        to_weight = before.new_empty(grid[1] * batch, kernel + 1, channels)
        shape = {"KERNEL": kernel, "STEPS": _STEPS, "CHANNELS": _CHANNELS}
        with torch.cuda.device_of(x):
            _convolve_back[grid](
                x,
                weight_there,
                grad if bias is None else bias,
                grad if mask is None else mask.contiguous().view(torch.uint8),
                grad,
                before,
                to_weight,
                length,
                channels,
                x.stride(1),
                BIAS=bias is not None,
                MASKED=mask is not None,
                **shape,
            )
            _correlate[grid](before, weight_there, to_x, length, channels, **shape)
        sums = to_weight.sum(0, dtype=torch.float64)  # (K + 1, D)
        weights = sums[:kernel].t()[:, None].to(weight.dtype)
        return to_x, weights, None if bias is None else sums[kernel].to(bias.dtype), None


class _Softplus(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None) -> Tensor:
        out = gpu.softplus(x, bias)
        ctx.save_for_backward(out)
        ctx.dtypes = x.dtype, None if bias is None else bias.dtype
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        (out,) = ctx.saved_tensors
        dtype, bias_dtype = ctx.dtypes
        batch, length, channels = out.shape
        grad = grad.contiguous()
        to_x = torch.empty(out.shape, dtype=dtype, device=out.device)
        grid = (triton.cdiv(channels, _CHANNELS), triton.cdiv(length, _STEPS), batch)
        to_bias = torch.empty(grid[1] * batch, channels, dtype=torch.float32, device=out.device)
        with torch.cuda.device_of(out):
            _softplus_back[grid](
                grad, out, to_x, to_bias, length, channels, STEPS=_STEPS, CHANNELS=_CHANNELS
            )
        if bias_dtype is None:
            return to_x, None
        return to_x, to_bias.sum(0, dtype=torch.float64).to(bias_dtype)


class _GatedNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        y: Tensor,
        z: Tensor,
        weight: Tensor,
        groups: int,
        epsilon: float,
        dtype: torch.dtype,
    ) -> Tensor:
        ctx.save_for_backward(y, z, weight)
        ctx.rest = groups, epsilon
        out = torch.empty(y.shape, dtype=dtype, device=y.device)
        y, z, weight = y.contiguous(), by_rows(z), weight.contiguous()
        rows, channels = y.shape[0] * y.shape[1], y.shape[2]
        with torch.cuda.device_of(y):
            _norm[(rows, groups)](
                *(y, z, weight, out),
                *(channels, channels // groups, z.stride(1), epsilon),
                **_row_of(channels // groups),
            )
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        y, z, weight = ctx.saved_tensors
        groups, epsilon = ctx.rest
        rows, channels = y.shape[0] * y.shape[1], y.shape[2]
        to_y = torch.empty(y.shape, dtype=y.dtype, device=y.device)
        to_z = torch.empty(y.shape, dtype=z.dtype, device=y.device)
        parts = triton.cdiv(rows, _ROWS)
        to_weight = torch.empty(parts, channels, dtype=torch.float32, device=y.device)
        y, z, grad = y.contiguous(), by_rows(z), grad.contiguous()
        with torch.cuda.device_of(y):
            _norm_back[(parts, groups)](
                *(y, z, weight.contiguous(), grad, to_y, to_z, to_weight),
                *(rows, channels, channels // groups, z.stride(1), epsilon),
                ROWS=_ROWS,
                **_row_of(channels // groups),
            )
        to_weight = to_weight.sum(0, dtype=torch.float64).to(weight.dtype)
        return to_y, to_z, to_weight, None, None, None


def _row_of(width: int) -> dict[str, int]:
    """A row in the registers of a program."""
    block = triton.next_power_of_2(width)
    return {"BLOCK": block, "num_warps": max(1, min(16, block // 256))}


@triton.jit
def _part():
    """Which of the programs with these channels this is."""
    return tl.program_id(2).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)


@triton.jit
def _convolve_back(
    x,
    weight,
    bias,
    mask,
    grad,
    before,
    to_weight,
    length,
    channels,
    width,
    KERNEL: tl.constexpr,
    BIAS: tl.constexpr,
    MASKED: tl.constexpr,
    STEPS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """Gradients of what SiLU reads, and sums for weight and, behind these, bias."""
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
    share = tl.sigmoid(total)
    place = (first + t)[:, None] * channels + d[None, :]
    g = tl.load(grad + place, mask=inside, other=0.0).to(tl.float32)
    g *= share * (1.0 + total * (1.0 - share))
    if MASKED:
        real = tl.load(mask + first + t, mask=t < length, other=0) != 0
        g = tl.where(real[:, None], g, 0.0)
    tl.store(before + place, g, mask=inside)
    sums = to_weight + _part() * (KERNEL + 1) * channels + d
    tl.store(sums + KERNEL * channels, tl.sum(g, axis=0), mask=d < channels)
    for k in tl.static_range(KERNEL):
        s = t + (k - KERNEL + 1)
        seen = inside & (s >= 0)[:, None]
        at = (first + s)[:, None] * width + d[None, :]
        read = tl.load(x + at, mask=seen, other=0.0).to(tl.float32)
        tl.store(sums + k * channels, tl.sum(g * read, axis=0), mask=d < channels)


@triton.jit
def _correlate(
    before,
    weight,
    to_x,
    length,
    channels,
    KERNEL: tl.constexpr,
    STEPS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """The gradient of the convolution's input."""
    t, d, inside, first = _place(length, channels, STEPS, CHANNELS)
    total = tl.zeros((STEPS, CHANNELS), tl.float32)
    for k in tl.static_range(KERNEL):
        s = t + (KERNEL - 1 - k)
        reads = inside & (s < length)[:, None]
        at = (first + s)[:, None] * channels + d[None, :]
        w = tl.load(weight + d * KERNEL + k, mask=d < channels, other=0.0).to(tl.float32)
        total += w[None, :] * tl.load(before + at, mask=reads, other=0.0)
    tl.store(to_x + (first + t)[:, None] * channels + d[None, :], total, mask=inside)


@triton.jit
def _softplus_back(
    grad,
    out,
    to_x,
    to_bias,
    length,
    channels,
    STEPS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    t, d, inside, first = _place(length, channels, STEPS, CHANNELS)
    at = (first + t)[:, None] * channels + d[None, :]
    value = tl.load(out + at, mask=inside, other=0.0)
    # the slope is 1 - exp(-out), of which little is left by rounding where out is small
    small = value * (1.0 - value * (0.5 - value * (1.0 / 6 - value * (1.0 / 24))))
    slope = tl.where(value < 0.03, small, 1.0 - tl.exp(-value))
    g = tl.load(grad + at, mask=inside, other=0.0).to(tl.float32) * slope
    tl.store(to_x + at, g, mask=inside)
    tl.store(to_bias + _part() * channels + d, tl.sum(g, axis=0), mask=d < channels)


@triton.jit
def _norm(y, z, weight, out, channels, width, z_width, epsilon, BLOCK: tl.constexpr):
    """A program: a group of channels (axis 1) at a position (axis 0)."""
    row = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, BLOCK)
    d = tl.program_id(1) * width + i
    inside = i < width
    gate = tl.load(z + row * z_width + d, mask=inside, other=0.0).to(tl.float32)
    x = tl.load(y + row * channels + d, mask=inside, other=0.0) * gate * tl.sigmoid(gate)
    scale = 1.0 / tl.sqrt(tl.sum(x * x, axis=0) / width + epsilon)
    w = tl.load(weight + d, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * channels + d, x * scale * w, mask=inside)


@triton.jit
def _norm_back(
    y,
    z,
    weight,
    grad,
    to_y,
    to_z,
    to_weight,
    rows,
    channels,
    width,
    z_width,
    epsilon,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A program: a group of channels (axis 1) at some positions (axis 0)."""
    i = tl.arange(0, BLOCK)
    d = tl.program_id(1) * width + i
    within = i < width
    w = tl.load(weight + d, mask=within, other=0.0).to(tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    for step in range(0, ROWS):
        row = tl.program_id(0).to(tl.int64) * ROWS + step
        inside = i < tl.where(row < rows, width, 0)
        at = row * channels + d
        value = tl.load(y + at, mask=inside, other=0.0)
        gate = tl.load(z + row * z_width + d, mask=inside, other=0.0).to(tl.float32)
        g = tl.load(grad + at, mask=inside, other=0.0).to(tl.float32)
        share = tl.sigmoid(gate)
        gain = gate * share
        x = value * gain
        scale = 1.0 / tl.sqrt(tl.sum(x * x, axis=0) / width + epsilon)
        total += g * x * scale
        g *= w
        to_x = scale * (g - x * (tl.sum(g * x, axis=0) * scale * scale / width))
        tl.store(to_y + at, to_x * gain, mask=inside)
        slope = share * (1.0 + gate * (1.0 - share))
        tl.store(to_z + at, to_x * value * slope, mask=inside)
    tl.store(to_weight + tl.program_id(0) * channels + d, total, mask=within)
