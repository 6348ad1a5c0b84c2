"""Modules that stand for parts of a mixer's tensors, and the pruners that know these parts.

One tensor of a mixer holds several quantities side by side: the rows of x_proj are those of
dt, B and C. In a dependency graph each part is a node of its own, a view. A view counts its
channels in units of the axis that is removed: a unit of ``heads`` is the P neighbouring rows
of a head in one part and a single row in another. So an index means the same at every node,
and only a view knows which entries of its tensors it stands for.

Everything that flows between views has the shape (b, *sizes, L) with one size for every named
dimension of the layout, 1 where the quantity does not have that dimension.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch_pruning.pruner.function import BasePruningFunc

from sparsessm_plugin.families import MixerAdapter, get_tensor

Dims = tuple[str, ...]


class Layout:
    """The named dimensions of a mixer, and those that make up the axis to remove.

    Sizes are read from the tensors each time, so they hold after a removal too.

    :param adapter: the mixer
    :param axis: name of the axis
    :param axis_dims: the dimensions whose product is the axis
    :param sizes: gives the size of every dimension, in the order of the shapes
    """

    def __init__(
        self,
        adapter: MixerAdapter,
        axis: str,
        axis_dims: Dims,
        sizes: Callable[[MixerAdapter], dict[str, int]],
    ):
        self.adapter = adapter
        self.axis = axis
        self.axis_dims = axis_dims
        self._sizes = sizes

    def sizes(self) -> dict[str, int]:
        return self._sizes(self.adapter)

    def size(self, dims: Dims) -> int:
        sizes = self.sizes()
        return prod(sizes[dim] for dim in dims)

    def carries_axis(self, dims: Iterable[str]) -> bool:
        """Whether a quantity of these dimensions has an entry for every unit of the axis."""
        return set(self.axis_dims) <= set(dims)

    def shape(self, dims: Iterable[str]) -> list[int]:
        """The sizes between batch and time of a quantity with these dimensions."""
        return [size if dim in dims else 1 for dim, size in self.sizes().items()]

    def has(self, tensor: str) -> bool:
        return self.tensor(tensor) is not None

    def tensor(self, tensor: str) -> Tensor | None:
        return get_tensor(self.adapter.mixer, tensor)


@dataclass(frozen=True)
class Section:
    """A part of one dimension of a tensor.

    Of a tensor that the adapter calls stacked, ``dims`` begins with the dimension of the stack,
    ``before`` does not, and positions count on from one slice to the next.

    :param tensor: dotted name inside the mixer
    :param dim: dimension of the tensor
    :param dims: named dimensions that the part unfolds into, slowest first
    :param before: the same of each part that precedes it
    :param after: where the dimension holds the parts of one index of ``dims[0]`` after those of
        another, the same of each part that follows it there; ``dims[0]`` is then in none of
        ``before`` and ``after``
    """

    tensor: str
    dim: int
    dims: Dims
    before: tuple[Dims, ...] = ()
    after: tuple[Dims, ...] | None = None

    def start(self, layout: Layout) -> int:
        return sum(layout.size(dims) for dims in self.before)

    def take(self, layout: Layout, tensor: Tensor) -> Tensor:
        """The part of the tensor that is this section's."""
        if self.after is not None:
            blocks = tensor.unflatten(self.dim, (layout.size(self.dims[:1]), -1))
            own = blocks.narrow(self.dim + 1, self.start(layout), layout.size(self.dims[1:]))
            return own.flatten(self.dim, self.dim + 1)
        dims = self.dims[1:] if self.is_stacked(layout) else self.dims
        return tensor.narrow(self.dim, self.start(layout), layout.size(dims))

    def is_stacked(self, layout: Layout) -> bool:
        return self.tensor in layout.adapter.stacked

    def positions(self, layout: Layout, units: Iterable[int]) -> list[int]:
        """The entries of the tensor's dimension that the units of the axis stand for."""
        if not layout.carries_axis(self.dims):
            return []
        sizes = layout.sizes()
        entries = torch.arange(layout.size(self.dims)).reshape([sizes[dim] for dim in self.dims])
        if self.is_stacked(layout):
            tensor = layout.tensor(self.tensor)
            assert tensor is not None
            others = tensor.shape[self.dim] - layout.size(self.dims[1:])  # in each slice
            entries += others * torch.arange(len(entries)).view(-1, *[1] * (entries.ndim - 1))
        if self.after is not None:
            others = sum(layout.size(dims) for dims in (*self.before, *self.after))
            entries += others * torch.arange(len(entries)).view(-1, *[1] * (entries.ndim - 1))
        rest = [dim for dim in self.dims if dim not in layout.axis_dims]
        order = [self.dims.index(dim) for dim in (*layout.axis_dims, *rest)]
        per_unit = entries.permute(order).reshape(layout.size(layout.axis_dims), -1)
        return (self.start(layout) + per_unit[list(units)]).flatten().tolist()


