"""Remove whole state dimensions, and let the remaining weights take over what they did."""

from collections.abc import Iterable
from typing import Any

from torch import nn

from sparsessm_plugin.calibration.inputs import CalibrationInputs
from sparsessm_plugin.errors import SparseSSMError
from sparsessm_plugin.families import MixerAdapter
from sparsessm_plugin.methods.key_dims import KeyDims
from sparsessm_plugin.methods.removal import MixerRemoval, RemovalResult, Shrunk
from sparsessm_plugin.methods.run import run
from sparsessm_plugin.methods.selective_states import SelectiveStates
from sparsessm_plugin.methods.state_kind import StateKind
from sparsessm_plugin.methods.state_settings import StateSettings

# What is a state, how it is chosen and what is fitted, by the mixer's recurrence.
_KINDS: dict[str, type[StateKind]] = {
    "selective": SelectiveStates,
    "delta_rule": KeyDims,
}


class StateRemoval(MixerRemoval[StateSettings]):
    """Removes the states that matter least for the mixer's output, from every mixer alike."""

    def axis_to_shrink(self, adapter: MixerAdapter) -> str:
        return "state" if "state" in adapter.axis_names else "key_dims"

    def size_wanted(self, adapter: MixerAdapter) -> int:
        return self.settings.kept(adapter.sizes.state_size)

    def check_mixer(self, adapter: MixerAdapter) -> None:
        self.settings.check_criterion(adapter, self.who)
        self._of(adapter).check(adapter)

    def prepare(self, model: nn.Module) -> None:
        super().prepare(model)
        first = next(iter(self._pending.values()))
        self._of(first).advise(first)

    def shrink(self, adapter: MixerAdapter, inputs: CalibrationInputs) -> Shrunk:
        return self._of(adapter).shrink(adapter, inputs)

    def _of(self, adapter: MixerAdapter) -> StateKind:
        return _KINDS[adapter.recurrence](self.settings, self.who, self._not_finite)

    def _not_finite(self, adapter: MixerAdapter) -> SparseSSMError:
        return SparseSSMError(
            f"{adapter.name}: NaN or infinite values in its recurrence during "
            f"calibration; {self.finite.explained()}"
        )


def remove_states(
    model: Any, batches: Iterable[Any] | None = None, **settings: Any
) -> RemovalResult:
    """Remove states from all mixers of a model, in place; its config follows.

    :param model: transformers model
    :param batches: what the model's forward takes; None for settings that need no data
    :param settings: fields of :class:`sparsessm_plugin.StateRemovalModifier`, such as ``keep``
    :return: one :class:`Removed` a mixer, and the config fields of the new size
    :raises SparseSSMError: a field that is not allowed, what does not fit the model or the data
    """
    method = StateRemoval(StateSettings.of("remove_states", settings), "remove_states")
    run(method, model, batches)
    return method.result()
