"""Perplexity over non-overlapping windows."""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from sparsessm_plugin.backends.products import fast_products
from sparsessm_plugin.errors import SparseSSMError
from sparsessm_plugin.families.fast_forward import fast_forward


@dataclass(frozen=True)
class Perplexity:
    """exp of the mean negative log-likelihood of the predicted tokens.

    :param perplexity: per token
    :param nll: mean negative log-likelihood, nats per token
    :param tokens: predicted tokens: every token of a window but its first
    :param windows: windows evaluated
    :param window: tokens a window
    """

    perplexity: float
    nll: float
    tokens: int
    windows: int
    window: int

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, for a report."""
        return asdict(self)


@torch.no_grad()
def evaluate_perplexity(
    model: Any,
    samples: Tensor,
    batch_size: int = 1,
    progress: Callable[[int], Any] | None = None,
) -> Perplexity:
    """Perplexity of a causal language model.

    :param model: transformers causal language model
    :param samples: (windows, length) token ids
    :param batch_size: windows a forward pass
    :param progress: called with the number of windows done after each pass
    :raises SparseSSMError: the model's loss is not a finite number
    """
    total, count = 0.0, 0
    training = model.training
    model.eval()
    try:
        with fast_forward(model), fast_products(model.device):
            for batch in samples.split(batch_size):
                batch = batch.to(model.device)
                logits = model(input_ids=batch, use_cache=False).logits[:, :-1]
                # window by window: float32 logits of a whole batch would be large
                for row, target in zip(logits, batch[:, 1:], strict=True):
                    losses = F.cross_entropy(row.float(), target, reduction="none")
                    total += float(losses.double().sum())
                    count += target.numel()
                if progress is not None:
                    progress(len(batch))
    finally:
        model.train(training)
    nll = total / count
    if not math.isfinite(nll):
        raise SparseSSMError("the model's loss on the text is NaN or infinite")
    return Perplexity(
        perplexity=math.exp(min(nll, 700.0)),
        nll=nll,
        tokens=count,
        windows=samples.shape[0],
        window=samples.shape[1],
    )
