"""Comparison of a run's model with transformers."""
