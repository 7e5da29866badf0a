"""The `TransformerConfig` through which encoders and decoders use megatron-core."""

from typing import Any

import torch
from megatron.core.transformer.transformer_config import TransformerConfig


def module_config(
    tp: int,
    dtype: torch.dtype,
    *,
    hidden_size: int,
    num_layers: int = 1,
    num_attention_heads: int | None = None,
    **fields: Any,
) -> TransformerConfig:
    """A configuration for megatron-core's data parallelism, optimizer and tensor-parallel linears.

    Args:
        tp: tensor-parallel size.
        dtype: type of the weights.
        hidden_size: width of the module.
        num_layers: number of its layers.
        num_attention_heads: number of its heads; None: it has none (megatron-core wants a number that `tp` divides).
        fields: other fields of `TransformerConfig`.
    """
    return TransformerConfig(
        num_layers=num_layers,
        hidden_size=hidden_size,
        num_attention_heads=num_attention_heads or tp,
        tensor_model_parallel_size=tp,
        params_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        calculate_per_token_loss=True,
        use_cpu_initialization=True,  # weights are made on the device of the surrounding `torch.device` context
        perform_initialization=False,  # bindings fill them
        gradient_accumulation_fusion=False,
        **fields,
    )
