"""Entry points of the group ``llmcompressor.modifiers`` become LLM Compressor modifiers.

LLM Compressor finds modifiers by walking its own package and reads no entry points. This
module watches for the import of ``llmcompressor.modifiers.factory`` and teaches the
``ModifierFactory`` found there to load the group, this package's modifiers and anybody
else's, when it is first asked for a modifier.

Nothing here may raise or import anything heavy: :func:`install` runs inside every
``import torch`` of an environment that has this package installed, because torch imports the
packages of the entry-point group ``torch.backends``.
"""

import importlib.abc
import importlib.util
import sys
import warnings
from functools import wraps
from typing import Any

ENTRY_POINT_GROUP = "llmcompressor.modifiers"
FACTORY_MODULE = "llmcompressor.modifiers.factory"

_loaded: set[tuple[str, str]] = set()
_warned: set[str] = set()


def install() -> None:
    """Extend ``ModifierFactory`` now if it is imported, otherwise as soon as it is.

    Calling it again changes nothing. It never raises: whatever goes wrong becomes one
    warning.
    """
    try:
        factory_module = sys.modules.get(FACTORY_MODULE)
        if factory_module is not None:
            _extend_factory(factory_module)
        elif not any(isinstance(finder, _FactoryFinder) for finder in sys.meta_path):
            sys.meta_path.insert(0, _FactoryFinder())
    except Exception as error:
        _warn(f"sparsessm_plugin could not watch for llmcompressor: {error!r}")


def load_modifiers() -> None:
    """Register every modifier of the entry-point group in ``ModifierFactory``.

    An entry point that cannot be loaded, or that is no modifier, costs one warning and
    harms nobody else; those that fail together (one module, one error) share theirs. Each
    entry point is tried once in a process.
    """
    try:
        from importlib.metadata import entry_points

        found = entry_points(group=ENTRY_POINT_GROUP)
    except Exception as error:
        _warn(f"the entry points of {ENTRY_POINT_GROUP} could not be read: {error!r}")
        return
    from llmcompressor.modifiers.factory import ModifierFactory

    failures: dict[tuple[str, str], list[str]] = {}  # a broken module fails for all it holds
    for entry_point in found:
        key = (entry_point.name, entry_point.value)
        if key in _loaded:
            continue
        _loaded.add(key)
        try:
            ModifierFactory.register(entry_point.name, entry_point.load())
        except Exception as error:
            module = entry_point.value.partition(":")[0]
            failures.setdefault((module, repr(error)), []).append(entry_point.name)
    for (module, error_text), names in failures.items():
        plural, be = ("", "is") if len(names) == 1 else ("s", "are")
        _warn(
            f"the llmcompressor modifier{plural} {', '.join(map(repr, names))} of {module} "
            f"could not be loaded and {be} left out: {error_text}"
        )


class _FactoryFinder(importlib.abc.MetaPathFinder):
    """Finds nothing but the factory module, and lets the other finders find it."""

    _searching = False

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> Any:
        if fullname != FACTORY_MODULE or self._searching:
            return None
        self._searching = True  # find_spec below asks every finder, this one included
        try:
            spec = importlib.util.find_spec(fullname)
            if spec is not None and spec.loader is not None:
                self._extend_after_execution(spec.loader)
            return spec
        except Exception as error:
            _warn(f"sparsessm_plugin could not extend llmcompressor: {error!r}")
            return None
        finally:
            self._searching = False

    def _extend_after_execution(self, loader: Any) -> None:
        execute = loader.exec_module

        @wraps(execute)
        def exec_module(module: Any) -> None:
            execute(module)
            if self in sys.meta_path:
                sys.meta_path.remove(self)
            try:
                _extend_factory(module)
            except Exception as error:
                _warn(f"sparsessm_plugin could not extend llmcompressor: {error!r}")

        loader.exec_module = exec_module


def _extend_factory(factory_module: Any) -> None:
    """Let ``refresh`` and ``create`` load the entry points first.

    ``create`` alone would do, but ``refresh`` is the public moment at which the factory
    learns what exists. Neither is called while llmcompressor is still being imported,
    so the modifiers, which import llmcompressor themselves, load without a cycle.
    """
    factory = factory_module.ModifierFactory
    for name in ("refresh", "create"):
        original = getattr(factory, name)
        if getattr(original, "_loads_entry_points", False):
            continue
        setattr(factory, name, staticmethod(_loading_entry_points(original)))


def _loading_entry_points(original: Any) -> Any:
    @wraps(original)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        load_modifiers()
        return original(*args, **kwargs)

    wrapper._loads_entry_points = True  # type: ignore[attr-defined]
    return wrapper


def _warn(message: str) -> None:
    """Warn once a process; never raise, not even where warnings are errors."""
    if message in _warned:
        return
    _warned.add(message)
    try:
        warnings.warn(message, RuntimeWarning, stacklevel=3)
    except RuntimeWarning:
        print(f"RuntimeWarning: {message}", file=sys.stderr)
