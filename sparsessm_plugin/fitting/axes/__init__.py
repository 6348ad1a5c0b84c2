"""The axes that a model can be made smaller along, by name: a new one is a new file here."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from importlib import import_module
from math import gcd
from typing import Any, ClassVar, TypeVar

import torch
from torch import nn

from sparsessm_plugin.registry import Registry

_EIGHTHS = (7.5, 7, 6.5, 6, 5.5, 5, 4.5, 4)
_TILE = 64
_SHORT = 256  # what is shorter, as the channels of a head, is cut into eighths


class Axis(ABC):
    """One axis: its sizes, the modifier that removes along it, and the loader's config fields.

    Models are given on the meta device. A size is what ``keep`` of the modifier says.

    Attributes: ``name``; ``order``, the place of its modifier in a recipe, lowest first;
    ``modifier``, a public name of :mod:`sparsessm_plugin.modifiers`, or the class; ``affine``,
    whether all counts are affine in the size while the other sizes stay; ``slower``, how many
    times as long a removal takes by a recipe as with :meth:`quick_fields`.
    """

    name: ClassVar[str]
    order: ClassVar[int]
    modifier: ClassVar[Any]
    affine: ClassVar[bool] = True
    slower: ClassVar[float] = 1.0

    @property
    def modifier_class(self) -> Any:
        """The modifier's class; None where this version has none of this name."""
        if not isinstance(self.modifier, str):
            return self.modifier
        return getattr(import_module("sparsessm_plugin.modifiers"), self.modifier, None)

    @abstractmethod
    def length(self, model: nn.Module) -> int | None:
        """The size that a model has; None where it has no such axis."""

    @abstractmethod
    def sizes(self, length: int) -> Sequence[int]:
        """Sizes below a length to choose from, the largest first; what cannot be is left out."""

    def fields(self, size: int) -> dict[str, Any]:
        """Fields of the modifier that make this size."""
        return {"keep": size}

    def quick_fields(self, model: nn.Module, device: torch.device) -> dict[str, Any]:
        """Fields with which the modifier takes less time.

        They are for trials, and for recipes also if ``slower`` is 1.

        :param model: dense
        :param device: of the trials
        """
        return {}

    def way(self, model: nn.Module, size: int, runtime: str) -> dict[str, Any]:
        """More fields of the modifier, where a size can be made in several ways.

        :param model: as it is
        :param size: to be made
        :param runtime: that is to load it
        :raises SparseSSMError: the family's loader cannot make it
        """
        return {}

    @abstractmethod
    def config_fields(self, model: nn.Module, size: int) -> dict[str, Any]:
        """What the config says of a model of this size; changes nothing.

        Where there are several ways, it takes the fields of :meth:`way`, too, by their names.

        :raises SparseSSMError: the family's loader cannot make it
        """


AXES: Registry[Axis] = Registry("axis", "sparsessm_plugin.fitting.axes")
_Class = TypeVar("_Class", bound=type[Axis])


def register_axis(cls: _Class) -> _Class:
    """Class decorator: let :func:`sparsessm_plugin.fit` choose sizes of this axis."""
    AXES.register(cls.name, cls())
    return cls


def in_order(names: Iterable[str]) -> list[Axis]:
    """The axes of these names, in the order of their modifiers in a recipe."""
    return sorted((AXES[name] for name in names), key=lambda axis: (axis.order, axis.name))


def tile_of(length: int) -> int:
    """What sizes of an axis are multiples of: 64, as kernels like it, of a short one less."""
    if length >= 16 * _TILE and length % _TILE == 0:
        return _TILE
    return gcd(_TILE, max(1, length // (16 if length >= _SHORT else 8)))


def shares_of(length: int, multiple: int, eighths: Iterable[float] = _EIGHTHS) -> list[int]:
    """Eighths of a length in multiples of a number, the largest first, each once."""
    rounded = [round(length * share / 8 / multiple) * multiple for share in eighths]
    return [size for size in dict.fromkeys(rounded) if 0 < size < length]
