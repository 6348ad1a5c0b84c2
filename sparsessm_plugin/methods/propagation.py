"""Let data pass a changed mixer without computing once more what is known of it.

Layer by layer, a batch that has passed a layer passes it again once that is changed. On a GPU with
room, what the mixer computes then is kept where it is computed first.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from sparsessm_plugin.calibration.inputs import CalibrationInputs
from sparsessm_plugin.cost import has_room
from sparsessm_plugin.families import MixerAdapter, read_out
from sparsessm_plugin.families.fast_forward import may_promise, promise
from sparsessm_plugin.families.promises import KnownCall
from sparsessm_plugin.recurrence.quantities import MixerQuantities


def fits(device: torch.device, needed: int) -> bool:
    """Whether to keep so many bytes more until data passes again; never on a CPU."""
    return has_room(device, needed)


class OutInputs:
    """What the output projection of a mixer that is being changed multiplies, batch by batch.

    Attributes: ``wanted``, whether anybody will ask for it.
    """

    def __init__(self) -> None:
        self.wanted = False
        self._kept: list[Tensor] = []

    def add(self, x: Tensor) -> None:
        """Keep that of the next batch, (b, L, D); without room, neither it nor any after it."""
        self.wanted = self.wanted and fits(x.device, x.nbytes)
        if self.wanted:
            self._kept.append(x)

    def hand_over(
        self, adapter: MixerAdapter, changed: MixerAdapter, inputs: CalibrationInputs
    ) -> None:
        """Promise it to the mixer.

        :param adapter: of the mixer in the model
        :param changed: of the one that has computed it, by now with the same weights
        :param inputs: what entered
        """
        calls, kept = [], self._kept
        for numbers, parts in inputs.added:
            if numbers.stop > len(kept):
                break
            calls.append(KnownCall(parts, partial(_joined, kept[numbers.start : numbers.stop])))
        self._kept = []
        if calls:
            promise(adapter.mixer, changed.mixer, calls)


class KeptQuantities:
    """What the recurrence of a mixer reads beside A, batch by batch, until A is changed.

    Of one mixer at a time: where data enters a second one before the first is changed, not the
    layer but the whole model is passed at once, and it is too much.
    """

    def __init__(self) -> None:
        self._name: str | None = None
        self._wanted = False
        self._dense: MixerAdapter | None = None
        self._kept: list[tuple[Tensor, MixerQuantities]] = []

    def add(
        self, adapter: MixerAdapter, hidden_states: Tensor, quantities: MixerQuantities
    ) -> None:
        """Keep those of the next batch; without room, neither them nor any after them.

        :param hidden_states: (b, L, hidden_size) that entered
        :param quantities: that the mixer has made of it
        """
        if self._name is None:
            self._name = adapter.name
            self._wanted = may_promise(adapter.mixer, alone=True)
        if self._name != adapter.name:
            self._wanted, self._dense, self._kept = False, None, []
        z = quantities.z
        self._wanted = self._wanted and fits(z.device, z.nbytes)
        if not self._wanted:
            return
        if self._dense is None:
            self._dense = adapter.working_clone()
        # a copy of z: the other half of what in_proj gives need not stay
        own = replace(quantities, z=z.contiguous(), inputs={})
        self._kept.append((hidden_states.detach(), own))

    def hand_over(self, adapter: MixerAdapter, passes_again: bool) -> None:
        """Promise the mixer, whose A has changed and nothing else, what it gives with that.

        :param passes_again: whether the data will; otherwise all is let go
        """
        dense, kept = self._dense, self._kept
        serves = passes_again and self._name == adapter.name
        self._name, self._wanted, self._dense, self._kept = None, False, None, []
        if dense is None or not serves:
            return
        dense.mixer.A_log.copy_(adapter.mixer.A_log)
        A = -torch.exp(adapter.A_log.detach().float())
        calls = [
            KnownCall([(x, own.mask)], partial(read_out, adapter, replace(own, A=A)))
            for x, own in kept
        ]
        promise(adapter.mixer, dense.mixer, calls)


def _joined(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))
