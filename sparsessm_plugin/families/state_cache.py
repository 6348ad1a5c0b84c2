"""What the cache of a sequence weighs between two decode steps."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from sparsessm_plugin.errors import SparseSSMError


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


def make_static(cache: Any, length: int) -> None:
    """Give the keys and values of a cache buffers of a fixed length, in place.

    States of a recurrence already stay where they are.

    :param cache: what a forward pass of transformers returned
    :param length: tokens that the buffers hold
    :raises SparseSSMError: a layer of the cache slides over its tokens, or is of an unknown kind
    """
    from transformers.cache_utils import (
        DynamicLayer,
        LinearAttentionAndFullAttentionLayer,
        LinearAttentionAndStaticFullAttentionLayer,
        LinearAttentionLayer,
        StaticLayer,
    )

    for index, layer in enumerate(cache.layers):
        if type(layer) is LinearAttentionLayer:
            continue
        if type(layer) is DynamicLayer:
            static = StaticLayer(length)
        elif type(layer) is LinearAttentionAndFullAttentionLayer:
            static = LinearAttentionAndStaticFullAttentionLayer(length)
            for name in vars(LinearAttentionLayer()):  # the states themselves, with their flags
                setattr(static, name, getattr(layer, name))
        else:
            raise SparseSSMError(
                f"layer {index} of the cache is a {type(layer).__name__}, which has no buffers of "
                "a fixed length here"
            )
        if layer.is_initialized:
            static.update(layer.keys, layer.values)
        cache.layers[index] = static


def expand(cache: Any, batch_size: int) -> None:
    """Let a cache hold so many copies of its first sequence."""
    for layer in cache.layers:
        for name in ("conv_states", "recurrent_states"):
            states = getattr(layer, name, {})
            for index, state in states.items():
                if isinstance(state, Tensor):
                    states[index] = _copies(state, batch_size)
        for name in ("keys", "values"):
            if isinstance(held := getattr(layer, name, None), Tensor):
                setattr(layer, name, _copies(held, batch_size))


def _copies(tensor: Tensor, batch_size: int) -> Tensor:
    return tensor[:1].repeat(batch_size, *[1] * (tensor.ndim - 1))
