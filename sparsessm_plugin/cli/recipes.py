"""``sparsessm recipes``."""

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from sparsessm_plugin.cli.console import out, print_json
from sparsessm_plugin.cli.options import AsJson, complete_recipe


def recipes(
    name: Annotated[
        str | None, typer.Argument(help="Print this recipe.", autocompletion=complete_recipe)
    ] = None,
    as_json: AsJson = False,
) -> None:
    """List the built-in recipes, or print one."""
    from sparsessm_plugin.recipes import describe_recipe, recipe_names, recipe_path

    if name is not None:
        text = Path(recipe_path(name)).read_text(encoding="utf-8")
        if as_json:
            print_json({"name": name, "description": describe_recipe(name), "yaml": text})
        else:
            out.print(text, end="", markup=False)
        return
    if as_json:
        print_json({recipe: describe_recipe(recipe) for recipe in recipe_names()})
        return
    table = Table("recipe", "what it does", box=None)
    for recipe in recipe_names():
        table.add_row(recipe, describe_recipe(recipe))
    out.print(table)
