"""What perplexity hides: whether a model still recalls what it read some tokens ago.

Three probes, all scored by the loss of the tokens that recall would tell:

- *lookup*: pairs of a key and a value, then other tokens, then the keys again in another order,
  each followed by its value (associative recall). All tokens are drawn from the vocabulary
  at random, so that nothing but the context tells the answer;
- *repeat*: a span, then what follows it, then the span again, of which all tokens but the first are
  asked for (the induction of arXiv 2209.11895). The span is one of a text, or random
  tokens where no text is given. Models of a few million parameters recall nothing that is random;
- *bigram*: in a text as it is, the second token of each pair of neighbours that has stood in the
  window before (the "AR hits" of Zoology, arXiv 2312.04927).

Each is asked at growing distances. A loss as high as that of the same tokens at their first
appearance (``loss_unseen``) says that the model recalls nothing.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from itertools import groupby, pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from sparsessm_plugin.backends.products import fast_products
from sparsessm_plugin.errors import SparseSSMError
from sparsessm_plugin.families.fast_forward import fast_forward

NAME = "recall"
DISTANCES = (32, 128, 512)  # tokens from what is looked up to the question
PAIRS = 16  # of a key and a value, in a lookup
SPAN = 2 * PAIRS  # tokens that are repeated; as many as all pairs have
SEQUENCES = 32  # a probe and distance
_SEED = 0
_LONGEST = 2**14  # tokens a forward pass


@dataclass(frozen=True)
class Probe:
    """Sequences of one length, and where in them answers stand.

    :param name: ``lookup``, ``repeat`` or ``bigram``
    :param distance: tokens between an answer and where it was read first; for ``bigram`` at most
    :param tokens: (sequences, length) int64
    :param rows: (answers,) sequence of each answer, ascending
    :param places: (answers,) its position, 1 or more
    :param first: (answers,) where the same token was read first
    """

    name: str
    distance: int
    tokens: Tensor
    rows: Tensor
    places: Tensor
    first: Tensor


@dataclass(frozen=True)
class Recalled:
    """How well the answers of a probe are predicted.

    :param name: of the probe
    :param distance: of the probe, tokens
    :param loss: mean negative log-likelihood of the answers, nats
    :param stderr: standard error of the loss over sequences; None for a single one
    :param accuracy: share of the answers that are the most likely token
    :param loss_unseen: loss of the same tokens where they were read first
    :param answers: how many
    """

    name: str
    distance: int
    loss: float
    stderr: float | None
    accuracy: float
    loss_unseen: float
    answers: int


def make_probes(
    vocabulary: Tensor,
    text: Tensor | None = None,
    longest: int | None = None,
    sequences: int = SEQUENCES,
    distances: tuple[int, ...] = DISTANCES,
    seed: int = _SEED,
) -> list[Probe]:
    """Sequences for the probes, the same whenever the arguments are.

    :param vocabulary: (V,) int64 ids to draw from
    :param text: (tokens,) ids of a text; None for random spans, and no ``bigram``
    :param longest: tokens that the model takes; distances that need more are left out
    :param sequences: for each probe and distance
    :param distances: tokens, ascending, each at least :data:`SPAN`
    :raises SparseSSMError: too few tokens in the vocabulary or the text, or not even the shortest
        distance fits the model
    """
    kept = [d for d in distances if longest is None or d + SPAN <= longest]
    if not kept:
        raise SparseSSMError(
            f"task {NAME}: the model takes {longest} tokens, {distances[0] + SPAN} are needed"
        )
    if len(vocabulary) < 4 * SPAN:
        raise SparseSSMError(
            f"task {NAME}: {len(vocabulary)} tokens in the vocabulary are too few; {4 * SPAN} are "
            "needed"
        )
    length = kept[-1] + SPAN
    if text is not None and len(text) < length:
        raise SparseSSMError(
            f"task {NAME}: a text of {len(text)} tokens is too short; {length} are needed"
        )
    generator = torch.Generator().manual_seed(seed)
    probes = []
    for distance in kept:
        draw = partial(_random_tokens, vocabulary, distance, generator)
        probes.append(
            _probe("lookup", distance, [_lookup(draw(), generator) for _ in range(sequences)])
        )
        if text is not None:
            draw = partial(_passage, text, distance, generator)
        probes.append(_probe("repeat", distance, [_repeat(draw()) for _ in range(sequences)]))
    if text is not None:
        passages = torch.stack([_passage(text, length, generator) for _ in range(sequences)])
        probes += _bigrams(passages, kept)
    return probes


Question = tuple[Tensor, Tensor, Tensor]  # (length,) tokens, (answers,) places, (answers,) first


def _probe(name: str, distance: int, questions: list[Question]) -> Probe:
    tokens, places, first = (torch.stack(column) for column in zip(*questions, strict=True))
    rows = torch.arange(len(tokens)).repeat_interleave(places.shape[1])
    return Probe(name, distance, tokens, rows, places.flatten(), first.flatten())


def _random_tokens(vocabulary: Tensor, distance: int, generator: torch.Generator) -> Tensor:
    """(distance,) ids: :data:`SPAN` distinct ones, then others, which may repeat."""
    order = vocabulary[torch.randperm(len(vocabulary), generator=generator)]
    others = order[SPAN:]
    more = torch.randint(len(others), (distance - SPAN,), generator=generator)
    return torch.cat((order[:SPAN], others[more]))


def _passage(text: Tensor, length: int, generator: torch.Generator) -> Tensor:
    """(length,) ids of a text from a random place on."""
    start = int(torch.randint(len(text) - length + 1, (), generator=generator))
    return text[start : start + length]


def _lookup(start: Tensor, generator: torch.Generator) -> Question:
    asked = torch.randperm(PAIRS, generator=generator)
    questions = start[:SPAN].reshape(PAIRS, 2)[asked].flatten()
    places = len(start) + 1 + 2 * torch.arange(PAIRS)
    return torch.cat((start, questions)), places, 2 * asked + 1


def _repeat(start: Tensor) -> Question:
    again = torch.arange(1, SPAN)
    return torch.cat((start, start[:SPAN])), len(start) + again, again


def _bigrams(passages: Tensor, distances: list[int]) -> list[Probe]:
    """A probe for each distance that some answer has: up to it, and beyond the one before."""
    found: dict[int, list[tuple[int, int, int]]] = {distance: [] for distance in distances}
    for row, passage in enumerate(passages.tolist()):
        last: dict[tuple[int, int], int] = {}
        first: dict[tuple[int, int], int] = {}
        for place, pair in enumerate(pairwise(passage), start=1):
            if pair in last:
                within = next((d for d in distances if place - last[pair] <= d), None)
                if within is not None:
                    found[within].append((row, place, first[pair]))
            last[pair] = place
            first.setdefault(pair, place)
    return [
        Probe("bigram", distance, passages, *torch.tensor(answers).T)
        for distance, answers in found.items()
        if answers
    ]


def vocabulary_of(tokenizer: Any, size: int) -> Tensor:
    """(V,) ids of ordinary tokens: no special ones, none above the model's embedding.

    :param size: rows of the embedding
    """
    special = {*tokenizer.all_special_ids, *getattr(tokenizer, "added_tokens_decoder", {})}
    known = range(min(len(tokenizer), size))
    return torch.tensor([token for token in known if token not in special], dtype=torch.int64)


@torch.no_grad()
def evaluate_recall(
    model: Any, probes: Iterable[Probe], progress: Callable[[int], Any] | None = None
) -> list[Recalled]:
    """Score a model at probes; nothing of it changes.

    :param model: transformers causal language model
    :param progress: called with the number of sequences done after each pass
    :raises SparseSSMError: a loss that is not a finite number
    """
    training = model.training
    model.eval()
    results: list[Recalled] = []
    try:
        with fast_forward(model), fast_products(model.device):
            for _, same in groupby(probes, key=lambda probe: id(probe.tokens)):
                results += _evaluate(model, list(same), progress or (lambda done: None))
    finally:
        model.train(training)
    return results


def _evaluate(model: Any, probes: list[Probe], progress: Callable[[int], Any]) -> list[Recalled]:
    """Of probes that ask for other tokens of the same sequences, which pass the model once."""
    passages = probes[0].tokens
    losses: list[list[Tensor]] = [[] for _ in probes]
    unseen: list[list[Tensor]] = [[] for _ in probes]
    hits = [0] * len(probes)
    step = max(1, _LONGEST // passages.shape[1])
    for start in range(0, len(passages), step):
        tokens = passages[start : start + step].to(model.device)
        # the last token is only predicted
        logits = model(input_ids=tokens[:, :-1], use_cache=False).logits
        for number, probe in enumerate(probes):
            here = (probe.rows >= start) & (probe.rows < start + step)
            rows, places, first = (x[here] for x in (probe.rows - start, probe.places, probe.first))
            loss, right = _losses(logits, tokens, rows, places)
            losses[number].append(loss)
            unseen[number].append(_losses(logits, tokens, rows, first)[0])
            hits[number] += int(right.sum())
        progress(len(tokens))
    return [
        _recalled(probe, torch.cat(loss), torch.cat(before), right)
        for probe, loss, before, right in zip(probes, losses, unseen, hits, strict=True)
    ]


def _recalled(probe: Probe, loss: Tensor, before: Tensor, right: int) -> Recalled:
    if not bool(loss.isfinite().all()):
        raise SparseSSMError(f"task {NAME}: the model's loss is NaN or infinite")
    return Recalled(
        probe.name,
        probe.distance,
        float(loss.mean()),
        _stderr(loss, probe.rows),
        right / len(loss),
        float(before.mean()),
        len(loss),
    )


def _losses(logits: Tensor, tokens: Tensor, rows: Tensor, places: Tensor) -> tuple[Tensor, Tensor]:
    """(answers,) float64 loss of the tokens at these places, and whether they are the likeliest."""
    rows, places = rows.to(tokens.device), places.to(tokens.device)
    predicted, targets = logits[rows, places - 1].float(), tokens[rows, places]
    loss = F.cross_entropy(predicted, targets, reduction="none")
    return loss.double().cpu(), (predicted.argmax(-1) == targets).cpu()


def _stderr(loss: Tensor, rows: Tensor) -> float | None:
    """Of the mean; the answers of one sequence depend on each other, sequences do not."""
    _, rows = rows.unique(return_inverse=True)
    sequences = int(rows.max()) + 1
    if sequences < 2:
        return None
    sums = torch.zeros(sequences, dtype=loss.dtype).index_add_(0, rows, loss - loss.mean())
    spread = sums.square().sum() * sequences / (sequences - 1)
    return float(spread.sqrt() / len(loss))


def sequences_of(probes: Iterable[Probe]) -> int:
    """Sequences that pass the model, for a progress bar."""
    return sum(len(next(same).tokens) for _, same in groupby(probes, key=lambda p: id(p.tokens)))
