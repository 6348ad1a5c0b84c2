"""Experts of a mixture: saved so that stock transformers loads them, or refused before the work.

transformers holds the experts of a layer as one tensor for each projection, and ``oneshot()`` takes
them apart into linear layers. GraniteMoeHybrid's loader reads that one tensor from the checkpoint.
Those of Jamba and NemotronH merge it from the weights of single experts, and then look at the
checkpoint's quantization: unless that is FP8 they expect every expert as packed integers, also
where the experts are not quantized at all, and whatever is called otherwise is left out.
Quantized experts come back dense, so that nothing quantizes what enters them.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from compressed_tensors.offload import disable_offloading, set_onload_device
from compressed_tensors.utils import patch_attr
from compressed_tensors.utils.match import match_targets
from llmcompressor.core import active_session
from llmcompressor.modeling.moe.conversion_mappings import has_linearize_load_mappings
from llmcompressor.modeling.moe.linear_experts import LinearExperts2D
from llmcompressor.modeling.moe.linearize import (
    get_linearized_moes,
    get_non_linearized_moes,
    repack_moe,
)
from llmcompressor.modifiers.quantization.quantization.mixin import QuantizationMixin
from torch import nn
from transformers.conversion_mapping import (
    get_checkpoint_conversion_mapping,
    get_model_conversion_mapping,
)
from transformers.core_model_loading import PrefixChange, WeightConverter

from sparsessm_plugin.checkpoints.offloading import drop_unused
from sparsessm_plugin.errors import SparseSSMError
from sparsessm_plugin.families.in_turn import on_disk

_PACKED = "pack-quantized"
_IGNORE = '"re:.*[.]experts[.]"'


def check_experts(modifiers: Iterable[Any], model: nn.Module) -> None:
    """Refuse a recipe that quantizes experts in a way that stock transformers does not load.

    :param modifiers: of the recipe; only those that quantize are looked at
    :param model: transformers model, whose experts may be apart or not; the meta device will do
    :raises SparseSSMError: naming the modifier, an expert and what to add to ``ignore``
    """
    found = [m for m in modifiers if isinstance(m, QuantizationMixin)]
    if not found:
        return
    schemes: dict[str, Any] = {}
    groups: list[Any] = []
    who = ""
    experts = list(_linear_experts(model))
    for modifier in found:
        own = list(modifier.resolved_config.config_groups.values())
        by_target = {t: group for group in own for t in group.targets if group.weights is not None}
        groups += own
        for name, linear in experts:
            schemes.setdefault(name, None)
            targets = match_targets(name, linear, by_target)  # the one that counts comes first
            if targets and not match_targets(name, linear, modifier.ignore):
                schemes[name], who = by_target[targets[0]], type(modifier).__name__
    _check_schemes(f"{who} would quantize", model, schemes, groups)


def check_experts_of_session(model: nn.Module) -> None:
    """:func:`check_experts` for the recipe that LLM Compressor runs now.

    :raises SparseSSMError: as there
    """
    recipe = active_session().lifecycle.recipe
    check_experts(recipe.modifiers if recipe is not None else (), model)


def take_experts_apart(model: Any) -> None:
    """Do what ``oneshot()`` would, layer by layer, so that no file is left of what is apart.

    :param model: nothing happens to one whose weights are not on disk
    """
    if not on_disk(model):
        return
    # not onto a GPU: each expert is a piece of one tensor, which would go there as a whole
    set_onload_device(model, torch.device("cpu"))
    for name, module in get_non_linearized_moes(model):
        apart = LinearExperts2D.get_linear_experts_cls(type(module))
        config = getattr(module, "config", model.config)
        with disable_offloading():  # what holds all of a layer's experts is read once
            experts = apart.from_experts_module(module, config)
        model.set_submodule(name, experts)
        drop_unused(model)


def _pack_experts(model: Any) -> None:
    if not on_disk(model):
        repack_moe(model)
        return
    for name, module in get_linearized_moes(model):
        model.set_submodule(name, module.to_experts_module())
        drop_unused(model)


@contextmanager
def loadable_experts(model: Any, **options: Any) -> Iterator[None]:
    """Within it, ``save_pretrained`` writes experts as stock transformers reads them.

    Experts that are not quantized are given back to the model's own modules, and stay there.
    Where the checkpoint is quantized they are written under the names of these modules, one tensor
    for each projection: transformers loads that whatever the quantization.

    :param options: those of ``save_pretrained``
    :raises SparseSSMError: they are quantized, and transformers would not load them as they are
    """
    schemes = _schemes(model)
    experts = {name: schemes.get(name) for name, _ in _parts(get_linearized_moes(model))}
    if any(scheme is not None for scheme in experts.values()):
        formats = (options.get("quantization_format"), options.get("save_compressed", True))
        if formats not in ((None, True), (_PACKED, True)):
            raise SparseSSMError(
                f"experts of {_family(model)} are quantized, and transformers loads them as "
                "packed integers only; save without save_compressed and quantization_format"
            )
        _check_schemes("a modifier has quantized", model, experts, list(schemes.values()))
        yield
        return
    for _, module in get_linearized_moes(model):
        _remember_origin(module, model)
    _pack_experts(model)
    if schemes and not all(_is_fp8(scheme) for scheme in schemes.values()):
        with patch_attr(model, "_weight_conversions", _without_experts(model)):
            yield
    else:
        yield


def _check_schemes(
    what: str, model: Any, experts: Mapping[str, Any], groups: Sequence[Any]
) -> None:
    """Refuse schemes of single experts, None for those that are not quantized."""
    quantized = {name: scheme for name, scheme in experts.items() if scheme is not None}
    if not quantized:
        return
    name = next(iter(quantized))
    family = _family(model)
    if not _reads_single_experts(model):
        raise SparseSSMError(
            f"{what} {name}, and transformers does not load quantized experts of {family}; "
            f"add {_IGNORE} to ignore"
        )
    dense = next((name for name in experts if name not in quantized), None)
    if dense is not None:
        raise SparseSSMError(
            f"{what} {name} and not {dense}, and transformers loads the experts of {family} all "
            f"quantized or none; add {_IGNORE} to ignore"
        )
    reason = next((r for s in quantized.values() if (r := _not_loaded(s)) is not None), None)
    if reason is None and not all(_found(s, groups) for s in quantized.values()):
        reason = "looks for their scheme in another group of the recipe's config_groups"
    if reason is not None:
        raise SparseSSMError(
            f"{what} {name}, and transformers {reason}; add {_IGNORE} to ignore, or give experts "
            "one scheme of symmetric integer weights alone, such as W4A16"
        )


def _not_loaded(scheme: Any) -> str | None:
    """What transformers would do wrong with experts of a scheme."""
    weights = scheme.weights
    if scheme.input_activations is not None or scheme.output_activations is not None:
        return "loads experts without the quantization of their inputs"
    if weights.type != "int":
        return "loads floating-point experts with other values"
    if not weights.symmetric:
        return "loads experts without their zero points"
    if weights.actorder == "group":
        return "loads experts without the order of their columns"
    if scheme.format not in (None, _PACKED):
        return f"loads no experts in the format {scheme.format}"
    return None


def _found(scheme: Any, groups: Sequence[Any]) -> bool:
    """Whether transformers takes this scheme for the experts, in whatever order groups are saved.

    It takes the first whose patterns name experts, then the first that names a class.
    """
    others = [g for g in groups if g.weights is not None and g.weights != scheme.weights]
    if _names_experts(scheme):
        return not any(map(_names_experts, others))
    return not any(_names_experts(group) or _names_class(group) for group in others)


def _names_experts(group: Any) -> bool:
    return any(target.startswith("re:") and "experts" in target for target in group.targets)


def _names_class(group: Any) -> bool:
    return any(not target.startswith("re:") for target in group.targets)


def _is_fp8(scheme: Any) -> bool:
    weights = scheme.weights
    return weights is not None and weights.type == "float" and weights.num_bits == 8


def _schemes(model: nn.Module) -> dict[str, Any]:
    """Scheme of every module that is quantized, by name."""
    return {
        name: scheme
        for name, module in model.named_modules()
        if (scheme := getattr(module, "quantization_scheme", None)) is not None
        and scheme.weights is not None
    }


def _linear_experts(model: Any) -> Iterator[tuple[str, nn.Linear]]:
    """The linear layers of all experts as they are, or as ``oneshot()`` would take them apart."""
    yield from _parts(get_linearized_moes(model))
    for name, module in get_non_linearized_moes(model):
        apart = LinearExperts2D.get_linear_experts_cls(type(module))
        with torch.device("meta"):
            yield from _parts([(name, apart(getattr(module, "config", model.config)))])


def _parts(moes: Iterable[tuple[str, nn.Module]]) -> Iterator[tuple[str, nn.Linear]]:
    for name, experts in moes:
        for path, part in experts.named_modules(prefix=name):
            if isinstance(part, nn.Linear):
                yield path, part


def _family(model: Any) -> str:
    return str(model.config.get_text_config().model_type)


def _reads_single_experts(model: Any) -> bool:
    """Whether the family's checkpoints hold the experts one by one."""
    family = _family(model)
    # LLM Compressor takes the conversions away where it has loaded experts apart
    mapping = get_checkpoint_conversion_mapping(family) or []
    return any(map(_merges_experts, mapping)) or has_linearize_load_mappings(family)


def _merges_experts(conversion: Any) -> bool:
    return isinstance(conversion, WeightConverter) and all(
        "experts" in pattern for pattern in conversion.source_patterns
    )


def _without_experts(model: Any) -> list[Any]:
    """The conversions that ``save_pretrained`` reverts, but those that take experts apart."""
    conversions = getattr(model, "_weight_conversions", None)
    if conversions is None:  # as transformers does for a model that was not loaded
        conversions = get_model_conversion_mapping(model, add_legacy=False)
        conversions = [c for c in conversions if not isinstance(c, PrefixChange)]
    return [c for c in conversions if not _merges_experts(c)]


def _remember_origin(module: Any, model: Any) -> None:
    """Tell LLM Compressor the class of experts that it has loaded apart, so that it packs them."""
    if getattr(module, "_source_experts_cls", None) is None:
        of = {apart: whole for whole, apart in LinearExperts2D._registry.items()}
        module._source_experts_cls = of.get(type(module))
        module._source_config = model.config.get_text_config()
