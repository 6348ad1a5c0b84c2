"""What the methods that remove parts of mixers share."""

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass, field
from math import gcd
from typing import Any, ClassVar, TypeVar

import torch
from compressed_tensors.offload import update_offload_parameter
from loguru import logger
from pydantic import Field, field_validator, model_validator
from torch import Tensor, nn

from sparsessm_plugin import distributed
from sparsessm_plugin.calibration import CalibrationBatches
from sparsessm_plugin.calibration.inputs import CalibrationInputs
from sparsessm_plugin.checkpoints.runtimes import check_runtimes
from sparsessm_plugin.dependency_graph import MixerDependencyGraph, apply_config_fields
from sparsessm_plugin.errors import SparseSSMError
from sparsessm_plugin.families import MixerAdapter, check_not_quantized
from sparsessm_plugin.families.config_levels import language_field
from sparsessm_plugin.methods.base import MethodResult, MixerMethod, Watch, targeted_mixers
from sparsessm_plugin.methods.distilling import DistillSettings
from sparsessm_plugin.methods.runtime_sizes import (
    PlannedMixers,
    check_dense,
    nearest_fit,
    new_limits,
    refusal,
    smaller_mixers,
)
from sparsessm_plugin.selection.masks import check_sparsity
from sparsessm_plugin.training.distillation import Distillation, Distilled

# Fewer than this and the fit follows the text instead of the language.
_TOKENS_PER_CHANNEL = 16
_MULTIPLE = 64


class RemovalSettings(DistillSettings):
    """The fields that say how much is removed, over which batches, and how long it is distilled."""

    keep: int | None = None
    sparsity: float | None = None
    calibration_batches: int | None = Field(default=None, ge=1)
    runtime: list[str] = Field(default_factory=list)

    @field_validator("runtime", mode="before")
    @classmethod
    def _read_runtime(cls, value: Any) -> Any:
        names = [value] if isinstance(value, str) else value
        if not isinstance(names, list | tuple) or not all(isinstance(n, str) for n in names):
            raise ValueError(f"must be the name of a runtime, or a list of them, got {value!r}")
        return list(check_runtimes(names))

    @field_validator("sparsity")
    @classmethod
    def _check_sparsity(cls, value: float | None) -> float | None:
        return check_sparsity(value)

    @field_validator("compensate", mode="before", check_fields=False)
    @classmethod
    def _read_compensate(cls, value: Any) -> Any:
        if value == "none":
            return []
        return [value] if isinstance(value, str) else value

    @model_validator(mode="after")
    def _check_keep_or_sparsity(self) -> "RemovalSettings":
        if (self.keep is None) == (self.sparsity is None):
            given = "neither" if self.keep is None else "both"
            raise ValueError(f"give either keep or sparsity, got {given}")
        return self


@dataclass(frozen=True)
class Removed:
    """What was removed from one mixer.

    :param name: of the mixer
    :param axis: that became shorter
    :param before: its length
    :param after: its length now
    :param removed: indices that went, ascending; where each head chose its own, the last
    :param tokens: that the mixer has seen
    :param error_removed: squared error of the mixer's output, relative to the dense output's
        square, before anything was fitted; None without data
    :param error_left: likewise, after all was fitted
    :param diverged: whether gradient steps were taken back; None where none were asked for
    :param seconds: of choosing and fitting
    :param channels: that went, counted head after head, where each head chose its own
    """

    name: str
    axis: str
    before: int
    after: int
    removed: list[int]
    tokens: int
    error_removed: float | None
    error_left: float | None
    diverged: bool | None
    seconds: float
    channels: list[int] | None = None


@dataclass(frozen=True)
class RemovalTotal:
    """How many of how many indices of an axis went, over all mixers."""

    unit: str
    entries: int
    pruned: int
    sparsity: float
    seconds: float

    @classmethod
    def of(cls, layers: list[Removed]) -> "RemovalTotal":
        """Of all mixers."""
        before = sum(layer.before for layer in layers)
        removed = sum(len(layer.removed) for layer in layers)
        return cls(
            unit=layers[0].axis if layers else "entries",
            entries=before,
            pruned=removed,
            sparsity=removed / before if before else 0.0,
            seconds=round(sum(layer.seconds for layer in layers), 3),
        )


