"""Prune all weights of a model by weight and gradient, in rounds, under one threshold."""

import time
from collections.abc import Iterable, Sequence
from typing import Any, Literal

import torch
from compressed_tensors.offload import disable_onloading
from compressed_tensors.utils import match_named_modules
from compressed_tensors.utils.match import match_name, match_named_parameters
from llmcompressor.core import Event, EventType, State
from llmcompressor.modifiers import Modifier
from loguru import logger
from pydantic import Field, PrivateAttr, field_validator, model_validator
from torch import Tensor, nn

from sparsessm_plugin import distributed
from sparsessm_plugin.calibration.contexts import (
    hooks_disabled,
    of_quantization,
    quantization_disabled,
)
from sparsessm_plugin.criteria.importance import (
    Importance,
    Schedule,
    choose_pruned,
    importance,
    sparsity_after,
)
from sparsessm_plugin.criteria.values import MEMORYLESS
from sparsessm_plugin.errors import SparseSSMError, shown
from sparsessm_plugin.families import (
    MixerAdapter,
    check_not_quantized,
    find_mixers,
)
from sparsessm_plugin.families.prunable import PrunableWeight, prunable_weights, vocabulary_names
from sparsessm_plugin.modifiers.calibration import MixerModifier
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


class GradientMagnitudeModifier(MixerModifier):
    """Prunes the weights whose size times gradient is smallest, over the whole model at once.

    After arXiv 2505.08299. Every Linear layer, the convolution, A_log and D compete for what
    stays, so that each component and each layer gets the sparsity that it can bear. Sparsity is
    raised in rounds; each looks at the gradients of what the rounds before have left. Without
    tuning the kept weights are not changed. Every pruned entry is stored as 0; of A_log, too,
    where 0 means A = -1.

    All is done when calibration starts, in passes with gradients that this modifier makes
    itself, so LLM Compressor need not run the data (``datafree`` pipeline). The batches of the
    dataset stay in main memory. On the device, beside the model: for each
    targeted weight 4 bytes for the gradient and 4 for its importance, the gradient of one batch
    in the model's dtype, and the inputs of all layers for one batch. Tuning needs 20 bytes more
    for each tuned weight: a float32 copy, its gradient, two moments, and the weight as it was
    before the steps, to which it goes back where they do not lower the loss.

    Sample yaml::

        prune_stage:
          prune_modifiers:
            GradientMagnitudeModifier:
              sparsity: 0.7
              rounds: 8

    Lifecycle:

    - on_initialize: find the weights, check them, the settings and the data
    - on_calibration_start: for every round gather gradients, choose, prune, tune
    - on_calibration_end: nothing is left to do
    - on_finalize: write the report

    :param sparsity: share of zeros in (0, 1), over all targeted weights together; zeros that are
        there already stay and count
    :param rounds: how often gradients are gathered and weights pruned
    :param schedule: how sparsity rises over the rounds: ``cubic``: fast first, then slower |
        ``linear``
    :param importance: ``weight_x_gradient_norm`` (default): |w| times the root of the mean squared
        gradient of single samples, which takes a backward pass for each | ``weight_x_gradient``:
        |w| |mean gradient|, as in the paper; where a model is well trained the gradients of samples
        cancel, and much less is left to tell weights apart | ``magnitude``: |w|, needs no data
    :param alpha: power of the gradient; default 1
    :param scope: what competes with what: ``global``: all weights | ``per_layer``: those of one
        tensor, so that all get the same sparsity | ``per_kind``: those of one kind (all in_proj,
        all A_log, all Linear layers outside of mixers, ...)
    :param min_keep: share of each tensor that stays in any case: its most important entries
    :param targets: what is pruned: weights by name, ``re:`` pattern or kind (``A_log``,
        ``in_proj``), or modules by name, class name or pattern. Default everything that can be:
        Linear, conv1d, A_log and D. Embeddings, what predicts tokens, routers
        of experts, norms, biases and dt_bias are never pruned
    :param ignore: what to leave alone, likewise
    :param tune_steps: gradient steps after each round; 0 trains nothing. All floating-point
        weights but the embeddings are tuned, ignored ones too; what is pruned stays 0
    :param tune_loss: what these steps lower: ``labels``: the loss whose gradients choose the
        weights | ``dense``: the divergence from what the model predicted before it was pruned,
        which says more about each token and is harder to learn by heart; what predicts tokens
        is not tuned then, and tokens x hidden_size numbers wait in main memory. Default labels
    :param learning_rate: of these steps (Adam), the highest: it rises over the first tenth of all
        steps and then falls to 0 along a cosine
    :param importance_batches: gradients are gathered over so many batches, the first; default all
    :param loss_fn: ``loss_fn(model, batch)`` gives the mean loss of a batch, a scalar tensor. From
        Python only. Default the model's own loss for ``labels``, or for the token ids
    :param report_path: ``.json`` file to write the report to
    """

    sparsity: float
    rounds: int = Field(default=8, ge=1)
    schedule: Schedule = "cubic"
    importance: Importance = "weight_x_gradient_norm"
    alpha: float | None = Field(default=None, ge=0.0, allow_inf_nan=False)
    scope: Literal["global", "per_layer", "per_kind"] = "global"
    min_keep: float = Field(default=0.01, ge=0.0, lt=1.0)
    tune_steps: int = Field(default=0, ge=0)
    tune_loss: Literal["labels", "dense"] = "labels"
    learning_rate: float = Field(default=2e-4, gt=0.0, allow_inf_nan=False)
    importance_batches: int | None = Field(default=None, ge=1)
    # a function cannot be written into a recipe
    loss_fn: LossFunction | None = Field(default=None, exclude=True)

    _weights: dict[str, PrunableWeight] = PrivateAttr(default_factory=dict)
    _layers: list[dict[str, Any]] = PrivateAttr(default_factory=list)
    _rounds: list[dict[str, Any]] = PrivateAttr(default_factory=list)
    _non_finite: NonFiniteGradients = PrivateAttr(default_factory=NonFiniteGradients)
    _changed: str = PrivateAttr(default="")  # what has become of the model so far
    _seconds: float = PrivateAttr(default=0.0)

    # -- settings --------------------------------------------------------------------

    @field_validator("sparsity")
    @classmethod
    def _check_sparsity(cls, value: float | None) -> float | None:
        return check_sparsity(value)

    @model_validator(mode="after")
    def _check_together(self) -> "GradientMagnitudeModifier":
        if self.min_keep > 1 - self.sparsity:
            raise ValueError(
                f"min_keep {self.min_keep:g} of every tensor and sparsity {self.sparsity:g} of "
                "all are more than there is"
            )
        if self.importance == "magnitude":
            if self.alpha is not None:
                raise ValueError("alpha has no meaning for importance 'magnitude'; leave it out")
        elif self.alpha is None:
            self.alpha = 1.0
        if self.tune_loss == "dense" and not self.tune_steps:
            raise ValueError("tune_loss 'dense' has no meaning without tune_steps")
        if self.tune_loss == "dense" and self.loss_fn is not None:
            raise ValueError(
                "tune_loss 'dense' compares predictions of tokens; loss_fn must be None"
            )
        return self

    @property
    def reads_calibration_data(self) -> bool:
        """Whether it makes passes over the data, though LLM Compressor need not."""
        return self.importance != "magnitude" or self.tune_steps > 0

    # -- before calibration ----------------------------------------------------------

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
        who = type(self).__name__
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

        names = set() if self.targets else set(known)
        for field in ("targets", "ignore"):
            for pattern in getattr(self, field):
                found = named(pattern)
                if not found:
                    raise SparseSSMError(
                        f"{who}.{field}: {shown(pattern)} matches no weight that can be pruned: "
                        f"{', '.join(sorted({w.kind for w in known.values()}))}; embeddings, what "
                        "predicts tokens, routers, norms, biases and dt_bias never are"
                    )
                names = names | found if field == "targets" else names - found
        if not names:
            raise SparseSSMError(f"{who}.ignore: {self.ignore} leaves no weight")
        return [w for name, w in known.items() if name in names]

    def prepare(self, state: State) -> None:
        self._weights = {w.parameter_name: w for w in self.matching_weights(state.model)}
        for name, weight in self._weights.items():
            tensor = weight.weight
            if not tensor.is_meta and not bool(torch.isfinite(tensor.sum(dtype=torch.float64))):
                raise SparseSSMError(f"{name} holds NaN or infinite values; nothing was pruned")

    # -- pruning ---------------------------------------------------------------------

    def on_calibration_start(self, state: State, event: Event, **kwargs: Any) -> None:
        from sparsessm_plugin.recipes.conflicts import check_pass

        started = time.perf_counter()
        with self._released_on_error():
            check_pass(self, state.model)
        with (
            self._released_on_error(),
            disable_onloading(),  # parameters themselves, wherever they are
            hooks_disabled(),
            quantization_disabled(state.model),
        ):
            home = single_device(type(self).__name__, state.model)
            with on_compute_device(type(self).__name__, state.model) as device:
                try:
                    self._prune(state.model, self.batches if self.reads_calibration_data else [])
                except SparseSSMError as error:
                    # weights that were moved for the work go back as they were
                    changed = self._changed if device.type == home.type else ""
                    raise SparseSSMError(f"{error}; {changed or 'nothing was changed'}") from error
        self._seconds = time.perf_counter() - started

    def _prune(self, model: nn.Module, batches: Sequence[Any]) -> None:
        tensors = {name: weight.parameter for name, weight in self._weights.items()}
        pruned = {name: tensor.detach() == 0 for name, tensor in tensors.items()}
        zero_before = {name: int(mask.sum()) for name, mask in pruned.items()}
        start = sum(zero_before.values()) / sum(mask.numel() for mask in pruned.values())
        tuner, others = None, {}
        if self.tune_steps:
            tuner = self._tuner(model, batches)
            # what an earlier modifier has pruned outside of the targets stays so, too
            known = _prunable(model)
            others = {
                name: parameter.detach() == 0
                for name, parameter in tuner.parameters.items()
                if parameter.ndim > 1 or name in known
            }
        for done in range(1, self.rounds + 1):
            share = sparsity_after(done, self.rounds, start, self.sparsity, self.schedule)
            scores, loss = self._scores(model, batches, tensors)
            pruned = choose_pruned(
                scores, share, groups=self._groups(), min_keep=self.min_keep, pruned=pruned
            )
            # ranks of one host may share memory: none writes before all have read, and
            # none reads on before all have written
            distributed.gather(f"{type(self).__name__} round {done} chosen", None)
            with torch.no_grad():
                for name, mask in pruned.items():
                    tensors[name].masked_fill_(mask, 0.0)
            self._changed = f"round {done} of {self.rounds} is applied to the model in memory"
            distributed.gather(f"{type(self).__name__} round {done} pruned", None)
            count = sum(int(mask.sum()) for mask in pruned.values())
            entry = {"round": done, "sparsity": share, "pruned": count, "loss_before": loss}
            if tuner is not None:
                tuned = tuner.run(self.tune_steps, {**others, **pruned})
                entry |= {"tuning_loss": tuned.loss, "diverged": tuned.diverged}
                if tuned.diverged:
                    logger.warning(
                        f"round {done}: {self.tune_steps} steps at learning rate "
                        f"{self.learning_rate:g} did not lower the loss ({tuned.before:.4g} "
                        f"before, {tuned.after:.4g} after); the weights are what they were before "
                        "the steps"
                    )
            self._rounds.append(entry)
            logger.info(f"round {done} of {self.rounds}: {count} entries pruned ({share:.2%})")
        for name, mask in pruned.items():
            self._record(name, mask, zero_before[name])

    def _tuner(self, model: Any, batches: Sequence[Any]) -> Tuner:
        parameters, loss_fn = tuned_parameters(model), self.loss_fn
        if self.tune_loss == "dense":
            distillation = Distillation(model, batches, "tune_loss: dense")
            batches, loss_fn = distillation.batches, distillation.loss
            # it reads what the dense model gave to the head, which stays as it is
            head = {id(p) for p in model.get_output_embeddings().parameters()}
            parameters = {n: p for n, p in parameters.items() if id(p) not in head}
        return Tuner(
            model,
            parameters,
            batches,
            self.rounds * self.tune_steps,
            self.learning_rate,
            loss_fn=loss_fn,
            non_finite=self._non_finite,
        )

    def _scores(
        self, model: nn.Module, batches: Sequence[Any], tensors: dict[str, nn.Parameter]
    ) -> tuple[dict[str, Tensor], float | None]:
        if self.importance == "magnitude":
            return {n: importance(t.detach(), None) for n, t in tensors.items()}, None
        assert self.alpha is not None
        gradients, loss = mean_gradients(
            model,
            batches[: self.importance_batches],
            tensors,
            loss_fn=self.loss_fn,
            of_samples=self.importance == "weight_x_gradient_norm",
            non_finite=self._non_finite,
        )
        scores = {}
        for name, tensor in tensors.items():
            gradient = gradients.pop(name)
            if not self._rounds and not gradient.any():  # later pruning may have cut it off
                logger.warning(f"{name} has no gradient: the loss does not depend on it")
            scores[name] = importance(tensor.detach(), gradient, self.alpha)
            if self._weights[name].kind == "A_log":
                # so large that its gradient vanishes, which says nothing about A_log = 0
                scores[name][tensor >= MEMORYLESS] = torch.finfo(torch.float32).max
        return scores, loss

    def _groups(self) -> dict[str, str] | None:
        if self.scope == "global":
            return None
        return {n: n if self.scope == "per_layer" else w.kind for n, w in self._weights.items()}

    def apply(self, model: nn.Module, batches: Iterable[Any] | None = None) -> dict[str, Any]:
        """Prune a module that ``oneshot()`` does not take: without a config on disk or a tokenizer.

        :param model: any module with state-space mixers, changed in place
        :param batches: calibration data
        :return: the report
        :raises SparseSSMError: see :meth:`matching_weights` and
            :func:`sparsessm_plugin.training.gradients.loss_of`
        """
        state = State()
        state.update(model=model, calib_data=batches, copy_data=False)
        self.initialize(state)
        for kind in (EventType.CALIBRATION_START, EventType.CALIBRATION_END):
            self.update_event(state, Event(type_=kind))
        self.finalize(state)
        return self.report()

    # -- report ----------------------------------------------------------------------

    def _record(self, name: str, mask: Tensor, zero_before: int) -> None:
        pruned = int(mask.sum())
        self._layers.append(
            {
                "name": name,
                "kind": self._weights[name].kind,
                "shape": list(mask.shape),
                "entries": mask.numel(),
                "pruned": pruned,
                "zero_before": zero_before,
                "sparsity": pruned / mask.numel(),
            }
        )

    def report(self) -> dict[str, Any]:
        """What was done: settings, one entry a weight, one a round, totals.

        ``loss_before`` of a round is the mean loss over the batches that its gradients come from,
        before it pruned; ``tuning_loss`` that of the steps after it. ``diverged`` says that these
        did not lower the loss and were taken back.
        """
        entries = sum(layer["entries"] for layer in self._layers)
        pruned = sum(layer["pruned"] for layer in self._layers)
        settings = self.model_dump(exclude=set(Modifier.model_fields), exclude_none=True)
        if self.loss_fn is not None:
            settings["loss_fn"] = getattr(self.loss_fn, "__qualname__", repr(self.loss_fn))
        return {
            "modifier": type(self).__name__,
            "settings": settings,
            "layers": self._layers,
            "rounds": self._rounds,
            "skipped_batches": self._non_finite.skipped,
            "total": {
                "entries": entries,
                "pruned": pruned,
                "sparsity": pruned / entries if entries else 0.0,
                "seconds": round(self._seconds, 3),
            },
        }


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
