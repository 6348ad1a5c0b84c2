"""Which sizes the runtimes take that a smaller model is made for, before it is made."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from copy import deepcopy
from typing import Any

import torch
from compressed_tensors.offload import disable_onloading
from loguru import logger

from sparsessm_plugin.checkpoints.runtimes import RUNTIMES, Limit, ModelFacts, planned_limits
from sparsessm_plugin.dependency_graph import (
    MixerDependencyGraph,
    ModelDependencyGraph,
    apply_config_fields,
)
from sparsessm_plugin.dependency_graph.config import set_language_fields
from sparsessm_plugin.errors import SparseSSMError
from sparsessm_plugin.families import MixerAdapter, find_mixers, get_model_adapter
from sparsessm_plugin.families.base import MixerSizes
from sparsessm_plugin.families.kernels import refused_width

_UNITS = {"state": "states", "key_dims": "key dims", "head_dim": "channels a head"}


class PlannedMixers:
    """A model whose mixers, all alike, are to keep fewer indices of one axis.

    Only shapes and config fields are reckoned; the model is left alone, and may lie on the meta
    device.

    :param model: of transformers
    :param mixers: of one size
    :param axis: of their dependency graph
    """

    def __init__(self, model: Any, mixers: Sequence[MixerAdapter], axis: str):
        self._facts = ModelFacts.from_model(model)
        self._mixers = mixers
        adapter = mixers[0]
        groups, length = adapter.groups_of(axis), adapter.axis_length(axis)
        self.axis, self.size = axis, adapter.size_of(axis, length)
        self.unit = _UNITS.get(axis, axis)
        self._indices = length // self.size  # for each that the size counts
        each = length // groups
        # what one index of every group takes along tells what any number of them takes
        unit = [each * group for group in range(groups)]
        changes = MixerDependencyGraph(adapter).get_axis_group(axis, unit).changes
        self._lost = {
            (change.tensor, change.dim): len(change.positions) / change.slices / groups
            for change in changes
        }
        with disable_onloading():
            self._shapes = {name: list(p.shape) for name, p in adapter.mixer.named_parameters()}

    def facts(self, size: int) -> ModelFacts:
        """Of the smaller model.

        :param size: as ``size_fields`` of the adapter counts: states of one group
        :raises SparseSSMError: the family's loader could not make it
        """
        adapter = self._mixers[0]
        fields = {**adapter.config_sizes(), **adapter.size_fields(self.axis, size)}
        shapes = {name: list(shape) for name, shape in self._shapes.items()}
        for (tensor, dim), lost in self._lost.items():
            if tensor in shapes:
                shapes[tensor][dim] -= round(lost * self._indices * (self.size - size))
        named = {
            f"{mixer.name}.{tensor}": shape
            for mixer in self._mixers
            for tensor, shape in shapes.items()
        }
        return self._facts.changed(named, fields)

    @property
    def dense(self) -> ModelFacts:
        """Of the model as it is."""
        return self._facts


def planned_model(model: Any, kept: Mapping[str, int]) -> ModelFacts:
    """:func:`smaller_model`, by shapes alone."""
    return ModelFacts.from_model(smaller_model(model, kept))


def smaller_model(model: Any, kept: Mapping[str, int]) -> Any:
    """A model, on the meta device, that keeps fewer indices of axes of the whole model.

    :param model: of transformers
    :param kept: indices that stay of each axis, and of the axis of the mixers that goes along with
        the hidden size
    :raises SparseSSMError: the family's loader could not make it
    """
    small = _on_meta(model)
    adapter, graph = get_model_adapter(small), ModelDependencyGraph(small)
    for axis in (axis for axis in adapter.axis_names if axis in kept):
        gone = range(kept[axis], adapter.axis_length(axis))
        removed: Any = gone
        channels = along = None
        if axis == "hidden":
            mixers = adapter.mixers
            along = next((own for own in mixers[0].axis_names if own in kept), None)
            if along is not None:
                channels = {m.name: m.last_indices(along, kept[along]) for m in mixers}
        elif axis != "layers":
            removed = {block.name: gone for block in adapter.blocks(axis)}
        graph.get_axis_group(axis, removed, channels, along).prune()
    return small


def model_of_fields(model: Any, fields: Mapping[str, Any]) -> Any:
    """A model, on the meta device, as the loader makes it from some other config fields.

    :param model: of transformers
    :param fields: as the adapters say them
    """
    config = deepcopy(model.config)
    set_language_fields(config, fields)
    with torch.device("meta"):
        return type(model)(config)


def smaller_mixers(model: Any, axis: str, size: int) -> Any:
    """A model, on the meta device, whose mixers keep fewer indices of one of their axes.

    :param model: of transformers
    :param axis: of the mixers' dependency graph
    :param size: as ``size_fields`` of the adapter counts
    """
    small = _on_meta(model)
    fields: dict[str, Any] = {}
    for mixer in find_mixers(small):
        length = mixer.axis_length(axis)
        gone = mixer.last_indices(axis, length * size // mixer.size_of(axis, length))
        found = MixerDependencyGraph(mixer).get_axis_group(axis, gone)
        found.prune()
        fields |= found.config_fields
    apply_config_fields(small.config, fields)
    return small


def _on_meta(model: Any) -> Any:
    with torch.device("meta"):
        return type(model)(deepcopy(model.config))


def new_limits(
    runtimes: Iterable[str], dense: ModelFacts, smaller: ModelFacts
) -> list[tuple[str, Limit]]:
    """Title of a runtime and what it would not take of the smaller model.

    Where the dense model is outside of a runtime's fast kernels already, a smaller one may be so,
    too.
    """
    found = []
    for name in runtimes:
        before = {limit.source for limit in planned_limits(name, dense) if limit.answer == "slow"}
        found += [
            (RUNTIMES[name].title, limit)
            for limit in planned_limits(name, smaller)
            if limit.answer == "no" or limit.source not in before
        ]
    return found


def check_together(methods: Sequence[Any], model: Any) -> None:
    """Refuse sizes that each runtime takes one by one, and not together.

    :param methods: removals in their order, with their ``runtime``; not used afterwards
    :param model: on the meta device
    :raises SparseSSMError: naming the runtime and the method, see ``MixerMethod.matching_mixers``
    """
    names = list(dict.fromkeys(n for method in methods for n in method.settings.runtime))
    if len(methods) < 2 or not names:
        return
    dense, small = ModelFacts.from_model(model), model
    for method in methods:
        small = method.planned(small)
        found = new_limits(names, dense, ModelFacts.from_model(small))
        if found:
            title, limit = found[0]
            verb = "does not load" if limit.answer == "no" else "is slow with"
            raise SparseSSMError(
                f"{method.who}: {title} {verb} what this and the removals before it make together: "
                f"{limit.reason}"
            )


def check_dense(who: str, runtimes: Iterable[str], facts: ModelFacts) -> None:
    """Refuse runtimes that take no model of this family, and tell of slow ones.

    :raises SparseSSMError: naming the runtime
    """
    for name in runtimes:
        for limit in planned_limits(name, facts):
            if limit.about == "family" and limit.answer == "no":
                raise SparseSSMError(f"{who}: runtime {name} loads no such model: {limit.reason}")
            logger.warning(f"{who}: {name} and the dense model: {limit.reason}")


def nearest_fit(
    wanted: int, sizes: Iterable[int], fits: Callable[[int], bool]
) -> tuple[int | None, int | None]:
    """The next smaller and the next larger of some sizes that fit, the wanted one left out."""
    below = [size for size in sizes if size < wanted]
    above = [size for size in sizes if size > wanted]
    return next(filter(fits, reversed(below)), None), next(filter(fits, above), None)


def refusal(
    who: str, keep: str, found: tuple[str, Limit] | None, numbers: Sequence[int | None]
) -> str:
    """One line on a size that a runtime does not take, with those next to it that it does."""
    near = [str(number) for number in numbers if number is not None]
    advice = f"keep {' or '.join(near)}" if near else "no smaller size fits"
    if found is None:
        return f"{who}: {keep} fits the family's loader as little as any other size near it"
    title, limit = found
    verb = "does not load" if limit.answer == "no" else "is slow with"
    return f"{who}: {title} {verb} what {keep} makes: {limit.reason}; {advice}"


def warn_of_kernels(
    who: str,
    mixer: MixerAdapter,
    kept: str,
    size: int,
    length: int,
    made: Callable[[int], MixerSizes],
) -> None:
    """Warn of a size on which stock transformers fails where causal-conv1d is installed.

    Not where it fails on the mixer as it is.

    :param kept: what the size counts, for messages
    :param size: that is to stay, out of ``length``
    :param made: the mixer's sizes by what stays; a :class:`SparseSSMError` where there are none
    """
    width = refused_width(mixer, made(size))
    if width is None or refused_width(mixer) is not None:
        return

    def fits(other: int) -> bool:
        try:
            return refused_width(mixer, made(other)) is None
        except SparseSSMError:
            return False

    near = [str(n) for n in nearest_fit(size, range(1, length), fits) if n is not None]
    advice = f"keep {' or '.join(near)} instead" if near else f"so with every number below {length}"
    logger.warning(
        f"{who}: {size} of {length} {kept} give {mixer.name} a width of {width}, and causal-conv1d "
        f"takes multiples of 8: stock transformers fails on a GPU where it is installed; {advice}"
    )
