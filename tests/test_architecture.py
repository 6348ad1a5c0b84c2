"""Which part of the package imports which: the rooms stand in one order, and no circle."""

import ast
from pathlib import Path

import sparsessm_plugin

ROOT = Path(sparsessm_plugin.__file__).parent
# A room imports from those before it, from itself, and from the files beside the rooms.
ORDER = (
    *("backends", "recurrence", "families", "selection", "criteria", "solvers", "refit"),
    *("dependency_graph", "calibration", "training", "allocation", "checkpoints", "methods"),
    *("modifiers", "evaluation", "recipes", "fitting", "cli"),
)
LONG = 500  # lines


def imports(path):
    """Dotted names inside the package that a file imports, anywhere in it."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            node.body = []  # what a package loads by name is stated for type checkers only
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("sparsessm_plugin."):
            inside = node.module.removeprefix("sparsessm_plugin.")
            for alias in node.names:  # which may be a module
                file = ROOT.joinpath(*inside.split("."), f"{alias.name}.py")
                yield f"{inside}.{alias.name}" if file.exists() else inside
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
                known = name.partition(".")[0] in allowed
                assert known, f"{path.relative_to(ROOT)}: {name}"


def test_files_beside_the_rooms_import_none_of_them():
    for path in ROOT.glob("*.py"):
        if path.stem not in ("__init__", "registration"):  # public names, and modifiers
            for name in imports(path):
                assert name.partition(".")[0] not in ORDER, f"{path.name}: {name}"


def test_no_module_imports_itself_by_way_of_others():
    """Imports inside functions count: they hide a circle, and do not open it."""
    modules = {_dotted(path): path for path in ROOT.rglob("*.py")}
    edges = {}
    for module, path in modules.items():
        wanted = set(imports(path))
        edges[module] = {n for n in wanted if n in modules and n not in ("", "__version__")}
    done, way = set(), []

    def walk(module):
        assert module not in way, " -> ".join([*way[way.index(module) :], module])
        if module not in done:
            way.append(module)
            for other in sorted(edges[module]):
                walk(other)
            done.add(way.pop())

    for module in sorted(edges):
        walk(module)


def test_methods_know_nothing_of_the_framework():
    for path in (ROOT / "methods").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            for name in names:
                assert name.partition(".")[0] != "llmcompressor", f"{path.name}: {name}"
                assert not name.startswith("sparsessm_plugin.modifiers"), f"{path.name}: {name}"


def test_long_files_say_why():
    """More than 500 lines want to be several files, or a reason in the first docstring."""
    for path in ROOT.rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        own = path.relative_to(ROOT).as_posix()
        if text.count("\n") > LONG:
            reason = ast.get_docstring(ast.parse(text)) or ""
            assert "One file because" in reason, f"{own} has more than {LONG} lines"


def _dotted(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def test_tests_share_helpers_through_conftest_alone():
    for path in Path(__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not [n for n in names if n.startswith("test_")], f"{path.name} imports {names}"
