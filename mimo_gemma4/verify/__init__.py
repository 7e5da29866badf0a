"""Compares a run's model with transformers."""
