"""Balancing lanes and mixing sources change who works on what, never what a step learns."""

from pathlib import Path

import pytest

from tests.dist.harness import run_ranks
from tests.e2e.training_runs import step_records, train_on_rank, write_config
from tests.shard_maker import chat, jpeg, write_shard


def write_sources(folder: Path) -> dict[str, dict[str, object]]:
    """Short answers, and a few long ones with several images, three to one."""
    short, long = {}, {}
    for number in range(11):
        short[f"short-{number}.json"] = chat("?" * (number % 5), "a" * (1 + number % 3), "image")
        short[f"short-{number}.0.jpg"] = jpeg(48, 48, number)
    for number in range(3):
        long[f"long-{number}.json"] = chat("?" * 150, "b" * 40, "image", "image")
        long |= {f"long-{number}.{item}.jpg": jpeg(96, 48, 20 + item) for item in range(2)}
    return {
        "short": {"shards": str(write_shard(folder / "short.tar", short)), "weight": 3.0},
        "long": {"shards": str(write_shard(folder / "long.tar", long)), "weight": 1.0},
    }


def train(folder: Path, name: str, layout: dict, ranks: int) -> list[dict]:
    config = write_config(
        folder,
        folder,
        layout=layout,
        run={"dir": str(folder / name)},
        data={"train": write_sources(folder), "packing": True},
        train={"steps": 3, "global_batch_size": 8, "microbatch_size": 1},
    )
    outcomes = run_ranks(ranks, train_on_rank, [config])
    assert all(outcome.error is None for outcome in outcomes), outcomes
    return step_records(folder / name)


def test_three_balanced_lanes_learn_what_one_lane_learns(tmp_path: Path) -> None:
    """Sums in another order differ by a few fp32 roundings: the project's 1e-5, more for norms after some steps."""
    alone = train(tmp_path, "alone", {"vision": {"ranks": 1}, "language": {"ranks": 1}}, 2)
    lanes = train(tmp_path, "lanes", {"vision": {"ranks": 2}, "language": {"ranks": 3}}, 5)
    for one, several in zip(alone, lanes, strict=True):
        assert several["loss"] == pytest.approx(one["loss"], rel=1e-5)
        assert several["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-4)
        assert (several["tokens"], several["loss_tokens"]) == (one["tokens"], one["loss_tokens"])
        assert one["imbalance"]["language"] == {"before": 1.0, "after": 1.0}
        for module in ("language", "vision"):
            assert several["imbalance"][module]["after"] <= several["imbalance"][module]["before"]
    assert max(record["imbalance"]["language"]["before"] for record in lanes) > 1.3
