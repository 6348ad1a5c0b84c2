"""The mixers' forward passes over views of their own tensors, for tracing.

transformers' forward passes cannot be traced: they read dt_proj and conv1d by weight, and
split a projection's output where torch_pruning then loses the offset. A surrogate computes
the same from the same tensors, one view for every quantity. It names the tensors that it
reads, and nothing else of transformers.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparsessm_plugin.dependency_graph.views import (
    Boundary,
    Convolution,
    Dims,
    HeadProjection,
    Layout,
    Parameter,
    Projection,
    Scale,
    View,
)
from sparsessm_plugin.families import MixerAdapter
from sparsessm_plugin.families.mamba2 import Mamba2Adapter

# long enough for the recurrence and the convolution to show
TRACE_LENGTH = 4
# more than any of the forward passes below sets
MOST_BOUNDARIES = 32


@dataclass(frozen=True)
class Quantity:
    """A tensor (b, *sizes, L) and the named dimensions that it has; the others are 1."""

    data: Tensor
    dims: frozenset[str]


class Surrogate(nn.Module):
    """Arithmetic on named dimensions that sets a boundary where the axis begins or ends."""

    axis_dims: ClassVar[dict[str, Dims]]
    # the view that a group starts from; any that carries the axis would do
    roots: ClassVar[dict[str, str]]

    def __init__(self, adapter: MixerAdapter, axis: str):
        super().__init__()
        self.adapter = adapter
        self.layout = Layout(adapter, axis, self.axis_dims[axis], self.sizes)
        self.views = nn.ModuleDict(self.make_views(self.layout))
        # made in advance, as torch_pruning sees only modules that were there before the trace
        self.boundaries = nn.ModuleList(Boundary() for _ in range(MOST_BOUNDARIES))
        self._boundaries_used = 0
        self._nothing = torch.zeros(())

    @staticmethod
    def sizes(adapter: MixerAdapter) -> dict[str, int]:
        """The named dimensions of the layout and their sizes, slowest first."""
        raise NotImplementedError

    def make_views(self, layout: Layout) -> dict[str, View]:
        """The views of the mixer by name."""
        raise NotImplementedError

    def compute(self, hidden_states: Quantity) -> Quantity:
        """The mixer's output from its input."""
        raise NotImplementedError

    @property
    def root(self) -> View:
        """The view that a group of this axis starts from."""
        view = self.views[self.roots[self.layout.axis]]
        assert isinstance(view, View)
        return view

    def forward(self, hidden_states: Tensor) -> Tensor:
        """What the mixer makes of its input where nothing is padded.

        :param hidden_states: (b, L, hidden_size)
        :return: (b, L, hidden_size) in the same dtype
        """
        data = hidden_states.transpose(1, 2)
        data = data.reshape(len(data), *self.layout.shape(("m",)), data.shape[-1])
        return self.run(data).flatten(1, -2).transpose(1, 2)

    def trace(self) -> Tensor:
        """The output for a short example without values, with its place in the autograd graph."""
        shape = (1, *self.layout.shape(("m",)), TRACE_LENGTH)
        return self.run(torch.zeros(shape, device="meta", requires_grad=True))

    def run(self, data: Tensor) -> Tensor:
        """The output for an input, both (b, *sizes, L)."""
        self._boundaries_used = 0
        # the one input of views that need none: it gives them a place in the autograd graph
        self._nothing = torch.zeros(
            (), device=data.device, dtype=data.dtype, requires_grad=torch.is_grad_enabled()
        )
        return self.compute(Quantity(data, frozenset(("m",)))).data

    def view(self, name: str, x: Quantity | None = None) -> Quantity:
        """Send a quantity through a view, or read one that needs no input."""
        view = self.views[name]
        assert isinstance(view, View)
        data = self._nothing if x is None else x.data
        return Quantity(view(data), frozenset(view.dims))

    def boundary(self, x: Quantity) -> Quantity:
        if self._boundaries_used == MOST_BOUNDARIES and not x.data.is_meta:
            return x  # a longer text than the trace's, of which values are asked for
        boundary = self.boundaries[self._boundaries_used]
        self._boundaries_used += 1
        return Quantity(boundary(x.data), x.dims)

    def meet(self, *quantities: Quantity) -> list[Quantity]:
        """Set boundaries so that quantities with and without the axis can be combined."""
        carries = [self.layout.carries_axis(q.dims) for q in quantities]
        if not any(carries):
            return list(quantities)
        return [q if c else self.boundary(q) for q, c in zip(quantities, carries, strict=True)]

    def multiply(self, first: Quantity, second: Quantity) -> Quantity:
        a, b = self.meet(first, second)
        return Quantity(a.data * b.data, a.dims | b.dims)

    def add(self, first: Quantity, second: Quantity) -> Quantity:
        a, b = self.meet(first, second)
        return Quantity(a.data + b.data, a.dims | b.dims)

    def apply_to(self, x: Quantity, function: Callable[[Tensor], Tensor]) -> Quantity:
        """An elementwise function of a quantity."""
        return Quantity(function(x.data), x.dims)

    def sum_over(self, x: Quantity, dims: Iterable[str]) -> Quantity:
        order = list(self.layout.sizes())
        dims = [dim for dim in dims if dim in x.dims]
        data = x.data.sum([1 + order.index(dim) for dim in dims], keepdim=True)
        result = Quantity(data, x.dims - set(dims))
        ends = self.layout.carries_axis(x.dims) and not self.layout.carries_axis(result.dims)
        return self.boundary(result) if ends else result

    def rms_norm(self, x: Quantity, over: Dims, epsilon: float) -> Quantity:
        """x divided by its root mean square over some dimensions; the weight is a view."""
        count = self.layout.size(over)
        square = self.sum_over(self.apply_to(x, torch.square), over)
        return self.multiply(x, self.apply_to(square, lambda s: torch.rsqrt(s / count + epsilon)))

    def scan(self, dt: Quantity, A: Quantity, B: Quantity, C: Quantity, u: Quantity) -> Quantity:
        """y_t = sum_n C_t h_t with h_t = exp(dt_t A) h_{t-1} + dt_t B_t u_t."""
        decay = self.apply_to(self.multiply(dt, A), torch.exp)
        decay, added = self.meet(decay, self.multiply(self.multiply(dt, u), B))
        h = added.data.select(-1, 0)
        states = [h]
        for t in range(1, added.data.shape[-1]):
            h = decay.data.select(-1, t) * h + added.data.select(-1, t)
            states.append(h)
        states_of_time = Quantity(torch.stack(states, -1), added.dims)
        return self.sum_over(self.multiply(states_of_time, C), ("n",))


