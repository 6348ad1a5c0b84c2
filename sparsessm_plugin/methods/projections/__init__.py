"""Projections of mixers, dt_proj and the convolution included, and Linear layers elsewhere."""

from sparsessm_plugin.methods.projections.method import ProjectionPruning, prune_projections
from sparsessm_plugin.methods.projections.results import ProjectionResult, PrunedProjection
from sparsessm_plugin.methods.projections.settings import ProjectionSettings
from sparsessm_plugin.methods.projections.statistics import gram_of, input_of
from sparsessm_plugin.methods.projections.targets import matching_projections

__all__ = [
    "ProjectionPruning",
    "ProjectionResult",
    "ProjectionSettings",
    "PrunedProjection",
    "gram_of",
    "input_of",
    "matching_projections",
    "prune_projections",
]
