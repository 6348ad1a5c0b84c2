"""Entry points of the group ``llmcompressor.modifiers`` become LLM Compressor modifiers.

LLM Compressor finds modifiers by walking its own package and reads no entry points. This
module watches for the import of ``llmcompressor.modifiers.factory`` and teaches the
``ModifierFactory`` found there to load the group, this package's modifiers and anybody
else's, when it is first asked for a modifier. It also lets ``Recipe`` refuse a recipe that names a
modifier of this package where LLM Compressor would skip it without a word.

Nothing here may raise or import anything heavy: :func:`install` runs inside every
``import torch`` of an environment that has this package installed, because torch imports the
packages of the entry-point group ``torch.backends``.
"""

import importlib.abc
import importlib.util
import os
import sys
import warnings
from collections.abc import Callable
from functools import wraps
from typing import Any

ENTRY_POINT_GROUP = "llmcompressor.modifiers"
FACTORY_MODULE = "llmcompressor.modifiers.factory"
RECIPE_MODULE = "llmcompressor.recipe.recipe"

_loaded: set[tuple[str, str]] = set()
warned: set[str] = set()


def install() -> None:
    """Extend LLM Compressor's factory and recipes now if imported, otherwise as soon as they are.

    Calling it again changes nothing. It never raises: whatever goes wrong becomes one
    warning.
    """
    try:
        after_import(FACTORY_MODULE, _extend_factory)
        after_import(RECIPE_MODULE, _extend_recipe)
    except Exception as error:
        _warn(f"sparsessm_plugin could not watch for llmcompressor: {error!r}")


def after_import(name: str, then: Callable[[Any], None]) -> None:
    """Do something with a module now if it is imported, otherwise as soon as it is, once.

    :param name: full name of the module
    :param then: called with the module; what it raises becomes one warning
    """
    module = sys.modules.get(name)
    if module is not None:
        then(module)
    elif not any(isinstance(f, _ModuleFinder) and f.watches(name, then) for f in sys.meta_path):
        sys.meta_path.insert(0, _ModuleFinder(name, then))


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


class _ModuleFinder(importlib.abc.MetaPathFinder):
    """Finds nothing but one module, and lets the other finders find it."""

    def __init__(self, name: str, then: Callable[[Any], None]):
        self._name, self._then = name, then
        self._searching = False

    def watches(self, name: str, then: Callable[[Any], None]) -> bool:
        """Whether this finder is there for the same thing."""
        return (self._name, self._then) == (name, then)

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> Any:
        if fullname != self._name or self._searching:
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
                self._then(module)
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


def _extend_recipe(recipe_module: Any) -> None:
    """Let recipes that name a modifier of ours be checked before they are read and after.

    LLM Compressor skips in silence what does not have the form of a stage or a group. Recipes
    without a modifier of ours go on as they always did.
    """
    recipe = recipe_module.Recipe
    if getattr(recipe.create_instance, "_checks_our_modifiers", False):
        return
    create, convert = recipe.create_instance.__func__, recipe.from_dict.__func__

    @wraps(create)
    def create_instance(cls: Any, path_or_modifiers: Any, *args: Any, **kwargs: Any) -> Any:
        stage = kwargs.get("target_stage", args[1] if len(args) > 1 else None)
        _checking(_check_recipe_text, path_or_modifiers, stage)
        return create(cls, path_or_modifiers, *args, **kwargs)

    @wraps(convert)
    def from_dict(cls: Any, recipe_dict: Any) -> Any:
        _checking(_check_recipe_form, recipe_dict)
        return convert(cls, recipe_dict)

    create_instance._checks_our_modifiers = True  # type: ignore[attr-defined]
    recipe.create_instance, recipe.from_dict = classmethod(create_instance), classmethod(from_dict)


def _checking(check: Callable[..., None], *args: Any) -> None:
    """Check something, and let nothing but the check's own verdict stop LLM Compressor."""
    from sparsessm_plugin.errors import SparseSSMError

    try:
        check(*args)
    except SparseSSMError:
        raise
    except Exception as error:
        _warn(f"sparsessm_plugin could not check a recipe: {error!r}")


def _check_recipe_text(recipe: Any, stage: Any) -> None:
    if not isinstance(recipe, str):
        return
    name, text = "the recipe", recipe
    if os.path.isfile(recipe):
        if not recipe.lower().endswith((".yaml", ".yml")):
            return  # JSON, or Markdown with a recipe in it, holds no aliases
        with open(recipe, "rb") as file:
            name, text = recipe, file.read(1 << 24).decode(errors="replace")
    if any(modifier in text for modifier in _our_modifiers()):
        from sparsessm_plugin.recipes.reading import check_text

        check_text(text, name, stage if isinstance(stage, str) else None)


def _check_recipe_form(stages: Any) -> None:
    from sparsessm_plugin.recipes.reading import check_form, mentioned

    ours = _our_modifiers()
    if mentioned(stages, ours) is not None:
        check_form(stages, ours, "the recipe")


def _our_modifiers() -> set[str]:
    import sparsessm_plugin

    modules = sparsessm_plugin._PUBLIC.items()
    return {name for name, module in modules if module == "sparsessm_plugin.modifiers"}


def _warn(message: str) -> None:
    """Warn once a process; never raise, not even where warnings are errors."""
    if message in warned:
        return
    warned.add(message)
    try:
        warnings.warn(message, RuntimeWarning, stacklevel=3)
    except RuntimeWarning:
        print(f"RuntimeWarning: {message}", file=sys.stderr)
