"""What a mixer's output projection will multiply when the same enters again, known beforehand.

Layer by layer, a batch passes a layer once as it was and once as it was changed into. What the
second pass computes in a mixer may have been computed when the mixer was changed.
"""

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor, nn

from sparsessm_plugin.families.base import padding_mask


@dataclass(frozen=True)
class KnownCall:
    """One call of a mixer that is to come.

    :param parts: what will enter, cut along the batch: hidden_states (b, L, hidden_size), and
        (b, L), zero at padding, or None where nothing of the whole batch is padded
    :param out_input: gives (b, L, D), what the output projection will multiply, of the whole batch
    """

    parts: Sequence[tuple[Tensor, Tensor | None]]
    out_input: Callable[[], Tensor]

    def is_of(self, hidden_states: Tensor, attention_mask: Tensor | None) -> bool:
        """Whether this has entered, to the last bit."""
        rows = [len(own) for own, _ in self.parts]
        if sum(rows) != len(hidden_states):
            return False
        if attention_mask is not None and attention_mask.shape != hidden_states.shape[:2]:
            return False
        mask = padding_mask(attention_mask, hidden_states.shape[1])
        masks = [None] * len(rows) if mask is None else mask.split(rows)
        return all(
            _same(x, own) and _same(mask, None if m is None else m.to(x.device, torch.bool))
            for x, mask, (own, m) in zip(hidden_states.split(rows), masks, self.parts, strict=True)
        )


class Promise:
    """Calls of a mixer that are known, in the order in which they will come.

    The first call that is another ends it, and so do weights that are others.

    :param mixer: that will be called
    :param computed_by: one with the weights that all of this was computed with
    :param calls: to come
    """

    def __init__(
        self, mixer: nn.Module, computed_by: nn.Module, calls: Iterable[KnownCall]
    ) -> None:
        self._mixer, self._computed_by = mixer, computed_by
        self._calls = deque(calls)
        self._compared: dict[str, tuple[int, int]] = {}

    def __bool__(self) -> bool:
        return bool(self._calls)

    def take(self, hidden_states: Tensor, attention_mask: Tensor | None) -> Tensor | None:
        """What the output projection multiplies if this enters now, or None; then for good."""
        call = self._calls.popleft() if self._calls else None
        if (
            call is not None
            and call.is_of(hidden_states, attention_mask)
            and self._is_as_computed()
        ):
            return call.out_input()
        self._calls.clear()
        return None

    def _is_as_computed(self) -> bool:
        """Whether the mixer's weights are those: compared anew only once something was written."""
        now = _tensors(self._mixer)
        written = {name: (x.data_ptr(), x._version) for name, x in now.items()}
        if written != self._compared:
            then = _tensors(self._computed_by)
            if now.keys() != then.keys() or not all(_same(x, then[k]) for k, x in now.items()):
                return False
            self._compared = written
        return True


def is_plain(mixer: nn.Module) -> bool:
    """Whether a copy of the mixer computes what it does: others hook and quantize nothing in it."""
    inner = [module for module in mixer.modules() if module is not mixer]
    return not any(
        module._forward_hooks
        or module._forward_pre_hooks
        or getattr(module, "quantization_scheme", None) is not None
        for module in inner
    )


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    return dict(chain(module.named_parameters(), module.named_buffers()))


def _same(one: Tensor | None, other: Tensor | None) -> bool:
    if one is None or other is None:
        return one is other
    alike = one.shape == other.shape and one.dtype == other.dtype and one.device == other.device
    return alike and torch.equal(one, other)
