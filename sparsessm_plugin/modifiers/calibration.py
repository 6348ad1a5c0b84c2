"""The part of the LLM Compressor lifecycle that every modifier of mixers shares."""

import math
import os
import sys
import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from compressed_tensors.utils.match import match_named_modules
from llmcompressor.core import Event, State, active_session
from llmcompressor.modifiers import Modifier
from pydantic import Field, PrivateAttr, field_validator
from torch import Tensor, nn

from sparsessm_plugin import distributed
from sparsessm_plugin.calibration import CalibrationBatches, fix_batches, give_back
from sparsessm_plugin.calibration.contexts import forget_traces, of_quantization
from sparsessm_plugin.calibration.ranks import check_ranks
from sparsessm_plugin.checkpoints.experts import check_experts_of_session
from sparsessm_plugin.checkpoints.loading import check_unwrapped
from sparsessm_plugin.checkpoints.saving import change_config
from sparsessm_plugin.cost import Cost
from sparsessm_plugin.errors import SparseSSMError, shown
from sparsessm_plugin.families import (
    MixerAdapter,
    check_not_quantized,
    find_mixers,
    get_adapter,
    is_mixer,
    iter_mixers,
)
from sparsessm_plugin.families.fast_forward import fast_forward
from sparsessm_plugin.files import check_path, read_json, write_report
from sparsessm_plugin.modifiers.fields import MEANINGLESS, check_computed, check_given
from sparsessm_plugin.patterns import check_pattern, check_patterns
from sparsessm_plugin.progress import Stage


