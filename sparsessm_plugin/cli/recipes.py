"""``sparsessm recipes``."""

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from sparsessm_plugin.cli.console import out


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
