"""The command ``sparsessm``."""

import os
import signal
import sys
import time
import warnings
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from sparsessm_plugin.errors import SparseSSMError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

    from sparsessm_plugin.evaluation.components import Inventory
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

_INTERRUPTED = 130

ModelArgument = Annotated[
    str, typer.Argument(help="Folder, hub name, or mamba-demo-0.7m (comes with the package).")
]
Device = Annotated[str, typer.Option(help="auto, cpu or cuda.")]
Dtype = Annotated[str, typer.Option(help="auto (as saved), float32, bfloat16 or float16.")]
Trust = Annotated[bool, typer.Option("--trust-remote-code", help="Let the model's code run.")]
TextField = Annotated[str, typer.Option(help="Key of the text in JSON lines.")]
SeqLength = Annotated[int, typer.Option(min=2, help="Tokens a window.")]
BatchSize = Annotated[int, typer.Option(min=1, help="Windows a forward pass.")]


@app.command()
def prune(
    model: ModelArgument,
    recipe: Annotated[str, typer.Option(help="YAML file, or a name from `sparsessm recipes`.")],
    output: Annotated[
        Path, typer.Option(help="Folder for the result; only an earlier result is replaced.")
    ],
    calibration: Annotated[
        str | None,
        typer.Option(help="Text file, JSON lines with `text`, or name[:config[:split]]."),
    ] = None,
    num_samples: Annotated[int, typer.Option(min=1, help="Calibration windows.")] = 64,
    max_seq_length: SeqLength = 2048,
    batch_size: BatchSize = 4,
    text: Annotated[
        str | None, typer.Option(help="Also measure perplexity on this text, before and after.")
    ] = None,
    text_field: TextField = "text",
    pipeline: Annotated[
        str, typer.Option(help="independent, sequential, basic or datafree.")
    ] = "independent",
    seed: Annotated[int, typer.Option(help="Of the draw of calibration windows.")] = 0,
    device: Device = "auto",
    dtype: Dtype = "auto",
    trust_remote_code: Trust = False,
    verbose: Annotated[bool, typer.Option("--verbose", help="Show LLM Compressor's log.")] = False,
) -> None:
    """Prune a model with a recipe and save it."""
    _quiet(verbose)
    _choice("--pipeline", pipeline, ("independent", "sequential", "basic", "datafree"))
    source = _source(model, trust_remote_code, dtype, device)
    from sparsessm_plugin.evaluation.components import take_inventory
    from sparsessm_plugin.evaluation.data import calibration_loader
    from sparsessm_plugin.files import (
        REPORT_NAME,
        check_output_directory,
        list_files,
        output_directory,
        write_json,
    )
    from sparsessm_plugin.pruning import prune as run_recipe
    from sparsessm_plugin.pruning import versions
    from sparsessm_plugin.recipes import load_recipe

    # everything that can be wrong is looked at before the weights are
    check_output_directory(output)
    if output.resolve() in (Path(model).resolve(), *Path(model).resolve().parents):
        raise SparseSSMError(f"--output {output} is or holds the model that is to be pruned")
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
            err.print(
                f"[yellow]{escape(calibration)} gives {len(samples)} windows of "
                f"{max_seq_length} tokens, fewer than the {num_samples} asked for; using them all"
            )
        loader = calibration_loader(samples, num_samples, batch_size, seed)
        calibration_report = {
            "source": calibration,
            "samples": min(num_samples, len(samples)),
            "max_seq_length": max_seq_length,
            "seed": seed,
        }
    text_samples = None
    if text is not None:
        text_samples = _windows(text, tokenizer, max_seq_length, vocab_size, text_field)

    with output_directory(output) as folder:
        dense = source.load()
        before = take_inventory(dense).to_dict()
        perplexity: dict[str, Any] = {}
        if text_samples is not None:
            result = _evaluate(dense, text_samples, batch_size, "dense ")
            perplexity = {"text": text, "before": result.to_dict()}
        pruned = run_recipe(dense, checked, loader, tokenizer, pipeline)
        inventory = take_inventory(pruned.model)
        if text_samples is not None:
            result = _evaluate(pruned.model, text_samples, batch_size, "pruned")
            perplexity["after"] = result.to_dict()
            perplexity["ratio"] = result.perplexity / perplexity["before"]["perplexity"]
        started = time.perf_counter()
        _save(pruned.model, tokenizer, folder)
        report = {
            "model": model,
            "recipe": {"name": recipe, "yaml": checked.text},
            "calibration": calibration_report,
            "before": before,
            "after": inventory.to_dict(),
            "perplexity": perplexity or None,
            "modifiers": pruned.reports,
            "seconds": {
                "oneshot": round(pruned.seconds, 3),
                "save": round(time.perf_counter() - started, 3),
            },
            "versions": versions(),
            "files": list_files(folder),
        }
        write_json(folder / REPORT_NAME, report)
    _print_pruned(report, output)


