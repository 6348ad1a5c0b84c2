"""Memory for large results on the CPU, and small ones on their way to a GPU."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor


def room(*shape: int) -> Tensor:
    """An uninitialised float32 tensor in numpy's memory.

    numpy asks for large pages. What the C library takes from the system, from 32 MiB on each time
    anew, costs a page fault every 4 KiB: more than computing what is written there.
    """
    return torch.from_numpy(np.empty(shape, np.float32))


def handed(values: Sequence[Any] | Tensor, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Numbers that Python knows as a tensor on a device; nobody waits for a GPU.

    From other memory than this, torch copies once the GPU has done all that it was asked for.

    :param values: numbers, nested or not, or a tensor on the CPU
    """
    found = torch.as_tensor(values, dtype=dtype, device="cpu")  # whatever the default is
    if device.type != "cuda":
        return found.to(device)
    return found.contiguous().pin_memory().to(device, non_blocking=True)
