"""The quantities of the selective recurrence, by the field's names.

Shapes: b batch, L sequence length, D channels (``intermediate_size``), N state size,
R rank of dt (``time_step_rank``), K width of the convolution; in the Mamba-2 layout also
H heads of P channels (``head_dim``) and G groups of heads that share B and C.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

from torch import Tensor, nn


@dataclass
class MixerQuantities:
    """The quantities of the selective recurrence (Mamba, arXiv 2312.00752, Algorithm 2).

    h_t = exp(dt_t A) h_{t-1} + dt_t B_t u_t, elementwise over (D, N)
    y_t = sum_n C_{t,n} h_{t,:,n} + D u_t

    All tensors but ``inputs`` are float32; where kernels read any type, as on a GPU without
    gradients, u, B, C and z have the model's dtype. Padded positions have u = 0.

    :param u: (b, L, D) scan input, after conv1d and activation
    :param dt: (b, L, D) step size, after bias and softplus, > 0
    :param A: (D, N) continuous-time transition, < 0
    :param B: (b, L, N) input projection, after the family's norm if it has one
    :param C: (b, L, N) output projection, likewise
    :param D: (D,) skip connection
    :param z: (b, L, D) gate before its activation
    :param mask: (b, L) bool, False at padding; None where nothing is padded
    :param inputs: per projection, the tensor its weight multiplies, in the model's dtype:
        in_proj (b, L, hidden_size), conv1d (b, L, D), x_proj (b, L, D), dt_proj (b, L, R)
    """

    u: Tensor
    dt: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    D: Tensor
    z: Tensor
    mask: Tensor | None = None
    inputs: dict[str, Tensor] = field(default_factory=dict)

    @property
    def gate(self) -> Tensor:
        """(b, L, D) float32 silu(z), the factor between the scan output y and out_proj."""
        return nn.functional.silu(self.z.float())


@dataclass
class HeadQuantities(MixerQuantities):
    """The same for the Mamba-2 layout (arXiv 2405.21060): one transition a head.

    h_t = exp(dt_t A) h_{t-1} + dt_t u_t B_t^T, (P, N) for each head, dt and A its scalars.

    :param dt: (b, L, H)
    :param A: (H,)
    :param B: (b, L, G, N); head i reads group i // (H / G)
    :param C: (b, L, G, N)
    :param D: (H,)
    :param inputs: in_proj (b, L, hidden_size), conv1d (b, L, D + 2 G N)
    """


@dataclass
class GroupedQuantities(MixerQuantities):
    """The same where groups of channels have a B and a C each, as in Zamba.

    The D channels are those of the first group, then those of the second, and so on.

    :param B: (b, L, G, N)
    :param C: (b, L, G, N)
    :param inputs: in_proj (b, L, hidden_size), conv1d (b, L, D), x_proj (b, L, G, D / G),
        dt_proj (b, L, G, R)
    """

    @property
    def n_groups(self) -> int:
        """G."""
        return self.B.shape[2]

    def groups(self) -> Iterator[tuple[slice, MixerQuantities]]:
        """The channels of each group, and its recurrence alone."""
        size = len(self.A) // self.n_groups
        for g in range(self.n_groups):
            own = slice(g * size, (g + 1) * size)
            u, dt, z = (x[..., own] for x in (self.u, self.dt, self.z))
            B, C = self.B[:, :, g], self.C[:, :, g]
            yield own, MixerQuantities(u, dt, self.A[own], B, C, self.D[own], z, self.mask)
