"""The command ``sparsessm``."""

import os
import signal
import sys
import time
import traceback
from contextlib import contextmanager, nullcontext, redirect_stderr, redirect_stdout
from functools import wraps
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from sparsessm_plugin.backends.allocator import keep_freed_memory
from sparsessm_plugin.errors import SparseSSMError, cut, shown
from sparsessm_plugin.processes import end_with_parent

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from torch import Tensor

    from sparsessm_plugin.checkpoints.runtimes import RuntimeSupport
    from sparsessm_plugin.evaluation.component_loss import Sensitivity
    from sparsessm_plugin.evaluation.components import Inventory
    from sparsessm_plugin.evaluation.latency import Latency
    from sparsessm_plugin.evaluation.perplexity import Perplexity

app = typer.Typer(
    help="Prune state-space language models.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
# piped output is for programs and files: its tables are not squeezed into 80 columns
out = Console(width=None if sys.stdout.isatty() else 160)
err = Console(stderr=True)

_MOST = 2**31 - 1  # of what is counted
_LONGEST = 2000  # characters of a message
_INTERRUPTED = 130
_EXIT_CODES = {"interrupted": _INTERRUPTED, "terminated": 143}

ModelArgument = Annotated[
    str, typer.Argument(help="Folder, hub name, or mamba-demo-0.7m (comes with the package).")
]
Device = Annotated[str, typer.Option(help="auto, cpu or cuda.")]
Dtype = Annotated[str, typer.Option(help="auto (as saved), float32, bfloat16 or float16.")]
Trust = Annotated[bool, typer.Option("--trust-remote-code", help="Let the model's code run.")]
Unused = Annotated[
    bool,
    typer.Option(
        "--allow-unused-tensors", help="Load checkpoints with tensors that the model lacks."
    ),
]
Verbose = Annotated[
    bool, typer.Option("--verbose", help="Show libraries' logs and warnings, and tracebacks.")
]
Result = Annotated[
    Path, typer.Option(help="Folder for the result; only an earlier result is replaced.")
]
_REPORT = typer.Option(help="Write a report to this new .json file.")
_CALIBRATION = typer.Option(help="Text file, JSON lines with `text`, or name[:config[:split]].")
NumSamples = Annotated[int, typer.Option(min=1, max=_MOST, help="Calibration windows.")]
Seed = Annotated[int, typer.Option(max=2**63 - 1, help="Of the draw of calibration windows.")]
_PIPELINES = ("independent", "sequential", "basic", "datafree")
Pipeline = Annotated[str, typer.Option(help="independent, sequential, basic or datafree.")]
TextField = Annotated[str, typer.Option(help="Key of the text in JSON lines.")]
SeqLength = Annotated[int, typer.Option(min=2, max=_MOST, help="Tokens a window.")]
BatchSize = Annotated[int, typer.Option(min=1, max=_MOST, help="Windows a forward pass.")]
Tasks = Annotated[
    list[str] | None,
    typer.Option(
        help="Tasks of lm-eval, or blimp_local, piqa_local, arc_easy_local, "
        "lambada_local; with commas or repeated."
    ),
]
TasksData = Annotated[
    Path | None, typer.Option(help="Folder that the *_local tasks read; docs/evaluation.md.")
]
Limit = Annotated[int | None, typer.Option(min=1, max=_MOST, help="Documents a task at most.")]
TasksBatchSize = Annotated[
    int, typer.Option(min=1, max=_MOST, help="Sequences a forward pass, for tasks.")
]


def _on_ranks(command: "Callable[..., None]") -> "Callable[..., None]":
    """Let ``prune`` run on all ranks of torchrun, where it was started so; rank 0 prints."""

    @wraps(command)
    def run(**options: Any) -> None:
        _quiet(options["verbose"])
        if not options["verbose"]:  # bars of ours say more
            os.environ.setdefault("TQDM_DISABLE", "1")
        if "TORCHELASTIC_RUN_ID" not in os.environ:
            return command(**options)
        # torchrun gives each rank one thread unless it is told otherwise
        os.environ.setdefault("NUMBA_NUM_THREADS", os.environ.get("OMP_NUM_THREADS", "1"))
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
        import torch

        from sparsessm_plugin import distributed

        with distributed.start(options["device"] != "cpu" and torch.cuda.is_available()):
            if distributed.rank() == 0:
                return command(**options)
            nowhere = open(os.devnull, "w")  # noqa: SIM115 - loggers keep it
            with redirect_stdout(nowhere), redirect_stderr(nowhere):
                return command(**options)

    return run


@app.command()
@_on_ranks
def prune(
    model: ModelArgument,
    recipe: Annotated[str, typer.Option(help="YAML file, or a name from `sparsessm recipes`.")],
    output: Result,
    calibration: Annotated[str | None, _CALIBRATION] = None,
    num_samples: NumSamples = 64,
    max_seq_length: SeqLength = 2048,
    batch_size: BatchSize = 4,
    text: Annotated[
        str | None, typer.Option(help="Also measure perplexity on this text, before and after.")
    ] = None,
    text_field: TextField = "text",
    pipeline: Pipeline = "independent",
    seed: Seed = 0,
    device: Device = "auto",
    dtype: Dtype = "auto",
    trust_remote_code: Trust = False,
    allow_unused_tensors: Unused = False,
    verbose: Verbose = False,
) -> None:
    """Prune a model with a recipe and save it; under torchrun, on several ranks together."""
    _choice("--pipeline", pipeline, _PIPELINES)
    source = _source(model, trust_remote_code, dtype, device, allow_unused_tensors)
    from sparsessm_plugin import distributed
    from sparsessm_plugin.evaluation.components import take_inventory
    from sparsessm_plugin.evaluation.data import calibration_loader
    from sparsessm_plugin.files import (
        REPORT_NAME,
        check_output_directory,
        list_files,
        output_directory,
        reports_held,
        write_json,
    )
    from sparsessm_plugin.progress import shown as bars_shown
    from sparsessm_plugin.recipes import load_recipe
    from sparsessm_plugin.recipes.pruning import check_saving, save, versions
    from sparsessm_plugin.recipes.pruning import prune as run_recipe

    rank, ranks = distributed.rank(), distributed.world_size()
    # everything that can be wrong is looked at before the weights are
    check_output_directory(output)
    _outputs[output] = _inode(output)
    _not_the_model(output, model)
    checked = load_recipe(recipe)
    checked.check_data(calibration)
    skeleton = source.load_skeleton()
    checked.check_model(skeleton)
    vocab_size = _vocab_size(skeleton)
    tokenizer = source.load_tokenizer()
    loader, calibration_report = None, None
    if calibration is not None:
        samples = _windows(calibration, tokenizer, max_seq_length, vocab_size, text_field)
        if len(samples) < num_samples:
            _show(
                "warning",
                f"{calibration} gives {len(samples)} windows of {max_seq_length} tokens, fewer "
                f"than the {num_samples} asked for; using them all",
            )
        loader = calibration_loader(samples, num_samples, batch_size, seed, (rank, ranks))
        calibration_report = {
            "source": calibration,
            "samples": min(num_samples, len(samples)),
            "max_seq_length": max_seq_length,
            "seed": seed,
        }
    text_samples = None
    if text is not None and rank == 0:
        text_samples = _windows(text, tokenizer, max_seq_length, vocab_size, text_field)

    # LLM Compressor's save wants every rank, and writes on rank 0
    with reports_held(), output_directory(output) if rank == 0 else TemporaryDirectory() as place:
        folder = Path(place)
        check_saving(skeleton, tokenizer, folder)
        started = time.perf_counter()
        dense = source.load()
        loading = time.perf_counter() - started
        before = take_inventory(dense).to_dict()
        perplexity: dict[str, Any] = {}
        if text_samples is not None:
            result = _evaluate(dense, text_samples, batch_size, "dense ")
            perplexity = {"text": text, "before": result.to_dict()}
        # several bars at once garble each other
        with nullcontext() if verbose else bars_shown(err):
            pruned = run_recipe(
                dense, checked, loader, tokenizer, pipeline, source.load, trust_remote_code
            )
        inventory = take_inventory(pruned.model)
        if text_samples is not None:
            result = _evaluate(pruned.model, text_samples, batch_size, "pruned")
            perplexity["after"] = result.to_dict()
            perplexity["ratio"] = result.perplexity / perplexity["before"]["perplexity"]
        distributed.gather("saving", None)  # patient, unlike the backends
        started = time.perf_counter()
        _check_signals()
        save(pruned.model, tokenizer, folder)
        report = {
            "model": model,
            "recipe": {"name": recipe, "yaml": checked.text},
            "calibration": calibration_report,
            "before": before,
            "after": inventory.to_dict(),
            "perplexity": perplexity or None,
            "modifiers": pruned.reports,
            "seconds": {
                "load": round(loading, 3),
                "oneshot": round(pruned.seconds, 3),
                "save": round(time.perf_counter() - started, 3),
            },
            "tokens_per_second": round(pruned.tokens / pruned.seconds, 1),
            "peak_memory_bytes": pruned.peak_memory_bytes,
            "ranks": ranks,
            "versions": versions(),
            "files": list_files(folder),
        }
        write_json(folder / REPORT_NAME, report)
    _print_pruned(report, output)


@app.command()
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
    output: Annotated[Path | None, _REPORT] = None,
    max_seq_length: SeqLength = 2048,
    num_samples: Annotated[
        int | None, typer.Option(min=1, max=_MOST, help="Windows to evaluate; default all.")
    ] = None,
    batch_size: BatchSize = 4,
    tasks_batch_size: TasksBatchSize = 64,
    text_field: TextField = "text",
    device: Device = "auto",
    dtype: Dtype = "auto",
    trust_remote_code: Trust = False,
    allow_unused_tensors: Unused = False,
    verbose: Verbose = False,
) -> None:
    """Perplexity over non-overlapping windows of texts, and lm-eval's tasks."""
    _quiet(verbose)
    os.environ.setdefault("TQDM_DISABLE", "1")  # lm-eval has a bar a task; ours says more
    texts, names = _named(text or []), _split_names("--tasks", tasks)
    if not texts and not names:
        raise SparseSSMError("nothing to evaluate; give --text, --tasks or both")
    _new_file("--output", output, ".json")
    source = _source(model, trust_remote_code, dtype, device, allow_unused_tensors)
    from sparsessm_plugin.evaluation.components import take_inventory
    from sparsessm_plugin.files import write_json
    from sparsessm_plugin.recipes.pruning import versions

    vocab_size = _vocab_size(source.load_skeleton())
    tokenizer = source.load_tokenizer()
    samples = {
        name: _windows(where, tokenizer, max_seq_length, vocab_size, text_field)[:num_samples]
        for name, where in texts.items()
    }
    suite = _load_tasks(names, tasks_data, limit)
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
        result = _evaluate(loaded, windows, batch_size, name)
        report["perplexity"][name] = {"text": texts[name], **result.to_dict()}
        report["seconds"][name] = round(time.perf_counter() - started, 3)
        out.print(
            (f"{escape(name)}: " if len(samples) > 1 or name != texts[name] else "")
            + f"perplexity {result.perplexity:.4f}  (nll {result.nll:.6f} over {result.tokens} "
            f"tokens, {result.windows} windows of {result.window})",
            soft_wrap=True,
        )
    if suite is not None:
        from sparsessm_plugin.evaluation.tasks import evaluate_tasks

        started = time.perf_counter()
        with _progress("tasks", suite.requests) as advance:
            results = evaluate_tasks(loaded, tokenizer, suite, tasks_batch_size, advance)
        report["tasks"] = {name: result.to_dict() for name, result in results.items()}
        report["tasks_asked_for"] = list(suite.names)
        report["limit"] = limit
        report["seconds"]["tasks"] = round(time.perf_counter() - started, 3)
        _print_tasks(report)
    if output is not None:
        _say_replaced(output)
        inventory = take_inventory(loaded).to_dict() if _has_mixers(loaded) else None
        write_json(output, {**report, "inventory": inventory, "versions": versions()})


