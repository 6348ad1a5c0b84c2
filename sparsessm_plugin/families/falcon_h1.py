"""Falcon-H1 (arXiv 2507.22448): Mamba-2 and attention side by side in every layer."""

from typing import Any

from torch import Tensor

from sparsessm_plugin.families.bamba import BambaAdapter
from sparsessm_plugin.families.registry import register_adapter
from sparsessm_plugin.recurrence.quantities import MixerQuantities


@register_adapter
class FalconH1Adapter(BambaAdapter):
    """The Mamba-2 layout with multipliers around in_proj and an optional norm."""

    family = "falcon_h1"
    mixer_class = "FalconH1Mixer"

    def in_input(self, hidden_states: Tensor) -> Tensor:
        return hidden_states * self.mixer.ssm_in_multiplier

    def in_output(self, projected: Tensor) -> Tensor:
        return projected * self.mixer.mup_vector

    def norm_groups(self) -> int:
        return self.mixer.norm.n_groups

    def out_gain(self, quantities: MixerQuantities, y: Tensor) -> Tensor:
        if not self.mixer.mamba_rms_norm:
            return quantities.gate
        if self.mixer.norm.norm_before_gate:
            return quantities.gate * self.rms_scale(y)
        return super().out_gain(quantities, y)

    def _norms_after_gate(self) -> bool:
        return self.mixer.mamba_rms_norm and not self.mixer.norm.norm_before_gate

    def channel_fields(self, num_heads: int, head_dim: int) -> dict[str, Any]:
        return {
            self.num_heads_field: num_heads,
            self.head_dim_field: head_dim,
            "mamba_d_ssm": num_heads * head_dim,
        }
