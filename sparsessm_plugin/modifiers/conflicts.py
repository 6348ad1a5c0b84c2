"""What modifiers of a recipe would undo of each other, or could not do, by names and shapes.

A recipe alone is checked against a small skeleton of each layout, and refused if it is wrong in all
that it applies to; what depends on the model is checked against the model itself, by the command
before its weights are loaded and by ``oneshot()`` before anything is changed.

Of each modifier, this package's and LLM Compressor's, :func:`effects_of` says what it does to which
weights. ``RULES`` of ``rules.py`` say which effects must not follow each other.
"""

from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from functools import cache
from itertools import combinations
from typing import Any

import torch
from compressed_tensors.quantization import QuantizationStatus
from compressed_tensors.utils import match_named_modules
from compressed_tensors.utils.match import match_targets
from llmcompressor.core import active_session
from llmcompressor.modifiers.autoround import AutoRoundModifier
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.pruning.constant import ConstantPruningModifier
from llmcompressor.modifiers.pruning.magnitude import MagnitudePruningModifier
from llmcompressor.modifiers.pruning.reap import REAPPruningModifier
from llmcompressor.modifiers.pruning.sparsegpt.sgpt_base import SparsityModifierBase
from llmcompressor.modifiers.quantization.quantization.mixin import QuantizationMixin
from llmcompressor.modifiers.transform.awq import AWQModifier
from llmcompressor.modifiers.transform.awq.dynamic_mappings import (
    get_layer_mappings_from_model as awq_mappings,
)
from llmcompressor.modifiers.transform.quip import QuIPModifier
from llmcompressor.modifiers.transform.smoothquant import SmoothQuantModifier
from llmcompressor.modifiers.transform.smoothquant.dynamic_mappings import (
    get_layer_mappings_from_model as smoothquant_mappings,
)
from llmcompressor.modifiers.transform.spinquant import SpinQuantModifier
from torch import nn
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM, Mamba2Config, MambaConfig

from sparsessm_plugin.checkpoints.experts import check_experts
from sparsessm_plugin.errors import SparseSSMError, shown
from sparsessm_plugin.families import MixerAdapter, find_mixers
from sparsessm_plugin.families.quantizable import (
    check_quantized,
    never_called,
    quantized_weights,
)
from sparsessm_plugin.families.shared_weights import weight_holders
from sparsessm_plugin.methods.gradient import tuned_parameters
from sparsessm_plugin.modifiers.base import MethodModifier
from sparsessm_plugin.modifiers.gradient_magnitude import GradientMagnitudeModifier
from sparsessm_plugin.modifiers.lifecycle import register_check
from sparsessm_plugin.modifiers.model_removal import ModelRemovalModifier
from sparsessm_plugin.modifiers.removal import RemovalModifier
from sparsessm_plugin.modifiers.removals_in_turn import (
    check_layers_left,
    check_sizes_left,
    matching_names,
    models_left,
)
from sparsessm_plugin.modifiers.rules import RULES, Effects, Names, Rule
from sparsessm_plugin.modifiers.sensitivity import SensitivitySparseGPTModifier
from sparsessm_plugin.modifiers.sparse_gptq import SparseGPTQModifier, check_quantizes
from sparsessm_plugin.modifiers.sparsessm import SparseSSMModifier
from sparsessm_plugin.selection.masks import UNSTRUCTURED, check_structure
from sparsessm_plugin.training.distillation import fitted_parameters, mixer_parameters

# What a removal writes new values into, by what it fits again; reconstruct depends on the family.
_FITTED = {
    "B": ("x_proj.weight",),
    "C": ("x_proj.weight",),
    "D": ("D",),
    "x_proj": ("x_proj.weight",),
    "out_proj": ("out_proj.weight",),
    "reconstruct": ("out_proj.weight",),
}
_TRAINING_ONLY = (ConstantPruningModifier, MagnitudePruningModifier)

