"""Whether tensors are numbers, and messages where they are not."""

import math

import torch
from torch import Tensor


def is_finite(tensor: Tensor) -> bool:
    """Whether every entry is a number; one on the meta device has none."""
    if tensor.is_meta:
        return True
    # one pass without a mask in memory
    if tensor.is_cuda and tensor.dtype.itemsize == 2 and tensor.numel():
        return finite_extremes(tensor)
    # the sum of finite numbers is finite in float64, to which a GPU would first copy half precision
    return math.isfinite(float(tensor.detach().sum(dtype=torch.float64)))


def finite_extremes(tensor: Tensor) -> bool:
    """Whether the largest and the smallest entry are numbers: NaN counts as both."""
    return bool(torch.stack(tensor.detach().aminmax()).isfinite().all())