@app.command()
def compare(
    model: ModelArgument,
    recipes: Annotated[
        list[str],
        typer.Option(help="YAML files (NAME=FILE) or built-in names; one or more."),
    ],
    output: Annotated[
        Path, typer.Option(help="Folder of the comparison; one that was begun goes on.")
    ],
    calibration: Annotated[str | None, _CALIBRATION] = None,
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
        typer.Option(min=1, max=_MOST, help="Windows of a text to evaluate; default all."),
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
    verbose: Verbose = False,
) -> None:
    """Run recipes on one model, each in its own process; a table, JSON and a plot."""
    _quiet(verbose)
    os.environ.setdefault("TQDM_DISABLE", "1")
    _choice("--pipeline", pipeline, _PIPELINES)
    texts, names = _named(text or []), _split_names("--tasks", tasks)
    if not texts and not names:
        raise SparseSSMError("nothing to compare by; give --text, --tasks or both")
    numbers = _numbers("--seeds", seeds)
    source = _source(model, trust_remote_code, dtype, device, allow_unused_tensors)
    from sparsessm_plugin.evaluation import comparison
    from sparsessm_plugin.evaluation.latency import check_matplotlib
    from sparsessm_plugin.recipes import load_recipe

    check_matplotlib()
    skeleton = source.load_skeleton()
    chosen: dict[str, tuple[str, str]] = {}
    runs: list[tuple[str, int]] = []
    for name, where in _named(_split_names("--recipes", recipes), "--recipes").items():
        label = Path(name).stem if name == where else name
        if label == comparison.DENSE:
            raise SparseSSMError(f"{shown(label)} is the model as it was; give NAME={where}")
        if label in chosen:
            raise SparseSSMError(f"two recipes are called {shown(label)}; give NAME=FILE")
        recipe = load_recipe(where)
        recipe.check_data(calibration)
        recipe.check_model(skeleton)
        chosen[label] = (where, recipe.text)
        runs += [(label, seed) for seed in (numbers if recipe.reads_data else numbers[:1])]
    # only to find out now what would fail later
    _load_tasks(names, tasks_data, limit)
    vocab_size, tokenizer = _vocab_size(skeleton), source.load_tokenizer()
    for where in (*texts.values(), *([] if calibration is None else [calibration])):
        _windows(where, tokenizer, max_seq_length, vocab_size, text_field)

    def identify(where: str) -> str:
        return comparison.fingerprint(where) if Path(where).exists() else where

    # what both commands take, then what each takes
    common = ["--max-seq-length", str(max_seq_length), "--batch-size", str(batch_size)]
    common += ["--text-field", text_field, "--device", device, "--dtype", dtype]
    common += ["--trust-remote-code"] if trust_remote_code else []
    common += ["--allow-unused-tensors"] if allow_unused_tensors else []
    prune_options = [*common, "--num-samples", str(num_samples), "--pipeline", pipeline]
    prune_options += [] if calibration is None else ["--calibration", calibration]
    evaluate_options = [*common, "--tasks-batch-size", str(tasks_batch_size)]
    for name, where in texts.items():
        evaluate_options += ["--text", where if name == where else f"{name}={where}"]
    for option, value in (
        ("--num-samples", eval_samples),
        ("--tasks", ",".join(names) or None),
        ("--tasks-data", tasks_data),
        ("--limit", limit),
    ):
        evaluate_options += [] if value is None else [option, str(value)]
    commit = getattr(skeleton.config, "_commit_hash", None)
    plan = comparison.Plan(
        model=model,
        identity=identify(source.path) if commit is None else f"{model} {commit}",
        recipes=chosen,
        runs=runs,
        settings={
            "--calibration": None if calibration is None else identify(calibration),
            "--text": {name: identify(where) for name, where in texts.items()},
            "--tasks": names,
            "--tasks-data": None if tasks_data is None else str(tasks_data),
            "--limit": limit,
            "--num-samples": num_samples,
            "--max-seq-length": max_seq_length,
            "--eval-samples": eval_samples,
            "--text-field": text_field,
            "--pipeline": pipeline,
            "--device": device,
            "--dtype": dtype,
        },
        prune_options=prune_options,
        evaluate_options=evaluate_options,
        output=output,
        keep=keep,
    )
    try:
        state = comparison.run_comparison(
            plan, lambda line: err.print(escape(line), highlight=False, soft_wrap=True)
        )
    except (KeyboardInterrupt, _Terminated) as end:
        name = "terminated" if isinstance(end, _Terminated) else "interrupted"
        raise _Stopped(
            f"{name}; finished runs are kept in {output}, the same command goes on from there",
            _EXIT_CODES[name],
        ) from end
    rows = comparison.summarize(state[comparison.DENSE], state["runs"].values())
    comparison.plot(rows, output / comparison.PLOT)
    out.print(comparison.markdown(rows), markup=False, highlight=False, soft_wrap=True)
    failed = [key for key, run in state["runs"].items() if "error" in run]
    if failed:
        raise SparseSSMError(
            f"{len(failed)} of {len(state['runs'])} runs failed, {failed[0]} with: "
            f"{state['runs'][failed[0]]['error']}; the same command tries them again"
        )