class Mamba1Surrogate(Surrogate):
    """Mamba, FalconMamba and Jamba: dimensions m (hidden_size), d (D), r (rank of dt), n (N)."""

    axis_dims: ClassVar[dict[str, Dims]] = {"state": ("n",), "channels": ("d",)}
    roots: ClassVar[dict[str, str]] = {"state": "x_proj_B", "channels": "in_proj_x"}

    @staticmethod
    def sizes(adapter: MixerAdapter) -> dict[str, int]:
        sizes = adapter.sizes
        return {
            "m": sizes.hidden_size,
            "d": sizes.intermediate_size,
            "r": sizes.time_step_rank,
            "n": sizes.state_size,
        }

    def make_views(self, layout: Layout) -> dict[str, View]:
        m, d, r, n = ("m",), ("d",), ("r",), ("n",)
        views: dict[str, View] = {
            "in_proj_x": Projection(layout, "in_proj", d, m),
            "in_proj_z": Projection(layout, "in_proj", d, m, before=(d,)),
            "conv1d": Convolution(layout, "conv1d", d),
            "x_proj_dt": Projection(layout, "x_proj", r, d),
            "x_proj_B": Projection(layout, "x_proj", n, d, before=(r,)),
            "x_proj_C": Projection(layout, "x_proj", n, d, before=(r, n)),
            "dt_proj": Projection(layout, "dt_proj", d, r),
            "A_log": Parameter(layout, "A_log", d, n),
            "D": Parameter(layout, "D", d),
            "out_proj": Projection(layout, "out_proj", m, d),
        }
        for norm, dims in (("dt_layernorm", r), ("b_layernorm", n), ("c_layernorm", n)):
            weight = layout.tensor(f"{norm}.weight")
            # FalconMamba's norm of dt carries D ones that it never uses
            if weight is not None and len(weight) == layout.size(dims):
                views[norm] = Scale(layout, f"{norm}.weight", dims)
        return views

    def normalize(self, name: str, x: Quantity) -> Quantity:
        """The family's norm of that name, nothing where it has none."""
        norm = getattr(self.adapter.mixer, name, None)
        if norm is None:
            return x
        epsilon = norm.eps if hasattr(norm, "eps") else norm.variance_epsilon
        x = self.rms_norm(x, tuple(x.dims), epsilon)
        return self.view(name, x) if name in self.views else x

    def enter(self, hidden_states: Quantity) -> tuple[Quantity, Quantity]:
        """What in_proj makes: the input of the convolution, and the gate."""
        return self.view("in_proj_x", hidden_states), self.view("in_proj_z", hidden_states)

    def compute(self, hidden_states: Quantity) -> Quantity:
        x, z = self.enter(hidden_states)
        u = self.apply_to(self.view("conv1d", x), self.adapter.mixer.act)
        low_rank_dt = self.normalize("dt_layernorm", self.view("x_proj_dt", u))
        B = self.normalize("b_layernorm", self.view("x_proj_B", u))
        C = self.normalize("c_layernorm", self.view("x_proj_C", u))
        dt = self.apply_to(self.view("dt_proj", low_rank_dt), F.softplus)
        A = self.apply_to(self.view("A_log"), lambda a: -torch.exp(a))
        y = self.add(self.scan(dt, A, B, C, u), self.multiply(u, self.view("D")))
        return self.view("out_proj", self.multiply(y, self.apply_to(z, F.silu)))


