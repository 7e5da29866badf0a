"""One global step with sounds, alone or beside images, has the loss and the gradients of transformers in one process.

As `test_step_gradient_parity`, with layouts of audio and language and of all three modules.
"""

from functools import partial

import pytest

from tests.dist.train.step_parity import Case, check, prepare, write_run
from tests.vlm_reference import SOUNDS, SOUNDS_AND_IMAGES

WITH_SOUNDS = [
    Case(vision=0, audio=1, colocated=True),
    Case(vision=0, audio=2, dp=2, sequences=1),
    Case(vision=0, audio=1, audio_tp=2, tp=2, sp=True, packing=True),
    Case(vision=0, audio=1, audio_pp=2, sequences=1),
]
WITH_SOUNDS_AND_IMAGES = [
    Case(audio=1, colocated=True),
    Case(audio=2, cp=2, packing=True),
    Case(vision_tp=2, audio=1, audio_tp=2, dp=2, sequences=1),
    Case(vision_pp=2, audio=1, audio_pp=2, pp=2, sequences=1, colocated=True),
    Case(vision=2, audio=1, tp=2, sp=True, ranks=((0, 1), (2,), (0, 1)), sequences=1),
    Case(vision_tp=2, audio=2, pp=2, ranks=((1, 2), (0, 1), (2, 3)), sequences=1),
]


def test_sounds(tmp_path_factory: pytest.TempPathFactory) -> None:
    sounds = prepare(tmp_path_factory.mktemp("sounds"), partial(write_run, media=SOUNDS, audio=True))
    assert {*sounds.media} == {(), ("audio",)}
    check((case, sounds) for case in WITH_SOUNDS)


def test_sounds_and_images(tmp_path_factory: pytest.TempPathFactory) -> None:
    both = prepare(tmp_path_factory.mktemp("both"), partial(write_run, media=SOUNDS_AND_IMAGES, audio=True))
    assert {" ".join(dict.fromkeys(types)) for types in both.media} == {"", "audio", "image", "audio image"}
    check((case, both) for case in WITH_SOUNDS_AND_IMAGES)
