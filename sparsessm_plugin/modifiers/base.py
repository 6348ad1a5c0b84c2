"""The lifecycle of LLM Compressor, for every method."""

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

from llmcompressor.core import Event, State, active_session
from llmcompressor.modifiers import Modifier
from pydantic import PrivateAttr, field_validator
from torch import nn

from sparsessm_plugin import distributed
from sparsessm_plugin.calibration import CalibrationBatches, give_back
from sparsessm_plugin.calibration.contexts import forget_traces
from sparsessm_plugin.calibration.ranks import check_ranks
from sparsessm_plugin.checkpoints.experts import check_experts_of_session
from sparsessm_plugin.checkpoints.loading import check_unwrapped
from sparsessm_plugin.checkpoints.saving import change_config
from sparsessm_plugin.families import MixerAdapter
from sparsessm_plugin.files import write_report
from sparsessm_plugin.methods.base import MethodSettings, MixerMethod
from sparsessm_plugin.methods.removal import RemovalSettings
from sparsessm_plugin.modifiers.fields import MEANINGLESS, check_computed, check_given
from sparsessm_plugin.modifiers.lifecycle import (
    check_new,
    check_recipe,
    check_report_path,
    note_ids,
    outputs_collected_again,
    outputs_not_collected,
    read_batches,
    weight_shapes,
)
from sparsessm_plugin.modifiers.offset_norms import keep_weights


