"""Prune all weights of a model by weight and gradient, in rounds, under one threshold."""

import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Literal

import torch
from compressed_tensors.offload import disable_onloading
from compressed_tensors.utils import match_named_modules
from compressed_tensors.utils.match import match_name, match_named_parameters
from loguru import logger
from pydantic import Field, field_validator, model_validator
from torch import Tensor, nn

from sparsessm_plugin import distributed
from sparsessm_plugin.calibration import CalibrationBatches
from sparsessm_plugin.calibration.contexts import (
    hooks_disabled,
    of_quantization,
    quantization_disabled,
)
from sparsessm_plugin.calibration.finite import is_finite
from sparsessm_plugin.criteria.importance import (
    Importance,
    Schedule,
    choose_pruned,
    importance,
    sparsity_after,
)
from sparsessm_plugin.criteria.values import MEMORYLESS
from sparsessm_plugin.errors import SparseSSMError, shown
from sparsessm_plugin.families import MixerAdapter, check_not_quantized, find_mixers
from sparsessm_plugin.families.prunable import PrunableWeight, prunable_weights, vocabulary_names
from sparsessm_plugin.methods.base import MethodResult, MixerMethod, TargetSettings, Total, Watch
from sparsessm_plugin.methods.distilling import TuneSettings
from sparsessm_plugin.methods.run import run
from sparsessm_plugin.selection.masks import check_sparsity
from sparsessm_plugin.training.distillation import Distillation
from sparsessm_plugin.training.gradients import (
    LossFunction,
    mean_gradients,
    on_compute_device,
    single_device,
)
from sparsessm_plugin.training.non_finite import NonFiniteGradients
from sparsessm_plugin.training.tuner import Tuner


class GradientSettings(TargetSettings, TuneSettings):
    """The fields of :class:`sparsessm_plugin.GradientMagnitudeModifier`, which describes them."""

    sparsity: float
    rounds: int = Field(default=8, ge=1)
    schedule: Schedule = "cubic"
    saliency: Importance = "weight_x_gradient_norm"
    gradient_power: float | None = Field(default=None, ge=0.0, allow_inf_nan=False)
    scope: Literal["global", "per_layer", "per_kind"] = "global"
    min_keep: float = Field(default=0.01, ge=0.0, lt=1.0)
    distill_loss: Literal["labels", "dense"] = "labels"
    distill_learning_rate: float = Field(default=2e-4, gt=0.0, allow_inf_nan=False)
    calibration_batches: int | None = Field(default=None, ge=1)
    # a function cannot be written into a recipe
    loss_fn: LossFunction | None = Field(default=None, exclude=True)

    @property
    def watches_data(self) -> bool:
        """All passes are its own."""
        return False

    @property
    def reads_data(self) -> bool:
        """Whether there are gradients to gather or steps to take."""
        return self.saliency != "magnitude" or self.distills

    @field_validator("sparsity")
    @classmethod
    def _check_sparsity(cls, value: float | None) -> float | None:
        return check_sparsity(value)

    @model_validator(mode="after")
    def _check_together(self) -> "GradientSettings":
        if self.min_keep > 1 - self.sparsity:
            raise ValueError(
                f"min_keep {self.min_keep:g} of every tensor and sparsity {self.sparsity:g} of "
                "all are more than there is"
            )
        if self.saliency == "magnitude":
            if self.gradient_power is not None:
                raise ValueError(
                    "gradient_power has no meaning for saliency 'magnitude'; leave it out"
                )
        elif self.gradient_power is None:
            self.gradient_power = 1.0
        if self.distill_loss == "dense" and not self.distills:
            raise ValueError(
                "distill_loss 'dense' has no meaning without distill_steps or distill_minutes"
            )
        if self.distill_loss == "dense" and self.loss_fn is not None:
            raise ValueError(
                "distill_loss 'dense' compares predictions of tokens; loss_fn must be None"
            )
        return self


@dataclass(frozen=True)
class PrunedWeight:
    """What became of one weight.

    :param name: of the parameter
    :param kind: a projection's name in its mixer, ``A_log``, ``D``, or ``linear``
    :param shape: of the weight
    :param entries: how many it has
    :param pruned: entries that are zero now
    :param zero_before: entries that were zero before
    :param sparsity: share that is zero now
    """

    name: str
    kind: str
    shape: list[int]
    entries: int
    pruned: int
    zero_before: int
    sparsity: float


