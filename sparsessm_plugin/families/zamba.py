"""Zamba (arXiv 2405.16712): Mamba-1 layers of several heads, some fed by one shared attention."""

from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from sparsessm_plugin.backends.choice import kernels_for
from sparsessm_plugin.backends.products import project
from sparsessm_plugin.errors import SparseSSMError
from sparsessm_plugin.families.base import (
    MixerProjection,
    MixerSizes,
    TensorAxis,
    get_tensor,
    linear_shape,
)
from sparsessm_plugin.families.mamba1 import Mamba1Adapter
from sparsessm_plugin.families.registry import register_adapter
from sparsessm_plugin.recurrence.quantities import GroupedQuantities

# what stands in the mixer itself, one matrix a head
_OWN = {"x_proj": "x_proj_weight", "dt_proj": "dt_proj_weight"}


@register_adapter
class ZambaAdapter(Mamba1Adapter):
    """The Mamba-1 layout once for each head, between a common in_proj, conv1d and out_proj.

    A head is a group of channels with a B and a C of its own. Parameters with a value for each
    channel or state are stacked by heads: A_log (G, D / G, N), D and dt_proj_bias (G, D / G),
    x_proj_weight (G, R + 2 N, D / G), dt_proj_weight (G, D / G, R). Rows 2 i and 2 i + 1 of
    in_proj make channel i of the convolution's input and of the gate.
    """

    family = "zamba"
    mixer_class = "ZambaMambaMixer"
    state_size_field = "mamba_d_state"
    stacked: ClassVar[frozenset[str]] = frozenset(("A_log", "D", "dt_proj_bias", *_OWN.values()))
    convolves_by_channel: ClassVar[bool] = False  # it makes a copy in the order of time

    @property
    def sizes(self) -> MixerSizes:
        mixer = self.mixer
        groups, head_channels, state_size = mixer.A_log.shape
        return MixerSizes(
            hidden_size=linear_shape(mixer.out_proj)[0],
            intermediate_size=groups * head_channels,
            state_size=state_size,
            conv_kernel_size=mixer.conv1d.weight.shape[-1],
            num_heads=groups * head_channels,
            head_dim=1,
            n_groups=groups,
            time_step_rank=mixer.dt_proj_weight.shape[-1],
        )

    @property
    def A_log(self) -> Tensor:
        return self.mixer.A_log.flatten(0, 1)

    @property
    def D(self) -> Tensor:
        return self.mixer.D.flatten()

    def projection(self, kind: str) -> MixerProjection:
        if kind in _OWN:
            return MixerProjection(kind, _OWN[kind], self.mixer, _OWN[kind])
        return super().projection(kind)

    def kind_of(self, name: str) -> str | None:
        return next((k for k, own in _OWN.items() if own == name), super().kind_of(name))

    def quantities(
        self, hidden_states: Tensor, attention_mask: Tensor | None = None
    ) -> GroupedQuantities:
        mixer, sizes = self.mixer, self.sizes
        in_input, mask = self.enter(hidden_states, attention_mask)
        both = project(mixer.in_proj, in_input).unflatten(-1, (-1, 2))  # (b, L, D, 2)
        conv_input, z = both[..., 0].contiguous(), both[..., 1].contiguous()
        u = self.convolved(conv_input, mask)
        x_input = u.unflatten(-1, (sizes.n_groups, -1))  # (b, L, G, D / G)
        R, N = sizes.time_step_rank, sizes.state_size
        projected = torch.einsum("blgd,god->blgo", x_input, mixer.x_proj_weight)
        low_rank_dt, B, C = projected.split([R, N, N], dim=-1)  # (b, L, G, R), (b, L, G, N) twice
        dt = torch.einsum("blgr,gdr->blgd", low_rank_dt, mixer.dt_proj_weight).flatten(-2)
        bias = mixer.dt_proj_bias.flatten()
        kernels = kernels_for(dt)
        if kernels is not None:
            dt = kernels.softplus(dt, bias)
        else:
            dt = F.softplus(dt.float() + bias.float())
            u, B, C, z = (x.float() for x in (u, B, C, z))
        return GroupedQuantities(
            u=u,
            dt=dt,
            A=-torch.exp(self.A_log.float()),
            B=B,
            C=C,
            D=self.D.float(),
            z=z,
            mask=mask,
            inputs={
                "in_proj": in_input,
                "conv1d": conv_input,
                "x_proj": x_input,
                "dt_proj": low_rank_dt,
            },
        )

    def axis_length(self, axis: str) -> int:
        sizes = self.sizes
        return super().axis_length(axis) * (sizes.n_groups if axis == "state" else 1)

    def groups_of(self, axis: str) -> int:
        return self.sizes.n_groups

    def axes(self, axis: str) -> list[TensorAxis]:
        self.check_axis(axis)
        if axis == "state":
            return [TensorAxis("A_log", 2), *self.state_rows]
        ranges = [
            TensorAxis("in_proj.weight", 0, block=2),
            TensorAxis("in_proj.bias", 0, block=2),
            TensorAxis("conv1d.weight", 0),
            TensorAxis("conv1d.bias", 0),
            TensorAxis("x_proj_weight", 2),
            TensorAxis("dt_proj_weight", 1),
            TensorAxis("dt_proj_bias", 1),
            TensorAxis("A_log", 1),
            TensorAxis("D", 1),
            TensorAxis("out_proj.weight", 1),
        ]
        return [r for r in ranges if get_tensor(self.mixer, r.tensor) is not None]

    @property
    def state_rows(self) -> tuple[TensorAxis, TensorAxis]:
        R, N = self.sizes.time_step_rank, self.sizes.state_size
        B, C = (TensorAxis("x_proj_weight", 1, r, period=N, gap=R + N) for r in (R, R + N))
        return B, C

    @property
    def mixes_C(self) -> bool:
        return False

    @property
    def between_C(self) -> str:
        return "each head has rows of C of its own"

    def set_size(self, axis: str, size: int) -> dict[str, Any]:
        # asked first: a refusal leaves the module as it was
        fields = self.size_fields(axis, size)
        mixer = self.mixer
        if axis == "state":
            mixer.ssm_state_size = size
            return fields
        mixer.intermediate_size = size
        mixer.mamba_head_dim = size // self.sizes.n_groups
        mixer.in_proj.out_features = 2 * size
        mixer.conv1d.in_channels = mixer.conv1d.out_channels = mixer.conv1d.groups = size
        mixer.out_proj.in_features = size
        return fields

    def scale_state(self, factor: float) -> None:
        R, N = self.sizes.time_step_rank, self.sizes.state_size
        self.mixer.x_proj_weight[:, R + N :].mul_(factor)

    def config_sizes(self) -> dict[str, int]:
        return {**super().config_sizes(), "n_mamba_heads": self.sizes.n_groups}

    def channel_fields(self, channels: int) -> dict[str, Any]:
        hidden_size, heads = self.sizes.hidden_size, self.sizes.n_groups
        if channels % hidden_size or channels % heads:
            raise SparseSSMError(
                f"{self.name}: the loader of zamba makes mamba_expand * hidden_size channels with "
                f"a whole mamba_expand, and {heads} equal heads of them; {channels} is no "
                f"multiple of {hidden_size} or of {heads}"
            )
        return {"mamba_expand": channels // hidden_size}
