"""Gradients, the reduction that all ranks of all modules share, and the optimizer step."""