@app.command()
def evaluate(
    model: ModelArgument,
    text: Annotated[str, typer.Option(help="Text file, JSON lines, or name[:config[:split]].")],
    max_seq_length: SeqLength = 2048,
    num_samples: Annotated[
        int | None, typer.Option(min=1, help="Windows to evaluate; default all.")
    ] = None,
    batch_size: BatchSize = 4,
    text_field: TextField = "text",
    device: Device = "auto",
    dtype: Dtype = "auto",
    trust_remote_code: Trust = False,
    verbose: Annotated[bool, typer.Option("--verbose", help="Show warnings of libraries.")] = False,
) -> None:
    """Perplexity over non-overlapping windows of a text."""
    _quiet(verbose)
    source = _source(model, trust_remote_code, dtype, device)
    vocab_size = _vocab_size(source.load_skeleton())
    samples = _windows(text, source.load_tokenizer(), max_seq_length, vocab_size, text_field)
    result = _evaluate(source.load(), samples[:num_samples], batch_size, model)
    out.print(
        f"perplexity {result.perplexity:.4f}  (nll {result.nll:.6f} over {result.tokens} tokens, "
        f"{result.windows} windows of {result.window})"
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
    verbose: Annotated[bool, typer.Option("--verbose", help="Show warnings of libraries.")] = False,
) -> None:
    """Show a model's mixers, what its parameters are spent on, and how sparse they are."""
    _quiet(verbose)
    source = _source(model, trust_remote_code, dtype, "cpu")
    from sparsessm_plugin.evaluation.components import take_inventory
    from sparsessm_plugin.mixers import find_mixers

    find_mixers(source.load_skeleton())  # an unknown model is refused before its weights load
    _print_inventory(model, take_inventory(source.load()))


@app.command()
def demo(
    num_samples: Annotated[int, typer.Option(min=1, help="Calibration windows.")] = 64,
    max_seq_length: SeqLength = 512,
) -> None:
    """Compare the pruning criteria on the packaged demo checkpoint; needs no download."""
    _quiet(False)
    from sparsessm_plugin.demo import run_demo

    run_demo(out, num_samples, max_seq_length)


def main() -> None:
    """Entry point: mistakes become one line and exit code 1, an interrupt 130."""
    # a terminated run tidies up like an interrupted one
    signal.signal(signal.SIGTERM, _terminate)
    try:
        app()
    except SystemExit as end:
        if end.code == _INTERRUPTED:  # typer has turned the KeyboardInterrupt into this
            _fail("interrupted; nothing was written", _INTERRUPTED)
        raise
    except _Terminated:
        _fail("terminated; nothing was written", 143)
    except OSError as error:
        _fail(str(error), 1)
    except Exception as error:
        cause = _our_error(error)
        if cause is None:
            raise
        _fail(str(cause), 1)


def _our_error(error: BaseException | None) -> SparseSSMError | None:
    """Our own error where LLM Compressor has wrapped it in one that quotes source code."""
    while error is not None and not isinstance(error, SparseSSMError):
        error = error.__cause__
    return error


class _Terminated(BaseException):
    pass


def _terminate(number: int, frame: Any) -> None:
    raise _Terminated


def _fail(message: str, code: int) -> None:
    err.print(f"[bold red]error:[/] {escape(' '.join(message.split()))}", soft_wrap=True)
    sys.exit(code)


def _quiet(verbose: bool) -> None:
    """Keep the libraries' logs and, where nobody watches, their progress bars off the screen."""
    if verbose:
        return
    os.environ.setdefault("LLM_COMPRESSOR_LOG_LEVEL", "ERROR")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")
    warnings.filterwarnings("ignore", message="Attempting to save a model with offloaded modules")


