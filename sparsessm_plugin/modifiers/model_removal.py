"""What LLM Compressor needs of the modifiers that remove along an axis of the whole model."""

from typing import Any, ClassVar

from llmcompressor.core import Event, State, active_session
from pydantic import PrivateAttr
from torch import nn

from sparsessm_plugin.calibration.batches import before_reading
from sparsessm_plugin.checkpoints.saving import change_config
from sparsessm_plugin.families import get_model_adapter
from sparsessm_plugin.methods.base import MixerMethod
from sparsessm_plugin.methods.model_removal import ModelRemoval
from sparsessm_plugin.modifiers.base import MethodModifier
from sparsessm_plugin.modifiers.offset_norms import keep_names
from sparsessm_plugin.modifiers.removal import new_quantization_parameters


class ModelRemovalModifier(MethodModifier):
    """Lets LLM Compressor drive the removal, and save what remains with its new sizes.

    All is done on calibration start, or when the pipeline reads its first batch, if that comes
    earlier: the sequential pipeline then traces the model, which must be the smaller one.
    """

    method_class: ClassVar[type[ModelRemoval[Any]]]

    _begun: bool = PrivateAttr(default=False)

    def new_method(self) -> MixerMethod[Any]:
        method = super().new_method()
        assert isinstance(method, ModelRemoval)
        method.resizing = new_quantization_parameters
        return method

    @property
    def changes_inputs(self) -> bool:
        """Whether weights that stay lose columns."""
        return self.method_class.changes_inputs

    def kept_sizes(self, model: nn.Module) -> dict[str, int]:
        """See :meth:`ModelRemoval.kept_sizes`."""
        return self._unused().kept_sizes(get_model_adapter(model))

    def written(self, model: nn.Module) -> frozenset[str]:
        """See :meth:`ModelRemoval.written`."""
        return self._unused().written(get_model_adapter(model))

    def _unused(self) -> ModelRemoval[Any]:
        method = self.new_method()
        assert isinstance(method, ModelRemoval)
        return method

    def on_initialize(self, state: State, **kwargs: Any) -> bool:
        done = super().on_initialize(state, **kwargs)
        before_reading(kwargs.get("calib_data"), _begin_all)
        return done

    def on_calibration_start(self, state: State, event: Event, **kwargs: Any) -> None:
        if self._begun:
            return
        self._begun = True
        keep_names(state.model)
        try:
            super().on_calibration_start(state, event, **kwargs)
        finally:  # what was removed is saved as what it is, even if distillation has failed
            if self._method.config_fields and hasattr(state.model, "save_pretrained"):
                change_config(state.model, self._method.config_fields)


def _begin_all() -> None:
    """Let all removals of this calibration pass begin, in the order of the recipe."""
    state = active_session().state
    for modifier in active_session().lifecycle.recipe.modifiers:
        if isinstance(modifier, ModelRemovalModifier) and modifier.initialized_:
            modifier.on_calibration_start(state, None)
