"""What a scan accumulates for a saliency, and where it accumulates it."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from sparsessm_plugin.backends.memory import room
from sparsessm_plugin.recurrence.quantities import MixerQuantities

PrunedValue = Literal["zero", "memoryless"]
_ACCUMULATORS = ("state_energy", "transition", "output_error")


@dataclass(frozen=True)
class StatisticsRequest:
    """The statistics that a saliency asks of the scan.

    :param state_energy: S_t[d,n] = sum over the batch of h_{t-1}[d,n]^2
    :param transition: E_t[d,n] = sum over the batch of exp(dt_t A)[d,n]
    :param output_error: for what a pruned entry means, the squared change of the gated scan
        output when this entry alone is pruned,
        sum over the batch of (C_{t,n} (h'_t - h_t)[d,n] silu(z_t)[d])^2
    :param per_step: keep every time step apart, (L, D, N), instead of their sum, (D, N)
    """

    state_energy: bool = False
    transition: bool = False
    output_error: PrunedValue | None = None
    per_step: bool = False

    @property
    def needs_scan(self) -> bool:
        """Whether anything is asked for at all."""
        return self.state_energy or self.transition or self.output_error is not None


class ScanStatistics:
    """Accumulators of one mixer, filled batch by batch by :func:`sparsessm_plugin.recurrence.scan`.

    Per-step accumulators are float32 of shape (L, D, N) and grow to the longest sequence
    seen; sums over time are float64 of shape (D, N). Neither depends on the batch size.

    :param request: what to accumulate
    :param channels: D
    :param state_size: N
    :param device: where the accumulators live
    """

    def __init__(
        self,
        request: StatisticsRequest,
        channels: int,
        state_size: int,
        device: torch.device | str = "cpu",
    ):
        self.request = request
        self.channels = channels
        self.state_size = state_size
        self.device = torch.device(device)
        self.tokens = 0
        self.steps = 0
        self.state_energy: Tensor | None = None
        self.transition: Tensor | None = None
        self.output_error: Tensor | None = None

    def begin(self, quantities: MixerQuantities) -> None:
        """Make room for a batch and count its tokens; every scan backend calls it first."""
        batch, length = quantities.u.shape[:2]
        mask = quantities.mask
        self.tokens += batch * length if mask is None else int(mask.sum())
        self.steps = max(self.steps, length)
        if self.request.state_energy:
            self.state_energy = self._room(self.state_energy)
        if self.request.transition:
            self.transition = self._room(self.transition)
        if self.request.output_error is not None:
            self.output_error = self._room(self.output_error)

    def split(self, groups: int) -> list["ScanStatistics"]:
        """Accumulators of as many equal parts of the channels, with what is there already."""
        size = self.channels // groups
        parts = []
        for g in range(groups):
            part = ScanStatistics(self.request, size, self.state_size, self.device)
            part.tokens, part.steps = self.tokens, self.steps
            for name in _ACCUMULATORS:
                whole = getattr(self, name)
                if whole is not None:
                    own = whole[..., g * size : (g + 1) * size, :]
                    # backends write where channels lie as :meth:`_room` makes them
                    setattr(part, name, _like_room(own))
            parts.append(part)
        return parts

    def join(self, parts: list["ScanStatistics"]) -> None:
        """Take over what :meth:`split` parts hold once they have seen the same batch."""
        self.tokens, self.steps = parts[0].tokens, parts[0].steps
        for name in _ACCUMULATORS:
            values = [getattr(part, name) for part in parts]
            if all(value is not None for value in values):
                setattr(self, name, torch.cat(values, dim=-2))

    def is_finite(self) -> bool:
        """Whether every accumulator holds finite numbers only."""
        return all(
            bool(torch.isfinite(t.sum(dtype=torch.float64)))
            for t in (getattr(self, name) for name in _ACCUMULATORS)
            if t is not None
        )

    def _room(self, accumulator: Tensor | None) -> Tensor:
        if not self.request.per_step:
            if accumulator is not None:
                return accumulator
            return torch.zeros(
                self.channels, self.state_size, dtype=torch.float64, device=self.device
            )
        have = 0 if accumulator is None else accumulator.shape[0]
        if accumulator is not None and have >= self.steps:
            return accumulator
        # channels are contiguous in memory: that is how the CPU kernel walks through them
        shape = self.steps, self.state_size, self.channels
        on_cpu = self.device.type == "cpu"
        grown = room(*shape).zero_() if on_cpu else torch.zeros(*shape, device=self.device)
        grown = grown.transpose(1, 2)
        if accumulator is not None:
            grown[:have] = accumulator
        return grown


def _like_room(accumulator: Tensor) -> Tensor:
    """A copy in which states of a step lie one after the other, channels contiguous in each."""
    if accumulator.ndim == 2:
        return accumulator.clone(memory_format=torch.contiguous_format)
    copy = accumulator.transpose(1, 2).clone(memory_format=torch.contiguous_format)
    return copy.transpose(1, 2)