@dataclass(frozen=True)
class PruningRound:
    """What one round did.

    :param round: its number, from 1
    :param sparsity: that it was to reach
    :param pruned: entries that were zero after it
    :param loss_before: mean loss over the batches that its gradients come from, before it
        pruned; None without gradients
    :param tuning_loss: mean loss of the batches that the steps after it went along; None
        without steps
    :param diverged: whether these did not lower the loss and were taken back
    """

    round: int
    sparsity: float
    pruned: int
    loss_before: float | None
    tuning_loss: float | None = None
    diverged: bool | None = None

    def to_dict(self) -> dict[str, Any]:
        """For a report; without steps there is nothing to say of them."""
        fields = asdict(self)
        if self.diverged is None:
            del fields["tuning_loss"], fields["diverged"]
        return fields


@dataclass(frozen=True)
class GradientResult(MethodResult):
    """What :class:`GradientPruning` did: a :class:`PrunedWeight` a weight, and the rounds.

    :param rounds: one after the other
    :param skipped_batches: where NaN or infinity began in each batch that was left out
    """

    rounds: tuple[PruningRound, ...]
    skipped_batches: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        return {
            "layers": [asdict(layer) for layer in self.layers],
            "rounds": [entry.to_dict() for entry in self.rounds],
            "skipped_batches": list(self.skipped_batches),
            "total": asdict(self.total),
        }


