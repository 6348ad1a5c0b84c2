"""The built-in recipes, and the check that a recipe passes before any model is loaded.

A recipe is LLM Compressor's YAML: stages whose names end in ``_stage``, in each of them groups
whose names end in ``_modifiers``, in each of those modifiers with their fields. LLM Compressor
itself skips in silence what does not fit that form; here it is an error.
"""

import difflib
import os
from collections.abc import Hashable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from sparsessm_plugin.errors import SparseSSMError

if TYPE_CHECKING:
    from torch import nn

_FOLDER = Path(__file__).parent


@dataclass(frozen=True)
class CheckedRecipe:
    """A recipe whose every modifier could be made from its fields.

    :param name: name of a built-in recipe, or the path of a file
    :param text: the YAML as written
    :param modifiers: the modifiers, in order; each use of the recipe needs new ones
    """

    name: str
    text: str
    modifiers: tuple[Any, ...]

    @property
    def reads_data(self) -> bool:
        """Whether the result depends on calibration data."""
        return any(map(_reads_data, self.modifiers))

    def check_data(self, data: Any) -> None:
        """Refuse to go on without calibration data where a modifier needs it.

        :param data: the data, in whatever form; None where there is none
        :raises SparseSSMError: naming the modifier
        """
        for modifier in self.modifiers:
            if data is None and _reads_data(modifier):
                raise SparseSSMError(
                    f"{self.name}: {type(modifier).__name__} needs calibration data; "
                    "give --calibration"
                )

    def check_model(self, model: "nn.Module") -> None:
        """Check the modifiers against a model; the meta device will do.

        :raises SparseSSMError: no known mixer, or none that matches, sizes that a field does not
            fit, weights that cannot be quantized, or a modifier that writes into what an earlier
            one has pruned
        """
        from sparsessm_plugin.mixers import find_mixers
        from sparsessm_plugin.recipes.conflicts import check_modifiers

        find_mixers(model)
        for modifier in self.modifiers:
            for check in ("matching_mixers", "check_model"):
                if hasattr(modifier, check):
                    getattr(modifier, check)(model)
        check_modifiers(self.modifiers, model)


def _reads_data(modifier: Any) -> bool:
    """Also if it reads the data itself, without LLM Compressor's calibration pass."""
    needs = modifier.requires_calibration_data
    return bool(getattr(modifier, "reads_calibration_data", needs))


def recipe_names() -> list[str]:
    """Names of the built-in recipes."""
    return sorted(path.stem for path in _FOLDER.glob("*.yaml"))


def recipe_path(name: str) -> str:
    """Path of a built-in recipe, to give to ``oneshot(recipe=...)``.

    :raises SparseSSMError: no such recipe; lists those that there are
    """
    path = _FOLDER / f"{name}.yaml"
    if name not in recipe_names():
        raise SparseSSMError(
            f"recipe {name!r} is neither a file nor a built-in recipe; "
            f"built in: {', '.join(recipe_names())}"
        )
    return str(path)


def describe_recipe(name: str) -> str:
    """The comment at the top of a built-in recipe."""
    lines = Path(recipe_path(name)).read_text(encoding="utf-8").splitlines()
    comment = [line.lstrip("# ") for line in lines if line.startswith("#")]
    return " ".join(comment)


def load_recipe(name_or_path: str | os.PathLike[str]) -> CheckedRecipe:
    """Find, read and check a recipe. No model is needed and none is loaded.

    :param name_or_path: a YAML file, or the name of a built-in recipe
    :raises SparseSSMError: one line that names the field, its value and what is allowed
    """
    source = os.fspath(name_or_path)
    path = Path(source)
    if not path.is_file():
        if path.suffix in (".yaml", ".yml") or len(path.parts) > 1:
            raise SparseSSMError(f"recipe {source} does not exist")
        path = Path(recipe_path(source))
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise SparseSSMError(f"cannot read recipe {path}: {error}") from error
    return parse_recipe(text, source)


