"""A configuration that is saved and loaded again is equal, whatever was set; arguments win over the file, in order."""

from dataclasses import is_dataclass
from pathlib import Path

import pytest
from omegaconf import Container

from mimo_gemma4.config import Config, ModuleConfig, load_config, print_config, save_config

BASE = """
layout:
  vision: {ranks: 2}
  language: {ranks: [2, 3], tp: 2}
  placement: disjoint
data:
  train: {shards: ["a.tar", "b.tar"]}
  seq_length: 64
modules:
  vision: {freeze: ["layers.0.*"], lr: 1}
"""


@pytest.fixture
def base(tmp_path: Path) -> Path:
    path = tmp_path / "base.yaml"
    path.write_text(BASE)
    return path


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["modules.vision.freeze=tower", "data.valid.shards=c-{0..3}.tar", "optim.lr=0"],
        ["modules.language.freeze=true", "optim.clip_grad=null", "checkpoint.every=null"],
        ["layout.audio.ranks=1", "layout.placement=colocated", "run.dir=elsewhere", "--train.steps=7"],
    ],
)
def test_saved_and_loaded_again(base: Path, tmp_path: Path, arguments: list[str]):
    config = load_config([f"config={base}", *arguments])
    saved = tmp_path / "other_name.yaml"
    save_config(config, saved)
    assert load_config([f"config={saved}"]) == config


def test_arguments_win_in_order(base: Path):
    config = load_config([f"config={base}", "train.steps=1", "data.seq_length=128", "train.steps=2"])
    assert (config.train.steps, config.data.seq_length) == (2, 128)
    assert config.data.train.shards == ["a.tar", "b.tar"]


def test_modules_keep_the_order_in_which_they_are_written(base: Path, tmp_path: Path):
    config = load_config([f"config={base}", "layout.audio.ranks=1"])
    assert list(config.layout.modules) == ["vision", "language", "audio"]
    save_config(config, tmp_path / "saved.yaml")
    assert list(load_config([f"config={tmp_path / 'saved.yaml'}"]).layout.modules) == ["vision", "language", "audio"]


def test_values_have_the_types_of_their_fields(base: Path):
    config = load_config([f"config={base}", "optim.lr=1", "optim.eps=1e-6"])
    assert type(config.optim.lr) is float and config.optim.eps == 1e-6
    assert type(config.modules["vision"].lr) is float
    assert config.layout.modules["language"].ranks == [2, 3]
    assert config.module("vision").freeze == ["layers.0.*"]
    assert config.module("language") == ModuleConfig()


def test_no_omegaconf_container_leaks(base: Path):
    def check(value: object) -> None:
        assert not isinstance(value, Container)
        if is_dataclass(value):
            value = vars(value)
        if isinstance(value, dict):
            for item in value.values():
                check(item)
        if isinstance(value, list):
            for item in value:
                check(item)

    check(load_config([f"config={base}"]))


def test_run_dir_is_named_after_the_file(base: Path):
    assert load_config([f"config={base}"]).run.dir == "runs/base"


def test_files_are_found_under_configs_of_the_working_directory_first(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    assert load_config(["config=quickstart.yaml"]).model.preset == "gemma4_tiny"
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "quickstart.yaml").write_text(BASE)
    monkeypatch.chdir(tmp_path)
    assert load_config(["config=quickstart.yaml"]).data.seq_length == 64


@pytest.mark.parametrize("name", ["quickstart.yaml", "vlm.yaml", "text.yaml"])
def test_shipped_configurations_load(name: str):
    assert isinstance(load_config([f"config={name}"]), Config)


def test_printed_text_is_the_saved_file(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    config = load_config([f"config={base}"])
    print_config(config)
    save_config(config, tmp_path / "saved.yaml")
    assert capsys.readouterr().out.strip() == (tmp_path / "saved.yaml").read_text().strip()
