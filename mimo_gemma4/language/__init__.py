"""The Gemma 4 language module on megatron-core tensor parallel layers, with explicit process groups."""
