"""``sparsessm fit``."""

import os
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any

import typer

from sparsessm_plugin.cli import tables
from sparsessm_plugin.cli.console import err, print_json, quiet, say_replaced
from sparsessm_plugin.cli.inputs import source_of, vocab_size_of, warn_of_few, windows_of
from sparsessm_plugin.cli.options import (
    CALIBRATION,
    MOST,
    AsJson,
    BatchSize,
    Device,
    Dtype,
    ModelArgument,
    Result,
    Seed,
    SeqLength,
    TextField,
    Trust,
    Unused,
    Verbose,
    choice,
    new_file,
    split_names,
)
from sparsessm_plugin.cli.results import check_output, warn_of_more_bytes, write_result
from sparsessm_plugin.cli.stopping import check_signals
from sparsessm_plugin.errors import SparseSSMError

_WINDOWS = {"cuda": 4096, "cpu": 128}  # distillation is worth its time on a GPU, and wants text


def fit(
    model: ModelArgument,
    target: Annotated[
        list[str],
        typer.Option(
            help="parameters=0.7, memory=1.5GB, state=0.25 or speed=1.5; repeated, or with "
            "commas, all are to be reached."
        ),
    ],
    calibration: Annotated[str, CALIBRATION],
    output: Result,
    runtime: Annotated[
        str,
        typer.Option(
            help="That must take the sizes: transformers, vllm, mlx-lm, llama.cpp-cuda, ..."
        ),
    ] = "transformers",
    batch: Annotated[
        int, typer.Option(min=1, max=MOST, help="Sequences at once, for a speed.")
    ] = 1,
    length: Annotated[
        int, typer.Option(min=1, max=MOST, help="Tokens of each, for a speed or state.")
    ] = 2048,
    phase: Annotated[str, typer.Option(help="What is to be fast: decode or prefill.")] = "decode",
    minutes: Annotated[
        float, typer.Option(help="For search and distillation, once the model is loaded.")
    ] = 10.0,
    axes: Annotated[
        list[str] | None,
        typer.Option(help="Axes to choose from, with commas or repeated; default all."),
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(help="Draw loss against cost into this new .png or .svg file.")
    ] = None,
    search_tokens: Annotated[
        int | None,
        typer.Option(
            min=1, max=MOST, help="That a trial fits by; default 65536 on a GPU, 12288 on a CPU."
        ),
    ] = None,
    generated: Annotated[
        int,
        typer.Option(
            min=0, max=MOST, help="Tokens that the dense model writes for the distillation."
        ),
    ] = 0,
    num_samples: Annotated[
        int | None,
        typer.Option(
            min=1, max=MOST, help="Calibration windows; default 4096 on a GPU, 128 on a CPU."
        ),
    ] = None,
    max_seq_length: SeqLength = 512,
    batch_size: BatchSize = 8,
    text_field: TextField = "text",
    seed: Seed = 0,
    device: Device = "auto",
    dtype: Dtype = "auto",
    trust_remote_code: Trust = False,
    allow_unused_tensors: Unused = False,
    as_json: AsJson = False,
    verbose: Verbose = False,
) -> None:
    """Make a model reach a target by the mix of axes that loses least, and save it."""
    quiet(verbose)
    if not verbose:
        os.environ.setdefault("TQDM_DISABLE", "1")
    choice("--phase", phase, ("decode", "prefill"))
    new_file("--plot", plot, ".png", ".svg")
    if "TORCHELASTIC_RUN_ID" in os.environ:
        raise SparseSSMError("fit runs in one process; start it without torchrun")
    source = source_of(model, trust_remote_code, dtype, device, allow_unused_tensors)
    import torch

    from sparsessm_plugin.checkpoints.types import at_new_places, round_weights
    from sparsessm_plugin.cost import with_index
    from sparsessm_plugin.evaluation.components import take_inventory
    from sparsessm_plugin.evaluation.data import calibration_loader
    from sparsessm_plugin.evaluation.latency import check_matplotlib
    from sparsessm_plugin.files import output_directory, reports_held
    from sparsessm_plugin.fitting import FitSettings, Prepared, make_plan, outcome, split
    from sparsessm_plugin.fitting.losses import HeldBack
    from sparsessm_plugin.fitting.picture import plot_fit
    from sparsessm_plugin.fitting.shapes import Shapes
    from sparsessm_plugin.fitting.targets import parse_targets
    from sparsessm_plugin.fitting.timing import Workload
    from sparsessm_plugin.progress import shown as bars_shown
    from sparsessm_plugin.recipes import parse_recipe
    from sparsessm_plugin.recipes.pruning import check_saving, prune

    # everything that can be wrong is looked at before the weights are
    check_output(output, model)
    if plot is not None:
        check_matplotlib()
    place = "cuda" if device != "cpu" and torch.cuda.is_available() else "cpu"
    settings = FitSettings(
        parse_targets(target),
        runtime,
        Workload(batch, length, "prefill" if phase == "prefill" else "decode"),
        minutes,
        tuple(split_names("--axes", axes)) if axes else None,
        search_tokens,
        generated,
    )
    skeleton = source.load_skeleton()
    tokenizer = source.load_tokenizer()
    samples = windows_of(
        calibration, tokenizer, max_seq_length, vocab_size_of(skeleton), text_field
    )
    if num_samples is not None:
        warn_of_few(samples, num_samples, calibration, max_seq_length)
    drawn = num_samples or _WINDOWS[place]
    batches = list(calibration_loader(samples, drawn, batch_size, seed))
    fitted, held = split(batches, calibration)
    rows = torch.cat([entry["input_ids"] for entry in fitted])
    loader = calibration_loader(rows, len(rows), batch_size, seed)  # in an order of its own
    wanted = skeleton.config.dtype if dtype == "auto" else getattr(torch, dtype)
    bars: Any = nullcontext if verbose else lambda: bars_shown(err)
    with bars():
        shapes = Shapes(skeleton, wanted, trust_remote_code)
        prepared = Prepared(shapes, settings, with_index(torch.device(place)))

    with reports_held(), output_directory(output) as folder:
        check_saving(skeleton, tokenizer, folder)
        dense, types = source.load(), source.stored_types()
        started = time.monotonic()
        before = take_inventory(dense).to_dict()
        with bars():
            held_back = HeldBack(dense, held)
            plan = make_plan(prepared, dense, list(loader), held_back, started)
            check_signals()
            recipe = parse_recipe(plan.recipe, "the recipe found")
            pruned = prune(
                dense, recipe, loader, tokenizer, "independent", source.load, trust_remote_code
            )
            types = at_new_places(pruned.model, types)
            round_weights(pruned.model, types)
            result = outcome(prepared, plan, pruned.model, held_back, started)
        fields = {
            "model": model,
            "target": list(plan.targets),
            "runtime": runtime,
            "workload": vars(settings.workload),
            "minutes": minutes,
            "recipe": {"name": "fit", "yaml": plan.recipe},
            "calibration": {
                "source": calibration,
                "samples": len(rows),
                "held_back_tokens": held_back.tokens,
                "max_seq_length": max_seq_length,
                "seed": seed,
            },
            **result.to_dict(),
            "seconds": {"fit": round(result.seconds, 3)},
        }
        report = write_result(folder, pruned, tokenizer, before, fields, types)
        warn_of_more_bytes(source, folder)
    if plot is not None:
        say_replaced(plot)
        plot_fit(result, plot)
    if as_json:
        print_json({"output": str(output), **report})
    else:
        tables.print_fit(result, output)
