"""What a model is made of: parameters and zeros by component."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from sparsessm_plugin.criteria.values import MEMORYLESS
from sparsessm_plugin.families import MixerAdapter
from sparsessm_plugin.families.in_turn import parameter_names, parameters_in_turn
from sparsessm_plugin.families.registry import adapters_in
from sparsessm_plugin.families.shared_weights import first_names
from sparsessm_plugin.selection.masks import count_true


@dataclass
class Component:
    """Parameters of one kind, over one layer or the whole model.

    :param parameters: how many
    :param zeros: how many of them are 0
    :param memoryless: for an A_log with an entry a state: entries so large that their state
        forgets at every step; None for everything else
    """

    parameters: int = 0
    zeros: int = 0
    memoryless: int | None = None

    @classmethod
    def of(cls, tensor: Tensor, has_states: bool = False) -> "Component":
        """Of one tensor.

        :param has_states: it is an A_log with an entry a state
        """
        if tensor.is_meta:
            return cls(tensor.numel())
        memoryless = count_true(tensor >= MEMORYLESS) if has_states else None
        return cls(tensor.numel(), count_true(tensor == 0), memoryless)

    def add(self, other: "Component") -> None:
        """Count what another has, too."""
        self.parameters += other.parameters
        self.zeros += other.zeros
        if other.memoryless is not None:
            self.memoryless = (self.memoryless or 0) + other.memoryless


@dataclass
class Inventory:
    """All parameters of a model, each counted once.

    :param mixers: the state-space mixers
    :param components: A_log, the weight of each projection, the rest of the mixers (biases,
        scales and norms among it), everything else
    :param layers: the same, one mixer at a time
    """

    mixers: list[MixerAdapter]
    components: dict[str, Component] = field(default_factory=dict)
    layers: dict[str, dict[str, Component]] = field(default_factory=dict)

    @property
    def parameters(self) -> int:
        """Parameters of the model."""
        return sum(component.parameters for component in self.components.values())

    @property
    def zeros(self) -> int:
        """How many of them are 0."""
        return sum(component.zeros for component in self.components.values())

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, for a report."""
        return {
            "parameters": self.parameters,
            "zeros": self.zeros,
            "components": {
                kind: {
                    "parameters": component.parameters,
                    "share": component.parameters / self.parameters,
                    "zeros": component.zeros,
                    **(
                        {"memoryless": component.memoryless}
                        if component.memoryless is not None
                        else {}
                    ),
                }
                for kind, component in self.components.items()
            },
        }


def take_inventory(model: nn.Module) -> Inventory:
    """Count the parameters of a model by component.

    A removal of layers may have left no state-space mixer.

    :raises SparseSSMError: the model has an unknown mixer
    """
    mixers = adapters_in(model)
    inventory = Inventory(mixers)
    for kind in _kinds(mixers):
        inventory.components[kind] = Component()
    first = first_names(model)
    seen: set[str] = set()
    for adapter in mixers:
        layer = inventory.layers[adapter.name] = {}
        for name, parameter in parameters_in_turn(adapter.mixer):
            seen.add(first[f"{adapter.name}.{name}" if adapter.name else name])
            if name.endswith("weight_shape"):  # of a packed weight, which is counted unpacked
                continue
            parameter = _unpacked(adapter.mixer, name, parameter)
            # a bias or a scale is no part of what is pruned
            kind = adapter.kind_of(name) or ("A_log" if name == "A_log" else "other in mixer")
            has_states = kind == "A_log" and adapter.has_state_transitions
            counted = Component.of(parameter.detach(), has_states)
            inventory.components[kind].add(counted)
            layer.setdefault(kind, Component()).add(counted)
    for name in parameter_names(model):  # a tied tensor comes once
        if name not in seen:
            counted = Component.of(model.get_parameter(name).detach())
            inventory.components["outside mixers"].add(counted)
    return inventory


def _unpacked(mixer: nn.Module, name: str, parameter: Tensor) -> Tensor:
    """The integers of a packed weight, and everything else as it is."""
    if not name.endswith("weight_packed"):
        return parameter
    from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32

    module: Any = mixer.get_submodule(name.rpartition(".")[0])
    shape = torch.Size(module.weight_shape.tolist())
    return unpack_from_int32(parameter, module.quantization_scheme.weights.num_bits, shape)


def _kinds(mixers: Iterable[MixerAdapter]) -> list[str]:
    kinds = ["A_log"]
    for adapter in mixers:
        kinds += [kind for kind in adapter.projections if kind not in kinds]
    return [*kinds, "other in mixer", "outside mixers"]
