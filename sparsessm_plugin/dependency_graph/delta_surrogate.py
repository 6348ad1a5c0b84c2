"""The forward pass of gated delta nets over views of their own tensors, for tracing."""

from typing import ClassVar

import torch
from torch.nn import functional as F

from sparsessm_plugin.dependency_graph.surrogate import Quantity, Surrogate
from sparsessm_plugin.dependency_graph.views import (
    Convolution,
    Dims,
    Layout,
    Parameter,
    Projection,
    View,
)
from sparsessm_plugin.families import MixerAdapter
from sparsessm_plugin.families.delta_net import DeltaNetAdapter
from sparsessm_plugin.recurrence.quantities import NORM_EPSILON

_G: Dims = ("g",)


class DeltaNetSurrogate(Surrogate):
    """Dimensions m (hidden_size), g (key heads), h (value heads of each), p (dv), n (dk)."""

    axis_dims: ClassVar[dict[str, Dims]] = {
        "key_dims": ("g", "n"),
        "value_heads": ("g", "h"),
        "value_dims": ("p",),
    }
    roots: ClassVar[dict[str, str]] = {
        "key_dims": "in_k",
        "value_heads": "in_v",
        "value_dims": "in_v",
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
        adapter = layout.adapter
        assert isinstance(adapter, DeltaNetAdapter)
        keys, heads, values, m = ("g", "n"), ("g", "h"), ("g", "h", "p"), ("m",)
        if layout.has("in_proj_qkvz.weight"):
            views = self._by_key_head(layout)
        elif layout.has("in_proj_qkv.weight"):
            views = {
                "in_q": Projection(layout, "in_proj_qkv", keys, m),
                "in_k": Projection(layout, "in_proj_qkv", keys, m, before=(keys,)),
                "in_v": Projection(layout, "in_proj_qkv", values, m, before=(keys, keys)),
                "in_z": Projection(layout, "in_proj_z", values, m),
                "in_b": Projection(layout, "in_proj_b", heads, m),
                "in_a": Projection(layout, "in_proj_a", heads, m),
            }
        else:
            rows = {"q": keys, "k": keys, "v": values, "g": values, "b": heads, "a": heads}
            views = {
                "in_" + ("z" if name == "g" else name): Projection(layout, f"{name}_proj", dims, m)
                for name, dims in rows.items()
            }
        return {
            **views,
            "conv1d_q": Convolution(layout, "conv1d", keys),
            "conv1d_k": Convolution(layout, "conv1d", keys, before=(keys,)),
            "conv1d_v": Convolution(layout, "conv1d", values, before=(keys, keys)),
            "A_log": Parameter(layout, "A_log", heads),
            "dt_bias": Parameter(layout, "dt_bias", heads),
            "norm": Parameter(layout, f"{adapter.norm_name}.weight", ("p",)),
            "out": Projection(layout, adapter.exit_kind, m, values),
        }

    def _by_key_head(self, layout: Layout) -> dict[str, View]:
        """Views of projections that hold the rows of one key head after those of another."""
        m: Dims = ("m",)
        views: dict[str, View] = {}
        of_module: dict[str, dict[str, Dims]] = {
            "in_proj_qkvz": {"q": ("n",), "k": ("n",), "v": ("h", "p"), "z": ("h", "p")},
            "in_proj_ba": {"b": ("h",), "a": ("h",)},
        }
        for module, parts in of_module.items():
            all_dims = tuple(parts.values())
            for i, (name, dims) in enumerate(parts.items()):
                views[f"in_{name}"] = Projection(
                    layout, module, (*_G, *dims), m, all_dims[:i], all_dims[i + 1 :]
                )
        return views

    def convolve(self, name: str, hidden_states: Quantity) -> Quantity:
        assert isinstance(self.adapter, DeltaNetAdapter)
        x = self.view(f"conv1d_{name}", self.view(f"in_{name}", hidden_states))
        return self.apply_to(x, self.adapter.activate)

    def normalize(self, x: Quantity, scale: float = 1.0) -> Quantity:
        """A key or a query over its norm."""
        square = self.sum_over(self.apply_to(x, torch.square), ("n",))
        inverse = self.apply_to(square, lambda s: torch.rsqrt(s + NORM_EPSILON) * scale)
        return self.multiply(x, inverse)

    def compute(self, hidden_states: Quantity) -> Quantity:
        adapter = self.adapter
        assert isinstance(adapter, DeltaNetAdapter)
        q, k, v = (self.convolve(name, hidden_states) for name in ("q", "k", "v"))
        q = self.normalize(q, adapter.sizes.head_k_dim**-0.5)
        k = self.normalize(k)
        beta = self.apply_to(
            self.view("in_b", hidden_states), lambda b: b.sigmoid() * adapter.beta_scale
        )
        step = self.add(self.view("in_a", hidden_states), self.view("dt_bias"))
        rate = self.apply_to(self.view("A_log"), lambda a: -torch.exp(a))
        decay = self.multiply(self.apply_to(step, F.softplus), rate)
        y = self.delta_rule(q, k, v, beta, self.apply_to(decay, torch.exp))
        y = self.multiply(
            self.rms_norm(y, ("p",), adapter.norm.variance_epsilon), self.view("norm")
        )
        gate = self.apply_to(self.view("in_z", hidden_states), F.silu)
        return self.view("out", self.multiply(y, gate))

    def delta_rule(
        self, q: Quantity, k: Quantity, v: Quantity, beta: Quantity, decay: Quantity
    ) -> Quantity:
        """o_t = S_t^T q_t with S_t = a_t S_{t-1} + beta_t k_t (v_t - a_t S_{t-1}^T k_t)^T."""

        def at(x: Quantity, t: int) -> Quantity:
            return Quantity(x.data.select(-1, t), x.dims)

        outputs: list[Quantity] = []
        S: Quantity | None = None
        for t in range(v.data.shape[-1]):
            change, k_t = at(v, t), at(k, t)
            if S is not None:
                S = self.multiply(S, at(decay, t))
                expected = self.sum_over(self.multiply(S, k_t), ("n",))
                minus = self.apply_to(expected, torch.neg)
                change = self.add(change, minus)
            written = self.multiply(k_t, self.multiply(change, at(beta, t)))
            S = written if S is None else self.add(S, written)
            outputs.append(self.sum_over(self.multiply(S, at(q, t)), ("n",)))
        return Quantity(torch.stack([o.data for o in outputs], -1), outputs[0].dims)
