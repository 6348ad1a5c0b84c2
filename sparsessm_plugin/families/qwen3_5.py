"""Qwen3.5: gated delta nets among gated attention layers, with an MLP or experts behind each."""

from typing import ClassVar

from torch import Tensor

from sparsessm_plugin.backends.products import project
from sparsessm_plugin.families.base import TensorAxis
from sparsessm_plugin.families.delta_net import DeltaNetAdapter, EntryRows
from sparsessm_plugin.families.registry import register_adapter


@register_adapter
class Qwen3_5Adapter(DeltaNetAdapter):
    """One projection for q, k and v, and one each for the gate, beta and the decay."""

    family = "qwen3_5"
    mixer_class = "Qwen3_5GatedDeltaNet"
    entry_makes: ClassVar[dict[str, tuple[str, ...]]] = {
        "in_proj_qkv": ("q", "k", "v"),
        "in_proj_z": ("z",),
        "in_proj_b": ("beta",),
        "in_proj_a": ("g",),
    }
    entry_kinds = tuple(entry_makes)
    projections = (*entry_kinds, "conv1d", "out_proj")

    def entry_rows(self, hidden_states: Tensor) -> EntryRows:
        mixer = self.mixer
        return EntryRows(
            qkv=project(mixer.in_proj_qkv, hidden_states),
            z=project(mixer.in_proj_z, hidden_states),
            b=mixer.in_proj_b(hidden_states),
            a=mixer.in_proj_a(hidden_states),
        )

    def entry_axes(self, axis: str) -> list[TensorAxis]:
        sizes = self.sizes
        keys, dv = sizes.num_k_heads * sizes.head_k_dim, sizes.head_v_dim
        if axis == "key_dims":
            return [TensorAxis("in_proj_qkv.weight", 0, k * keys) for k in (0, 1)]
        shape: dict[str, int] = {"block": dv}
        if axis == "value_dims":
            shape = {"repeat": sizes.num_v_heads, "stride": dv}
        ranges = [
            TensorAxis("in_proj_qkv.weight", 0, 2 * keys, **shape),
            TensorAxis("in_proj_z.weight", 0, 0, **shape),
        ]
        if axis == "value_heads":
            ranges += [TensorAxis(f"in_proj_{name}.weight", 0) for name in ("b", "a")]
        return ranges

    def entry_sizes(self) -> dict[str, int]:
        mixer = self.mixer
        return {
            "in_proj_qkv": mixer.conv_dim,
            "in_proj_z": mixer.value_dim,
            "in_proj_b": mixer.num_v_heads,
            "in_proj_a": mixer.num_v_heads,
        }


@register_adapter
class Qwen3_5MoeAdapter(Qwen3_5Adapter):
    """The same mixer in the family with experts."""

    family = "qwen3_5_moe"
    mixer_class = "Qwen3_5MoeGatedDeltaNet"
