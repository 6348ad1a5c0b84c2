"""lm-eval's HFLM with fewer and fuller forward passes. Imports lm-eval."""

from collections.abc import Callable
from typing import Any

import torch
from lm_eval.models.huggingface import HFLM

from sparsessm_plugin.backends.products import fast_products
from sparsessm_plugin.errors import SparseSSMError

Encodings = dict[tuple[str, bool | None, int | None], list[int]]
# of one forward pass, so that a large vocabulary does not fill the memory
_MAX_LOGITS = 2**28
# of one float32 copy of those that are scored
_LOGITS_A_STEP = 2**26


class BatchedLM(HFLM):
    """Log-likelihoods as HFLM computes them, to rounding.

    HFLM builds and scores every request by itself and asks for the logits of all positions. Here a
    batch is one index into the logits of the positions that are scored, and each distinct
    input passes the model once. Inputs are sorted by length and padded on the right, where in a
    causal model nothing that is scored can see it, so that no mask is needed. No cache is
    made, which would keep the mixers from the scans of :func:`fast_forward`.

    :param model: transformers causal language model
    :param tokenizer: its tokenizer; gets a padding token if it has none
    :param batch_size: inputs a forward pass, fewer where their logits would be too many
    :param encodings: token ids of strings seen before, for the next model with this tokenizer
    :param progress: called with the number of requests done after each pass
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        batch_size: int,
        encodings: Encodings,
        progress: Callable[[int], Any] | None = None,
    ):
        super().__init__(
            pretrained=model, tokenizer=tokenizer, batch_size=batch_size, softmax_dtype="float32"
        )
        self.encodings = encodings
        self.progress = progress

    def tok_encode(
        self,
        string: str,
        add_special_tokens: bool | None = None,
        left_truncate_len: int | None = None,
        **kwargs: Any,
    ) -> list[int]:
        key = (string, add_special_tokens, left_truncate_len)
        if key not in self.encodings:
            self.encodings[key] = super().tok_encode(
                string, add_special_tokens, left_truncate_len, **kwargs
            )
        return self.encodings[key]

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = True) -> list[Any]:
        return super().loglikelihood(requests, disable_tqdm=True)  # progress is the caller's

    def _loglikelihood_tokens(
        self,
        requests: list[tuple[Any, list[int], list[int]]],
        disable_tqdm: bool = False,
        override_bs: int | None = None,
    ) -> list[tuple[float, bool]]:
        """Of each request its continuation's log-likelihood, and whether it is the greedy one.

        :param requests: (texts, context ids, continuation ids), neither of them empty
        """
        inputs: dict[tuple[int, ...], list[int]] = {}
        for number, (_, context, continuation) in enumerate(requests):
            # too long a text loses its beginning; the last token is only predicted
            tokens = (context + continuation)[-(self.max_length + 1) : -1]
            inputs.setdefault(tuple(tokens), []).append(number)
        order = sorted(inputs, key=lambda tokens: (-len(tokens), tokens))
        results: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
        start = 0
        while start < len(order):
            most = max(1, _MAX_LOGITS // (len(order[start]) * self.model.config.vocab_size))
            batch = order[start : start + min(override_bs or int(self.batch_size), most)]
            start += len(batch)
            numbers = [number for tokens in batch for number in inputs[tokens]]
            rows = [row for row, tokens in enumerate(batch) for _ in inputs[tokens]]
            continuations = [requests[number][2] for number in numbers]
            for number, result in zip(
                numbers, self._score(batch, rows, continuations), strict=True
            ):
                results[number] = result
            if self.progress is not None:
                self.progress(len(numbers))
        return results

    @torch.no_grad()
    def _score(
        self, batch: list[tuple[int, ...]], rows: list[int], continuations: list[list[int]]
    ) -> list[tuple[float, bool]]:
        """Score continuations that end right after the inputs in the given rows of a batch.

        :param batch: inputs, the longest first
        :param rows: for each continuation the row of its input
        :raises SparseSSMError: the model computes NaN
        """
        width = len(batch[0])
        padded = torch.tensor([[*tokens, *[0] * (width - len(tokens))] for tokens in batch])
        starts = [len(batch[r]) - len(c) for r, c in zip(rows, continuations, strict=True)]
        first = min(starts)
        device = self.device
        with fast_products(device):
            logits = self.model(
                input_ids=padded.to(device), use_cache=False, logits_to_keep=width - first
            ).logits  # (batch, width - first, vocabulary)
        logits = logits.flatten(0, 1)
        begins = [r * (width - first) + s - first for r, s in zip(rows, starts, strict=True)]
        positions = [
            b + i for b, c in zip(begins, continuations, strict=True) for i in range(len(c))
        ]
        targets = torch.tensor([token for c in continuations for token in c], device=device)
        owners = torch.tensor([n for n, c in enumerate(continuations) for _ in c], device=device)
        index = torch.tensor(positions, device=device)
        total = torch.zeros(len(rows), dtype=torch.float64, device=device)
        missed = torch.zeros(len(rows), dtype=torch.int64, device=device)
        step = max(1, _LOGITS_A_STEP // logits.shape[-1])
        for some, target, owner in zip(
            index.split(step), targets.split(step), owners.split(step), strict=True
        ):
            scores = logits[some].float()
            likelihood = scores.gather(1, target[:, None])[:, 0] - scores.logsumexp(-1)
            total.index_add_(0, owner, likelihood.double())
            missed.index_add_(0, owner, (scores.argmax(-1) != target).long())
        if bool(total.isnan().any()):
            raise SparseSSMError("the model's log-likelihoods are NaN")
        return [
            (likelihood, not errors)
            for likelihood, errors in zip(total.tolist(), missed.tolist(), strict=True)
        ]
