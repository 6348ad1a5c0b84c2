"""Remove whole channels (Mamba-1), heads or channels of every head (Mamba-2, value heads)."""

from collections.abc import Iterable
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from loguru import logger
from pydantic import Field, field_validator
from torch import Tensor, nn

from sparsessm_plugin import distributed
from sparsessm_plugin.calibration.inputs import CalibrationInputs
from sparsessm_plugin.criteria.channels import CHANNEL_CRITERIA
from sparsessm_plugin.errors import SparseSSMError
from sparsessm_plugin.families import MixerAdapter, get_tensor
from sparsessm_plugin.families.base import MixerSizes
from sparsessm_plugin.methods.outputs import dense_outputs, fit_out_proj, relative_error
from sparsessm_plugin.methods.removal import (
    MixerRemoval,
    RemovalResult,
    RemovalSettings,
    Shrunk,
    nearest,
    remove,
)
from sparsessm_plugin.methods.run import run
from sparsessm_plugin.methods.runtime_sizes import warn_of_kernels
from sparsessm_plugin.recurrence import scan
from sparsessm_plugin.refit.channels import LinearTerm, eliminate_blocks, refit

Axis = Literal["channels", "heads", "head_dim", "value_heads", "value_dims"]

# what kernels like: whole tiles of channels; a head's channels in vectors of 8
_MULTIPLES = {"channels": 64, "heads": 1, "head_dim": 8, "value_heads": 1, "value_dims": 8}
_WHOLE_HEADS = ("heads", "value_heads")  # as many in every group
_X_PROJ_RIDGE = 1e-2


class ChannelSettings(RemovalSettings):
    """The fields of :class:`sparsessm_plugin.ChannelRemovalModifier`, which describes them."""

    keep: int | None = Field(default=None, ge=1)
    axis: Axis | None = None
    multiple_of: int | None = Field(default=None, ge=1)
    saliency: str = "output_energy"
    compensate: list[Literal["x_proj", "out_proj"]] | None = None

    @field_validator("saliency")
    @classmethod
    def _check_saliency(cls, value: str) -> str:
        return CHANNEL_CRITERIA.check(value)

    @property
    def watches_data(self) -> bool:
        """Whether channels are chosen or weights fitted by what enters the mixers."""
        data_free = not CHANNEL_CRITERIA[self.saliency].needs_data and self.compensate == []
        return not data_free or self.distills

    def axis_of(self, adapter: MixerAdapter) -> str:
        """The axis to shrink in a mixer."""
        if self.axis is not None:
            return self.axis
        return adapter.channel_axis

    def kept(self, adapter: MixerAdapter) -> int:
        """How many indices of the axis stay."""
        if self.keep is not None:
            return self.keep
        assert self.sparsity is not None
        axis, multiple = self.axis_of(adapter), self.multiple_for(adapter)
        return round(adapter.axis_length(axis) * (1 - self.sparsity) / multiple) * multiple

    def multiple_for(self, adapter: MixerAdapter) -> int:
        """What the kept size of a mixer is a multiple of."""
        axis = self.axis_of(adapter)
        if axis in _WHOLE_HEADS and self.multiple_of is None:
            return adapter.sizes.n_groups
        return self.multiple_of or _MULTIPLES[axis]

    def compensations(self, adapter: MixerAdapter) -> tuple[str, ...]:
        """What is fitted again in a mixer."""
        if self.compensate is not None:
            return tuple(self.compensate)
        return ("x_proj", "out_proj") if "x_proj" in adapter.projections else ("out_proj",)