class MethodModifier(Modifier):
    """Lets LLM Compressor drive a method: its pipelines run the data, the method looks and changes.

    A subclass has the method's settings as its other base, and names the method.

    Lifecycle:

    - on_initialize: find the mixers, check them and the data; several ranks check that they agree
    - on_calibration_start: passes of the method's own; hook what it watches
    - hooks: the method observes
    - on_sequential_epoch_end: the method changes the layers that all data has passed
    - on_calibration_end: the method changes the rest; the hooks go
    - on_finalize: write the report

    :param report_path: ``.json`` file to write the report to
    """

    method_class: ClassVar[type[MixerMethod[Any]]]

    requires_calibration_data: bool = True

    report_path: str | None = None

    _method: Any = PrivateAttr(default=None)
    _batches: CalibrationBatches | None = PrivateAttr(default=None)
    _no_outputs: Callable[[], None] | None = PrivateAttr(default=None)
    _prepared_for: Any = PrivateAttr(default=None)

    meaningless_fields: ClassVar[frozenset[str]] = MEANINGLESS

    def __init__(self, **fields: Any):
        check_given(type(self).__name__, fields)
        super().__init__(**fields)
        self.requires_calibration_data = self.settings.watches_data  # once all fields are checked
        check_computed(self, fields)

    # -- settings --------------------------------------------------------------------

    @field_validator("report_path")
    @classmethod
    def _check_report_path(cls, value: str | None) -> str | None:
        if value is not None:
            check_report_path(value)
        return value

    @property
    def settings(self) -> MethodSettings:
        """The fields that the method has."""
        assert isinstance(self, MethodSettings)
        return self

    @property
    def gathers_sums(self) -> bool:
        """Whether what is gathered of a mixer no longer fits it once its sizes change."""
        return self.method_class.gathers_sums

    @property
    def reads_calibration_data(self) -> bool:
        """Whether it looks at the data, in LLM Compressor's pass over it or in its own."""
        return self.settings.reads_data

    @property
    def needs_whole_model(self) -> bool:
        """Whether all weights have to be in memory at once."""
        return self.method_class.needs_whole_model or getattr(self.settings, "distills", False)

    def new_method(self) -> MixerMethod[Any]:
        """The method with these settings; it is used once."""
        return self.method_class(self.settings, type(self).__name__)

    def matching_mixers(self, model: nn.Module) -> list[MixerAdapter]:
        """See :meth:`MixerMethod.matching_mixers`."""
        return self.new_method().matching_mixers(model)

    # -- lifecycle -------------------------------------------------------------------

    def initialize(self, state: State, **kwargs: Any) -> None:
        """:raises SparseSSMError: it has pruned a model before"""
        check_new(self)
        super().initialize(state, **kwargs)

    def on_initialize(self, state: State, **kwargs: Any) -> bool:
        who = type(self).__name__
        check_unwrapped(state.model)
        self._method = self.new_method()
        self._method.failed = self._failed
        keep_weights(state.model)
        with self._released_on_error():
            self._no_outputs = outputs_not_collected(state.model)
            weakref.finalize(self, self._no_outputs)
            with distributed.together(f"{who} before calibration"):
                self._method.check_patterns(state.model)
                check_experts_of_session(state.model)
                check_recipe("initialize", self, state.model)
                self._method.prepare(state.model)
                self._prepared_for = weight_shapes(state.model)
                if self.reads_calibration_data:
                    self._batches = read_batches(who, state, kwargs.get("calib_data"))
            settings = self.model_dump(exclude={*Modifier.model_fields, "report_path"})
            check_ranks(who, state.model, self._batches, settings)
            if self._batches is not None and self._comes_after_removal():
                self._method.foresee(self._batches)
        return True

    def _comes_after_removal(self) -> bool:
        """Whether the model will have lost parts by the time that this one begins."""
        modifiers = active_session().lifecycle.recipe.modifiers
        own = next((i for i, m in enumerate(modifiers) if m is self), 0)
        return any(isinstance(modifier, RemovalSettings) for modifier in modifiers[:own])

    def on_calibration_start(self, state: State, event: Event, **kwargs: Any) -> None:
        with self._released_on_error():
            check_recipe("calibration_start", self, state.model)
            if weight_shapes(state.model) != self._prepared_for:
                self._method.prepare_again(state.model)
            self._method.current_batch = lambda: state.current_batch_idx
            watched = self._method.begin(self._batches)
        if self._batches is not None and watched:
            note_ids(self, state, self._batches)
        for module, hook in watched:
            self.register_hook(module, hook, "forward_pre", with_kwargs=True)

    def on_sequential_epoch_end(
        self, state: State, event: Event, modules: list[nn.Module] | None = None, **kwargs: Any
    ) -> None:
        with self._released_on_error():
            self._method.layers_done(modules or ())

    def on_calibration_end(self, state: State, event: Event, **kwargs: Any) -> None:
        with self._released_on_error():
            self._method.end()
        no_outputs, self._no_outputs = self._no_outputs, None
        self.release()
        self._no_outputs = no_outputs  # others may still have to be calibrated

    def on_finalize(self, state: State, **kwargs: Any) -> bool:
        self.release()
        if hasattr(state.model, "save_pretrained"):
            change_config(state.model, {})  # experts are then saved as they load
        give_back(self._batches)
        self._batches = None
        if self.report_path is not None and distributed.rank() == 0:
            write_report(self.report_path, self.report())
        return True

    def report(self) -> dict[str, Any]:
        """What was done: settings, one entry a layer, totals."""
        settings = self.model_dump(exclude=set(Modifier.model_fields), exclude_none=True)
        done = self._method.result().to_dict()
        return {"modifier": type(self).__name__, "settings": settings, **done}

    def release(self) -> None:
        """Take everything off the model again; safe to call at any time.

        LLM Compressor tells its modifiers nothing when a run fails.
        """
        self.remove_hooks()
        if self._method is not None:
            self._method.release()
        if self._no_outputs is not None:
            self._no_outputs()
        forget_traces()

    def _failed(self) -> None:
        self.release()
        outputs_collected_again()
        give_back(self._batches)
        for other in active_session().lifecycle.recipe.modifiers:
            if other is not self and hasattr(other, "release"):  # nobody tells them
                other.release()

    @contextmanager
    def _released_on_error(self) -> Iterator[None]:
        try:
            yield
        except BaseException as error:
            distributed.fail(error)
            self._failed()
            raise
