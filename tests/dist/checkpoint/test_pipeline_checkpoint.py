"""Checkpoints of a pipeline hold what those of one stage hold: any number of stages loads them bit for bit.

The directory that training starts from has no `lm_head.weight`, so the last stage makes its head of the embedding.
"""

import json
from pathlib import Path

import pytest
import torch
from transformers import Gemma4ForConditionalGeneration

from mimo_gemma4.config import load_config
from mimo_gemma4.convert.__main__ import main
from mimo_gemma4.train.build import build_trainer
from mimo_gemma4.train.setup import set_up_run
from mimo_gemma4.train.trainer import Trainer
from tests.dist.checkpoint.test_resume import same_bits, whole_tensors
from tests.dist.harness import run_ranks
from tests.huggingface_models import stored_tensors
from tests.vlm_reference import write_model, write_shards

STAGES = ["layout.vision.ranks=1", "layout.language={ranks: 4, tp: 2, pp: 2, sequence_parallel: true}"]
ONE_STAGE = ["layout.vision.ranks=1", "layout.language={ranks: 2, tp: 2}"]
PARTED = ["layout.vision={ranks: 2, pp: 2}", "layout.language={ranks: 3, pp: 3, part_shared_key_values: true}"]
EMBEDDING = "model.language_model.embed_tokens.weight"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pipeline")
    write_model(folder / "model")
    write_shards(folder)
    (folder / "run.yaml").write_text(
        f"""
        model: {{hf_path: {folder}/model, precision: bf16}}
        layout: {{vision: {{}}, language: {{}}}}
        data: {{train: {{shards: "{folder}/train-000000.tar"}}, seq_length: 300}}
        train: {{steps: 4, global_batch_size: 5}}
        optim: {{lr: 1.0e-2}}
        logging: {{tensorboard: false}}
        """
    )
    run_ranks(5, train, folder, "stages", STAGES, 2)
    return folder


def trainer_of(folder: Path, run: str, overrides: list[str]) -> Trainer:
    config = load_config([f"config={folder}/run.yaml", f"run.dir={folder}/{run}", *overrides])
    return build_trainer(set_up_run(config))


def train(rank: int, folder: Path, run: str, overrides: list[str], steps: int) -> torch.Tensor | None:
    """Train so many steps and save; this rank's part of the embedding, or of the head that is tied to it."""
    trainer = trainer_of(folder, run, overrides)
    for _ in range(steps):
        trainer.train_step()
    trainer.save()
    trainer.close()
    bound = [binding for module in trainer.model.modules.values() for binding in module.bindings()]
    return next((binding.view().detach().clone() for binding in bound if binding.name == EMBEDDING), None)


def saved(folder: Path, run: str, step: int) -> dict[str, torch.Tensor]:
    return whole_tensors(folder / run / "checkpoints" / f"step_{step:08d}")


def test_saved_and_exported_weights_are_those_of_the_directory(folder: Path, tmp_path: Path) -> None:
    source = stored_tensors(folder / "model")
    assert "lm_head.weight" not in source
    checkpoint = saved(folder, "stages", 2)
    weights = {key.partition(".weight.")[2]: value for key, value in checkpoint.items() if ".weight." in key}
    assert {name: w.shape for name, w in weights.items()} == {name: w.shape for name, w in source.items()}

    assert main(["to-hf", f"{folder}/stages/checkpoints/step_00000002", f"{tmp_path}/exported"]) == 0
    exported = stored_tensors(tmp_path / "exported")
    assert exported.keys() == source.keys()
    for name in (EMBEDDING, "model.language_model.layers.5.mlp.down_proj.weight"):
        assert torch.equal(exported[name], checkpoint[f"language.main_weight.{name}"])
        assert not torch.equal(exported[name], source[name])
    _, loading = Gemma4ForConditionalGeneration.from_pretrained(tmp_path / "exported", output_loading_info=True)
    assert not any(loading.values()), loading


def test_other_numbers_of_stages_read_the_same_bits(folder: Path) -> None:
    whole = saved(folder, "stages", 2)
    resume = f"checkpoint.resume={folder}/stages/checkpoints/step_00000002"
    for run, world, overrides in (("one", 3, ONE_STAGE), ("parted", 5, PARTED)):
        run_ranks(world, train, folder, run, [*overrides, resume], 0)
        assert same_bits(saved(folder, run, 2), whole)
        resume = f"checkpoint.resume={folder}/{run}/checkpoints/step_00000002"
    run_ranks(5, train, folder, "again", [*STAGES, resume], 2)
    run_ranks(5, train, folder, "stages", [*STAGES, "checkpoint.resume=auto"], 2)
    assert same_bits(saved(folder, "again", 4), saved(folder, "stages", 4))
    assert not same_bits(saved(folder, "again", 4), whole)


def test_head_and_embedding_stay_equal(folder: Path) -> None:
    parts = run_ranks(5, train, folder, "tied", [*STAGES, "checkpoint.resume=never"], 3)
    assert parts[0] is None
    assert torch.equal(parts[1], parts[3]) and torch.equal(parts[2], parts[4])
    first = saved(folder, "stages", 2)[f"language.weight.{EMBEDDING}"]
    assert not torch.equal(parts[1], first[: len(parts[1])])


def test_the_marker_tells_of_no_stage(folder: Path) -> None:
    marker = json.loads((folder / "stages/checkpoints/step_00000002/complete.json").read_text())
    assert set(marker["update_counts"]) == {"vision", "language"}
