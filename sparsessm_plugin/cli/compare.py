"""``sparsessm compare``."""

import os
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape

from sparsessm_plugin.cli.console import err, out, print_json, quiet
from sparsessm_plugin.cli.inputs import load_tasks, source_of, vocab_size_of, windows_of
from sparsessm_plugin.cli.options import (
    CALIBRATION,
    MOST,
    PIPELINES,
    AsJson,
    BatchSize,
    Device,
    Dtype,
    Limit,
    ModelArgument,
    NumSamples,
    Pipeline,
    SeqLength,
    Tasks,
    TasksBatchSize,
    TasksData,
    TextField,
    Trust,
    Unused,
    Verbose,
    choice,
    command_line,
    complete_recipe,
    named,
    numbers_of,
    of_option,
    split_names,
)
from sparsessm_plugin.cli.stopping import EXIT_CODES, Stopped, Terminated, check_signals
from sparsessm_plugin.errors import SparseSSMError, shown

# options on which the numbers of a run do not depend, or which stand elsewhere in the folder
_WITHOUT_EFFECT = frozenset(
    {
        *("model", "recipes", "output", "seeds", "keep", "as_json", "verbose"),
        *("batch_size", "tasks_batch_size", "trust_remote_code", "allow_unused_tensors"),
    }
)


def compare(
    context: typer.Context,
    model: ModelArgument,
    recipes: Annotated[
        list[str],
        typer.Option(
            help="YAML files (NAME=FILE) or built-in names; one or more.",
            autocompletion=complete_recipe,
        ),
    ],
    output: Annotated[
        Path, typer.Option(help="Folder of the comparison; one that was begun goes on.")
    ],
    calibration: Annotated[str | None, CALIBRATION] = None,
    text: Annotated[
        list[str] | None, typer.Option(help="Measure perplexity; TEXT or NAME=TEXT; repeatable.")
    ] = None,
    tasks: Tasks = None,
    tasks_data: TasksData = None,
    limit: Limit = None,
    seeds: Annotated[
        str, typer.Option(help="Of the draws of calibration windows, with commas.")
    ] = "0",
    num_samples: NumSamples = 64,
    max_seq_length: SeqLength = 2048,
    eval_samples: Annotated[
        int | None,
        typer.Option(min=1, max=MOST, help="Windows of a text to evaluate; default all."),
    ] = None,
    batch_size: BatchSize = 4,
    tasks_batch_size: TasksBatchSize = 64,
    text_field: TextField = "text",
    pipeline: Pipeline = "independent",
    keep: Annotated[bool, typer.Option("--keep", help="Keep the pruned checkpoints.")] = False,
    device: Device = "auto",
    dtype: Dtype = "auto",
    trust_remote_code: Trust = False,
    allow_unused_tensors: Unused = False,
    as_json: AsJson = False,
    verbose: Verbose = False,
) -> None:
    """Run recipes on one model, each in its own process; a table, JSON and a plot."""
    quiet(verbose)
    os.environ.setdefault("TQDM_DISABLE", "1")
    choice("--pipeline", pipeline, PIPELINES)
    texts, names = named(text or []), split_names("--tasks", tasks)
    if not texts and not names:
        raise SparseSSMError("nothing to compare by; give --text, --tasks or both")
    numbers = numbers_of("--seeds", seeds)
    source = source_of(model, trust_remote_code, dtype, device, allow_unused_tensors)
    from sparsessm_plugin.evaluation import comparison, comparison_table
    from sparsessm_plugin.evaluation.latency import check_matplotlib
    from sparsessm_plugin.recipes import load_recipe

    check_matplotlib()
    skeleton = source.load_skeleton()
    chosen: dict[str, tuple[str, str]] = {}
    runs: list[tuple[str, int]] = []
    for name, where in named(split_names("--recipes", recipes, once=True), "--recipes").items():
        label = Path(name).stem if name == where else name
        if label == comparison_table.DENSE:
            raise SparseSSMError(f"{shown(label)} is the model as it was; give NAME={where}")
        if label in chosen:
            raise SparseSSMError(f"two recipes are called {shown(label)}; give NAME=FILE")
        with of_option("--recipes"):
            recipe = load_recipe(where)
        recipe.check_data(calibration)
        recipe.check_pipeline(pipeline)
        with of_option(label):  # which of them
            recipe.check_model(skeleton)
        chosen[label] = (where, recipe.text)
        runs += [(label, seed) for seed in (numbers if recipe.reads_data else numbers[:1])]
    # only to find out now what would fail later
    suite = load_tasks(names, tasks_data, limit, next(iter(texts.values()), None), text_field)
    vocab_size, tokenizer = vocab_size_of(skeleton), source.load_tokenizer()
    if suite is not None:
        suite.requests_of(skeleton, tokenizer)
    wanted = [("--text", where) for where in texts.values()]
    if calibration is not None:
        wanted.append(("--calibration", calibration))
    for option, source_text in wanted:
        windows_of(source_text, tokenizer, max_seq_length, vocab_size, text_field, option)

    def identify(where: str) -> str:
        return comparison.fingerprint(where) if Path(where).exists() else where

    # the commands take what is called alike here, but for what differs between them
    group: Any = context.find_root().command
    given = {**context.params, "as_json": False, "verbose": False}
    of_prune = {**given, "text": None, "output": None}
    of_evaluate = {**given, "tasks": names, "num_samples": eval_samples, "output": None}
    # what a folder that goes on must agree in
    read = {
        "calibration": None if calibration is None else identify(calibration),
        "text": {name: identify(where) for name, where in texts.items()},
        "tasks": names,
        "tasks_data": None if tasks_data is None else str(tasks_data),
    }
    commit = getattr(skeleton.config, "_commit_hash", None)
    plan = comparison.Plan(
        model=model,
        identity=identify(source.path) if commit is None else f"{model} {commit}",
        recipes=chosen,
        runs=runs,
        settings={
            f"--{name.replace('_', '-')}": read.get(name, value)
            for name, value in given.items()
            if name not in _WITHOUT_EFFECT
        },
        prune_options=command_line(group.commands["prune"], of_prune),
        evaluate_options=command_line(group.commands["evaluate"], of_evaluate),
        output=output,
        keep=keep,
    )
    try:
        state = comparison.run_comparison(
            plan,
            lambda line: err.print(escape(line), highlight=False, soft_wrap=True),
            check_signals,
        )
    except (KeyboardInterrupt, Terminated) as end:
        name = "terminated" if isinstance(end, Terminated) else "interrupted"
        raise Stopped(
            f"{name}; finished runs are kept in {output}, the same command goes on from there",
            EXIT_CODES[name],
        ) from end
    rows = comparison_table.summarize(state[comparison_table.DENSE], state["runs"].values())
    comparison_table.plot(rows, output / comparison.PLOT)
    if as_json:
        print_json({"output": str(output), **state})
    else:
        table = comparison_table.markdown(rows)
        out.print(table, markup=False, highlight=False, soft_wrap=True)
    failed = [key for key, run in state["runs"].items() if "error" in run]
    if failed:
        raise SparseSSMError(
            f"{len(failed)} of {len(state['runs'])} runs failed, {failed[0]} with: "
            f"{state['runs'][failed[0]]['error']}; the same command tries them again"
        )
