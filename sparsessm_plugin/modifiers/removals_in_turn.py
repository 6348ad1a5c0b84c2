"""What removals of a recipe leave for those after them, by sizes and kinds of layers."""

from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import Any

from llmcompressor.modeling.moe.linearize import get_non_linearized_moes
from loguru import logger
from torch import nn

from sparsessm_plugin.errors import SparseSSMError
from sparsessm_plugin.families import ModelAdapter, find_mixers, get_model_adapter
from sparsessm_plugin.modifiers.channel_removal import ChannelRemovalModifier
from sparsessm_plugin.modifiers.model_removal import ModelRemovalModifier
from sparsessm_plugin.modifiers.removal import RemovalModifier
from sparsessm_plugin.modifiers.rules import Names
from sparsessm_plugin.modifiers.state_removal import StateRemovalModifier
from sparsessm_plugin.selection.sets import allowed_sets


def check_sizes_left(modifiers: Sequence[Any], model: nn.Module) -> None:
    """Refuse a removal that an earlier one leaves nothing to remove.

    :param modifiers: of a recipe, in their order
    :param model: the meta device will do
    :raises SparseSSMError: naming the modifier and what is left
    """
    left: dict[str, int] = {}
    for modifier in modifiers:
        if isinstance(modifier, ModelRemovalModifier) and matching_names(
            modifier.matching_mixers, model
        ):
            for axis, kept in modifier.kept_sizes(model).items():
                if modifier.keep is not None and kept >= left.get(axis, kept + 1):
                    raise SparseSSMError(
                        f"{type(modifier).__name__} would keep {kept} {axis}, and an earlier one "
                        f"leaves {left[axis]}; keep fewer, or leave one of them out"
                    )
                left[axis] = min(kept, left.get(axis, kept))
        if not isinstance(modifier, RemovalModifier) or not matching_names(
            modifier.matching_mixers, model
        ):
            continue
        adapter = find_mixers(model)[0]
        if isinstance(modifier, StateRemovalModifier):
            axis, kept = "states", modifier.kept(adapter.sizes.state_size)
        else:
            assert isinstance(modifier, ChannelRemovalModifier)
            axis, kept = modifier.axis_of(adapter), modifier.kept(adapter)
        if modifier.keep is not None and modifier.keep >= left.get(axis, modifier.keep + 1):
            raise SparseSSMError(
                f"{type(modifier).__name__}: keep is {modifier.keep}, and an earlier one leaves "
                f"{left[axis]} {axis}; keep fewer, or leave one of them out"
            )
        left[axis] = min(kept, left.get(axis, kept))


def models_left(modifiers: Sequence[Any], model: nn.Module) -> Iterator[tuple[Any, nn.Module]]:
    """Every modifier that removes nothing, with what the removals before it leave.

    Which layers go is known once the data has been read, so that all are left here.

    :param modifiers: of a recipe, in their order
    :param model: the meta device will do
    :return: modifiers behind a removal that makes the model smaller, and that model on the meta
        device
    """
    removals = (ModelRemovalModifier, RemovalModifier)
    places = [i for i, m in enumerate(modifiers) if not isinstance(m, removals)]
    left = model
    for modifier in modifiers[: places[-1] + 1] if places else ():
        if isinstance(modifier, removals):
            method: Any = modifier.new_method()
            with suppress(SparseSSMError):  # does not fit this model, which is said elsewhere
                left = method.planned(left)
                # oneshot() has taken experts apart, and a new model has them whole
                if get_non_linearized_moes(left):
                    return
        elif left is not model:
            yield modifier, left


def check_layers_left(modifiers: Sequence[Any], model: nn.Module) -> None:
    """Refuse a removal for which an earlier one leaves no layer, and say if it may leave none.

    Which layers go is known once the data has been read.

    :param modifiers: of a recipe, in their order
    :param model: the meta device will do
    :raises SparseSSMError: naming both
    """
    removals = [m for m in modifiers if isinstance(m, (ModelRemovalModifier, RemovalModifier))]
    fitting = all(
        matching_names(m.matching_mixers, model) for m in removals
    )  # else it is said elsewhere
    if not fitting or not any(isinstance(m, ModelRemovalModifier) for m in removals[:-1]):
        return
    adapter = get_model_adapter(model)
    length = left = adapter.axis_length("layers")
    units = set(adapter.axis_names) - {"hidden", "layers"}
    earlier: Any = None
    for modifier in removals:
        whole = isinstance(modifier, ModelRemovalModifier)
        sizes = modifier.kept_sizes(model) if whole else {}
        if sizes.get("layers", left) < left:
            earlier, left = modifier, sizes["layers"]
        wanted = {axis: adapter.layers_with(axis) for axis in sizes if axis in units}
        if not whole:
            wanted["mixers"] = tuple(e.index for e in adapter.layers if e.has("mixer"))
        for axis, carriers in wanted.items():
            if earlier is None or length - left < len(carriers):
                continue
            who = f"{type(modifier).__name__}: {type(earlier).__name__}, which comes before it,"
            advice = f"keep at least {length - len(carriers) + 1} layers, or let it come last"
            if not _can_go(adapter, length - left, leaves=carriers):
                raise SparseSSMError(f"{who} leaves no layer with {axis}; {advice}")
            if _can_go(adapter, length - left, takes=carriers):
                logger.bind(log_once=True).warning(
                    f"{who} may remove all layers with {axis} ({len(carriers)} of {length}), and "
                    f"the recipe would then end there; {advice}"
                )


def _can_go(
    adapter: ModelAdapter, count: int, leaves: Sequence[int] = (), takes: Sequence[int] = ()
) -> bool:
    """Whether so many layers may be removed that some of one set stay, or all of another go."""
    others = [i for i in range(adapter.axis_length("layers")) if i not in takes]

    def allowed(places: Sequence[int]) -> bool:
        gone = {*takes, *(others[place] for place in places)}
        kept = [i for i in range(len(others) + len(takes)) if i not in gone]
        if leaves and gone.issuperset(leaves):
            return False
        with suppress(SparseSSMError):
            adapter.layer_fields(kept)
            return True
        return False

    rest = count - len(takes)
    return allowed(()) if rest == 0 else any(allowed_sets(len(others), rest, allowed))


def matching_names(matching: Any, model: nn.Module) -> Names:
    """Names of the mixers that ``matching_mixers`` finds; none where it refuses the model."""
    try:
        return frozenset(found.name for found in matching(model))
    except SparseSSMError:  # which is said elsewhere
        return frozenset()
