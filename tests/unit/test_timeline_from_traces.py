"""The timeline shows from traces what each rank did: on a GPU by its kernels, else by the host's spans."""

import gzip
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from mimo_gemma4.config import LayoutConfig, ModuleLayout
from mimo_gemma4.distributed.layout import build_layout
from mimo_gemma4.distributed.platform import Platform
from mimo_gemma4.errors import ConfigError, DataError
from mimo_gemma4.timeline import main, rank_steps, read_traces, select_step, table
from mimo_gemma4.train.profiling import SpanName, Tracer, unrecorded, write_trace

BASE = 1_790_857_026_000_000_000
MS = 1000.0


def span(name: str, begin: float, end: float, cat: str = "user_annotation", **args: int) -> dict[str, Any]:
    """An event of a Chrome trace; times in ms."""
    event = {"ph": "X", "cat": cat, "name": name, "pid": 7, "tid": 7, "ts": begin * MS, "dur": (end - begin) * MS}
    return event | {"args": args}


def kernel(correlation: int, launched: float, begin: float, end: float) -> list[dict[str, Any]]:
    """A kernel of a GPU and its launch, from whatever thread."""
    launch = span("cudaLaunchKernel", launched, launched + 0.01, "cuda_runtime", correlation=correlation)
    return [launch | {"tid": 99}, span("kernel", begin, end, "kernel", correlation=correlation) | {"pid": 0, "tid": 20}]


def trace(rank: int, *events: dict[str, Any], base: int = BASE) -> dict[str, Any]:
    place = {"rank": rank, "label": f"rank {rank}: language", "modules": {"language": {}}}
    return {"traceEvents": [{"ph": "M", "name": "process_name"}, *events], "baseTimeNanoseconds": base, "mimo": place}


HOST = [
    span("trainer.step[5]", 0, 100),
    span("trainer.load[5]", 0, 10),
    span("language.forward[0]", 10, 40),
    span("language.recv_backward[0]", 40, 55),
    span("language.backward[0]", 55, 95),
    span("language.optimizer_step[5]", 95, 100),
    span("Optimizer.step#AdamW.step", 96, 99),
    span("trainer.step[6]", 100, 160),
    span("language.forward[0]", 110, 140),
]


def test_spans_of_the_host_where_there_is_no_device():
    steps = rank_steps(trace(3, *HOST))
    assert list(steps) == [5, 6]
    first = steps[5]
    assert (first.rank, first.begin) == (3, BASE / 1e9)
    actions = ["load", "forward", "recv_backward", "backward", "optimizer_step"]
    assert [bar.name.action for bar in first.bars] == actions
    shares = first.shares()
    expected = dict(forward=0.3, backward=0.4, optimizer=0.05, encode=0.0, busy=0.75, wait=0.25, hidden=0.0)
    assert shares == pytest.approx(expected, abs=1e-5)
    assert steps[6].shares()["busy"] == pytest.approx(0.5, abs=1e-5)


def test_kernels_decide_where_there_is_a_device():
    """The host is done with the forward pass after 3 ms, the device after 40; a transfer runs beside it."""
    events = [
        span("trainer.step[5]", 0, 10),
        span("vision.recv_soft_tokens[1]", 0, 1),
        span("language.forward[0]", 1, 3),
        span("language.backward[0]", 3, 9),
        span("language.send_backward[0]", 9, 10),
        *kernel(1, 0.5, 5, 30),
        *kernel(2, 1.5, 10, 20),
        *kernel(3, 2.5, 35, 40),
        *kernel(4, 5.0, 50, 105),
        *kernel(5, 11.0, 200, 300),  # launched after the step
    ]
    step = rank_steps(trace(0, *events))[5]
    origin = BASE / 1e9
    assert (step.begin - origin, step.end - origin) == pytest.approx((0.005, 0.105), abs=1e-6)
    assert [(bar.name.action, bar.kind) for bar in step.bars] == [
        ("recv_soft_tokens", "wait"), ("forward", "forward"), ("backward", "backward")
    ]  # fmt: skip
    expected = dict(forward=0.3, backward=0.55, busy=0.85, wait=0.15, hidden=0.2, encode=0.0, optimizer=0.0)
    assert step.shares() == pytest.approx(expected, abs=1e-5)


def test_ranks_of_different_bases_meet_on_one_clock(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    folder = tmp_path / "profile"
    folder.mkdir()
    write_trace(trace(0, *HOST), folder, 0)
    late = trace(10, *HOST[:-2], base=BASE + 20_000_000)  # 20 ms later, and without step 6
    (folder / "rank-10.json.gz").write_bytes(gzip.compress(json.dumps(late).encode()))
    traces = read_traces(folder)
    step, ranks = select_step(traces)
    assert step == 5
    assert ranks[1].begin - ranks[0].begin == pytest.approx(0.02, abs=1e-6)
    assert "step 5: 120.0 ms" in table(step, ranks)
    assert main([str(tmp_path), "--out", str(tmp_path / "picture.png")]) == 0
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")
    assert "rank 10: language     75.0%" in capsys.readouterr().out
    with pytest.raises(ConfigError, match="--step 6: the steps that all of the 2 ranks have traced are: 5"):
        select_step(traces, 6)


def test_without_matplotlib_the_table_is_printed_and_the_package_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setitem(sys.modules, "matplotlib.colors", None)
    (tmp_path / "profile").mkdir()
    write_trace(trace(0, *HOST), tmp_path / "profile", 0)
    assert main([str(tmp_path)]) == 1
    printed = capsys.readouterr()
    assert printed.out.startswith("step 6: ") and "rank 0: language" in printed.out
    assert "MissingPackageError" in printed.err and "'mimo-gemma4[plots]'" in printed.err


def test_what_is_no_trace_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert main([str(tmp_path)]) == 1
    assert "holds no traces: train with profile.steps" in capsys.readouterr().err
    (tmp_path / "rank-0.json").write_text('{"traceEvents": []}')
    with pytest.raises(DataError, match="rank-0.json is not a trace"):
        read_traces(tmp_path)


def test_a_large_trace_is_compressed_and_takes_the_place_of_a_small_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    write_trace(trace(0, *HOST), tmp_path, 0)
    assert [path.name for path in tmp_path.iterdir()] == ["rank-0.json"]
    monkeypatch.setattr("mimo_gemma4.train.profiling.COMPRESSED_FROM", 100)
    write_trace(trace(0, *HOST), tmp_path, 0)
    assert [path.name for path in tmp_path.iterdir()] == ["rank-0.json.gz"]
    assert list(rank_steps(read_traces(tmp_path)[0])) == [5, 6]


@pytest.mark.parametrize("name", [SpanName("vision", "encode", 12), SpanName("my-own.eyes", "encoder_backward", 0)])
def test_names_can_be_read_back(name: SpanName):
    assert SpanName.parse(str(name)) == name


@pytest.mark.parametrize("text", ["ProfilerStep#3", "Optimizer.step#AdamW.step", "gloo:send", "aten::add"])
def test_other_annotations_are_not_ours(text: str):
    assert SpanName.parse(text) is None


def test_nothing_is_recorded_in_other_steps(tmp_path: Path):
    layout = build_layout(LayoutConfig({"language": ModuleLayout()}), 1)
    tracer = Tracer((), tmp_path / "profile", layout, Platform.detect())
    with tracer.step(1):
        assert tracer.span("language", "forward", 0) is unrecorded("language", "forward", 0)
    assert not (tmp_path / "profile").exists()
