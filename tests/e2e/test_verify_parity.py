"""`verify hf-parity` passes for every kind of layout on a right model, and fails for a wrong one."""

from pathlib import Path

import pytest

from mimo_gemma4.verify import __main__ as verify
from mimo_gemma4.verify.__main__ import main
from tests.dist.harness import run_ranks
from tests.vlm_reference import write_model, write_shards

LANGUAGE = "language: {ranks: 4, tp: 2, cp: 2, sequence_parallel: true}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("parity")
    write_model(folder / "model")
    (folder / "data").mkdir()
    write_shards(folder / "data")
    for name, layout in {
        "vlm": "vision: {ranks: 1}, " + LANGUAGE,
        "text": "language: {ranks: 2, tp: 2}",
        "lanes": "vision: {ranks: 1}, language: {ranks: 2}",
        "stages": "vision: {ranks: 1}, language: {ranks: 2, pp: 2}",
    }.items():
        (folder / f"{name}.yaml").write_text(
            f"model: {{hf_path: {folder}/model, precision: fp32}}\n"
            f"layout: {{{layout}}}\n"
            f"data: {{train: {{shards: {folder}/data/train-000000.tar}}, seq_length: 512}}\n"
        )
    return folder


def check(rank: int, arguments: list[str], error: float = 0.0) -> int:
    build_model = verify.build_model

    def build_wrong_model(setup):  # noqa: ANN001, ANN202
        model = build_model(setup)
        for encoder in model.encoders.values():
            encoder.projector_parameters()[0].data *= 1 + error
        if model.language is not None:
            model.language.layers[0].layer_scalar *= 1 + error
        return model

    verify.build_model = build_wrong_model
    return main(["hf-parity", *arguments])


@pytest.mark.parametrize(
    ("ranks", "config", "arguments"),
    [
        (5, "vlm", ["--samples", "3"]),
        (3, "lanes", ["--samples", "4"]),
        (3, "stages", ["--samples", "2"]),
        (2, "text", ["--random-tokens", "33", "--samples", "2"]),
        (2, "text", ["--random-tokens", "40", "model.precision=bf16"]),
    ],
)
def test_a_right_model_passes(folder: Path, ranks: int, config: str, arguments: list[str]) -> None:
    assert run_ranks(ranks, check, [f"config={folder}/{config}.yaml", *arguments]) == [0] * ranks


@pytest.mark.parametrize("ranks, config, arguments", [(3, "lanes", []), (2, "text", ["--random-tokens", "32"])])
def test_a_wrong_model_fails(folder: Path, ranks: int, config: str, arguments: list[str]) -> None:
    assert run_ranks(ranks, check, [f"config={folder}/{config}.yaml", *arguments], 0.02) == [1] * ranks


def test_without_a_directory_there_is_nothing_to_compare_with(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["hf-parity", "config=quickstart.yaml"]) == 1
    assert "model.hf_path" in capsys.readouterr().err
