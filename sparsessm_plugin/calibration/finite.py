"""Whether tensors are numbers, and messages where they are not."""

import math

import torch
from torch import Tensor


def is_finite(tensor: Tensor) -> bool:
    """Whether every entry is a number; one on the meta device has none."""
    if tensor.is_meta:
        return True
    # the sum of finite numbers is finite in float64; one pass without a mask in memory
    return math.isfinite(float(tensor.detach().sum(dtype=torch.float64)))
