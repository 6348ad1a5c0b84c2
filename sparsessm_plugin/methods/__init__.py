"""One file a method: a model and batches in, a changed model and a result out. No framework."""

from sparsessm_plugin.methods.base import MethodResult, MethodSettings, MixerMethod
from sparsessm_plugin.methods.channels import remove_channels
from sparsessm_plugin.methods.gradient import prune_by_gradient
from sparsessm_plugin.methods.layer_removal import remove_layers
from sparsessm_plugin.methods.projections import prune_projections
from sparsessm_plugin.methods.quantization import quantize_pruned
from sparsessm_plugin.methods.run import run
from sparsessm_plugin.methods.states import remove_states
from sparsessm_plugin.methods.transitions import prune_transitions
from sparsessm_plugin.methods.unit_removal import remove_kv_groups, remove_units
from sparsessm_plugin.methods.width_removal import remove_width

__all__ = [
    "MethodResult",
    "MethodSettings",
    "MixerMethod",
    "prune_by_gradient",
    "prune_projections",
    "prune_transitions",
    "quantize_pruned",
    "remove_channels",
    "remove_kv_groups",
    "remove_layers",
    "remove_states",
    "remove_units",
    "remove_width",
    "run",
]
