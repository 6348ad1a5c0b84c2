"""What every method that compresses mixers is: settings, what it looks at, what it changes."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, ClassVar, Generic, NamedTuple, TypeVar

import torch
from compressed_tensors.utils.match import match_named_modules
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator
from torch import Tensor, nn

from sparsessm_plugin import distributed
from sparsessm_plugin.calibration import CalibrationBatches
from sparsessm_plugin.calibration.contexts import of_quantization
from sparsessm_plugin.calibration.finite import is_finite
from sparsessm_plugin.calibration.overflow import FiniteCheck
from sparsessm_plugin.cost import Cost
from sparsessm_plugin.errors import SparseSSMError, first_problem, shown
from sparsessm_plugin.families import (
    MixerAdapter,
    check_not_quantized,
    find_mixers,
    get_adapter,
    is_mixer,
    iter_mixers,
)
from sparsessm_plugin.families.fast_forward import fast_forward, withdraw
from sparsessm_plugin.patterns import check_pattern, check_patterns
from sparsessm_plugin.progress import Stage

_Settings = TypeVar("_Settings", bound="MethodSettings")


class MethodSettings(BaseModel):
    """The fields of a method, checked against each other. Its modifier has the same fields."""

    model_config = ConfigDict(extra="forbid")

    @classmethod
    def of(cls: type[_Settings], who: str, fields: dict[str, Any]) -> _Settings:
        """Settings from what a function of this name was given.

        :raises SparseSSMError: naming the field, its value and what is allowed
        """
        try:
            return cls(**fields)
        except ValidationError as error:
            raise SparseSSMError(first_problem(error, who, cls.model_fields)) from error

    @property
    def watches_data(self) -> bool:
        """Whether the method looks at what enters the mixers while data passes the model."""
        return True

    @property
    def reads_data(self) -> bool:
        """Whether the method looks at data at all, if only in passes of its own."""
        return self.watches_data


class TargetSettings(MethodSettings):
    """The fields of a method that may leave some of the model alone."""

    targets: list[str] = Field(default_factory=list)
    ignore: list[str] = Field(default_factory=list)

    @field_validator("targets", "ignore", mode="before")
    @classmethod
    def _one_or_many(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value

    @field_validator("targets", "ignore")
    @classmethod
    def _check_patterns(cls, value: list[str]) -> list[str]:
        for target in value:
            if target.startswith("re:"):
                check_pattern(target)
        return value


class Watch(NamedTuple):
    """A forward pre-hook that a method asks for, called with module, args and kwargs."""

    module: nn.Module
    hook: Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]


@dataclass(frozen=True)
class Total:
    """How many of how many entries went, over all layers."""

    entries: int
    pruned: int
    sparsity: float
    seconds: float

    @classmethod
    def of(cls, layers: Sequence[Any]) -> "Total":
        """Of layers with ``entries``, ``pruned`` and ``seconds``."""
        entries = sum(layer.entries for layer in layers)
        pruned = sum(layer.pruned for layer in layers)
        seconds = round(sum(layer.seconds for layer in layers), 3)
        return cls(entries, pruned, pruned / entries if entries else 0.0, seconds)


@dataclass(frozen=True)
class MethodResult:
    """What a method did.

    :param layers: one entry a mixer or weight
    :param total: over all of them
    :param cost: seconds, tokens and memory, see :class:`sparsessm_plugin.cost.Cost`
    """

    layers: tuple[Any, ...]
    total: Any
    cost: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """For a report."""
        return {
            "layers": [asdict(layer) for layer in self.layers],
            "cost": self.cost,
            "total": asdict(self.total),
        }


S = TypeVar("S", bound=MethodSettings)
_PATTERNS = ("targets", "ignore")  # fields that may hold patterns


class MixerMethod(Generic[S]):
    """A method that changes each mixer by what enters it on calibration text.

    Whoever drives it, :func:`sparsessm_plugin.methods.run` or a modifier of LLM Compressor,
    calls in this order

    1. :meth:`prepare`: find what will be changed and check it; nothing is changed yet
    2. :meth:`begin`: passes of its own, and what to watch while data passes the model
    3. the hooks of these, once a module and batch, which call :meth:`observe`
    4. :meth:`layers_done`: all data has passed these modules; :meth:`compress` changes them
    5. :meth:`end`: what is left, and :meth:`finish`
    6. :meth:`result`

    and at any time :meth:`release`, which takes everything off the model again.

    :param settings: checked fields
    :param who: what messages call the method; by default its class
    """

    # Whether what is gathered of a mixer no longer fits it once its sizes change.
    gathers_sums: ClassVar[bool] = False
    # Whether all weights have to be in memory at once, and not one layer's after another's.
    needs_whole_model: ClassVar[bool] = False

    def __init__(self, settings: S, who: str | None = None) -> None:
        self.settings = settings
        self.who = who or type(self).__name__
        self.cost = Cost()
        # number of the batch that passes the model, counted from 0; set by whoever drives it
        self.current_batch: Callable[[], int] = lambda: 0
        self.failed: Callable[[], None] = lambda: None  # called when it has raised an error
        # whether all that a mixer saw enters it once more, after compress() and before all else
        self.passes_again = False
        # what it measured of the model that it was given, if that serves other settings: may be
        # handed to another run on an equal model and the same data
        self.carried: Any = None
        self._model: Any = None
        self._batches: CalibrationBatches | None = None
        self._finite: FiniteCheck | None = None
        self._mixers = 0  # to change
        self._pending: dict[str, MixerAdapter] = {}
        self._just_changed: list[MixerAdapter] = []  # of the layers that were done last
        self._restore = ExitStack()
        self._stage: Stage | None = None

    # -- for subclasses --------------------------------------------------------------

    def check_mixer(self, adapter: MixerAdapter) -> None:
        """Refuse a mixer that the settings do not fit, by its sizes alone.

        :raises SparseSSMError: naming the field, the mixer and what is allowed
        """

    def observe(
        self, adapter: MixerAdapter, hidden_states: Tensor, attention_mask: Tensor | None
    ) -> None:
        """Take in what entered a mixer in one batch."""
        raise NotImplementedError

    def compress(self, adapter: MixerAdapter) -> None:
        """Change the mixer, which has now seen all the data."""
        raise NotImplementedError

    def finish(self) -> None:
        """Do what remains once all mixers are changed."""

    def state_in_memory(self) -> str:
        """What has become of the model by now, for the message of an error."""
        done = self._mixers - len(self._pending)
        if not done:
            return "nothing was changed"
        return f"{done} of {self._mixers} mixers of the model in memory are changed already"

    def result(self) -> MethodResult:
        """What was done."""
        raise NotImplementedError

    # -- for whoever drives it -------------------------------------------------------

    def check_model(self, model: nn.Module) -> None:
        """Check the settings against a model; the meta device will do.

        :raises SparseSSMError: see :meth:`matching_mixers`
        """
        self.matching_mixers(model)

    def matching_mixers(self, model: nn.Module) -> list[MixerAdapter]:
        """The mixers that are to be changed, checked against the settings.

        Looks at names and shapes only, so a model on the meta device will do.

        :raises SparseSSMError: no mixer, an unknown one, one that is stored quantized, a target
            without a mixer, or settings that do not fit a mixer
        """
        check_not_quantized(model)
        adapters = targeted_mixers(model, self.settings, self.who)
        for adapter in adapters:
            self.check_mixer(adapter)
        return adapters

    def check_patterns(self, model: nn.Module) -> None:
        """Refuse patterns that take too long to match; see :func:`check_patterns`."""
        patterns = [p for field in _PATTERNS for p in getattr(self.settings, field, [])]
        check_patterns(patterns, model, self.who)

    def prepare(self, model: nn.Module) -> None:
        """Find the mixers, check them and the settings; nothing is changed yet.

        :raises SparseSSMError: naming what does not fit
        """
        self.check_patterns(model)
        adapters = self.matching_mixers(model)
        for adapter in adapters:
            for name, parameter in adapter.mixer.named_parameters():
                if not of_quantization(name) and not is_finite(parameter):
                    raise SparseSSMError(
                        f"{adapter.name}.{name} holds NaN or infinite values; nothing was pruned"
                    )
        self._model = model
        self._pending = {adapter.name: adapter for adapter in adapters}
        self._mixers = len(adapters)

    def prepare_again(self, model: nn.Module) -> None:
        """As :meth:`prepare`, after other methods of a run have removed parts of the model."""
        self.prepare(model)

    def foresee(self, batches: CalibrationBatches) -> None:
        """Keep what is needed of the model before other methods of a run remove parts of it.

        After :meth:`prepare`, and before the first of them begins.
        """

    def begin(self, batches: CalibrationBatches | None) -> list[Watch]:
        """Start, now that the data is known.

        :param batches: None where none are read
        :return: what to watch while data passes the model
        """
        self._batches = batches
        if batches is not None:
            self._finite = FiniteCheck(self._model, batches, self.state_in_memory)
        self.cost.begin()
        self._restore.callback(self.cost.end)
        self._stage = Stage(self.who, len(self._pending))
        self._restore.callback(self._stage.close)
        if not self.settings.watches_data:
            return []
        self._restore.enter_context(fast_forward(self._model))
        return [
            Watch(adapter.mixer, partial(self._see, adapter)) for adapter in self._pending.values()
        ]

    def layers_done(self, modules: Sequence[nn.Module]) -> None:
        """Change what is among these modules, which all data has passed."""
        done = {id(module) for module in modules}
        for adapter in self._just_changed:  # whatever was to pass it has done so
            withdraw(adapter.mixer)
        self._just_changed = [a for a in self._pending.values() if id(a.mixer) in done]
        # what is promised for one mixer holds as long as no other before it is changed, too
        self.passes_again = len(self._just_changed) == 1
        for adapter in self._just_changed:
            self._compress(adapter)
        self.passes_again = False

    def end(self) -> None:
        """Change what is left, and finish."""
        for adapter in list(self._pending.values()):
            self._compress(adapter)
        self.finish()
        self.release()

    def release(self) -> None:
        """Take everything off the model again; safe to call at any time."""
        self._restore.close()
        self._just_changed, self.passes_again = [], False

    @contextmanager
    def released_on_error(self) -> Iterator[None]:
        """Around all that may fail: other ranks are told, and the model is released."""
        try:
            yield
        except BaseException as error:
            distributed.fail(error)
            self.release()
            self.failed()
            raise

    # -- within ----------------------------------------------------------------------

    @property
    def batches(self) -> CalibrationBatches:
        """The data, the same and in the same order whenever it is read."""
        assert self._batches is not None, "begin() was given no data"
        return self._batches

    @property
    def finite(self) -> FiniteCheck:
        """Refuses NaN and infinite values of the calibration."""
        assert self._finite is not None, "begin() was given no data"
        return self._finite

    def _see(
        self,
        adapter: MixerAdapter,
        module: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> None:
        if adapter.name not in self._pending:
            return
        hidden_states, attention_mask = what_enters(args, kwargs)
        batch = self.cost.count(adapter.name, hidden_states, attention_mask)
        self._now_at(f"{adapter.name}, batch {batch}")
        with torch.no_grad(), self.released_on_error(), self.cost.stage("observe"):
            self.finite.input(adapter.name, hidden_states)
            self.batches.check_ids()
            self.batches.check_mask(batch - 1, adapter.name, attention_mask)
            self.observe(adapter, hidden_states, attention_mask)

    def _compress(self, adapter: MixerAdapter) -> None:
        self._now_at(adapter.name)
        with torch.no_grad(), self.released_on_error(), self.cost.stage("compress"):
            if self._finite is not None:
                self._finite.inputs()
            self.compress(adapter)
        del self._pending[adapter.name]
        if self._stage is not None:
            self._stage.advance()

    def _now_at(self, what: str) -> None:
        if self._stage is not None:
            self._stage.at(what)


def targeted_mixers(model: nn.Module, settings: MethodSettings, who: str) -> list[MixerAdapter]:
    """The mixers that ``targets`` and ``ignore`` leave; all, where the settings have neither.

    :raises SparseSSMError: no mixer, an unknown one, or a pattern without a mixer
    """
    targets, ignore = (getattr(settings, field, []) for field in _PATTERNS)
    names = set() if targets else {name for name, _ in iter_mixers(model)}
    if not targets and not names:
        find_mixers(model)  # raises, and says which mixers are known
    for target in targets:
        found = {name for name, module in match_named_modules(model, [target]) if is_mixer(module)}
        if not found:
            raise SparseSSMError(
                f"{who}.targets: {shown(target)} matches no state-space mixer; the model's "
                f"mixers are {_listed([a.name for a in find_mixers(model)])}"
            )
        names |= found
    for pattern in ignore:
        ignored = {n for n, m in match_named_modules(model, [pattern]) if is_mixer(m)}
        if not ignored:
            raise SparseSSMError(f"{who}.ignore: {shown(pattern)} matches no state-space mixer")
        names -= ignored
    adapters = [
        get_adapter(module, name) for name, module in model.named_modules() if name in names
    ]
    if not adapters:
        raise SparseSSMError(f"{who}.ignore: {ignore} leaves no state-space mixer")
    return adapters


def what_enters(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, Tensor | None]:
    """hidden_states (b, L, hidden_size) and attention_mask of a call of a mixer."""
    return args[0] if args else kwargs["hidden_states"], kwargs.get("attention_mask")


def check_finite_input(name: str, x: Tensor) -> None:
    """Refuse to prune a layer by inputs that are no numbers.

    :raises SparseSSMError: naming the layer
    """
    if not is_finite(x):
        raise SparseSSMError(
            f"{name}: its input holds NaN or infinite values during calibration; "
            "this layer was not pruned"
        )


def _listed(names: list[str], most: int = 4) -> str:
    shown = ", ".join(names[:most])
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"
