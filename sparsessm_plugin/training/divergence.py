"""The divergence of two predictions of every token, and its gradient, a few tokens at a time."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from sparsessm_plugin.training.dense import Head

# Logits that are float32 at once: 256 MB, and a few times that for what becomes of them.
_LOGITS = 2**26


def divergences(reference: Tensor, logits: Tensor) -> Tensor:
    """Kullback-Leibler divergence of two predictions of every token, in nats.

    :param reference: (..., vocabulary) logits
    :param logits: (..., vocabulary)
    :return: (...) float32
    """
    return divergences_from(reference.float().log_softmax(-1), logits)


def divergences_from(expected: Tensor, logits: Tensor) -> Tensor:
    """:func:`divergences` where the logarithms of the first prediction are there already.

    :param expected: (..., vocabulary) float32 logarithms of probabilities
    :param logits: (..., vocabulary)
    :return: (...) float32
    """
    return (expected.exp() * (expected - logits.float().log_softmax(-1))).sum(-1)


def rows_at_once(vocabulary: int) -> int:
    """How many tokens' logits are made at once."""
    return max(1, _LOGITS // vocabulary)


class MeanDivergence(torch.autograd.Function):
    """Mean over tokens, from what the two heads multiply.

    The logits' gradient, the difference of the two predictions, is there as soon as these are; so
    the gradients of what the head multiplies and of the head are made in the same go, and no
    logits are kept or made twice.

    ``apply(hidden_states, weight, bias, scale, dense, dense_head)``: hidden_states (tokens, M) of
    the model; weight (vocabulary, M), bias (vocabulary,) or None and scale of its head; dense
    (tokens, M of the dense model) and the dense :class:`Head`. Returns a float32 scalar, nats.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden_states: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        scale: float,
        dense: Tensor,
        dense_head: Head,
    ) -> Tensor:
        with torch.autocast(hidden_states.device.type, enabled=False):
            return _forward(ctx, hidden_states, weight, bias, scale, dense, dense_head)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        found = (None if g is None else (g * grad).to(d) for g, d in zip(*ctx.found, strict=True))
        ctx.found = None
        return (*found, None, None, None)


def _forward(
    ctx: Any,
    hidden_states: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    scale: float,
    dense: Tensor,
    dense_head: Head,
) -> Tensor:
    head = Head(weight.detach(), None if bias is None else bias.detach(), scale)
    wanted = ctx.needs_input_grad[:3]
    tokens, hidden = len(hidden_states), hidden_states.detach().to(weight.dtype)
    to_hidden = torch.empty_like(hidden) if wanted[0] else None
    whole = {"dtype": torch.float32, "device": weight.device}
    to_weight = torch.zeros(weight.shape, **whole) if wanted[1] else None  # type: ignore[call-overload]
    to_bias = torch.zeros(len(weight), **whole) if bias is not None and wanted[2] else None  # type: ignore[call-overload]
    total = torch.zeros((), dtype=torch.float64, device=weight.device)
    step = rows_at_once(len(weight))
    for start in range(0, tokens, step):
        part = slice(start, start + step)
        expected = dense_head.logits(dense[part]).log_softmax(-1)
        found = head.logits(hidden[part]).log_softmax(-1)
        predicted = expected.exp()
        total += expected.sub_(found).mul_(predicted).sum(-1).sum(dtype=torch.float64)
        if not any(wanted):
            continue
        to_logits = found.exp_().sub_(predicted)  # by token
        if to_bias is not None:
            to_bias += to_logits.sum(0)
        to_logits = to_logits.to(weight.dtype)
        if to_hidden is not None:
            torch.mm(to_logits, head.weight, out=to_hidden[part])
        if to_weight is not None:
            to_weight += to_logits.T @ hidden[part]
    share = scale / max(1, tokens)
    ctx.found = (
        [None if g is None else g.mul_(share) for g in (to_hidden, to_weight, to_bias)],
        [hidden_states.dtype, weight.dtype, None if bias is None else bias.dtype],
    )
    return (total / max(1, tokens)).float()
