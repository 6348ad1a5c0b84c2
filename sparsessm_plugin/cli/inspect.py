"""``sparsessm inspect``."""

from pathlib import Path

from sparsessm_plugin.cli import tables
from sparsessm_plugin.cli.console import quiet
from sparsessm_plugin.cli.inputs import source_of
from sparsessm_plugin.cli.options import Dtype, ModelArgument, Trust, Unused, Verbose


def inspect(
    model: ModelArgument,
    dtype: Dtype = "auto",
    trust_remote_code: Trust = False,
    allow_unused_tensors: Unused = False,
    verbose: Verbose = False,
) -> None:
    """Show a model's mixers, what its parameters are spent on, how sparse they are, and,
    for a folder, which runtimes load it."""
    quiet(verbose)
    source = source_of(model, trust_remote_code, dtype, "cpu", allow_unused_tensors)
    from sparsessm_plugin.evaluation.components import take_inventory
    from sparsessm_plugin.families import find_mixers

    find_mixers(source.load_skeleton())  # an unknown model is refused before its weights load
    tables.print_inventory(model, take_inventory(source.load()))
    if Path(source.path).is_dir():
        from sparsessm_plugin.checkpoints.runtimes import runtime_support

        tables.print_runtimes(runtime_support(source.path))