_SCALING = (SmoothQuantModifier, AWQModifier)  # between layers and projections
_OF_INPUTS = (GPTQModifier, SparsityModifierBase, *_SCALING)  # gather sums of what Linears read

_NONE: Names = frozenset()


def check_alone(modifiers: Sequence[Any]) -> None:
    """Refuse what is wrong whatever the model.

    :raises SparseSSMError: naming the modifiers and what to write instead
    """
    models = layouts()
    for modifier in modifiers:
        check_works(modifier)
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
        applied = [m for m in models if effects_of(first, m).any and effects_of(second, m).any]
        broken = [found for m in applied if (found := _broken(first, second, m)) is not None]
        if applied and len(broken) == len(applied):
            rule, names = broken[0]
            raise SparseSSMError(rule.message(first, second, _shown(names).rpartition(".")[2]))


def check_modifiers(modifiers: Sequence[Any], model: nn.Module) -> None:
    """Refuse what is wrong for a model.

    :param model: the meta device will do
    :raises SparseSSMError: naming the modifiers, the module and what to write instead
    """
    for modifier in modifiers:
        check_works(modifier)
        _check_fits(modifier, model)
    check_experts(modifiers, model)
    check_sizes_left(modifiers, model)
    check_layers_left(modifiers, model)
    for modifier, left in models_left(modifiers, model):
        try:
            check_own(modifier, left)
            _check_fits(modifier, left)
        except SparseSSMError as error:
            raise SparseSSMError(f"{error} (sizes that the removals before it leave)") from error
    for first, second in combinations(modifiers, 2):
        found = _broken(first, second, model)
        if found is not None:
            rule, names = found
            raise SparseSSMError(rule.message(first, second, _shown(names)))


def check_own(modifier: Any, model: nn.Module) -> None:
    """Let a modifier of this package check itself against a model; others have no such checks."""
    for check in ("matching_mixers", "check_model"):
        if hasattr(modifier, check):
            getattr(modifier, check)(model)


def _check_fits(modifier: Any, model: nn.Module) -> None:
    """Refuse a modifier of LLM Compressor that does not fit a model; ours check themselves."""
    if isinstance(modifier, SparsityModifierBase):
        if not _pruned_upstream(modifier, model):
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
    elif isinstance(modifier, QuIPModifier):
        _check_called(modifier, model)


@register_check("initialize")
def check_session(modifier: Any, model: nn.Module) -> None:
    """Refuse what :func:`check_modifiers` refuses of the recipe that is about to run.

    The first modifier of this package asks for all, as LLM Compressor initialises all of them
    before it runs one. Also refused is what an earlier recipe has quantized in memory.

    :raises SparseSSMError: see :func:`check_modifiers`
    """
    modifiers = active_session().lifecycle.recipe.modifiers
    asks = next((m for m in modifiers if isinstance(m, (MethodModifier, SparseGPTQModifier))), None)
    if asks is modifier:
        check_modifiers(modifiers, model)
    finished = {
        f"{name}.weight"
        for name, module in model.named_modules()
        if getattr(module, "quantization_status", None)
        in (QuantizationStatus.FROZEN, QuantizationStatus.COMPRESSED)
    }
    names = finished & effects_of(modifier, model).changes if finished else _NONE
    if names:
        raise SparseSSMError(
            f"{type(modifier).__name__} would change {_shown(names)}, which is quantized already; "
            "prune or remove first, then quantize"
        )


