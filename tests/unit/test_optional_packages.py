"""Without an optional package, what needs it fails with an error that names package and extra; a run only warns."""

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from mimo_gemma4.data import digits, digits_and_tones
from mimo_gemma4.data.quickstart import ensure_shards
from mimo_gemma4.errors import MissingPackageError, optional_import
from mimo_gemma4.train.report import write_report


@pytest.fixture
def without_plots(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("matplotlib", "matplotlib.figure", "matplotlib.colors", "matplotlib.patches"):
        monkeypatch.setitem(sys.modules, module, None)


def test_an_import_error_names_purpose_package_and_extra() -> None:
    with (
        pytest.raises(MissingPackageError, match=r"^counting needs the package abacus, .*'mimo-gemma4\[beads\]'`$"),
        optional_import("abacus", extra="beads", purpose="counting"),
    ):
        import abacus_that_nobody_has  # noqa: F401


def test_an_installed_package_is_imported() -> None:
    with optional_import("json", extra="none", purpose="this test"):
        import json
    assert json.loads("3") == 3


@pytest.mark.parametrize("make_samples", [digits.make_samples, digits_and_tones.make_samples])
def test_quickstart_data_need_scikit_learn(make_samples, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(MissingPackageError, match=r"scikit-learn, .*'mimo-gemma4\[quickstart\]'"):
        make_samples()


def test_no_shard_is_written_without_scikit_learn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(MissingPackageError):
        ensure_shards("digits", tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("without_plots")
def test_a_run_ends_with_its_evaluation_and_one_warning(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n')
    (tmp_path / "eval.json").write_text(
        '{"step": 1, "loss": 2.5, "accuracy": 0.5, "items": 4, "per_modality": {"text": {"accuracy": 0.5, "items": 4}}}'
    )
    config = SimpleNamespace(run=SimpleNamespace(dir=str(tmp_path)), eval=SimpleNamespace(pictures=4))
    write_report(SimpleNamespace(config=config, evaluator=SimpleNamespace(answered=[], loader=None)))
    [message] = caplog.messages
    assert "the package matplotlib" in message and "'mimo-gemma4[plots]'" in message
    printed = capsys.readouterr().out
    assert "loss               2.5000" in printed and "50.0% of 4" in printed
    assert f"results: {tmp_path} (metrics.jsonl, checkpoints)" in printed