class ZambaSurrogate(Mamba1Surrogate):
    """Zamba: m (hidden_size), g (heads), p (channels of a head), s (x and z), r, n (N)."""

    axis_dims: ClassVar[dict[str, Dims]] = {"state": ("g", "n"), "channels": ("g", "p")}
    roots: ClassVar[dict[str, str]] = {"state": "x_proj_B", "channels": "in_proj"}

    @staticmethod
    def sizes(adapter: MixerAdapter) -> dict[str, int]:
        sizes = adapter.sizes
        return {
            "m": sizes.hidden_size,
            "g": sizes.n_groups,
            "p": sizes.intermediate_size // sizes.n_groups,
            "s": 2,
            "r": sizes.time_step_rank,
            "n": sizes.state_size,
        }

    def make_views(self, layout: Layout) -> dict[str, View]:
        m, d, r, n = ("m",), ("g", "p"), ("g", "r"), ("g", "n")
        before_B, before_C = (("r",),), (("r",), ("n",))
        return {
            "in_proj": Projection(layout, "in_proj", ("g", "p", "s"), m),
            "conv1d": Convolution(layout, "conv1d", d),
            "x_proj_dt": HeadProjection(layout, "x_proj_weight", r, d),
            "x_proj_B": HeadProjection(layout, "x_proj_weight", n, d, before=before_B),
            "x_proj_C": HeadProjection(layout, "x_proj_weight", n, d, before=before_C),
            "dt_proj": HeadProjection(layout, "dt_proj_weight", d, r, bias="dt_proj_bias"),
            "A_log": Parameter(layout, "A_log", d, n),
            "D": Parameter(layout, "D", d),
            "out_proj": Projection(layout, "out_proj", m, d),
        }

    def enter(self, hidden_states: Quantity) -> tuple[Quantity, Quantity]:
        both = self.view("in_proj", hidden_states)  # row 2 i of in_proj makes x, row 2 i + 1 z
        at = 1 + list(self.layout.sizes()).index("s")
        x, z = (both.data.select(at, k).unsqueeze(at) for k in (0, 1))
        return Quantity(x, both.dims - {"s"}), Quantity(z, both.dims - {"s"})


