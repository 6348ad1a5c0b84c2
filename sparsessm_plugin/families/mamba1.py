"""The layout that Mamba, FalconMamba and Jamba share.

x_proj reads dt, B and C from u; A_log is (D, N); out_proj follows the gate directly.
"""

from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from sparsessm_plugin.backends.choice import kernels_for
from sparsessm_plugin.backends.products import fast_products, project
from sparsessm_plugin.families.base import (
    MixerAdapter,
    MixerSizes,
    TensorAxis,
    get_tensor,
    linear_shape,
)
from sparsessm_plugin.recurrence.quantities import MixerQuantities


class Mamba1Adapter(MixerAdapter):
    """Mixers with a (D, N) A_log and dt, B, C from x_proj; one subclass a family."""

    projections = ("in_proj", "conv1d", "x_proj", "dt_proj", "out_proj")
    axis_names = ("state", "channels")
    # config field that carries the size
    state_size_field: ClassVar[str] = "state_size"

    @property
    def sizes(self) -> MixerSizes:
        mixer = self.mixer
        intermediate_size, state_size = mixer.A_log.shape
        return MixerSizes(
            hidden_size=linear_shape(mixer.out_proj)[0],
            intermediate_size=intermediate_size,
            state_size=state_size,
            conv_kernel_size=mixer.conv1d.weight.shape[-1],
            num_heads=intermediate_size,
            head_dim=1,
            n_groups=1,
            time_step_rank=mixer.dt_proj.weight.shape[1],
        )

    @property
    def out_norm(self) -> Tensor:
        return torch.linalg.vector_norm(self.mixer.out_proj.weight.detach().float(), dim=0)

    def normalize(self, dt: Tensor, B: Tensor, C: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The family's norms on x_proj's three outputs; plain Mamba has none.

        :param dt: (b, L, R) low-rank step size
        :param B: (b, L, N)
        :param C: (b, L, N)
        """
        return dt, B, C

    def quantities(
        self, hidden_states: Tensor, attention_mask: Tensor | None = None
    ) -> MixerQuantities:
        mixer, sizes = self.mixer, self.sizes
        in_input, mask = self.enter(hidden_states, attention_mask)
        conv_input, z = project(mixer.in_proj, in_input).chunk(2, dim=-1)  # (b, L, D) each
        x_input = u = self.convolved(conv_input, mask)
        R, N = sizes.time_step_rank, sizes.state_size
        low_rank_dt, B, C = self.normalize(*project(mixer.x_proj, u).split([R, N, N], dim=-1))
        with fast_products(low_rank_dt.device):
            dt = F.linear(low_rank_dt, mixer.dt_proj.weight)  # (b, L, D)
        kernels = kernels_for(dt)
        if kernels is not None:
            dt = kernels.softplus(dt, mixer.dt_proj.bias)
        else:
            dt = dt.float()
            if mixer.dt_proj.bias is not None:
                dt = dt + mixer.dt_proj.bias.float()
            dt = F.softplus(dt)
            u, B, C, z = (x.float() for x in (u, B, C, z))
        return MixerQuantities(
            u=u,
            dt=dt,
            A=-torch.exp(mixer.A_log.float()),
            B=B,
            C=C,
            D=mixer.D.float(),
            z=z,
            mask=mask,
            inputs={
                "in_proj": in_input,
                "conv1d": conv_input,
                "x_proj": x_input,
                "dt_proj": low_rank_dt,
            },
        )

    def out_gain(self, quantities: MixerQuantities, y: Tensor) -> Tensor:
        return quantities.gate

    def axis_length(self, axis: str) -> int:
        self.check_axis(axis)
        return self.sizes.state_size if axis == "state" else self.sizes.intermediate_size

    def axes(self, axis: str) -> list[TensorAxis]:
        self.check_axis(axis)
        sizes = self.sizes
        R, N, D = sizes.time_step_rank, sizes.state_size, sizes.intermediate_size
        if axis == "state":
            ranges = [
                TensorAxis("A_log", 1),
                TensorAxis("x_proj.weight", 0, R),
                TensorAxis("x_proj.weight", 0, R + N),
                TensorAxis("b_layernorm.weight", 0),
                TensorAxis("c_layernorm.weight", 0),
            ]
        else:
            ranges = [
                TensorAxis("in_proj.weight", 0),
                TensorAxis("in_proj.weight", 0, D),
                TensorAxis("in_proj.bias", 0),
                TensorAxis("in_proj.bias", 0, D),
                TensorAxis("conv1d.weight", 0),
                TensorAxis("conv1d.bias", 0),
                TensorAxis("x_proj.weight", 1),
                TensorAxis("dt_proj.weight", 0),
                TensorAxis("dt_proj.bias", 0),
                TensorAxis("A_log", 0),
                TensorAxis("D", 0),
                TensorAxis("out_proj.weight", 1),
            ]
        return [r for r in ranges if get_tensor(self.mixer, r.tensor) is not None]

    def size_fields(self, axis: str, size: int) -> dict[str, Any]:
        self.check_axis(axis)
        if axis == "state":
            return {self.state_size_field: size}
        return self.channel_fields(size)

    def set_size(self, axis: str, size: int) -> dict[str, Any]:
        # asked first: a refusal leaves the module as it was
        fields = self.size_fields(axis, size)
        mixer, R = self.mixer, self.sizes.time_step_rank
        if axis == "state":
            mixer.ssm_state_size = size
            mixer.x_proj.out_features = R + 2 * size
            return fields
        mixer.intermediate_size = size
        mixer.in_proj.out_features = 2 * size
        mixer.conv1d.in_channels = mixer.conv1d.out_channels = mixer.conv1d.groups = size
        mixer.x_proj.in_features = mixer.out_proj.in_features = size
        mixer.dt_proj.out_features = size
        return fields

    @property
    def state_rows(self) -> tuple[TensorAxis, TensorAxis]:
        R, N = self.sizes.time_step_rank, self.sizes.state_size
        return TensorAxis("x_proj.weight", 0, R), TensorAxis("x_proj.weight", 0, R + N)

    @property
    def mixes_C(self) -> bool:
        return True

    def scale_state(self, factor: float) -> None:
        R, N = self.sizes.time_step_rank, self.sizes.state_size
        self.mixer.x_proj.weight[R + N :].mul_(factor)

    def config_sizes(self) -> dict[str, int]:
        return {self.state_size_field: self.sizes.state_size}

    def channel_fields(self, channels: int) -> dict[str, Any]:
        """The config fields from which the family's loader makes this many channels."""
        raise NotImplementedError


class NormedMamba1Adapter(Mamba1Adapter):
    """Mamba-1 mixers that normalise dt, B and C after x_proj."""

    @property
    def mixes_C(self) -> bool:
        return False

    @property
    def norms_state(self) -> bool:
        return True

    def normalize(self, dt: Tensor, B: Tensor, C: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        mixer = self.mixer
        return mixer.dt_layernorm(dt), mixer.b_layernorm(B), mixer.c_layernorm(C)
