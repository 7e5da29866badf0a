"""Rotary position embeddings of Gemma 4: `default` for sliding layers, `proportional` for full ones."""

from collections.abc import Mapping
from typing import Any

import torch


def inverse_frequencies(rope: Mapping[str, Any], head_dim: int) -> torch.Tensor:
    """Angle per position of every channel pair (i, i + head_dim/2), fp32 [head_dim/2].

    `proportional` rotates the first `partial_rotary_factor` of the pairs by theta^(-2i/head_dim), divided by `factor`,
    and leaves the others in place; `default` rotates all pairs.
    """
    pairs = head_dim // 2
    proportional = rope["rope_type"] == "proportional"
    rotated = int(rope.get("partial_rotary_factor", 1.0) * head_dim // 2) if proportional else pairs
    exponents = torch.arange(0, 2 * rotated, 2, dtype=torch.float32) / head_dim
    frequencies = torch.zeros(pairs)
    frequencies[:rotated] = 1.0 / (rope["rope_theta"] ** exponents)
    return frequencies / (rope.get("factor", 1.0) if proportional else 1.0)


def rotary_tables(
    positions: torch.Tensor, frequencies: torch.Tensor, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosine and sine, each [S, B, 1, head_dim], of positions [B, S]: computed in fp32, then rounded to `dtype`."""
    angles = positions.t().float()[..., None, None] * frequencies
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos().to(dtype), angles.sin().to(dtype)
