"""``sparsessm inspect``."""

from dataclasses import asdict
from pathlib import Path

from sparsessm_plugin.cli import tables
from sparsessm_plugin.cli.console import print_json, quiet
from sparsessm_plugin.cli.inputs import source_of
from sparsessm_plugin.cli.options import AsJson, Dtype, ModelArgument, Trust, Unused, Verbose


def inspect(
    model: ModelArgument,
    dtype: Dtype = "auto",
    trust_remote_code: Trust = False,
    allow_unused_tensors: Unused = False,
    as_json: AsJson = False,
    verbose: Verbose = False,
) -> None:
    """Show a model's mixers, what its parameters are spent on, how sparse they are, and,
    for a folder, which runtimes load it."""
    quiet(verbose)
    source = source_of(model, trust_remote_code, dtype, "cpu", allow_unused_tensors)
    from sparsessm_plugin.evaluation.components import take_inventory
    from sparsessm_plugin.families import find_mixers
    from sparsessm_plugin.recipes.memory import read_at_once

    find_mixers(source.load_skeleton())  # an unknown model is refused before its weights load
    loaded = source.load()
    inventory, read = take_inventory(loaded), read_at_once(loaded)
    runtimes = None
    if Path(source.path).is_dir():
        from sparsessm_plugin.checkpoints.runtimes import runtime_support

        runtimes = list(runtime_support(source.path))
    if as_json:
        support = None if runtimes is None else [asdict(runtime) for runtime in runtimes]
        memory = {"weights": read.weights, "at_once": read.at_once}
        found = {"inventory": inventory.to_dict(), "memory": memory, "runtimes": support}
        print_json({"model": model, **found})
        return
    tables.print_inventory(model, inventory)
    tables.print_memory(read.weights, read.at_once)
    if runtimes is not None:
        tables.print_runtimes(runtimes)
