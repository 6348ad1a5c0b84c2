"""What experiments on trained checkpoints share: texts, perplexity, recall, rows of seeds."""

import math
import statistics
from collections.abc import Callable, Iterable
from typing import Any

import torch
from harness import Configuration, Row, assets
from pydantic import Field

from sparsessm_plugin.evaluation.data import calibration_loader, read_texts, tokenize, windows
from sparsessm_plugin.recipes import CheckedRecipe, parse_recipe
from sparsessm_plugin.recipes.pruning import ModelSource, prune

CALIBRATION = "corpus/calibration.jsonl"
TEXTS = {"corpus": "corpus/validation.jsonl", "wikitext2": "wikitext2/test.detok.txt"}
HELD_BACK = 100 * 512  # tokens at the end of the calibration text, for development
RECALL = ("lookup", "repeat", "bigram")


class OfTexts(Configuration):
    """What is calibrated and evaluated on."""

    models: list[str] = Field(["mamba-25m"], description="checkpoints of the assets")
    seeds: int = Field(3, description="draws of calibration text")
    windows: int = Field(256, description="calibration windows")
    length: int = Field(512, description="tokens a calibration window")
    batch_size: int = Field(16, description="windows")
    evaluate: int = Field(2048, description="tokens a window of evaluation")
    evaluate_windows: int | None = Field(None, description="of a text, at most so many")


def stream_of(path: str, tokenizer: Any) -> torch.Tensor:
    """(tokens,) of a text of the assets."""
    return tokenize(read_texts(assets() / "data" / path), tokenizer)


def windows_of(path: str, tokenizer: Any, length: int, most: int | None = None) -> torch.Tensor:
    """(windows, length) of a text of the assets."""
    return windows(stream_of(path, tokenizer), length, path)[:most]


class Checkpoint:
    """A checkpoint of the assets, windows to calibrate on, and the texts that it is evaluated on.

    :param chosen: has the fields of :class:`OfTexts`
    :param batch_size: windows of evaluation
    """

    def __init__(self, name: str, chosen: Any, batch_size: int):
        self.name, self.chosen, self.batch_size = name, chosen, batch_size
        self.source = ModelSource(str(assets() / "models" / name))
        self.tokenizer: Any = self.source.load_tokenizer()
        stream = stream_of(CALIBRATION, self.tokenizer)
        self.samples = windows(stream[:-HELD_BACK], chosen.length, CALIBRATION)
        streams = {"development": stream[-HELD_BACK:]}
        if not getattr(chosen, "development", False):
            streams = {kind: stream_of(path, self.tokenizer) for kind, path in TEXTS.items()}
        self.tests = {
            kind: windows(tokens, chosen.evaluate, kind)[: chosen.evaluate_windows]
            for kind, tokens in streams.items()
        }

    def evaluate(self, model: Any) -> dict[str, float]:
        """Perplexity on each text."""
        return perplexities(model, self.tests, self.batch_size)

    def loader(self, count: int, seed: int) -> Any:
        """Batches of so many calibration windows."""
        return calibration_loader(self.samples, count, self.chosen.batch_size, seed)

    def prune(self, built: CheckedRecipe, count: int, seed: int, model: Any = None) -> Any:
        """The checkpoint, or the model that it is, after a recipe."""
        model = self.source.load() if model is None else model
        return prune(model, built, self.loader(count, seed), self.tokenizer)


def perplexities(model: Any, tests: dict[str, Any], batch_size: int) -> dict[str, float]:
    """Perplexity on each text, given as windows."""
    from sparsessm_plugin.evaluation.perplexity import evaluate_perplexity

    return {
        kind: evaluate_perplexity(model, samples, batch_size).perplexity
        for kind, samples in tests.items()
    }


def recall_probes(source: Any, tokenizer: Any, text: torch.Tensor, sequences: int) -> list[Any]:
    """Probes of recall, as ``evaluate --tasks recall`` asks them; none of no sequences.

    :param source: a checkpoint, of which the number of tokens is read
    :param text: (tokens,) ids of the text whose spans are repeated
    """
    from sparsessm_plugin.evaluation.recall import make_probes, vocabulary_of

    if not sequences:
        return []
    rows = source.load_skeleton().get_input_embeddings().num_embeddings
    return make_probes(vocabulary_of(tokenizer, rows), text, sequences=sequences)


def recalled(model: Any, probes: list[Any]) -> dict[str, float | None]:
    """Perplexity of the answers of each probe, mean over the distances; None where not asked."""
    from sparsessm_plugin.evaluation.recall import evaluate_recall

    losses: dict[str, list[float]] = {name: [] for name in RECALL}
    for each in evaluate_recall(model, probes):
        losses[each.name].append(each.loss)
    return {
        name: math.exp(statistics.mean(values)) if values else None
        for name, values in losses.items()
    }


def recipe(modifier: str, fields: str) -> CheckedRecipe:
    """A recipe of one modifier, its fields as YAML."""
    text = f"prune_stage:\n  prune_modifiers:\n    {modifier}: {{{fields}}}\n"
    return parse_recipe(text, "benchmark")


def row_of(rows: list[Row], key: Row, kinds: Iterable[str]) -> Row:
    """The row with this key, made with empty lists, one entry a run, if it is new.

    :param kinds: texts; each has a list, and so have seconds and seeds
    """
    kinds = tuple(kinds)
    for row in rows:
        if all(row.get(k) == v for k, v in key.items()):
            for name in kinds:  # what an earlier call did not measure
                row.setdefault(name, [None] * len(row["seeds"]))
            return row
    rows.append({**key, **{name: [] for name in (*kinds, "seconds", "seeds")}})
    return rows[-1]


def add_run(row: Row, values: dict[str, Any], seconds: float, seed: int) -> None:
    """One run, added to its row."""
    for kind, value in values.items():
        row[kind].append(value)
    row["seconds"].append(seconds)
    row["seeds"].append(seed)


def mean_and_spread(values: list[float], digits: int = 2) -> str:
    """Mean, and half of (highest - lowest)."""
    spread = f" ± {(max(values) - min(values)) / 2:.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{spread}"


def mean_and_range(values: Iterable[float | None], digits: int = 4) -> str:
    """Mean, and in brackets how far the values lie apart; nothing of nothing."""
    numbers = [value for value in values if value is not None]
    if not numbers:
        return ""
    apart = max(numbers) - min(numbers)
    spread = f" ({apart:.{digits}f})" if len(numbers) > 1 and digits > 2 else ""
    return f"{statistics.mean(numbers):.{digits}f}{spread}"


def relative(row: Row, kinds: Iterable[str], label: Callable[[Row], str]) -> dict[str, float]:
    """Means of a row's ratios to dense, by label and text."""
    found = {}
    for kind in kinds:
        values = [value for value in row.get(kind, []) if value is not None]
        if values:
            found[f"{label(row)}: {kind}"] = statistics.mean(values)
    return found
