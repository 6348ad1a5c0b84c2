"""Which part of the package imports which: the rooms stand in one order, and no circle."""

import ast
from pathlib import Path

import sparsessm_plugin

ROOT = Path(sparsessm_plugin.__file__).parent
# A room imports from those before it, and from itself.
ORDER = ("backends", "recurrence", "mixers", "selection", "criteria", "solvers", "refit")


def imports(path):
    """Dotted names inside the package that a file imports, anywhere in it."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("sparsessm_plugin."):
            yield node.module.removeprefix("sparsessm_plugin.")


def test_rooms_import_in_one_direction():
    leaves = {"errors"}
    for i, room in enumerate(ORDER):
        allowed = {*ORDER[: i + 1], *leaves}
        for path in (ROOT / room).rglob("*.py"):
            for name in imports(path):
                assert name.partition(".")[0] in allowed, f"{path.relative_to(ROOT)}: {name}"
