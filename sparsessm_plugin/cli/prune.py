"""``sparsessm prune``."""

import os
import time
from contextlib import ExitStack, nullcontext, redirect_stderr, redirect_stdout
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sparsessm_plugin.cli import tables
from sparsessm_plugin.cli.console import err, print_json, quiet
from sparsessm_plugin.cli.inputs import (
    measure_perplexity,
    source_of,
    vocab_size_of,
    warn_of_few,
    windows_of,
)
from sparsessm_plugin.cli.options import (
    CALIBRATION,
    OFFLOADS,
    PIPELINES,
    AsJson,
    BatchSize,
    Device,
    Dtype,
    ModelArgument,
    NumSamples,
    Offload,
    OffloadFolder,
    Pipeline,
    Result,
    Seed,
    SeqLength,
    TextField,
    Trust,
    Unused,
    Verbose,
    choice,
    complete_recipe,
    of_option,
    split_names,
)
from sparsessm_plugin.cli.results import (
    check_output,
    warn_of_lost_zeros,
    warn_of_more_bytes,
    write_result,
)

if TYPE_CHECKING:
    from collections.abc import Callable


def _on_ranks(command: "Callable[..., None]") -> "Callable[..., None]":
    """Let ``prune`` run on all ranks of torchrun, where it was started so; rank 0 prints."""

    @wraps(command)
    def run(**options: Any) -> None:
        quiet(options["verbose"])
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


@_on_ranks
def prune(
    model: ModelArgument,
    recipe: Annotated[
        str,
        typer.Option(
            help="YAML file, or a name from `sparsessm recipes`.", autocompletion=complete_recipe
        ),
    ],
    output: Result,
    calibration: Annotated[str | None, CALIBRATION] = None,
    num_samples: NumSamples = 64,
    max_seq_length: SeqLength = 2048,
    batch_size: BatchSize = 4,
    text: Annotated[
        str | None, typer.Option(help="Also measure perplexity on this text, before and after.")
    ] = None,
    text_field: TextField = "text",
    pipeline: Pipeline = "independent",
    runtime: Annotated[
        list[str] | None,
        typer.Option(
            help="Let removals leave sizes that this runtime takes, mlx-lm or llama.cpp-cuda "
            "for example; repeatable."
        ),
    ] = None,
    seed: Seed = 0,
    device: Device = "auto",
    offload: Offload = "auto",
    offload_folder: OffloadFolder = None,
    dtype: Dtype = "auto",
    trust_remote_code: Trust = False,
    allow_unused_tensors: Unused = False,
    as_json: AsJson = False,
    verbose: Verbose = False,
) -> None:
    """Prune a model with a recipe and save it; under torchrun, on several ranks together."""
    choice("--pipeline", pipeline, PIPELINES)
    choice("--offload", offload, OFFLOADS)
    source = source_of(model, trust_remote_code, dtype, device, allow_unused_tensors)
    from tempfile import TemporaryDirectory

    from sparsessm_plugin import distributed
    from sparsessm_plugin.checkpoints.types import at_new_places, round_weights
    from sparsessm_plugin.evaluation.components import take_inventory
    from sparsessm_plugin.evaluation.data import calibration_loader
    from sparsessm_plugin.files import output_directory, reports_held
    from sparsessm_plugin.progress import shown as bars_shown
    from sparsessm_plugin.recipes import load_recipe
    from sparsessm_plugin.recipes.offload import offloaded
    from sparsessm_plugin.recipes.pruning import check_saving
    from sparsessm_plugin.recipes.pruning import prune as run_recipe

    rank, ranks = distributed.rank(), distributed.world_size()
    # everything that can be wrong is looked at before the weights are
    check_output(output, model)
    with of_option("--recipe"):
        checked = load_recipe(recipe)
    if runtime:
        with of_option("--runtime"):
            checked = checked.for_runtimes(split_names("--runtime", runtime))
    checked.check_data(calibration)
    checked.check_pipeline(pipeline)
    skeleton = source.load_skeleton()
    checked.check_model(skeleton)
    vocab_size = vocab_size_of(skeleton)
    tokenizer = source.load_tokenizer(calibration is not None or text is not None)
    loader, calibration_report = None, None
    if calibration is not None:
        samples = windows_of(calibration, tokenizer, max_seq_length, vocab_size, text_field)
        warn_of_few(samples, num_samples, calibration, max_seq_length)
        loader = calibration_loader(samples, num_samples, batch_size, seed, (rank, ranks))
        calibration_report = {
            "source": calibration,
            "samples": min(num_samples, len(samples)),
            "max_seq_length": max_seq_length,
            "seed": seed,
        }
    text_samples = None
    if text is not None and rank == 0:
        text_samples = windows_of(text, tokenizer, max_seq_length, vocab_size, text_field, "--text")

    # LLM Compressor's save wants every rank, and writes on rank 0
    with (
        reports_held(),
        output_directory(output) if rank == 0 else TemporaryDirectory() as place,
        ExitStack() as stack,
    ):
        folder = Path(place)
        check_saving(skeleton, tokenizer, folder)
        source = stack.enter_context(
            offloaded(source, checked, skeleton, offload, offload_folder, output)
        )
        started = time.perf_counter()
        dense, types = source.load(), source.stored_types()
        loading = time.perf_counter() - started
        before = take_inventory(dense).to_dict()
        perplexity: dict[str, Any] = {}
        if text_samples is not None:
            result = measure_perplexity(dense, text_samples, batch_size, "dense ")
            perplexity = {"text": text, "before": result.to_dict()}
        # several bars at once garble each other
        with nullcontext() if verbose else bars_shown(err):
            pruned = run_recipe(
                dense, checked, loader, tokenizer, pipeline, source.load, trust_remote_code
            )
        types = at_new_places(pruned.model, types)
        round_weights(pruned.model, types)
        if text_samples is not None:
            result = measure_perplexity(pruned.model, text_samples, batch_size, "pruned")
            perplexity["after"] = result.to_dict()
            perplexity["ratio"] = result.perplexity / perplexity["before"]["perplexity"]
        distributed.gather("saving", None)  # patient, unlike the backends
        fields = {
            "model": model,
            "recipe": {"name": recipe, "yaml": checked.text},
            "calibration": calibration_report,
            "perplexity": perplexity or None,
            "seconds": {"load": round(loading, 3), "oneshot": round(pruned.seconds, 3)},
            "tokens_per_second": round(pruned.tokens / pruned.seconds, 1),
            "ranks": ranks,
            "offload": source.offload,
        }
        report = write_result(folder, pruned, tokenizer, before, fields, types)
        if rank == 0:
            warn_of_more_bytes(source, folder)
            warn_of_lost_zeros(report["before"], report["after"])
    if as_json:
        print_json({"output": str(output), **report})
    else:
        tables.print_pruned(report, output)