@dataclass(frozen=True)
class RemovalResult(MethodResult):
    """What a removal did.

    :param config_fields: what the model's config says of the new sizes
    :param distillation: divergences before and after; None where no steps were asked for
    """

    config_fields: dict[str, Any] = field(default_factory=dict)
    distillation: Distilled | None = None

    def to_dict(self) -> dict[str, Any]:
        """For a report; what was not measured is left out."""
        layers = [
            {name: value for name, value in asdict(layer).items() if value is not None}
            for layer in self.layers
        ]
        distilled = {"distillation": asdict(self.distillation)} if self.distillation else {}
        return {"layers": layers, **distilled, "cost": self.cost, "total": asdict(self.total)}


@dataclass(frozen=True)
class Shrunk:
    """A smaller float32 copy of a mixer; the other fields are those of :class:`Removed`.

    :param order: places that the channels took before ``removed`` went, where each head chose
        its own; None where they stayed where they were
    """

    axis: str
    removed: list[int]
    mixer: MixerAdapter
    error_removed: float | None = None
    error_left: float | None = None
    diverged: bool | None = None
    order: list[int] | None = None

    @property
    def channels(self) -> list[int] | None:
        """Those that went, in their old places, where each head chose its own."""
        if self.order is None:
            return None
        heads, gone = self.mixer.sizes.num_heads, set(self.removed)
        size = len(self.order) // heads
        return sorted(channel for i, channel in enumerate(self.order) if i % size in gone)


S = TypeVar("S", bound=RemovalSettings)


