"""What pruning a model holds in memory at most, counted from its shapes alone.

Beside the libraries, a few buffers, and the gradient steps of a removal that reconstructs, which
take some GB more on a CPU: the counts say which sizes fit, not the last byte.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import nn

from sparsessm_plugin.allocation.probe import PROBE_LENGTH, PROBE_ROWS, TRIED_TOGETHER
from sparsessm_plugin.calibration.replay import Replay
from sparsessm_plugin.checkpoints.offloading import SHARD_BYTES
from sparsessm_plugin.families import find_mixers, iter_mixers
from sparsessm_plugin.families.in_turn import parameter_names
from sparsessm_plugin.families.parts import Attention
from sparsessm_plugin.methods.projections.settings import ProjectionSettings
from sparsessm_plugin.methods.removal import RemovalSettings

_FLOAT = 4
# float32 tensors of (tokens of a batch, channels) while a mixer runs: what in_proj gives, what the
# convolution takes and gives, dt, the scan and its gate
_OF_A_MIXER = 10
_COPIES = 24  # bytes for each weight of the mixer that states are removed from: fits in float32


@dataclass(frozen=True)
class ReadAtOnce:
    """Bytes of weights.

    :param weights: of the model
    :param at_once: of the largest layer and what embeds tokens, or of both ends if those are more
    :param largest: of one tensor
    """

    weights: int
    at_once: int
    largest: int


def read_at_once(model: nn.Module) -> ReadAtOnce:
    """What is read of a model at once where its weights are on disk; the meta device will do.

    :param model: transformers model with a known mixer
    """
    sizes = {name: model.get_parameter(name).nbytes for name in parameter_names(model)}
    layers = {
        prefix: sum(size for name, size in sizes.items() if name.startswith(f"{prefix}."))
        for prefix in Replay(model).layers
    }
    whole: Any = model
    ends = [whole.get_input_embeddings(), whole.get_output_embeddings()]
    embeds, predicts = (0 if end is None else end.weight.nbytes for end in ends)
    at_once = max(max(layers.values(), default=0) + embeds, embeds + predicts)
    return ReadAtOnce(sum(sizes.values()), at_once, max(sizes.values()))


@dataclass(frozen=True)
class Counted:
    """Bytes at most while a model is pruned whose weights are on disk.

    :param computing: on the device that computes
    :param saving: in main memory while the result is written
    """

    computing: int
    saving: int


def count_memory(
    model: nn.Module, modifiers: Iterable[Any], samples: int, length: int, batch: int
) -> Counted:
    """Count what pruning holds with weights on disk, activations in float32.

    :param model: transformers model, on the meta device
    :param modifiers: of the recipe; those of this package that change mixers
    :param samples: calibration windows
    :param length: tokens a window
    :param batch: windows a forward pass
    """
    read = read_at_once(model)
    config: Any = model.config
    hidden = config.get_text_config().hidden_size
    vocabulary = config.get_text_config().vocab_size
    entry = next(model.parameters()).element_size()
    tokens, rows = samples * length, batch * length
    mixers = find_mixers(model)
    channels = max(adapter.sizes.intermediate_size for adapter in mixers)
    weights = max(sum(p.numel() for p in a.mixer.parameters()) for a in mixers)
    heads = max((part.num_heads for part in _attentions(model)), default=0)
    # before and after a layer, and what entered its mixer
    stream = (2 * _FLOAT + entry) * tokens * hidden
    running = _FLOAT * rows * channels * _OF_A_MIXER
    running = max(running, 2 * _FLOAT * rows * length * heads)  # eager attention
    # predictions of a batch as they come and in float32, and of the one before
    predicting = (entry + 2 * _FLOAT) * rows * vocabulary
    work = max((_work_of(m, mixers, tokens, weights) for m in modifiers), default=0)
    tried = max((_tried(m, mixers, hidden, vocabulary, entry) for m in modifiers), default=0)
    beside = stream + max(running + work, predicting, tried)
    written = max(2 * read.largest, min(SHARD_BYTES, read.weights))
    return Counted(read.at_once + beside, written)


def _work_of(modifier: Any, mixers: list[Any], tokens: int, weights: int) -> int:
    """Bytes that a modifier holds of one mixer while it changes it."""
    if not isinstance(modifier, ProjectionSettings):
        return _COPIES * weights if isinstance(modifier, RemovalSettings) else 0
    inputs = max(adapter.sizes.intermediate_size for adapter in mixers)
    # a dense and a pruned copy; what out_proj multiplies; its sums and their inverse in float64
    return 2 * _FLOAT * weights + _FLOAT * tokens * inputs + 6 * 8 * inputs**2


def _tried(modifier: Any, mixers: list[Any], hidden: int, vocabulary: int, entry: int) -> int:
    """Bytes that the allocation of sparsities holds."""
    if not isinstance(modifier, ProjectionSettings) or modifier.allocation != "optimal":
        return 0
    kinds = len(mixers[0].projections)
    positions = PROBE_ROWS * PROBE_LENGTH
    streams = _FLOAT * positions * hidden * (len(mixers) * kinds + 1)
    # of all changes of a layer as they come and in float32, and of the model as it is
    predicted = ((entry + _FLOAT) * min(kinds, TRIED_TOGETHER) + _FLOAT) * positions * vocabulary
    inputs = max(adapter.sizes.intermediate_size for adapter in mixers)
    return streams + max(predicted, 3 * 8 * inputs**2)


def _attentions(model: nn.Module) -> list[Attention]:
    mixers = {id(mixer) for _, mixer in iter_mixers(model)}  # delta nets have the same projections
    found = [m for m in model.modules() if Attention.matches(m) and id(m) not in mixers]
    return [Attention("", module) for module in found]
