"""`profile.steps` traces the named steps on every rank, on one clock; the timeline command draws them."""

import json
from collections import Counter
from pathlib import Path

import pytest

from mimo_gemma4.timeline import Bar, main, read_traces, select_step
from tests.dist.harness import run_ranks
from tests.e2e.training_runs import train_on_rank, write_config
from tests.vlm_reference import write_shards

MICROBATCHES = 3


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Vision on one rank, two language stages; steps 1, 3 and 4 of 4 are traced."""
    folder = tmp_path_factory.mktemp("profile")
    layout = {"vision": {"ranks": 1}, "language": {"ranks": 2, "pp": 2}}
    train = {"steps": 4, "global_batch_size": 6, "microbatch_size": 2}
    config = write_config(folder, write_shards(folder), layout=layout, train=train)
    outcomes = run_ranks(3, train_on_rank, [config, "profile.steps=[1,3,4]"])
    assert all(outcome.error is None for outcome in outcomes), outcomes
    return folder / "run"


def of_action(bars: list[Bar], action: str) -> dict[int, Bar]:
    return {bar.name.number: bar for bar in bars if bar.name.action == action}


def test_a_trace_of_every_rank_names_its_modules(run: Path):
    names = {}
    for rank in range(3):
        trace = json.loads((run / "profile" / f"rank-{rank}.json").read_bytes())
        names[rank] = {e["args"]["name"] for e in trace["traceEvents"] if e["name"] == "process_name"}
        assert trace["mimo"]["rank"] == rank
    assert names == {0: {"rank 0: vision"}, 1: {"rank 1: language pp0"}, 2: {"rank 2: language pp1"}}
    assert trace["mimo"]["modules"] == {"language": {"tp": 0, "cp": 0, "dp": 0, "pp": 1}}


def test_the_named_steps_hold_every_action_of_the_schedule(run: Path):
    traces = read_traces(run / "profile")
    for step in (1, 3, 4):
        _, (vision, first, last) = select_step(traces, step)
        counted = [Counter(bar.name.action for bar in part.bars) for part in (vision, first, last)]
        once = {"load": 1, "reduce_gradients": 1, "reduce_results": 1, "optimizer_step": 1}
        pictures = counted[0]["encode"]  # some microbatches are text alone
        assert 1 <= pictures <= MICROBATCHES
        moves = ("send_soft_tokens", "post_recv_soft_token_gradients", "recv_soft_token_gradients")
        assert counted[0] == once | dict.fromkeys(("encode", *moves, "encoder_backward"), pictures)
        assert counted[1].items() >= (once | {"forward": MICROBATCHES, "send_forward": MICROBATCHES}).items()
        assert counted[2].items() >= (once | {"backward": MICROBATCHES, "send_backward": MICROBATCHES}).items()


def test_clocks_agree(run: Path):
    """What a stage sends arrives after it was made and before the next stage works on it."""
    _, (_, first, last) = select_step(read_traces(run / "profile"), 4)
    made, used = of_action(first.bars, "forward"), of_action(last.bars, "forward")
    assert made.keys() == used.keys() == set(range(MICROBATCHES))
    for number, bar in made.items():
        assert bar.end < used[number].begin


def test_the_command_draws_and_prints(run: Path, capsys: pytest.CaptureFixture[str]):
    assert main([str(run), "--step", "3"]) == 0
    assert (run / "profile" / "timeline-3.png").read_bytes().startswith(b"\x89PNG")
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("step 3: ")
    assert [line.partition("  ")[0] for line in lines[2:5]] == [
        "rank 0: vision",
        "rank 1: language pp0",
        "rank 2: language pp1",
    ]
