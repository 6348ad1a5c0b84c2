"""What has to be removed together from a mixer or a model, found by tracing, and its removal."""

from sparsessm_plugin.dependency_graph.config import apply_config_fields, write_config_fields
from sparsessm_plugin.dependency_graph.graph import AxisGroup, MixerDependencyGraph
from sparsessm_plugin.dependency_graph.model_graph import ModelAxisGroup, ModelDependencyGraph
from sparsessm_plugin.dependency_graph.tensors import TensorChange

__all__ = [
    "AxisGroup",
    "MixerDependencyGraph",
    "ModelAxisGroup",
    "ModelDependencyGraph",
    "TensorChange",
    "apply_config_fields",
    "write_config_fields",
]
