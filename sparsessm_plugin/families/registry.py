"""Every file of this room is read once, so that each family registers its adapters."""

from functools import cache
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules


@cache
def load_families() -> None:
    """Import all modules of this room; a family is known by standing here."""
    for module in iter_modules([str(Path(__file__).parent)]):
        import_module(f"{__package__}.{module.name}")