class Mamba2Surrogate(Surrogate):
    """Mamba-2 and its hybrids: dimensions m (hidden_size), g (G), h (H / G), p (P), n (N)."""

    axis_dims: ClassVar[dict[str, Dims]] = {
        "state": ("g", "n"),
        "heads": ("g", "h"),
        "head_dim": ("p",),
    }
    roots: ClassVar[dict[str, str]] = {
        "state": "in_proj_B",
        "heads": "in_proj_x",
        "head_dim": "in_proj_x",
    }

    @staticmethod
    def sizes(adapter: MixerAdapter) -> dict[str, int]:
        sizes = adapter.sizes
        return {
            "m": sizes.hidden_size,
            "g": sizes.n_groups,
            "h": sizes.num_heads // sizes.n_groups,
            "p": sizes.head_dim,
            "n": sizes.state_size,
        }

    def make_views(self, layout: Layout) -> dict[str, View]:
        channels, heads, states, m = ("g", "h", "p"), ("g", "h"), ("g", "n"), ("m",)
        views: dict[str, View] = {
            "A_log": Parameter(layout, "A_log", heads),
            "D": Parameter(layout, "D", heads),
            "dt_bias": Parameter(layout, "dt_bias", heads),
            "out_proj": Projection(layout, "out_proj", m, channels),
        }
        if layout.has("norm.weight"):
            views["norm"] = Scale(layout, "norm.weight", channels)
        rows = {"z": channels, "x": channels, "B": states, "C": states, "dt": heads}
        before: tuple[Dims, ...] = ()
        for name, dims in rows.items():
            views[f"in_proj_{name}"] = Projection(layout, "in_proj", dims, m, before=before)
            if layout.has("mup_vector"):
                views[f"mup_{name}"] = Scale(layout, "mup_vector", dims, before=before, dim=2)
            if name in ("x", "B", "C"):
                views[f"conv1d_{name}"] = Convolution(layout, "conv1d", dims, before=before[1:])
            before = (*before, dims)
        return views

    def project(self, name: str, hidden_states: Quantity) -> Quantity:
        """What the family makes of some rows of in_proj."""
        x = self.view(f"in_proj_{name}", hidden_states)
        return self.view(f"mup_{name}", x) if f"mup_{name}" in self.views else x

    def convolve(self, name: str, hidden_states: Quantity) -> Quantity:
        x = self.view(f"conv1d_{name}", self.project(name, hidden_states))
        return self.apply_to(x, self.adapter.mixer.act)

    def normalize(self, y: Quantity) -> Quantity:
        """The gated norm without its gate."""
        assert isinstance(self.adapter, Mamba2Adapter)
        over: Dims = ("h", "p") if self.adapter.norm_groups() > 1 else ("g", "h", "p")
        epsilon = self.adapter.mixer.norm.variance_epsilon
        return self.view("norm", self.rms_norm(y, over, epsilon))

    def compute(self, hidden_states: Quantity) -> Quantity:
        adapter = self.adapter
        assert isinstance(adapter, Mamba2Adapter)
        hidden_states = self.apply_to(hidden_states, adapter.in_input)
        z = self.apply_to(self.project("z", hidden_states), F.silu)
        u, B, C = (self.convolve(name, hidden_states) for name in ("x", "B", "C"))
        low, high = adapter.mixer.time_step_limit
        dt = self.add(self.project("dt", hidden_states), self.view("dt_bias"))
        dt = self.apply_to(dt, lambda x: F.softplus(x).clamp(low, high))
        A = self.apply_to(self.view("A_log"), lambda a: -torch.exp(a))
        y = self.add(self.scan(dt, A, B, C, u), self.multiply(u, self.view("D")))
        if "norm" not in self.views:
            return self.view("out_proj", self.multiply(y, z))
        if getattr(adapter.mixer.norm, "norm_before_gate", False):
            return self.view("out_proj", self.multiply(self.normalize(y), z))
        return self.view("out_proj", self.normalize(self.multiply(y, z)))