@app.command()
def recipes(
    name: Annotated[str | None, typer.Argument(help="Print this recipe.")] = None,
) -> None:
    """List the built-in recipes, or print one."""
    from sparsessm_plugin.recipes import describe_recipe, recipe_names, recipe_path

    if name is not None:
        out.print(Path(recipe_path(name)).read_text(encoding="utf-8"), end="", markup=False)
        return
    table = Table("recipe", "what it does", box=None)
    for recipe in recipe_names():
        table.add_row(recipe, describe_recipe(recipe))
    out.print(table)


@app.command()
def inspect(
    model: ModelArgument,
    dtype: Dtype = "auto",
    trust_remote_code: Trust = False,
    allow_unused_tensors: Unused = False,
    verbose: Verbose = False,
) -> None:
    """Show a model's mixers, what its parameters are spent on, how sparse they are, and,
    for a folder, which runtimes load it."""
    _quiet(verbose)
    source = _source(model, trust_remote_code, dtype, "cpu", allow_unused_tensors)
    from sparsessm_plugin.evaluation.components import take_inventory
    from sparsessm_plugin.families import find_mixers

    find_mixers(source.load_skeleton())  # an unknown model is refused before its weights load
    _print_inventory(model, take_inventory(source.load()))
    if Path(source.path).is_dir():
        from sparsessm_plugin.checkpoints.runtimes import runtime_support

        _print_runtimes(runtime_support(source.path))


