"""With adapters that PEFT wrote, a global step has the loss and adapter gradients of PEFT on transformers' model.

The tolerance is that of `test_step_gradient_parity`, whose way of computing a step on ranks is used here.
"""

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import Gemma4ForConditionalGeneration

from tests.dist.harness import run_ranks
from tests.dist.test_step_gradient_parity import BATCH, SEED, STEP, Case, step_on_rank, worst_gradient
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


@dataclass(frozen=True)
class LoraCase(Case):
    """A layout, and what backward computes again."""

    checkpointing: str = "none"

    @property
    def overrides(self) -> list[str]:
        return [*super().overrides, f"train.activation_checkpointing={self.checkpointing}"]


CASES = [
    LoraCase(colocated=True, packing=True),
    LoraCase(tp=2, vision_tp=2),
    LoraCase(vision=2, tp=2, sp=True, dp=2, rows=1),
    LoraCase(tp=4, packing=True, checkpointing="full"),  # 2 key/value heads: each on two ranks
    LoraCase(tp=4, sp=True, vision_tp=4, checkpointing="full"),
    LoraCase(tp=2, sp=True, cp=2, packing=True, checkpointing="selective"),
    LoraCase(pp=2, tp=2, sp=True, rows=1),  # the adapter of per_layer_model_projection has a part of B on each stage
]


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("lora parity")
    write_model(folder / "model")
    write_shards(folder)
    run_ranks(1, write_adapter, folder)
    lora = f"rank: {RANK}, alpha: {ALPHA}, path: {folder}/adapter"
    (folder / "run.yaml").write_text(
        f"""
        run: {{dir: {folder}/run, seed: {SEED}}}
        model: {{hf_path: {folder}/model, precision: fp32}}
        layout: {{vision: {{}}, language: {{}}}}
        data: {{train: {{shards: "{folder}/train-000000.tar"}}, seq_length: 300}}
        train: {{global_batch_size: {BATCH}}}
        modules:
          vision: {{lora: {{{lora}, targets: {VISION}}}}}
          language: {{lora: {{{lora}, targets: {LANGUAGE}}}}}
        logging: {{tensorboard: false}}
        """
    )
    return folder


def write_adapter(rank: int, folder: Path) -> None:
    """A PEFT adapter on both modules, as PEFT saves it, whose B is not zero."""
    model = Gemma4ForConditionalGeneration.from_pretrained(folder / "model", dtype=torch.float32)
    torch.manual_seed(1)
    peft = get_peft_model(model, LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=PEFT_TARGETS))
    with torch.no_grad():
        for name, parameter in peft.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0.0, 0.05)
    peft.save_pretrained(folder / "adapter")


def reference_step(rank: int, folder: Path) -> Reference:
    return huggingface_step(
        folder / "model", folder / "train-000000.tar", STEP, BATCH, SEED, adapter=folder / "adapter"
    )


@pytest.fixture(scope="module")
def reference(run_folder: Path) -> Reference:
    return run_ranks(1, reference_step, run_folder)[0]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_gradients_are_those_of_peft(case: LoraCase, run_folder: Path, reference: Reference) -> None:
    results = run_ranks(case.world, step_on_rank, run_folder, case.overrides)
    outcome = results[0][0]
    assert all(result == outcome for result, _ in results)
    assert outcome["loss"] == pytest.approx(reference.loss, rel=1e-5)
    assert {name for _, pieces in results for name, *_ in pieces} == set(reference.gradients)
    assert all(gradient.norm() > 0 for gradient in reference.gradients.values())
    ratio, name = worst_gradient(results, reference)
    print(f"{case}: worst gradient {ratio:.2f} of its tolerance ({name})")
    assert ratio <= 1.0, f"{name} deviates by {ratio:.2f} times its tolerance"
    assert outcome["grad_norm"] == pytest.approx(reference.norm, rel=1e-5)
