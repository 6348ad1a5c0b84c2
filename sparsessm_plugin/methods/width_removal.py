"""Make the residual stream of a model narrower, with everything that reads and writes it."""

import time
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, field_validator, model_validator
from torch import Tensor, nn
from torch.nn.functional import pad

from sparsessm_plugin import distributed
from sparsessm_plugin.criteria.hidden import HIDDEN_CRITERIA, Reading, loss_of_basis, norm_scale
from sparsessm_plugin.errors import SparseSSMError
from sparsessm_plugin.families import (
    MixerAdapter,
    ModelAdapter,
    TensorAxis,
    get_model_adapter,
    get_tensor,
)
from sparsessm_plugin.families.base import MixerSizes
from sparsessm_plugin.families.parts import Norm
from sparsessm_plugin.methods.channels import reorder
from sparsessm_plugin.methods.channels_along import Along, choose_along, narrow_mixers
from sparsessm_plugin.methods.model_removal import ModelRemoval, ModelRemovalSettings
from sparsessm_plugin.methods.removal import RemovalResult, Removed, Shrunk, usual_multiple
from sparsessm_plugin.methods.run import run
from sparsessm_plugin.methods.runtime_sizes import warn_of_kernels
from sparsessm_plugin.methods.stream import (
    ReadingPoint,
    StreamSums,
    is_tied_head,
    reading_points,
)
from sparsessm_plugin.progress import Stage
from sparsessm_plugin.refit.width import expand, lift, narrow_scale, repeated
from sparsessm_plugin.selection.subspaces import best_entries, best_subspace, leading_subspace
from sparsessm_plugin.training.distillation import Weights

_STEPS = 30  # of the search for a subspace
_RIDGE = 1e-3
_TOKENS = 48  # an entry of the stream, for the gradients
# Of a tied head's norm: entries below this part of the mean would blow up what is read there.
_LEAST_SCALE = 0.1


class WidthSettings(ModelRemovalSettings):
    """The fields of :class:`sparsessm_plugin.WidthRemovalModifier`, which describes them."""

    fitted_by_default: ClassVar[Weights] = "all"  # every part of the model has changed

    multiple_of: int | None = Field(default=None, ge=1)
    saliency: str = "output_energy"
    rotate: bool | None = None
    channels: Literal["kept", "along", "heads", "head_dim"] | None = None
    compensate: list[Literal["readers", "out_proj"]] | None = None

    @field_validator("saliency")
    @classmethod
    def _check_saliency(cls, value: str) -> str:
        return HIDDEN_CRITERIA.check(value)

    @model_validator(mode="after")
    def _check_rotation(self) -> "WidthSettings":
        if self.rotate and not self.by_loss:
            raise ValueError(
                f"rotate has no meaning for saliency {self.saliency!r}, which chooses entries of "
                "the stream as it is"
            )
        if self.rotate is None:
            self.rotate = self.by_loss
        return self

    @property
    def by_loss(self) -> bool:
        """Whether what stays is chosen by what the predictions lose."""
        return HIDDEN_CRITERIA[self.saliency].score is None

    def fits(self, what: str) -> bool:
        """Whether ``readers`` or ``out_proj`` are fitted again."""
        return self.compensate is None or what in self.compensate

    def kept(self, length: int) -> int:
        if self.keep is not None:
            return self.keep
        assert self.sparsity is not None
        multiple = self.multiple_of or usual_multiple(length)
        return round(length * (1 - self.sparsity) / multiple) * multiple


