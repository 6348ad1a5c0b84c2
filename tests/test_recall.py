"""Recall: what the probes ask, and how a model that recalls, or does not, is scored."""

import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from sparsessm_plugin.errors import SparseSSMError
from sparsessm_plugin.evaluation.recall import (
    PAIRS,
    SPAN,
    evaluate_recall,
    make_probes,
    sequences_of,
    vocabulary_of,
)
from sparsessm_plugin.evaluation.tasks import evaluate_tasks, load_tasks

VOCABULARY = torch.arange(5, 400)


class Copier(nn.Module):
    """Predicts what came after the last appearance of the same token, within some tokens."""

    def __init__(self, within: int, vocabulary: int = 400):
        super().__init__()
        self.within, self.vocabulary = within, vocabulary
        self.anchor = nn.Parameter(torch.zeros(()))
        self.config = SimpleNamespace(model_type="copier")

    @property
    def device(self):
        return self.anchor.device

    def forward(self, input_ids, use_cache):
        logits = torch.zeros(*input_ids.shape, self.vocabulary)
        for row, tokens in enumerate(input_ids.tolist()):
            last = {}
            for place, token in enumerate(tokens):
                if place and place - last.get(token, -math.inf) <= self.within:
                    logits[row, place, tokens[last[token] + 1]] = 20.0
                last[token] = place
        return SimpleNamespace(logits=logits)


def text(tokens: int = 3000) -> torch.Tensor:
    return torch.randint(5, 400, (tokens,), generator=torch.Generator().manual_seed(3))


def test_answers_stand_where_the_same_was_read_before():
    probes = make_probes(VOCABULARY, text() % 100 + 5, sequences=5)
    assert [p.name for p in probes] == [*["lookup", "repeat"] * 3, *["bigram"] * 3]
    for probe in probes:
        tokens, rows = probe.tokens, probe.rows
        assert torch.equal(tokens[rows, probe.places], tokens[rows, probe.first])
        # the question before the answer was read before it, too
        assert torch.equal(tokens[rows, probe.places - 1], tokens[rows, probe.first - 1])
        assert bool((rows.diff() >= 0).all())
        if probe.name == "repeat":
            assert bool((probe.places - probe.first == probe.distance).all())
            assert len(rows) == 5 * (SPAN - 1)
        if probe.name == "lookup":
            away = probe.places - probe.first
            assert abs(float(away.float().mean()) - probe.distance) < 1e-3
            assert int((away - probe.distance).abs().max()) < SPAN
            assert len(rows) == 5 * PAIRS
            # keys are asked for in another order, and no other token is a key or a value
            assert not bool((away == probe.distance).all())
            assert len(tokens[0, :SPAN].unique()) == SPAN
            middle = tokens[0, SPAN : probe.distance]
            assert not bool(torch.isin(middle, tokens[0, :SPAN]).any())


def test_bigrams_are_all_that_stand_twice():
    """Against a search of each passage by hand, in a text that repeats much."""
    words = text() % 20 + 5
    probes = [p for p in make_probes(VOCABULARY, words, sequences=3) if p.name == "bigram"]
    assert [p.distance for p in probes] == [32, 128, 512]
    found = {
        (int(row), int(place)): p.distance
        for p in probes
        for row, place in zip(p.rows, p.places, strict=True)
    }
    expected = {}
    for row, passage in enumerate(probes[0].tokens.tolist()):
        for place in range(1, len(passage)):
            pair = passage[place - 1 : place + 1]
            away = [place - q for q in range(1, place) if passage[q - 1 : q + 1] == pair]
            if away and min(away) <= 512:
                expected[row, place] = next(d for d in (32, 128, 512) if min(away) <= d)
    assert found == expected
    assert len(expected) > 500


@pytest.mark.parametrize("within", [0, 100, 10_000])
def test_who_recalls_so_far_is_right_so_far(within):
    """Losses and accuracies of a model that copies over at most so many tokens."""
    # no token of a passage stands in it twice
    probes = make_probes(torch.arange(5, 3000), torch.arange(5, 3000), sequences=4)
    done = []
    for result in evaluate_recall(Copier(within, 3000), probes, done.append):
        # where it knows nothing all tokens are equally likely
        assert result.loss_unseen > 5.0
        if result.distance + SPAN < within:
            assert result.loss < 0.01
            assert result.accuracy == 1.0
        elif result.distance - SPAN > within or not within:
            assert result.loss == pytest.approx(math.log(3000), abs=1e-4)
    assert sum(done) == sequences_of(probes) == 4 * 6


