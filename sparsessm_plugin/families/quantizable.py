"""Which weights a quantization names, and which of them cannot be calibrated."""

import re
from typing import Any

from compressed_tensors.quantization import (
    QuantizationArgs,
    QuantizationScheme,
    QuantizationStrategy,
    QuantizationType,
)
from compressed_tensors.utils import match_named_modules
from torch import Tensor, nn

from sparsessm_plugin.errors import SparseSSMError
from sparsessm_plugin.families.base import router_names
from sparsessm_plugin.families.registry import check_not_quantized, is_mixer, iter_mixers
from sparsessm_plugin.families.shared_weights import weight_holders

# transformers multiplies by the weights of these without calling the modules
_NEVER_CALLED = ("conv1d", "dt_proj")
_GROUPED = (QuantizationStrategy.GROUP, QuantizationStrategy.TENSOR_GROUP)


def quantized_weights(modifier: Any, model: nn.Module) -> dict[str, tuple[Any, QuantizationArgs]]:
    """The modules whose weights a modifier quantizes, by name, each with its grid.

    :param modifier: any with a ``resolved_config`` and ``ignore``, as those of LLM Compressor
    :param model: the meta device will do
    """
    return {
        name: (module, scheme.weights)
        for scheme in modifier.resolved_config.config_groups.values()
        if scheme.weights is not None
        for name, module in match_named_modules(model, scheme.targets, modifier.ignore)
        if not isinstance(module, nn.Embedding)
    }


def never_called(model: nn.Module) -> dict[str, str]:
    """Modules of the mixers whose weights are read without a call: name -> name in the mixer."""
    return {f"{name}.{part}": part for name, _ in iter_mixers(model) for part in _NEVER_CALLED}


def encoder_prefix(model: Any, name: str) -> str | None:
    """The part beside a language model in which a module stands: its name, None for the others.

    :param model: of transformers
    :param name: of a module
    """
    base = getattr(model, "base_model", model)
    language = getattr(base, "language_model", None)
    if language is None:
        return None
    prefix = f"{model.base_model_prefix}." if base is not model else ""
    if not name.startswith(prefix):
        return None
    child = name.removeprefix(prefix).partition(".")[0]
    return None if getattr(base, child, language) is language else child


def check_quantized(modifier: Any, model: nn.Module, who: str | None = None) -> None:
    """Refuse targets that cannot be calibrated, or that do not fit the group size.

    Looks at names and shapes only, so a model on the meta device will do.

    :param modifier: see :func:`quantized_weights`
    :param who: what messages call it; by default its class
    :raises SparseSSMError: naming the first such module and what to add to ``ignore``
    """
    check_not_quantized(model)
    who = who or type(modifier).__name__
    inside, routers = never_called(model), router_names(model)
    by_data = getattr(modifier, "requires_calibration_data", True)
    _check_shared(modifier, model)
    for name, (module, args) in quantized_weights(modifier, model).items():
        beside = encoder_prefix(model, name) if by_data else None
        if beside is not None:
            raise SparseSSMError(
                f"{who}: {name} would be quantized, but it stands beside the language model, where "
                f'no text comes by, so it cannot be calibrated; add "re:.*{beside}[.]" to ignore'
            )
        if name in routers:
            raise SparseSSMError(
                f"{who}: {name} would be quantized, but it chooses experts: a rounded score sends "
                f'tokens elsewhere, and costs nothing to keep; add "re:{_anchored(name)}" to ignore'
            )
        if name in inside:
            raise SparseSSMError(
                f"{who}: {name} would be quantized, but the model reads its weight without "
                f'calling it, so it cannot be calibrated; add "re:.*{inside[name]}$" to ignore'
            )
        weight = getattr(module, "weight", None)
        if is_mixer(module) or not isinstance(weight, Tensor) or weight.ndim < 2:
            raise SparseSSMError(
                f"{who}: {name} would be quantized, but a {type(module).__name__} has no "
                f'weight matrix of its own; add "re:{_anchored(name)}" to ignore'
            )
        width, size = int(weight.shape[-1]), args.group_size
        if modifier.bypass_divisibility_checks or args.strategy not in _GROUPED or not size:
            continue
        if width % size:
            raise SparseSSMError(
                f"{who}: {name} has {width} inputs, which groups of {size} do not divide; "
                f'add "re:{_anchored(name)}" to ignore or choose another group_size'
            )


def _check_shared(modifier: Any, model: nn.Module) -> None:
    """Refuse a weight of several layers that is quantized in some only, or to be packed."""
    who, quantized = type(modifier).__name__, set(quantized_weights(modifier, model))
    holders = {n: names for n, names in weight_holders(model).items() if n in quantized}
    for name, names in holders.items():
        for other in names:
            if other not in quantized:
                raise SparseSSMError(
                    f"{who}: {name} shares its weight with {other}, which would not be quantized; "
                    f'add "re:{_anchored(name)}" to ignore or take {other!r} out of it'
                )
    for scheme in modifier.resolved_config.config_groups.values():
        if scheme.weights is None or not _is_packed(scheme):
            continue
        for name, _ in match_named_modules(model, scheme.targets, modifier.ignore):
            if name in holders:
                other = next(n for n in holders[name] if n != name)
                raise SparseSSMError(
                    f"{who}: {name} shares its weight with {other}, and packed it would not load "
                    f'again; add "re:{_anchored(name)}" to ignore, or give the config group '
                    "format: int-quantized"
                )


def _is_packed(scheme: QuantizationScheme) -> bool:
    """Whether weights are stored in a tensor of another shape."""
    weights = scheme.weights
    if scheme.format is not None:
        return "pack" in str(scheme.format)
    whole = weights.type == QuantizationType.INT and scheme.input_activations is None
    return weights.num_bits == 4 or whole


def _anchored(name: str) -> str:
    """A pattern for this layer in every block: ``.*mixer.x_proj$`` for ``...3.mixer.x_proj``."""
    tail = re.split(r"\.\d+\.", name)[-1]
    return f".*{tail}$"
