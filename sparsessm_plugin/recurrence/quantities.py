"""The quantities of the recurrences, by the field's names: the selective one and the delta rule.

Shapes: b batch, L sequence length, D channels (``intermediate_size``), N state size,
R rank of dt (``time_step_rank``), K width of the convolution; in the Mamba-2 layout also
H heads of P channels (``head_dim``) and G groups of heads that share B and C.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

NORM_EPSILON = 1e-6  # beside the square of a query's or key's norm


@dataclass
class Quantities:
    """What every recurrence has beside its own quantities.

    :param z: (b, L, D) gate before its activation
    :param mask: (b, L) bool, False at padding; None where nothing is padded
    :param inputs: per projection, the tensor its weight multiplies, in the model's dtype
    """

    z: Tensor = field(kw_only=True)
    mask: Tensor | None = field(default=None, kw_only=True)
    inputs: dict[str, Tensor] = field(default_factory=dict, kw_only=True)

    @property
    def gate(self) -> Tensor:
        """(b, L, D) float32 silu(z), the factor between the scan output y and out_proj."""
        return nn.functional.silu(self.z.float())


@dataclass
class MixerQuantities(Quantities):
    """The quantities of the selective recurrence (Mamba, arXiv 2312.00752, Algorithm 2).

    h_t = exp(dt_t A) h_{t-1} + dt_t B_t u_t, elementwise over (D, N)
    y_t = sum_n C_{t,n} h_{t,:,n} + D u_t

    All tensors but ``inputs`` are float32; where kernels read any type, as on a GPU, u, B, C and z
    may have the dtype of what projections make. Padded positions have u = 0.

    :param u: (b, L, D) scan input, after conv1d and activation
    :param dt: (b, L, D) step size, after bias and softplus, > 0
    :param A: (D, N) continuous-time transition, < 0
    :param B: (b, L, N) input projection, after the family's norm if it has one
    :param C: (b, L, N) output projection, likewise
    :param D: (D,) skip connection
    :param inputs: in_proj (b, L, hidden_size), conv1d (b, L, D), x_proj (b, L, D),
        dt_proj (b, L, R)
    """

    u: Tensor
    dt: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    D: Tensor


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
            A, D = self.A[own], self.D[own]
            yield own, MixerQuantities(u, dt, A, B, C, D, z=z, mask=self.mask)


@dataclass
class DeltaQuantities(Quantities):
    """The quantities of the gated delta rule (arXiv 2412.06464), as its kernels name them.

    With dk entries of a key and dv of a value, key and query divided by their Euclidean norms,

    S_t = exp(g_t) S_{t-1} + beta_t k_t (v_t - exp(g_t) S_{t-1}^T k_t)^T, (dk, dv) for each head
    o_t = S_t^T q_t / sqrt(dk)

    Value head i reads key head i // (H / G). D is H dv.

    :param q: (b, L, G, dk) query, after conv1d and SiLU, before it is normalised
    :param k: (b, L, G, dk) key, likewise
    :param v: (b, L, H, dv) value, after conv1d and SiLU
    :param beta: (b, L, H) how much of a key's value is written anew, from 0 to 1, or to 2
    :param g: (b, L, H) float32 logarithm of the decay, <= 0
    """

    q: Tensor
    k: Tensor
    v: Tensor
    beta: Tensor
    g: Tensor

    @property
    def heads_per_key(self) -> int:
        """H / G, the value heads that share a key head."""
        return self.v.shape[2] // self.k.shape[2]

    @property
    def normalized_q(self) -> Tensor:
        """(b, L, G, dk) float32 query as the recurrence reads it, divided by sqrt(dk), too."""
        return normalized(self.q) * self.q.shape[-1] ** -0.5

    @property
    def normalized_k(self) -> Tensor:
        """(b, L, G, dk) float32 key as the recurrence reads it."""
        return normalized(self.k)

    def rows(self, which: slice) -> "DeltaQuantities":
        """Some sequences of the batch, without ``inputs``."""
        own = {name: getattr(self, name)[which] for name in ("q", "k", "v", "beta", "g", "z")}
        return DeltaQuantities(**own, mask=None if self.mask is None else self.mask[which])


def normalized(x: Tensor) -> Tensor:
    """x (..., dk) over its Euclidean norm, in float32, as the kernels of the delta rule do it."""
    x = x.float()
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + NORM_EPSILON)