class MixerModifier(Modifier):
    """A modifier that looks at what enters each state-space mixer during calibration.

    Subclasses implement :meth:`observe`, called once a mixer and batch, and
    :meth:`compress`, called for each mixer once it has seen all the data.

    Lifecycle:

    - on_initialize: find the mixers, check them and the data; several ranks check that they agree
    - on_calibration_start: hook the mixers and make their forward fast
    - hooks: :meth:`observe`
    - on_sequential_epoch_end: :meth:`compress` what has been observed
    - on_calibration_end: compress what is left, remove the hooks
    - on_finalize: restore the mixers

    :param targets: mixers to treat, by name, class name or ``re:`` pattern; default all
    :param ignore: mixers to leave alone, likewise
    :param report_path: ``.json`` file to write the report to
    """

    # Whether what is gathered of a mixer no longer fits it once its sizes change.
    gathers_sums: ClassVar[bool] = False

    targets: list[str] = Field(default_factory=list)
    ignore: list[str] = Field(default_factory=list)
    report_path: str | None = None

    _pending: dict[str, MixerAdapter] = PrivateAttr(default_factory=dict)
    _restore: ExitStack = PrivateAttr(default_factory=ExitStack)
    _cost: Cost = PrivateAttr(default_factory=Cost)
    _stage: Stage | None = PrivateAttr(default=None)
    _batches: CalibrationBatches | None = PrivateAttr(default=None)
    _no_outputs: Callable[[], None] | None = PrivateAttr(default=None)

    meaningless_fields: ClassVar[frozenset[str]] = MEANINGLESS

    def __init__(self, **fields: Any):
        check_given(type(self).__name__, fields)
        super().__init__(**fields)
        check_computed(self, fields)

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

    @field_validator("report_path")
    @classmethod
    def _check_report_path(cls, value: str | None) -> str | None:
        if value is not None:
            check_report_path(value)
        return value

    # -- for subclasses --------------------------------------------------------------

    def prepare(self, state: State) -> None:
        """Find the mixers, check them and the settings; nothing is changed yet.

        :raises SparseSSMError: naming what does not fit
        """
        adapters = self.matching_mixers(state.model)
        for adapter in adapters:
            for name, parameter in adapter.mixer.named_parameters():
                if not of_quantization(name) and not _is_finite(parameter):
                    raise SparseSSMError(
                        f"{adapter.name}.{name} holds NaN or infinite values; nothing was pruned"
                    )
        self._pending = {adapter.name: adapter for adapter in adapters}

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

    def finish(self, state: State) -> None:
        """Do what remains once all mixers are changed; the hooks are still there."""

    def report(self) -> dict[str, Any]:
        """What was done: settings, one entry a layer, totals."""
        raise NotImplementedError

    # -- before calibration ----------------------------------------------------------

    @property
    def reads_calibration_data(self) -> bool:
        """Whether it looks at the data, in LLM Compressor's pass over it or in its own."""
        return self.requires_calibration_data

    @property
    def batches(self) -> CalibrationBatches:
        """The data, the same and in the same order whenever it is read."""
        assert self._batches is not None
        return self._batches

    def initialize(self, state: State, **kwargs: Any) -> None:
        """:raises SparseSSMError: it has pruned a model before"""
        check_new(self)
        super().initialize(state, **kwargs)

    def matching_mixers(self, model: nn.Module) -> list[MixerAdapter]:
        """The mixers that ``targets`` and ``ignore`` leave, checked against the settings.

        Looks at names and shapes only, so a model on the meta device will do.

        :raises SparseSSMError: no mixer, an unknown one, one that is stored quantized, a target
            without a mixer, or settings that do not fit a mixer
        """
        check_not_quantized(model)
        who = type(self).__name__
        names = set() if self.targets else {name for name, _ in iter_mixers(model)}
        if not self.targets and not names:
            find_mixers(model)  # raises, and says which mixers are known
        for target in self.targets:
            found = {
                name for name, module in match_named_modules(model, [target]) if is_mixer(module)
            }
            if not found:
                raise SparseSSMError(
                    f"{who}.targets: {shown(target)} matches no state-space mixer; the model's "
                    f"mixers are {_listed([a.name for a in find_mixers(model)])}"
                )
            names |= found
        for pattern in self.ignore:
            ignored = {n for n, m in match_named_modules(model, [pattern]) if is_mixer(m)}
            if not ignored:
                raise SparseSSMError(f"{who}.ignore: {shown(pattern)} matches no state-space mixer")
            names -= ignored
        adapters = [
            get_adapter(module, name) for name, module in model.named_modules() if name in names
        ]
        if not adapters:
            raise SparseSSMError(f"{who}.ignore: {self.ignore} leaves no state-space mixer")
        for adapter in adapters:
            self.check_mixer(adapter)
        return adapters

    def on_initialize(self, state: State, **kwargs: Any) -> bool:
        who = type(self).__name__
        check_unwrapped(state.model)
        with self._released_on_error():
            self._no_outputs = outputs_not_collected(state.model)
            weakref.finalize(self, self._no_outputs)
            with distributed.together(f"{who} before calibration"):
                check_patterns([*self.targets, *self.ignore], state.model, who)
                check_experts_of_session(state.model)
                check_recipe(self, state.model)
                self.prepare(state)
                if self.reads_calibration_data:
                    self._batches = read_batches(who, state, kwargs.get("calib_data"))
            settings = self.model_dump(exclude={*Modifier.model_fields, "report_path"})
            check_ranks(who, state.model, self._batches, settings)
        return True

    # -- calibration -----------------------------------------------------------------

    def on_calibration_start(self, state: State, event: Event, **kwargs: Any) -> None:
        from sparsessm_plugin.recipes.conflicts import check_pass

        with self._released_on_error():
            check_pass(self, state.model)
        self._cost.begin()
        self._restore.callback(self._cost.end)
        self._stage = Stage(type(self).__name__, len(self._pending))
        self._restore.callback(self._stage.close)
        if not self.requires_calibration_data:
            return
        note_ids(self, state, self.batches)
        self._restore.enter_context(fast_forward(state.model))
        for adapter in self._pending.values():
            hook = partial(self._observe_hook, adapter)
            self.register_hook(adapter.mixer, hook, "forward_pre", with_kwargs=True)

    def _observe_hook(
        self,
        adapter: MixerAdapter,
        module: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> None:
        if adapter.name not in self._pending:
            return
        hidden_states, attention_mask = what_enters(args, kwargs)
        batch = self._cost.count(adapter.name, hidden_states, attention_mask)
        self._now_at(f"{adapter.name}, batch {batch}")
        with torch.no_grad(), self._released_on_error(), self._cost.stage("observe"):
            check_finite_input(adapter.name, hidden_states)
            self.batches.check_ids()
            self.batches.check_mask(batch - 1, adapter.name, attention_mask)
            self.observe(adapter, hidden_states, attention_mask)

    def on_sequential_epoch_end(
        self, state: State, event: Event, modules: list[nn.Module] | None = None, **kwargs: Any
    ) -> None:
        done = {id(module) for module in modules or ()}
        for adapter in [a for a in self._pending.values() if id(a.mixer) in done]:
            self._compress(adapter)

    def on_calibration_end(self, state: State, event: Event, **kwargs: Any) -> None:
        for adapter in list(self._pending.values()):
            self._compress(adapter)
        self.finish(state)
        no_outputs, self._no_outputs = self._no_outputs, None
        self.release()
        self._no_outputs = no_outputs  # others may still have to be calibrated

    def _compress(self, adapter: MixerAdapter) -> None:
        self._now_at(adapter.name)
        with torch.no_grad(), self._released_on_error(), self._cost.stage("compress"):
            self.compress(adapter)
        del self._pending[adapter.name]
        if self._stage is not None:
            self._stage.advance()

    def _now_at(self, what: str) -> None:
        if self._stage is not None:
            self._stage.at(what)

    def on_finalize(self, state: State, **kwargs: Any) -> bool:
        self.release()
        if hasattr(state.model, "save_pretrained"):
            change_config(state.model, {})  # experts are then saved as they load
        give_back(self._batches)
        self._batches = None
        if self.report_path is not None and distributed.rank() == 0:
            write_report(self.report_path, self.report())
        return True

    def release(self) -> None:
        """Take everything off the model again; safe to call at any time.

        LLM Compressor tells its modifiers nothing when a run fails.
        """
        self.remove_hooks()
        self._restore.close()
        if self._no_outputs is not None:
            self._no_outputs()
        forget_traces()

    @contextmanager
    def _released_on_error(self) -> Iterator[None]:
        try:
            yield
        except BaseException as error:
            distributed.fail(error)
            self.release()
            outputs_collected_again()
            give_back(self._batches)
            for other in active_session().lifecycle.recipe.modifiers:
                if other is not self and hasattr(other, "release"):  # nobody tells them
                    other.release()
            raise


def read_batches(who: str, state: State, source: Any) -> CalibrationBatches:
    """The batches of the run, whose ids the model knows; see :func:`fix_batches`.

    :raises SparseSSMError: there is no data, or an id outside of the vocabulary
    """
    return fix_batches(
        who, state, source, getattr(_embeddings(state.model), "num_embeddings", None)
    )


def note_ids(modifier: Modifier, state: State, batches: CalibrationBatches) -> None:
    """Let the batches know what the model embeds while a modifier watches a calibration pass."""

    def note(module: nn.Module, args: tuple[Any, ...]) -> None:
        if args:
            batches.note_ids(state.current_batch_idx, args[0])

    embeddings = _embeddings(state.model)
    if embeddings is not None:
        modifier.register_hook(embeddings, note, "forward_pre")


def check_new(modifier: Modifier) -> None:
    """Refuse a modifier that holds what an earlier run has left in it.

    :raises SparseSSMError: naming its class
    """
    if modifier.initialized_ or modifier.finalized_:
        raise SparseSSMError(
            f"this {type(modifier).__name__} has been used before; make a new one for every run"
        )


def check_recipe(modifier: Modifier, model: nn.Module) -> None:
    """Refuse what a modifier would undo of the others in the recipe that is about to run.

    :raises SparseSSMError: see :func:`sparsessm_plugin.recipes.conflicts.check_session`
    """
    from sparsessm_plugin.recipes.conflicts import check_session  # which knows all modifiers

    check_session(modifier, model)


def what_enters(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, Tensor | None]:
    """hidden_states (b, L, hidden_size) and attention_mask of a call of a mixer."""
    return args[0] if args else kwargs["hidden_states"], kwargs.get("attention_mask")


def check_finite_input(name: str, x: Tensor) -> None:
    """Refuse to prune a layer by inputs that are no numbers.

    :raises SparseSSMError: naming the layer
    """
    if not _is_finite(x):
        raise SparseSSMError(
            f"{name}: its input holds NaN or infinite values during calibration; "
            "this layer was not pruned"
        )


def check_report_path(path: str) -> None:
    """Refuse a path to which no report can be written, or where something else is.

    :raises ValueError: saying what is wrong with it
    """
    check_path(path)
    if not path.endswith(".json"):
        raise ValueError(f"must end with .json, got {shown(path)}")
    folder = Path(path).absolute().parent
    if not folder.is_dir():
        raise ValueError(f"the folder of {shown(path)} does not exist")
    if not os.access(folder, os.W_OK):
        raise ValueError(f"the folder of {shown(path)} cannot be written to")
    if Path(path).exists() and not _is_report(Path(path)):
        raise ValueError(f"{shown(path)} exists and is no report of a modifier")


# transformers' files that were given the name, and a token of everybody who asks for that
_without_outputs: dict[str, set[object]] = {}


def outputs_not_collected(model: nn.Module) -> Callable[[], None]:
    """Let LLM Compressor see that a forward pass collects no layer's output.

    It takes a model apart by its source and evaluates conditions with the names that the
    source's file knows. transformers' ``if output_hidden_states`` asks for an argument, which is
    none, so the outputs of half of all layers were kept until the end. A name of the file that
    every function hides by its argument changes nothing else.

    :return: takes the name away again, where nobody else still asks for it; once, however often
        it is called
    """
    token, files = object(), {type(module).__module__ for module in model.modules()}
    for file in files:
        if not file.startswith("transformers.models."):
            continue
        if file in _without_outputs or "output_hidden_states" not in vars(sys.modules[file]):
            vars(sys.modules[file])["output_hidden_states"] = False
            _without_outputs.setdefault(file, set()).add(token)

    def undo() -> None:
        for file in files:
            _take_name_away(file, {token})

    return undo


def outputs_collected_again() -> None:
    """Undo every :func:`outputs_not_collected`: a run has failed, and nobody tells."""
    for file, asking in list(_without_outputs.items()):
        _take_name_away(file, set(asking))


def _take_name_away(file: str, tokens: set[object]) -> None:
    asking = _without_outputs.get(file)
    if asking is None:
        return
    asking -= tokens
    if not asking:
        del _without_outputs[file]
        vars(sys.modules[file]).pop("output_hidden_states", None)


def _embeddings(model: Any) -> Any:
    return model.get_input_embeddings() if hasattr(model, "get_input_embeddings") else None


def _is_finite(tensor: Tensor) -> bool:
    if tensor.is_meta:
        return True
    # the sum of finite numbers is finite in float64; one pass without a mask in memory
    return math.isfinite(float(tensor.detach().sum(dtype=torch.float64)))


def _is_report(path: Path) -> bool:
    try:
        return path.is_file() and "modifier" in read_json(path)
    except (OSError, ValueError, TypeError):
        return False


def _listed(names: list[str], most: int = 4) -> str:
    shown = ", ".join(names[:most])
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"
