"""Whole layers."""

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

from sparsessm_plugin.errors import SparseSSMError
from sparsessm_plugin.families import ModelAdapter, get_model_adapter
from sparsessm_plugin.fitting.axes import Axis, register_axis, shares_of

_TOKENS = {"cuda": 2**14, "cpu": 2**12}  # that sets are compared on


@register_axis
class Layers(Axis):
    """Residual blocks. First: what stays is then fitted as it will stand.

    Which ones go, the modifier decides by the data; :meth:`kept` stands in for that until then.
    A recipe searches as shortly as a trial, so that it removes the layers that were tried.
    """

    name = "layers"
    order = 10
    modifier = "LayerRemovalModifier"

    def length(self, model: nn.Module) -> int | None:
        return get_model_adapter(model).axis_length("layers")

    def sizes(self, length: int) -> Sequence[int]:
        return shares_of(length, 1, (7.5, 7, 6.5, 6, 5, 4))

    def quick_fields(self, model: nn.Module, device: torch.device) -> dict[str, Any]:
        quick: dict[str, Any] = {"search_tokens": _TOKENS.get(device.type, 2**12)}
        # distillation goes on from there, and a CPU takes seconds a layer for what it gains
        steps = {"reconstruct_steps": 40} if device.type == "cuda" else {"compensate": ["out_proj"]}
        return {**quick, "search_width": 4, **steps}

    def config_fields(self, model: nn.Module, size: int) -> dict[str, Any]:
        return get_model_adapter(model).layer_fields(self.kept(model, size))

    def kept(self, model: nn.Module, size: int) -> tuple[int, ...]:
        """Indices of layers that may be those that stay: the others are of the commonest kind.

        :raises SparseSSMError: the config can say none of them
        """
        adapter = get_model_adapter(model)
        refusal = SparseSSMError(f"{adapter.name}: no {size} of its layers can stay alone")
        for kept in self._candidates(signatures(adapter), size):
            try:
                adapter.layer_fields(kept)
            except SparseSSMError as error:
                refusal = error
            else:
                return kept
        raise refusal

    def _candidates(self, kinds: list[tuple[str, ...]], size: int) -> Iterator[tuple[int, ...]]:
        count, common = len(kinds), Counter(kinds).most_common(1)[0][0]
        of_kind = [i for i, kind in enumerate(kinds) if kind == common]
        gone = set(of_kind[max(0, len(of_kind) - 1 - count + size) : -1])
        if len(gone) == count - size:
            yield tuple(i for i in range(count) if i not in gone)
        for first in range(size, -1, -1):  # or neighbours, from the end on
            yield (*range(first), *range(first + count - size, count))


def signatures(adapter: ModelAdapter) -> list[tuple[str, ...]]:
    """What kinds of parts each layer is made of."""
    return [tuple(part.kind for part in layer.parts) for layer in adapter.layers]
