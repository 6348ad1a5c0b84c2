"""Gradients and steps through a whole model, and distillation."""
