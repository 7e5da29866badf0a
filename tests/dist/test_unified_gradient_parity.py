"""A step of the unified model (12B) on images and sounds, three modules on three grids, equals transformers'."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml
from transformers.models.gemma4_unified.configuration_gemma4_unified import Gemma4UnifiedConfig
from transformers.models.gemma4_unified.modeling_gemma4_unified import Gemma4UnifiedForConditionalGeneration

from encoders.registry import build_processor
from mimo_gemma4.config import REPOSITORY
from mimo_gemma4.data.chat import ConversationEncoder
from mimo_gemma4.data.dataset import ShardDataset
from mimo_gemma4.data.planner import StepPlanner
from mimo_gemma4.data.shards import read_range
from mimo_gemma4.data.tokenizer import byte_tokenizer, media_tokens
from tests.dist.harness import run_ranks
from tests.dist.test_step_gradient_parity import BATCH, SEED, STEP, step_on_rank, worst_gradient
from tests.shard_maker import chat, jpeg, wav, write_shard
from tests.unit.test_unified_matches_transformers import file_name
from tests.vlm_reference import Reference

MEDIA = [["image"], ["audio"], [], ["image", "audio", "image"], ["audio", "audio"], ["image"], [], ["audio"], ["image"]]


def write_model(folder: Path) -> None:
    """`gemma4_12b` shrunk to the byte tokenizer, with random norms and attention that is well conditioned."""
    hf_config = yaml.safe_load((REPOSITORY / "configs/model/gemma4_12b.yaml").read_text())
    hf_config["text_config"] |= dict(
        vocab_size=384, hidden_size=64, intermediate_size=96, num_hidden_layers=6, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, global_head_dim=32, sliding_window=16, max_position_embeddings=1024,
        layer_types=hf_config["text_config"]["layer_types"][:6],
    )  # fmt: skip
    hf_config["vision_config"] |= dict(mm_embed_dim=48, output_proj_dims=48)
    hf_config["audio_config"] |= dict(audio_embed_dim=80, output_proj_dims=80)
    hf_config |= dict(
        image_token_id=6, boi_token_id=5, eoi_token_id=7, audio_token_id=9, boa_token_id=8, eoa_token_index=10,
        video_token_id=11,
    )  # fmt: skip
    torch.manual_seed(0)
    model = Gemma4UnifiedForConditionalGeneration(Gemma4UnifiedConfig(**hf_config))
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if name.endswith("norm.weight") or name.endswith("layer_scalar"):
                tensor.uniform_(0.7, 1.3)
            if "q_norm" in name or "k_norm" in name:
                tensor.mul_(tensor.shape[0] ** -0.25)
            if "pos_embedding" in name:
                tensor.normal_(0.0, 0.1)
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    written = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(written | {"vision_processor": {"max_soft_tokens": 24}}))


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    write_model(tmp_path / "model")
    generator = np.random.default_rng(5)
    members: dict[str, bytes] = {}
    for number, media in enumerate(MEDIA):
        question = "".join(generator.choice(list("abcdef "), generator.integers(3, 30)))
        members[f"s{number}.json"] = chat(question, f"{number}!", *media)
        for place, media_type in enumerate(media):
            if media_type == "image":  # up to 24 soft tokens, more than the window of sliding layers
                members[f"s{number}.{place}.jpg"] = jpeg(90 + 40 * number, 60 + 90 * place, shade=number)
            else:
                members[f"s{number}.{place}.wav"] = wav(100 * number + 7)
    write_shard(tmp_path / "train-000000.tar", members)
    (tmp_path / "run.yaml").write_text(
        f"""
        run: {{dir: {tmp_path}/run, seed: {SEED}}}
        model: {{hf_path: {tmp_path}/model, precision: fp32}}
        layout: {{vision: {{ranks: 2, tp: 2}}, audio: {{ranks: 1}}, language: {{ranks: 1}}}}
        data: {{train: {{shards: "{tmp_path}/train-000000.tar"}}, seq_length: 300}}
        train: {{global_batch_size: {BATCH}, microbatch_size: 2}}
        logging: {{tensorboard: false}}
        """
    )
    return tmp_path


def transformers_step(rank: int, folder: Path) -> Reference:
    """The step in one process, sample by sample."""
    hf_config = json.loads((folder / "model/config.json").read_text())
    images, sounds = (build_processor(name, hf_config) for name in ("vision", "audio"))
    encoder = ConversationEncoder(byte_tokenizer(), [images, sounds], media_tokens(hf_config))
    dataset = ShardDataset.open(str(folder / "train-000000.tar"), encoder, seq_length=300)
    planner = StepPlanner(
        dataset, global_batch_size=BATCH, microbatch_size=1, seed=SEED,
        language_lanes=1, encoder_lanes={"vision": 1, "audio": 1}, packing=False,
    )  # fmt: skip
    model = Gemma4UnifiedForConditionalGeneration.from_pretrained(folder / "model", attn_implementation="eager")
    loss, count, seen = torch.zeros(()), 0, set()
    for index in planner.samples(STEP):
        encoded = dataset.encode(index)
        ids, labels = torch.from_numpy(encoded.input_ids)[None], torch.from_numpy(encoded.labels)
        inputs = {"mm_token_type_ids": (ids == 6).long() + 3 * (ids == 9).long()}
        for media_type, processor in (("image", images), ("audio", sounds)):
            media = [item for item in dataset.media(index) if item.media_type == media_type]
            items = [processor.decode(read_range(item.shard, item.offset, item.size)) for item in media]
            if items and media_type == "image":
                inputs |= processor.transformers_inputs(items)
            elif items:
                waveforms = processor.collate(items)["waveforms"][None]
                inputs |= {"input_features": waveforms, "input_features_mask": torch.ones(waveforms.shape[:2]).bool()}
            seen |= {media_type} if items else set()
        logits = model(input_ids=ids, **inputs).logits[0]
        loss = loss + F.cross_entropy(logits, labels, reduction="sum", ignore_index=-100)
        count += int((labels != -100).sum())
    assert seen == {"image", "audio"}
    (loss / count).backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return Reference(
        loss.item() / count, count, {file_name(name.removeprefix("model.")): g for name, g in gradients.items()}
    )


def test_step_gradients(run_folder: Path):
    reference = run_ranks(1, transformers_step, run_folder)[0]
    results = run_ranks(4, step_on_rank, run_folder, [])
    outcome = results[0][0]
    assert outcome["hashes"] == 0
    assert outcome["loss_tokens"] == reference.loss_tokens
    assert outcome["loss"] == pytest.approx(reference.loss, rel=1e-5)
    ratio, name = worst_gradient(results, reference)
    assert ratio <= 1.0, f"{name} deviates by {ratio:.2f} times its tolerance"
