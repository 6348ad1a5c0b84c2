"""``sparsessm bench``."""

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from sparsessm_plugin.cli import tables
from sparsessm_plugin.cli.console import print_json, progress, quiet, say_replaced
from sparsessm_plugin.cli.inputs import source_of, vocab_size_of
from sparsessm_plugin.cli.options import (
    MOST,
    REPORT,
    AsJson,
    Device,
    Dtype,
    ModelArgument,
    Trust,
    Unused,
    Verbose,
    as_options,
    choice,
    new_file,
    numbers_of,
)
from sparsessm_plugin.errors import SparseSSMError


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
    context: Annotated[
        str,
        typer.Option(help="Tokens that attention looks back at when decoding begins, with commas."),
    ] = "0",
    memory: Annotated[
        str | None,
        typer.Option(
            help="Count the sequences that fit into so much, as 80GiB; the GPU's, if any."
        ),
    ] = None,
    at_capacity: Annotated[
        bool,
        typer.Option(
            "--at-capacity", help="Also decode as many sequences as fit; on a CPU, into --memory."
        ),
    ] = False,
    runtime: Annotated[
        str, typer.Option(help="transformers, vllm or llama.cpp, where it is installed.")
    ] = "transformers",
    runtime_python: Annotated[
        str | None, typer.Option(help="The Python that has vLLM; default: the one that runs this.")
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(help="Draw tokens/s into this new .png or .svg file.")
    ] = None,
    output: Annotated[Path | None, REPORT] = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    trust_remote_code: Trust = False,
    allow_unused_tensors: Unused = False,
    as_json: AsJson = False,
    verbose: Verbose = False,
) -> None:
    """Time prefill and decode, and weigh the state cache."""
    quiet(verbose)
    sizes = numbers_of("--batch-sizes", batch_sizes, least=1)
    contexts = numbers_of("--context", context)
    new_file("--plot", plot, ".png", ".svg")
    new_file("--output", output, ".json")
    names = [model] if against is None else [against, model]
    choice("--runtime", runtime, ("transformers", "vllm", "llama.cpp"))
    if runtime != "transformers":
        if cuda_graphs or at_capacity or memory is not None or contexts != [0]:
            raise SparseSSMError(
                f"--runtime {runtime} times prefill and decode; --cuda-graphs, --context, --memory "
                "and --at-capacity are of transformers"
            )
        _other_runtime(
            runtime,
            names,
            sizes,
            prompt_length,
            decode_steps,
            repeats,
            dtype,
            runtime_python or sys.executable,
            output,
            plot,
            as_json,
        )
        return
    sources = [
        source_of(name, trust_remote_code, dtype, device, allow_unused_tensors) for name in names
    ]
    import torch

    from sparsessm_plugin.evaluation.capacity import (
        bytes_of,
        decode_at_capacity,
        measure_capacity,
        memory_of,
    )
    from sparsessm_plugin.evaluation.latency import (
        check_matplotlib,
        default_warmup,
        measure_latency,
        plot_latency,
    )
    from sparsessm_plugin.families import find_mixers
    from sparsessm_plugin.files import write_json
    from sparsessm_plugin.recipes.versions import versions

    with as_options("--memory"):
        given = None if memory is None else bytes_of(memory)
    if at_capacity and given is None and not (device != "cpu" and torch.cuda.is_available()):
        raise SparseSSMError(
            "--at-capacity on a CPU needs --memory, as 2GiB: how much of the main memory to fill"
        )
    if plot is not None:
        check_matplotlib()
    for source in sources:
        find_mixers(source.load_skeleton())
    if against == model:  # a comparison with itself shows the noise
        names[0] += " (again)"
    models = {name: source.load() for name, source in zip(names, sources, strict=True)}
    place = models[model].device
    if at_capacity and given is not None and given > memory_of(place):
        of_it = "" if place.type == "cuda" else " available"
        raise SparseSSMError(
            f"--at-capacity: {place} has {memory_of(place):,} bytes{of_it}, less than "
            f"--memory {memory}"
        )
    if given is None and (at_capacity or place.type == "cuda"):
        given = memory_of(place)
    warmup = default_warmup(place)
    total = len(sizes) * len(contexts) * (warmup + repeats) * len(models)
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
            context=contexts,
        )
    capacities: dict[str, list[Any]] = {}
    full = []
    if given is not None:
        counted = contexts if any(cache.attention for cache in latency.caches.values()) else [0]
        capacities = {
            name: [measure_capacity(m, given, max(prompt_length, length)) for length in counted]
            for name, m in models.items()
        }
    if at_capacity:
        first = {name: found[0] for name, found in capacities.items()}
        with progress("as many as fit", len(models)) as advance:
            full = decode_at_capacity(models, first, decode_steps, repeats, cuda_graphs, advance)
    report = {
        "model": model,
        "against": against,
        "dtype": {name: str(m.dtype).removeprefix("torch.") for name, m in models.items()},
        "device": str(models[model].device),
        "repeats": repeats,
        **latency.to_dict(),
        "capacity": {k: [c.to_dict() for c in found] for k, found in capacities.items()},
        "at_capacity": [timing.to_dict() for timing in full],
        "versions": versions(),
    }
    if output is not None:
        say_replaced(output)
        write_json(output, report)
    if plot is not None:
        say_replaced(plot)
        plot_latency(latency, plot)
    if as_json:
        print_json(report)
        return
    tables.print_latency(latency)
    tables.print_capacity(capacities, full)


def _other_runtime(
    runtime: str,
    names: list[str],
    sizes: list[int],
    prompt_length: int,
    decode_steps: int,
    repeats: int,
    dtype: str,
    python: str,
    output: Path | None,
    plot: Path | None,
    as_json: bool,
) -> None:
    from sparsessm_plugin.evaluation.latency import check_matplotlib, plot_latency
    from sparsessm_plugin.evaluation.runtime_latency import check_runtime, measure_runtime
    from sparsessm_plugin.files import write_json
    from sparsessm_plugin.recipes.versions import versions

    if plot is not None:
        check_matplotlib()
    check_runtime(runtime, names, sizes)
    vocab = 0
    if runtime == "vllm":
        source = source_of(names[-1], False, "auto", "cpu", False)
        vocab = vocab_size_of(source.load_skeleton())
    with progress(f"latency in {runtime}", len(names)) as advance:
        latency = measure_runtime(
            *(runtime, names, vocab, sizes, prompt_length, decode_steps, repeats, dtype, python),
            progress=advance,
        )
    report = {"runtime": runtime, "dtype": dtype, **latency.to_dict(), "versions": versions()}
    if output is not None:
        say_replaced(output)
        write_json(output, report)
    if plot is not None:
        say_replaced(plot)
        plot_latency(latency, plot)
    if as_json:
        print_json(report)
    else:
        tables.print_latency(latency)
