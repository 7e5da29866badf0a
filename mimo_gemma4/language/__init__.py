"""The Gemma 4 language module on megatron-core's tensor-parallel layers, with explicit process groups."""
