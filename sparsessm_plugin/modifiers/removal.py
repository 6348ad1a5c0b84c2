"""What LLM Compressor needs of the modifiers that remove parts of mixers."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

from compressed_tensors.quantization import (
    QuantizationMetadata,
    initialize_module_for_quantization,
)
from llmcompressor.core import Event, State
from torch import nn

from sparsessm_plugin.checkpoints.saving import change_config
from sparsessm_plugin.methods.base import MixerMethod
from sparsessm_plugin.methods.removal import MixerRemoval, quantized_modules
from sparsessm_plugin.modifiers.base import MethodModifier


class RemovalModifier(MethodModifier):
    """Lets LLM Compressor drive a removal, and save what remains with its new sizes.

    The base of :class:`StateRemovalModifier` and :class:`ChannelRemovalModifier`.
    """

    method_class: ClassVar[type[MixerRemoval[Any]]]

    @property
    def changes_inputs(self) -> bool:
        """Whether what is removed enters a Linear layer."""
        return self.method_class.changes_inputs

    def new_method(self) -> MixerMethod[Any]:
        method = super().new_method()
        assert isinstance(method, MixerRemoval)
        method.resizing = new_quantization_parameters
        return method

    def on_calibration_end(self, state: State, event: Event, **kwargs: Any) -> None:
        try:
            super().on_calibration_end(state, event, **kwargs)
        finally:  # what was removed is saved as what it is, even if distillation has failed
            if self._method.config_fields and hasattr(state.model, "save_pretrained"):
                change_config(state.model, self._method.config_fields)


@contextmanager
def new_quantization_parameters(mixer: nn.Module) -> Iterator[None]:
    """Let a quantization modifier that comes later find scales of the new sizes.

    LLM Compressor initialises all modifiers of a recipe before it runs the first one, so a
    mixer may carry scales that have no values yet, one a row of its weights as they were.
    """
    modules = quantized_modules(mixer)
    for module in modules:
        QuantizationMetadata.clear_all_qparams(module)
    try:
        yield
    finally:
        for module in modules:
            status = module.quantization_status
            initialize_module_for_quantization(module)
            module.quantization_status = status
