"""Gated delta nets (arXiv 2412.06464), and the layout that their families share.

q, k and v pass a convolution and SiLU; q and k are normalised, and H / G value heads read one key
head; a norm over the dv entries of each head, times a gate, precedes the output projection. The
state of a head is (dk, dv), so dk, ``head_k_dim``, is what the state size is elsewhere.
"""

from abc import abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers.activations import ACT2FN

from sparsessm_plugin.errors import SparseSSMError
from sparsessm_plugin.families.base import (
    MixerAdapter,
    MixerSizes,
    TensorAxis,
    get_tensor,
    linear_shape,
)
from sparsessm_plugin.recurrence.quantities import DeltaQuantities


@dataclass(frozen=True)
class DeltaSizes(MixerSizes):
    """The sizes of a gated delta net: a state of dk entries for each of D = H dv channels."""

    @property
    def num_k_heads(self) -> int:
        """G, groups of value heads that share a key."""
        return self.n_groups

    @property
    def num_v_heads(self) -> int:
        """H."""
        return self.num_heads

    @property
    def head_k_dim(self) -> int:
        """dk."""
        return self.state_size

    @property
    def head_v_dim(self) -> int:
        """dv."""
        return self.head_dim


@dataclass(frozen=True)
class EntryRows:
    """What the projections make that read the layer's input.

    :param qkv: (b, L, 2 G dk + H dv) input of conv1d: queries, keys and values, head after head
    :param z: (b, L, H dv) gate before its activation
    :param b: (b, L, H) beta before its sigmoid
    :param a: (b, L, H) step of the decay before bias and softplus
    """

    qkv: Tensor
    z: Tensor
    b: Tensor
    a: Tensor