@register_check("calibration_start")
def check_pass(modifier: Any, model: nn.Module) -> None:
    """Refuse modifiers that watch the same calibration pass and cannot.

    In the ``independent`` pipeline each watches a pass of its own.

    :raises SparseSSMError: naming both
    """
    who = type(modifier).__name__
    modifiers = active_session().lifecycle.recipe.modifiers
    own = next((i for i, m in enumerate(modifiers) if m is modifier), len(modifiers))
    for earlier in modifiers[:own]:
        if isinstance(modifier, GradientMagnitudeModifier) and broken_rule(
            modifier, earlier, model
        ):
            raise SparseSSMError(
                f"{who} prunes when the calibration pass begins, and {type(earlier).__name__} "
                "would undo it in the same one; run one after the other, with pipeline independent"
            )
        if isinstance(earlier, _SCALING) and modifier.requires_calibration_data:
            raise SparseSSMError(
                f"{who}: {type(earlier).__name__} watches the same calibration pass and scales "
                "what was seen of it; run one after the other, with pipeline independent"
            )
    if isinstance(modifier, ModelRemovalModifier):
        for other in modifiers:
            if not isinstance(other, ModelRemovalModifier):
                raise SparseSSMError(
                    f"{who} changes the model when the calibration pass begins, and "
                    f"{type(other).__name__} watches the same one; run one after the other, with "
                    "pipeline independent"
                )
    for later in modifiers[own + 1 :] if isinstance(modifier, RemovalModifier) else ():
        if modifier.distills or isinstance(later, GradientMagnitudeModifier):
            when, acts = ("ends", who) if modifier.distills else ("begins", type(later).__name__)
            raise SparseSSMError(
                f"{who}: {type(later).__name__} watches the same calibration pass, and {acts} "
                f"changes all weights when it {when}; run one after the other, with pipeline "
                "independent"
            )
        sums = isinstance(later, MethodModifier) and later.gathers_sums
        if sums or (modifier.changes_inputs and isinstance(later, _OF_INPUTS)):
            raise SparseSSMError(
                f"{who}: {type(later).__name__} watches the same calibration pass and would not "
                "fit the smaller mixers; run one after the other, with pipeline independent"
            )


def check_works(modifier: Any) -> None:
    """Refuse modifiers of LLM Compressor that do nothing, or nothing right, beside ours.

    :raises SparseSSMError: naming the modifier, and what does it
    """
    who = type(modifier).__name__
    if isinstance(modifier, _TRAINING_ONLY):
        raise SparseSSMError(
            f"{who} acts on the steps of a training, of which oneshot() has none, so it would do "
            "nothing; SensitivitySparseGPTModifier with solver magnitude prunes by magnitude"
        )
    if isinstance(modifier, SpinQuantModifier):
        raise SparseSSMError(
            f"{who} rotates what layers hand to each other, and does not know the projections of "
            "state-space mixers, which would read it rotated; QuIPModifier rotates single layers"
        )


@cache
def layouts() -> tuple[nn.Module, ...]:
    """A model of each layout, Mamba-1 and Mamba-2, without weights."""
    with torch.device("meta"):
        return tuple(
            AutoModelForCausalLM.from_config(config(num_hidden_layers=1))
            for config in (MambaConfig, Mamba2Config)
        )


def broken_rule(first: Any, second: Any, model: nn.Module) -> Rule | None:
    """The rule that keeps the second modifier from following the first, if there is one.

    :param model: the meta device will do
    """
    found = _broken(first, second, model)
    return found[0] if found is not None else None


def _broken(first: Any, second: Any, model: nn.Module) -> tuple[Rule, Names] | None:
    one, two = effects_of(first, model), effects_of(second, model)
    each = ((rule, rule.broken(one, two)) for rule in RULES)
    return next(((rule, names) for rule, names in each if names), None)


def _shown(names: Iterable[str]) -> str:
    return min(names).removesuffix(".weight")


# -- what modifiers do ---------------------------------------------------------------------


def effects_of(modifier: Any, model: nn.Module) -> Effects:
    """What a modifier does to a model's weights; nothing for those that nobody here knows.

    :param modifier: of this package or of LLM Compressor
    :param model: the meta device will do
    """
    for kind, effects in _EFFECTS:
        if isinstance(modifier, kind):
            return effects(modifier, model)
    return Effects()


