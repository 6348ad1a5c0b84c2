"""The built-in recipes, and the check that a recipe passes before any model is loaded.

A recipe is LLM Compressor's YAML: stages whose names end in ``_stage``, in each of them groups
whose names end in ``_modifiers``, in each of those modifiers with their fields. LLM Compressor
itself skips in silence what does not fit that form; here it is an error.
"""

import difflib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import yaml

from sparsessm_plugin.errors import SparseSSMError, cut, first_problem, shown
from sparsessm_plugin.patterns import check_patterns
from sparsessm_plugin.recipes.reading import patterns, read_regular_file, read_yaml

if TYPE_CHECKING:
    from torch import nn

_FOLDER = Path(__file__).parent
_LONGEST = 400  # characters of a complaint of a modifier


@dataclass(frozen=True)
class CheckedRecipe:
    """A recipe whose every modifier could be made from its fields.

    :param name: name of a built-in recipe, or the path of a file
    :param text: the YAML as written
    :param modifiers: the modifiers, in order; each use of the recipe needs new ones
    :param patterns: every ``re:`` pattern in it
    """

    name: str
    text: str
    modifiers: tuple[Any, ...]
    patterns: tuple[str, ...] = ()

    @property
    def reads_data(self) -> bool:
        """Whether the result depends on calibration data."""
        return any(map(_reads_data, self.modifiers))

    @property
    def needs_whole_model(self) -> str | None:
        """The first modifier that cannot work with one layer in memory after the other."""
        for modifier in self.modifiers:
            if getattr(modifier, "needs_whole_model", False):
                return type(modifier).__name__
        return None

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

    def check_pipeline(self, pipeline: str) -> None:
        """Refuse the pipeline without a calibration pass where a modifier watches one.

        :raises SparseSSMError: naming the modifier
        """
        for modifier in self.modifiers:
            if pipeline == "datafree" and modifier.requires_calibration_data:
                raise SparseSSMError(
                    f"--pipeline datafree runs no calibration pass, and {type(modifier).__name__} "
                    f"of {self.name} watches one; choose another, or none"
                )

    def for_runtimes(self, names: list[str]) -> "CheckedRecipe":
        """The same recipe, whose removals also make sizes for these runtimes.

        :param names: as the field ``runtime`` of a removal takes them
        :raises SparseSSMError: an unknown name, or a recipe without a removal
        """
        from sparsessm_plugin.checkpoints.runtimes import check_runtimes

        wanted = check_runtimes(names)
        stages = read_yaml(self.text, self.name)
        of_stages = (groups for stage, groups in stages.items() if stage != "args")
        entries = (entry for groups in of_stages for entry in groups.values())
        fields = [fields for entry in entries for fields in entry.values()]
        found = False
        for modifier, given in zip(self.modifiers, fields, strict=True):
            if hasattr(modifier, "runtime"):
                given["runtime"] = list(check_runtimes([*modifier.runtime, *wanted]))
                found = True
        if not found:
            raise SparseSSMError(
                f"{self.name} removes nothing, so that there are no sizes to choose for "
                f"{', '.join(wanted)}; `sparsessm inspect` tells what takes a checkpoint"
            )
        text = yaml.safe_dump(stages, sort_keys=False, allow_unicode=True)
        return parse_recipe(text, self.name)

    def check_model(self, model: "nn.Module") -> None:
        """Check the modifiers against a model; the meta device will do.

        :raises SparseSSMError: no known mixer, or none that matches, sizes that a field does not
            fit, weights that cannot be quantized, a modifier that writes into what an earlier
            one has pruned, or a pattern that takes too long on the names of the modules
        """
        from sparsessm_plugin.families import find_mixers
        from sparsessm_plugin.methods.removal import RemovalSettings
        from sparsessm_plugin.methods.runtime_sizes import check_together
        from sparsessm_plugin.modifiers.conflicts import check_modifiers, check_own

        find_mixers(model)
        check_patterns(self.patterns, model, self.name)
        for modifier in self.modifiers:
            check_own(modifier, model)
        removals: list[Any] = [m for m in self.modifiers if isinstance(m, RemovalSettings)]
        check_together([modifier.new_method() for modifier in removals], model)
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
    if not os.path.exists(source) or os.path.isdir(source):
        if os.path.isdir(source) and (len(path.parts) > 1 or source not in recipe_names()):
            raise SparseSSMError(f"recipe {cut(source)} is a folder; give a YAML file")
        if path.suffix in (".yaml", ".yml") or len(path.parts) > 1:
            raise SparseSSMError(f"recipe {cut(source)} does not exist")
        path = Path(recipe_path(source))
    return parse_recipe(read_regular_file(path, "recipe"), source)


