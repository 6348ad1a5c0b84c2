"""Memory for large results on the CPU."""

import numpy as np
import torch
from torch import Tensor


def room(*shape: int) -> Tensor:
    """An uninitialised float32 tensor in numpy's memory.

    numpy asks for large pages. What the C library takes from the system, from 32 MiB on each time
    anew, costs a page fault every 4 KiB: more than computing what is written there.
    """
    return torch.from_numpy(np.empty(shape, np.float32))