def _choice(option: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise SparseSSMError(f"{option} must be one of {', '.join(allowed)}, got {value!r}")


def _source(name: str, trust_remote_code: bool, dtype: str, device: str) -> Any:
    _choice("--dtype", dtype, ("auto", "float32", "bfloat16", "float16"))
    _choice("--device", device, ("auto", "cpu", "cuda"))
    from sparsessm_plugin.pruning import ModelSource

    if device == "cuda":
        import torch

        if not torch.cuda.is_available():
            raise SparseSSMError("--device cuda: no CUDA device is available")
    return ModelSource(name, trust_remote_code, dtype, device)


def _vocab_size(skeleton: Any) -> int:
    return skeleton.get_input_embeddings().num_embeddings


def _windows(
    source: str, tokenizer: Any, length: int, vocab_size: int, text_field: str
) -> "Tensor":
    from sparsessm_plugin.evaluation.data import read_texts, tokenize, windows
    from sparsessm_plugin.vocabulary import check_token_ids

    tokens = tokenize(read_texts(source, text_field), tokenizer)
    samples = windows(tokens, length, source)
    check_token_ids(samples, vocab_size, source)
    return samples


@contextmanager
def _progress(label: str, total: int) -> "Iterator[Any]":
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

    with Progress(
        "{task.description}",
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=err,
        transient=True,
        disable=not err.is_terminal,
    ) as progress:
        task = progress.add_task(label, total=total)
        yield lambda done: progress.advance(task, done)


def _evaluate(model: Any, samples: "Tensor", batch_size: int, label: str) -> "Perplexity":
    from sparsessm_plugin.evaluation.perplexity import evaluate_perplexity

    with _progress(f"perplexity, {label}", len(samples)) as advance:
        return evaluate_perplexity(model, samples, batch_size, advance)


def _save(model: Any, tokenizer: Any, folder: Path) -> None:
    from safetensors import SafetensorError

    try:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    except SafetensorError as error:  # the writer's own error for a full disk, say
        raise SparseSSMError(f"cannot save the model: {error}") from error


def _print_pruned(report: dict[str, Any], output: Path) -> None:
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
        out.print(
            f"{modifier['modifier']}: pruned {total['pruned']:,} of {total['entries']:,} entries "
            f"({total['sparsity']:.2%}) in {total['seconds']:.1f} s"
        )
    out.print(f"saved to {escape(str(output))}", soft_wrap=True)


def _print_inventory(name: str, inventory: "Inventory") -> None:
    mixers = inventory.mixers
    families = sorted({adapter.family for adapter in mixers})
    out.print(
        f"{escape(name)}: {len(mixers)} state-space mixers ({', '.join(families)}), "
        f"{inventory.parameters:,} parameters",
        soft_wrap=True,
    )
    table = Table("component", "parameters", "share", "zeros", "memoryless", box=None)
    for kind, component in inventory.components.items():
        if component.parameters:
            table.add_row(
                kind,
                f"{component.parameters:,}",
                f"{component.parameters / inventory.parameters:.2%}",
                f"{component.zeros / component.parameters:.2%}",
                f"{component.memoryless / component.parameters:.2%}" if kind == "A_log" else "",
            )
    out.print(table)
    kinds = [kind for kind in inventory.components if kind in mixers[0].projections]
    table = Table("mixer", "D", "N", "R", "K", "A_log", "memoryless", *kinds, box=None)
    table.title = "zeros by mixer (D channels, N states, R rank of dt, K convolution)"
    table.title_justify = "left"
    for adapter in mixers:
        layer, sizes = inventory.layers[adapter.name], adapter.sizes
        A_log = layer["A_log"]
        table.add_row(
            adapter.name,
            str(sizes.intermediate_size),
            str(sizes.state_size),
            str(sizes.time_step_rank),
            str(sizes.conv_kernel_size),
            f"{A_log.zeros / A_log.parameters:.1%}",
            f"{A_log.memoryless / A_log.parameters:.1%}",
            *(f"{layer[kind].zeros / layer[kind].parameters:.1%}" for kind in kinds),
        )
    out.print(table)


if __name__ == "__main__":
    main()