def test_losses_are_those_of_the_model(demo):
    model, tokenizer = demo
    vocabulary = vocabulary_of(tokenizer, model.config.vocab_size)
    assert not set(vocabulary.tolist()) & set(tokenizer.all_special_ids)
    assert int(vocabulary.max()) < model.config.vocab_size
    probes = make_probes(vocabulary, text() % 300 + 5, sequences=3, distances=(32,))
    for probe, result in zip(probes, evaluate_recall(model, probes), strict=True):
        tokens = probe.tokens.to(model.device)
        with torch.no_grad():
            losses = F.cross_entropy(
                model(input_ids=tokens).logits[:, :-1].mT, tokens[:, 1:], reduction="none"
            ).cpu()
        each = losses[probe.rows, probe.places - 1]
        assert result.loss == pytest.approx(float(each.mean()), rel=1e-4)
        assert result.loss_unseen == pytest.approx(
            float(losses[probe.rows, probe.first - 1].mean()), rel=1e-4
        )
        assert result.answers == len(each)
        if probe.name != "bigram":
            means = each.reshape(3, -1).mean(1)
            assert result.stderr == pytest.approx(float(means.std()) / 3**0.5, rel=1e-3)


def test_recall_is_a_task_that_needs_no_lm_eval(demo, monkeypatch):
    model, tokenizer = demo
    monkeypatch.setitem(__import__("sys").modules, "lm_eval", None)
    documents = ["The state forgets what it read long ago. " * 90]
    suite = load_tasks(["recall"], limit=2, text=documents)
    done = []
    found = evaluate_tasks(model, tokenizer, suite, progress=done.append)
    assert sum(done) == suite.requests_of(model, tokenizer)
    # the table shows a probe's mean, the report all distances
    assert found["recall"].subtasks == ("recall_lookup", "recall_repeat", "recall_bigram")
    assert set(found["recall"].metrics) == {"lookup_loss", "repeat_loss", "bigram_loss"}
    of_probe = found["recall_repeat"].metrics
    each = [of_probe[f"loss_{distance}"] for distance in (32, 128, 512)]
    assert all(metric.stderr is not None for metric in each)
    mean = found["recall"].metrics["repeat_loss"]
    assert mean.value == pytest.approx(sum(metric.value for metric in each) / 3)
    assert not mean.higher_is_better
    assert of_probe["acc"].higher_is_better
    assert found == evaluate_tasks(model, tokenizer, suite)
    without = evaluate_tasks(model, tokenizer, load_tasks(["recall"], limit=2))
    assert set(without["recall"].metrics) == {"lookup_loss", "repeat_loss"}
    lookup = found["recall_lookup"].metrics
    assert lookup["loss_32"] == without["recall_lookup"].metrics["loss_32"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"vocabulary": VOCABULARY[:50]}, "50 tokens in the vocabulary are too few; 128"),
        ({"longest": 40}, "the model takes 40 tokens, 64 are needed"),
        ({"text": text(100)}, "a text of 100 tokens is too short; 544 are needed"),
    ],
)
def test_what_is_too_short_is_refused(arguments, message):
    with pytest.raises(SparseSSMError, match=message):
        make_probes(**{"vocabulary": VOCABULARY, **arguments})


def test_distances_that_the_model_does_not_hold_are_left_out():
    assert {p.distance for p in make_probes(VOCABULARY, longest=200, sequences=1)} == {32, 128}


def test_a_loss_that_is_no_number():
    class Broken(Copier):
        def forward(self, input_ids, use_cache):
            return SimpleNamespace(logits=torch.full((*input_ids.shape, 400), math.nan))

    with pytest.raises(SparseSSMError, match="task recall: the model's loss is NaN"):
        evaluate_recall(Broken(1), make_probes(VOCABULARY, sequences=1))
