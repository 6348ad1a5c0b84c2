"""Run a model again from the layer where it has changed; what comes before gives what it gave."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import nn

from sparsessm_plugin.families import iter_mixers


class Replay:
    """The layers of a model, and what they gave for one batch.

    Layers are the members of the ModuleList that holds the first mixer. What they are called with
    is kept as it is before hooks of others change it, and what they give likewise: these hooks run
    again with the layer, whether it computes or only gives what it gave.

    Attributes: ``layers``, by name, in order.

    :param model: any model with a mixer
    """

    def __init__(self, model: nn.Module):
        self.layers: dict[str, nn.Module] = {}
        self._calls: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {}
        self._outputs: dict[str, list[Any]] = {}
        name = next(name for name, _ in iter_mixers(model))
        parts = name.split(".")
        for i in range(1, len(parts)):
            parent = model.get_submodule(".".join(parts[:i]))
            if isinstance(parent, nn.ModuleList):
                prefix = ".".join(parts[:i])
                self.layers = {f"{prefix}.{j}": layer for j, layer in enumerate(parent)}
                break

    @contextmanager
    def recorded(self) -> Iterator[None]:
        """Keep what each layer is called with and gives in the one forward pass inside."""
        self._calls, self._outputs = {}, {name: [] for name in self.layers}
        handles = []

        def called(name: str, layer: nn.Module, args: Any, kwargs: Any) -> None:
            self._calls[name] = (args, kwargs)

        def gave(name: str, layer: nn.Module, args: Any, output: Any) -> None:
            self._outputs[name].append(output)

        try:
            for name, layer in self.layers.items():
                before = partial(called, name)
                handles += [
                    layer.register_forward_pre_hook(before, with_kwargs=True, prepend=True),
                    layer.register_forward_hook(partial(gave, name), prepend=True),
                ]
            yield
        finally:
            for handle in handles:
                handle.remove()

    @property
    def called_in_turn(self) -> bool:
        """Whether each layer was called once, in their order, in the recorded pass."""
        once = all(len(outputs) == 1 for outputs in self._outputs.values())
        return bool(self._outputs) and once and list(self._calls) == list(self.layers)

    def call(self, layer: str) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """What a layer was called with in the recorded pass: positional and named."""
        return self._calls[layer]

    def forget(self, layer: str) -> None:
        """Let go of what was recorded of a layer."""
        del self._calls[layer], self._outputs[layer]

    @contextmanager
    def since(self, name: str) -> Iterator[None]:
        """Let the layers before that of a module give what was recorded, without running.

        Exact as long as nothing in them has changed, and the batch is the same.

        :param name: of the first module that has changed
        """
        outputs = []
        for layer_name in self._before(name):
            recorded = self._outputs.get(layer_name, [])
            if len(recorded) != 1:  # it was called again and again, or not at all
                break
            outputs.append((layer_name, recorded[0]))
        with self._giving(outputs):
            yield

    def layer(self, name: str) -> str | None:
        """The layer that a module stands in, if it and all before it were called once each."""
        for layer_name in self.layers:
            if len(self._outputs.get(layer_name, [])) != 1:
                return None
            if name == layer_name or name.startswith(f"{layer_name}."):
                return layer_name
        return None

    def output(self, layer: str) -> Any:
        """What a layer, as it is now, makes of what it was called with; see :meth:`layer`."""
        args, kwargs = self._calls[layer]
        return self.run(layer, args, kwargs)

    def run(self, layer: str, args: Any, kwargs: Any) -> Any:
        """What a layer, as it is now, makes of a call, to be given by :meth:`after`."""
        found: list[Any] = []

        def gave(module: nn.Module, args: Any, output: Any) -> None:
            found.append(output)

        handle = self.layers[layer].register_forward_hook(gave, prepend=True)
        try:
            self.layers[layer](*args, **kwargs)
        finally:
            handle.remove()
        return found[-1]

    @contextmanager
    def after(self, layer: str, output: Any) -> Iterator[None]:
        """Let a layer, and so all before it, give an output, of any batch, without running."""
        with self._giving([(name, output) for name in (*self._before(layer), layer)]):
            yield

    @contextmanager
    def _giving(self, outputs: list[tuple[str, Any]]) -> Iterator[None]:
        replaced: list[tuple[nn.Module, Any]] = []
        try:
            for name, output in outputs:
                layer = self.layers[name]
                replaced.append((layer, vars(layer).get("forward")))
                layer.forward = lambda *args, output=output, **kwargs: output
            yield
        finally:
            for layer, forward in reversed(replaced):
                if forward is None:
                    del layer.forward
                else:
                    layer.forward = forward

    def _before(self, name: str) -> list[str]:
        layers = list(self.layers)
        for i, layer_name in enumerate(layers):
            if name == layer_name or name.startswith(f"{layer_name}."):
                return layers[:i]
        return []
