"""Pure tensor functions: statistics in, scores and masks out."""

from sparsessm_plugin.saliency.aggregation import Decay, DecayKind, aggregate
from sparsessm_plugin.saliency.scores import SALIENCIES, Saliency, SaliencyInputs
from sparsessm_plugin.saliency.selection import Pattern, Ranking, SemiStructured, Unstructured

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
