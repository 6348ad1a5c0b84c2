"""What the dense model predicts for many tokens, in little memory.

Kept is not the prediction of every token, as many numbers as the vocabulary has entries, but what
the head made it from, hidden_size numbers, and the head as it was: the predictions are exact but
for the rounding of what is kept.
"""

import os
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from sparsessm_plugin.cost import has_room, memory_available
from sparsessm_plugin.errors import SparseSSMError

_SHARE = 4  # main memory that is free, by what predictions may take of it; a file takes the rest


class Head(NamedTuple):
    """What a head multiplies by, and the factor of what it gives."""

    weight: Tensor  # (vocabulary, hidden_size)
    bias: Tensor | None
    scale: float

    def to(self, device: torch.device) -> "Head":
        """On a device."""
        bias = None if self.bias is None else self.bias.to(device)
        return Head(self.weight.to(device), bias, self.scale)

    def logits(self, hidden_states: Tensor) -> Tensor:
        """(tokens, vocabulary) float32 of (tokens, hidden_size)."""
        weight, bias = self.weight, self.bias
        if hidden_states.dtype != weight.dtype:
            hidden_states = hidden_states.to(weight.dtype)
        return torch.nn.functional.linear(hidden_states, weight, bias).float().mul_(self.scale)


class DenseStates:
    """What the dense head multiplied for every token of some batches.

    In float32 models, rounded to float16 after each token's vector was scaled to at most 1, which
    is more exact than bfloat16; others keep their dtype. Rows are kept on the device where the
    model computes if that has much room; else in main memory, or, where a quarter of what is free
    there would not hold them, in a temporary file without a name, which ends with the process
    however that ends.

    :param counts: tokens of each batch, padding left out
    :param width: hidden_size
    :param dtype: of what the head multiplies
    :param device: where the model computes
    :param who: for messages
    :raises SparseSSMError: there is no room on the disk
    """

    def __init__(
        self, counts: Sequence[int], width: int, dtype: torch.dtype, device: torch.device, who: str
    ) -> None:
        self.starts = [0]
        for count in counts:
            self.starts.append(self.starts[-1] + count)
        self._scaled = dtype.itemsize > 2
        kept = torch.float16 if self._scaled else dtype
        tokens = self.starts[-1]
        needed = tokens * width * kept.itemsize
        self.file_bytes = 0
        if has_room(device, needed):
            self.rows = torch.empty(tokens, width, dtype=kept, device=device)
        elif needed <= memory_available() // _SHARE:
            self.rows = torch.empty(tokens, width, dtype=kept)
        else:
            self.file_bytes = needed
            self.rows = _in_file(needed, who).view(kept).view(tokens, width)
        # (tokens, 1) what rows were divided by
        self.scales = torch.ones(tokens if self._scaled else 0, 1, device=self.rows.device)

    def put(self, batch: int, rows: Tensor) -> None:
        """Keep the rows (tokens, hidden_size) of a batch."""
        part = slice(self.starts[batch], self.starts[batch + 1])
        if self._scaled:
            scale = rows.abs().amax(-1, keepdim=True).clamp(min=torch.finfo(rows.dtype).tiny)
            rows = rows / scale
            self.scales[part].copy_(scale)
        self.rows[part].copy_(rows)

    def of(self, batch: int) -> tuple[Tensor, Tensor | None]:
        """Rows of a batch as they are kept, and what they are to be multiplied by."""
        part = slice(self.starts[batch], self.starts[batch + 1])
        return self.rows[part], self.scales[part] if self._scaled else None


def _in_file(size: int, who: str) -> Tensor:
    """Bytes in a file that no folder names."""
    folder = tempfile.gettempdir()
    try:
        with tempfile.TemporaryFile() as file:
            # a write into a mapping that finds no room would end the process
            os.posix_fallocate(file.fileno(), 0, max(1, size))
            return torch.from_numpy(np.memmap(file, dtype=np.uint8, mode="r+", shape=(size,)))
    except OSError as error:
        raise SparseSSMError(
            f"{who}: the dense predictions take {size / 2**30:.1f} GiB, which neither main memory "
            f"nor {folder} has room for ({error.strerror or error}); give fewer batches, or set "
            "TMPDIR to a folder with room"
        ) from error


def real_positions(batch: Mapping[str, Any], positions: int) -> Tensor | None:
    """(tokens,) which of a batch's positions, row after row, are no padding; None if all are."""
    mask = batch.get("attention_mask")
    if mask is None or mask.numel() != positions or bool(mask.all()):
        return None
    return mask.reshape(-1).nonzero()[:, 0].cpu()
