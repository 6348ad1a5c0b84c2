"""Mamba-2 (arXiv 2405.21060), and the layout that its hybrids share with it.

in_proj holds the rows of z, x, B, C and dt; x, B and C pass a convolution; A_log is one
number a head; a gated norm precedes out_proj.
"""

from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from sparsessm_plugin.backends.choice import kernels_for
from sparsessm_plugin.backends.products import project
from sparsessm_plugin.errors import SparseSSMError
from sparsessm_plugin.families.base import (
    MixerAdapter,
    MixerSizes,
    TensorAxis,
    get_tensor,
    linear_shape,
)
from sparsessm_plugin.families.registry import register_adapter
from sparsessm_plugin.recurrence.quantities import HeadQuantities, MixerQuantities


@register_adapter
class Mamba2Adapter(MixerAdapter):
    """Mixers with an (H,) A_log and B, C from in_proj; one subclass a family."""

    family = "mamba2"
    mixer_class = "Mamba2Mixer"
    projections = ("in_proj", "conv1d", "out_proj")
    axis_names = ("state", "heads", "head_dim")
    # config fields that carry the sizes
    state_size_field: ClassVar[str] = "state_size"
    num_heads_field: ClassVar[str] = "num_heads"
    head_dim_field: ClassVar[str] = "head_dim"
    expand_field: ClassVar[str] = "expand"

    @property
    def sizes(self) -> MixerSizes:
        mixer = self.mixer
        num_heads, D = mixer.A_log.shape[0], linear_shape(mixer.out_proj)[1]
        return MixerSizes(
            hidden_size=linear_shape(mixer.out_proj)[0],
            intermediate_size=D,
            state_size=(mixer.conv1d.weight.shape[0] - D) // (2 * mixer.n_groups),
            conv_kernel_size=mixer.conv1d.weight.shape[-1],
            num_heads=num_heads,
            head_dim=D // num_heads,
            n_groups=mixer.n_groups,
        )

    def in_output(self, projected: Tensor) -> Tensor:
        """(b, L, 2 D + 2 G N + H) what the family makes of in_proj's output."""
        return projected

    def quantities(
        self, hidden_states: Tensor, attention_mask: Tensor | None = None
    ) -> HeadQuantities:
        mixer, sizes = self.mixer, self.sizes
        batch, length = hidden_states.shape[:2]
        in_input, mask = self.enter(hidden_states, attention_mask)
        D, N, G, H = sizes.intermediate_size, sizes.state_size, sizes.n_groups, sizes.num_heads
        z, conv_input, dt = self.in_output(project(mixer.in_proj, in_input)).split(
            [D, D + 2 * G * N, H], dim=-1
        )
        u, B, C = self.convolved(conv_input, mask).split([D, G * N, G * N], dim=-1)
        low, high = mixer.time_step_limit
        dt = F.softplus(dt.float() + mixer.dt_bias.float()).clamp(low, high)
        if not (torch.is_grad_enabled() and kernels_for(u) is not None):
            u, B, C, z = (x.float() for x in (u, B, C, z))
        return HeadQuantities(
            u=u,
            dt=dt,
            A=-torch.exp(mixer.A_log.float()),
            B=B.reshape(batch, length, G, N),
            C=C.reshape(batch, length, G, N),
            D=mixer.D.float(),
            z=z,
            mask=mask,
            inputs={"in_proj": in_input, "conv1d": conv_input},
        )

    def norm_groups(self) -> int:
        """Over how many equal parts of the channels the norm runs apart."""
        return 1

    def out_gain(self, quantities: MixerQuantities, y: Tensor) -> Tensor:
        gate = quantities.gate
        return gate * self.rms_scale(y * gate)

    def out_input(self, quantities: Any, y: Tensor) -> Tensor:
        kernels = kernels_for(y) if torch.is_grad_enabled() else None
        if kernels is None or not self._norms_after_gate():
            return super().out_input(quantities, y)
        norm, dtype = self.mixer.norm, quantities.z.dtype
        result: Tensor = kernels.gated_norm(
            y, quantities.z, norm.weight, self.norm_groups(), norm.variance_epsilon, dtype
        )
        return result

    def _norms_after_gate(self) -> bool:
        """Whether the norm's input is y times the gate."""
        return True

    def rms_scale(self, x: Tensor) -> Tensor:
        """(b, L, D) weight / rms of the family's norm for its input x (b, L, D)."""
        norm = self.mixer.norm
        parts = x.unflatten(-1, (self.norm_groups(), -1))
        scale = torch.rsqrt(parts.square().mean(-1, keepdim=True) + norm.variance_epsilon)
        return norm.weight.float() * scale.expand_as(parts).flatten(-2)

    @property
    def state_rows(self) -> tuple[TensorAxis, TensorAxis]:
        D, GN = self.sizes.intermediate_size, self.sizes.n_groups * self.sizes.state_size
        rows = TensorAxis("in_proj.weight", 0, 2 * D)
        return rows, TensorAxis("in_proj.weight", 0, 2 * D + GN)

    def axis_length(self, axis: str) -> int:
        self.check_axis(axis)
        sizes = self.sizes
        return {
            "state": sizes.n_groups * sizes.state_size,
            "heads": sizes.num_heads,
            "head_dim": sizes.head_dim,
        }[axis]

    def axes(self, axis: str) -> list[TensorAxis]:
        self.check_axis(axis)
        sizes = self.sizes
        D, GN = sizes.intermediate_size, sizes.n_groups * sizes.state_size
        H, P = sizes.num_heads, sizes.head_dim
        rows = ("in_proj.weight", "in_proj.bias")
        convolution = ("conv1d.weight", "conv1d.bias")
        if axis == "state":
            ranges = [TensorAxis(name, 0, 2 * D + k * GN) for name in rows for k in (0, 1)]
            ranges += [TensorAxis(name, 0, D + k * GN) for name in convolution for k in (0, 1)]
            ranges += [TensorAxis("mup_vector", 2, 2 * D + k * GN) for k in (0, 1)]
        else:
            # a head is P neighbouring channels; a channel of every head comes H times
            shape: dict[str, int] = {"block": P} if axis == "heads" else {"repeat": H, "stride": P}
            ranges = [TensorAxis(name, 0, k * D, **shape) for name in rows for k in (0, 1)]
            ranges += [TensorAxis(name, 0, 0, **shape) for name in convolution]
            ranges += [TensorAxis("mup_vector", 2, k * D, **shape) for k in (0, 1)]
            ranges += [
                TensorAxis("norm.weight", 0, 0, **shape),
                TensorAxis("out_proj.weight", 1, 0, **shape),
            ]
            if axis == "heads":
                dt_rows = 2 * D + 2 * GN
                ranges += [TensorAxis(name, 0, dt_rows) for name in rows]
                ranges += [TensorAxis("mup_vector", 2, dt_rows)]
                ranges += [TensorAxis(name, 0) for name in ("A_log", "D", "dt_bias")]
        return [r for r in ranges if get_tensor(self.mixer, r.tensor) is not None]

    def size_fields(self, axis: str, size: int) -> dict[str, Any]:
        self.check_axis(axis)
        if axis == "state":
            return {self.state_size_field: size}
        mixer = self.mixer
        H, P = (size, mixer.head_dim) if axis == "heads" else (mixer.num_heads, size)
        return self.channel_fields(H, P)

    def set_size(self, axis: str, size: int) -> dict[str, Any]:
        # asked first: a refusal leaves the module as it was
        fields = self.size_fields(axis, size)
        mixer, sizes = self.mixer, self.sizes
        N, H, P, G = sizes.state_size, sizes.num_heads, sizes.head_dim, sizes.n_groups
        if axis == "state":
            N = size
        elif axis == "heads":
            H, P = size, mixer.head_dim
        else:
            H, P = mixer.num_heads, size
        D = H * P
        mixer.ssm_state_size, mixer.num_heads, mixer.head_dim = N, H, P
        mixer.intermediate_size, mixer.conv_dim = D, D + 2 * G * N
        mixer.in_proj.out_features = 2 * D + 2 * G * N + H
        conv1d = mixer.conv1d
        conv1d.in_channels = conv1d.out_channels = conv1d.groups = D + 2 * G * N
        mixer.out_proj.in_features = D
        if hasattr(mixer, "groups_time_state_size"):
            mixer.groups_time_state_size = G * N
        if hasattr(getattr(mixer, "norm", None), "group_size"):
            mixer.norm.group_size = D // G
        return fields

    def config_sizes(self) -> dict[str, int]:
        sizes = self.sizes
        return {
            self.state_size_field: sizes.state_size,
            self.num_heads_field: sizes.num_heads,
            self.head_dim_field: sizes.head_dim,
        }

    def channel_fields(self, num_heads: int, head_dim: int) -> dict[str, Any]:
        """The config fields from which the family's loader makes these heads.

        :raises SparseSSMError: the loader cannot make them
        """
        channels, hidden_size = num_heads * head_dim, self.sizes.hidden_size
        if channels % hidden_size:
            raise SparseSSMError(
                f"{self.name}: {num_heads} heads of {head_dim} are {channels} channels; the "
                f"loader of {self.family} makes {self.expand_field} * hidden_size of them with a "
                f"whole {self.expand_field}, so they must be a multiple of {hidden_size}"
            )
        return {
            self.num_heads_field: num_heads,
            self.head_dim_field: head_dim,
            self.expand_field: channels // hidden_size,
        }
