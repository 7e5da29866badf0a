"""One global step with sounds, alone or beside images, has the loss and the gradients of transformers in one process.

As `test_step_gradient_parity`, which states the tolerance, with layouts of audio and language and of all three modules.
"""

from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.dist.harness import run_ranks
from tests.dist.test_step_gradient_parity import BATCH, SEED, STEP, check
from tests.vlm_reference import Reference, huggingface_step, reference_planner, write_model, write_shards

SOUNDS = [("audio",) * count for count in (1, 2, 0, 0, 3, 1, 1, 0, 2, 1)]
"""Media of the samples of a shard, in message order; here two in a row have none …"""
SOUNDS_AND_IMAGES = [
    ("image",), ("audio",), (), ("image",), (),
    ("audio", "image", "audio"), ("image", "image"), ("audio", "audio"), ("audio",), ("image", "audio"),
]  # fmt: skip
"""… and here are all kinds."""


@dataclass(frozen=True)
class Case:
    """A layout: ranks and further options of its modules, in order, and how the batch is cut."""

    modules: dict[str, dict[str, int | bool]]
    rows: int = 1
    packing: bool = False
    colocated: bool = False

    @property
    def world(self) -> int:
        ranks = [int(options["ranks"]) for options in self.modules.values()]
        return max(ranks) if self.colocated else sum(ranks)

    @property
    def overrides(self) -> list[str]:
        modules = []
        for name, options in self.modules.items():
            written = ", ".join(f"{key}: {str(value).lower()}" for key, value in options.items())
            modules.append(f"layout.{name}={{{written}}}")
        return [
            *modules,
            f"layout.placement={'colocated' if self.colocated else 'disjoint'}",
            f"train.microbatch_size={self.rows}",
            f"data.packing={str(self.packing).lower()}",
        ]


WITH_SOUNDS = [
    Case({"audio": {"ranks": 1}, "language": {"ranks": 1}}, rows=2, colocated=True),
    Case({"audio": {"ranks": 2}, "language": {"ranks": 2}}),
    Case({"audio": {"ranks": 2, "tp": 2}, "language": {"ranks": 2, "tp": 2, "sequence_parallel": True}}, 2, True),
]
WITH_SOUNDS_AND_IMAGES = [
    Case({"vision": {"ranks": 1}, "audio": {"ranks": 1}, "language": {"ranks": 1}}, rows=2, colocated=True),
    Case({"vision": {"ranks": 1}, "audio": {"ranks": 2}, "language": {"ranks": 2, "cp": 2}}, 2, True),
    Case({"vision": {"ranks": 2, "tp": 2}, "audio": {"ranks": 2, "tp": 2}, "language": {"ranks": 2}}),
]


@dataclass(frozen=True)
class Prepared:
    """A folder with model, shard and configuration, and the step as transformers computes it."""

    folder: Path
    reference: Reference
    kinds: set[str]
    """Media types of the step's samples: with one sample a microbatch, those of its microbatches."""


@pytest.fixture(scope="module")
def sounds(tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    return prepare(tmp_path_factory.mktemp("sounds"), SOUNDS)


@pytest.fixture(scope="module")
def sounds_and_images(tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    return prepare(tmp_path_factory.mktemp("sounds_and_images"), SOUNDS_AND_IMAGES)


def prepare(folder: Path, media: list[tuple[str, ...]]) -> Prepared:
    write_model(folder / "model", audio=True)
    write_shards(folder, media)
    (folder / "run.yaml").write_text(
        f"""
        run: {{dir: {folder}/run, seed: {SEED}}}
        model: {{hf_path: {folder}/model, precision: fp32}}
        layout: {{language: {{}}}}
        data: {{train: {{shards: "{folder}/train-000000.tar"}}, seq_length: 300}}
        train: {{global_batch_size: {BATCH}}}
        logging: {{tensorboard: false}}
        """
    )
    return Prepared(folder, *run_ranks(1, reference_rank, folder)[0])


def reference_rank(rank: int, folder: Path) -> tuple[Reference, set[str]]:
    model, shard = folder / "model", folder / "train-000000.tar"
    planner = reference_planner(model, shard, BATCH, SEED)
    media = [planner.dataset.media(index) for index in planner.samples(STEP)]
    kinds = {" ".join(sorted({item.media_type for item in items})) for items in media}
    return huggingface_step(model, shard, STEP, BATCH, SEED), kinds


@pytest.mark.parametrize("case", WITH_SOUNDS, ids=str)
def test_sounds(case: Case, sounds: Prepared) -> None:
    assert sounds.kinds == {"", "audio"}
    check(case, sounds.folder, sounds.reference)


@pytest.mark.parametrize("case", WITH_SOUNDS_AND_IMAGES, ids=str)
def test_sounds_and_images(case: Case, sounds_and_images: Prepared) -> None:
    assert sounds_and_images.kinds == {"", "audio", "image", "audio image"}
    check(case, sounds_and_images.folder, sounds_and_images.reference)