@app.command()
def bench(
    model: ModelArgument,
    against: Annotated[
        str | None, typer.Option(help="Compare with this model, in turns with it.")
    ] = None,
    batch_sizes: Annotated[str, typer.Option(help="Sequences at once, with commas.")] = "1,8",
    prompt_length: Annotated[int, typer.Option(min=1, max=_MOST, help="Tokens a prompt.")] = 64,
    decode_steps: Annotated[int, typer.Option(min=1, max=_MOST, help="Tokens to produce.")] = 8,
    repeats: Annotated[
        int, typer.Option(min=1, max=_MOST, help="Repeats of each measurement.")
    ] = 5,
    cuda_graphs: Annotated[
        bool, typer.Option("--cuda-graphs", help="Also decode from a CUDA graph.")
    ] = False,
    plot: Annotated[
        Path | None, typer.Option(help="Draw tokens/s into this new .png file.")
    ] = None,
    output: Annotated[Path | None, _REPORT] = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    trust_remote_code: Trust = False,
    allow_unused_tensors: Unused = False,
    verbose: Verbose = False,
) -> None:
    """Time prefill and decode in transformers, and weigh the state cache."""
    _quiet(verbose)
    sizes = _numbers("--batch-sizes", batch_sizes, least=1)
    _new_file("--plot", plot, ".png")
    _new_file("--output", output, ".json")
    names = [model] if against is None else [against, model]
    sources = [
        _source(name, trust_remote_code, dtype, device, allow_unused_tensors) for name in names
    ]
    from sparsessm_plugin.evaluation.latency import (
        check_matplotlib,
        default_warmup,
        measure_latency,
        plot_latency,
    )
    from sparsessm_plugin.families import find_mixers
    from sparsessm_plugin.files import write_json
    from sparsessm_plugin.recipes.pruning import versions

    if plot is not None:
        check_matplotlib()
    for source in sources:
        find_mixers(source.load_skeleton())
    if against == model:  # a comparison with itself shows the noise
        names[0] += " (again)"
    models = {name: source.load() for name, source in zip(names, sources, strict=True)}
    warmup = default_warmup(models[model].device)
    total = len(sizes) * (warmup + repeats) * len(models)
    with _progress("latency", total) as advance:
        latency = measure_latency(
            models,
            sizes,
            prompt_length,
            decode_steps,
            repeats,
            warmup,
            cuda_graphs,
            progress=advance,
        )
    if output is not None:
        report = {
            "model": model,
            "against": against,
            "dtype": {name: str(m.dtype).removeprefix("torch.") for name, m in models.items()},
            "device": str(models[model].device),
            "repeats": repeats,
            **latency.to_dict(),
            "versions": versions(),
        }
        _say_replaced(output)
        write_json(output, report)
    if plot is not None:
        _say_replaced(plot)
        plot_latency(latency, plot)
    _print_latency(latency)


