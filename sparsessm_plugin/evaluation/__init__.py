"""Perplexity, data and reports."""
