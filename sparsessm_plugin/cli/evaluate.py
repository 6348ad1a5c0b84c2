"""``sparsessm evaluate``."""

import os
import time
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape

from sparsessm_plugin.cli import tables
from sparsessm_plugin.cli.console import out, print_json, progress, quiet, say_replaced
from sparsessm_plugin.cli.inputs import (
    has_mixers,
    load_tasks,
    measure_perplexity,
    source_of,
    vocab_size_of,
    windows_of,
)
from sparsessm_plugin.cli.options import (
    MOST,
    REPORT,
    AsJson,
    BatchSize,
    Device,
    Dtype,
    Limit,
    ModelArgument,
    SeqLength,
    Tasks,
    TasksBatchSize,
    TasksData,
    TextField,
    Trust,
    Unused,
    Verbose,
    named,
    new_file,
    split_names,
)
from sparsessm_plugin.errors import SparseSSMError


def evaluate(
    model: ModelArgument,
    text: Annotated[
        list[str] | None,
        typer.Option(
            help="Text file, JSON lines, or name[:config[:split]]; NAME=TEXT; repeatable."
        ),
    ] = None,
    tasks: Tasks = None,
    tasks_data: TasksData = None,
    limit: Limit = None,
    output: Annotated[Path | None, REPORT] = None,
    max_seq_length: SeqLength = 2048,
    num_samples: Annotated[
        int | None, typer.Option(min=1, max=MOST, help="Windows to evaluate; default all.")
    ] = None,
    batch_size: BatchSize = 4,
    tasks_batch_size: TasksBatchSize = 64,
    text_field: TextField = "text",
    device: Device = "auto",
    dtype: Dtype = "auto",
    trust_remote_code: Trust = False,
    allow_unused_tensors: Unused = False,
    as_json: AsJson = False,
    verbose: Verbose = False,
) -> None:
    """Perplexity over non-overlapping windows of texts, recall, and lm-eval's tasks."""
    quiet(verbose)
    os.environ.setdefault("TQDM_DISABLE", "1")  # lm-eval has a bar a task; ours says more
    texts, names = named(text or []), split_names("--tasks", tasks)
    if not texts and not names:
        raise SparseSSMError("nothing to evaluate; give --text, --tasks or both")
    new_file("--output", output, ".json")
    source = source_of(model, trust_remote_code, dtype, device, allow_unused_tensors)
    from sparsessm_plugin.evaluation.components import take_inventory
    from sparsessm_plugin.files import write_json
    from sparsessm_plugin.recipes.versions import versions

    skeleton = source.load_skeleton()
    vocab_size = vocab_size_of(skeleton)
    tokenizer = source.load_tokenizer()
    samples = {
        name: windows_of(where, tokenizer, max_seq_length, vocab_size, text_field, "--text")[
            :num_samples
        ]
        for name, where in texts.items()
    }
    suite = load_tasks(names, tasks_data, limit, next(iter(texts.values()), None), text_field)
    requests = 0 if suite is None else suite.requests_of(skeleton, tokenizer)
    loaded = source.load()
    report: dict[str, Any] = {
        "model": model,
        "dtype": str(loaded.dtype).removeprefix("torch."),
        "device": str(loaded.device),
        "perplexity": {},
        "tasks": {},
        "seconds": {},
    }
    for name, windows in samples.items():
        started = time.perf_counter()
        result = measure_perplexity(loaded, windows, batch_size, name)
        report["perplexity"][name] = {"text": texts[name], **result.to_dict()}
        report["seconds"][name] = round(time.perf_counter() - started, 3)
        if as_json:
            continue
        out.print(
            (f"{escape(name)}: " if len(samples) > 1 or name != texts[name] else "")
            + f"perplexity {result.perplexity:.4f}  (nll {result.nll:.6f} over {result.tokens} "
            f"tokens, {result.windows} windows of {result.window})",
            soft_wrap=True,
        )
    if suite is not None:
        from sparsessm_plugin.evaluation.tasks import evaluate_tasks

        started = time.perf_counter()
        with progress("tasks", requests) as advance:
            results = evaluate_tasks(loaded, tokenizer, suite, tasks_batch_size, advance)
        report["tasks"] = {name: result.to_dict() for name, result in results.items()}
        report["tasks_asked_for"] = list(suite.names)
        report["limit"] = limit
        report["seconds"]["tasks"] = round(time.perf_counter() - started, 3)
        if not as_json:
            tables.print_tasks(report)
    if output is None and not as_json:
        return
    report["inventory"] = take_inventory(loaded).to_dict() if has_mixers(loaded) else None
    report["versions"] = versions()
    if output is not None:
        say_replaced(output)
        write_json(output, report)
    if as_json:
        print_json(report)
