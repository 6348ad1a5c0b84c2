"""Qwen3-Next: gated delta nets whose projections hold the rows of one key head after the other."""

from typing import ClassVar

import torch
from torch import Tensor

from sparsessm_plugin.backends.products import project
from sparsessm_plugin.families.base import TensorAxis
from sparsessm_plugin.families.delta_net import DeltaNetAdapter, EntryRows
from sparsessm_plugin.families.registry import register_adapter


@register_adapter
class Qwen3NextAdapter(DeltaNetAdapter):
    """Of each key head in_proj_qkvz makes q, k, and v and z of its value heads; in_proj_ba b, a."""

    family = "qwen3_next"
    mixer_class = "Qwen3NextGatedDeltaNet"
    entry_makes: ClassVar[dict[str, tuple[str, ...]]] = {
        "in_proj_qkvz": ("q", "k", "v", "z"),
        "in_proj_ba": ("beta", "g"),
    }
    entry_kinds = tuple(entry_makes)
    projections = (*entry_kinds, "conv1d", "out_proj")

    def entry_rows(self, hidden_states: Tensor) -> EntryRows:
        mixer, sizes = self.mixer, self.sizes
        G, dk = sizes.num_k_heads, sizes.head_k_dim
        values = sizes.intermediate_size // G  # of the value heads of a key head
        by_head = project(mixer.in_proj_qkvz, hidden_states).unflatten(-1, (G, -1))
        q, k, v, z = (x.flatten(2) for x in by_head.split([dk, dk, values, values], dim=-1))
        b, a = (
            x.flatten(2)
            for x in mixer.in_proj_ba(hidden_states).unflatten(-1, (G, 2, -1)).unbind(-2)
        )
        return EntryRows(qkv=torch.cat([q, k, v], dim=-1), z=z, b=b, a=a)

    def entry_axes(self, axis: str) -> list[TensorAxis]:
        sizes = self.sizes
        G, dk, dv = sizes.num_k_heads, sizes.head_k_dim, sizes.head_v_dim
        heads = sizes.num_v_heads // G
        values = heads * dv
        rows = 2 * dk + 2 * values  # of a key head
        name = "in_proj_qkvz.weight"
        if axis == "key_dims":
            return [TensorAxis(name, 0, k * dk, period=dk, gap=rows - dk) for k in (0, 1)]
        starts = (2 * dk, 2 * dk + values)  # of v and of z
        if axis == "value_dims":
            return [
                TensorAxis(name, 0, g * rows + start, repeat=heads, stride=dv)
                for g in range(G)
                for start in starts
            ]
        ranges = [
            TensorAxis(name, 0, start, block=dv, period=heads, gap=rows - values)
            for start in starts
        ]
        ranges += [
            TensorAxis("in_proj_ba.weight", 0, k * heads, period=heads, gap=heads) for k in (0, 1)
        ]
        return ranges

    def entry_sizes(self) -> dict[str, int]:
        mixer = self.mixer
        return {
            "in_proj_qkvz": mixer.conv_dim + mixer.value_dim,
            "in_proj_ba": 2 * mixer.num_v_heads,
        }
