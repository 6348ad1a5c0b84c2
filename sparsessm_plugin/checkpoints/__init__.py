"""Checkpoints: loading, saving, other layouts, and the runtimes that load them."""
