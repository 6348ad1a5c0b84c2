"""Fit a model that has become smaller to what the dense one predicted, without labels."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from types import MethodType
from typing import Any, Literal

import torch
from compressed_tensors.offload import disable_onloading
from compressed_tensors.utils import patch_attr
from loguru import logger
from torch import Tensor, nn

from sparsessm_plugin import distributed
from sparsessm_plugin.calibration.contexts import of_quantization, undisturbed
from sparsessm_plugin.calibration.finite import is_finite
from sparsessm_plugin.errors import SparseSSMError
from sparsessm_plugin.families import iter_mixers
from sparsessm_plugin.families.fast_forward import fast_forward
from sparsessm_plugin.progress import Stage, clock
from sparsessm_plugin.training.budget import Plan
from sparsessm_plugin.training.dense import DenseStates, Head, real_positions
from sparsessm_plugin.training.divergence import MeanDivergence, rows_at_once
from sparsessm_plugin.training.generated import with_written
from sparsessm_plugin.training.gradients import on_compute_device, positions, to_device
from sparsessm_plugin.training.memory import needed
from sparsessm_plugin.training.non_finite import NonFiniteError, first_non_finite
from sparsessm_plugin.training.resume import ResumeFile
from sparsessm_plugin.training.tuner import Tuner

Weights = Literal["mixers", "all", "all_but_vocabulary"]

# In a batch: (tokens, hidden_size) what the dense head multiplied, padding left out; what that is
# to be multiplied by; and which positions (tokens,) of the batch these are, None if all.
_DENSE, _SCALES, _REAL = "dense_hidden_states", "dense_scales", "real_positions"
# How far the logits may be from a multiple of what the head gives, relative, in any dtype.
_MULTIPLE = 0.02
_COMPARED = 512  # tokens by which that is seen
# Batches whose divergence is measured before and after a fit; more say nothing new.
_MEASURED = 32
# Tokens of a step from which on ``auto`` takes Muon. With 16,384 it was measured to win, with 2,048
# not to: what is noise moves a matrix as far as what is not.
_ENOUGH = 8192


@dataclass(frozen=True)
class Distilled:
    """What a fit to the dense predictions has done.

    :param steps: gradient steps
    :param divergence_before: from the dense predictions, nats a token
    :param divergence_after: likewise, of what the steps made, taken back or not
    :param diverged: whether the steps were taken back
    :param passes: how often the text was read
    """

    steps: int
    divergence_before: float
    divergence_after: float
    diverged: bool
    passes: float = 0.0


class Distillation:
    """What the dense model predicts for the calibration data, and a fit of a smaller one to it.

    Kept are the inputs of the head, see :class:`DenseStates`, and the head as it is, so that the
    smaller model may have another.

    Attributes: ``batches``, those of the data that the plan can come to, with what the dense model
    makes of them; read by :meth:`loss`.

    :param model: dense, with its language head; all weights on one device
    :param data: batches that can be read again
    :param who: asks for it, for messages: a field and, where that is one, its value
    :param plan: how long and how fast a later :meth:`fit` is
    :param resume: where a fit that is interrupted leaves what a later run goes on from
    :param generated: tokens that the dense model writes itself, beside the data
    :raises NonFiniteError: predictions that are NaN or infinite
    :raises SparseSSMError: no language head, weights on several devices, logits that are no
        multiple of what the head gives, or see :func:`with_written`
    """

    def __init__(
        self,
        model: Any,
        data: Sequence[Any],
        who: str,
        plan: Plan | None = None,
        resume: ResumeFile | None = None,
        generated: int = 0,
    ) -> None:
        head = model.get_output_embeddings()
        if head is None:
            raise SparseSSMError(
                f"{who}: it needs a language head, and {type(model).__name__} has none"
            )
        self._who = who
        self._plan = plan or Plan()
        self._resume = resume
        if generated:
            with _in_place(who, model):
                data = with_written(model, data, generated, who)
        if self._plan.steps and not self._plan.minutes:
            data = data[: max(self._plan.steps, _MEASURED)]
        real = [real_positions(batch, positions(batch)) for batch in data]
        counts = [
            positions(batch) if where is None else len(where)
            for batch, where in zip(data, real, strict=True)
        ]
        states: DenseStates | None = None
        with (
            _in_place(who, model) as device,
            fast_forward(model, gradients=True),
            Stage(f"{who}, dense model", len(data)) as stage,
        ):
            for number, batch in enumerate(data):
                ready = to_device(batch, device)
                found = _head_inputs(model, ready, logits=states is None)
                hidden_states = _chosen(found[0], real[number])
                finite = is_finite(hidden_states)
                if states is None and finite:
                    logits = _chosen(found[1], real[number])
                    self._head = _dense_head(who, model, hidden_states, logits)
                if not finite or not self._are_finite(hidden_states):
                    where = first_non_finite(model, partial(_logits, model, ready))
                    raise NonFiniteError(
                        f"{who}: NaN or infinite values in what the dense model predicts for "
                        f"batch {number + 1}, which begin in {where}; nothing was changed"
                    )
                if states is None:
                    width, dtype = hidden_states.shape[-1], hidden_states.dtype
                    states = DenseStates(counts, width, dtype, device, who)
                states.put(number, hidden_states)
                stage.advance()
            if states is None:
                raise SparseSSMError(f"{who} needs calibration data: there is no batch")
        self.batches = _WithDense(data, states, real)

    def _are_finite(self, hidden_states: Tensor) -> bool:
        """Whether predictions are numbers."""
        each = [
            self._head.logits(rows).sum(dtype=torch.float64)
            for rows in hidden_states.split(rows_at_once(len(self._head.weight)))
        ]
        return is_finite(torch.stack(each)) if each else True

    def fit(self, model: Any, weights: Weights = "mixers") -> Distilled:
        """Gradient steps as planned; taken back if they do not help.

        :param model: the model as it is now
        :param weights: which are fitted
        :raises SparseSSMError: there is no such weight, the model's predictions are no numbers, or
            the file to go on from is of another run
        """
        plan, most = self._plan, max(self.batches.tokens, default=0)
        with disable_onloading():
            fitted = fitted_parameters(model, weights)
            if not fitted:  # a removal of layers may have left attention alone
                raise SparseSSMError(
                    f"{self._who}: distill_weights = {weights} leaves nothing to fit: "
                    "the smaller model has no such weights"
                )
            room = needed(model, most, fitted, plan.checkpointing is not False).total
        with _in_place(self._who, model, room) as device:
            fitted = fitted_parameters(model, weights)
            self._head = self._head.to(device)
            tuner = Tuner(
                model,
                fitted,
                self.batches,
                plan,
                self._who,
                loss_fn=self.loss,
                measure=partial(self.divergence, model),
                resume=self._resume,
                capturable=_is_capturable,
                matrices=matrices_of(model, fitted) if self._takes_muon() else (),
            )
            with torch.enable_grad():
                found = tuner.run({})
        steps = tuner.budget.done
        asked = f"{steps} steps" if plan.steps else f"{clock(60 * plan.minutes)} minutes of steps"
        if found.diverged:
            logger.warning(
                f"{self._who}: {asked} at learning rate {plan.learning_rate:g} did not lower the "
                f"divergence of the predictions ({found.before:.4g} before, {found.after:.4g} "
                "after); the weights are what they were before the steps"
            )
        return Distilled(
            steps,
            found.before,
            found.after,
            found.diverged,
            round(steps / len(self.batches), 2),
        )

    def _takes_muon(self) -> bool:
        """Of ``auto``: where a step of all ranks reads enough tokens."""
        if self._plan.optimizer != "auto":
            return self._plan.optimizer == "muon"
        own = self.batches.tokens
        tokens, steps = distributed.total("tokens of a step", float(sum(own)), float(len(own)))
        return distributed.world_size() * tokens >= _ENOUGH * steps

    def divergence(self, model: Any) -> float:
        """Mean Kullback-Leibler divergence from the dense predictions, nats a token.

        Over the first batches, where there are many.
        """
        total = count = 0.0
        device = next(model.parameters()).device
        self._head = self._head.to(device)
        with fast_forward(model, gradients=True), torch.no_grad():
            for batch in self.batches[:_MEASURED]:
                batch = to_device(batch, device)
                tokens = len(batch[_DENSE])
                total += float(self.loss(model, batch)) * tokens
                count += tokens
        total, count = distributed.total("divergence of the predictions", total, count)
        return total / max(count, 1.0)

    def loss(self, model: Any, batch: Mapping[str, Any]) -> Tensor:
        """Mean divergence of one of ``batches``, nats a token, to be differentiated.

        :param model: on one device, perhaps with another head than the dense one
        :param batch: on the model's device
        """
        head, dense = model.get_output_embeddings(), batch[_DENSE]
        hidden_states = _chosen(_head_inputs(model, batch)[0], batch[_REAL])
        if batch[_SCALES] is not None:
            dense = dense.float() * batch[_SCALES]
        bias = getattr(head, "bias", None)
        return MeanDivergence.apply(
            hidden_states, head.weight, bias, self._head.scale, dense, self._head
        )


class _WithDense(Sequence[Any]):
    """Batches with what the dense model makes of them, fetched when they are read.

    Attributes: ``tokens``, of each, padding among them.
    """

    def __init__(
        self, data: Sequence[Any], states: DenseStates, real: Sequence[Tensor | None]
    ) -> None:
        self.states = states
        self.tokens = [positions(batch) for batch in data]
        self._data = data
        device = states.rows.device
        if device.type == "cuda":  # where these have room, tokens have it, too
            self._data = [to_device(batch, device) for batch in data]
        self._real = real

    def __len__(self) -> int:
        return len(self._data)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        index = range(len(self))[index]
        rows, scales = self.states.of(index)
        batch, real = dict(self._data[index]), self._real[index]
        mask = batch.get("attention_mask")
        if real is None and mask is not None and mask.numel() == len(rows):
            # nothing is padded: who asks the mask on a GPU, as every layer does, waits for it
            del batch["attention_mask"]
        return {**batch, _DENSE: rows, _SCALES: scales, _REAL: real}


def fitted_parameters(model: nn.Module, weights: Weights | None) -> dict[str, nn.Parameter]:
    """The floating-point weights of a model that are fitted, by name; no scales of quantization.

    :param weights: ``mixers``: all of all mixers; ``all``; ``all_but_vocabulary``: not those that
        embed or predict tokens; None: none
    """
    if weights is None:
        return {}
    if weights == "mixers":
        return mixer_parameters(model)
    left_out = _vocabulary(model) if weights == "all_but_vocabulary" else set()
    return {
        name: parameter
        for name, parameter in model.named_parameters()
        if parameter.is_floating_point()
        and not of_quantization(name)
        and id(parameter) not in left_out
    }


def mixer_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """All floating-point weights of all mixers, by name; no scales of quantization."""
    return {
        f"{name}.{own}": parameter
        for name, mixer in iter_mixers(model)
        for own, parameter in mixer.named_parameters()
        if parameter.is_floating_point() and not of_quantization(own)
    }


def matrices_of(model: Any, parameters: Mapping[str, nn.Parameter]) -> set[str]:
    """Names of the weights of linear layers, without those that embed or predict tokens.

    :param parameters: some of the model's, by name
    """
    linear = {id(m.weight) for m in model.modules() if isinstance(m, nn.Linear)}
    linear -= _vocabulary(model)
    return {
        name
        for name, parameter in parameters.items()
        if id(parameter) in linear and min(parameter.shape) > 1
    }


def _vocabulary(model: Any) -> set[int]:
    """Identities of the weights that embed or predict tokens."""
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    return {id(p) for module in ends if module is not None for p in module.parameters()}


def _is_capturable(batch: Mapping[str, Any]) -> bool:
    """Whether the loss of a batch asks nothing that only the GPU knows: no padding."""
    return set(batch) <= {"input_ids", "labels", _DENSE, _SCALES, _REAL} and batch[_REAL] is None


def _inputs(batch: Mapping[str, Any]) -> dict[str, Any]:
    """What the model needs for its logits; from labels it would make a loss, too."""
    ours = (_DENSE, _SCALES, _REAL, "labels")
    return {k: v for k, v in batch.items() if k not in ours}


def _logits(model: Any, batch: Mapping[str, Any]) -> Tensor:
    logits: Tensor = model(**_inputs(batch)).logits
    return logits


def _head_inputs(
    model: Any, batch: Mapping[str, Any], logits: bool = False
) -> tuple[Tensor, Tensor]:
    """(b, L, hidden_size) what the head multiplies, and what the model returns as logits.

    :param logits: whether these are wanted; otherwise they, which are large, are not made
    """
    head, found = model.get_output_embeddings(), []
    own = head.forward

    def take(hidden_states: Tensor) -> Tensor:
        found.append(hidden_states)
        return own(hidden_states) if logits else hidden_states

    with patch_attr(head, "forward", take):
        returned = _logits(model, batch)
    return found[-1], returned


def _chosen(hidden_states: Tensor, real: Tensor | None) -> Tensor:
    """(tokens, hidden_size) of (b, L, hidden_size), padding left out."""
    rows = hidden_states.flatten(0, -2)
    return rows if real is None else rows.index_select(0, real.to(rows.device))


def _dense_head(who: str, model: Any, hidden_states: Tensor, logits: Tensor) -> Head:
    """A copy of the model's head, with the factor between it and the logits.

    :param hidden_states: (tokens, hidden_size) what it multiplied
    :param logits: (tokens, vocabulary) of the model
    """
    head, logits = model.get_output_embeddings(), logits[:_COMPARED]
    scale = 1.0
    if is_finite(logits):  # what is not is refused with its place
        scale = _logit_scale(who, logits, head(hidden_states[:_COMPARED]))
    bias = getattr(head, "bias", None)
    weight = head.weight.detach().clone()
    return Head(weight, None if bias is None else bias.detach().clone(), scale)


@contextmanager
def _in_place(who: str, model: Any, room: int | None = None) -> Iterator[torch.device]:
    """:func:`undisturbed`, its head as its class has it, and all weights on one device.

    :param room: bytes that the work takes there; default those of the weights alone
    """
    if room is None:
        room = sum(parameter.nbytes for parameter in model.parameters())
    head = model.get_output_embeddings()
    with (
        # LLM Compressor lets it give nothing while a pipeline runs
        patch_attr(head, "forward", MethodType(type(head).forward, head)),
        disable_onloading(),
        undisturbed(model),
        on_compute_device(who, model, room) as device,
    ):
        yield device


def _logit_scale(who: str, logits: Tensor, raw: Tensor) -> float:
    """What the family multiplies the head's output by (Granite and FalconH1 do)."""
    logits, raw = logits.double(), raw.double()
    scale = float((logits * raw).sum() / raw.square().sum().clamp(min=1e-30))
    if not float((logits - scale * raw).norm()) <= _MULTIPLE * float(logits.norm()):
        raise SparseSSMError(f"{who}: the model's logits are no multiple of what its head gives")
    return scale