def parse_recipe(text: str, name: str = "recipe") -> CheckedRecipe:
    """Check the text of a recipe.

    Also refuses what is wrong for every model: quantizing what cannot be calibrated, and modifiers
    that write into what earlier ones have pruned.

    :raises SparseSSMError: one line that names the field, its value and what is allowed
    """
    try:
        stages = yaml.load(text, Loader=_UniqueKeyLoader)  # a SafeLoader
    except (yaml.YAMLError, ValueError, TypeError, RecursionError) as error:
        raise SparseSSMError(f"{name} is not valid YAML: {_yaml_problem(error)}") from error
    from sparsessm_plugin.recipes.conflicts import check_alone

    modifiers: list[Any] = []
    for stage, groups in _mapping(stages, name).items():
        if stage == "args":
            continue
        _check_suffix(stage, "_stage", name)
        for group, entries in _mapping(groups, f"{name}: {stage}").items():
            _check_suffix(group, "_modifiers", f"{name}: {stage}")
            for kind, fields in _mapping(entries, f"{name}: {stage}.{group}").items():
                modifiers.append(_make_modifier(kind, fields, name))
    if not modifiers:
        raise SparseSSMError(f"{name} holds no modifier")
    reports = [path for m in modifiers if (path := getattr(m, "report_path", None)) is not None]
    for path in reports:
        if reports.count(path) > 1:
            raise SparseSSMError(f"{name}: two modifiers have the report_path {path!r}")
    try:
        check_alone(modifiers)
    except SparseSSMError as error:
        raise SparseSSMError(f"{name}: {error}") from error
    return CheckedRecipe(name=name, text=text, modifiers=tuple(modifiers))


class _UniqueKeyLoader(yaml.SafeLoader):
    """A key given twice is an error, where plain YAML lets the last one win."""

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
                    None, None, f"key {key!r} is given twice", key_node.start_mark
                )
            seen.add(key if isinstance(key, Hashable) else id(key))
        return super().construct_mapping(node, deep=deep)


def _yaml_problem(error: Exception) -> str:
    problem = getattr(error, "problem", None) or str(error) or "cannot be parsed"
    mark = getattr(error, "problem_mark", None)
    return f"{problem} (line {mark.line + 1}, column {mark.column + 1})" if mark else str(problem)


def _mapping(value: Any, where: str) -> dict[Any, Any]:
    if not isinstance(value, dict):
        kind = "nothing" if value is None else f"a {type(value).__name__}"
        raise SparseSSMError(f"{where} must be a mapping of names, got {kind}")
    return value


def _check_suffix(key: Any, suffix: str, where: str) -> None:
    if not isinstance(key, str) or not key.endswith(suffix):
        raise SparseSSMError(f"{where}: {key!r} would be ignored; the name must end in {suffix!r}")


def _make_modifier(kind: Any, fields: Any, name: str) -> Any:
    from llmcompressor.modifiers.factory import ModifierFactory
    from pydantic import ValidationError

    if not ModifierFactory._loaded:
        ModifierFactory.refresh()
    fields = {} if fields is None else _mapping(fields, f"{name}: {kind}")
    known = _known_modifiers()
    if kind not in known:
        close = difflib.get_close_matches(str(kind), known, n=1)
        hint = f"did you mean {close[0]}?" if close else f"known: {', '.join(sorted(known))}"
        raise SparseSSMError(f"{name}: unknown modifier {kind!r}; {hint}")
    try:
        return ModifierFactory.create(
            kind, allow_registered=True, allow_experimental=True, **fields
        )
    except ValidationError as error:
        raise SparseSSMError(f"{name}: {_first_problem(error, kind, known[kind])}") from error
    except Exception as error:
        reason = str(error).strip().splitlines() or [repr(error)]
        raise SparseSSMError(f"{name}: {kind}: {reason[0]}") from error


def _known_modifiers() -> dict[str, Any]:
    from llmcompressor.modifiers.factory import ModifierFactory

    return {
        **ModifierFactory._main_registry,
        **ModifierFactory._experimental_registry,
        **ModifierFactory._registered_registry,
    }


def _first_problem(error: Any, kind: str, modifier: Any) -> str:
    """The first of pydantic's complaints as one line."""
    problem = error.errors()[0]
    where = ".".join([kind, *(str(part) for part in problem["loc"])])
    if problem["type"] == "extra_forbidden":
        fields = [f for f in modifier.model_fields if not f.endswith("_")]
        close = difflib.get_close_matches(str(problem["loc"][-1]), fields, n=1)
        hint = f"did you mean {close[0]}? " if close else ""
        return f"unknown field {where}; {hint}allowed: {', '.join(sorted(fields))}"
    message = problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "value_error":  # from our validators, which name the value
        return f"{where}: {message}"
    return f"{where}: {message}, got {problem['input']!r}"
