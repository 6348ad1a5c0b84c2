"""Pure tensor functions: weights and sums of the calibration in, choices and new weights out."""
