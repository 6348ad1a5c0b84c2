"""What entered a mixer, kept until all of it has been seen."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from sparsessm_plugin import distributed
from sparsessm_plugin.cost import kept
from sparsessm_plugin.families import MixerAdapter

# Tokens that a pass over the calibration inputs looks at together.
_TOKENS = 8192


class CalibrationInputs:
    """What entered one mixer, kept until all of it has been seen; on a GPU only if that has room.

    Of several ranks each keeps its share; ``tokens`` counts this one's until :meth:`join`.
    """

    def __init__(self) -> None:
        self._batches: list[tuple[Tensor, Tensor | None]] = []
        self._added: list[range] = []  # numbers of the batches of each call of add
        self.tokens = 0

    def join(self, name: str) -> None:
        """Count the tokens of all ranks, once this mixer has seen all the data."""
        self.tokens = sum(distributed.gather(f"tokens of {name}", self.tokens))

    @property
    def rows(self) -> int:
        """Sequences of this rank."""
        return sum(len(hidden_states) for hidden_states, _ in self._batches)

    def add(
        self, hidden_states: Tensor, attention_mask: Tensor | None
    ) -> Iterator[tuple[int, slice]]:
        """Keep a batch: (b, L, hidden_size) and, if it is padded, (b, L).

        :return: the numbers under which it is kept, and the rows of each
        """
        if attention_mask is not None and bool(attention_mask.bool().all()):
            attention_mask = None
        rows, length = hidden_states.shape[:2]
        self.tokens += rows * length if attention_mask is None else int(attention_mask.sum())
        step = max(1, _TOKENS // length)
        parts = [slice(start, start + step) for start in range(0, rows, step)]
        first = len(self)
        for part in parts:
            mask = None if attention_mask is None else attention_mask[part].cpu()
            self._batches.append((kept(hidden_states[part].detach()), mask))
        self._added.append(range(first, len(self)))
        return enumerate(parts, first)

    @property
    def added(self) -> list[tuple[range, list[tuple[Tensor, Tensor | None]]]]:
        """Of each call of :meth:`add`, the numbers under which it is kept, and what is kept."""
        return [(numbers, [self._batches[i] for i in numbers]) for numbers in self._added]

    def __len__(self) -> int:
        return len(self._batches)

    def get(
        self, i: int, device: torch.device, dtype: torch.dtype | None = torch.float32
    ) -> tuple[Tensor, Tensor | None]:
        """Batch i on a device, in a dtype or as it came."""
        hidden_states, mask = self._batches[i]
        hidden_states = hidden_states.to(device).to(dtype or hidden_states.dtype)
        return hidden_states, None if mask is None else mask.to(device)

    def iterate(self, adapter: MixerAdapter) -> Iterator[tuple[int, Any]]:
        """The recurrence's quantities, batch by batch, as the mixer makes them now."""
        for i in range(len(self)):
            yield i, adapter.quantities(*self.get(i, adapter.A_log.device))
