"""The calibration data of a run: read once, in one order, for every pass of every modifier."""

from sparsessm_plugin.calibration.batches import CalibrationBatches, fix_batches, give_back

__all__ = ["CalibrationBatches", "fix_batches", "give_back"]
