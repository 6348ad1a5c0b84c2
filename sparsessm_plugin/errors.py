"""The error that bad input raises, and the warnings of this package."""

import difflib
from collections.abc import Iterable
from typing import Any

_SHOWN = 200
_LONGEST = 400  # characters of a complaint about a field


class SparseSSMError(ValueError):
    """A mistake in what the user gave: model, recipe, data or path.

    Its message is one line that names the offending thing, its value and what is
    allowed. The command prints it and exits with a non-zero status; anything else that
    is raised is a defect of this package.
    """


class SparseSSMWarning(RuntimeWarning, UserWarning):
    """A warning of this package's own, which the command always shows."""


def shown(value: Any) -> str:
    """A value of the user's for a message: as ``repr`` has it, cut to 200 characters."""
    try:
        return cut(repr(value))
    except ValueError:  # Python prints no whole number of more than 4,300 digits
        return f"a {type(value).__name__} too long to print"


def cut(text: str, most: int = _SHOWN) -> str:
    """The beginning of a text, for a message."""
    return text if len(text) <= most else f"{text[: most - 3]}..."


def first_problem(error: Any, kind: str, fields: Iterable[str]) -> str:
    """The first of pydantic's complaints as one line; of an unknown field before all others.

    A field that is missing may be the one that was misspelt.

    :param error: a ``pydantic.ValidationError``
    :param kind: what the fields belong to, for the message
    :param fields: names that are allowed
    """
    problems = error.errors()
    unknown = (problem for problem in problems if problem["type"] == "extra_forbidden")
    problem = next(unknown, problems[0])
    where = ".".join([kind, *(str(part) for part in problem["loc"])])
    if problem["type"] == "extra_forbidden":
        allowed = sorted(fields)
        close = difflib.get_close_matches(str(problem["loc"][-1]), allowed, n=1)
        hint = f"did you mean {close[0]}? " if close else ""
        return f"unknown field {cut(where)}; {hint}allowed: {', '.join(allowed)}"
    message = problem["msg"].removeprefix("Value error, ")
    # our validators name the value, and what is missing has none
    if problem["type"] in ("value_error", "missing"):
        return f"{where}: {cut(message, _LONGEST)}"
    return f"{where}: {cut(message, _LONGEST)}, got {shown(problem['input'])}"
