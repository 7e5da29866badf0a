"""SigLIP before Gemma 4 on three ranks: loss and every gradient equal those of transformers' two models joined."""

from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from transformers import Gemma4ForConditionalGeneration, SiglipConfig, SiglipModel

from mimo_gemma4.config import load_config
from mimo_gemma4.config.presets import load_model_config
from mimo_gemma4.data.shards import read_range
from mimo_gemma4.encoders.registry import build_processor
from mimo_gemma4.weights.bindings import Normal, bind_replicated, initialise
from tests.dist.train.step_parity import BATCH, SEED, SHARD, STEP, Case, check, prepare, write_config
from tests.vlm_reference import Reference, mean_loss, reference_planner, write_model, write_shards

WIDTHS = dict(hidden_size=32, intermediate_size=48, num_attention_heads=4)


def write(folder: Path) -> None:
    write_model(folder / "model")
    write_shards(folder)
    torch.manual_seed(0)
    tower = dict(**WIDTHS, num_hidden_layers=2, image_size=24, patch_size=8)
    text = dict(**WIDTHS, num_hidden_layers=1, vocab_size=8, bos_token_id=0, eos_token_id=1)
    SiglipModel(SiglipConfig(vision_config=tower, text_config=text)).save_pretrained(folder / "siglip")
    modules = {"vision": {"hf_path": f"{folder}/siglip"}}
    write_config(folder, layout={"vision": {}, "language": {}}, modules=modules)


def joined_step(folder: Path) -> Reference:
    """The step in one process, sample by sample: transformers' tower, the MLP by its formula, transformers' Gemma 4."""
    config = load_config([f"config={folder}/run.yaml"])
    hf_config = load_model_config(config.model, config.modules)
    processor = build_processor("vision", hf_config)
    planner = reference_planner(hf_config, folder / SHARD, BATCH, SEED)
    tower = SiglipModel.from_pretrained(folder / "siglip").vision_model
    gemma = Gemma4ForConditionalGeneration.from_pretrained(folder / "model", attn_implementation="eager")
    projector = drawn_projector()
    first, first_bias, second, second_bias = projector.values()

    def soft_tokens(pixels: torch.Tensor, *_: object, **__: object) -> SimpleNamespace:
        hidden = tower(pixels).last_hidden_state.flatten(0, 1)
        projected = F.linear(F.gelu(F.linear(hidden, first, first_bias)), second, second_bias)
        return SimpleNamespace(pooler_output=[projected])

    def logits(index: int, ids: torch.Tensor) -> torch.Tensor:
        items = [processor.decode(read_range(m.shard, m.offset, m.size)) for m in planner.dataset.media(index)]
        media = {}
        if items:
            pixels = torch.stack([item["pixels"] for item in items]).float() / 127.5 - 1
            media = {"pixel_values": pixels, "mm_token_type_ids": (ids == 6).long()}
        return gemma(input_ids=ids, **media).logits[0]

    gemma.model.get_image_features = soft_tokens
    loss, count = mean_loss(planner, STEP, logits)
    loss.backward()
    gradients = {name: p.grad for name, p in gemma.named_parameters() if p.grad is not None}
    gradients |= {f"vision_model.{n}": p.grad for n, p in tower.named_parameters() if p.grad is not None}
    gradients |= {name: weight.grad for name, weight in projector.items()}
    return Reference(loss.item(), count, gradients)


def drawn_projector() -> dict[str, torch.Tensor]:
    """The projector's first weights, which depend on names and seed only."""
    shapes = {"0.weight": (128, 32), "0.bias": (128,), "2.weight": (128, 128), "2.bias": (128,)}
    tensors = {f"model.multi_modal_projector.{name}": torch.zeros(shape) for name, shape in shapes.items()}
    matrices = {name: tensor for name, tensor in tensors.items() if tensor.ndim == 2}
    initialise([bind_replicated(n, t, Normal(t.shape[1] ** -0.5)) for n, t in matrices.items()], SEED)
    return {name: tensor.requires_grad_() for name, tensor in tensors.items()}


def test_step_gradients(tmp_path: Path) -> None:
    prepared = prepare(tmp_path, write, joined_step)
    assert any(name.startswith("vision_model.encoder") for name in prepared.reference.gradients)
    check([(Case(vision=2), prepared)])