def _of_transitions(modifier: Any, model: nn.Module) -> Effects:
    names = frozenset(f"{mixer}.A_log" for mixer in matching_names(modifier.matching_mixers, model))
    return Effects(
        changes=names,
        pruned=names,
        value=modifier.pruned_value,
        patterned=names if modifier.mask_structure is not None else _NONE,
        overwrites=names,
        keeps=modifier.pruned_value,
        own=True,
    )


def _of_projections(modifier: Any, model: nn.Module) -> Effects:
    names = _NONE
    with suppress(SparseSSMError):  # does not fit this model, which is said elsewhere
        holders = weight_holders(model)
        names = frozenset(
            f"{use}.weight" if p.attribute == "weight" else use
            for p in modifier.new_method().matching_projections(model)
            for use in holders.get(p.name, [p.name])
        )
    patterned = names if modifier.mask_structure != UNSTRUCTURED else _NONE
    return Effects(changes=names, pruned=names, patterned=patterned, own=True)


def _of_gradients(modifier: Any, model: nn.Module) -> Effects:
    names = _NONE
    with suppress(SparseSSMError):  # does not fit this model, which is said elsewhere
        names = frozenset(w.parameter_name for w in modifier.matching_weights(model))
    tuned = frozenset(tuned_parameters(model)) if modifier.distills and names else _NONE
    return Effects(changes=names | tuned, pruned=names, own=True)


def _of_removal(modifier: Any, model: nn.Module) -> Effects:
    if not matching_names(modifier.matching_mixers, model):
        return Effects()
    everything = frozenset(mixer_parameters(model))
    written, columns = set(), set()
    for adapter in find_mixers(model):
        for step in modifier.compensations(adapter):
            written |= {_parameter(adapter, own) for own in _FITTED[step]}
            if step == "reconstruct":
                fitted = {id(parameter) for parameter, _ in adapter.state_parameters()}
                written |= {
                    f"{adapter.name}.{own}"
                    for own, parameter in adapter.mixer.named_parameters()
                    if id(parameter) in fitted
                }
        inputs = ("x_proj.weight", "out_proj.weight") if modifier.changes_inputs else ("A_log",)
        columns |= {_parameter(adapter, own) for own in inputs}
    tuned = frozenset(fitted_parameters(model, modifier.distilled_weights))
    return Effects(
        changes=everything | tuned,
        overwrites=everything & written | tuned,
        columns=everything & columns,
        own=True,
    )


def _of_model_removal(modifier: Any, model: nn.Module) -> Effects:
    if not matching_names(modifier.matching_mixers, model):
        return Effects()
    everything = frozenset(n for n in dict(model.named_parameters()) if ".experts." not in n)
    return Effects(
        changes=everything,
        overwrites=everything if modifier.distills else everything & modifier.written(model),
        columns=everything if modifier.changes_inputs else _NONE,
        own=True,
    )


def _of_gptq_with_zeros(modifier: Any, model: nn.Module) -> Effects:
    names = _weights(quantized_weights(modifier, model))
    return Effects(changes=names, grid=names)


def _of_gptq(modifier: Any, model: nn.Module) -> Effects:
    names = _weights(quantized_weights(modifier, model))
    return Effects(changes=names, grid=names, overwrites=names)


def _of_sparsegpt(modifier: Any, model: nn.Module) -> Effects:
    names = _weights(_pruned_upstream(modifier, model))
    return Effects(
        changes=names,
        pruned=names,
        patterned=names if modifier._prune_m else _NONE,
        overwrites=_NONE if getattr(modifier, "preserve_sparsity_mask", True) else names,
    )


def _of_scaling(modifier: Any, model: nn.Module) -> Effects:
    infer = awq_mappings if isinstance(modifier, AWQModifier) else smoothquant_mappings
    patterns: list[str] = []
    with suppress(Exception):  # knows no mapping for this model, and says so itself
        for mapping in modifier.mappings or infer(model):
            if isinstance(modifier, AWQModifier):
                patterns += [mapping.smooth_layer, *mapping.balance_layers]
            else:
                patterns += tree_leaves(tuple(mapping))
    found = {name for name, _ in match_named_modules(model, patterns)} if patterns else set()
    return Effects(changes=_weights(found))


