"""Which effects of modifiers on weights must not follow each other, and what to say of them."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from llmcompressor.modifiers.autoround import AutoRoundModifier
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.pruning.sparsegpt import SparseGPTModifier
from llmcompressor.modifiers.quantization.quantization.mixin import QuantizationMixin
from llmcompressor.modifiers.transform.quip import QuIPModifier

from sparsessm_plugin.modifiers.sparsessm import SparseSSMModifier

Names = frozenset[str]


@dataclass(frozen=True)
class Effects:
    """What a modifier does to the weights of a model, by names of parameters.

    :param changes: weights that it gives other values
    :param pruned: weights in which it makes zeros, or other values that must stay
    :param value: what it stores a pruned entry as
    :param patterned: those of ``pruned`` whose zeros are n of every m neighbours of a row
    :param overwrites: weights whose zeros it writes other values into
    :param keeps: value of pruned entries that it does not write into, in ``overwrites``
    :param columns: weights that lose columns
    :param grid: weights that it leaves on a quantization grid
    :param rotated: weights that then multiply rotated inputs, or give rotated outputs
    :param removed: weights of experts, some of which it removes
    """

    changes: Names = frozenset()
    pruned: Names = frozenset()
    value: str = "zero"
    patterned: Names = frozenset()
    overwrites: Names = frozenset()
    keeps: str | None = None
    columns: Names = frozenset()
    grid: Names = frozenset()
    rotated: Names = frozenset()
    removed: Names = frozenset()
    own: bool = field(default=False, kw_only=True)  # reads mixers' weights as they are stored

    @property
    def any(self) -> bool:
        """Whether the model has anything that the modifier works on."""
        return bool(self.changes or self.pruned or self.overwrites or self.grid or self.removed)


@dataclass(frozen=True)
class Rule:
    """What one modifier must not do after another.

    :param mark: stands for it in the table of the documentation
    :param meaning: what would happen, for the documentation
    :param broken: the weights in question, given the effects of the first and of the second
    :param message: the error, given both modifiers and the name of a weight
    """

    mark: str
    meaning: str
    broken: Callable[[Effects, Effects], Names]
    message: Callable[[Any, Any, str], str]


def _overwritten(first: Effects, second: Effects) -> Names:
    return first.pruned & second.overwrites if second.keeps != first.value else frozenset()


def _unpatterned(first: Effects, second: Effects) -> Names:
    return first.patterned & second.columns


def _off_grid(first: Effects, second: Effects) -> Names:
    return first.grid & second.changes


def _rotated(first: Effects, second: Effects) -> Names:
    return first.rotated if second.own and second.any else frozenset()


def _without_experts(first: Effects, second: Effects) -> Names:
    return first.removed & second.changes


def _overwriting(first: Any, second: Any, name: str) -> str:
    one, two = type(first).__name__, type(second).__name__
    if isinstance(first, SparseSSMModifier) and isinstance(second, SparseSSMModifier):
        return (
            f"{two} with pruned_value {second.pruned_value} would undo what {one} with "
            f"{first.pruned_value} has pruned of {name}; give both the same pruned_value"
        )
    if isinstance(second, SparseSSMModifier):
        advice = f"put {two} first, or give it pruned_value: zero"
    elif isinstance(second, SparseGPTModifier):
        advice = f"give {two} preserve_sparsity_mask: true, or other targets"
    elif isinstance(second, (GPTQModifier, AutoRoundModifier)):
        advice = "SparseGPTQModifier quantizes without that"
    elif isinstance(second, QuIPModifier):
        advice = f"no zero survives a rotation; give {two} other targets, or leave one of them out"
    else:
        advice = f"put {two} first"
    return f"{two} would write into the zeros that {one} has made in {name}; {advice}"


def _breaking_pattern(first: Any, second: Any, name: str) -> str:
    one, two = type(first).__name__, type(second).__name__
    return (
        f"{two} would remove columns of {name}, of which {one} has made n of every m neighbours "
        f"zero; put {two} first"
    )


def _leaving_grid(first: Any, second: Any, name: str) -> str:
    one, two = type(first).__name__, type(second).__name__
    if isinstance(second, QuantizationMixin):
        return (
            f"{two} would quantize {name} again, which {one} has quantized; give them different "
            "targets, or leave one of them out"
        )
    return (
        f"{two} would change {name}, which {one} has quantized; put {two} first: prune, scale or "
        "remove first, then quantize"
    )


def _reading_rotated(first: Any, second: Any, name: str) -> str:
    one, two = type(first).__name__, type(second).__name__
    return (
        f"{two} reads {name} as it is stored, which {one} has rotated together with its inputs; "
        f"put {two} first"
    )


def _changing_experts(first: Any, second: Any, name: str) -> str:
    one, two = type(first).__name__, type(second).__name__
    return f"{two} would change {name}, an expert that {one} may have removed; put {two} first"


RULES = (
    Rule("Z", "would write into the zeros", _overwritten, _overwriting),
    Rule("P", "would remove columns of an n:m pattern", _unpatterned, _breaking_pattern),
    Rule("G", "would change what is quantized", _off_grid, _leaving_grid),
    Rule("R", "reads weights that are rotated", _rotated, _reading_rotated),
    Rule("E", "would change experts that are removed", _without_experts, _changing_experts),
)