@app.command()
def sensitivity(
    model: ModelArgument,
    calibration: Annotated[str, _CALIBRATION],
    output: Annotated[Path, _REPORT],
    text: Annotated[
        str | None,
        typer.Option(help="Measure on this text; default the end of --calibration, held back."),
    ] = None,
    sparsities: Annotated[
        str, typer.Option(help="Shares of a part to prune, with commas.")
    ] = "0.3,0.5,0.7",
    solver: Annotated[
        str, typer.Option(help="For projections: sparsegpt, alps, wanda or magnitude.")
    ] = "sparsegpt",
    by: Annotated[
        str,
        typer.Option(help="kind (in all layers), layer, module (at the middle sparsity); commas."),
    ] = "kind,layer,module",
    plot: Annotated[
        Path | None, typer.Option(help="Draw heat maps into this new .png file.")
    ] = None,
    num_samples: NumSamples = 32,
    eval_samples: Annotated[
        int, typer.Option(min=1, max=_MOST, help="Windows to measure on, at most.")
    ] = 16,
    max_seq_length: SeqLength = 512,
    batch_size: BatchSize = 4,
    text_field: TextField = "text",
    seed: Seed = 0,
    device: Device = "auto",
    dtype: Dtype = "auto",
    trust_remote_code: Trust = False,
    allow_unused_tensors: Unused = False,
    verbose: Verbose = False,
) -> None:
    """Prune each part of a model alone and measure what it costs in perplexity."""
    _quiet(verbose)
    shares, parts = _shares(sparsities), [part.strip() for part in by.split(",")]
    _new_file("--output", output, ".json")
    _new_file("--plot", plot, ".png")
    source = _source(model, trust_remote_code, dtype, device, allow_unused_tensors)
    from sparsessm_plugin.evaluation.component_loss import (
        check_settings,
        count_measurements,
        hold_back,
        measure_sensitivity,
        plot_sensitivity,
    )
    from sparsessm_plugin.evaluation.data import calibration_loader
    from sparsessm_plugin.evaluation.latency import check_matplotlib
    from sparsessm_plugin.files import write_json
    from sparsessm_plugin.recipes.pruning import versions

    check_settings(shares, solver, parts)
    if plot is not None:
        check_matplotlib()
    skeleton = source.load_skeleton()
    total = count_measurements(skeleton, shares, parts)
    vocab_size, tokenizer = _vocab_size(skeleton), source.load_tokenizer()
    samples = _windows(calibration, tokenizer, max_seq_length, vocab_size, text_field)
    if text is None:
        samples, held_back = hold_back(samples, eval_samples)
    else:
        held_back = _windows(text, tokenizer, max_seq_length, vocab_size, text_field)[:eval_samples]
    loader = calibration_loader(samples, num_samples, batch_size, seed)
    loaded = source.load()
    with _progress("sensitivity", total) as advance:
        result = measure_sensitivity(
            loaded, loader, held_back, shares, solver, parts, batch_size, advance
        )
    report = {
        "model": model,
        "calibration": {
            "source": calibration,
            "samples": min(num_samples, len(samples)),
            "max_seq_length": max_seq_length,
            "seed": seed,
        },
        "text": {"source": text or f"end of {calibration}", "samples": len(held_back)},
        **result.to_dict(),
        "versions": versions(),
    }
    _say_replaced(output)
    write_json(output, report)
    if plot is not None:
        _say_replaced(plot)
        plot_sensitivity(result, plot)
    _print_sensitivity(result)


@app.command()
def export(
    model: ModelArgument,
    output: Result,
    format_: Annotated[
        str, typer.Option("--format", help="mamba_ssm, the authors' own runtime.")
    ] = "mamba_ssm",
    dtype: Dtype = "auto",
    trust_remote_code: Trust = False,
    allow_unused_tensors: Unused = False,
    verbose: Verbose = False,
) -> None:
    """Write a Mamba or Mamba-2 model, without tokenizer, in another runtime's layout."""
    _quiet(verbose)
    from sparsessm_plugin.checkpoints.export import FORMATS, check_mamba_ssm, export_mamba_ssm
    from sparsessm_plugin.files import (
        REPORT_NAME,
        check_output_directory,
        list_files,
        output_directory,
        write_json,
    )
    from sparsessm_plugin.recipes.pruning import versions

    _choice("--format", format_, FORMATS)
    source = _source(model, trust_remote_code, dtype, "cpu", allow_unused_tensors)
    check_output_directory(output)
    _outputs[output] = _inode(output)
    _not_the_model(output, model)
    check_mamba_ssm(source.load_skeleton())
    with output_directory(output) as folder:
        export_mamba_ssm(source.load(), folder)
        report = {
            "model": model,
            "format": format_,
            "versions": versions(),
            "files": list_files(folder),
        }
        write_json(folder / REPORT_NAME, report)
    out.print(
        f"saved to {escape(str(output))}; load it with sparsessm_plugin.load_mamba_ssm, "
        f"the tokenizer is still that of {escape(model)}",
        soft_wrap=True,
    )


@app.command()
def demo(
    num_samples: NumSamples = 64,
    max_seq_length: SeqLength = 512,
) -> None:
    """Compare the pruning criteria on the packaged demo checkpoint; needs no download."""
    _quiet(False)
    from sparsessm_plugin.cli.demo import run_demo

    run_demo(out, num_samples, max_seq_length)


def _print_version(asked: bool) -> None:
    if asked:
        from sparsessm_plugin import __version__

        out.print(f"sparsessm {__version__}", highlight=False)
        raise typer.Exit


@app.callback()
def _of_every_command(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version."
        ),
    ] = False,
) -> None:
    pass  # its help is the app's


def main() -> None:
    """Entry point: mistakes become one line and exit code 1 or 2, an interrupt 130."""
    # a terminated run tidies up like an interrupted one
    _signals.clear()
    _outputs.clear()
    sys.unraisablehook = _unraisable
    signal.signal(signal.SIGTERM, _stop)
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # and not ignored
        signal.signal(signal.SIGINT, _stop)
    keep_freed_memory()
    arguments = sys.argv[1:]
    try:
        end_with_parent()
        # typer shows the help itself; else it would frame what is wrong over several lines
        code = app(_repeated(arguments), standalone_mode=not arguments)
        sys.exit(code if isinstance(code, int) else 0)
    except SystemExit as end:
        if end.code == _INTERRUPTED:  # typer has turned the KeyboardInterrupt into this
            _fail_stopped("interrupted")
        raise
    except _Terminated:
        _fail_stopped("terminated")
    except _Stopped as stop:
        _fail(str(stop), stop.code)
    except Exception as error:
        if _signals:
            _fail_stopped("terminated" if signal.SIGTERM in _signals else "interrupted")
        if "--verbose" in arguments:
            traceback.print_exc()
        if hasattr(error, "format_message"):  # typer's own, of some argument
            _fail(error.format_message(), 2)
        if isinstance(error, OSError):
            _fail(str(error), 1)
        cause = _our_error(error) or _memory_error(error)
        if cause is None:  # a defect, which its line alone does not explain
            said = cut(" ".join(str(error).split()), 400)
            cause = f"{type(error).__name__}: {said} (--verbose shows where)"
        _fail(str(cause), 1)


