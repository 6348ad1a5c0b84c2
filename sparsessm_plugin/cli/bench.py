"""``sparsessm bench``."""

from pathlib import Path
from typing import Annotated

import typer

from sparsessm_plugin.cli import tables
from sparsessm_plugin.cli.console import progress, quiet, say_replaced
from sparsessm_plugin.cli.inputs import source_of
from sparsessm_plugin.cli.options import (
    MOST,
    REPORT,
    Device,
    Dtype,
    ModelArgument,
    Trust,
    Unused,
    Verbose,
    new_file,
    numbers_of,
)


def bench(
    model: ModelArgument,
    against: Annotated[
        str | None, typer.Option(help="Compare with this model, in turns with it.")
    ] = None,
    batch_sizes: Annotated[str, typer.Option(help="Sequences at once, with commas.")] = "1,8",
    prompt_length: Annotated[int, typer.Option(min=1, max=MOST, help="Tokens a prompt.")] = 64,
    decode_steps: Annotated[int, typer.Option(min=1, max=MOST, help="Tokens to produce.")] = 8,
    repeats: Annotated[int, typer.Option(min=1, max=MOST, help="Repeats of each measurement.")] = 5,
    cuda_graphs: Annotated[
        bool, typer.Option("--cuda-graphs", help="Also decode from a CUDA graph.")
    ] = False,
    plot: Annotated[
        Path | None, typer.Option(help="Draw tokens/s into this new .png file.")
    ] = None,
    output: Annotated[Path | None, REPORT] = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    trust_remote_code: Trust = False,
    allow_unused_tensors: Unused = False,
    verbose: Verbose = False,
) -> None:
    """Time prefill and decode in transformers, and weigh the state cache."""
    quiet(verbose)
    sizes = numbers_of("--batch-sizes", batch_sizes, least=1)
    new_file("--plot", plot, ".png")
    new_file("--output", output, ".json")
    names = [model] if against is None else [against, model]
    sources = [
        source_of(name, trust_remote_code, dtype, device, allow_unused_tensors) for name in names
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
    with progress("latency", total) as advance:
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
        say_replaced(output)
        write_json(output, report)
    if plot is not None:
        say_replaced(plot)
        plot_latency(latency, plot)
    tables.print_latency(latency)