class ChannelRemoval(MixerRemoval[ChannelSettings]):
    """Removes the channels that out_proj and x_proj can do without best, from every mixer alike."""

    changes_inputs: ClassVar[bool] = True

    def axis_to_shrink(self, adapter: MixerAdapter) -> str:
        return self.settings.axis_of(adapter)

    def size_wanted(self, adapter: MixerAdapter) -> int:
        return self.settings.kept(adapter)

    def multiple_of(self, adapter: MixerAdapter) -> int:
        return self.settings.multiple_for(adapter)

    def check_mixer(self, adapter: MixerAdapter) -> None:
        who, axis = self.who, self.settings.axis_of(adapter)
        try:
            length = adapter.axis_length(axis)
        except SparseSSMError as error:
            raise SparseSSMError(f"{who}: {error}") from error
        keep, multiple = self.settings.kept(adapter), self.settings.multiple_of
        if self.settings.keep is not None and multiple is not None and keep % multiple:
            raise SparseSSMError(f"{who}: keep = {keep} is no multiple of {multiple}")
        if not 1 <= keep < length:
            raise SparseSSMError(
                f"{who}: keeping {keep} of the {length} {axis} of {adapter.name} removes none or "
                "all; give another sparsity, keep or multiple_of"
            )
        if axis in _WHOLE_HEADS and keep % adapter.groups_of(axis):
            shared = "keys" if adapter.recurrence == "delta_rule" else "B and C"
            raise SparseSSMError(
                f"{who}: {adapter.name} shares {shared} in {adapter.sizes.n_groups} groups of "
                f"heads, which must stay equal; {keep} heads do not divide; "
                f"{nearest(partial(self._fits, adapter), keep, length)}"
            )
        try:
            adapter.size_fields(axis, keep)
        except SparseSSMError as error:
            advice = nearest(partial(self._fits, adapter), keep, length)
            raise SparseSSMError(
                f"{who}: {error}; {advice}, or take the hidden size along with WidthRemovalModifier"
            ) from error
        if "x_proj" in (self.settings.compensate or ()) and "x_proj" not in adapter.projections:
            raise SparseSSMError(f"{who}: {adapter.name} ({adapter.family}) has no x_proj")

    def _fits(self, adapter: MixerAdapter, keep: int) -> bool:
        """Whether a mixer can be made this size."""
        axis = self.settings.axis_of(adapter)
        try:
            adapter.size_fields(axis, keep)
        except SparseSSMError:
            return False
        groups = adapter.sizes.n_groups if axis in _WHOLE_HEADS else 1
        return keep % groups == 0 and keep % (self.settings.multiple_of or 1) == 0

    def prepare(self, model: nn.Module) -> None:
        super().prepare(model)
        settings, adapter = self.settings, next(iter(self._pending.values()))
        axis, keep, sparsity = settings.axis_of(adapter), settings.kept(adapter), settings.sparsity
        length = adapter.axis_length(axis)
        if sparsity is not None and keep != round(length * (1 - sparsity)):
            logger.warning(
                f"{self.who}: a sparsity of {sparsity:g} is rounded: {keep} of "
                f"{length} {axis} stay in every mixer, which is "
                f"{1 - keep / length:.1%} removed; give keep, or another multiple_of"
            )

        def made(size: int) -> MixerSizes:
            if not self._fits(adapter, size):
                raise SparseSSMError(f"{adapter.name} cannot have {size} {axis}")
            return adapter.sizes.keeping(axis, size)

        warn_of_kernels(self.who, adapter, axis, keep, length, made)

    # -- one mixer -------------------------------------------------------------------

    def shrink(self, adapter: MixerAdapter, inputs: CalibrationInputs) -> Shrunk:
        axis = self.settings.axis_of(adapter)
        steps = self.settings.compensations(adapter)
        keep, length = self.settings.kept(adapter), adapter.axis_length(axis)
        blocks = channel_blocks(adapter, axis)
        terms: dict[str, LinearTerm] = {}
        if self.settings.watches_data:
            terms = gather(adapter, inputs)
        groups = adapter.groups_of(axis)
        criterion = CHANNEL_CRITERIA[self.settings.saliency]
        # no tensor has an entry that all heads share, so each head can lose channels of its own
        by_head = axis == "head_dim" and criterion.score is None
        if criterion.score is None:
            units, parts, count = blocks, groups, length - keep
            if by_head:
                parts = adapter.sizes.num_heads
                units, count = blocks.T.reshape(-1, 1), parts * count

            def choose() -> list[Tensor]:
                return [torch.tensor(eliminate_blocks(list(terms.values()), units, count, parts))]

            removed = distributed.share(f"{axis} of {adapter.name}", choose)[0].tolist()
        else:
            score = criterion.score(adapter, axis)
            lowest = score.view(groups, -1).argsort(dim=1, stable=True)
            lowest = lowest[:, : (length - keep) // groups]
            offsets = torch.arange(groups, device=lowest.device)[:, None] * (len(score) // groups)
            removed = sorted((lowest + offsets).flatten().tolist())
        targets = dense_outputs(adapter, inputs) if terms else []
        order = None
        if by_head:
            order = kept_first(removed, parts, adapter.sizes.intermediate_size)
            removed = list(range(keep, length))
            reorder(adapter, order)
        small = remove(adapter, axis, removed)
        if not terms:
            return Shrunk(axis, removed, small)
        error_removed = relative_error(small, inputs, targets)
        if "x_proj" in steps:
            kept = _complement(blocks, removed)
            gram, weight = terms["x_proj"].gram, adapter.projection("x_proj").weight
            fitted = small.projection("x_proj").weight
            fitted.copy_(_refit_by_head(gram, weight, kept).view_as(fitted))
        if "out_proj" in steps:
            fit_out_proj(small, inputs, targets)
        error_left = relative_error(small, inputs, targets)
        return Shrunk(axis, removed, small, error_removed, error_left, order=order)


def kept_first(removed: list[int], heads: int, channels: int) -> list[int]:
    """An order of channels in which the removed ones are the last of their heads.

    :param removed: of all channels, head after head, as many of every head
    :param heads: how many there are
    :param channels: of all heads
    :return: for each place the channel that comes to stand there
    """
    size, gone = channels // heads, set(removed)
    order: list[int] = []
    for start in range(0, channels, size):
        order += sorted(range(start, start + size), key=lambda channel: channel in gone)
    return order


@torch.no_grad()
def reorder(adapter: MixerAdapter, order: list[int]) -> None:
    """Let channels of the Mamba-2 layout change places within their heads, which changes nothing.

    :param order: for each of the D places the channel that comes to stand there
    """
    for where in adapter.axes("heads"):
        tensor = get_tensor(adapter.mixer, where.tensor)
        if where.block == adapter.sizes.head_dim and tensor is not None:
            own = tensor.movedim(where.dim, 0)[where.start : where.start + len(order)]
            own.copy_(own[torch.tensor(order, device=own.device)])


def channel_blocks(adapter: MixerAdapter, axis: str) -> Tensor:
    """(indices of the axis, channels of each) positions in the mixer's D channels."""
    weight = f"{adapter.exit_kind}.weight"
    reads = next(a for a in adapter.axes(axis) if a.tensor == weight)
    indices = range(adapter.axis_length(axis))
    return torch.tensor([reads.positions([i]) for i in indices], device=adapter.A_log.device)


def _complement(blocks: Tensor, removed: list[int]) -> Tensor:
    gone = torch.zeros(blocks.numel(), dtype=torch.bool, device=blocks.device)
    gone[blocks[removed].flatten()] = True
    return (~gone).nonzero().flatten()


def _refit_by_head(gram: Tensor, weight: Tensor, kept: Tensor) -> Tensor:
    """:func:`refit` of x_proj; where it has a matrix for each head, of each on its channels.

    :param gram: (D, D)
    :param weight: (out, D), or (heads, out, D / heads)
    :param kept: (K,) channels, as many in each head
    :return: (out, K), or (heads, out, K / heads)
    """
    if weight.ndim == 2:
        return refit(gram, weight, kept, _X_PROJ_RIDGE)
    size = weight.shape[-1]
    parts = []
    for h, (own, left) in enumerate(zip(weight, kept.view(len(weight), -1), strict=True)):
        channels = slice(h * size, (h + 1) * size)
        parts.append(refit(gram[channels, channels], own, left - h * size, _X_PROJ_RIDGE))
    return torch.stack(parts)


def gather(adapter: MixerAdapter, inputs: CalibrationInputs) -> dict[str, LinearTerm]:
    """Gram matrices of what out_proj and x_proj read, with weights scaled to count alike.

    The error of out_proj counts relative to the energy of its output, that of x_proj relative to
    the energy of dt, B and C apart.
    """
    device, D = adapter.A_log.device, adapter.sizes.intermediate_size
    grams: dict[str, Tensor] = {
        name: torch.zeros(D, D, dtype=torch.float64, device=device)
        for name in (adapter.exit_kind, "x_proj")
        if name in adapter.projections
    }
    for _, q in inputs.iterate(adapter):
        for name, gram in grams.items():
            x = q.u if name == "x_proj" else adapter.out_input(q, scan(q))
            x = x if q.mask is None else x * q.mask[..., None]
            x = x.flatten(0, 1)
            gram += (x.T @ x).double()
    grams = distributed.reduce_sum(f"sums of {adapter.name}", grams)
    terms: dict[str, LinearTerm] = {}
    for name, gram in grams.items():
        if not bool(torch.isfinite(gram).all()):
            raise SparseSSMError(
                f"{adapter.name}: NaN or infinite values during calibration; nothing was "
                "removed from this layer"
            )
        weight = adapter.projection(name).weight.double()
        if weight.ndim == 3:  # each head reads its own channels
            weight = torch.block_diag(*weight)
        energy = ((weight @ gram) * weight).sum(1)  # (out,) of every row's output
        if name == "x_proj":
            R, N = adapter.sizes.time_step_rank, adapter.sizes.state_size
            parts = [R, N, N] * (len(energy) // (R + 2 * N))
            energy = torch.cat([e.sum().expand(len(e)) for e in energy.split(parts)])
        else:
            energy = energy.sum().expand(len(energy))
        terms[name] = LinearTerm(gram, weight / energy.clamp(min=1e-30).sqrt()[:, None])
    return terms


def remove_channels(
    model: Any, batches: Iterable[Any] | None = None, **settings: Any
) -> RemovalResult:
    """Remove channels, heads or channels of every head from all mixers of a model, in place.

    :param model: transformers model; its config follows
    :param batches: what the model's forward takes; None for settings that need no data
    :param settings: fields of :class:`sparsessm_plugin.ChannelRemovalModifier`, such as ``keep``
    :return: one :class:`Removed` a mixer, and the config fields of the new size
    :raises SparseSSMError: a field that is not allowed, what does not fit the model or the data
    """
    method = ChannelRemoval(ChannelSettings.of("remove_channels", settings), "remove_channels")
    run(method, model, batches)
    return method.result()