class GradientPruning(MixerMethod[GradientSettings]):
    """Prunes the weights whose size times gradient is smallest (after arXiv 2505.08299)."""

    needs_whole_model: ClassVar[bool] = True  # one threshold for all, and gradients

    def __init__(self, settings: GradientSettings, who: str | None = None) -> None:
        super().__init__(settings, who)
        self._weights: dict[str, PrunableWeight] = {}
        self._layers: list[PrunedWeight] = []
        self._rounds: list[PruningRound] = []
        self._non_finite = NonFiniteGradients()
        self._changed = ""  # what has become of the model so far
        self._seconds = 0.0

    # -- which weights ---------------------------------------------------------------

    def matching_mixers(self, model: nn.Module) -> list[MixerAdapter]:
        """All mixers, after a check of ``targets`` and ``ignore``.

        Looks at names and shapes only, so a model on the meta device will do.

        :raises SparseSSMError: see :meth:`matching_weights`
        """
        self.matching_weights(model)
        return find_mixers(model)

    def matching_weights(self, model: nn.Module) -> list[PrunableWeight]:
        """The weights that ``targets`` and ``ignore`` leave, in model order.

        :raises SparseSSMError: the model has no known mixer, a pattern matches nothing that can be
            pruned, or nothing is left, or weights are stored quantized
        """
        check_not_quantized(model)
        known = _prunable(model)

        def named(pattern: str) -> set[str]:
            modules = {name for name, _ in match_named_modules(model, [pattern])}
            tensors = {name for name, _, _ in match_named_parameters(model, [pattern])}
            return {
                name
                for name, w in known.items()
                if name in tensors
                or pattern == w.kind
                or {w.module_name, w.mixer} & modules
                or (w.mixer and match_name(f"{w.mixer}.{w.kind}", pattern))
            }

        names = set() if self.settings.targets else set(known)
        for field in ("targets", "ignore"):
            for pattern in getattr(self.settings, field):
                found = named(pattern)
                if not found:
                    raise SparseSSMError(
                        f"{self.who}.{field}: {shown(pattern)} matches no weight that can be "
                        f"pruned: {', '.join(sorted({w.kind for w in known.values()}))}; "
                        "embeddings, what predicts tokens, routers, norms, biases and dt_bias "
                        "never are"
                    )
                names = names | found if field == "targets" else names - found
        if not names:
            raise SparseSSMError(f"{self.who}.ignore: {self.settings.ignore} leaves no weight")
        return [w for name, w in known.items() if name in names]

    def prepare(self, model: nn.Module) -> None:
        self._model = model
        self._weights = {w.parameter_name: w for w in self.matching_weights(model)}
        for name, weight in self._weights.items():
            if not is_finite(weight.weight):
                raise SparseSSMError(f"{name} holds NaN or infinite values; nothing was pruned")

    # -- pruning ---------------------------------------------------------------------

    def begin(self, batches: CalibrationBatches | None) -> list[Watch]:
        """Do all of it, in passes with gradients of its own."""
        started, model = time.perf_counter(), self._model
        self._batches = batches
        with (
            disable_onloading(),  # parameters themselves, wherever they are
            hooks_disabled(),
            quantization_disabled(model),
        ):
            home = single_device(self.who, model)
            with on_compute_device(self.who, model) as device:
                try:
                    self._prune(model, self.batches if self.settings.reads_data else [])
                except SparseSSMError as error:
                    # weights that were moved for the work go back as they were
                    changed = self._changed if device.type == home.type else ""
                    raise SparseSSMError(f"{error}; {changed or 'nothing was changed'}") from error
        self._seconds = time.perf_counter() - started
        return []

    def _prune(self, model: nn.Module, batches: Sequence[Any]) -> None:
        settings, who = self.settings, self.who
        tensors = {name: weight.parameter for name, weight in self._weights.items()}
        pruned = {name: tensor.detach() == 0 for name, tensor in tensors.items()}
        zero_before = {name: int(mask.sum()) for name, mask in pruned.items()}
        start = sum(zero_before.values()) / sum(mask.numel() for mask in pruned.values())
        tuner, others = None, {}
        if settings.distills:
            tuner = self._tuner(model, batches)
            # what an earlier method has pruned outside of the targets stays so, too
            known = _prunable(model)
            others = {
                name: parameter.detach() == 0
                for name, parameter in tuner.parameters.items()
                if parameter.ndim > 1 or name in known
            }
        for done in range(1, settings.rounds + 1):
            share = sparsity_after(
                done, settings.rounds, start, settings.sparsity, settings.schedule
            )
            scores, loss = self._scores(model, batches, tensors)
            pruned = choose_pruned(
                scores, share, groups=self._groups(), min_keep=settings.min_keep, pruned=pruned
            )
            # ranks of one host may share memory: none writes before all have read, and
            # none reads on before all have written
            distributed.gather(f"{who} round {done} chosen", None)
            with torch.no_grad():
                for name, mask in pruned.items():
                    tensors[name].masked_fill_(mask, 0.0)
            self._changed = f"round {done} of {settings.rounds} is applied to the model in memory"
            distributed.gather(f"{who} round {done} pruned", None)
            count = sum(int(mask.sum()) for mask in pruned.values())
            tuned = None if tuner is None else self._tune(tuner, done, {**others, **pruned})
            self._rounds.append(PruningRound(done, share, count, loss, *(tuned or ())))
            logger.info(f"round {done} of {settings.rounds}: {count} entries pruned ({share:.2%})")
        for name, mask in pruned.items():
            self._record(name, mask, zero_before[name])

    def _tune(self, tuner: Tuner, done: int, pruned: dict[str, Tensor]) -> tuple[float, bool]:
        """The loss along the steps after a round, and whether they were taken back."""
        rate, before = self.settings.distill_learning_rate, tuner.budget.done
        tuned = tuner.run(pruned, done, self.settings.rounds)
        steps = tuner.budget.done - before
        if tuned.diverged:
            logger.warning(
                f"round {done}: {steps} steps at learning rate {rate:g} did not lower the loss "
                f"({tuned.before:.4g} before, {tuned.after:.4g} after); the weights are what they "
                "were before the steps"
            )
        return tuned.loss, tuned.diverged

    def _tuner(self, model: Any, batches: Sequence[Any]) -> Tuner:
        parameters, loss_fn = tuned_parameters(model), self.settings.loss_fn
        plan = self.settings.plan(self.settings.rounds)
        if self.settings.distill_loss == "dense":
            distillation = Distillation(model, batches, "distill_loss: dense", plan)
            batches, loss_fn = distillation.batches, distillation.loss
            # it reads what the dense model gave to the head, which stays as it is
            head = {id(p) for p in model.get_output_embeddings().parameters()}
            parameters = {n: p for n, p in parameters.items() if id(p) not in head}
        return Tuner(
            model,
            parameters,
            batches,
            plan,
            self.who,
            loss_fn=loss_fn,
            non_finite=self._non_finite,
        )

    def _scores(
        self, model: nn.Module, batches: Sequence[Any], tensors: dict[str, nn.Parameter]
    ) -> tuple[dict[str, Tensor], float | None]:
        """Score of every entry, by weight, and the mean loss."""
        settings = self.settings
        if settings.saliency == "magnitude":
            return {n: importance(t.detach(), None) for n, t in tensors.items()}, None
        assert settings.gradient_power is not None
        gradients, loss = mean_gradients(
            model,
            batches[: settings.calibration_batches],
            tensors,
            loss_fn=settings.loss_fn,
            of_samples=settings.saliency == "weight_x_gradient_norm",
            non_finite=self._non_finite,
        )
        scores = {}
        for name, tensor in tensors.items():
            gradient = gradients.pop(name)
            if not self._rounds and not gradient.any():  # later pruning may have cut it off
                logger.warning(f"{name} has no gradient: the loss does not depend on it")
            scores[name] = importance(tensor.detach(), gradient, settings.gradient_power)
            if self._weights[name].kind == "A_log":
                # so large that its gradient vanishes, which says nothing about A_log = 0
                scores[name][tensor >= MEMORYLESS] = torch.finfo(torch.float32).max
        return scores, loss

    def _groups(self) -> dict[str, str] | None:
        scope = self.settings.scope
        if scope == "global":
            return None
        return {n: n if scope == "per_layer" else w.kind for n, w in self._weights.items()}

    # -- report ----------------------------------------------------------------------

    def _record(self, name: str, mask: Tensor, zero_before: int) -> None:
        pruned = int(mask.sum())
        self._layers.append(
            PrunedWeight(
                name=name,
                kind=self._weights[name].kind,
                shape=list(mask.shape),
                entries=mask.numel(),
                pruned=pruned,
                zero_before=zero_before,
                sparsity=pruned / mask.numel(),
            )
        )

    def result(self) -> GradientResult:
        entries = sum(layer.entries for layer in self._layers)
        pruned = sum(layer.pruned for layer in self._layers)
        share = pruned / entries if entries else 0.0
        total = Total(entries, pruned, share, round(self._seconds, 3))
        skipped = tuple(self._non_finite.skipped)
        return GradientResult(tuple(self._layers), total, {}, tuple(self._rounds), skipped)