class WidthRemoval(ModelRemoval[WidthSettings]):
    """Keeps the subspace of the stream that the model's predictions need most."""

    changes_inputs: ClassVar[bool] = True

    def __init__(self, settings: WidthSettings, who: str | None = None) -> None:
        super().__init__(settings, who)
        self._chosen: dict[tuple[int, int, MixerSizes], Along] = {}

    # -- which models ----------------------------------------------------------------

    def check_sizes(self, adapter: ModelAdapter) -> None:
        settings, who = self.settings, self.who
        keep = self.check_keep(adapter.name, "entries of the hidden size", adapter.hidden_size)
        if settings.keep is not None and keep % (settings.multiple_of or 1):
            raise SparseSSMError(f"{who}: keep = {keep} is no multiple of {settings.multiple_of}")
        if adapter.base is not adapter.model.base_model:
            raise SparseSSMError(
                f"{who}: {adapter.name} has an encoder beside its language model, which writes "
                "into the stream and cannot become narrower with it"
            )
        if not adapter.pre_norm:
            raise SparseSSMError(
                f"{who}: some layers of {adapter.name} read the stream as it is and have their "
                "norms behind them; its hidden size cannot become smaller"
            )
        try:
            self._along(adapter, keep)
        except SparseSSMError as error:
            raise SparseSSMError(f"{who}: {error}") from error

    def kept_sizes(self, adapter: ModelAdapter) -> dict[str, int]:
        keep = self.settings.kept(adapter.hidden_size)
        return {"hidden": keep, **self._along(adapter, keep).kept}

    def written(self, adapter: ModelAdapter) -> frozenset[str]:
        settings = self.settings
        names: set[str] = set()
        if settings.rotate or settings.fits("readers"):
            names |= {where.tensor for where in adapter.axes("hidden")}
        if len(self.kept_sizes(adapter)) > 1 and settings.fits("out_proj"):
            mixers = [mixer.name for mixer in adapter.mixers]
            names |= {n for n in adapter.first_names().values() if n.startswith(tuple(mixers))}
        return frozenset(names)

    def _along(self, adapter: ModelAdapter, keep: int) -> Along:
        """What every mixer keeps."""
        key = (keep, adapter.hidden_size, adapter.mixers[0].sizes)
        if key not in self._chosen:
            settings = self.settings
            self._chosen[key] = choose_along(adapter, keep, settings.channels, settings.runtime)
        return self._chosen[key]

    def prepare_again(self, model: nn.Module) -> None:
        super().prepare_again(model)
        adapter = get_model_adapter(model)
        if not adapter.mixers:
            return
        mixer, size = adapter.mixers[0], adapter.hidden_size

        def made(keep: int) -> MixerSizes:
            return self._along(adapter, keep).sizes

        keep = self.settings.kept(size)
        warn_of_kernels(self.who, mixer, "entries of the stream", keep, size, made)

    # -- the work --------------------------------------------------------------------

    def remove(self, model: Any, batches: Sequence[Any]) -> list[Removed]:
        started, settings = time.perf_counter(), self.settings
        adapter = get_model_adapter(model)
        size = adapter.hidden_size
        keep = settings.kept(size)
        sums = StreamSums(adapter, reading_points(adapter, self.device))
        if self.carried is None:
            with self.cost.stage("covariances"):
                sums.add_covariances(batches)
            if settings.by_loss:
                with self.cost.stage("gradients"):
                    sums.add_metrics(batches, _TOKENS * size)
            self.carried = sums.covariances, sums.metrics
        else:
            sums.covariances, sums.metrics = self.carried
        with self.cost.stage("choice"):
            choose = partial(self._choose, adapter, sums, keep)
            found = distributed.share("what the stream keeps", choose, device=self.device)
        basis, entries, errors = found[0], found[1].tolist(), found[2].tolist()
        mixers: dict[str, Shrunk] = {}
        along = self._along(adapter, keep)
        if along.axis is not None:
            with self.cost.stage("channels"):
                fit = settings.fits("out_proj")
                mixers = narrow_mixers(adapter, batches, basis, along, fit)
        self.changes_weights()
        for mixer in adapter.mixers if mixers else ():
            order = mixers[mixer.name].order
            if order is not None:
                reorder(mixer, order)
        with self.cost.stage("fit"):
            self._write(adapter, sums, basis)
        gone = {name: small.removed for name, small in mixers.items()}
        self.prune("hidden", range(keep, size), gone or None, along.axis)
        for mixer in adapter.mixers if gone else ():
            _take_over(mixer, mixers[mixer.name].mixer)
        return [
            Removed(
                name=adapter.name,
                axis="hidden",
                before=size,
                after=keep,
                removed=sorted(set(range(size)) - set(entries)),
                tokens=self.tokens,
                error_removed=errors[0] if errors else None,
                error_left=errors[1] if errors else None,
                diverged=None,
                seconds=round(time.perf_counter() - started, 3),
            )
        ]

    def _choose(self, adapter: ModelAdapter, sums: StreamSums, keep: int) -> list[Tensor]:
        """V (M, K) float64, the entries that stay where there is a choice of them, and errors.

        Errors are what the predictions lose, to second order, relative to a stream that is lost
        altogether: with readers as they are, and fitted.
        """
        size, score = adapter.hidden_size, HIDDEN_CRITERIA[self.settings.saliency].score
        if score is not None:
            order = score(adapter).argsort(descending=True, stable=True)
            return [*self._entries(size, order[:keep]), torch.zeros(0)]
        readings = sums.readings(lambda point: not _reads_tied(adapter, point))
        # A tied head reads V diag(w) V^T of the stream, where w is all that is its own. So the
        # weight of its norm is taken into V, half of it each time, and w is one number.
        half = _tied_scale(adapter).sqrt() if self.settings.rotate else torch.ones(())
        half = half.to(self.device, torch.float64).expand(size)
        readings = [
            Reading(half[:, None] * r.covariance * half, r.metric / half[:, None] / half, r.fitted)
            for r in readings
        ]
        if self.settings.rotate:
            operators = [r.covariance @ r.metric @ r.covariance / r.size for r in readings]
            with Stage("subspace of the stream", None) as stage:

                def loss(basis: Tensor) -> Tensor:
                    stage.advance()
                    return loss_of_basis(basis, readings)

                basis = best_subspace(loss, leading_subspace(operators, keep), _STEPS)
            entries = torch.arange(keep)
        else:
            basis, entries = self._entries(size, _best_entries(readings, keep))
        energy = torch.stack([r.energy for r in readings]).sum()
        unfitted = [replace(r, fitted=False) for r in readings]
        errors = [loss_of_basis(basis, rs) / energy for rs in (unfitted, readings)]
        return [half[:, None] * basis, entries, torch.stack(errors)]

    def _entries(self, size: int, kept: Tensor) -> tuple[Tensor, Tensor]:
        """V (M, K) that keeps entries as they are, and these, ascending."""
        kept = kept.cpu().sort().values
        unit = torch.eye(size, dtype=torch.float64, device=self.device)
        return unit[:, kept.to(self.device)], kept

    def _write(self, adapter: ModelAdapter, sums: StreamSums, basis: Tensor) -> None:
        """Turn what stays of the stream into its first entries, in all that reads or writes it."""
        size, keep = basis.shape
        done: set[tuple[str, int]] = set()
        names = adapter.first_names()
        scales: list[tuple[Any, Tensor]] = []

        def multiply(ranges: Iterable[TensorAxis], matrix: Tensor) -> None:
            for where in ranges:
                tensor = get_tensor(adapter.model, where.tensor)
                key = (names[where.tensor], where.dim)
                if tensor is not None and key not in done:
                    done.add(key)
                    _multiply(tensor, where.dim, matrix)

        for part in adapter.parts:  # first: a tied head reads what the embedding writes
            multiply(part.writes(), pad(basis, (0, size - keep)))
        for point, covariance in zip(sums.points, sums.covariances, strict=True):
            times = point.width // size
            across = repeated(basis, times)
            if self.settings.fits("readers"):
                reads = lift(covariance, across, _RIDGE)
            else:
                reads = expand(across)
            # each copy of the stream keeps its first entries
            reads = (point.scale[:, None] * reads).view(point.width, times, keep)
            reads = pad(reads, (0, size - keep)).flatten(1)
            for part in point.readers:
                multiply(part.reads(), reads)
            if point.is_norm:
                weight = torch.ones(point.width).to(reads)
                if _reads_tied(adapter, point):
                    weight = self._tied_weight(point, basis)
                weight = weight * narrow_scale(covariance, across)
                scales.append((point.part.module, weight))
        for norm, weight in scales:  # at last: they are asked for what they were until then
            offset = norm_scale(norm) - norm.weight.double()
            norm.weight.copy_((weight - offset).to(norm.weight.dtype))

    def _tied_weight(self, point: ReadingPoint, basis: Tensor) -> Tensor:
        """(M,) of the norm before a tied head, for a narrow stream of root mean square 1."""
        size, keep = basis.shape
        if self.settings.rotate:
            return point.scale.mean().expand(size)
        return pad(point.scale @ basis, (0, size - keep), value=1.0)


