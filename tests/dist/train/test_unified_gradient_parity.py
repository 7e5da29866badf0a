"""A step of the unified model (12B) on images and sounds, three modules on three grids, equals transformers'."""

import json
from pathlib import Path

import numpy as np
import torch
import yaml
from transformers.models.gemma4_unified.configuration_gemma4_unified import Gemma4UnifiedConfig
from transformers.models.gemma4_unified.modeling_gemma4_unified import Gemma4UnifiedForConditionalGeneration

from mimo_gemma4.data.shards import read_range
from mimo_gemma4.data.tokenizer import byte_tokenizer
from mimo_gemma4.encoders.registry import build_processor
from tests import REPOSITORY
from tests.dist.train.step_parity import BATCH, SEED, SHARD, STEP, Case, check, prepare, write_config
from tests.shard_maker import chat, jpeg, wav, write_shard
from tests.unit.encoders.test_unified_matches_transformers import file_name
from tests.vlm_reference import Reference, mean_loss, reference_planner

MEDIA = [["image"], ["audio"], [], ["image", "audio", "image"], ["audio", "audio"], ["image"], [], ["audio"], ["image"]]


def write_unified_model(folder: Path) -> None:
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


def write(folder: Path) -> None:
    write_unified_model(folder / "model")
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
    write_shard(folder / SHARD, members)
    write_config(folder)


def unified_step(folder: Path) -> Reference:
    """The step in one process, sample by sample."""
    hf_config = json.loads((folder / "model/config.json").read_text())
    images, sounds = (build_processor(name, hf_config) for name in ("vision", "audio"))
    planner = reference_planner(hf_config, folder / SHARD, BATCH, SEED)
    model = Gemma4UnifiedForConditionalGeneration.from_pretrained(folder / "model", attn_implementation="eager")

    def logits(index: int, ids: torch.Tensor) -> torch.Tensor:
        inputs = {"mm_token_type_ids": (ids == 6).long() + 3 * (ids == 9).long()}
        for media_type, processor in (("image", images), ("audio", sounds)):
            media = [item for item in planner.dataset.media(index) if item.media_type == media_type]
            items = [processor.decode(read_range(item.shard, item.offset, item.size)) for item in media]
            if items and media_type == "image":
                inputs |= processor.transformers_inputs(items)
            elif items:
                waveforms = processor.collate(items)["waveforms"][None]
                inputs |= {"input_features": waveforms, "input_features_mask": torch.ones(waveforms.shape[:2]).bool()}
        return model(input_ids=ids, **inputs).logits[0]

    loss, count = mean_loss(planner, STEP, logits)
    loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return Reference(loss.item(), count, {file_name(n.removeprefix("model.")): g for n, g in gradients.items()})


def test_step_gradients(tmp_path: Path) -> None:
    prepared = prepare(tmp_path, write, unified_step)
    assert set().union(*prepared.media) == {"image", "audio"}
    check([(Case(vision_tp=2, audio=1), prepared)])
