"""SigLIP before Gemma 4 on three ranks: loss and every gradient equal those of transformers' two models joined."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
import yaml
from transformers import Gemma4ForConditionalGeneration, SiglipConfig, SiglipModel

from encoders.registry import build_processor
from mimo_gemma4.config import load_config
from mimo_gemma4.data.chat import ConversationEncoder
from mimo_gemma4.data.dataset import ShardDataset
from mimo_gemma4.data.planner import StepPlanner
from mimo_gemma4.data.shards import read_range
from mimo_gemma4.data.tokenizer import byte_tokenizer, media_tokens
from mimo_gemma4.presets import load_model_config
from mimo_gemma4.weights import Normal, bind_replicated, initialise
from tests.dist.test_step_gradient_parity import BATCH, SEED, STEP, step_on_rank, worst_gradient
from tests.dist.harness import run_ranks
from tests.vlm_reference import Reference, write_model, write_shards

WIDTHS = dict(hidden_size=32, intermediate_size=48, num_attention_heads=4)


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    write_model(folder / "model")
    write_shards(folder)
    torch.manual_seed(0)
    tower = dict(**WIDTHS, num_hidden_layers=2, image_size=24, patch_size=8)
    text = dict(**WIDTHS, num_hidden_layers=1, vocab_size=8, bos_token_id=0, eos_token_id=1)
    SiglipModel(SiglipConfig(vision_config=tower, text_config=text)).save_pretrained(folder / "siglip")
    config = {
        "run": {"dir": str(folder / "out"), "seed": SEED},
        "model": {"hf_path": str(folder / "model"), "precision": "fp32"},
        "layout": {"vision": {"ranks": 2}, "language": {"ranks": 1}},
        "modules": {"vision": {"hf_path": str(folder / "siglip")}},
        "data": {"train": {"shards": str(folder / "train-000000.tar")}, "seq_length": 512},
        "train": {"global_batch_size": BATCH, "microbatch_size": 2},
        "optim": {"clip_grad": None},
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(config))
    return folder


def joined_step(rank: int, folder: Path) -> Reference:
    """The step in one process, sample by sample: transformers' tower, the MLP by its formula, transformers' Gemma 4."""
    config = load_config([f"config={folder}/run.yaml"])
    hf_config = load_model_config(config.model, config.modules)
    processor = build_processor("vision", hf_config)
    encoder = ConversationEncoder(byte_tokenizer(), [processor], media_tokens(hf_config))
    dataset = ShardDataset.open(str(folder / "train-000000.tar"), encoder, seq_length=512)
    planner = StepPlanner(
        dataset, global_batch_size=BATCH, microbatch_size=1, seed=SEED,
        language_lanes=1, encoder_lanes={"vision": 1}, packing=False,
    )  # fmt: skip
    tower = SiglipModel.from_pretrained(folder / "siglip").vision_model
    gemma = Gemma4ForConditionalGeneration.from_pretrained(folder / "model", attn_implementation="eager")
    projector = drawn_projector()
    first, first_bias, second, second_bias = projector.values()

    def rows(pixels: torch.Tensor, *_: object, **__: object) -> SimpleNamespace:
        hidden = tower(pixels).last_hidden_state.flatten(0, 1)
        projected = F.linear(F.gelu(F.linear(hidden, first, first_bias)), second, second_bias)
        return SimpleNamespace(pooler_output=[projected])

    gemma.model.get_image_features = rows
    loss, count = torch.zeros(()), 0
    for index in planner.samples(STEP):
        encoded = dataset.encode(index)
        labels = torch.from_numpy(encoded.labels)
        items = [processor.decode(read_range(m.shard, m.offset, m.size)) for m in dataset.media(index)]
        media = {}
        if items:
            pixels = torch.stack([item["pixels"] for item in items]).float() / 127.5 - 1
            media = {"pixel_values": pixels, "mm_token_type_ids": torch.from_numpy(encoded.input_ids == 6).long()[None]}
        logits = gemma(input_ids=torch.from_numpy(encoded.input_ids)[None], **media).logits[0]
        loss = loss + F.cross_entropy(logits, labels, reduction="sum", ignore_index=-100)
        count += int((labels != -100).sum())
    (loss / count).backward()
    gradients = {name: p.grad for name, p in gemma.named_parameters() if p.grad is not None}
    gradients |= {f"vision_model.{n}": p.grad for n, p in tower.named_parameters() if p.grad is not None}
    gradients |= {name: weight.grad for name, weight in projector.items()}
    return Reference(loss.item() / count, count, gradients)


def drawn_projector() -> dict[str, torch.Tensor]:
    """The projector's first weights, which depend on names and seed only."""
    shapes = {"0.weight": (128, 32), "0.bias": (128,), "2.weight": (128, 128), "2.bias": (128,)}
    tensors = {f"model.multi_modal_projector.{name}": torch.zeros(shape) for name, shape in shapes.items()}
    matrices = {name: tensor for name, tensor in tensors.items() if tensor.ndim == 2}
    initialise([bind_replicated(n, t, Normal(t.shape[1] ** -0.5)) for n, t in matrices.items()], SEED)
    return {name: tensor.requires_grad_() for name, tensor in tensors.items()}


def test_step_gradients(run_folder: Path):
    reference = run_ranks(1, joined_step, run_folder)[0]
    results = run_ranks(3, step_on_rank, run_folder, [])
    outcome = results[0][0]
    assert outcome["hashes"] == 0
    assert outcome["loss_tokens"] == reference.loss_tokens
    assert outcome["loss"] == pytest.approx(reference.loss, rel=1e-5)
    assert any(name.startswith("vision_model.encoder") for name in reference.gradients)
    ratio, name = worst_gradient(results, reference)
    assert ratio <= 1.0, f"{name} deviates by {ratio:.2f} times its tolerance"
