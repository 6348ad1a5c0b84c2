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
    """A value of the user's for a message: its text, cut to 200 characters.

    :param value: strings as they are, everything else as ``repr`` shows it
    """
    try:
        text = value if isinstance(value, str) else repr(value)
    except ValueError:  # Python prints no whole number of more than 4,300 digits
        text = f"a {type(value).__name__} too long to print"
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN - 3]}..."
