"""``sparsessm demo``."""

from pathlib import Path
from typing import Annotated

import typer

from sparsessm_plugin.cli import tables
from sparsessm_plugin.cli.console import err, print_json, quiet, say_replaced
from sparsessm_plugin.cli.options import REPORT, AsJson, Verbose, new_file


def demo(
    quick: Annotated[
        bool,
        typer.Option(
            "--quick", help="Less text, short fits, few repeats; the numbers are rougher."
        ),
    ] = False,
    plot: Annotated[
        Path | None, typer.Option(help="Draw costs and gains into this new .png or .svg file.")
    ] = None,
    output: Annotated[Path | None, REPORT] = None,
    as_json: AsJson = False,
    verbose: Verbose = False,
) -> None:
    """Show in one table what pays, on the packaged checkpoint; needs no download."""
    quiet(verbose)
    new_file("--plot", plot, ".png", ".svg")
    new_file("--output", output, ".json")
    from sparsessm_plugin.evaluation.latency import check_matplotlib
    from sparsessm_plugin.files import write_json
    from sparsessm_plugin.progress import Stage
    from sparsessm_plugin.progress import shown as bars_shown
    from sparsessm_plugin.recipes.demo import QUICK, Sizes, count_models, run_demo
    from sparsessm_plugin.recipes.demo_picture import plot_demo
    from sparsessm_plugin.recipes.versions import versions

    if plot is not None:
        check_matplotlib()
    with bars_shown(err), Stage("demo", count_models() + 1) as stage:
        result = run_demo(QUICK if quick else Sizes(), stage.at, stage.advance)
    report = {**result.to_dict(), "versions": versions()}
    if output is not None:
        say_replaced(output)
        write_json(output, report)
    if plot is not None:
        say_replaced(plot)
        plot_demo(result, plot)
    if as_json:
        print_json(report)
    else:
        tables.print_demo(result)
