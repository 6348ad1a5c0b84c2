"""``sparsessm demo``: every criterion on the packaged checkpoint, with nothing to download.

The checkpoint was trained on the documentation topics that come with Python
(``pydoc_data.topics``) and on prose. Calibration text is taken from the topics of the running
interpreter, evaluation text from those that were kept from training.
"""

import hashlib
import time
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from sparsessm_plugin.evaluation.data import calibration_loader, tokenize, windows
from sparsessm_plugin.evaluation.perplexity import evaluate_perplexity
from sparsessm_plugin.pruning import DEMO_MODEL, ModelSource, prune
from sparsessm_plugin.recipes import parse_recipe
from sparsessm_plugin.saliency.values import PRUNED_VALUES

RECIPE = """\
prune_stage:
  prune_modifiers:
    SparseSSMModifier:
      sparsity: 0.5
      saliency: {saliency}
      pruned_value: {pruned_value}
"""


@dataclass(frozen=True)
class Row:
    """One row of the table: a criterion by the name it goes by."""

    name: str
    saliency: str


ROWS = (
    Row("magnitude", "magnitude"),
    Row("paper (hessian, frequency)", "hessian"),
    Row("published code (transition, time-weighted)", "transition"),
    Row("output_error", "output_error"),
)


def split_topics(topics: dict[str, str]) -> tuple[list[str], list[str]]:
    """Topics that the checkpoint was trained on, and those that it never saw.

    A topic is held out if the SHA-1 of its key begins with 0 or 1, one in eight.
    """
    held_out = {k for k in topics if hashlib.sha1(k.encode()).hexdigest()[0] in "01"}
    training = [topics[k] for k in sorted(topics) if k not in held_out]
    return training, [topics[k] for k in sorted(held_out)]


def run_demo(console: Console, num_samples: int = 64, max_seq_length: int = 512) -> list[Any]:
    """Prune half of A_log by each criterion, for both meanings of "pruned", and print a table.

    :param console: where to print
    :param num_samples: calibration windows
    :param max_seq_length: tokens a window, for calibration and evaluation
    :return: the rows as printed: name, then perplexity and seconds for each meaning
    """
    from pydoc_data.topics import topics

    source = ModelSource(DEMO_MODEL, device="cpu")
    tokenizer = source.load_tokenizer()
    training, held_out = split_topics(topics)
    samples = windows(tokenize(training, tokenizer), max_seq_length, "pydoc_data.topics")
    evaluation = windows(tokenize(held_out, tokenizer), max_seq_length, "held-out topics")

    dense = evaluate_perplexity(source.load(), evaluation, batch_size=4)
    rows: list[Any] = [("dense", dense.perplexity)]
    # compiles or loads the scan, so that the first criterion does not pay for it
    _prune(source, "output_error", "zero", samples[:1], 1, tokenizer)
    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("pruning", total=len(ROWS) * len(PRUNED_VALUES))
        for row in ROWS:
            cells: list[Any] = [row.name]
            for pruned_value in PRUNED_VALUES:
                model, seconds = _prune(
                    source, row.saliency, pruned_value, samples, num_samples, tokenizer
                )
                cells += [evaluate_perplexity(model, evaluation, 4).perplexity, seconds]
                progress.advance(task)
            rows.append(tuple(cells))

    table = Table(
        "criterion",
        "zero (A = -1)",
        "seconds",
        "memoryless",
        "seconds",
        title=f"{DEMO_MODEL}, 50 % of A_log pruned: perplexity on {dense.windows} x "
        f"{max_seq_length} held-out tokens ({min(num_samples, len(samples))} x {max_seq_length} "
        "calibration tokens)",
    )
    for column in table.columns[1:]:
        column.justify = "right"
    table.add_row("dense", f"{dense.perplexity:.3f}", "", f"{dense.perplexity:.3f}", "")
    for name, zero, zero_seconds, memoryless, memoryless_seconds in rows[1:]:
        table.add_row(
            name,
            f"{zero:.3f}",
            f"{zero_seconds:.1f}",
            f"{memoryless:.3f}",
            f"{memoryless_seconds:.1f}",
        )
    console.print(table)
    return rows


def _prune(
    source: ModelSource,
    saliency: str,
    pruned_value: str,
    samples: Any,
    num_samples: int,
    tokenizer: Any,
) -> tuple[Any, float]:
    recipe = parse_recipe(RECIPE.format(saliency=saliency, pruned_value=pruned_value), "demo")
    model = source.load()
    started = time.perf_counter()
    loader = calibration_loader(samples, num_samples, batch_size=8)
    result = prune(model, recipe, loader, tokenizer)
    return result.model, time.perf_counter() - started
