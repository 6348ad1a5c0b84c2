"""``sparsessm demo``."""

from sparsessm_plugin.cli import tables
from sparsessm_plugin.cli.console import err, quiet
from sparsessm_plugin.cli.options import NumSamples, SeqLength


def demo(
    num_samples: NumSamples = 64,
    max_seq_length: SeqLength = 512,
) -> None:
    """Compare the pruning criteria on the packaged demo checkpoint; needs no download."""
    quiet(False)
    from rich.progress import Progress

    from sparsessm_plugin.recipes.demo import count_models, run_demo

    with Progress(console=err, transient=True) as bar:
        task = bar.add_task("pruning", total=count_models())
        result = run_demo(num_samples, max_seq_length, lambda: bar.advance(task))
    tables.print_demo(result)
