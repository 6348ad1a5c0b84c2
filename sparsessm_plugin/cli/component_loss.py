"""``sparsessm component-loss``."""

from pathlib import Path
from typing import Annotated

import typer

from sparsessm_plugin.cli import tables
from sparsessm_plugin.cli.console import print_json, progress, quiet, say_replaced
from sparsessm_plugin.cli.inputs import source_of, vocab_size_of, windows_of
from sparsessm_plugin.cli.options import (
    CALIBRATION,
    MOST,
    REPORT,
    AsJson,
    BatchSize,
    Device,
    Dtype,
    ModelArgument,
    NumSamples,
    Seed,
    SeqLength,
    TextField,
    Trust,
    Unused,
    Verbose,
    as_options,
    new_file,
    shares_of,
)


def component_loss(
    model: ModelArgument,
    calibration: Annotated[str, CALIBRATION],
    output: Annotated[Path, REPORT],
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
        Path | None, typer.Option(help="Draw heat maps into this new .png or .svg file.")
    ] = None,
    num_samples: NumSamples = 32,
    eval_samples: Annotated[
        int, typer.Option(min=1, max=MOST, help="Windows to measure on, at most.")
    ] = 16,
    max_seq_length: SeqLength = 512,
    batch_size: BatchSize = 4,
    text_field: TextField = "text",
    seed: Seed = 0,
    device: Device = "auto",
    dtype: Dtype = "auto",
    trust_remote_code: Trust = False,
    allow_unused_tensors: Unused = False,
    as_json: AsJson = False,
    verbose: Verbose = False,
) -> None:
    """Prune each part of a model alone and measure what it costs in perplexity."""
    quiet(verbose)
    shares, parts = shares_of(sparsities), [part.strip() for part in by.split(",")]
    new_file("--output", output, ".json")
    new_file("--plot", plot, ".png", ".svg")
    source = source_of(model, trust_remote_code, dtype, device, allow_unused_tensors)
    from sparsessm_plugin.evaluation.component_loss import (
        check_settings,
        count_measurements,
        hold_back,
        measure_component_loss,
        plot_component_loss,
    )
    from sparsessm_plugin.evaluation.data import calibration_loader
    from sparsessm_plugin.evaluation.latency import check_matplotlib
    from sparsessm_plugin.files import write_json
    from sparsessm_plugin.recipes.versions import versions

    with as_options("--sparsities", "--solver", "--by"):
        check_settings(shares, solver, parts)
    if plot is not None:
        check_matplotlib()
    skeleton = source.load_skeleton()
    total = count_measurements(skeleton, shares, parts)
    vocab_size, tokenizer = vocab_size_of(skeleton), source.load_tokenizer()
    samples = windows_of(calibration, tokenizer, max_seq_length, vocab_size, text_field)
    if text is None:
        samples, held_back = hold_back(samples, eval_samples)
    else:
        held_back = windows_of(text, tokenizer, max_seq_length, vocab_size, text_field, "--text")[
            :eval_samples
        ]
    loader = calibration_loader(samples, num_samples, batch_size, seed)
    loaded = source.load()
    with progress("component loss", total) as advance:
        result = measure_component_loss(
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
    say_replaced(output)
    write_json(output, report)
    if plot is not None:
        say_replaced(plot)
        plot_component_loss(result, plot)
    if as_json:
        print_json(report)
    else:
        tables.print_component_loss(result)