class _OneNode(torch.autograd.Function):
    """Runs a computation as one node of the autograd graph, whatever it is made of.

    Reshapes inside a view would otherwise become nodes with index mappings of their own.
    """

    @staticmethod
    def forward(ctx: Any, compute: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        return compute(x)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        raise RuntimeError("the graph of a mixer is there to be read, not for gradients")


class View(nn.Module):
    """A part of a mixer's tensors, as a module.

    It holds no parameter: it reads the mixer's tensors when it is called, on the device and
    in the dtype of its input. An input on the meta device therefore costs nothing.
    """

    def __init__(
        self, layout: Layout, out_sections: Sequence[Section], in_sections: Sequence[Section] = ()
    ):
        super().__init__()
        self.layout = layout
        self.out_sections = tuple(s for s in out_sections if layout.has(s.tensor))
        self.in_sections = tuple(s for s in in_sections if layout.has(s.tensor))

    def extra_repr(self) -> str:
        return ", ".join(dict.fromkeys(s.tensor for s in self.out_sections + self.in_sections))

    @property
    def dims(self) -> Dims:
        """The named dimensions of the output."""
        return self.out_sections[0].dims

    def read(self, x: Tensor, *sections: Section) -> Tensor | None:
        """The sections' part of their common tensor, or None where the mixer has none."""
        value = self.layout.tensor(sections[0].tensor)
        if value is None:
            return None
        value = value.detach()
        for section in sections:
            value = section.take(self.layout, value)
        return value.to(device=x.device, dtype=x.dtype)

    def spread(self, flat: Tensor, dims: Iterable[str]) -> Tensor:
        """(b, size of dims, L) in the shape in which quantities flow."""
        return flat.reshape(flat.shape[0], *self.layout.shape(dims), flat.shape[-1])

    def forward(self, x: Tensor) -> Tensor:
        return _OneNode.apply(self.compute, x)

    def compute(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def units(self, sections: Sequence[Section]) -> int | None:
        """How many units of the axis these sections have, None where they do not carry it."""
        if any(self.layout.carries_axis(s.dims) for s in sections):
            return self.layout.size(self.layout.axis_dims)
        return None


class Projection(View):
    """Some rows of a linear layer, on all columns or on some.

    :param module: name of the layer in the mixer
    :param rows: dimensions of the rows
    :param columns: dimensions of the columns
    :param before: the parts of the rows that precede these
    :param after: see :class:`Section`
    """

    def __init__(
        self,
        layout: Layout,
        module: str,
        rows: Dims,
        columns: Dims,
        before: tuple[Dims, ...] = (),
        after: tuple[Dims, ...] | None = None,
    ):
        self_rows = [Section(f"{module}.{t}", 0, rows, before, after) for t in ("weight", "bias")]
        weight = f"{module}.weight"
        super().__init__(layout, self_rows, [Section(weight, 1, columns)])

    def compute(self, x: Tensor) -> Tensor:
        weight = self.read(x, self.out_sections[0], self.in_sections[0])
        assert weight is not None
        y = weight @ x.flatten(1, -2)  # (b, rows, L)
        if len(self.out_sections) > 1:
            bias = self.read(x, self.out_sections[1])
            assert bias is not None
            y = y + bias[:, None]
        return self.spread(y, self.dims)


class HeadProjection(View):
    """Some rows of a matrix for each head, stacked in a parameter of the mixer.

    :param weight: name of the parameter (heads, rows, columns)
    :param rows: dimensions of the rows, the heads first
    :param columns: dimensions of the columns, the heads first
    :param before: the parts of a head's rows that precede these
    :param bias: name of a parameter (heads, rows)
    """

    def __init__(
        self,
        layout: Layout,
        weight: str,
        rows: Dims,
        columns: Dims,
        before: tuple[Dims, ...] = (),
        bias: str | None = None,
    ):
        sections = [Section(weight, 1, rows, before)]
        sections += [Section(bias, 1, rows, before)] if bias is not None else []
        super().__init__(layout, sections, [Section(weight, 2, columns)])

    def compute(self, x: Tensor) -> Tensor:
        weight = self.read(x, self.out_sections[0], self.in_sections[0])
        assert weight is not None
        y = weight @ x.flatten(1, -2).unflatten(1, (len(weight), -1))  # (b, heads, rows, L)
        if len(self.out_sections) > 1:
            bias = self.read(x, self.out_sections[1])
            assert bias is not None
            y = y + bias[..., None]
        return self.spread(y.flatten(1, 2), self.dims)


class Convolution(View):
    """Some channels of the depthwise causal convolution; what goes in comes out."""

    def __init__(self, layout: Layout, module: str, dims: Dims, before: tuple[Dims, ...] = ()):
        names = (f"{module}.weight", f"{module}.bias")
        super().__init__(layout, [Section(name, 0, dims, before) for name in names])

    def compute(self, x: Tensor) -> Tensor:
        weight = self.read(x, self.out_sections[0])
        assert weight is not None
        bias = self.read(x, self.out_sections[1]) if len(self.out_sections) > 1 else None
        channels = x.flatten(1, -2)
        padded = F.pad(channels, (weight.shape[-1] - 1, 0))
        return self.spread(F.conv1d(padded, weight, bias, groups=weight.shape[0]), self.dims)


class Scale(View):
    """Entries of a vector that multiply a quantity one by one."""

    def __init__(
        self, layout: Layout, tensor: str, dims: Dims, before: tuple[Dims, ...] = (), dim: int = 0
    ):
        super().__init__(layout, [Section(tensor, dim, dims, before)])

    def compute(self, x: Tensor) -> Tensor:
        factor = self.read(x, self.out_sections[0])
        assert factor is not None
        return x * self.spread(factor.reshape(1, -1, 1), self.dims)


class Parameter(View):
    """A bare parameter of the mixer as a source of the data flow, one dimension per section."""

    def __init__(self, layout: Layout, tensor: str, *dims: Dims):
        first = 1 if tensor in layout.adapter.stacked else 0
        super().__init__(layout, [Section(tensor, k, part) for k, part in enumerate(dims, first)])

    @property
    def dims(self) -> Dims:
        return tuple(dict.fromkeys(dim for section in self.out_sections for dim in section.dims))

    def compute(self, x: Tensor) -> Tensor:
        value = self.read(x, *self.out_sections)
        assert value is not None
        return self.spread(value.reshape(1, -1, 1), self.dims)


class Boundary(nn.Module):
    """Stands where a quantity without the axis meets one with it, or where the axis is summed.

    Its two sides do not count the same units, so a removal does not pass.
    """

    def forward(self, x: Tensor) -> Tensor:
        return x.clone()


class Recorder:
    """Collects which entries the pruners of the views remove, tensor by tensor."""

    def __init__(self) -> None:
        self.positions: dict[tuple[str, int], set[int]] = {}

    def record(self, view: View, sections: Iterable[Section], units: Iterable[int]) -> None:
        for section in sections:
            positions = section.positions(view.layout, units)
            if positions:
                self.positions.setdefault((section.tensor, section.dim), set()).update(positions)


class ViewPruner(BasePruningFunc):
    """Pruner of a view whose outputs and inputs are different channels.

    It records what is to be removed. Views share tensors, so a removal happens only when all
    views of a group have spoken.
    """

    def __init__(self, recorder: Recorder):
        super().__init__()
        self.recorder = recorder

    def prune_out_channels(self, layer: View, idxs: Sequence[int]) -> View:
        self.recorder.record(layer, layer.out_sections, idxs)
        return layer

    def prune_in_channels(self, layer: View, idxs: Sequence[int]) -> View:
        self.recorder.record(layer, layer.in_sections, idxs)
        return layer

    def get_out_channels(self, layer: View) -> int | None:
        return layer.units(layer.out_sections)

    def get_in_channels(self, layer: View) -> int | None:
        return layer.units(layer.in_sections)


class ThroughPruner(ViewPruner):
    """Pruner of a view whose outputs are its inputs, channel by channel."""

    # one function for both sides is how torch_pruning knows that a removal passes
    prune_in_channels = ViewPruner.prune_out_channels
    prune_out_channels = prune_in_channels

    def get_in_channels(self, layer: View) -> int | None:
        return self.get_out_channels(layer)


class BoundaryPruner(BasePruningFunc):
    """Pruner of a boundary: nothing to remove, nothing passes."""

    def prune_out_channels(self, layer: Boundary, idxs: Sequence[int]) -> Boundary:
        return layer

    def prune_in_channels(self, layer: Boundary, idxs: Sequence[int]) -> Boundary:
        return layer

    def get_out_channels(self, layer: Boundary) -> None:
        return None

    def get_in_channels(self, layer: Boundary) -> None:
        return None


def make_pruners(recorder: Recorder) -> dict[type[nn.Module], BasePruningFunc]:
    """The pruner of every class of nodes, for torch_pruning's ``customized_pruners``."""
    through = ThroughPruner(recorder)
    return {
        Projection: ViewPruner(recorder),
        HeadProjection: ViewPruner(recorder),
        Convolution: through,
        Scale: through,
        Parameter: through,
        Boundary: BoundaryPruner(),
    }
