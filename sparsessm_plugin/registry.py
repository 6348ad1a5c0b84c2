"""Tables that fill themselves: what stands in the files of a folder, by name."""

from collections.abc import Iterator, MutableMapping
from importlib import import_module
from pkgutil import iter_modules
from typing import TypeVar

from sparsessm_plugin.errors import SparseSSMError, shown

T = TypeVar("T")


class Registry(MutableMapping[str, T]):
    """Entries by name, in alphabetical order.

    The first reader imports every file of the folder, each of which registers what it has: a new
    entry is a new file and no other change. ``del registry[name]`` takes one out again.

    :param what: one entry in words, for messages
    :param package: the folder
    :param skip: files of the folder that register nothing and cost time to import
    """

    def __init__(self, what: str, package: str, skip: frozenset[str] = frozenset()):
        self.what = what
        self._package = package
        self._skip = skip
        self._entries: dict[str, T] = {}
        self._found = False

    def register(self, name: str, entry: T) -> None:
        """Add an entry.

        :raises ValueError: there is one of this name
        """
        if name in self._entries:
            raise ValueError(f"there is a {self.what} {name!r} already")
        self._entries[name] = entry

    def check(self, name: str) -> str:
        """The name as it came, if there is such an entry.

        :raises SparseSSMError: listing the known ones
        """
        if name not in self._all():
            known = ", ".join(self)
            raise SparseSSMError(f"{self.what} {shown(name)} is not known; known: {known}")
        return name

    def __getitem__(self, name: str) -> T:
        return self._all()[name]

    def __setitem__(self, name: str, entry: T) -> None:
        self._all()[name] = entry

    def __delitem__(self, name: str) -> None:
        del self._all()[name]

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._all()))

    def __len__(self) -> int:
        return len(self._all())

    def _all(self) -> dict[str, T]:
        if not self._found:
            self._found = True  # first, as the files may read the table they fill
            import_all(self._package, self._skip)
        return self._entries


def import_all(package: str, skip: frozenset[str] = frozenset()) -> None:
    """Import every file of a folder.

    :param package: its dotted name
    :param skip: names of files to leave out
    """
    for module in iter_modules(import_module(package).__path__):
        if module.name not in skip:
            import_module(f"{package}.{module.name}")
