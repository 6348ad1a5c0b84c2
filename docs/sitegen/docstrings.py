"""Whether public objects say what they are, and how their docstrings read on a page."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "sparsessm_plugin"
_ROLE = re.compile(r":(?:class|func|meth|data|mod|attr|exc):<code>~?(?:[\w.]+\.)?(\w+)</code>")
_SELF = ("self", "cls")
_PLAIN = ("ABC", "BaseModel", "Exception", "Generic", "NamedTuple", "Protocol", "Registry")


Found = tuple[Path, ast.ClassDef | ast.FunctionDef]


def module_file(name: str) -> Path | None:
    """The file of a module of the package, by its dotted name."""
    place = ROOT.joinpath(*name.split("."))
    found = [p for p in (place.with_suffix(".py"), place / "__init__.py") if p.exists()]
    return found[0] if found else None


def resolve(path: Path, name: str) -> Found | None:
    """The class or function that a name of a module stands for, wherever it is defined."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ClassDef | ast.FunctionDef) and node.name == name:
            return path, node
        if isinstance(node, ast.ImportFrom) and node.module and not node.level:
            for alias in node.names:
                source = module_file(node.module)
                if (alias.asname or alias.name) == name and source and source != path:
                    return resolve(source, alias.name)
    return None


def exported() -> Iterator[Found]:
    """Every class and function that an ``__init__`` of the package lists in ``__all__``, once."""
    seen = set()
    for path in sorted(PACKAGE.rglob("__init__.py")):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "__all__":
                for name in ast.literal_eval(node.value):
                    found = resolve(path, name)
                    if found and (found[0], name) not in seen:
                        seen.add((found[0], name))
                        yield found


def parameters(node: ast.FunctionDef) -> list[str]:
    """Names of a function's parameters."""
    a = node.args
    return [x.arg for x in (*a.posonlyargs, *a.args, *a.kwonlyargs) if x.arg not in _SELF]


def problems() -> list[str]:
    """One line for each public object that leaves out what it is, or what it is given."""
    return [
        f"{path.relative_to(ROOT)}: {line}"
        for path, node in exported()
        for line in problems_of(path, node)
    ]


def problems_of(path: Path, node: ast.ClassDef | ast.FunctionDef) -> list[str]:
    """What the docstring of a function, or of a class and its public methods, leaves out."""
    text = ast.get_docstring(node)
    if not text:
        return [f"{node.name} has no docstring"]
    if isinstance(node, ast.FunctionDef):
        missing = [p for p in parameters(node) if f":param {p}:" not in text]
        # a single parameter is what the sentence speaks of
        if missing and len(parameters(node)) > 1:
            return [f"{node.name} does not describe {', '.join(missing)}"]
        if raises(node) and ":raises " not in text:
            return [f"{node.name} does not say that it raises an error"]
        return []
    return [
        f"{node.name}.{part.name} has no docstring"
        for part in node.body
        if isinstance(part, ast.FunctionDef)
        and not part.name.startswith("_")
        and not ast.get_docstring(part)
        and not is_override(path, node, part.name)
    ]


def raises(node: ast.FunctionDef) -> bool:
    """Whether a function refuses something in its own lines."""
    found = [n.exc for n in ast.walk(node) if isinstance(n, ast.Raise) and n.exc]
    return any("SparseSSMError" in ast.unparse(error) for error in found)


def is_override(path: Path, node: ast.ClassDef, method: str) -> bool:
    """Whether a base has this method, or may have it, since it is of another package."""
    for base in node.bases:
        name = ast.unparse(base).partition("[")[0]
        found = resolve(path, name)
        if found is None:
            if name not in _PLAIN:
                return True
            continue
        inside = [p.name for p in found[1].body if isinstance(p, ast.FunctionDef)]
        if method in inside or is_override(found[0], found[1], method):
            return True
    return False


def without_roles(html: str) -> str:
    """Sphinx's roles, which docstrings use, as plain code."""
    return _ROLE.sub(r"<code>\1</code>", html)
