"""The check that a regular expression can be matched against the names of a model in time."""

import json
import re
import subprocess
import sys
from collections.abc import Iterable
from functools import lru_cache
from typing import Any

from sparsessm_plugin.errors import SparseSSMError, shown

_PREFIX = "re:"
_SECONDS = 5  # of a processor; honest patterns take milliseconds
# Two repeats in a pattern take at most the square of a name's length, unless a group repeats.
_REPEATS, _REPEATED_GROUP = re.compile(r"[*+?{]"), re.compile(r"\)[*+?{]")
# Only another process can be stopped: Python's engine backtracks for ever and hears of nothing.
_MATCH = """
import json, re, resource, sys
resource.setrlimit(resource.RLIMIT_CPU, (int(sys.argv[1]),) * 2)
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
patterns, names = json.load(sys.stdin)
for number, pattern in enumerate(patterns):
    print(number, flush=True)
    compiled = re.compile(pattern)
    for name in names:
        compiled.match(name)
print("done", flush=True)
"""


def check_patterns(targets: Iterable[str], model: Any, who: str) -> None:
    """Refuse ``re:`` patterns that are none, or that take too long on a model's module names.

    :param targets: names and patterns; only patterns are looked at
    :param model: torch module; the meta device will do
    :param who: whose targets they are, for the message
    :raises SparseSSMError: naming the pattern
    """
    patterns = [target for target in dict.fromkeys(targets) if target.startswith(_PREFIX)]
    for pattern in patterns:
        try:
            check_pattern(pattern)
        except SparseSSMError as error:
            raise SparseSSMError(f"{who}: {error}") from error
    risky = tuple(pattern for pattern in patterns if _may_explode(pattern))
    if risky:
        names = tuple(name for name, _ in model.named_modules())
        slow = _slow(risky, names)
        if slow is not None:
            raise SparseSSMError(
                f"{who}: {shown(slow)} takes more than {_SECONDS} seconds to match the "
                "names of the model's modules; write it without repeats inside of repeats"
            )


def check_pattern(pattern: str) -> None:
    """Refuse a ``re:`` pattern that is no regular expression.

    :raises SparseSSMError: naming the pattern
    """
    try:
        re.compile(pattern.removeprefix(_PREFIX))
    except (re.error, OverflowError, RecursionError) as error:
        raise SparseSSMError(f"{shown(pattern)} is no regular expression: {error}") from error


def _may_explode(pattern: str) -> bool:
    return len(_REPEATS.findall(pattern)) > 2 or bool(_REPEATED_GROUP.search(pattern))


@lru_cache(maxsize=8)
def _slow(patterns: tuple[str, ...], names: tuple[str, ...]) -> str | None:
    """The first pattern that does not end in time."""
    asked = json.dumps([[pattern.removeprefix(_PREFIX) for pattern in patterns], names])
    try:
        done = subprocess.run(
            [sys.executable, "-I", "-S", "-c", _MATCH, str(_SECONDS)],
            input=asked,
            capture_output=True,
            text=True,
            check=False,
        )
    except OSError:  # no second process to be had, so nothing is known
        return None
    if done.returncode >= 0:  # not stopped
        return None
    started = done.stdout.split()
    return patterns[int(started[-1])] if started and started[-1] != "done" else None
