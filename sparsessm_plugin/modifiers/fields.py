"""Fields that LLM Compressor gives to every modifier, and that mean nothing to those of ours."""

from collections.abc import Mapping
from typing import Any

from llmcompressor.modifiers import Modifier

from sparsessm_plugin.errors import SparseSSMError, shown

# `group` is set by LLM Compressor itself, and only says where a modifier stands in a recipe.
MEANINGLESS = frozenset(Modifier.model_fields) - {"group"}
_COMPUTED = "requires_calibration_data"  # stands in the recipe.yaml of what was saved


def check_given(who: str, given: Mapping[str, Any]) -> None:
    """Refuse fields that say when a modifier acts, which is once, or where it is by now.

    :param who: name of the modifier
    :param given: its fields
    :raises SparseSSMError: naming the field
    """
    for name in sorted(MEANINGLESS & set(given) - {_COMPUTED}):
        # what a modifier is without the field may be said
        if given[name] != Modifier.model_fields[name].default:
            raise SparseSSMError(
                f"{who}.{name} means nothing here: the modifier acts once, when it is calibrated; "
                f"leave it out, got {shown(given[name])}"
            )


def check_computed(modifier: Modifier, given: Mapping[str, Any]) -> None:
    """Refuse another ``requires_calibration_data`` than the fields themselves ask for.

    :param given: the fields as given
    :raises SparseSSMError: naming the field
    """
    needs = modifier.requires_calibration_data
    if given.get(_COMPUTED, needs) != needs:
        raise SparseSSMError(
            f"{type(modifier).__name__}.{_COMPUTED} follows from the other fields and is {needs}; "
            f"leave it out, got {shown(given[_COMPUTED])}"
        )