class DeltaNetAdapter(MixerAdapter):
    """Gated delta nets; one subclass a family, which knows where the rows stand.

    Axes: ``key_dims``, the G dk entries of keys and queries, key head after key head;
    ``value_heads`` (H); ``value_dims``, the dv entries of every value head.
    """

    recurrence = "delta_rule"
    recurrent_parameters = ("A_log",)
    state_axis = "key_dims"
    axis_names = ("key_dims", "value_heads", "value_dims")
    # each projection of the layer's input, and what it makes
    entry_makes: ClassVar[dict[str, tuple[str, ...]]]
    norm_name: ClassVar[str] = "norm"
    # the config field of each size
    state_size_field: ClassVar[str] = "linear_key_head_dim"
    key_heads_field: ClassVar[str] = "linear_num_key_heads"
    value_heads_field: ClassVar[str] = "linear_num_value_heads"
    value_dim_field: ClassVar[str] = "linear_value_head_dim"

    @property
    def sizes(self) -> DeltaSizes:
        mixer = self.mixer
        hidden_size, D = linear_shape(mixer.get_submodule(self.exit_kind))
        H, G = mixer.A_log.shape[0], mixer.num_k_heads
        return DeltaSizes(
            hidden_size=hidden_size,
            intermediate_size=D,
            state_size=(mixer.conv1d.weight.shape[0] - D) // (2 * G),
            conv_kernel_size=mixer.conv1d.weight.shape[-1],
            num_heads=H,
            head_dim=D // H,
            n_groups=G,
        )

    @property
    def D(self) -> Tensor:
        raise SparseSSMError(f"{self.name}: a gated delta net has no skip connection D")

    @property
    def norm(self) -> Any:
        """The norm over each head's dv entries that precedes the output projection."""
        return self.mixer.get_submodule(self.norm_name)

    @property
    def beta_scale(self) -> float:
        """What sigmoid is multiplied with to make beta."""
        return 1.0

    @abstractmethod
    def entry_rows(self, hidden_states: Tensor) -> EntryRows:
        """What the projections make that read the layer's input.

        :param hidden_states: (b, L, hidden_size), zero at padding
        """

    def activate(self, x: Tensor) -> Tensor:
        result: Tensor = ACT2FN[self.mixer.activation](x)
        return result

    def quantities(
        self, hidden_states: Tensor, attention_mask: Tensor | None = None
    ) -> DeltaQuantities:
        sizes = self.sizes
        G, dk, H, dv = sizes.num_k_heads, sizes.head_k_dim, sizes.num_v_heads, sizes.head_v_dim
        x, mask = self.enter(hidden_states, attention_mask)
        rows = self.entry_rows(x)
        # transformers leaves what the convolution makes of padding behind a text where it is
        q, k, v = self.convolved(rows.qkv, None).split([G * dk, G * dk, H * dv], dim=-1)
        return DeltaQuantities(
            q=q.unflatten(-1, (G, dk)),
            k=k.unflatten(-1, (G, dk)),
            v=v.unflatten(-1, (H, dv)),
            beta=rows.b.sigmoid() * self.beta_scale,
            g=self.log_decay(rows.a),
            z=rows.z,
            mask=mask,
            inputs={**dict.fromkeys(self.entry_kinds, x), "conv1d": rows.qkv},
        )

    def made_by_projections(self, quantities: DeltaQuantities) -> list[tuple[str, list[Tensor]]]:
        q, sizes = quantities, self.sizes
        keys = sizes.num_k_heads * sizes.head_k_dim
        parts = q.inputs["conv1d"].split([keys, keys, sizes.intermediate_size], dim=-1)
        made = dict(zip("qkv", parts, strict=True)) | {"z": q.z, "beta": q.beta, "g": q.g}
        entries = [(k, [made[name] for name in names]) for k, names in self.entry_makes.items()]
        return [*entries, ("conv1d", [q.q, q.k, q.v])]

    def log_decay(self, a: Tensor) -> Tensor:
        """(b, L, H) float32 g = -exp(A_log) softplus(a + dt_bias)."""
        step = F.softplus(a.float() + self.mixer.dt_bias.float())
        return -self.mixer.A_log.float().exp() * step

    def out_gain(self, quantities: DeltaQuantities, y: Tensor) -> Tensor:
        return self.norm_scale(y) * quantities.gate

    def norm_scale(self, y: Tensor) -> Tensor:
        """(b, L, D) weight / rms of the norm over each head of y (b, L, D)."""
        heads = y.unflatten(-1, (-1, self.norm.weight.shape[0]))  # (b, L, H, dv)
        scale = torch.rsqrt(heads.square().mean(-1, keepdim=True) + self.norm.variance_epsilon)
        return (scale * self.norm.weight.float()).flatten(-2)

    @property
    def state_rows(self) -> tuple[TensorAxis, TensorAxis]:
        """Where the rows of queries and of keys stand."""
        q, k = self.entry_axes("key_dims")
        return q, k

    def state_ranges(self) -> list[tuple[TensorAxis, int]]:
        """Where queries, keys, beta and the decay come from."""
        keys, heads = self.axis_length("key_dims"), self.axis_length("value_heads")
        of_keys = [(axis, keys) for axis in self.axes("key_dims")]
        # what a head has one of, and not one for each value dim
        return of_keys + [(a, heads) for a in self.axes("value_heads") if a.block == 1]

    # -- axes ------------------------------------------------------------------------

    def axis_length(self, axis: str) -> int:
        self.check_axis(axis)
        sizes = self.sizes
        return {
            "key_dims": sizes.num_k_heads * sizes.head_k_dim,
            "value_heads": sizes.num_v_heads,
            "value_dims": sizes.head_v_dim,
        }[axis]

    def groups_of(self, axis: str) -> int:
        return self.sizes.num_k_heads if axis in ("key_dims", "value_heads") else 1

    def size_of(self, axis: str, length: int) -> int:
        return length // self.sizes.num_k_heads if axis == "key_dims" else length

    def axes(self, axis: str) -> list[TensorAxis]:
        self.check_axis(axis)
        sizes = self.sizes
        keys, H, dv = sizes.num_k_heads * sizes.head_k_dim, sizes.num_v_heads, sizes.head_v_dim
        ranges = self.entry_axes(axis)
        if axis == "key_dims":
            ranges += [TensorAxis("conv1d.weight", 0, k * keys) for k in (0, 1)]
        else:
            shape: dict[str, int] = {"block": dv}
            if axis == "value_dims":
                shape = {"repeat": H, "stride": dv}
                ranges.append(TensorAxis(f"{self.norm_name}.weight", 0))
            else:
                ranges += [TensorAxis(name, 0) for name in ("A_log", "dt_bias")]
            ranges.append(TensorAxis("conv1d.weight", 0, 2 * keys, **shape))
            ranges.append(TensorAxis(f"{self.exit_kind}.weight", 1, 0, **shape))
        return [r for r in ranges if get_tensor(self.mixer, r.tensor) is not None]

    @abstractmethod
    def entry_axes(self, axis: str) -> list[TensorAxis]:
        """:meth:`axes` in the weights that read the layer's input."""

    def size_fields(self, axis: str, size: int) -> dict[str, Any]:
        self.check_axis(axis)
        field = {
            "key_dims": self.state_size_field,
            "value_heads": self.value_heads_field,
            "value_dims": self.value_dim_field,
        }[axis]
        return {field: size}

    def set_size(self, axis: str, size: int) -> dict[str, Any]:
        fields = self.size_fields(axis, size)
        mixer = self.mixer
        attribute = {
            "key_dims": "head_k_dim",
            "value_heads": "num_v_heads",
            "value_dims": "head_v_dim",
        }[axis]
        setattr(mixer, attribute, size)
        mixer.key_dim = mixer.head_k_dim * mixer.num_k_heads
        mixer.value_dim = mixer.head_v_dim * mixer.num_v_heads
        mixer.conv_dim = 2 * mixer.key_dim + mixer.value_dim
        conv1d = mixer.conv1d
        conv1d.in_channels = conv1d.out_channels = conv1d.groups = mixer.conv_dim
        mixer.get_submodule(self.exit_kind).in_features = mixer.value_dim
        for kind, rows in self.entry_sizes().items():
            mixer.get_submodule(kind).out_features = rows
        return fields

    @abstractmethod
    def entry_sizes(self) -> dict[str, int]:
        """Rows of each projection that reads the layer's input, from the module's attributes."""

    def config_sizes(self) -> dict[str, int]:
        sizes = self.sizes
        return {
            self.state_size_field: sizes.head_k_dim,
            self.key_heads_field: sizes.num_k_heads,
            self.value_heads_field: sizes.num_v_heads,
            self.value_dim_field: sizes.head_v_dim,
        }
