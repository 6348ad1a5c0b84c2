"""What the cache of a sequence weighs between two decode steps."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class StateCache:
    """Bytes that one sequence occupies in the cache between two decode steps.

    :param recurrent: states of the recurrence, all layers
    :param convolution: inputs that the convolutions still look back at
    :param attention: keys and values of a hybrid's attention layers; these grow with the text
    """

    recurrent: int
    convolution: int
    attention: int = 0

    @property
    def total(self) -> int:
        """Sum of the three."""
        return self.recurrent + self.convolution + self.attention

    def to_dict(self) -> dict[str, int]:
        """Plain numbers, for a report."""
        return {**vars(self), "total": self.total}


def cache_bytes(cache: Any, batch_size: int) -> StateCache:
    """Bytes a sequence in a cache object of transformers, counted from its tensors.

    :param cache: ``cache_params`` or ``past_key_values`` that a forward pass returned
    :param batch_size: sequences in it
    """
    recurrent = convolution = attention = 0
    for layer in cache.layers:
        recurrent += _bytes(getattr(layer, "recurrent_states", None))
        convolution += _bytes(getattr(layer, "conv_states", None))
        attention += _bytes(getattr(layer, "keys", None)) + _bytes(getattr(layer, "values", None))
    return StateCache(recurrent // batch_size, convolution // batch_size, attention // batch_size)


def _bytes(states: Any) -> int:
    if isinstance(states, Mapping):
        return sum(_bytes(state) for state in states.values())
    return states.numel() * states.element_size() if isinstance(states, Tensor) else 0


def lengthen(cache: Any, length: int) -> None:
    """Let an attention cache hold at least so many tokens, by repeating those that it has."""
    for layer in cache.layers:
        for name in ("keys", "values"):
            held = getattr(layer, name, None)
            if isinstance(held, Tensor) and held.ndim == 4 and 0 < held.shape[2] < length:
                repeated = held.repeat(1, 1, -(-length // held.shape[2]), 1)
                setattr(layer, name, repeated[:, :, :length].contiguous())
