"""What ends a run is told once a host, also where torchrun ends the other ranks, or the first has not failed."""

import subprocess
import sys
import time

import pytest

from mimo_gemma4 import errors
from mimo_gemma4.errors import ConfigError, tell

RANK = "from mimo_gemma4.errors import ConfigError, tell; tell(ConfigError('`a.b` is 3'))"


def test_the_first_rank_speaks_at_once_and_leaves_and_the_others_are_ended_in_silence():
    ranks = [
        subprocess.Popen([sys.executable, "-c", RANK], env={"LOCAL_RANK": rank}, stderr=subprocess.PIPE, text=True)
        for rank in ("1", "0")
    ]
    other, first = ranks
    assert first.communicate()[1] == "\nConfigError: `a.b` is 3\n\n"
    other.terminate()  # as torchrun does
    assert other.communicate()[1] == "" and other.returncode < 0


def test_another_rank_speaks_if_it_is_not_ended(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    waited: list[float] = []
    monkeypatch.setattr(time, "sleep", waited.append)
    monkeypatch.setenv("LOCAL_RANK", "3")
    tell(ConfigError("`a.b` is 3"))
    assert capsys.readouterr().err == "\nConfigError: `a.b` is 3\n\n" and waited == [errors.PATIENCE]
