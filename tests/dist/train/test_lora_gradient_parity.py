"""With adapters that PEFT wrote, a global step has the loss and adapter gradients of PEFT on transformers' model.

`step_parity` has the tolerance.
"""

from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import Gemma4ForConditionalGeneration

from tests.dist.train.step_parity import BATCH, SEED, SHARD, STEP, Case, check, prepare, write_config
from tests.vlm_reference import Reference, huggingface_step, write_model, write_shards

RANK, ALPHA = 3, 5.0
# Fused weights with all, some and a middle one of their parts adapted, linears cut by rows, and replicated ones.
LANGUAGE = [
    "*.layers.0.self_attn.[qv]_proj",
    "*.layers.[1-5].self_attn.*",
    "*.layers.1.mlp.up_proj",
    "*.layers.[2-5].mlp.*",
    "*.per_layer_*",
]
VISION = ["*.self_attn.[qko]_proj.linear", "*.mlp.*.linear", "*.input_proj", "*.embedding_projection"]
PEFT_TARGETS = (
    r"model\.language_model\.("
    r"layers\.0\.self_attn\.[qv]_proj|layers\.[1-5]\.self_attn\.[qkvo]_proj|layers\.1\.mlp\.up_proj|"
    r"layers\.[2-5]\.mlp\.(gate|up|down)_proj|layers\.\d\.per_layer_(input_gate|projection)|per_layer_model_projection"
    r")|model\.vision_tower\..*\.(self_attn\.[qko]_proj|mlp\.(gate|up|down)_proj)\.linear|"
    r".*\.(input_proj|embedding_projection)"
)


CASES = [
    Case(colocated=True, packing=True),
    Case(tp=2, vision_tp=2),
    Case(vision=2, tp=2, sp=True, dp=2, sequences=1),
    Case(tp=4, packing=True, checkpointing="full"),  # 2 key/value heads: each on two ranks
    Case(tp=4, sp=True, vision_tp=4, checkpointing="full"),
    Case(tp=2, sp=True, cp=2, packing=True, checkpointing="selective"),
    Case(pp=2, tp=2, sp=True, sequences=1),  # the adapter of per_layer_model_projection has a part of B on each stage
    Case(vision_pp=2, sequences=1),  # some of the patterns name linears of one stage alone
]


def write(folder: Path) -> None:
    write_model(folder / "model")
    write_shards(folder)
    write_adapter(folder)
    lora = {"rank": RANK, "alpha": ALPHA, "path": f"{folder}/adapter"}
    targets = {"vision": VISION, "language": LANGUAGE}
    modules = {name: {"lora": lora | {"targets": names}} for name, names in targets.items()}
    write_config(folder, layout=dict.fromkeys(targets, {}), modules=modules)


def write_adapter(folder: Path) -> None:
    """A PEFT adapter on both modules, as PEFT saves it, whose B is not zero."""
    model = Gemma4ForConditionalGeneration.from_pretrained(folder / "model", dtype=torch.float32)
    torch.manual_seed(1)
    peft = get_peft_model(model, LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=PEFT_TARGETS))
    with torch.no_grad():
        for name, parameter in peft.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0.0, 0.05)
    peft.save_pretrained(folder / "adapter")


def peft_step(folder: Path) -> Reference:
    return huggingface_step(folder / "model", folder / SHARD, STEP, BATCH, SEED, adapter=folder / "adapter")


def test_gradients_are_those_of_peft(tmp_path: Path) -> None:
    adapted = prepare(tmp_path, write, peft_step)
    assert all(".lora_" in name and gradient.norm() > 0 for name, gradient in adapted.reference.gradients.items())
    check((case, adapted) for case in CASES)