def _repeated(arguments: list[str]) -> list[str]:
    """``compare MODEL --recipes A B`` as ``compare MODEL --recipes A --recipes B``.

    Only where the model comes first, so that it is not taken for a recipe.
    """
    if arguments[:1] != ["compare"] or arguments[1:2] == [] or arguments[1].startswith("-"):
        return arguments
    spread: list[str] = []
    option = None
    for argument in arguments:
        if argument.startswith("-"):
            option = argument if argument in ("--recipes", "--text", "--tasks") else None
        elif option is not None and spread[-1] != option:
            spread.append(option)
        spread.append(argument)
    return spread


def _our_error(error: BaseException | None) -> SparseSSMError | None:
    """Our own error where LLM Compressor has wrapped it in one that quotes source code."""
    while error is not None and not isinstance(error, SparseSSMError):
        error = error.__cause__
    return error


def _memory_error(error: BaseException) -> str | None:
    """What to say where a GPU's memory does not suffice for a model, or for its evaluation."""
    from sparsessm_plugin.cost import shortage

    short = shortage(error, None)
    return None if short is None else f"{short}; give a smaller --batch-size or --max-seq-length"


class _Terminated(BaseException):
    pass


class _Stopped(BaseException):
    """A command was stopped and says itself what that left behind."""

    def __init__(self, message: str, code: int):
        super().__init__(message)
        self.code = code


# Those that came. Libraries of C turn the exception into an ImportError while they are imported,
# and what only tries to import them passes over that.
_signals: list[int] = []


def _stop(number: int, frame: Any) -> None:
    _signals.append(number)
    _check_signals()


def _unraisable(ignored: Any) -> None:
    """Say nothing of a stop that came within a destructor: it is looked for again."""
    if not isinstance(ignored.exc_value, (_Terminated, KeyboardInterrupt)):
        sys.__unraisablehook__(ignored)


def _check_signals() -> None:
    """Stop, if that was asked for and got lost."""
    if _signals:
        raise _Terminated if signal.SIGTERM in _signals else KeyboardInterrupt


# Output folders of the command, and which folder (inode) each was when the command began.
_outputs: dict[Path, int | None] = {}


def _inode(folder: Path) -> int | None:
    try:
        return folder.stat().st_ino
    except OSError:
        return None


def _fail_stopped(how: str) -> None:
    """A result is moved into place whole, so that another folder stands there, or none is."""
    written = [path for path, before in _outputs.items() if _inode(path) not in (None, before)]
    left = f"{written[0]} was written before" if written else "nothing was written"
    _fail(f"{how}; {left}", _EXIT_CODES[how])


def _fail(message: str, code: int) -> None:
    _show("error", message)
    sys.exit(code)


def _show(level: str, message: str) -> None:
    """One line on stderr; of what it quotes, no more than anybody reads."""
    text = cut(" ".join(cut(word) for word in message.split()), _LONGEST)
    text = text.encode("utf-8", "backslashreplace").decode()  # names of files may be any bytes
    color = {"error": "bold red", "critical": "bold red", "warning": "yellow"}.get(level, "dim")
    err.print(f"[{color}]{level}:[/] {escape(text)}", soft_wrap=True, highlight=False)


def _quiet(verbose: bool) -> None:
    """Keep the libraries' logs and, where nobody watches, their progress bars off the screen."""
    from sparsessm_plugin.messages import show_messages

    show_messages(_show, verbose)
    if verbose:
        return
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")


