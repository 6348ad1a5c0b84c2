"""What a state-space mixer is to the rest of the package.

Nothing outside :mod:`sparsessm_plugin.families` knows an attribute name of transformers.

Shapes: b batch, L sequence length, D channels (``intermediate_size``), N state size,
R rank of dt (``time_step_rank``), K width of the convolution; in the Mamba-2 layout also
H heads of P channels (``head_dim``) and G groups of heads that share B and C.

One file because most of it is one interface, whose parts are read side by side.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from compressed_tensors.offload import disable_onloading
from torch import Tensor, nn

from sparsessm_plugin.backends.choice import backend_for, kernels_for
from sparsessm_plugin.backends.products import project
from sparsessm_plugin.errors import SparseSSMError
from sparsessm_plugin.recurrence import by_group, implementation, scan
from sparsessm_plugin.recurrence.quantities import GroupedQuantities
from sparsessm_plugin.recurrence.statistics import ScanStatistics

_ROUTERS = ("router", "gate", "shared_expert_gate")  # beside a module's experts


@dataclass(frozen=True)
class MixerSizes:
    """The sizes of a mixer, read from its tensors and not from its config.

    A Mamba-1 mixer has no heads: it counts as D heads of one channel, all in one group.
    """

    hidden_size: int
    intermediate_size: int  # D
    state_size: int  # N
    conv_kernel_size: int  # K
    num_heads: int  # H
    head_dim: int  # P
    n_groups: int  # G
    time_step_rank: int = 0  # R, Mamba-1 only

    def keeping(self, axis: str, size: int) -> "MixerSizes":
        """The same with fewer channels.

        :param axis: of channels, heads or channels of every head
        :param size: indices of it that stay
        """
        heads, head_dim = self.num_heads, self.head_dim
        if axis in ("head_dim", "value_dims"):
            head_dim = size
        else:  # in the Mamba-1 layout every channel is a head
            heads = size
        D = heads * head_dim
        return replace(self, num_heads=heads, head_dim=head_dim, intermediate_size=D)


@dataclass(frozen=True)
class MixerProjection:
    """A weight of a mixer that a solver may prune, and where it stands.

    :param kind: one of the adapter's ``projections``
    :param path: dotted name in the mixer, of the layer or of a parameter that stands alone
    :param module: what holds the parameter
    :param attribute: the parameter's name there
    """

    kind: str
    path: str
    module: Any
    attribute: str = "weight"

    @property
    def weight(self) -> nn.Parameter:
        """(out, in); of conv1d (D, 1, K), with a matrix for each head (heads, out, in)."""
        return getattr(self.module, self.attribute)


@dataclass(frozen=True)
class TensorAxis:
    """Where an axis of the mixer runs along one dimension of one tensor.

    Index i of the axis stands at ``start + r * stride + i * block + j`` for every
    r < repeat and j < block.

    :param tensor: dotted name inside the mixer, e.g. ``x_proj.weight``
    :param dim: dimension of the tensor
    :param start: position of index 0
    :param block: neighbouring entries an index stands for, e.g. the channels of a head
    :param repeat: how often the axis comes again, e.g. head_dim once a head
    :param stride: distance between two repeats
    :param period: indices after which ``gap`` entries of something else follow; 0 if never
    :param gap: see ``period``
    """

    tensor: str
    dim: int
    start: int = 0
    block: int = 1
    repeat: int = 1
    stride: int = 0
    period: int = 0
    gap: int = 0

    def grid(self, length: int) -> Tensor:
        """(repeat, block, length) int64 positions of every index of an axis of this length."""
        index = torch.arange(length)
        first = self.start + index * self.block
        if self.period:
            first = first + index // self.period * self.gap
        repeats = self.stride * torch.arange(self.repeat)[:, None, None]
        return repeats + torch.arange(self.block)[:, None] + first

    def positions(self, indices: Iterable[int]) -> list[int]:
        """Entries along ``dim`` that belong to the given indices of the axis, ascending.

        Of a tensor that its adapter calls stacked, entries count on from one slice to the next.
        """
        indices = list(indices)  # they are walked through once a repeat
        return sorted(
            self.start
            + r * self.stride
            + i * self.block
            + (i // self.period * self.gap if self.period else 0)
            + j
            for r in range(self.repeat)
            for i in indices
            for j in range(self.block)
        )


class MixerAdapter(ABC):
    """Reads one mixer module of one family.

    :param mixer: the module, e.g. a ``transformers`` ``MambaMixer``
    :param name: its dotted name in the model, for messages and reports
    """

    family: ClassVar[str]
    mixer_class: ClassVar[str]
    projections: ClassVar[tuple[str, ...]]
    axis_names: ClassVar[tuple[str, ...]]
    # what the state does from step to step: the selective recurrence of Mamba, or the delta rule
    recurrence: ClassVar[Literal["selective", "delta_rule"]] = "selective"
    # the axis that shortens the state of a channel
    state_axis: ClassVar[str] = "state"
    # projections that read the layer's input, and the one that makes its output
    entry_kinds: ClassVar[tuple[str, ...]] = ("in_proj",)
    exit_kind: ClassVar[str] = "out_proj"
    # parameters of the recurrence that stand alone in the mixer
    recurrent_parameters: ClassVar[tuple[str, ...]] = ("A_log", "D")
    # tensors whose first dimension is the head: positions along another one count head after head
    stacked: ClassVar[frozenset[str]] = frozenset()
    # whether transformers' convolution reads channels in the last dimension, as projections write
    convolves_by_channel: ClassVar[bool] = True

    def __init__(self, mixer: nn.Module, name: str = "mixer"):
        # Any: nn.Module types every attribute as Tensor | Module
        self.mixer: Any = mixer
        self.name = name

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.name!r}, {self.sizes})"

    @property
    @abstractmethod
    def sizes(self) -> MixerSizes:
        """Sizes of the mixer as its tensors have them."""

    @property
    def A_log(self) -> Tensor:
        """The parameter with A = -exp(A_log), or a view: (D, N), in the Mamba-2 layout (H,)."""
        return self.mixer.A_log

    @property
    def D(self) -> Tensor:
        """The skip connection, or a view: (D,), in the Mamba-2 layout (H,)."""
        return self.mixer.D

    def projection(self, kind: str) -> MixerProjection:
        """Where the weight of one of ``projections`` stands."""
        return MixerProjection(kind, kind, self.mixer.get_submodule(kind))

    def kind_of(self, name: str) -> str | None:
        """The projection whose weight a parameter is, packed or not; or None.

        :param name: dotted, inside the mixer
        """
        first, _, tensor = name.partition(".")
        weight = first in self.projections and tensor in ("weight", "weight_packed")
        return first if weight else None

    def entries_along(self, where: TensorAxis) -> Tensor:
        """A tensor of the mixer with a row for each position that ``where`` counts.

        :return: (positions, all other entries)
        """
        tensor = get_tensor(self.mixer, where.tensor)
        assert tensor is not None
        if where.tensor in self.stacked:
            return tensor.detach().movedim(where.dim, 1).flatten(0, 1).flatten(1)
        return tensor.detach().movedim(where.dim, 0).flatten(1)

    @property
    def stages(self) -> tuple[tuple[str, ...], ...]:
        """The projections in the order of the data: at the entry, within, at the exit."""
        ends = (*self.entry_kinds, self.exit_kind)
        within = tuple(kind for kind in self.projections if kind not in ends)
        return self.entry_kinds, within, (self.exit_kind,)

    @property
    def has_state_transitions(self) -> bool:
        """Whether A_log has an entry for every state, as in the Mamba-1 layout."""
        return self.A_log.ndim == 2

    @property
    def out_norm(self) -> Tensor:
        """(D,) float32 Euclidean norm of each column of the output projection."""
        weight = self.projection(self.exit_kind).weight
        return torch.linalg.vector_norm(weight.detach().float(), dim=0)

    @abstractmethod
    def quantities(self, hidden_states: Tensor, attention_mask: Tensor | None = None) -> Any:
        """Compute the quantities of the recurrence from what entered the mixer.

        :param hidden_states: (b, L, hidden_size)
        :param attention_mask: (b, L), zero at padding, or None
        :return: :class:`MixerQuantities` of the selective recurrence, and
            :class:`sparsessm_plugin.recurrence.quantities.DeltaQuantities` of the delta rule
        """

    def made_by_projections(self, quantities: Any) -> list[tuple[str, list[Tensor]]]:
        """What each projection but the last makes, in the order of the data.

        :param quantities: of this mixer
        :return: kind of the projection, and the tensors that it makes
        """
        q = quantities
        x_proj = "x_proj" if "x_proj" in q.inputs else "conv1d"  # which makes B and C
        dt_proj = "dt_proj" if "dt_proj" in q.inputs else "in_proj"
        low_rank = [q.inputs["dt_proj"]] if "dt_proj" in q.inputs and x_proj in q.inputs else []
        return [
            ("in_proj", [q.inputs["conv1d"], q.z]),
            ("conv1d", [q.u]),
            (x_proj, [q.B, q.C, *low_rank]),
            (dt_proj, [q.dt]),
        ]

    def in_input(self, hidden_states: Tensor) -> Tensor:
        """(b, L, hidden_size) what in_proj's weight multiplies, of what entered the mixer."""
        return hidden_states

    def enter(
        self, hidden_states: Tensor, attention_mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """The input of in_proj, zero at padding, and the mask of :class:`MixerQuantities`.

        :param hidden_states: (b, L, hidden_size)
        :param attention_mask: (b, L), zero at padding, or None
        """
        mask = padding_mask(attention_mask, hidden_states.shape[1])
        if mask is not None:
            hidden_states = hidden_states * mask[..., None].to(hidden_states.dtype)
        return self.in_input(hidden_states), mask

    def convolved(self, conv_input: Tensor, mask: Tensor | None) -> Tensor:
        """What follows conv1d and its activation, zero at padding.

        :param conv_input: (b, L, channels of conv1d) of in_proj
        :param mask: (b, L) bool as in :class:`MixerQuantities`
        :return: of the shape and the dtype of ``conv_input``
        """
        mixer, conv1d = self.mixer, self.mixer.conv1d
        kernels = kernels_for(conv_input)
        if kernels is not None and getattr(mixer, "activation", None) == "silu":
            return kernels.convolve(conv_input, conv1d.weight, conv1d.bias, mask)
        x = nn.functional.conv1d(
            conv_input.transpose(1, 2),
            conv1d.weight,
            conv1d.bias,
            padding=conv1d.weight.shape[-1] - 1,
            groups=conv_input.shape[-1],
        )[..., : conv_input.shape[1]]
        x = self.activate(x).transpose(1, 2)
        if mask is not None:
            # the convolution's bias and its look-back fill padded positions again
            x = x * mask[..., None].to(x.dtype)
        return x

    def activate(self, x: Tensor) -> Tensor:
        """The activation behind conv1d."""
        result: Tensor = self.mixer.act(x)
        return result

    @abstractmethod
    def out_gain(self, quantities: Any, y: Tensor) -> Tensor:
        """(b, L, D) float32 factor between the scan output and the input of out_proj.

        The gate, and where a norm follows it that norm's scale for this very ``y``.

        :param y: (b, L, D) output of the recurrence, skip connection included
        """

    def out_input(self, quantities: Any, y: Tensor) -> Tensor:
        """(b, L, D) float32 input of out_proj.

        :param y: (b, L, D) output of the recurrence, skip connection included
        """
        return y * self.out_gain(quantities, y)

    def output(self, quantities: Any, y: Tensor) -> Tensor:
        """Turn the scan output into the mixer's output.

        :param y: (b, L, D) output of the recurrence, skip connection included
        :return: (b, L, hidden_size) in the dtype of the model
        """
        dtype = quantities.inputs[self.entry_kinds[0]].dtype
        return self.project_out(self.out_input(quantities, y).to(dtype))

    def project_out(self, x: Tensor) -> Tensor:
        """(b, L, hidden_size) what the output projection makes of its input (b, L, D)."""
        return project(self.mixer.get_submodule(self.exit_kind), x)

    @abstractmethod
    def axis_length(self, axis: str) -> int:
        """How many indices an axis has.

        :raises SparseSSMError: the family has no such axis
        """

    @property
    def channel_axis(self) -> str:
        """The axis of channels; where there are heads, that of the channels of every head."""
        axes = ("channels", "head_dim", "value_dims")
        return next(axis for axis in axes if axis in self.axis_names)

    def last_indices(self, axis: str, kept: int) -> list[int]:
        """The last indices of an axis, of each of its equal parts as many, if so many stay."""
        parts = self.groups_of(axis)
        each, left = self.axis_length(axis) // parts, kept // parts
        return [part * each + i for part in range(parts) for i in range(left, each)]

    def groups_of(self, axis: str) -> int:
        """Equal parts of an axis that must lose equally many indices."""
        return self.sizes.n_groups if axis in ("state", "heads") else 1

    def size_of(self, axis: str, length: int) -> int:
        """The size that the module states where the axis has this length.

        States are counted group after group, and the module's size is that of one group.
        """
        return length // self.sizes.n_groups if axis == "state" else length

    @abstractmethod
    def axes(self, axis: str) -> list[TensorAxis]:
        """Every tensor range that shrinks when the axis does.

        :param axis: ``state`` (N; in the Mamba-2 layout G N, group after group), ``channels``
            (Mamba-1), ``heads`` or ``head_dim`` (Mamba-2); ``key_dims``, ``value_heads`` or
            ``value_dims`` of gated delta nets
        :raises SparseSSMError: the family has no such axis
        """

    @abstractmethod
    def size_fields(self, axis: str, size: int) -> dict[str, Any]:
        """The config fields from which the family's loader makes this size; changes nothing.

        :raises SparseSSMError: the loader cannot make it
        """

    @abstractmethod
    def set_size(self, axis: str, size: int) -> dict[str, Any]:
        """Write a new size of an axis into the module's attributes; tensors stay.

        :param size: the new state size, channels, heads or channels a head
        :return: the config fields that must change for the model to load again
        """

    @property
    @abstractmethod
    def state_rows(self) -> tuple[TensorAxis, TensorAxis]:
        """Where the rows of B and of C stand in the projection that makes them."""

    @property
    def mixes_C(self) -> bool:
        """Whether C is linear in its rows, so that new rows may be mixed from old ones."""
        return False

    @property
    def between_C(self) -> str:
        """Why C cannot be mixed, as the end of a sentence; see :attr:`mixes_C`."""
        what = "a norm" if self.norms_state else "a convolution and SiLU"
        return f"{what} stands between the rows of C and C"

    @property
    def norms_state(self) -> bool:
        """Whether a norm runs over the states of B and C."""
        return False

    def state_ranges(self) -> list[tuple[TensorAxis, int]]:
        """Where the rows stand that B and C come from, each with the length of its axis."""
        length = self.axis_length("state")
        return [(axis, length) for axis in self.axes("state") if axis.tensor != "A_log"]

    def state_parameters(self) -> list[tuple[nn.Parameter, Tensor]]:
        """Every parameter with a row of :meth:`state_ranges`, and a mask of these.

        :return: parameter, and a bool mask that broadcasts against it
        """
        masks: dict[str, Tensor] = {}
        for axis, size in self.state_ranges():
            parameter = get_tensor(self.mixer, axis.tensor)
            if not isinstance(parameter, nn.Parameter):
                continue
            shape = [1] * parameter.ndim
            shape[axis.dim] = -1
            if axis.tensor in self.stacked:
                shape[0] = len(parameter)
            length = math.prod(parameter.shape[d] for d, n in enumerate(shape) if n != 1)
            mask = torch.zeros(length, dtype=torch.bool, device=parameter.device)
            mask[axis.positions(range(size))] = True
            mask = mask.view(shape)
            masks[axis.tensor] = masks[axis.tensor] | mask if axis.tensor in masks else mask
        return [(self.mixer.get_parameter(name), mask) for name, mask in masks.items()]

    def float_clone(self) -> "MixerAdapter":
        """An adapter of a float32 copy of the mixer, without hooks and offloading."""
        return type(self)(_clone(self.mixer, torch.float32), self.name)

    def working_clone(self) -> "MixerAdapter":
        """:meth:`float_clone`; on a GPU in the mixer's own dtype, whose sums are float32."""
        on_gpu = self.A_log.device.type == "cuda"
        return type(self)(_clone(self.mixer, None if on_gpu else torch.float32), self.name)

    def scale_state(self, factor: float) -> None:
        """Multiply what the states add to the scan output, written into the weights.

        Where a norm runs over B and C, removing states changes its mean square; this undoes
        the mean of that change.

        :raises NotImplementedError: the family has no such norm and no need for it
        """
        raise NotImplementedError(f"{self.family} scales no states")

    @abstractmethod
    def config_sizes(self) -> dict[str, int]:
        """Config fields that state sizes of the mixer, with what the tensors have."""

    def check_axis(self, axis: str) -> None:
        """Refuse an axis that the family does not have.

        :raises SparseSSMError: naming those that it has
        """
        if axis not in self.axis_names:
            raise SparseSSMError(
                f"{self.family} has no axis {axis!r}; allowed: {', '.join(self.axis_names)}"
            )


def router_names(model: nn.Module) -> set[str]:
    """Modules that choose experts or weigh shared ones, and what is in them; never pruned.

    In some families they are Linear layers of a few rows, in others modules of their own kind.
    """
    found = set()
    for name, module in model.named_modules():
        owner, _, own = name.rpartition(".")
        if own in _ROUTERS and hasattr(model.get_submodule(owner), "experts"):
            found |= {inner for inner, _ in module.named_modules(prefix=name)}
    return found


def padding_mask(attention_mask: Tensor | None, length: int) -> Tensor | None:
    """(b, L) bool mask of the real positions, or None where nothing is padded.

    :raises SparseSSMError: the mask is not (b, L)
    """
    if attention_mask is None:
        return None
    if attention_mask.ndim != 2 or attention_mask.shape[1] != length:
        raise SparseSSMError(
            f"attention_mask has shape {tuple(attention_mask.shape)}; a mixer needs "
            f"(batch, {length})"
        )
    mask = attention_mask.to(torch.bool)
    return None if bool(mask.all()) else mask


def read_out(
    adapter: MixerAdapter, quantities: Any, statistics: ScanStatistics | None = None
) -> Tensor:
    """Run the recurrence up to what out_proj multiplies.

    :param adapter: of the mixer that the quantities come from
    :param quantities: the recurrence's inputs
    :param statistics: accumulators to add this batch to, or None
    :return: (b, L, D) float32; where the quantities are in half precision and kernels of this
        package run, in that
    """
    if adapter.recurrence == "delta_rule":
        return adapter.out_input(quantities, scan(quantities))
    dtype = quantities.u.dtype
    name = backend_for(quantities.u.device)
    on_cpu = name == "cpu" and not torch.is_grad_enabled()
    if adapter.has_state_transitions and (on_cpu or (dtype.itemsize == 2 and name == "cuda")):
        run = implementation(name, quantities.u.device).scan
        if isinstance(quantities, GroupedQuantities):
            parts = [run(q, part, gated=dtype) for q, part in by_group(quantities, statistics)]
            return torch.cat(parts, dim=-1)
        x: Tensor = run(quantities, statistics, gated=dtype)
        return x
    return adapter.out_input(quantities, scan(quantities, statistics))


def get_tensor(module: Any, name: str) -> Tensor | None:
    """The tensor of a dotted name inside a module, or None where there is none.

    :param module: to look in
    :param name: such as ``in_proj.weight``
    """
    for part in name.split("."):
        module = getattr(module, part, None)
        if module is None:
            return None
    return module


def linear_shape(linear: Any) -> tuple[int, int]:
    """(out, in) of a Linear layer, also where its weight is packed into another tensor."""
    with disable_onloading():
        weight = getattr(linear, "weight", None)
    if weight is None:
        return linear.out_features, linear.in_features
    return weight.shape[0], weight.shape[1]


def _clone(module: nn.Module, dtype: torch.dtype | None) -> nn.Module:
    # not deepcopy: hooks, and a forward that others have put on the instance, stay behind
    clone = nn.Module.__new__(type(module))
    nn.Module.__init__(clone)
    own = vars(clone)
    own.update({k: v for k, v in vars(module).items() if k not in own and k != "forward"})
    clone.training = module.training
    for name, parameter in module.named_parameters(recurse=False):
        value = parameter.detach()
        value = value.to(dtype or value.dtype) if value.is_floating_point() else value
        clone.register_parameter(name, nn.Parameter(value.clone(), requires_grad=False))
    for name in module._parameters:
        if name not in clone._parameters:  # such as the bias of a layer without one
            clone.register_parameter(name, None)
    for name, buffer in module.named_buffers(recurse=False):
        value = buffer.to(dtype or buffer.dtype) if buffer.is_floating_point() else buffer
        persistent = name not in module._non_persistent_buffers_set
        clone.register_buffer(name, value.clone(), persistent=persistent)
    for name, child in module.named_children():
        clone.add_module(name, _clone(child, dtype))
    return clone
