"""Texts of the demo: the documentation in the docstrings of the running interpreter.

Nothing is downloaded and nothing of it is packaged. Modules that are evaluated on, modules that
are calibrated on and modules that the checkpoint was tuned on are three disjoint sets.
"""

import inspect
import sys
from collections.abc import Iterable, Mapping
from importlib import import_module

EVALUATED = (
    *("argparse", "collections", "configparser", "difflib", "fractions", "ipaddress"),
    *("logging", "optparse", "statistics", "string", "subprocess", "tarfile"),
    *("textwrap", "threading", "unittest", "uuid", "zipfile"),
)
CALIBRATED = (
    *("ast", "asyncio", "bz2", "calendar", "codecs", "contextlib", "csv", "datetime"),
    *("decimal", "enum", "functools", "glob", "gzip", "heapq", "http.client", "io", "itertools"),
    *("json", "locale", "math", "mimetypes", "multiprocessing", "operator", "os", "pathlib"),
    *("pickle", "pprint", "queue", "random", "re", "select", "shutil", "socket", "struct"),
    *("sqlite3", "ssl", "tempfile", "time", "traceback", "types", "urllib.parse", "urllib.request"),
    *("warnings", "weakref", "xml.etree.ElementTree", "xmlrpc.client", "zlib"),
)
# they open a window, print, or are no documentation
_LEFT_OUT = ("antigravity", "idlelib", "lib2to3", "this", "tkinter", "turtle", "turtledemo")


def tuned_on() -> list[str]:
    """Modules of the standard library that are neither evaluated nor calibrated on."""
    taken = {name.partition(".")[0] for name in (*EVALUATED, *CALIBRATED)}
    names = sorted(sys.stdlib_module_names - taken - set(_LEFT_OUT))
    return [name for name in names if not name.startswith("_")]


def docstrings(modules: Iterable[str]) -> list[str]:
    """Documentation of modules of the running interpreter, a document each.

    :param modules: names; those that this interpreter lacks are left out
    :return: module, classes and functions, with the public methods of the classes
    """
    documents = []
    for name in modules:
        try:
            module = import_module(name)
        except ImportError:
            continue
        parts = [module.__doc__]
        members: list[tuple[Mapping[str, object], str]] = [(vars(module), name)]
        for space, where in members:
            for key, member in sorted(space.items()):
                if key.startswith("_") or getattr(member, "__module__", where) != where:
                    continue
                if not callable(member):
                    continue
                parts.append(_own_documentation(member))
                if inspect.isclass(member) and space is vars(module):
                    members.append((vars(member), where))
        text = "\n\n".join(dict.fromkeys(part for part in parts if part))
        if text:
            documents.append(text)
    return documents


def _own_documentation(member: object) -> str | None:
    """Not what an instance or a class inherits."""
    if inspect.isclass(member) or inspect.isroutine(member):
        said = vars(member).get("__doc__") if inspect.isclass(member) else member.__doc__
        return inspect.cleandoc(said) if isinstance(said, str) else None
    return None
