"""Prune A_log, the state transition of a selective state-space mixer."""

import time
from typing import Any, ClassVar, Literal

import torch
from compressed_tensors.offload import update_offload_parameter
from llmcompressor.core import State
from llmcompressor.modifiers import Modifier
from loguru import logger
from pydantic import Field, PrivateAttr, field_validator, model_validator
from torch import Tensor

from sparsessm_plugin import distributed
from sparsessm_plugin.criteria import (
    SALIENCIES,
    Decay,
    DecayKind,
    Pattern,
    SaliencyInputs,
    SemiStructured,
    Unstructured,
    aggregate,
)
from sparsessm_plugin.criteria.values import PRUNED_VALUES
from sparsessm_plugin.errors import SparseSSMError
from sparsessm_plugin.families import MixerAdapter, read_out
from sparsessm_plugin.families.fast_forward import offer
from sparsessm_plugin.modifiers.calibration import MixerModifier, check_quoted
from sparsessm_plugin.recurrence import PrunedValue, ScanStatistics

_QUANTILES = (0.0, 0.25, 0.5, 0.75, 1.0)


class SparseSSMModifier(MixerModifier):
    """Prunes the entries of A_log that matter least for the mixer's output.

    For mixers with an entry of A_log for every channel and state: Mamba, FalconMamba, Jamba,
    Zamba.
    A = -exp(A_log) is shared by all time steps, so an entry is judged by what it does over
    a whole sequence. One-shot, without training; layers are pruned one after the other, each
    with what the pruned layers before it produce (sequential pipeline), or all at once
    (basic pipeline).

    Sample yaml::

        prune_stage:
          prune_modifiers:
            SparseSSMModifier:
              sparsity: 0.5
              saliency: output_error
              pruned_value: zero

    Lifecycle: see :class:`MixerModifier`.

    :param sparsity: share of each layer's entries to prune, in (0, 1); exactly
        ``round(sparsity * D * N)`` entries
    :param mask_structure: ``"N:M"`` instead of ``sparsity``: N pruned entries in every M
        consecutive states of a channel
    :param saliency: ``output_error`` (default): squared change of the gated scan output when
        the entry alone is pruned; ``hessian``: SparseSSM's paper; ``transition``: its authors'
        published code; ``magnitude``: abs(A_log), needs no data
    :param aggregation: over time: ``frequency`` | ``time_weighted`` | ``mean`` | ``l2``; by
        default frequency for hessian, time_weighted for transition, mean for output_error
    :param decay: weights of ``time_weighted``: ``power`` (t+1)^-p | ``discount`` gamma^t |
        ``linear`` L-t | ``window`` the first share of the steps
    :param decay_power: p of ``power``
    :param decay_gamma: gamma of ``discount``, in (0, 1]
    :param decay_window: share of the steps of ``window``, in (0, 1]
    :param pruned_value: ``zero`` stores A_log = 0, so that every runtime computes A = -1;
        ``memoryless`` stores 38, so that the entry's state keeps nothing from step to step
    :param targets: mixers to prune, by name, class name or ``re:`` pattern; default all
    :param ignore: mixers to leave alone, likewise
    :param report_path: ``.json`` file to write the report to
    """

    gathers_sums: ClassVar[bool] = True

    requires_calibration_data: bool = True

    sparsity: float | None = None
    mask_structure: str | None = None
    saliency: Literal["magnitude", "hessian", "transition", "output_error"] = "output_error"
    aggregation: Literal["frequency", "time_weighted", "mean", "l2"] | None = None
    decay: DecayKind = "power"
    decay_power: float = Field(default=1.0, ge=0.0, allow_inf_nan=False)
    decay_gamma: float = Field(default=0.9, gt=0.0, le=1.0)
    decay_window: float = Field(default=0.25, gt=0.0, le=1.0)
    pruned_value: PrunedValue = "zero"

    _statistics: dict[str, ScanStatistics] = PrivateAttr(default_factory=dict)
    _seconds: dict[str, float] = PrivateAttr(default_factory=dict)
    _layers: list[dict[str, Any]] = PrivateAttr(default_factory=list)

    # -- settings --------------------------------------------------------------------

    @field_validator("sparsity")
    @classmethod
    def _check_sparsity(cls, value: float | None) -> float | None:
        if value is not None and not 0.0 < value < 1.0:
            raise ValueError(f"must be between 0 and 1, both excluded, got {value}")
        return value

    @field_validator("mask_structure", mode="before")
    @classmethod
    def _check_mask_structure(cls, value: Any) -> Any:
        check_quoted(value)
        if isinstance(value, str):
            SemiStructured.parse(value)
        return value

    @model_validator(mode="after")
    def _check_together(self) -> "SparseSSMModifier":
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
        self.requires_calibration_data = SALIENCIES[self.saliency].statistics.needs_scan
        return self

    @property
    def pattern(self) -> Pattern:
        """What is pruned in a layer, given its scores."""
        if self.mask_structure is not None:
            return SemiStructured.parse(self.mask_structure)
        assert self.sparsity is not None
        return Unstructured(self.sparsity)

    def check_mixer(self, adapter: MixerAdapter) -> None:
        if not adapter.has_state_transitions:
            raise SparseSSMError(
                f"{type(self).__name__}: A_log of {adapter.name} ({adapter.family}) has one entry "
                "a head and none a state, so pruning one would take the memory of a whole head; "
                "to prune such a model, remove states with StateRemovalModifier"
            )
        try:
            self.pattern.check(*adapter.A_log.shape)
        except SparseSSMError as error:
            raise SparseSSMError(f"{type(self).__name__}: {error} in {adapter.name}") from error

    # -- calibration -----------------------------------------------------------------

    def observe(
        self, adapter: MixerAdapter, hidden_states: Tensor, attention_mask: Tensor | None
    ) -> None:
        started = time.perf_counter()
        quantities = adapter.quantities(hidden_states, attention_mask)
        if adapter.name not in self._statistics:
            request = SALIENCIES[self.saliency].request(self.aggregation, self.pruned_value)
            channels, state_size = adapter.A_log.shape
            self._statistics[adapter.name] = ScanStatistics(
                request, channels, state_size, device=quantities.u.device
            )
            self._seconds[adapter.name] = 0.0
        x = read_out(adapter, quantities, self._statistics[adapter.name])
        offer(adapter.mixer, hidden_states, attention_mask, x)
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
        if self.requires_calibration_data:
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
        value = torch.tensor(PRUNED_VALUES[self.pruned_value], dtype=A_log.dtype)
        kept = torch.where(pruned, value.to(A_log.device), A_log)
        update_offload_parameter(adapter.mixer, "A_log", kept.view_as(adapter.mixer.A_log))
        seconds = self._seconds.pop(adapter.name, 0.0) + time.perf_counter() - started
        self._record(adapter, was_zero, pruned, score, statistics, seconds)

    def _select(
        self, adapter: MixerAdapter, statistics: ScanStatistics | None
    ) -> tuple[Tensor, Tensor]:
        """Which entries are pruned, and the score that was ranked, (D, N) each."""
        if statistics is not None and not statistics.is_finite():
            raise SparseSSMError(
                f"{adapter.name}: NaN or infinite values in its recurrence during "
                "calibration; this layer was not pruned"
            )
        A_log = adapter.A_log.detach()
        inputs = SaliencyInputs(
            A_log=A_log.float(),
            out_norm=adapter.out_norm,
            state_energy=statistics.state_energy if statistics is not None else None,
            transition=statistics.transition if statistics is not None else None,
            output_error=statistics.output_error if statistics is not None else None,
        )
        ranking = aggregate(
            SALIENCIES[self.saliency],
            self.aggregation,
            inputs,
            steps=statistics.steps if statistics is not None else 0,
            pattern=self.pattern,
            decay=Decay(self.decay, self.decay_power, self.decay_gamma, self.decay_window),
        )
        return ranking.select(self.pattern), ranking.score

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
            {
                "name": adapter.name,
                "shape": list(pruned.shape),
                "entries": pruned.numel(),
                "pruned": count,
                "sparsity": count / pruned.numel(),
                "zero_before": int(was_zero.sum()),
                "zero_before_and_pruned": int((was_zero & pruned).sum()),
                "saliency_quantiles": {
                    str(q): float(v) for q, v in zip(_QUANTILES, quantiles, strict=True)
                },
                "highest_pruned": float(score[pruned].max()),
                "lowest_kept": float(score[~pruned].min()),
                "tokens": statistics.tokens if statistics is not None else 0,
                "seconds": round(seconds, 3),
            }
        )
        logger.info(f"{adapter.name}: pruned {count} of {pruned.numel()} entries of A_log")

    def report(self) -> dict[str, Any]:
        """What was done: settings, one entry a layer, totals.

        Quantiles are those of the score that was ranked; for ``frequency`` it is minus the
        number of votes.
        """
        entries = sum(layer["entries"] for layer in self._layers)
        pruned = sum(layer["pruned"] for layer in self._layers)
        return {
            "modifier": type(self).__name__,
            "settings": self.model_dump(exclude=set(Modifier.model_fields), exclude_none=True),
            "layers": self._layers,
            "cost": self._cost.to_dict(),
            "total": {
                "entries": entries,
                "pruned": pruned,
                "sparsity": pruned / entries if entries else 0.0,
                "seconds": round(sum(layer["seconds"] for layer in self._layers), 3),
            },
        }

    def on_finalize(self, state: State, **kwargs: Any) -> bool:
        self._statistics.clear()
        return super().on_finalize(state, **kwargs)