def parse_recipe(text: str, name: str = "recipe") -> CheckedRecipe:
    """Check the text of a recipe.

    Also refuses what is wrong for every model: quantizing what cannot be calibrated, and modifiers
    that write into what earlier ones have pruned.

    :raises SparseSSMError: one line that names the field, its value and what is allowed
    """
    stages = read_yaml(text, name)
    from sparsessm_plugin.modifiers.conflicts import check_alone, layouts

    expressions = patterns(stages)
    for layout in layouts():
        check_patterns(expressions, layout, name)
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
    return CheckedRecipe(name=name, text=text, modifiers=tuple(modifiers), patterns=expressions)


def _mapping(value: Any, where: str) -> dict[Any, Any]:
    if not isinstance(value, dict):
        kind = "nothing" if value is None else f"a {type(value).__name__}"
        raise SparseSSMError(f"{cut(where)} must be a mapping of names, got {kind}")
    return value


def _check_suffix(key: Any, suffix: str, where: str) -> None:
    if not isinstance(key, str) or not key.endswith(suffix):
        raise SparseSSMError(
            f"{where}: {shown(key)} would be ignored; the name must end in {suffix!r}"
        )


def _make_modifier(kind: Any, fields: Any, name: str) -> Any:
    from llmcompressor.modifiers import Modifier
    from llmcompressor.modifiers.factory import ModifierFactory
    from pydantic import ValidationError

    if not ModifierFactory._loaded:
        ModifierFactory.refresh()
    known = _known_modifiers()
    if kind not in known:
        close = difflib.get_close_matches(str(kind), known, n=1)
        hint = f"did you mean {close[0]}?" if close else f"known: {', '.join(sorted(known))}"
        raise SparseSSMError(f"{name}: unknown modifier {shown(kind)}; {hint}")
    fields = _mapping(fields, f"{name}: {kind}")
    states = [field for field in Modifier.model_fields if field.endswith("_")]
    for field in states:
        if fields.get(field, False) is not False:
            raise SparseSSMError(
                f"{name}: {kind}.{field} says how far a run is; leave it out, "
                f"got {shown(fields[field])}"
            )
    for field, value in fields.items():
        declared = known[kind].model_fields.get(field)
        if isinstance(value, bool) and declared and _number_only(declared.annotation):
            raise SparseSSMError(
                f"{name}: {kind}.{field} must be a number, got the boolean {str(value).lower()} "
                "(which yes, no, on and off are in YAML)"
            )
    try:
        return ModifierFactory.create(
            kind, allow_registered=True, allow_experimental=True, **fields
        )
    except ValidationError as error:
        hidden: frozenset[str] = getattr(known[kind], "meaningless_fields", frozenset())
        allowed = [f for f in known[kind].model_fields if not f.endswith("_") and f not in hidden]
        raise SparseSSMError(f"{name}: {first_problem(error, kind, allowed)}") from error
    except Exception as error:
        reason = (str(error).strip().splitlines() or [repr(error)])[0]
        who = "" if reason.startswith(f"{kind}.") else f"{kind}: "
        raise SparseSSMError(f"{name}: {who}{cut(reason, _LONGEST)}") from error


def _number_only(annotation: Any) -> bool:
    """Whether a field takes numbers and no boolean, which would pass for 0 or 1."""
    kinds, left = set(), [annotation]
    while left:
        kind = left.pop()
        if isinstance(kind, list):  # what a Callable takes
            continue
        kinds.add(kind)
        left += get_args(kind)
    return bool(kinds & {int, float}) and not kinds & {bool, Any}


def _known_modifiers() -> dict[str, Any]:
    from llmcompressor.modifiers.factory import ModifierFactory

    return {
        **ModifierFactory._main_registry,
        **ModifierFactory._experimental_registry,
        **ModifierFactory._registered_registry,
    }
