"""What modifiers of a recipe would undo of each other, or could not do, by names and shapes.

A recipe alone is checked against a small skeleton of each layout, and refused if it is wrong in all
that it applies to; what depends on the model is checked against the model's own skeleton.
"""

from collections.abc import Iterable, Sequence
from functools import cache
from itertools import combinations
from typing import Any

import torch
from compressed_tensors.utils import match_named_modules
from compressed_tensors.utils.match import match_targets
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.pruning.sparsegpt import SparseGPTModifier
from llmcompressor.modifiers.pruning.sparsegpt.sgpt_base import SparsityModifierBase
from llmcompressor.modifiers.quantization.quantization.mixin import QuantizationMixin
from torch import nn
from transformers import AutoModelForCausalLM, Mamba2Config, MambaConfig

from sparsessm_plugin.errors import SparseSSMError, shown
from sparsessm_plugin.mixers import MixerAdapter, find_mixers
from sparsessm_plugin.modifiers import (
    ChannelRemovalModifier,
    GradientMagnitudeModifier,
    SensitivitySparseGPTModifier,
    SparseGPTQModifier,
    SparseSSMModifier,
    StateRemovalModifier,
)
from sparsessm_plugin.modifiers.distillation import mixer_parameters
from sparsessm_plugin.modifiers.experts import check_experts
from sparsessm_plugin.modifiers.shared_weights import weight_holders
from sparsessm_plugin.modifiers.sparse_gptq import (
    check_quantized,
    check_quantizes,
    never_called,
    quantized_weights,
)
from sparsessm_plugin.selection.masks import check_structure

# The projections that a removal writes new values into, by what it fits again.
_FITTED = {
    "B": ("x_proj",),
    "C": ("x_proj",),
    "x_proj": ("x_proj",),
    "out_proj": ("out_proj",),
    "reconstruct": ("in_proj", "conv1d", "out_proj"),
}


def check_alone(modifiers: Sequence[Any]) -> None:
    """Refuse what is wrong whatever the model.

    :raises SparseSSMError: naming the modifiers and what to write instead
    """
    models = layouts()
    for modifier in modifiers:
        if isinstance(modifier, QuantizationMixin):
            quantized = [set(quantized_weights(modifier, model)) for model in models]
            bad = [q & set(never_called(m)) for q, m in zip(quantized, models, strict=True) if q]
            if bad and all(bad):
                part = min(bad[0]).rpartition(".")[2]
                raise SparseSSMError(
                    f"{type(modifier).__name__} would quantize {part}, whose weight the model "
                    "reads without calling it, so it cannot be calibrated; take it out of targets "
                    f'or add "re:.*{part}$" to ignore'
                )
    for first, second in combinations(modifiers, 2):
        outcomes = [o for model in models if (o := _undone(first, second, model)) is not None]
        if outcomes and all(outcomes):
            raise SparseSSMError(_message(first, second, min(outcomes[0]).rpartition(".")[2]))


def check_modifiers(modifiers: Sequence[Any], model: nn.Module) -> None:
    """Refuse what is wrong for a model.

    :param model: the meta device will do
    :raises SparseSSMError: naming the modifiers, the module and what to write instead
    """
    for modifier in modifiers:
        if isinstance(modifier, SparsityModifierBase):
            if not _pruned(modifier, model):
                raise SparseSSMError(
                    f"{type(modifier).__name__} would prune no weight: targets "
                    f"{shown(modifier.targets)} without ignore {shown(modifier.ignore)} are no "
                    "Linear layer of the model"
                )
            _check_structure(modifier, model)
        elif isinstance(modifier, QuantizationMixin) and not hasattr(modifier, "check_model"):
            check_quantized(modifier, model)  # those of this package check themselves
            if modifier.kv_cache_scheme is None:
                check_quantizes(modifier, model)
    check_experts(modifiers, model)
    for first, second in combinations(modifiers, 2):
        if undone := _undone(first, second, model):
            raise SparseSSMError(_message(first, second, min(undone)))


@cache
def layouts() -> tuple[nn.Module, ...]:
    """A model of each layout, Mamba-1 and Mamba-2, without weights."""
    with torch.device("meta"):
        return tuple(
            AutoModelForCausalLM.from_config(config(num_hidden_layers=1))
            for config in (MambaConfig, Mamba2Config)
        )


