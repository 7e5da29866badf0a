"""A layout that cannot be placed is refused with the numbers that disagree and the key to change."""

import pytest

from mimo_gemma4.config import LayoutConfig
from mimo_gemma4.distributed.layout import ModuleLayout, build_layout
from mimo_gemma4.errors import LayoutError

VISION = {"vision": ModuleLayout(2)}


@pytest.mark.parametrize(
    ("modules", "world_size", "placement", "words"),
    [
        (VISION, 2, "disjoint", ["`language`", "vision"]),
        ({}, 2, "disjoint", ["`language`", "no module"]),
        (
            VISION | {"language": ModuleLayout(4)},
            4,
            "disjoint",
            [
                "6 ranks (vision 2 + language 4)",
                "4 were started",
                "2 more would be needed",
                "torchrun --nproc-per-node 6 train_mimo.py config=",
            ],
        ),
        (
            VISION | {"language": ModuleLayout(4)},
            9,
            "disjoint",
            ["3 would hold no module", "`layout.language.ranks`", "torchrun --nproc-per-node 6 train_mimo.py config="],
        ),
        ({"language": ModuleLayout(3)}, 4, "disjoint", ["3 ranks", "4 were started", "--nproc-per-node 3"]),
        (VISION | {"language": ModuleLayout()}, 4, "disjoint", ["`layout.language.ranks` is missing", "colocated"]),
        (
            {"vision": ModuleLayout([0, 1]), "language": ModuleLayout([1, 2])},
            4,
            "disjoint",
            ["rank 1", "`layout.vision.ranks`", "`layout.language.ranks`", "mixed", "colocated"],
        ),
        ({"vision": ModuleLayout([0, 4]), "language": ModuleLayout([1, 2])}, 4, "disjoint", ["rank 4", "0 to 3"]),
        ({"language": ModuleLayout([1, 0])}, 2, "disjoint", ["[1, 0]", "ascending", "[0, 1]"]),
        ({"language": ModuleLayout([0, 0])}, 2, "disjoint", ["[0, 0]", "once"]),
        ({"language": ModuleLayout([])}, 1, "disjoint", ["`layout.language.ranks`", "empty"]),
        ({"language": ModuleLayout(0)}, 1, "disjoint", ["`layout.language.ranks` is 0"]),
        (
            {"language": ModuleLayout(6, tp=4)},
            6,
            "disjoint",
            ["6 ranks", "tp 4 * cp 1 * pp 1 = 4", "4 or 8", "`layout.language.tp`"],
        ),
        ({"language": ModuleLayout(3, tp=2, cp=2)}, 3, "disjoint", ["3 ranks", "cp 2", "to 4"]),
        ({"language": ModuleLayout(5, pp=3)}, 5, "disjoint", ["5 ranks", "pp 3", "3 or 6", "`layout.language.pp`"]),
        (
            {"vision": ModuleLayout(3, pp=2), "language": ModuleLayout(1)},
            4,
            "disjoint",
            ["`layout.vision.ranks` to 2 or 4"],
        ),
        (
            {"language": ModuleLayout(8, tp=2, cp=2, ep=3)},
            8,
            "disjoint",
            ["`layout.language.ep` is 3", "does not divide dp 2 * cp 2 = 4"],
        ),
        (
            {"vision": ModuleLayout(2, ep=2), "language": ModuleLayout(2)},
            4,
            "disjoint",
            ["`layout.vision.ep` is 2", "no experts"],
        ),
        (
            {"vision": ModuleLayout(2, tp=2, sequence_parallel=True), "language": ModuleLayout(2)},
            4,
            "disjoint",
            ["`layout.vision.sequence_parallel` is true", "only the language model"],
        ),
        (
            {"vision": ModuleLayout(2, pp=2, part_shared_key_values=True), "language": ModuleLayout(2)},
            4,
            "disjoint",
            ["`layout.vision.part_shared_key_values` is true", "only the language model"],
        ),
        (
            VISION | {"language": ModuleLayout(1), "pixels": ModuleLayout(1, reads="audio")},
            4,
            "disjoint",
            ["`layout.pixels.reads` is audio", "encoders here: vision"],
        ),
        (
            VISION | {"language": ModuleLayout(1, reads="vision")},
            3,
            "disjoint",
            ["`layout.language.reads` is vision", "only a decoder"],
        ),
        (
            {"language": ModuleLayout(1), "pixels": ModuleLayout(1, reads="pixels")},
            2,
            "disjoint",
            ["`layout.pixels.reads` is pixels", "encoders here: none"],
        ),
        (
            VISION | {"language": ModuleLayout(1), "pixels": ModuleLayout(2, cp=2, reads="vision")},
            5,
            "disjoint",
            ["`layout.pixels.cp` is 2", "a decoder's items"],
        ),
        (
            VISION | {"language": ModuleLayout()},
            4,
            "colocated",
            ["`layout.vision.ranks` asks for 2", "4 were started", "colocated", "--nproc-per-node 2"],
        ),
        (
            {"vision": ModuleLayout([0, 1]), "audio": ModuleLayout(2), "language": ModuleLayout([1, 2, 3])},
            7,
            "mixed",
            ["6 ranks", "vision 2 + audio 2 + language 3 - 1 shared", "7 were started", "1 would hold no module"],
        ),
        (
            {"vision": ModuleLayout(2), "language": ModuleLayout([0, 1])},
            2,
            "mixed",
            ["4 ranks", "2 were started", "2 more would be needed"],
        ),
        ({"vision": ModuleLayout([0]), "language": ModuleLayout()}, 2, "mixed", ["`layout.language.ranks` is missing"]),
        (
            {"vision": ModuleLayout([1, 4]), "language": ModuleLayout([0, 1, 2])},
            4,
            "mixed",
            ["`layout.vision.ranks`", "rank 4", "0 to 3"],
        ),
        (
            {"vision": ModuleLayout([0, 5]), "language": ModuleLayout()},
            2,
            "colocated",
            ["`layout.vision.ranks`", "rank 5", "0 to 1"],
        ),
    ],
)
def test_refused(modules: dict, world_size: int, placement: str, words: list[str]) -> None:
    with pytest.raises(LayoutError) as caught:
        build_layout(LayoutConfig(modules, placement=placement), world_size)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("hosts", "modules", "words"),
    [
        (
            [4, 4],
            {"vision": ModuleLayout(2), "language": ModuleLayout(6, tp=6)},
            ["2-7", "host 0 has ranks 0-3", "host 1"],
        ),
        ([3, 5], {"vision": ModuleLayout(2), "language": ModuleLayout(6, tp=2)}, ["2-3", "0-2", "3-7"]),
        (
            [3, 5],
            {"vision": ModuleLayout([0, 4], tp=2), "language": ModuleLayout(6)},
            ["0,4", "`layout.vision.tp` from 2"],
        ),
    ],
)
def test_tensor_parallel_over_hosts_is_refused_unless_allowed(
    hosts: list[int], modules: dict, words: list[str]
) -> None:
    with pytest.raises(LayoutError, match="allow_tp_across_hosts") as caught:
        build_layout(modules, 8, hosts)
    for word in words:
        assert word in str(caught.value)
    build_layout(LayoutConfig(modules, allow_tp_across_hosts=True), 8, hosts)
