"""A model's residual stream and units as modules without weights, for tracing.

Mixers, attention, MLPs, experts and norms become single nodes that know which tensor dimensions
read the stream and which write to it. What stands between them, the residual additions, the
concatenation with the embedding, a shared block, is transformers' own forward pass of each
layer, run once on one position: which nodes hang together comes from there.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch_pruning.pruner.function import BasePruningFunc

from sparsessm_plugin.families import ModelAdapter, TensorAxis, UnitBlock
from sparsessm_plugin.families.parts import Norm, Part


class _OneNode(torch.autograd.Function):
    """Zeros of another size as one node of the autograd graph."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, size: int) -> Tensor:
        return x.new_zeros((*x.shape[:-1], size))

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        raise RuntimeError("the graph of a model is there to be read, not for gradients")


class Node(nn.Module):
    """Stands for a module whose input and output are different channels.

    :param inputs: tensor ranges along which the input runs
    :param outputs: tensor ranges along which the output runs
    :param in_size: indices of the input, None where nothing goes in
    :param out_size: indices of the output, None where they are of no concern
    :param returns_pair: whether the module returns attention weights beside its output
    """

    def __init__(
        self,
        inputs: Iterable[TensorAxis],
        outputs: Iterable[TensorAxis],
        in_size: int | None,
        out_size: int | None,
        returns_pair: bool = False,
    ):
        super().__init__()
        self.inputs, self.outputs = tuple(inputs), tuple(outputs)
        self.in_size, self.out_size = in_size, out_size
        self.returns_pair = returns_pair
        self.weight = torch.zeros(())  # Mamba's layers ask a norm for its dtype

    def extra_repr(self) -> str:
        return ", ".join(dict.fromkeys(axis.tensor for axis in self.inputs + self.outputs))

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        output = _OneNode.apply(hidden_states, self.out_size or 1)
        return (output, None) if self.returns_pair else output


class ThroughNode(Node):
    """Stands for a module whose output are its input's channels, one by one."""


class Recorder:
    """Collects which entries the pruners of the nodes remove, tensor by tensor."""

    def __init__(self) -> None:
        self.positions: dict[tuple[str, int], set[int]] = {}

    def record(self, axes: Iterable[TensorAxis], indices: Sequence[int]) -> None:
        for axis in axes:
            entries = self.positions.setdefault((axis.tensor, axis.dim), set())
            entries.update(axis.positions(indices))


class NodePruner(BasePruningFunc):
    """Pruner of a node. It records what is to be removed; nothing changes yet."""

    def __init__(self, recorder: Recorder):
        super().__init__()
        self.recorder = recorder

    def prune_out_channels(self, layer: Node, idxs: Sequence[int]) -> Node:
        self.recorder.record(layer.outputs, idxs)
        return layer

    def prune_in_channels(self, layer: Node, idxs: Sequence[int]) -> Node:
        self.recorder.record(layer.inputs, idxs)
        return layer

    def get_out_channels(self, layer: Node) -> int | None:
        return layer.out_size

    def get_in_channels(self, layer: Node) -> int | None:
        return layer.in_size


class ThroughNodePruner(NodePruner):
    """Pruner of a node whose outputs are its inputs."""

    # one function for both sides is how torch_pruning knows that a removal passes
    prune_in_channels = NodePruner.prune_in_channels
    prune_out_channels = prune_in_channels


def make_node_pruners(recorder: Recorder) -> dict[type[nn.Module], BasePruningFunc]:
    """The pruner of every class of nodes, for torch_pruning's ``customized_pruners``."""
    return {Node: NodePruner(recorder), ThroughNode: ThroughNodePruner(recorder)}


