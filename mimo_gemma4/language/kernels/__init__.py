"""Attention kernels beyond what PyTorch has, and which of them a layer type gets."""