def _best_entries(readings: Sequence[Reading], keep: int) -> Tensor:
    fitted = [(r.covariance, r.metric) for r in readings if r.fitted]
    pairs = torch.zeros_like(readings[0].metric)
    for reading in readings:
        if not reading.fitted:
            pairs += reading.covariance * reading.metric
    return best_entries(fitted, pairs, keep)


def _take_over(mixer: MixerAdapter, small: MixerAdapter) -> None:
    """Give a mixer the fitted weights of a copy of the same sizes; in_proj is written already."""
    fitted = dict(small.mixer.named_parameters())
    for name, parameter in mixer.mixer.named_parameters():
        if not name.startswith("in_proj."):
            parameter.copy_(fitted[name].to(parameter.dtype))


def _reads_tied(adapter: ModelAdapter, point: ReadingPoint) -> bool:
    return any(is_tied_head(adapter, part) for part in point.readers)


def _tied_scale(adapter: ModelAdapter) -> Tensor:
    """(M,) weight of the norm before a tied head over its mean; ones where none is tied."""
    parts = adapter.parts
    norm = [part for part in parts if isinstance(part, Norm)][-1]
    scale = norm_scale(norm.module)
    if not is_tied_head(adapter, parts[-1]):
        return torch.ones_like(scale)
    return (scale / scale.mean()).clamp(min=_LEAST_SCALE)


def _multiply(tensor: Tensor, dim: int, matrix: Tensor) -> None:
    """Multiply a tensor along a dimension, in place: what was entry i goes with row i."""
    moved = tensor.detach().movedim(dim, -1)
    for part in (moved,) if moved.ndim < 3 else moved:  # experts one by one
        part.copy_((part.double() @ matrix).to(part.dtype))


def remove_width(model: Any, batches: Iterable[Any], **settings: Any) -> RemovalResult:
    """Make the residual stream of a model narrower, in place.

    :param model: transformers model with lm_head; its config follows
    :param batches: what the model's forward takes
    :param settings: fields of :class:`sparsessm_plugin.WidthRemovalModifier`, such as ``keep``
    :return: one entry, and the config fields of the new size
    :raises SparseSSMError: a field that is not allowed, what does not fit the model or the data
    """
    method = WidthRemoval(WidthSettings.of("remove_width", settings), "remove_width")
    run(method, model, batches)
    return method.result()
