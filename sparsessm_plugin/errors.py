"""The error that bad input raises, and the warnings of this package."""

from typing import Any

_SHOWN = 200


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
