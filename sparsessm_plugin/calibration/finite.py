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
        return bool(finite_extremes(tensor))
    # the sum of finite numbers is finite in float64, to which a GPU would first copy half precision
    return math.isfinite(float(tensor.detach().sum(dtype=torch.float64)))


def finite_extremes(tensor: Tensor) -> Tensor:
    """Whether the largest and the smallest entry are numbers: NaN counts as both.

    :param tensor: with an entry at least
    :return: bool without dimensions, on the same device
    """
    return torch.stack(tensor.detach().aminmax()).isfinite().all()
