"""The weights of a model that may be pruned: one list for every method."""

from dataclasses import dataclass
from typing import Any

import torch
from compressed_tensors.offload import disable_onloading
from torch import Tensor, nn

from sparsessm_plugin.families.base import MixerAdapter, router_names
from sparsessm_plugin.families.registry import find_mixers
from sparsessm_plugin.families.shared_weights import weight_holders

LINEAR = "linear"  # kind of a Linear layer outside of the mixers


@dataclass(frozen=True)
class PrunableWeight:
    """A weight, and the mixer it belongs to if it does.

    :param name: of the layer, or of a parameter that stands alone in its mixer
    :param kind: a projection's name in its mixer, ``A_log``, ``D``, or ``linear``
    :param module: what holds the weight
    :param adapter: of the mixer
    :param attribute: the weight's name in ``module``
    :param others: further layers that hold this very weight, as blocks at several depths do
    """

    name: str
    kind: str
    module: Any
    adapter: MixerAdapter | None = None
    attribute: str = "weight"
    others: tuple[tuple[str, Any], ...] = ()

    @property
    def parameter(self) -> nn.Parameter:
        """The parameter as its module holds it."""
        return getattr(self.module, self.attribute)

    @property
    def weight(self) -> Tensor:
        """(out, in), of a conv1d (D, 1, K); with a matrix for each head (heads, out, in)."""
        return self.parameter.detach()

    @property
    def shape(self) -> torch.Size:
        """Of ``weight``, which is not read for it."""
        with disable_onloading():
            return self.parameter.shape

    @property
    def parameter_name(self) -> str:
        """The parameter's name in the model."""
        return f"{self.name}.weight" if self.attribute == "weight" else self.name

    @property
    def mixer(self) -> str | None:
        """Name of the mixer."""
        return None if self.adapter is None else self.adapter.name

    @property
    def module_name(self) -> str:
        """Name of what holds the weight."""
        return self.parameter_name.rpartition(".")[0]

    @property
    def entries(self) -> int:
        return self.shape.numel()

    @property
    def uses(self) -> dict[str, Any]:
        """Every layer that multiplies by the weight, by name."""
        return {self.name: self.module, **dict(self.others)}


def prunable_weights(model: nn.Module, recurrent: bool = False) -> list[PrunableWeight]:
    """Every projection of a mixer and every Linear layer elsewhere, in model order.

    Never among them are embeddings and what predicts tokens, routers of experts, norms, biases,
    what encodes images for the language model, and weights that are stored packed. A weight that
    several Linear layers share stands here once, under the first of their names. One that is
    shared with anything else stands under every name.

    :param recurrent: also A_log and D
    :raises SparseSSMError: the model has no mixer, or one of an unknown class
    """
    adapters = {adapter.name: adapter for adapter in find_mixers(model)}
    inside: dict[int, list[PrunableWeight]] = {}
    for prefix, adapter in adapters.items():
        for kind in adapter.projections:
            p = adapter.projection(kind)
            name = f"{prefix}.{p.path}" if prefix else p.path
            own = PrunableWeight(name, kind, p.module, adapter, p.attribute)
            inside.setdefault(id(p.module), []).append(own)
    found: list[PrunableWeight] = []
    never = router_names(model) | vocabulary_names(model) | encoder_names(model)
    holders = weight_holders(model)
    for name, module in model.named_modules():
        if recurrent and name in adapters:
            for kind in adapters[name].recurrent_parameters:
                own_name = f"{name}.{kind}" if name else kind
                found.append(PrunableWeight(own_name, kind, module, adapters[name], kind))
        found += inside.get(id(module), ())
        if isinstance(module, nn.Linear) and id(module) not in inside and name not in never:
            uses = {n: model.get_submodule(n) for n in holders.get(name, [name])}
            if any(not isinstance(m, nn.Linear) or id(m) in inside for m in uses.values()):
                uses = {name: module}
            if next(iter(uses)) == name:
                others = tuple((n, m) for n, m in uses.items() if n != name)
                found.append(PrunableWeight(name, LINEAR, module, others=others))
    with disable_onloading():  # the parameters themselves, wherever they are
        return [w for w in found if _is_floating(getattr(w.module, w.attribute, None))]


def vocabulary_names(model: Any) -> set[str]:
    """Names of the modules that embed tokens and of what predicts them."""
    ends = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    if hasattr(model, "get_output_embeddings"):
        ends.append(model.get_output_embeddings())
    return {name for name, module in model.named_modules() if any(module is m for m in ends)}


def encoder_names(model: Any) -> set[str]:
    """Names of the modules beside the language model of a model that also reads images.

    Text says nothing of them: by its gradients all of their weights would go first.
    """
    whole = getattr(model, "base_model", None)
    language = getattr(whole, "language_model", None)
    if whole is None or not isinstance(language, nn.Module) or language is whole:
        return set()
    others = [m for child in whole.children() if child is not language for m in child.modules()]
    beside = {id(module) for module in others}
    return {name for name, module in model.named_modules() if id(module) in beside}


def _is_floating(parameter: Any) -> bool:
    return isinstance(parameter, nn.Parameter) and parameter.is_floating_point()