class MixerRemoval(MixerMethod[S]):
    """Makes every mixer smaller along one axis, all to the same size.

    Subclasses implement :meth:`shrink`, which turns a float32 copy of a mixer into a smaller
    one. Only then is the mixer of the model changed, over its dependency graph. Once all
    mixers are, the model's config follows.

    With ``distill_steps`` or ``distill_minutes`` the weights of the smaller model are then fitted,
    all together, to what the dense model predicted for the calibration data. No labels; the one
    thing here that looks beyond a layer, and slow on a CPU. It gains from much more text than a
    layer's fit, which ``calibration_batches`` leaves with less.

    Attributes: ``resizing``, a context around each mixer's change, set by whoever drives it;
    ``config_fields``, what the config says once all mixers are changed.
    """

    changes_inputs: ClassVar[bool] = False  # of Linear layers: what is removed enters one

    def __init__(self, settings: S, who: str | None = None) -> None:
        super().__init__(settings, who)
        self._asked = settings  # beside what the runtimes make of them
        self.resizing: Callable[[nn.Module], AbstractContextManager[Any]] = nullcontext
        self.config_fields: dict[str, Any] = {}
        self._new_fields: dict[str, Any] = {}
        self._inputs: dict[str, CalibrationInputs] = {}
        self._layers: list[Removed] = []
        self._distillation: Distillation | None = None
        self._distilling = False
        self._distilled: Distilled | None = None
        self._told = False

    # -- for subclasses --------------------------------------------------------------

    def axis_to_shrink(self, adapter: MixerAdapter) -> str:
        """The axis of the dependency graph that becomes shorter."""
        raise NotImplementedError

    def size_wanted(self, adapter: MixerAdapter) -> int:
        """How many of its indices stay by the settings, as ``size_fields`` counts them."""
        raise NotImplementedError

    def shrink(self, adapter: MixerAdapter, inputs: CalibrationInputs) -> Shrunk:
        """Decide what to remove and fit the rest.

        :param adapter: a float32 copy of the mixer, which may be changed
        :param inputs: what entered the mixer; empty where no data is asked for
        """
        raise NotImplementedError

    # -- before calibration ----------------------------------------------------------

    def matching_mixers(self, model: nn.Module) -> list[MixerAdapter]:
        self.settings = self._asked
        if self.settings.runtime:
            self._fit_runtimes(model)
        adapters = super().matching_mixers(model)
        first = adapters[0]
        for adapter in adapters:
            if adapter.sizes != first.sizes:
                raise SparseSSMError(
                    f"{self.who}: {adapter.name} has other sizes than {first.name} "
                    f"({adapter.sizes} and {first.sizes}): it was pruned already, or the "
                    "checkpoint is damaged; no stock loader takes sizes by layer"
                )
        self._check_config(model, first)
        return adapters

    def planned(self, model: nn.Module) -> nn.Module:
        """What becomes of a model, on the meta device.

        :raises SparseSSMError: see :meth:`matching_mixers`
        """
        mixer = self.matching_mixers(model)[0]
        return smaller_mixers(model, self.axis_to_shrink(mixer), self.size_wanted(mixer))

    def _fit_runtimes(self, model: nn.Module) -> None:
        """Let the settings keep a number that all runtimes take: the next one to a sparsity.

        :raises SparseSSMError: there is none, or ``keep`` is none
        """
        check_not_quantized(model)
        adapters = targeted_mixers(model, self.settings, self.who)
        adapter, asked, names = adapters[0], self._asked, self._asked.runtime
        planned = PlannedMixers(model, adapters, self.axis_to_shrink(adapter))
        check_dense(self.who, names, planned.dense)
        wanted = self.size_wanted(adapter)

        def keeping(size: int) -> S:
            return asked.model_copy(update={"keep": size, "sparsity": None})

        def fits(size: int) -> bool:
            self.settings = keeping(size)
            try:
                self.check_mixer(adapter)
                return not new_limits(names, planned.dense, planned.facts(size))
            except SparseSSMError:
                return False
            finally:
                self.settings = asked

        if fits(wanted):
            return
        if asked.keep is not None:
            self.check_mixer(adapter)  # what the family cannot have, in its own words
        found = None
        with suppress(SparseSSMError):
            found = next(iter(new_limits(names, planned.dense, planned.facts(wanted))), None)
        sizes = range(1, planned.size)
        multiple = self.multiple_of(adapter) if asked.keep is None else 1
        below, above = nearest_fit(wanted, sizes[multiple - 1 :: multiple], fits)
        fitting = [size for size in (above, below) if size is not None]
        if asked.keep is not None or not fitting:
            field = f"keep = {asked.keep}" if asked.keep is not None else f"{wanted} kept"
            raise SparseSSMError(refusal(self.who, field, found, (below, above)))
        chosen = min(fitting, key=lambda size: abs(size - wanted))
        logger.warning(
            f"{self.who}: {chosen} instead of {wanted} of {planned.size} {planned.unit} stay in "
            f"every mixer, for {', '.join(names)}"
            + (f": {found[1].reason}" if found is not None else "")
        )
        self.settings = keeping(chosen)

    def multiple_of(self, adapter: MixerAdapter) -> int:
        """What a size that follows from ``sparsity`` is a multiple of."""
        return 1

    def _check_config(self, model: nn.Module, adapter: MixerAdapter) -> None:
        config = getattr(model, "config", None)
        if config is None:
            return
        for name, size in adapter.config_sizes().items():
            said = language_field(config, name)
            if said is not None and said != size:
                raise SparseSSMError(
                    f"{self.who}: the config says {name} = {said}, the weights of "
                    f"{adapter.name} have {size}; load a checkpoint whose config fits it"
                )

    def prepare(self, model: nn.Module) -> None:
        for adapter in self.matching_mixers(model):
            if quantized_modules(adapter.mixer):
                raise SparseSSMError(
                    f"{self.who}: {adapter.name} is quantized, or a modifier that "
                    "comes earlier in the recipe quantizes it; remove first, then quantize"
                )
        super().prepare(model)

    def prepare_again(self, model: nn.Module) -> None:
        super().prepare(model)  # scales of a later quantization are there, unset, by now

    # -- calibration -----------------------------------------------------------------

    def foresee(self, batches: CalibrationBatches) -> None:
        self._distillation = self.settings.distillation(self._model, batches)

    def begin(self, batches: CalibrationBatches | None) -> list[Watch]:
        watched = super().begin(batches)
        if self.settings.distills and self._distillation is None:
            with self.cost.stage("dense predictions"):
                self._distillation = self.settings.distillation(self._model, self.batches)
        return watched

    def observe(
        self, adapter: MixerAdapter, hidden_states: Tensor, attention_mask: Tensor | None
    ) -> None:
        seen, wanted = self.cost.batches(adapter.name), self.settings.calibration_batches
        if wanted is None or seen <= wanted:  # this one is counted
            inputs = self._inputs.setdefault(adapter.name, CalibrationInputs())
            inputs.add(hidden_states, attention_mask)

    def compress(self, adapter: MixerAdapter) -> None:
        with self.resizing(adapter.mixer):
            self._compress_mixer(adapter)

    def _compress_mixer(self, adapter: MixerAdapter) -> None:
        started = time.perf_counter()
        inputs = self._inputs.pop(adapter.name, CalibrationInputs())
        inputs.join(adapter.name)
        self.check_mixer(adapter)  # again: an earlier modifier may have made it smaller
        if self.settings.watches_data:
            self._check_tokens(adapter, inputs.tokens)
        small = self.shrink(adapter.float_clone(), inputs)
        _share_weights(adapter, small.mixer)
        group = MixerDependencyGraph(adapter).get_axis_group(small.axis, small.removed)
        logger.debug(str(group))
        group.prune()
        for path, module in adapter.mixer.named_modules():
            fitted = small.mixer.mixer.get_submodule(path)
            for name, parameter in list(module.named_parameters(recurse=False)):
                value = fitted.get_parameter(name).to(parameter)
                update_offload_parameter(module, name, value)
        self._new_fields = group.config_fields
        self._layers.append(
            Removed(
                name=adapter.name,
                axis=small.axis,
                before=group.old_size,
                after=group.new_size,
                removed=small.removed,
                tokens=inputs.tokens,
                error_removed=small.error_removed,
                error_left=small.error_left,
                diverged=small.diverged,
                seconds=round(time.perf_counter() - started, 3),
                channels=small.channels,
            )
        )
        logger.info(
            f"{adapter.name}: removed {len(small.removed)} of {group.old_size} {small.axis}"
        )

    def _check_tokens(self, adapter: MixerAdapter, tokens: int) -> None:
        """Refuse to remove without any calibration tokens, and warn once of few to fit to."""
        if tokens == 0:
            raise SparseSSMError(f"{adapter.name} saw no calibration tokens; nothing was removed")
        few = _TOKENS_PER_CHANNEL * adapter.sizes.intermediate_size
        fitted = getattr(self.settings, "compensate", None) != []
        if tokens < few and fitted and not self._layers:
            logger.warning(
                f"{adapter.name}: {tokens} calibration tokens are few for "
                f"{adapter.sizes.intermediate_size} channels; what is fitted to them may not "
                f"hold elsewhere, give {few} or more"
            )

    def finish(self) -> None:
        if self._new_fields and hasattr(self._model, "config"):
            apply_config_fields(self._model.config, self._new_fields)
        self.config_fields = self._new_fields
        if self._distillation is not None:
            self._distilling = True
            with self.released_on_error(), self.cost.stage("distill"):
                self._distilled = self.settings.distill(self._distillation, self._model)
            self._distilling = False

    def result(self) -> RemovalResult:
        return RemovalResult(
            tuple(self._layers),
            RemovalTotal.of(self._layers),
            self.cost.to_dict(),
            self.config_fields,
            self._distilled,
        )

    def release(self) -> None:
        super().release()
        self._inputs.clear()
        self._distillation = None

    @contextmanager
    def released_on_error(self) -> Iterator[None]:
        try:
            with super().released_on_error():
                yield
        except Exception as error:
            if not self._layers or self._told or not (self._pending or self._distilling):
                raise
            self._told = True
            state = "partly pruned and of no use; load it again"
            if not self._pending:
                state = "pruned and not distilled"
            raise SparseSSMError(
                f"{error} - the model in memory is now {state}. Nothing was saved"
            ) from error


