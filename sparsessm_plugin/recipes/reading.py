"""Reading a recipe: within bounds, and nothing of it dropped in silence.

LLM Compressor skips stages and groups that do not have its form. What it would skip of ours is an
error here, in the command and, by :mod:`sparsessm_plugin.registration`, in ``oneshot()``.
"""

import os
from collections.abc import Collection, Hashable, Iterator, Mapping
from typing import Any

import yaml

from sparsessm_plugin.errors import SparseSSMError, cut, shown

# Characters and entries of a recipe, its aliases written out.
MAX_SIZE = 1 << 22


def read_yaml(text: str, name: str) -> Any:
    """What YAML says, without code, duplicate keys or aliases that write out to a flood.

    :param text: the YAML
    :param name: of the recipe, for the message
    :raises SparseSSMError: one line
    """
    if len(text) > MAX_SIZE:
        raise SparseSSMError(f"{name} is longer than {MAX_SIZE:,} characters; no recipe is")
    try:
        return yaml.load(text, Loader=_BoundedLoader)  # a SafeLoader
    except (yaml.YAMLError, ValueError, TypeError, RecursionError, OverflowError) as error:
        raise SparseSSMError(f"{name} is not valid YAML: {cut(_yaml_problem(error))}") from error


def check_text(text: str, name: str, stage: str | None = None) -> None:
    """Check a recipe that names a modifier of ours, before LLM Compressor reads it.

    :param text: YAML or JSON
    :param name: of the recipe, for the message
    :param stage: with what the stages to run begin
    :raises SparseSSMError: it cannot be read, or has no such stage
    """
    stages = read_yaml(text, name)
    if not stage or not isinstance(stages, Mapping):
        return
    if not any(str(key).startswith(stage) for key in stages):
        known = cut(", ".join(map(str, stages)))
        raise SparseSSMError(f"{name} has no stage {shown(stage)}; it has {known}")


def check_form(stages: Any, ours: Collection[str], name: str) -> None:
    """Refuse what LLM Compressor would drop of a recipe, if a modifier of ours is in it.

    :param stages: the recipe as read
    :param ours: names of modifiers
    :param name: of the recipe, for the message
    :raises SparseSSMError: naming the modifier, where it stands and what is wrong there
    """
    if not isinstance(stages, Mapping):
        return
    for stage, groups in stages.items():
        if stage == "args":
            continue
        where = f"{name}: {cut(str(stage))}"
        if not _fits(stage, "_stage", groups):
            _refuse_dropped(where, "stage", "_stage", "groups", stage, groups, ours)
            continue
        for group, modifiers in groups.items():
            place = f"{where}.{cut(str(group))}"
            if not _fits(group, "_modifiers", modifiers):
                _refuse_dropped(place, "group", "_modifiers", "modifiers", group, modifiers, ours)
                continue
            for kind, fields in modifiers.items():
                if kind in ours and not isinstance(fields, Mapping):
                    raise SparseSSMError(
                        f"{place}.{kind} must be a mapping of fields, got {_kind(fields)}"
                    )


def mentioned(value: Any, ours: Collection[str]) -> str | None:
    """The first modifier of ours that is named anywhere in a part of a recipe."""
    for text in _strings(value, set()):
        if text in ours:
            return text
    return None


def patterns(value: Any) -> tuple[str, ...]:
    """Every ``re:`` pattern in a part of a recipe, once."""
    found = (text for text in _strings(value, set()) if text.startswith("re:"))
    return tuple(dict.fromkeys(found))


def read_regular_file(path: str | os.PathLike[str], what: str) -> str:
    """The text of a file that is one: a device or a pipe may never end.

    :param what: what it is meant to be, for the message
    :raises SparseSSMError: no regular file, too long or no UTF-8 text
    """
    if not os.path.isfile(path):
        raise SparseSSMError(f"{what} {path} is no regular file")
    try:
        with open(path, encoding="utf-8") as file:
            text = file.read(MAX_SIZE + 1)
    except (OSError, UnicodeDecodeError) as error:
        raise SparseSSMError(f"cannot read {what} {path}: {error}") from error
    if len(text) > MAX_SIZE:
        raise SparseSSMError(f"{what} {path} is longer than {MAX_SIZE:,} characters")
    return text


def _fits(key: Any, suffix: str, value: Any) -> bool:
    return isinstance(key, str) and key.endswith(suffix) and isinstance(value, Mapping)


def _refuse_dropped(
    place: str, part: str, suffix: str, holds: str, key: Any, value: Any, ours: Collection[str]
) -> None:
    found = key if key in ours else mentioned(value, ours)
    if found is None:
        return
    if not isinstance(key, str) or not key.endswith(suffix):
        wrong = f"is no {part}, whose name ends in {suffix!r}"
    else:
        wrong = f"must be a mapping of {holds}, got {_kind(value)}"
    raise SparseSSMError(f"{place} {wrong}; {found} there would be ignored")


def _kind(value: Any) -> str:
    return "nothing" if value is None else f"a {type(value).__name__}"


def _strings(value: Any, seen: set[int]) -> Iterator[str]:
    """All strings of a value, keys too; parts that are shared only once."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, (Mapping, list, tuple)) and id(value) not in seen:
        seen.add(id(value))
        if isinstance(value, Mapping):
            yield from (key for key in value if isinstance(key, str))
        for part in value.values() if isinstance(value, Mapping) else value:
            yield from _strings(part, seen)


class _BoundedLoader(yaml.SafeLoader):
    """A key given twice is an error, where plain YAML lets the last one win; so is a flood."""

    def get_single_node(self) -> Any:
        node = super().get_single_node()
        if node is not None and _written_out(node, {}) > MAX_SIZE:
            raise yaml.composer.ComposerError(
                None, None, f"its aliases write out to more than {MAX_SIZE:,} characters"
            )
        return node

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[Any] = set()
        if not isinstance(node, yaml.MappingNode):
            return super().construct_mapping(node, deep=deep)  # raises
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":
                continue
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, Hashable) and key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"key {shown(key)} is given twice", key_node.start_mark
                )
            seen.add(key if isinstance(key, Hashable) else id(key))
        return super().construct_mapping(node, deep=deep)


def _written_out(node: Any, sizes: dict[int, int]) -> int:
    """Characters and entries of a node with every alias in its place."""
    if isinstance(node, yaml.ScalarNode):
        return 1 + len(node.value)
    if id(node) in sizes:
        size = sizes[id(node)]
        if size < 0:
            raise yaml.composer.ComposerError(None, None, "an alias holds itself", node.start_mark)
        return size
    sizes[id(node)] = -1
    if isinstance(node, yaml.MappingNode):
        parts = [part for pair in node.value for part in pair]
    else:
        parts = node.value
    sizes[id(node)] = 1 + sum(_written_out(part, sizes) for part in parts)
    return sizes[id(node)]


def _yaml_problem(error: Exception) -> str:
    problem = getattr(error, "problem", None) or " ".join(str(error).split()) or "cannot be parsed"
    mark = getattr(error, "problem_mark", None)
    return f"{problem} (line {mark.line + 1}, column {mark.column + 1})" if mark else problem
