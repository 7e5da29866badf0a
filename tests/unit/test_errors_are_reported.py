"""Errors are printed once per host, by local rank 0 or, after `PATIENCE` seconds, by another rank."""

import subprocess
import sys
import time

import pytest

from mimo_gemma4 import errors
from mimo_gemma4.errors import ConfigError, report_error

RANK = "from mimo_gemma4.errors import ConfigError, report_error; report_error(ConfigError('`a.b` is 3'))"


def test_local_rank_0_prints_at_once_and_torchrun_ends_the_others_before_they_print():
    ranks = [
        subprocess.Popen([sys.executable, "-c", RANK], env={"LOCAL_RANK": rank}, stderr=subprocess.PIPE, text=True)
        for rank in ("1", "0")
    ]
    other, first = ranks
    assert first.communicate()[1] == "\nConfigError: `a.b` is 3\n\n"
    other.terminate()  # as torchrun does
    assert other.communicate()[1] == "" and other.returncode < 0


def test_another_rank_prints_if_it_still_runs_after_the_patience(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    waited: list[float] = []
    monkeypatch.setattr(time, "sleep", waited.append)
    monkeypatch.setenv("LOCAL_RANK", "3")
    report_error(ConfigError("`a.b` is 3"))
    assert capsys.readouterr().err == "\nConfigError: `a.b` is 3\n\n" and waited == [errors.PATIENCE]
