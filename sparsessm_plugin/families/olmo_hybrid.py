"""OLMo-Hybrid: gated delta nets with a projection for each quantity, among attention layers."""

from typing import ClassVar

import torch
from torch import Tensor

from sparsessm_plugin.backends.products import project
from sparsessm_plugin.families.base import TensorAxis
from sparsessm_plugin.families.delta_net import DeltaNetAdapter, EntryRows
from sparsessm_plugin.families.registry import register_adapter


@register_adapter
class OlmoHybridAdapter(DeltaNetAdapter):
    """q_proj, k_proj, v_proj, a_proj, b_proj and the gate's g_proj; beta may reach 2."""

    family = "olmo_hybrid"
    mixer_class = "OlmoHybridGatedDeltaNet"
    entry_makes: ClassVar[dict[str, tuple[str, ...]]] = {
        "q_proj": ("q",),
        "k_proj": ("k",),
        "v_proj": ("v",),
        "a_proj": ("g",),
        "b_proj": ("beta",),
        "g_proj": ("z",),
    }
    entry_kinds = tuple(entry_makes)
    projections = (*entry_kinds, "conv1d", "o_proj")
    exit_kind = "o_proj"
    norm_name = "o_norm"

    @property
    def beta_scale(self) -> float:
        return 2.0 if self.mixer.allow_neg_eigval else 1.0

    def entry_rows(self, hidden_states: Tensor) -> EntryRows:
        mixer = self.mixer
        q, k, v = (
            project(mixer.get_submodule(f"{name}_proj"), hidden_states) for name in ("q", "k", "v")
        )
        return EntryRows(
            qkv=torch.cat([q, k, v], dim=-1),
            z=project(mixer.g_proj, hidden_states),
            b=mixer.b_proj(hidden_states),
            a=mixer.a_proj(hidden_states),
        )

    def entry_axes(self, axis: str) -> list[TensorAxis]:
        sizes = self.sizes
        if axis == "key_dims":
            return [TensorAxis(f"{name}_proj.weight", 0) for name in ("q", "k")]
        dv = sizes.head_v_dim
        shape: dict[str, int] = {"block": dv}
        if axis == "value_dims":
            shape = {"repeat": sizes.num_v_heads, "stride": dv}
        ranges = [TensorAxis(f"{name}_proj.weight", 0, 0, **shape) for name in ("v", "g")]
        if axis == "value_heads":
            ranges += [TensorAxis(f"{name}_proj.weight", 0) for name in ("a", "b")]
        return ranges

    def entry_sizes(self) -> dict[str, int]:
        mixer = self.mixer
        return {
            **dict.fromkeys(("q_proj", "k_proj"), mixer.key_dim),
            **dict.fromkeys(("v_proj", "g_proj"), mixer.value_dim),
            **dict.fromkeys(("a_proj", "b_proj"), mixer.num_v_heads),
        }
