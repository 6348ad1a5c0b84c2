"""Passes of a plain model over calibration batches, one layer after the other."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from compressed_tensors.offload import get_execution_device
from compressed_tensors.utils import patch_attr
from torch import nn

from sparsessm_plugin.calibration.contexts import evaluating
from sparsessm_plugin.calibration.replay import Replay


class _Enough(Exception):
    """Ends a forward pass where nothing more is looked at."""


@contextmanager
def forward_context(model: Any) -> Iterator[None]:
    """What LLM Compressor's calibration passes run in: no gradients or cache, eager attention.

    :param model: transformers model
    """
    attention = "_attn_implementation"
    eager = (
        patch_attr(model.config, attention, "eager")
        if hasattr(model.config, attention)
        else nullcontext()
    )
    with torch.no_grad(), evaluating(model), eager:
        yield


def layer_by_layer(
    model: Any,
    batches: Sequence[Any],
    at_batch: Callable[[int], None],
    layers_done: Callable[[Sequence[nn.Module]], None],
) -> None:
    """Run all batches through one layer after the other; each sees what the changed ones give.

    Of the layers before, only the last one's outputs are kept, on a GPU where that has room.

    :param model: transformers model, whose layers stand in one ModuleList and are called once
    :param batches: what the model's forward takes
    :param at_batch: called with the number of each batch before it runs
    :param layers_done: called with the modules that all batches have passed, which it may change
    """
    device = get_execution_device(model)
    replay = Replay(model)
    last_use = {id(m): name for name, layer in replay.layers.items() for m in layer.modules()}
    outputs: list[Any] = [None] * len(batches)
    before: str | None = None
    with forward_context(model):
        for name, layer in replay.layers.items():
            for index in range(len(batches)):
                at_batch(index)
                _output_of(model, layer, batches[index], device, replay, before, outputs[index])
            layers_done([m for m in layer.modules() if last_use[id(m)] == name])
            outputs = [
                _output_of(model, layer, batch, device, replay, before, output)
                for batch, output in zip(batches, outputs, strict=True)
            ]
            before = name


def _output_of(
    model: Any,
    layer: nn.Module,
    batch: Any,
    device: torch.device,
    replay: Replay,
    before: str | None,
    earlier: Any,
) -> Any:
    """What a layer gives for a batch, once those before it give ``earlier``."""
    found: list[Any] = []

    def stop(module: nn.Module, args: Any, output: Any) -> None:
        found.append(output)
        raise _Enough

    handle = layer.register_forward_hook(stop)
    try:
        with nullcontext() if before is None else replay.after(before, earlier):
            model(**{key: value.to(device) for key, value in batch.items()})
    except _Enough:
        pass
    finally:
        handle.remove()
    return found[0]
