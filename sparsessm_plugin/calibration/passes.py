"""Passes of a plain model over calibration batches, one layer after the other."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from compressed_tensors.offload import disable_offloading, get_execution_device
from compressed_tensors.utils import patch_attr
from torch import nn
from torch.utils._pytree import tree_map_only

from sparsessm_plugin.calibration.contexts import evaluating
from sparsessm_plugin.calibration.replay import Replay
from sparsessm_plugin.cost import kept


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
                output_of(model, layer, batches[index], device, replay, before, outputs[index])
            layers_done([m for m in layer.modules() if last_use[id(m)] == name])
            outputs = [
                output_of(model, layer, batch, device, replay, before, output)
                for batch, output in zip(batches, outputs, strict=True)
            ]
            before = name


class LayerPass:
    """A pass of data through a model whose weights are read in their turn: each layer once.

    All batches go through one layer before any goes through the next, so that no more than a layer
    and what embeds the data is read at once. Where a pass ends, the next one goes on.

    :param model: transformers model, as for :func:`layer_by_layer`
    """

    def __init__(self, model: Any):
        self._model = model
        self._replay = Replay(model)
        self.layers = list(self._replay.layers)
        self._next = 0  # of the layers, the first that has not run
        self._outputs: list[Any] = []

    def layer_of(self, name: str) -> str | None:
        """The layer that a module stands in; None outside of all."""
        parts = name.split(".")
        prefixes = (".".join(parts[:i]) for i in range(1, len(parts) + 1))
        return next((prefix for prefix in prefixes if prefix in self._replay.layers), None)

    def span(self, modules: Iterable[str]) -> tuple[str, str] | None:
        """The first and the last layer that any of these modules stands in.

        :return: None if there are none, or one stands outside of all layers
        """
        found = {self.layer_of(name) for name in modules}
        inside = [name for name in self.layers if name in found]
        return None if not inside or None in found else (inside[0], inside[-1])

    def run(
        self, batches: Sequence[Any], at_batch: Callable[[int], None], first: str, last: str
    ) -> None:
        """Run up to a layer, within :func:`forward_context`.

        Goes on from the layer that ran last, if that is before the first one that is looked at.

        :param batches: the same as in the call that this one goes on from
        :param at_batch: called with the number of each batch before it runs
        :param first: name of the first layer that is looked at
        :param last: name of the last layer to run
        """
        device = get_execution_device(self._model)
        if self._next > self.layers.index(first):
            self._next, self._outputs = 0, []
        while self._next <= self.layers.index(last):
            with disable_offloading():
                self._outputs = [
                    self._through(batch, device, partial(at_batch, index), index)
                    for index, batch in enumerate(batches)
                ]
            self._next += 1

    def _through(
        self, batch: Any, device: torch.device, begin: Callable[[], None], index: int
    ) -> Any:
        begin()
        before = self.layers[self._next - 1] if self._next else None
        earlier = moved(self._outputs[index], lambda x: x.to(device)) if self._outputs else None
        layer = self._replay.layers[self.layers[self._next]]
        output = output_of(self._model, layer, batch, device, self._replay, before, earlier)
        return moved(output, kept)


def moved(output: Any, move: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """What a layer gives, with its tensors moved."""
    return tree_map_only(torch.Tensor, move, output)


def output_of(
    model: Any,
    layer: nn.Module,
    batch: Any,
    device: torch.device,
    replay: Replay,
    before: str | None,
    earlier: Any,
) -> Any:
    """What a layer gives for a batch, once those before it give ``earlier``.

    :param model: transformers model
    :param layer: of it; nothing after it runs
    :param batch: what the model's forward takes
    :param device: that computes
    :param replay: of the model
    :param before: name of the layer before; None for the first
    :param earlier: what that one gives
    """
    found: list[Any] = []

    def keep(module: nn.Module, args: Any, output: Any) -> None:
        found.append(output)

    def stop(module: nn.Module, args: Any, output: Any) -> None:
        raise _Enough

    # before the hooks of others change it, as they will do again when it is given
    kept_output = layer.register_forward_hook(keep, prepend=True)
    stopped = layer.register_forward_hook(stop)
    try:
        with nullcontext() if before is None else replay.after(before, earlier):
            model(**{key: value.to(device) for key, value in batch.items()})
    except _Enough:
        pass
    finally:
        kept_output.remove()
        stopped.remove()
    return found[0]
