"""One target for the whole model: which sizes of which axes reach it at the least loss."""

from sparsessm_plugin.fitting.plan import Plan, make_plan, split
from sparsessm_plugin.fitting.prepare import FitSettings, Prepared
from sparsessm_plugin.fitting.whole import FitResult, fit, outcome

__all__ = ["FitResult", "FitSettings", "Plan", "Prepared", "fit", "make_plan", "outcome", "split"]
