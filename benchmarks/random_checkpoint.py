"""Writes a Hugging Face directory with random weights at a preset's real size, to check and measure without a download.

Run with:  python benchmarks/random_checkpoint.py gemma4_e4b OUT [--layers N] [--text-only]

Norms of queries and keys are scaled so that scores have unit variance, as attention divides them by nothing. Branches
are scaled down, so that tied embeddings prefer some token clearly, as trained ones do.
"""

import argparse
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

from mimo_gemma4.config import ModelConfig
from mimo_gemma4.config.presets import load_model_config
from mimo_gemma4.data.tokenizer import byte_tokenizer

BRANCH_SCALE = 0.3
"""Weight of the norms behind residual branches."""


def shortened(hf_config: dict[str, Any], layers: int | None) -> dict[str, Any]:
    """The configuration with the first so many decoder layers, as large a share of them as before without own keys."""
    text = dict(hf_config["text_config"])
    if layers is not None:
        types = text["layer_types"][:layers]
        shared = round((text.get("num_kv_shared_layers") or 0) * layers / text["num_hidden_layers"])
        while set(types) - set(types[: layers - shared]):
            shared -= 1
        text |= {"num_hidden_layers": layers, "layer_types": types, "num_kv_shared_layers": shared}
    return hf_config | {"text_config": text}


@torch.no_grad()
def randomise(model: torch.nn.Module, seed: int) -> None:
    """Draw every weight on the model's device."""
    generator = torch.Generator(next(model.parameters()).device).manual_seed(seed)
    for name, tensor in model.state_dict().items():
        if "norm" in name or name.endswith(("layer_scalar", "scale")):
            tensor.uniform_(0.7, 1.3, generator=generator)
            if "q_norm" in name or "k_norm" in name:
                tensor.mul_(tensor.shape[0] ** -0.25)
            if "post_" in name and "language_model" in name or name.startswith("model.layers") and "post_" in name:
                tensor.mul_(BRANCH_SCALE)
        elif name.endswith(("_min", "_max")):
            tensor.fill_(8.0 if name.endswith("max") else -8.0)
        elif tensor.is_floating_point():
            tensor.normal_(0.0, tensor.shape[-1] ** -0.5, generator=generator)


def main() -> None:
    """Write config, tokenizer and sharded bf16 weights."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("preset")
    parser.add_argument("out", type=Path)
    parser.add_argument("--layers", type=int, help="decoder layers; default: all")
    parser.add_argument("--text-only", action="store_true", help="leave the encoders out")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    hf_config = shortened(load_model_config(ModelConfig(preset=options.preset)), options.layers)
    if options.text_only:
        hf_config |= {"vision_config": None, "audio_config": None}
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    config = AutoConfig.for_model(**hf_config)
    kind: Any = AutoModelForImageTextToText if "vision_config" in hf_config else AutoModelForCausalLM
    with torch.device("meta"):
        model = kind.from_config(config, dtype=torch.bfloat16)
    model.to_empty(device=device).tie_weights()
    randomise(model, options.seed)
    model.save_pretrained(options.out, max_shard_size="2GB")
    byte_tokenizer().save_pretrained(options.out)
    print(f"{sum(p.numel() for p in model.parameters()) / 1e9:.2f} B parameters in {options.out}")


if __name__ == "__main__":
    main()
