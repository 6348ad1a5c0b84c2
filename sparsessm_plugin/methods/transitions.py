"""Prune A_log, the state transition of a selective state-space mixer."""

import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from compressed_tensors.offload import update_offload_parameter
from loguru import logger
from pydantic import Field, field_validator, model_validator
from torch import Tensor

from sparsessm_plugin import distributed
from sparsessm_plugin.criteria import (
    SALIENCIES,
    Decay,
    DecayKind,
    SaliencyInputs,
    aggregate,
)
from sparsessm_plugin.criteria.values import PRUNED_VALUES
from sparsessm_plugin.errors import SparseSSMError
from sparsessm_plugin.families import MixerAdapter, read_out
from sparsessm_plugin.families.fast_forward import offer
from sparsessm_plugin.methods.base import MethodResult, MixerMethod, TargetSettings, Total
from sparsessm_plugin.methods.propagation import KeptQuantities
from sparsessm_plugin.methods.run import run
from sparsessm_plugin.recurrence import PrunedValue, ScanStatistics
from sparsessm_plugin.selection.masks import check_quoted, check_sparsity
from sparsessm_plugin.selection.patterns import Pattern, SemiStructured, Unstructured

_QUANTILES = (0.0, 0.25, 0.5, 0.75, 1.0)


class TransitionSettings(TargetSettings):
    """The fields of :class:`sparsessm_plugin.SparseSSMModifier`, which describes them."""

    sparsity: float | None = None
    mask_structure: str | None = None
    saliency: str = "output_error"
    aggregation: Literal["frequency", "time_weighted", "mean", "l2"] | None = None
    decay: DecayKind = "power"
    decay_power: float = Field(default=1.0, ge=0.0, allow_inf_nan=False)
    decay_gamma: float = Field(default=0.9, gt=0.0, le=1.0)
    decay_window: float = Field(default=0.25, gt=0.0, le=1.0)
    pruned_value: PrunedValue = "zero"

    @property
    def watches_data(self) -> bool:
        """Whether the criterion needs statistics of the scan."""
        return SALIENCIES[self.saliency].needs_data

    @field_validator("sparsity")
    @classmethod
    def _check_sparsity(cls, value: float | None) -> float | None:
        return check_sparsity(value)

    @field_validator("saliency")
    @classmethod
    def _check_saliency(cls, value: str) -> str:
        return SALIENCIES.check(value)

    @field_validator("mask_structure", mode="before")
    @classmethod
    def _check_mask_structure(cls, value: Any) -> Any:
        check_quoted(value)
        if isinstance(value, str):
            SemiStructured.parse(value)
        return value

    @model_validator(mode="after")
    def _check_together(self) -> "TransitionSettings":
        if (self.sparsity is None) == (self.mask_structure is None):
            given = "neither" if self.sparsity is None else "both"
            raise ValueError(f"give either sparsity or mask_structure, got {given}")
        allowed = SALIENCIES[self.saliency].aggregations
        if self.aggregation is None:
            self.aggregation = allowed[0] if allowed else None  # type: ignore[assignment]
        elif self.aggregation not in allowed:
            raise ValueError(
                f"aggregation {self.aggregation!r} has no meaning for saliency "
                f"{self.saliency!r}, which has no time axis; leave it out"
            )
        return self

    @property
    def pattern(self) -> Pattern:
        """What is pruned in a layer, given its scores."""
        if self.mask_structure is not None:
            return SemiStructured.parse(self.mask_structure)
        assert self.sparsity is not None
        return Unstructured(self.sparsity)


@dataclass(frozen=True)
class PrunedTransition:
    """What became of the A_log of one mixer.

    :param name: of the mixer
    :param shape: [D, N]
    :param entries: D N
    :param pruned: entries that have the pruned value now
    :param sparsity: their share
    :param zero_before: entries that were zero before
    :param zero_before_and_pruned: of these, how many were chosen
    :param saliency_quantiles: of the score that was ranked; for ``frequency`` minus the votes
    :param highest_pruned: score of an entry that went
    :param lowest_kept: score of an entry that stayed
    :param tokens: that the mixer has seen
    :param seconds: of observing and choosing
    """

    name: str
    shape: list[int]
    entries: int
    pruned: int
    sparsity: float
    zero_before: int
    zero_before_and_pruned: int
    saliency_quantiles: dict[str, float]
    highest_pruned: float
    lowest_kept: float
    tokens: int
    seconds: float


