"""How much memory gradient steps take, counted from a model's shapes."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from sparsessm_plugin.families import MixerAdapter, iter_mixers
from sparsessm_plugin.families.registry import adapters_in
from sparsessm_plugin.recurrence.ssd import CHUNK
from sparsessm_plugin.training.divergence import rows_at_once

# Float32 numbers that a mixer's backward pass needs, of each position and channel, and of each
# position, head and step of a chunk; counted on every family, see the tests.
_BY_CHANNEL = {"channel": 13, "head": 20}
_BY_STEP = 2.5
_STREAM = 6  # of each position and entry of the stream, of norms and residual additions
_LOGITS = 5  # float32 numbers a logit, of those that are made at once


@dataclass(frozen=True)
class Needed:
    """Bytes on the device that holds the model, by what they are for.

    :param model: its own weights, which wait while copies of the fitted ones are computed with
    :param copies: those copies, and their gradients
    :param masters: float32 weights, where the copies are in half precision
    :param moments: of Adam, two of each weight, float32
    :param inputs: of all layers, where these are computed twice; otherwise 0
    :param layers: what the backward pass needs of one layer, or of all
    :param logits: what is made of a few tokens' logits at once, and of the head's inputs
    """

    model: int
    copies: int
    masters: int
    moments: int
    inputs: int
    layers: int
    logits: int

    @property
    def total(self) -> int:
        """All of them."""
        return sum(getattr(self, entry.name) for entry in fields(self))

    def __str__(self) -> str:
        parts = ", ".join(
            f"{entry.name} {getattr(self, entry.name) / 2**30:.1f}" for entry in fields(self)
        )
        return f"{self.total / 2**30:.1f} GiB: {parts}"


def needed(
    model: Any,
    positions: int,
    parameters: Mapping[str, nn.Parameter] | None = None,
    checkpointing: bool = True,
) -> Needed:
    """What steps of a distillation take at most, without what kernels take for a moment.

    :param model: transformers model; one on the meta device will do
    :param positions: of a batch
    :param parameters: that are fitted; default all
    :param checkpointing: whether layers are computed twice instead of kept
    """
    everything = list(model.parameters())
    tuned = everything if parameters is None else list(parameters.values())
    own = sum(p.nbytes for p in everything)
    copies = 2 * sum(p.nbytes for p in tuned)
    masters = sum(4 * p.numel() for p in tuned if p.dtype != torch.float32)
    head = model.get_output_embeddings().weight
    vocabulary, hidden_size = head.shape
    each = layer_numbers(model)
    stream = 4 if _float_stream(model) else everything[0].dtype.itemsize
    rows = min(positions, rows_at_once(vocabulary))
    logits = 4 * _LOGITS * rows * vocabulary + 2 * 4 * positions * hidden_size
    if any(p is head for p in tuned):
        logits += 4 * head.numel()
    inputs = len(each) * positions * hidden_size * stream if checkpointing else 0
    layers = 4 * positions * (max(each) if checkpointing else sum(each))
    moments = 8 * sum(p.numel() for p in tuned)
    return Needed(own, copies, masters, moments, inputs, int(layers), logits)


def layer_numbers(model: nn.Module) -> list[float]:
    """Numbers of each position that the backward pass needs, of each of transformers' layers.

    Of a model without these, of each mixer.
    """
    layers = [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]
    return [_numbers(layer) for layer in layers or [m for _, m in iter_mixers(model)]]


def _numbers(layer: nn.Module) -> float:
    adapters = adapters_in(layer)
    inside = {id(p) for adapter in adapters for p in adapter.mixer.parameters()}
    total = sum(_of_mixer(adapter) for adapter in adapters)
    width = 0
    for parameter in layer.parameters():
        if id(parameter) in inside:
            continue
        if parameter.ndim == 1:
            width = max(width, len(parameter))
        else:  # what a matrix reads, and what it writes, twice
            total += parameter.shape[-1] + 2 * parameter.shape[-2]
    return total + _STREAM * width


def _of_mixer(adapter: MixerAdapter) -> float:
    sizes = adapter.sizes
    D, N, G = sizes.intermediate_size, sizes.state_size, sizes.n_groups
    if adapter.has_state_transitions:  # with the states that are kept, every 16th
        return _BY_CHANNEL["channel"] * D + D * N / 16 + 8 * G * N
    chunks = _BY_STEP * sizes.num_heads * CHUNK + 4 * D * N / CHUNK
    return _BY_CHANNEL["head"] * D + chunks + 8 * G * N


def _float_stream(model: Any) -> bool:
    return bool(getattr(model.config.get_text_config(), "residual_in_fp32", False))