def _undone(first: Any, second: Any, model: nn.Module) -> set[str] | None:
    """What the second modifier would undo of the first; None if they do not both apply."""
    if isinstance(first, SparseSSMModifier) and isinstance(second, SparseSSMModifier):
        if first.pruned_value == second.pruned_value:
            return set()
        one, two = (_names(m.matching_mixers, model) for m in (first, second))
    else:
        one, two = _pruned(first, model), _written(second, model)
    return one & two if one and two else None


def _pruned(modifier: Any, model: nn.Module) -> set[str]:
    """Modules in whose weights a modifier makes zeros, or other values that must stay."""
    if isinstance(modifier, SparseSSMModifier):
        return _names(modifier.matching_mixers, model)  # A_log is the mixer's own
    if isinstance(modifier, SensitivitySparseGPTModifier):
        return {
            use
            for name in _names(modifier.matching_projections, model)
            for use in weight_holders(model).get(name, [name])
        }
    if isinstance(modifier, GradientMagnitudeModifier):
        # an A_log and a D are the mixer's own
        return {
            w.removesuffix(".weight").removesuffix(".A_log").removesuffix(".D")
            for w in _names(modifier.matching_weights, model)
        }
    if not isinstance(modifier, SparsityModifierBase):
        return set()
    targets = [modifier.targets] if isinstance(modifier.targets, str) else modifier.targets
    out_of_reach = never_called(model)
    return {
        name
        for layer_name, layer in match_named_modules(model, targets)
        for name, module in layer.named_modules(prefix=layer_name)
        if isinstance(module, nn.Linear) and name not in out_of_reach
        if not match_targets(name, module, modifier.ignore)
    }


def _written(modifier: Any, model: nn.Module) -> set[str]:
    """Modules in whose zeros a modifier writes."""
    if isinstance(modifier, SparseGPTModifier):
        return set() if modifier.preserve_sparsity_mask else _pruned(modifier, model)
    if isinstance(modifier, GPTQModifier) and not isinstance(modifier, SparseGPTQModifier):
        return set(quantized_weights(modifier, model))
    if isinstance(modifier, (StateRemovalModifier, ChannelRemovalModifier)):
        if modifier.distill_steps:  # all weights of all mixers
            return {name.rpartition(".")[0] for name in mixer_parameters(model)}
        return {
            f"{adapter.name}.{adapter.projection(kind).path}"
            for adapter in find_mixers(model)
            for step in _steps(modifier, adapter)
            for kind in _FITTED.get(step, ())
            if kind in adapter.projections
        }
    return set()


def _steps(modifier: Any, adapter: MixerAdapter) -> Iterable[str]:
    if isinstance(modifier, StateRemovalModifier):
        return modifier.compensations(adapter)
    return ("x_proj", "out_proj") if modifier.compensate is None else modifier.compensate


def _names(matching: Any, model: nn.Module) -> set[str]:
    try:
        return {found.name for found in matching(model)}
    except SparseSSMError:  # does not fit this model, which is said elsewhere
        return set()


def _message(first: Any, second: Any, name: str) -> str:
    one, two = type(first).__name__, type(second).__name__
    if isinstance(second, SparseSSMModifier):
        return (
            f"{two} with pruned_value {second.pruned_value} would undo what {one} with "
            f"{first.pruned_value} has pruned of {name}; give both the same pruned_value"
        )
    if isinstance(second, SparseGPTModifier):
        advice = f"give {two} preserve_sparsity_mask: true, or other targets"
    elif isinstance(second, GPTQModifier):
        advice = "SparseGPTQModifier quantizes without that"
    else:
        advice = f"put {two} first"
    return f"{two} would write into the zeros that {one} has made in {name}; {advice}"


def _check_structure(modifier: Any, model: nn.Module) -> None:
    n, m = modifier._prune_n, modifier._prune_m
    for name in sorted(_pruned(modifier, model)) if m else ():
        linear: Any = model.get_submodule(name)
        try:
            check_structure(modifier.mask_structure, linear.weight.shape[-1], n / m)
        except SparseSSMError as error:
            raise SparseSSMError(
                f"{type(modifier).__name__}: {error} in {name}; add {name!r} to ignore"
            ) from error
