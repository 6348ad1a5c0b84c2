"""What the removals of states share, whatever the recurrence of the mixer."""

from collections.abc import Callable
from typing import ClassVar

from loguru import logger
from torch import Tensor

from sparsessm_plugin.calibration.inputs import CalibrationInputs
from sparsessm_plugin.errors import SparseSSMError
from sparsessm_plugin.families import MixerAdapter
from sparsessm_plugin.methods.outputs import fit_out_proj
from sparsessm_plugin.methods.removal import Shrunk, nearest
from sparsessm_plugin.methods.state_fits import fit_state_rows
from sparsessm_plugin.methods.state_settings import StateSettings


class StateKind:
    """How states of one kind of recurrence are chosen, and what takes over what they did.

    :param settings: of the removal
    :param who: asks for it, for messages
    :param not_finite: the error about a mixer whose recurrence gives no numbers
    """

    unit: ClassVar[str]  # what a state is called, in the plural
    groups: ClassVar[str]  # what has states of its own
    refused_by: ClassVar[str]  # runtimes that want widths of convolutions that 8 divides

    def __init__(
        self,
        settings: StateSettings,
        who: str,
        not_finite: Callable[[MixerAdapter], SparseSSMError],
    ) -> None:
        self.settings = settings
        self.who = who
        self.not_finite = not_finite

    def check(self, adapter: MixerAdapter) -> None:
        """Refuse a mixer that the settings do not fit, by its sizes alone."""
        who, sizes = self.who, adapter.sizes
        keep = self.settings.kept(sizes.state_size)
        if not 1 <= keep < sizes.state_size:
            raise SparseSSMError(
                f"{who}: keeping {keep} of the {sizes.state_size} {self.unit} of {adapter.name} "
                f"removes none or all; keep 1 to {sizes.state_size - 1}"
            )
        if adapter.has_state_transitions:  # its convolution holds no rows of states
            return
        fixed, G = sizes.intermediate_size, sizes.n_groups

        def fits(states: int) -> bool:
            return (fixed + 2 * G * states) % 8 == 0

        if fixed % 8 == 0 and not fits(keep):
            raise SparseSSMError(
                f"{who}: keeping {keep} of {sizes.state_size} {self.unit} in {G} {self.groups} of "
                f"{adapter.name} gives its convolution a number of channels that 8 does not "
                f"divide, which {self.refused_by}; {nearest(fits, keep, sizes.state_size)}"
            )

    def advise(self, adapter: MixerAdapter) -> None:
        """Warn of a size that is allowed and of little use."""

    def shrink(self, adapter: MixerAdapter, inputs: CalibrationInputs) -> Shrunk:
        """Decide what to remove and fit the rest; see :meth:`MixerRemoval.shrink`."""
        raise NotImplementedError

    def fit_output(
        self,
        small: MixerAdapter,
        inputs: CalibrationInputs,
        targets: list[Tensor],
        steps: tuple[str, ...],
    ) -> bool | None:
        """Fit what every kind can: all rows by gradient steps, then out_proj.

        :param targets: what the dense mixer gave
        :param steps: of compensation, those that are asked for
        :return: whether gradient steps were taken back; None where none were asked for
        """
        diverged = None
        if "reconstruct" in steps:
            count = self.settings.reconstruct_steps
            diverged = not fit_state_rows(small, inputs, targets, count)
            if diverged:
                logger.info(
                    f"{small.name}: {count} steps of reconstruct did not lower the error; "
                    "the weights are what they were before the steps"
                )
        if "out_proj" in steps:
            fit_out_proj(small, inputs, targets)
        return diverged
