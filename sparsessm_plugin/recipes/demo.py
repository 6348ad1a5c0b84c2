"""What ``sparsessm demo`` computes: every criterion on the packaged checkpoint, no download.

The checkpoint was trained on the documentation topics that come with Python
(``pydoc_data.topics``) and on prose. Calibration text is taken from the topics of the running
interpreter, evaluation text from those that were kept from training, and, since the checkpoint
knows the other topics by heart and recites when it meets their style, from docstrings of the
standard library as well.
"""

import hashlib
import inspect
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from sparsessm_plugin.criteria.values import PRUNED_VALUES
from sparsessm_plugin.evaluation.data import calibration_loader, tokenize, windows
from sparsessm_plugin.evaluation.perplexity import evaluate_perplexity
from sparsessm_plugin.recipes import parse_recipe
from sparsessm_plugin.recipes.pruning import DEMO_MODEL, ModelSource, prune

DOCUMENTED = (
    "argparse",
    "collections",
    "configparser",
    "difflib",
    "fractions",
    "ipaddress",
    "logging",
    "optparse",
    "statistics",
    "string",
    "subprocess",
    "tarfile",
    "textwrap",
    "threading",
    "unittest",
    "uuid",
    "zipfile",
)

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
    Row("paper", "hessian"),
    Row("published code", "transition"),
    Row("output_error", "output_error"),
)


def split_topics(topics: dict[str, str]) -> tuple[list[str], list[str]]:
    """Topics that the checkpoint was trained on, and those that it never saw.

    A topic is held out if the SHA-1 of its key begins with 0 or 1, one in eight.
    """
    held_out = {k for k in topics if hashlib.sha1(k.encode()).hexdigest()[0] in "01"}
    training = [topics[k] for k in sorted(topics) if k not in held_out]
    return training, [topics[k] for k in sorted(held_out)]


def standard_library_docstrings() -> list[str]:
    """Documentation of some modules of the running interpreter, a document each."""
    documents = []
    for name in DOCUMENTED:
        module = import_module(name)
        parts = [module.__doc__]
        for _, member in sorted(vars(module).items()):
            if getattr(member, "__module__", None) == name:
                parts.append(inspect.getdoc(member))
        documents.append("\n\n".join(part for part in parts if part))
    return documents


@dataclass(frozen=True)
class DemoResult:
    """Result of :func:`run_demo`.

    :param model: name of the checkpoint
    :param max_seq_length: tokens a window
    :param rows: a dictionary a row: criterion, then perplexities for the dense model, and for each
        meaning of "pruned" the perplexities and seconds for the others
    :param pruned_values: the meanings of "pruned"
    :param windows: windows of each evaluation text
    :param calibration_windows: how many were calibrated on
    """

    model: str
    max_seq_length: int
    rows: tuple[dict[str, Any], ...]
    pruned_values: tuple[str, ...]
    windows: dict[str, int]
    calibration_windows: int


def count_models() -> int:
    """How often :func:`run_demo` calls its ``progress``."""
    return len(ROWS) * len(PRUNED_VALUES) + 1


def run_demo(
    num_samples: int = 64,
    max_seq_length: int = 512,
    progress: Callable[[], Any] = lambda: None,
) -> DemoResult:
    """Prune half of A_log by each criterion, for both meanings of "pruned", and measure.

    :param num_samples: calibration windows
    :param max_seq_length: tokens a window, for calibration and evaluation
    :param progress: called after each model
    """
    from pydoc_data.topics import topics

    source = ModelSource(DEMO_MODEL, device="cpu")
    tokenizer = source.load_tokenizer()
    training, held_out = split_topics(topics)
    samples = windows(tokenize(training, tokenizer), max_seq_length, "pydoc_data.topics")
    texts = {
        "topics": windows(tokenize(held_out, tokenizer), max_seq_length, "held-out topics"),
        "docstrings": windows(
            tokenize(standard_library_docstrings(), tokenizer), max_seq_length, "docstrings"
        ),
    }

    def measure(model: Any) -> dict[str, float]:
        return {
            name: evaluate_perplexity(model, text, batch_size=8).perplexity
            for name, text in texts.items()
        }

    dense = measure(source.load())
    # loads or compiles the scan, so that the first criterion does not pay for it
    _prune(source, "output_error", "zero", samples[:1], 1, tokenizer)
    progress()
    rows: list[dict[str, Any]] = [{"criterion": "dense", **dense}]
    for row in ROWS:
        cells: dict[str, Any] = {"criterion": row.name}
        for pruned_value in PRUNED_VALUES:
            model, seconds = _prune(
                source, row.saliency, pruned_value, samples, num_samples, tokenizer
            )
            cells[pruned_value] = {**measure(model), "seconds": seconds}
            progress()
        rows.append(cells)
    return DemoResult(
        model=DEMO_MODEL,
        max_seq_length=max_seq_length,
        rows=tuple(rows),
        pruned_values=tuple(PRUNED_VALUES),
        windows={name: len(text) for name, text in texts.items()},
        calibration_windows=min(num_samples, len(samples)),
    )


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
