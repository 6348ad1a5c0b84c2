"""Fit a model that has become smaller to what the dense one predicted, without labels."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from types import MethodType
from typing import Any

import torch
from compressed_tensors.offload import disable_onloading
from compressed_tensors.utils import patch_attr
from loguru import logger
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sparsessm_plugin import distributed
from sparsessm_plugin.calibration.contexts import of_quantization, undisturbed
from sparsessm_plugin.calibration.finite import is_finite
from sparsessm_plugin.errors import SparseSSMError
from sparsessm_plugin.families import iter_mixers
from sparsessm_plugin.families.fast_forward import fast_forward
from sparsessm_plugin.training.gradients import on_compute_device, to_device
from sparsessm_plugin.training.non_finite import NonFiniteError, first_non_finite
from sparsessm_plugin.training.tuner import Tuner

_DENSE = "dense_hidden_states"  # in a batch: (b, L, hidden_size) what the dense head multiplied
# How far the logits may be from a multiple of what the head gives, relative, in any dtype.
_MULTIPLE = 0.02
# Logits that are turned to float32 at once: 256 MB, and several times that for what becomes of it.
_LOGITS = 2**26
# Batches whose divergence is measured before and after a fit; more say nothing new.
_MEASURED = 32


@dataclass(frozen=True)
class Distilled:
    """What a fit to the dense predictions has done.

    :param steps: gradient steps
    :param divergence_before: from the dense predictions, nats a token
    :param divergence_after: likewise, of what the steps made, taken back or not
    :param diverged: whether the steps were taken back
    """

    steps: int
    divergence_before: float
    divergence_after: float
    diverged: bool


class Distillation:
    """What the dense model predicts for the calibration data, and a fit of the mixers to it.

    Kept are the inputs of the head, tokens x hidden_size numbers in main memory, since the head
    itself does not change.

    Attributes: ``batches``, those of the data with what the dense model makes of them; read by
    :meth:`loss`.

    :param model: dense, with its language head; all weights on one device
    :param data: batches that can be read again
    :param who: asks for it, for messages: a field and, where that is one, its value
    :raises NonFiniteError: predictions that are NaN or infinite
    :raises SparseSSMError: no language head, weights on several devices, or logits that are no
        multiple of what the head gives
    """

    def __init__(self, model: Any, data: Any, who: str) -> None:
        head = model.get_output_embeddings()
        if head is None:
            raise SparseSSMError(
                f"{who}: it needs a language head, and {type(model).__name__} has none"
            )
        self._who = who
        self._scale = 1.0
        self.batches: list[dict[str, Any]] = []
        inputs: list[Tensor] = []
        handle = head.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
        try:
            with _in_place(who, model) as device:
                for number, batch in enumerate(data, 1):
                    ready = to_device(batch, device)
                    logits = self._logits(model, ready)
                    hidden_states = inputs.pop()
                    if not _real_are_finite(logits, ready):
                        where = first_non_finite(model, partial(self._logits, model, ready))
                        raise NonFiniteError(
                            f"{who}: NaN or infinite values in what the dense model predicts for "
                            f"batch {number}, which begin in {where}; nothing was changed"
                        )
                    if not self.batches:
                        self._scale = _logit_scale(who, logits[:1], head(hidden_states[:1]))
                        inputs.clear()
                    self.batches.append({**batch, _DENSE: hidden_states.cpu()})
        finally:
            handle.remove()

    @staticmethod
    def _logits(model: Any, batch: Mapping[str, Any]) -> Tensor:
        return model(**_inputs(batch)).logits

    def fit(self, model: Any, steps: int, learning_rate: float) -> Distilled:
        """Gradient steps on all weights of all mixers; taken back if they do not help.

        :param model: the model as it is now
        :param steps: of Adam, a batch each
        :param learning_rate: the highest
        :raises SparseSSMError: the model's predictions are no numbers
        """
        with _in_place(self._who, model):
            tuner = Tuner(
                model,
                mixer_parameters(model),
                self.batches,
                steps,
                learning_rate,
                loss_fn=self.loss,
                measure=partial(self.divergence, model),
            )
            with torch.enable_grad():
                found = tuner.run(steps, {})
        if found.diverged:
            logger.warning(
                f"{self._who}: {steps} steps at learning rate {learning_rate:g} did not lower the "
                f"divergence of the predictions ({found.before:.4g} before, {found.after:.4g} "
                "after); the weights are what they were before the steps"
            )
        return Distilled(steps, found.before, found.after, found.diverged)

    def divergence(self, model: Any) -> float:
        """Mean Kullback-Leibler divergence from the dense predictions, nats a token.

        Over the first batches, where there are many.
        """
        total = count = 0.0
        device = next(model.parameters()).device
        with fast_forward(model):
            for batch in self.batches[:_MEASURED]:
                batch = to_device(batch, device)
                each = self._divergences(model, batch)
                total += float(torch.stack([row.double().sum() for row in each]).sum())
                count += sum(row.numel() for row in each)
        total, count = distributed.total("divergence of the predictions", total, count)
        return total / max(count, 1.0)

    def loss(self, model: Any, batch: Mapping[str, Any]) -> Tensor:
        """Mean divergence of one of ``batches``, nats a token, to be differentiated.

        :param model: of the same head as the dense one
        :param batch: on the model's device
        """
        return torch.cat(self._divergences(model, batch)).mean()

    def _divergences(self, model: Any, batch: Mapping[str, Any]) -> list[Tensor]:
        """(tokens,) of a few rows each, padding left out."""
        logits = model(**_inputs(batch)).logits
        mask = batch.get("attention_mask")
        head, dense = model.get_output_embeddings(), batch[_DENSE]
        # float32 logits of a whole batch may be large
        rows = max(1, _LOGITS // logits[0].numel())
        each = []
        for start in range(0, len(logits), rows):
            part = slice(start, start + rows)
            found = checkpoint(
                self._part,
                head,
                dense[part],
                logits[part],
                use_reentrant=False,
                preserve_rng_state=False,
            )
            each.append(found.flatten() if mask is None else found[mask[part].bool()])
        return each

    def _part(self, head: Any, hidden_states: Tensor, logits: Tensor) -> Tensor:
        with torch.no_grad():
            reference = self._scale * head(hidden_states)
        return divergences(reference, logits)


def divergences(reference: Tensor, logits: Tensor) -> Tensor:
    """Kullback-Leibler divergence of two predictions of every token, in nats.

    :param reference: (..., vocabulary) logits
    :param logits: (..., vocabulary)
    :return: (...) float32
    """
    expected, found = (x.float().log_softmax(-1) for x in (reference, logits))
    return (expected.exp() * (expected - found)).sum(-1)


def mixer_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """All floating-point weights of all mixers, by name; no scales of quantization."""
    return {
        f"{name}.{own}": parameter
        for name, mixer in iter_mixers(model)
        for own, parameter in mixer.named_parameters()
        if parameter.is_floating_point() and not of_quantization(own)
    }


def _real_are_finite(logits: Tensor, batch: Mapping[str, Any]) -> bool:
    """Whether predictions are numbers, wherever no padding is."""
    mask = batch.get("attention_mask")
    return is_finite(logits) or (mask is not None and is_finite(logits[mask.bool()]))


def _inputs(batch: Mapping[str, Any]) -> dict[str, Any]:
    """What the model needs for its logits; from labels it would make a loss, too."""
    return {k: v for k, v in batch.items() if k not in (_DENSE, "labels")}


@contextmanager
def _in_place(who: str, model: Any) -> Iterator[torch.device]:
    """:func:`undisturbed`, its head as its class has it, and all weights on one device."""
    head = model.get_output_embeddings()
    with (
        # LLM Compressor lets it give nothing while a pipeline runs
        patch_attr(head, "forward", MethodType(type(head).forward, head)),
        disable_onloading(),
        undisturbed(model),
        on_compute_device(who, model) as device,
    ):
        yield device


def _logit_scale(who: str, logits: Tensor, raw: Tensor) -> float:
    """What the family multiplies the head's output by (Granite and FalconH1 do)."""
    logits, raw = logits.double(), raw.double()
    scale = float((logits * raw).sum() / raw.square().sum().clamp(min=1e-30))
    if not float((logits - scale * raw).norm()) <= _MULTIPLE * float(logits.norm()):
        raise SparseSSMError(f"{who}: the model's logits are no multiple of what its head gives")
    return scale