class Stream(nn.Module):
    """The residual stream from the embedding to lm_head.

    :param adapter: the model
    """

    def __init__(self, adapter: ModelAdapter):
        super().__init__()
        self.adapter = adapter
        size, parts, layers = adapter.hidden_size, adapter.parts, adapter.layers
        inner = {part.name: _node(part, size) for layer in layers for part in layer.parts}
        self.layers = nn.ModuleList(
            _stand_in(module, layer.name, inner)
            for module, layer in zip(adapter.base.layers, layers, strict=True)
        )
        # where the stream leaves a layer; without tensors
        self.taps = nn.ModuleList(ThroughNode((), (), size, size) for _ in layers)
        outer = [part for part in parts if part.name not in inner]
        self.ends = nn.ModuleList(_node(part, size) for part in outer)

    @property
    def roots(self) -> list[Node]:
        """Nodes that write M entries: the embedding, then those of the layers."""
        return [m for m in (*self.ends, *self.layers.modules()) if type(m) is Node and m.outputs]

    def forward(self, nothing: Tensor) -> Tensor:
        embedding, *after = self.ends
        stream = embedded = embedding(nothing)
        for index, (layer, tap) in enumerate(zip(self.layers, self.taps, strict=True)):
            stream = tap(self.adapter.run_layer(layer, index, stream, embedded))
        for end in after:
            stream = end(stream)
        return stream


class Units(nn.Module):
    """The units of one module: made by several rows together, read by columns.

    :param block: the units
    """

    def __init__(self, block: UnitBlock):
        super().__init__()
        self.rows = nn.ModuleList(Node((), (axis,), None, block.length) for axis in block.rows)
        self.columns = nn.ModuleList(
            Node((axis,), (), block.length, None) for axis in block.columns
        )

    @property
    def root(self) -> Node:
        """A node that makes units; any would do."""
        root = self.rows[0]
        assert isinstance(root, Node)
        return root

    def forward(self, nothing: Tensor) -> list[Tensor]:
        first, *others = [row(nothing) for row in self.rows]
        for other in others:  # a gate times its values, queries times keys times values
            first = first * other
        return [column(first) for column in self.columns]


class ModelSurrogate(nn.Module):
    """The stream and every block of units, traced as unconnected parts of one graph.

    :param adapter: the model
    """

    def __init__(self, adapter: ModelAdapter):
        super().__init__()
        self.stream = Stream(adapter)
        units = [axis for axis in adapter.axis_names if axis not in ("hidden", "layers")]
        self.block_names = [block.name for axis in units for block in adapter.blocks(axis)]
        self.units = nn.ModuleList(Units(block) for axis in units for block in adapter.blocks(axis))

    def units_of(self, block: UnitBlock) -> Units:
        """The traced units of a block."""
        units = self.units[self.block_names.index(block.name)]
        assert isinstance(units, Units)
        return units

    def forward(self) -> list[Tensor]:
        # one position; it gives what needs no input a place in the autograd graph
        nothing = torch.zeros((1, 1, 1), requires_grad=True)
        return [self.stream(nothing), *(out for units in self.units for out in units(nothing))]


def _node(part: Part, hidden_size: int) -> Node:
    """The stand-in of a part."""
    reads, writes = part.reads(), part.writes()
    if isinstance(part, Norm):
        return ThroughNode(reads, reads, part.width, part.width)
    out_size = hidden_size if writes else None
    return Node(reads, writes, part.width, out_size, part.returns_pair)


def _stand_in(module: nn.Module, name: str, nodes: dict[str, Node]) -> nn.Module:
    """A module with its forward pass and attributes, and nodes in the place of its parts."""
    if name in nodes:
        return nodes[name]
    # not deepcopy: tensors, hooks, and a forward that others have put on the instance, stay
    clone = nn.Module.__new__(type(module))
    nn.Module.__init__(clone)
    own = vars(clone)
    own.update({k: v for k, v in vars(module).items() if k not in own and k != "forward"})
    for child, submodule in module.named_children():
        clone.add_module(child, _stand_in(submodule, f"{name}.{child}", nodes))
    return clone