def quantized_modules(mixer: nn.Module) -> list[nn.Module]:
    """Modules of a mixer that have a quantization scheme, whether their scales are set or not."""
    return [m for m in mixer.modules() if getattr(m, "quantization_scheme", None) is not None]


def usual_multiple(length: int) -> int:
    """What kernels like a size to be a multiple of, if a quarter of the length is one."""
    return gcd(_MULTIPLE, max(1, length // 4))


def nearest(fits: Callable[[int], bool], keep: int, size: int) -> str:
    """Advice to keep the next smaller or the next larger number that fits, out of a size."""
    below = next((n for n in range(keep - 1, 0, -1) if fits(n)), None)
    above = next((n for n in range(keep + 1, size) if fits(n)), None)
    numbers = [str(number) for number in (below, above) if number is not None]
    return f"keep {' or '.join(numbers)}" if numbers else f"no number below {size} fits"


def remove(adapter: MixerAdapter, axis: str, removed: list[int]) -> MixerAdapter:
    """A smaller float32 copy of a mixer."""
    small = adapter.float_clone()
    MixerDependencyGraph(small).get_axis_group(axis, removed).prune()
    return small


def _share_weights(adapter: MixerAdapter, small: MixerAdapter) -> None:
    """Let all ranks have the smaller mixer of rank 0, and refuse one that is no numbers."""
    fitted_values = distributed.share(
        f"weights of {adapter.name}",
        lambda: list(small.mixer.parameters()),
        device=adapter.A_log.device,
    )
    for parameter, value in zip(small.mixer.parameters(), fitted_values, strict=True):
        parameter.copy_(value)
    for name, parameter in small.mixer.named_parameters():
        if not bool(torch.isfinite(parameter).all()):
            raise SparseSSMError(
                f"{adapter.name}.{name} became NaN or infinite while it was fitted"
            )
