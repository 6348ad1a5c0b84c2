"""Pure tensor functions: statistics in, scores and masks out."""

from sparsessm_plugin.criteria.aggregation import Decay, DecayKind, aggregate
from sparsessm_plugin.criteria.scores import SALIENCIES, Saliency, SaliencyInputs
from sparsessm_plugin.selection.patterns import Pattern, Ranking, SemiStructured, Unstructured

__all__ = [
    "SALIENCIES",
    "Decay",
    "DecayKind",
    "Pattern",
    "Ranking",
    "Saliency",
    "SaliencyInputs",
    "SemiStructured",
    "Unstructured",
    "aggregate",
]
