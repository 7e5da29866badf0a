"""Every shape of model under every kind of layout has the loss and the gradients that transformers has in one process.

`step_parity` has the tolerance. Models have `gemma4_tiny`'s sizes and a released model's structure, and train on
samples of zero to three images; the rows of a model cross how encoders feed the language model with how both are cut.
"""

from functools import partial

import pytest

from tests.dist.train.step_parity import Case, Prepared, check, prepare, write_run
from tests.huggingface_models import VARIANTS
from tests.vlm_reference import SAMPLES, SOUNDS_AND_IMAGES

WITHOUT_CLIPPING = dict(use_clipped_linears=False, standardize=True)
LARGE = partial(write_run, vision=WITHOUT_CLIPPING, **VARIANTS["31b"])
EIGHT_LAYERS = [*["sliding_attention"] * 3, "full_attention"] * 2
MODELS = {
    "E2B": partial(write_run, **VARIANTS["e2b"]),
    "E4B": partial(write_run, **VARIANTS["e4b"]),
    "31B": LARGE,
    "26B-A4B": partial(write_run, vision=WITHOUT_CLIPPING, **VARIANTS["26b_a4b"]),
    "E4B with sounds": partial(write_run, media=SOUNDS_AND_IMAGES, audio=True, **VARIANTS["e4b"]),
    "31B, images in one sample": partial(LARGE, media=[("image",) * (3 * (n == 5)) for n in range(SAMPLES)]),
    "31B of eight layers": partial(LARGE, num_hidden_layers=8, layer_types=EIGHT_LAYERS),
    "E2B, text alone": partial(write_run, media=[()] * SAMPLES, **VARIANTS["e2b"]),
}
QUICK = {
    "E2B": [Case(vision=3, dp=2, pp=2, sequences=1), Case(vision=2, tp=2, pp=2, sp=True, frozen=("vision tower",))],
    "E4B": [Case(vision=4), Case(cp=2, pp=2, packing=True, frozen=("language",))],
    "31B": [
        Case(pp=3, sequences=1, packing=True, ranks=((2,), (0, 1, 2))),
        Case(colocated=True, tp=2, cp=2, pp=2, sp=True, packing=True),
    ],
    "26B-A4B": [Case(vision=2, dp=2, pp=2, ep=2, sequences=1, packing=True)],
    "E4B with sounds": [
        Case(audio=1, dp=3, pp=2, sequences=1, frozen=("vision",)),
        Case(vision=2, audio=1, audio_tp=2, colocated=True, dp=2, tp=2, sp=True, sequences=1),
    ],
    "31B, images in one sample": [Case(dp=3, sequences=1)],
    "31B of eight layers": [Case(colocated=True, pp=8, sequences=1, packing=True)],
    "E2B, text alone": [Case(vision_pp=2, dp=2, pp=2, sequences=1)],
}
COMPLETE = {
    "E2B": [
        Case(vision=3, dp=2, sequences=1),
        Case(vision=4, sequences=3),
        Case(dp=3, sequences=1),
        Case(vision=2, tp=2, cp=2, sp=True, packing=True),
        Case(vision=2, tp=2, cp=2, sp=True),
        Case(vision_tp=2, tp=4, pp=1, sp=True, packing=True),
        Case(pp=4, part=True, sequences=1),
        Case(vision=2, dp=2, pp=3, part=True, sequences=1, packing=True),
        Case(colocated=True, dp=2, tp=2, pp=2, sp=True, packing=True, sequences=1),
        Case(colocated=True, vision_tp=4, pp=4, part=True, sequences=3),
        Case(vision=2, dp=2, frozen=("vision",)),
        Case(colocated=True, pp=2, dp=2, sequences=1, frozen=("vision",)),
        Case(vision_pp=2, dp=3, sequences=1),
        Case(vision_tp=2, dp=3, sequences=1, ranks=((0, 1), (1, 2, 3))),
        Case(colocated=True, vision_pp=2, tp=2, pp=2, sp=True, packing=True),
    ],
    "E4B": [
        Case(vision=3, dp=4, sequences=1),
        Case(vision=2, cp=3, packing=True),
        Case(tp=2, cp=3, sp=True),
        Case(vision=2, dp=3, pp=2, sequences=1),
        Case(vision=2, cp=2, pp=3, part=True, packing=True, sequences=1),
        Case(tp=2, pp=3, sp=True, part=True, sequences=7),
        Case(colocated=True, vision_tp=2, dp=2, cp=2, pp=2, sequences=1),
        Case(colocated=True, tp=2, pp=4, sp=True, part=True, sequences=1, checkpointing="full"),
        Case(vision=3, dp=2, pp=2, sequences=1, frozen=("vision tower",)),
        Case(vision_pp=3, dp=2, pp=2, sequences=1, frozen=("vision",)),
        Case(vision_pp=2, pp=3, part=True, sequences=1, ranks=((1, 2), (0, 1, 2))),
    ],
    "31B": [
        Case(vision=4, packing=True),
        Case(vision=3, dp=2, packing=True, sequences=1),
        Case(vision=2, tp=2, cp=2, sp=True, packing=True),
        Case(vision=2, tp=2, cp=2, sp=True),
        Case(vision_tp=2, tp=4, sp=True, packing=True),
        Case(tp=2, pp=2, sp=True, packing=True, sequences=1),
        Case(cp=2, pp=3, packing=True, sequences=1),
        Case(vision=2, dp=2, pp=3, sequences=1),
        Case(vision=2, pp=4, packing=True, sequences=1),
        Case(colocated=True, dp=2, pp=4, sequences=1, packing=True),
        Case(colocated=True, dp=2, cp=2, pp=2, sequences=1, packing=True),
        Case(vision=1, tp=2, pp=3, sp=True, checkpointing="full", frozen=("language",), sequences=1),
        Case(vision=2, vision_pp=2, tp=2, pp=2, sp=True, packing=True, sequences=1),
        Case(vision=2, tp=2, pp=2, sp=True, packing=True, ranks=((0, 2), (0, 1, 2, 3))),
        Case(vision_tp=2, cp=2, pp=3, packing=True, sequences=1, ranks=((0, 1), (0, 1, 2, 3, 4, 5))),
    ],
    "26B-A4B": [
        Case(vision=3, dp=2, ep=2, sequences=1),
        Case(cp=2, ep=2, pp=2, packing=True, sequences=1),
        Case(vision=2, tp=2, cp=2, ep=2, sp=True, packing=True),
        Case(colocated=True, dp=2, tp=2, pp=2, ep=2, sp=True, packing=True, sequences=1),
        Case(colocated=True, dp=2, cp=2, pp=2, ep=4, sequences=1, checkpointing="full"),
        Case(vision=2, dp=2, pp=3, ep=2, sequences=1),
        Case(vision=2, vision_tp=2, dp=4, ep=4, sequences=1, frozen=("vision tower",)),
        Case(colocated=True, vision_pp=2, dp=2, pp=2, ep=2, sequences=1, packing=True),
        Case(vision=2, dp=2, pp=2, ep=2, sequences=1, ranks=((3, 4), (0, 1, 2, 3))),
    ],
    "E4B with sounds": [
        Case(vision=3, audio=1, dp=2, sequences=1),
        Case(vision=1, audio=3, dp=2, sequences=1),
        Case(vision=2, audio=2, tp=2, pp=2, sp=True, sequences=1),
        Case(vision=1, audio=2, cp=2, pp=2, packing=True, sequences=1),
        Case(vision_tp=2, audio=1, audio_tp=2, tp=2, cp=2, sp=True, packing=True),
        Case(audio=2, dp=3, frozen=("vision tower", "audio")),
        Case(audio=2, dp=2, sequences=1, frozen=("audio tower", "language")),
        Case(colocated=True, vision_tp=2, audio=1, dp=2, cp=2, pp=2, part=True, sequences=1, packing=True),
        Case(colocated=True, audio=1, audio_tp=2, tp=2, pp=3, sp=True, part=True),
        Case(vision_pp=2, audio=1, audio_pp=2, tp=2, pp=2, sp=True, sequences=1),
        Case(
            vision=2, vision_tp=2, audio=2, dp=2, tp=2, sp=True, sequences=1, ranks=((0, 1, 2, 3), (4, 5), (0, 1, 2, 3))
        ),
        Case(vision=2, audio=1, audio_tp=2, dp=2, pp=2, sequences=1, ranks=((0, 1), (0, 1), (2, 3, 4, 5))),
        Case(
            vision=2, audio_pp=2, audio=1, cp=2, packing=True, ranks=((0, 1), (2, 3), (1, 2)), frozen=("audio tower",)
        ),
    ],
    "31B, images in one sample": [
        Case(vision=3, dp=4, sequences=1),
        Case(vision=2, dp=2, cp=2, pp=1, sequences=1, packing=True),
        Case(vision=2, vision_tp=2, dp=2, pp=2, sequences=1),
        Case(colocated=True, dp=4, pp=2, sequences=1),
        Case(vision_pp=2, dp=4, sequences=1),
    ],
    "31B of eight layers": [Case(pp=7, sequences=1), Case(colocated=True, vision_tp=2, vision_pp=2, pp=8, sequences=7)],
    "E2B, text alone": [
        Case(vision=3, dp=2, sequences=1),
        Case(tp=2, cp=2, sp=True, packing=True, frozen=("vision",)),
        Case(colocated=True, dp=2, tp=2, pp=2, sp=True, sequences=1),
    ],
}
Table = dict[str, list[Case]]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Prepared]:
    folders = {name: tmp_path_factory.mktemp(name.replace(",", "").replace(" ", "_")) for name in MODELS}
    return {name: prepare(folders[name], write) for name, write in MODELS.items()}


def check_table(table: Table, world: int, models: dict[str, Prepared], timeout: float) -> None:
    rows = [(case, models[model]) for model, cases in table.items() for case in cases if case.world == world]
    check(rows, timeout=timeout)


def worlds(table: Table) -> list[int]:
    return sorted({case.world for cases in table.values() for case in cases})


@pytest.mark.parametrize("world", worlds(QUICK))
def test_quick_cover(world: int, models: dict[str, Prepared]) -> None:
    check_table(QUICK, world, models, timeout=280)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("world", worlds(COMPLETE))
def test_complete_table(world: int, models: dict[str, Prepared]) -> None:
    check_table(COMPLETE, world, models, timeout=3500)


def test_steps_hold_the_media_that_their_models_are_for(models: dict[str, Prepared]) -> None:
    images = {name: sorted(map(len, prepared.media)) for name, prepared in models.items()}
    assert images["E2B"] == [0, 0, 0, 1, 1, 2, 3]
    assert images["31B, images in one sample"] == [0, 0, 0, 0, 0, 0, 3]
    assert images["E2B, text alone"] == [0] * 7
    assert {("image", "image"), ("audio", "audio"), ("audio", "image")} <= {*models["E4B with sounds"].media}
