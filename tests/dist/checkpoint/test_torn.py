"""A checkpoint is whole or absent: whatever moment its writing ends at, a run resumes from the one before."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from mimo_gemma4.checkpoint import files
from mimo_gemma4.checkpoint import save_load as checkpoint
from mimo_gemma4.config import OptimConfig
from mimo_gemma4.errors import CheckpointError
from mimo_gemma4.optim.module_optimizer import ModuleOptimizer
from tests.dist.harness import run_ranks
from tests.dist.optim.toy_modules import ToyModule, toy_world

STATE = {"step": 0, "seed": 1234}


def build() -> dict[str, ModuleOptimizer]:
    groups = toy_world({"language": (tuple(range(dist.get_world_size())), 1)})[1].modules["language"]
    return {"language": ModuleOptimizer(ToyModule("language", groups.tp), groups, OptimConfig())}


def save_steps(rank: int, folder: Path, steps: list[int], keep: int | None) -> None:
    modules = build()
    for step in steps:
        checkpoint.save(folder, step, modules, STATE, host=dist.group.WORLD, keep=keep)


@pytest.fixture(scope="module")
def two_checkpoints(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    run_ranks(2, save_steps, folder, [100, 200], None)
    return folder


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def lose_marker(path: Path) -> None:
    (path / files.MARKER).unlink()


def truncate_marker(path: Path) -> None:
    marker = path / files.MARKER
    marker.write_bytes(marker.read_bytes()[:-20])


def truncate_file(path: Path) -> None:
    file = path / "rank_00001.safetensors"
    file.write_bytes(file.read_bytes()[:-1])


def lose_file(path: Path) -> None:
    (path / "rank_00001.safetensors").unlink()


def not_renamed(path: Path) -> None:
    path.rename(path.with_name(path.name + ".tmp"))


@pytest.mark.parametrize("damage", [lose_marker, truncate_marker, truncate_file, lose_file, not_renamed])
def test_torn_checkpoint_is_never_chosen(two_checkpoints, tmp_path, damage):
    folder = shutil.copytree(two_checkpoints, tmp_path / "checkpoints")
    assert files.latest(folder) == folder / "step_00000200"
    damage(folder / "step_00000200")
    assert files.latest(folder) == folder / "step_00000100"
    damage(folder / "step_00000100")
    assert files.latest(folder) is None


def refused(rank: int, folder: Path) -> list[str]:
    modules, messages = build(), []
    for call in (
        lambda: checkpoint.resolve(str(folder / "step_00000200"), folder, host=dist.group.WORLD),
        lambda: checkpoint.load(folder / "step_00000200", modules, host=dist.group.WORLD),
        lambda: checkpoint.resolve(str(folder / "step_00000300"), folder, host=dist.group.WORLD),
        lambda: checkpoint.load(folder / "step_00000100", modules, host=dist.group.WORLD),
    ):
        with pytest.raises(CheckpointError) as caught:
            call()
        messages.append(str(caught.value))
    assert checkpoint.resolve("auto", folder, host=dist.group.WORLD) == folder / "step_00000100"
    assert checkpoint.resolve("never", folder, host=dist.group.WORLD) is None
    return messages


def test_errors_say_what_is_damaged(two_checkpoints, tmp_path):
    folder = shutil.copytree(two_checkpoints, tmp_path / "checkpoints")
    truncate_file(folder / "step_00000200")
    flipped = folder / "step_00000100" / "rank_00000.safetensors"
    content = bytearray(flipped.read_bytes())
    content[-1] ^= 1
    flipped.write_bytes(content)
    for torn, torn_again, absent, changed in run_ranks(2, refused, folder):
        assert "checkpoint.resume" in torn and "rank_00001.safetensors has" in torn and torn == torn_again
        assert "there is no such folder" in absent
        assert "rank_00000.safetensors was changed" in changed


def killed_while_writing(rank: int, folder: Path, phase: str) -> None:
    modules = build()

    def die(*arguments):
        raise KeyboardInterrupt  # as from a signal: no handler of the checkpoint code sees it

    setattr(checkpoint, phase, die)
    try:
        checkpoint.save(folder, 300, modules, STATE, host=dist.group.WORLD)
    except KeyboardInterrupt:
        return
    raise AssertionError("the save went on")


@pytest.mark.parametrize("phase", ["_write_rank", "digest", "flush"])
def test_writing_that_dies_leaves_the_previous_one_and_can_be_repeated(two_checkpoints, tmp_path, phase):
    folder = shutil.copytree(two_checkpoints, tmp_path / "checkpoints")
    run_ranks(1, killed_while_writing, folder, phase)
    assert "step_00000300.tmp" in names(folder)
    assert files.latest(folder) == folder / "step_00000200"
    run_ranks(1, save_steps, folder, [300], None)
    assert files.latest(folder) == folder / "step_00000300"
    assert names(folder) == ["step_00000100", "step_00000200", "step_00000300"]


def failing(rank: int, folder: Path) -> str:
    modules = build()
    if rank == 1:

        def full(*arguments, **options):
            raise OSError(28, "No space left on device")

        checkpoint.save_file = full
    with pytest.raises(CheckpointError) as caught:
        checkpoint.save(folder, 300, modules, STATE, host=dist.group.WORLD)
    return str(caught.value)


def test_full_disk_on_one_rank_is_an_error_on_all(two_checkpoints, tmp_path):
    folder = shutil.copytree(two_checkpoints, tmp_path / "checkpoints")
    for message in run_ranks(2, failing, folder):
        assert "rank 1" in message and "No space left" in message
    assert files.latest(folder) == folder / "step_00000200"


def test_newest_are_kept_by_time_of_writing_not_by_step(tmp_path):
    run_ranks(1, save_steps, tmp_path, [10, 20, 30, 40], 2)
    assert names(tmp_path) == ["step_00000030", "step_00000040"]
    run_ranks(1, save_steps, tmp_path, [20, 30], 2)  # the run went back to step 10
    assert names(tmp_path) == ["step_00000020", "step_00000030"]
    assert files.latest(tmp_path) == tmp_path / "step_00000030"
    assert json.loads((tmp_path / "step_00000030" / files.MARKER).read_text())["trainer"] == STATE


def random_stream(rank: int, folder: Path, resume: bool) -> list[float]:
    modules = build()
    torch.manual_seed(rank + (1000 if resume else 0))
    if resume:
        checkpoint.load(folder / "step_00000001", modules, host=dist.group.WORLD)
    else:
        checkpoint.save(folder, 1, modules, STATE, host=dist.group.WORLD)
    return torch.rand(3).tolist()


def test_random_numbers_continue(tmp_path):
    first = run_ranks(2, random_stream, tmp_path, False)
    assert first[0] != first[1]
    assert run_ranks(2, random_stream, tmp_path, True) == first