class TransitionPruning(MixerMethod[TransitionSettings]):
    """Prunes the entries of A_log that matter least for the mixer's output."""

    gathers_sums: ClassVar[bool] = True

    def __init__(self, settings: TransitionSettings, who: str | None = None) -> None:
        super().__init__(settings, who)
        self._statistics: dict[str, ScanStatistics] = {}
        self._seconds: dict[str, float] = {}
        self._kept = KeptQuantities()
        self._layers: list[PrunedTransition] = []

    def check_mixer(self, adapter: MixerAdapter) -> None:
        if not adapter.has_state_transitions:
            raise SparseSSMError(
                f"{self.who}: A_log of {adapter.name} ({adapter.family}) has one entry "
                "a head and none a state, so pruning one would take the memory of a whole head; "
                "to prune such a model, remove states with StateRemovalModifier"
            )
        try:
            self.settings.pattern.check(*adapter.A_log.shape)
        except SparseSSMError as error:
            raise SparseSSMError(f"{self.who}: {error} in {adapter.name}") from error

    # -- calibration -----------------------------------------------------------------

    def observe(
        self, adapter: MixerAdapter, hidden_states: Tensor, attention_mask: Tensor | None
    ) -> None:
        started = time.perf_counter()
        quantities = adapter.quantities(hidden_states, attention_mask)
        if adapter.name not in self._statistics:
            request = SALIENCIES[self.settings.saliency].request(
                self.settings.aggregation, self.settings.pruned_value
            )
            channels, state_size = adapter.A_log.shape
            self._statistics[adapter.name] = ScanStatistics(
                request, channels, state_size, device=quantities.u.device
            )
            self._seconds[adapter.name] = 0.0
        x = read_out(adapter, quantities, self._statistics[adapter.name])
        offer(adapter.mixer, hidden_states, attention_mask, x)
        self._kept.add(adapter, hidden_states, quantities)
        self._seconds[adapter.name] += time.perf_counter() - started

    def compress(self, adapter: MixerAdapter) -> None:
        started = time.perf_counter()
        statistics = self._statistics.pop(adapter.name, None)
        if statistics is not None:
            where = f"statistics of {adapter.name}"
            distributed.reduce_fields(where, statistics, to=0)
            seen = distributed.gather(where, [statistics.tokens, statistics.steps])
            statistics.tokens = sum(tokens for tokens, _ in seen)
            statistics.steps = max(steps for _, steps in seen)
        if self.settings.watches_data:
            if statistics is None or statistics.tokens == 0:
                raise SparseSSMError(f"{adapter.name} saw no calibration tokens; it is not pruned")
            if statistics.steps < 2:
                raise SparseSSMError(
                    "calibration sequences hold 1 token; at least 2 are needed for a state to "
                    "carry anything from one step to the next"
                )
        A_log = adapter.A_log.detach()
        was_zero = A_log == 0  # before this or another rank overwrites A_log in place
        pruned, score = distributed.share(
            f"entries of {adapter.name}",
            lambda: self._select(adapter, statistics),
            device=A_log.device,
        )
        value = torch.tensor(PRUNED_VALUES[self.settings.pruned_value], dtype=A_log.dtype)
        kept = torch.where(pruned, value.to(A_log.device), A_log)
        update_offload_parameter(adapter.mixer, "A_log", kept.view_as(adapter.mixer.A_log))
        self._kept.hand_over(adapter, self.passes_again)
        seconds = self._seconds.pop(adapter.name, 0.0) + time.perf_counter() - started
        self._record(adapter, was_zero, pruned, score, statistics, seconds)

    def _select(
        self, adapter: MixerAdapter, statistics: ScanStatistics | None
    ) -> tuple[Tensor, Tensor]:
        """Which entries are pruned, and the score that was ranked, (D, N) each."""
        if statistics is not None and not statistics.is_finite():
            raise SparseSSMError(
                f"{adapter.name}: NaN or infinite values in its recurrence during "
                f"calibration; {self.finite.explained()}"
            )
        settings, A_log = self.settings, adapter.A_log.detach()
        inputs = SaliencyInputs(
            A_log=A_log.float(),
            out_norm=adapter.out_norm,
            state_energy=statistics.state_energy if statistics is not None else None,
            transition=statistics.transition if statistics is not None else None,
            output_error=statistics.output_error if statistics is not None else None,
        )
        ranking = aggregate(
            SALIENCIES[settings.saliency],
            settings.aggregation,
            inputs,
            steps=statistics.steps if statistics is not None else 0,
            pattern=settings.pattern,
            decay=Decay(
                settings.decay,
                settings.decay_power,
                settings.decay_gamma,
                settings.decay_window,
            ),
        )
        return ranking.select(settings.pattern), ranking.score

    # -- report ----------------------------------------------------------------------

    def _record(
        self,
        adapter: MixerAdapter,
        was_zero: Tensor,
        pruned: Tensor,
        score: Tensor,
        statistics: ScanStatistics | None,
        seconds: float,
    ) -> None:
        count = int(pruned.sum())
        quantiles = torch.quantile(
            score.double().flatten(), torch.tensor(_QUANTILES, dtype=torch.float64).to(score.device)
        )
        self._layers.append(
            PrunedTransition(
                name=adapter.name,
                shape=list(pruned.shape),
                entries=pruned.numel(),
                pruned=count,
                sparsity=count / pruned.numel(),
                zero_before=int(was_zero.sum()),
                zero_before_and_pruned=int((was_zero & pruned).sum()),
                saliency_quantiles={
                    str(q): float(v) for q, v in zip(_QUANTILES, quantiles, strict=True)
                },
                highest_pruned=float(score[pruned].max()),
                lowest_kept=float(score[~pruned].min()),
                tokens=statistics.tokens if statistics is not None else 0,
                seconds=round(seconds, 3),
            )
        )
        logger.info(f"{adapter.name}: pruned {count} of {pruned.numel()} entries of A_log")

    def result(self) -> MethodResult:
        return MethodResult(tuple(self._layers), Total.of(self._layers), self.cost.to_dict())

    def release(self) -> None:
        super().release()
        self._statistics.clear()
        self._kept = KeptQuantities()


def prune_transitions(
    model: Any, batches: Iterable[Any] | None = None, **settings: Any
) -> MethodResult:
    """Prune A_log of all mixers of a model, in place.

    :param model: transformers model
    :param batches: what the model's forward takes; None for ``saliency="magnitude"``
    :param settings: fields of :class:`sparsessm_plugin.SparseSSMModifier`, such as ``sparsity``
    :return: one :class:`PrunedTransition` a mixer
    :raises SparseSSMError: a field that is not allowed, what does not fit the model or the data
    """
    who = "prune_transitions"
    return run(TransitionPruning(TransitionSettings.of(who, settings), who), model, batches)