def _of_rotation(modifier: Any, model: nn.Module) -> Effects:
    names = _weights(name for name, _ in _rotated_modules(modifier, model))
    return Effects(changes=names, overwrites=names, rotated=names)


def _of_expert_removal(modifier: Any, model: nn.Module) -> Effects:
    return Effects(removed=frozenset(n for n, _ in model.named_parameters() if ".experts." in n))


_EFFECTS: tuple[tuple[type, Callable[[Any, nn.Module], Effects]], ...] = (
    (SparseSSMModifier, _of_transitions),
    (SensitivitySparseGPTModifier, _of_projections),
    (GradientMagnitudeModifier, _of_gradients),
    (RemovalModifier, _of_removal),
    (ModelRemovalModifier, _of_model_removal),
    (SparseGPTQModifier, _of_gptq_with_zeros),
    (GPTQModifier, _of_gptq),
    (AutoRoundModifier, _of_gptq),
    (QuantizationMixin, _of_gptq_with_zeros),  # rounds to the nearest, 0 to 0
    (SparsityModifierBase, _of_sparsegpt),
    (SmoothQuantModifier, _of_scaling),  # and its subclass of logarithmic equalization
    (AWQModifier, _of_scaling),
    (QuIPModifier, _of_rotation),
    (REAPPruningModifier, _of_expert_removal),
)


def _weights(modules: Iterable[str]) -> Names:
    return frozenset(f"{name}.weight" for name in modules)


def _pruned_upstream(modifier: Any, model: nn.Module) -> set[str]:
    """Modules that a pruning modifier of LLM Compressor prunes."""
    targets = [modifier.targets] if isinstance(modifier.targets, str) else modifier.targets
    out_of_reach = never_called(model)
    return {
        name
        for layer_name, layer in match_named_modules(model, targets)
        for name, module in layer.named_modules(prefix=layer_name)
        if isinstance(module, nn.Linear) and name not in out_of_reach
        if not match_targets(name, module, modifier.ignore)
    }


def _rotated_modules(modifier: Any, model: nn.Module) -> list[tuple[str, nn.Module]]:
    applied = [(modifier.targets, modifier.ignore)]
    if modifier.transform_config is not None:
        groups = modifier.transform_config.config_groups.values()
        applied = [(args.targets, args.ignore) for group in groups for args in group.apply]
    as_list = [[[x] if isinstance(x, str) else x for x in both] for both in applied]
    return [found for both in as_list for found in match_named_modules(model, *both)]


def _parameter(adapter: MixerAdapter, own: str) -> str:
    """Name in the model of a mixer's parameter; a projection's may stand alone in the mixer."""
    kind = own.removesuffix(".weight").replace("out_proj", adapter.exit_kind)
    if kind in adapter.projections:
        found = adapter.projection(kind)
        own = f"{found.path}.weight" if found.attribute == "weight" else found.path
    return f"{adapter.name}.{own}"


def _check_called(modifier: Any, model: nn.Module) -> None:
    inside = never_called(model)
    for name, _ in _rotated_modules(modifier, model):
        if name in inside:
            raise SparseSSMError(
                f"{type(modifier).__name__}: {name} would be rotated, but the model reads its "
                "weight without calling it, so its inputs would not be; add "
                f'"re:.*{inside[name]}$" to ignore'
            )


def _check_structure(modifier: Any, model: nn.Module) -> None:
    n, m = modifier._prune_n, modifier._prune_m
    for name in sorted(_pruned_upstream(modifier, model)) if m else ():
        linear: Any = model.get_submodule(name)
        try:
            check_structure(modifier.mask_structure, linear.weight.shape[-1], n / m)
        except SparseSSMError as error:
            raise SparseSSMError(
                f"{type(modifier).__name__}: {error} in {name}; add {name!r} to ignore"
            ) from error
