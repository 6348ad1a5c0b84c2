"""Run a model again from the layer where it has changed; what comes before gives what it gave."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from sparsessm_plugin.mixers import iter_mixers


class Replay:
    """The layers of a model, and what they gave for one batch.

    Layers are the members of the ModuleList that holds the first mixer.

    :param model: any model with a mixer
    """

    def __init__(self, model: nn.Module):
        self._layers: dict[str, nn.Module] = {}
        self._outputs: dict[str, list[Any]] = {}
        name = next(name for name, _ in iter_mixers(model))
        parts = name.split(".")
        for i in range(1, len(parts)):
            parent = model.get_submodule(".".join(parts[:i]))
            if isinstance(parent, nn.ModuleList):
                prefix = ".".join(parts[:i])
                self._layers = {f"{prefix}.{j}": layer for j, layer in enumerate(parent)}
                break

    @contextmanager
    def recorded(self) -> Iterator[None]:
        """Keep what each layer gives in the one forward pass inside."""
        self._outputs = {name: [] for name in self._layers}
        handles = []
        try:
            for name, layer in self._layers.items():
                kept = self._outputs[name]
                handles.append(
                    layer.register_forward_hook(lambda *call, kept=kept: kept.append(call[-1]))
                )
            yield
        finally:
            for handle in handles:
                handle.remove()

    @contextmanager
    def since(self, name: str) -> Iterator[None]:
        """Let the layers before that of a module give what was recorded, without running.

        Exact as long as nothing in them has changed, and the batch is the same.

        :param name: of the first module that has changed
        """
        replaced: list[tuple[nn.Module, Any]] = []
        try:
            for layer_name, layer in self._before(name):
                outputs = self._outputs.get(layer_name, [])
                if len(outputs) != 1:  # it was called again and again, or not at all
                    break
                replaced.append((layer, vars(layer).get("forward")))
                layer.forward = lambda *args, output=outputs[0], **kwargs: output
            yield
        finally:
            for layer, forward in reversed(replaced):
                if forward is None:
                    del layer.forward
                else:
                    layer.forward = forward

    def _before(self, name: str) -> list[tuple[str, nn.Module]]:
        layers = list(self._layers.items())
        for i, (layer_name, _) in enumerate(layers):
            if name == layer_name or name.startswith(f"{layer_name}."):
                return layers[:i]
        return []
