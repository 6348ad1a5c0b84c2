"""Which part of the package imports which: the rooms stand in one order, and no circle."""

import ast
from pathlib import Path

import sparsessm_plugin

ROOT = Path(sparsessm_plugin.__file__).parent
# A room imports from those before it, from itself, and from the files beside the rooms.
ORDER = (
    *("backends", "recurrence", "families", "selection", "criteria", "solvers", "refit"),
    *("dependency_graph", "calibration", "training", "allocation", "checkpoints", "methods"),
    *("modifiers", "evaluation", "recipes", "cli"),
)
# What refuses recipes knows every modifier; a modifier asks it when it begins.
EXCEPTIONS = {("modifiers", "recipes.conflicts")}


def imports(path):
    """Dotted names inside the package that a file imports, anywhere in it."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("sparsessm_plugin."):
            yield node.module.removeprefix("sparsessm_plugin.")
        elif isinstance(node, ast.ImportFrom) and node.module == "sparsessm_plugin":
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.Import):
            names = (alias.name for alias in node.names)
            yield from (n.partition(".")[2] for n in names if n.startswith("sparsessm_plugin."))


def test_every_folder_with_code_is_a_room():
    assert {path.parent.name for path in ROOT.glob("*/*.py")} == set(ORDER)


def test_rooms_import_in_one_direction():
    leaves = {path.stem for path in ROOT.glob("*.py")} - {"__init__", "registration"}
    for i, room in enumerate(ORDER):
        allowed = {*ORDER[: i + 1], *leaves, "__version__"}
        for path in (ROOT / room).rglob("*.py"):
            for name in imports(path):
                known = name.partition(".")[0] in allowed or (room, name) in EXCEPTIONS
                assert known, f"{path.relative_to(ROOT)}: {name}"


def test_files_beside_the_rooms_import_none_of_them():
    for path in ROOT.glob("*.py"):
        if path.stem not in ("__init__", "registration"):  # public names, and modifiers
            for name in imports(path):
                assert name.partition(".")[0] not in ORDER, f"{path.name}: {name}"
