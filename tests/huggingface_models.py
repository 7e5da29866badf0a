"""Tiny random models of every Gemma 4 variant as Hugging Face directories, towers included, written by transformers."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import (
    Gemma4Config,
    Gemma4ForConditionalGeneration,
    Gemma4UnifiedConfig,
    Gemma4UnifiedForConditionalGeneration,
)

from mimo_gemma4.config import ModelConfig
from mimo_gemma4.config.presets import load_model_config
from mimo_gemma4.data.tokenizer import byte_tokenizer

TINY = load_model_config(ModelConfig(preset="gemma4_tiny"))
DENSE = dict(hidden_size_per_layer_input=0, num_kv_shared_layers=0, use_double_wide_mlp=False) | dict(
    attention_k_eq_v=True, use_bidirectional_attention="vision"
)
VARIANTS: dict[str, dict[str, Any]] = {
    "e2b": dict(num_key_value_heads=1),
    "e4b": dict(use_double_wide_mlp=False),
    "12b": DENSE | dict(model_type="gemma4_unified_text", num_global_key_value_heads=1),
    "26b_a4b": DENSE
    | dict(
        num_global_key_value_heads=1,
        enable_moe_block=True,
        num_experts=4,
        top_k_experts=2,
        moe_intermediate_size=24,
    ),
    "31b": DENSE | dict(num_global_key_value_heads=2),
}
COMPANIONS = {
    "generation_config.json": '{"do_sample": true, "top_k": 64}',
    "processor_config.json": '{"processor_class": "Gemma4Processor", "image_seq_length": 280}',
    "preprocessor_config.json": '{"image_processor_type": "Gemma4ImageProcessor"}',
}


def write_variant(
    folder: Path, variant: str, *, max_shard_size: str = "100KB", dtype: torch.dtype = torch.bfloat16
) -> Path:
    """A model of `gemma4_tiny`'s sizes and the variant's structure, in many files, with what lies beside weights."""
    options = {key: value for key, value in TINY.items() if key not in ("vision_processor", "model_type")}
    options["text_config"] = options["text_config"] | VARIANTS[variant]
    kind: Any = Gemma4ForConditionalGeneration
    if variant == "12b":
        towers = {
            "vision_config": dict(patch_size=4, model_patch_size=12, mm_embed_dim=128, mm_posemb_size=16),
            "audio_config": dict(audio_embed_dim=40),
        }
        kind, config = Gemma4UnifiedForConditionalGeneration, Gemma4UnifiedConfig(**options | towers)
    else:
        config = Gemma4Config(**options)
    torch.manual_seed(0)
    model = kind(config)
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.normal_()  # trivial ones and zeros would hide a tensor put in another's place
    model.to(dtype).save_pretrained(folder, max_shard_size=max_shard_size)
    byte_tokenizer().save_pretrained(str(folder))
    config_file = folder / "config.json"
    written = json.loads(config_file.read_text()) | {"vision_processor": TINY["vision_processor"]}
    config_file.write_text(json.dumps(written))
    for name, text in COMPANIONS.items():
        (folder / name).write_text(text)
    return folder


def stored_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a directory by its stored name, read by safetensors; each name may occur once."""
    tensors: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as handle:
            assert not tensors.keys() & set(handle.keys())
            tensors |= {name: handle.get_tensor(name) for name in handle.keys()}
    listing = folder / "model.safetensors.index.json"
    if listing.is_file():
        assert json.loads(listing.read_text())["weight_map"].keys() == tensors.keys()
    return tensors


def same_bits(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    """Whether the same names stand for the same shapes, types and bits."""

    def bits(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.contiguous().view(-1).view(torch.uint8)

    return one.keys() == other.keys() and all(
        one[name].shape == other[name].shape
        and one[name].dtype == other[name].dtype
        and bits(one[name]).equal(bits(other[name]))
        for name in one
    )