def _choice(option: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise SparseSSMError(f"{option} must be one of {', '.join(allowed)}, got {shown(value)}")


def _shares(text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError as error:
        raise SparseSSMError(
            f"--sparsities must be numbers between 0 and 1 with commas, got {shown(text)}"
        ) from error


def _new_file(option: str, path: Path | None, suffix: str) -> None:
    """Refuse before the work what could not be written after it."""
    if path is None:
        return
    if path.suffix.lower() != suffix:
        raise SparseSSMError(f"{option} must end in {suffix}, got {path}")
    if path.exists() or path.is_symlink():
        raise SparseSSMError(f"{option} {path} exists; choose another name")
    if not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
        raise SparseSSMError(f"{option} {path}: {path.parent} is no folder to write to")


def _not_the_model(output: Path, model: str) -> None:
    if output.resolve() in (Path(model).resolve(), *Path(model).resolve().parents):
        raise SparseSSMError(f"--output {output} is or holds the model {model}")


def _source(
    name: str, trust_remote_code: bool, dtype: str, device: str, allow_unused_tensors: bool
) -> Any:
    _choice("--dtype", dtype, ("auto", "float32", "bfloat16", "float16"))
    _choice("--device", device, ("auto", "cpu", "cuda"))
    _regular_files(name)
    from sparsessm_plugin.recipes.pruning import ModelSource

    if device == "cuda":
        import torch

        if not torch.cuda.is_available():
            raise SparseSSMError("--device cuda: no CUDA device is available")
    return ModelSource(name, trust_remote_code, dtype, device, allow_unused_tensors)


def _regular_files(model: str) -> None:
    """Refuse a folder with a pipe or a device in it: whoever reads that may wait for ever."""
    if os.path.isdir(model):
        for file in Path(model).iterdir():
            if file.exists() and not file.is_file() and not file.is_dir():
                raise SparseSSMError(f"model {model}: {file.name} is no regular file")


def _say_replaced(path: Path) -> None:
    """There was nothing when the command began."""
    if os.path.lexists(path):
        _show("warning", f"{path} was written by another process meanwhile; it is replaced")


def _vocab_size(skeleton: Any) -> int:
    return skeleton.get_input_embeddings().num_embeddings


def _windows(
    source: str, tokenizer: Any, length: int, vocab_size: int, text_field: str
) -> "Tensor":
    from sparsessm_plugin.calibration.vocabulary import check_token_ids
    from sparsessm_plugin.evaluation.data import read_texts, tokenize, windows

    tokens = tokenize(read_texts(source, text_field), tokenizer)
    samples = windows(tokens, length, source)
    check_token_ids(samples, vocab_size, source)
    return samples


@contextmanager
def _progress(label: str, total: int) -> "Iterator[Callable[[int], None]]":
    from sparsessm_plugin.progress import Stage
    from sparsessm_plugin.progress import shown as bars_shown

    with bars_shown(err), Stage(escape(label), total) as stage:
        yield stage.advance


def _named(sources: list[str], option: str = "--text") -> dict[str, str]:
    """NAME=SOURCE, or SOURCE alone, which is then its own name."""
    named: dict[str, str] = {}
    for source in sources:
        name, separator, where = source.partition("=")
        if not separator or os.path.exists(source):
            name = where = source
        if not name or not where:
            raise SparseSSMError(f"{option} must be SOURCE or NAME=SOURCE, got {shown(source)}")
        if name in named:
            raise SparseSSMError(f"{option}: two are called {shown(name)}; give NAME=SOURCE")
        named[name] = where
    return named


def _numbers(option: str, text: str, least: int = 0) -> list[int]:
    parts = [part.strip() for part in text.split(",")]
    digits = all(part.isascii() and part.isdecimal() and len(part) <= 10 for part in parts)
    if not digits or not all(least <= int(part) <= _MOST for part in parts):
        raise SparseSSMError(
            f"{option} must be whole numbers from {least} to {_MOST} with commas between them, "
            f"got {shown(text)}"
        )
    return list(dict.fromkeys(int(part) for part in parts))


def _split_names(option: str, values: list[str] | None) -> list[str]:
    """An option that may be repeated and may hold commas, as one list without repeats."""
    names = [name.strip() for value in values or [] for name in value.split(",")]
    if not all(names):
        raise SparseSSMError(f"{option} holds an empty name, got {shown(','.join(values or []))}")
    return list(dict.fromkeys(names))


def _load_tasks(names: list[str], data: Path | None, limit: int | None) -> Any:
    if not names:
        return None
    from sparsessm_plugin.evaluation.tasks import load_tasks

    return load_tasks(names, data, limit)


def _has_mixers(model: Any) -> bool:
    from sparsessm_plugin.families import iter_mixers

    return next(iter(iter_mixers(model)), None) is not None


def _print_tasks(report: dict[str, Any]) -> None:
    table = Table("task", "samples", "metric", "value", "standard error", box=None)
    inner = {name for result in report["tasks"].values() for name in result["subtasks"]}
    for name, result in report["tasks"].items():
        if name in inner and name not in report["tasks_asked_for"]:
            continue
        for metric, number in result["metrics"].items():
            error = f"± {number['stderr']:.4f}" if number["stderr"] is not None else ""
            samples = f"{result['samples']:,}"
            table.add_row(escape(name), samples, metric, f"{number['value']:.4f}", error)
    out.print(table)


def _evaluate(model: Any, samples: "Tensor", batch_size: int, label: str) -> "Perplexity":
    from sparsessm_plugin.evaluation.perplexity import evaluate_perplexity

    with _progress(f"perplexity, {label}", len(samples)) as advance:
        return evaluate_perplexity(model, samples, batch_size, advance)


# plural of what removal modifiers count, over all mixers
_UNITS = {
    "state": "states",
    "channels": "channels",
    "heads": "heads",
    "head_dim": "channels a head",
}


def _print_pruned(report: dict[str, Any], output: Path) -> None:
    from sparsessm_plugin.checkpoints.saving import NOTE_NAME

    before, after = report["before"], report["after"]
    table = Table("", "before", "after", box=None)
    table.add_row("parameters", f"{before['parameters']:,}", f"{after['parameters']:,}")
    table.add_row("zeros", f"{before['zeros']:,}", f"{after['zeros']:,}")
    if report["perplexity"]:
        measured = report["perplexity"]
        table.add_row(
            "perplexity",
            f"{measured['before']['perplexity']:.3f}",
            f"{measured['after']['perplexity']:.3f}  (x {measured['ratio']:.4f})",
        )
    out.print(table)
    for modifier in report["modifiers"]:
        total = modifier["total"]
        unit = total.get("unit")  # what whole parts were removed of; single entries are pruned
        done, things = (
            ("removed", _UNITS.get(unit, unit)) if unit is not None else ("pruned", "entries")
        )
        if "zeros" in total:  # quantized: what was pruned before stayed so
            done = "kept zero"
        layers = modifier.get("layers")
        stay = ""
        if unit is not None and layers:  # the same in every mixer
            stay = f"; {layers[0]['after']} of {layers[0]['before']} stay in each mixer"
        out.print(
            f"{modifier['modifier']}: {done} {total['pruned']:,} of {total['entries']:,} {things} "
            f"({total['sparsity']:.2%}) in {total['seconds']:.1f} s{stay}"
        )
    out.print(f"saved to {escape(str(output))}", soft_wrap=True)
    if NOTE_NAME in report["files"]:
        out.print(
            "plain transformers fails on out_proj of this checkpoint or rescales it; load it with "
            f"sparsessm_plugin.load, see {NOTE_NAME} there",
            soft_wrap=True,
        )


def _print_runtimes(runtimes: "Iterable[RuntimeSupport]") -> None:
    out.print("\nLoads in")
    for runtime in runtimes:
        out.print(f"  {runtime.runtime}: {runtime.answer}", highlight=False)
        for reason in runtime.reasons:
            out.print(f"    {reason}", highlight=False, markup=False, soft_wrap=True)


def _print_inventory(name: str, inventory: "Inventory") -> None:
    mixers = inventory.mixers
    families = sorted({adapter.family for adapter in mixers})
    out.print(
        f"{escape(name)}: {len(mixers)} state-space mixers ({', '.join(families)}), "
        f"{inventory.parameters:,} parameters",
        soft_wrap=True,
    )
    # with one A_log a head there is no entry that could make a state forget
    memoryless = ["memoryless"] if any(a.has_state_transitions for a in mixers) else []
    table = Table("component", "parameters", "share", "zeros", *memoryless, box=None)
    for kind, component in inventory.components.items():
        if component.parameters:
            table.add_row(
                kind,
                f"{component.parameters:,}",
                f"{component.parameters / inventory.parameters:.2%}",
                f"{component.zeros / component.parameters:.2%}",
                f"{component.memoryless / component.parameters:.2%}"
                if component.memoryless is not None
                else "",
            )
    out.print(table)
    kinds = [kind for kind in inventory.components if kind in mixers[0].projections]
    letters = {"D": "channels", "N": "states"}
    if memoryless:
        letters["R"] = "rank of dt"
    if not all(a.has_state_transitions for a in mixers):
        letters |= {"H": "heads", "P": "channels a head", "G": "groups"}
    letters["K"] = "convolution"
    table = Table("mixer", *letters, "A_log", *memoryless, *kinds, box=None)
    legend = ", ".join(f"{letter} {meaning}" for letter, meaning in letters.items())
    table.title = f"zeros by mixer ({legend})"
    table.title_justify = "left"
    for adapter in mixers:
        layer, sizes = inventory.layers[adapter.name], adapter.sizes
        numbers = {
            "D": sizes.intermediate_size,
            "N": sizes.state_size,
            "R": sizes.time_step_rank,
            "H": sizes.num_heads,
            "P": sizes.head_dim,
            "G": sizes.n_groups,
            "K": sizes.conv_kernel_size,
        }
        A_log = layer["A_log"]
        table.add_row(
            adapter.name,
            *(str(numbers[letter]) for letter in letters),
            f"{A_log.zeros / A_log.parameters:.1%}",
            *([f"{(A_log.memoryless or 0) / A_log.parameters:.1%}"] if memoryless else []),
            *(f"{layer[kind].zeros / layer[kind].parameters:.1%}" for kind in kinds),
        )
    out.print(table)


def _print_sensitivity(result: "Sensitivity") -> None:
    from sparsessm_plugin.evaluation.component_loss import ratio_tables

    out.print(f"dense perplexity {result.dense:.4f}; in the tables, perplexity over it")
    for ratios in ratio_tables(result):
        kind, names = ratios.rows
        table = Table(kind, *ratios.columns[1], title=ratios.title, title_justify="left", box=None)
        for name, row in zip(names, ratios.ratios, strict=True):
            table.add_row(name, *(f"{ratio:.4f}" for ratio in row))
        out.print(table)


def _print_latency(latency: "Latency") -> None:
    from sparsessm_plugin.evaluation.latency import PREFILL, describe_kernels

    compared = len(latency.models) > 1
    speedup = ["speedup"] if compared else []
    table = Table("", "batch", "model", "ms a pass", "spread", "tokens/s", *speedup, box=None)
    for phase in latency.phases:
        for size in latency.batch_sizes:
            for name in latency.models:
                timing = latency.timing(name, phase, size)
                table.add_row(
                    phase,
                    str(size),
                    escape(name),
                    f"{timing.milliseconds:.3f}",
                    f"± {timing.spread:.1%}",
                    f"{timing.tokens_per_second:,.0f}",
                    *([f"{latency.speedup(name, phase, size):.3f}"] if compared else []),
                )
    out.print(table)
    first = latency.caches[latency.models[0]]
    relative = ["share"] if compared else []
    table = Table("", "recurrent", "convolution", "attention", "total", *relative, box=None)
    table.title = f"bytes of cache a sequence, after {latency.prompt_length} tokens"
    table.title_justify = "left"
    for name, cache in latency.caches.items():
        numbers = (cache.recurrent, cache.convolution, cache.attention, cache.total)
        share = [f"{cache.total / first.total:.3f}"] if compared else []
        table.add_row(escape(name), *(f"{number:,}" for number in numbers), *share)
    out.print(table)
    repeats = len(latency.timing(latency.models[0], PREFILL, latency.batch_sizes[0]).seconds)
    out.print(
        f"medians of {repeats} repeats; prefill reads {latency.prompt_length} tokens a sequence, "
        f"decode produces {latency.decode_steps}, one a pass; "
        + (f"speedup is against {escape(latency.models[0])}; " if compared else "")
        + "kernels: "
        + "; ".join(dict.fromkeys(describe_kernels(k) for k in latency.kernels.values())),
        soft_wrap=True,
        highlight=False,
    )


if __name__ == "__main__":
    main()
