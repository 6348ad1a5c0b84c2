"""The fields of a modifier as a table: names, types, defaults and limits from its class.

What a field means stands once, in the docstring of the modifier.
"""

import enum
import inspect
import re
import types
import typing
from typing import Any

from annotated_types import Ge, Gt, Le, Lt
from pydantic.fields import FieldInfo

import sparsessm_plugin

# of every modifier of LLM Compressor; refused for ours, or without effect
_LIFECYCLE = ("index", "group", "start", "end", "update", "requires_calibration_data")
_SIGNS = ((Ge, "ge", "≥"), (Gt, "gt", ">"), (Le, "le", "≤"), (Lt, "lt", "<"))


def documented(modifier: type) -> dict[str, str]:
    """What the docstrings of a modifier and its bases say of each field, its own first."""
    found: dict[str, str] = {}
    for base in modifier.__mro__:
        text = inspect.cleandoc(base.__dict__.get("__doc__") or "")
        for name, meaning in re.findall(
            r"^:param (\w+):(.*?)(?=^:|^\S|\Z)", text, re.MULTILINE | re.DOTALL
        ):
            found.setdefault(name, " ".join(meaning.split()))
    return found


def own_fields(modifier: Any) -> dict[str, FieldInfo]:
    """The fields that a recipe may give."""
    return {
        name: field
        for name, field in modifier.model_fields.items()
        if name not in _LIFECYCLE and not name.endswith("_") and not field.exclude
    }


def type_name(annotation: Any) -> str:
    """An annotation as a reader of recipes would say it."""
    origin, inside = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        return type_name(inside[0])
    if origin is typing.Literal:
        return " or ".join(f"`{value}`" for value in inside)
    if origin in (typing.Union, types.UnionType):
        kinds = [type_name(a) for a in inside if a is not type(None)]
        return " or ".join(k for k in kinds if k != "Sentinel")
    if origin in (list, tuple, set):
        return f"list of {type_name(inside[0]).replace(' or ', ', ')}" if inside else "list"
    if origin is dict or annotation is dict:
        return "mapping"
    if annotation is Any:
        return "any"
    if isinstance(annotation, type) and issubclass(annotation, enum.Enum):
        return " or ".join(f"`{member.value}`" for member in annotation)
    names = {str: "text", int: "whole number", float: "number", bool: "true or false"}
    return names.get(annotation, getattr(annotation, "__name__", str(annotation)))


def default(field: FieldInfo) -> str:
    """The default, as a recipe would write it."""
    if field.is_required():
        return "must be given"
    value = field.get_default(call_default_factory=True)
    if value is None or value == []:
        return "none"
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    if hasattr(value, "value"):
        value = value.value
    return f"`{value}`"


def limits(field: FieldInfo) -> str:
    """Bounds of the value, as the class checks them."""
    found = [
        f"{sign} {getattr(bound, attribute)}"
        for kind, attribute, sign in _SIGNS
        for bound in field.metadata
        if isinstance(bound, kind)
    ]
    return f" ({', '.join(found)})" if found else ""


def table(name: str) -> str:
    """Markdown of all fields of the modifier of this name.

    :raises ValueError: if a field is not described
    """
    modifier = getattr(sparsessm_plugin, name)
    meanings = documented(modifier)
    rows = ["| field | type | default | meaning |", "|---|---|---|---|"]
    missing = [field for field in own_fields(modifier) if field not in meanings]
    if missing:
        raise ValueError(f"{name} does not describe {', '.join(missing)}")
    order = list(meanings)
    known = own_fields(modifier)
    for field, info in sorted(known.items(), key=lambda item: order.index(item[0])):
        kind = f"{type_name(info.annotation)}{limits(info)}"
        meaning = readable(meanings[field])
        cells = [f"`{field}`", kind, default(info), meaning]
        rows.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(rows)


def readable(text: str) -> str:
    """A docstring's text as Markdown."""
    text = re.sub(r":\w+:`~?([^`]+)`", r"`\1`", text)
    return text.replace("``", "`")
