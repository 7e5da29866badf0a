"""Conversion of Hugging Face directories to checkpoints and back."""