def prune_by_gradient(
    model: Any, batches: Iterable[Any] | None = None, **settings: Any
) -> GradientResult:
    """Prune all weights of a model by weight and gradient, in place.

    Any module with state-space mixers will do, without a config or a tokenizer: with ``loss_fn``
    batches may hold whatever that takes.

    :param model: transformers model, or a module with mixers of one
    :param batches: what the model's forward takes; None for ``saliency="magnitude"``
    :param settings: fields of :class:`sparsessm_plugin.GradientMagnitudeModifier`, such as
        ``sparsity``
    :return: one :class:`PrunedWeight` a weight, one :class:`PruningRound` a round
    :raises SparseSSMError: a field that is not allowed, what does not fit the model or the
        data, loss or gradients that are not finite
    """
    who = "prune_by_gradient"
    method = GradientPruning(GradientSettings.of(who, settings), who)
    run(method, model, batches)
    return method.result()


def tuned_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """All weights but those that embed tokens, tied ones among these."""
    embeddings = {
        id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)
    }
    return {
        name: parameter
        for name, parameter in model.named_parameters()
        if parameter.is_floating_point()
        and not of_quantization(name)
        and id(parameter) not in embeddings
    }


def _prunable(model: nn.Module) -> dict[str, PrunableWeight]:
    """Every weight that may be pruned, by name of its parameter, in model order."""
    with disable_onloading():  # the parameters themselves, wherever they are
        seen = {id(model.get_submodule(name).weight) for name in vocabulary_names(model)}
        found = {}
        for weight in prunable_weights(model, recurrent=True):
            if id(weight.parameter) not in seen:
                seen.add(id(weight.parameter))
                found[weight.parameter_name] = weight
    return found
