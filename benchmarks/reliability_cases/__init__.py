"""Commands that are killed, and recipes and checkpoints that are right or wrong, by number."""
