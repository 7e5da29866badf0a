"""Time and bytes of the bridge against leaders that announce shapes and broadcast whole tensors, in one run.

    torchrun --nproc-per-node 4 benchmarks/bridge.py

A microbatch takes an encoder's soft tokens to the language ranks that hold them and their gradients back, in bf16. Both
ways take turns; a turn is several microbatches, one after the other, between two barriers. Before that their results
are compared. Bytes are counted by interception: those that reach a rank, of all messages of a microbatch, and those
among them that come from the other grid, which may be on another host. On a CPU (`--tiny`) sizes are tiny and times
mean nothing.
"""

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

import torch
import torch.distributed as dist
from leader_broadcast import LeaderBridge
from traffic import Traffic

from mimo_gemma4.data.manifest import Microbatch, PlannedMedia, PlannedSample, StepManifest
from mimo_gemma4.distributed.layout import Layout, ModuleGrid
from mimo_gemma4.distributed.platform import Platform, create_platform, destroy_distributed
from mimo_gemma4.distributed.process_groups import create_process_groups
from mimo_gemma4.model.bridge import Bridge
from mimo_gemma4.partition import sequence_multiple

WARM_UP, TIMED, ROUNDS = 3, 15, 4
DTYPE = torch.bfloat16
SIZES = [(280, 1, 2560), (280, 16, 2560), (1120, 16, 2560), (1120, 16, 5376)]
"""Soft tokens of an image, images of a microbatch, width."""
TINY = [(7, 1, 16), (9, 4, 16)]
GRIDS = [(1, 2, False), (1, 2, True), (2, 2, False), (2, 2, True)]
"""TP of the encoder, TP of the language model, sequence parallelism."""


def layout_of(encoder_tp: int, language_tp: int, sequence_parallel: bool) -> Layout:
    """The encoder on the first ranks, the language model on the next; ranks that are left over hold nothing."""
    first, second = range(encoder_tp), range(encoder_tp, encoder_tp + language_tp)
    grids = {
        "vision": ModuleGrid("vision", tuple(first), encoder_tp, 1, 1, 1, 1, False),
        "language": ModuleGrid("language", tuple(second), language_tp, 1, 1, 1, 1, sequence_parallel),
    }
    return Layout(grids, dist.get_world_size(), "disjoint")


def one_microbatch(soft_tokens: int, images: int, multiple: int) -> StepManifest:
    """A step of one microbatch: a sample that begins with its images, each between two tokens."""
    length = images * (soft_tokens + 2) + 16
    sample = PlannedSample(0, 0, 0, 0, 0, 0, length, length)
    padded = -(-length // multiple) * multiple
    media = [
        PlannedMedia("vision", 0, 0, image, soft_tokens, 0, 0, 0, image * (soft_tokens + 2) + 1, 0, image * soft_tokens)
        for image in range(images)
    ]
    return StepManifest(0, 1, (Microbatch(0, 0, 1, padded, (sample,)),), tuple(media))


@dataclass(frozen=True)
class Way:
    """One way to move a microbatch on this rank."""

    forward: Callable[[], torch.Tensor | None]
    """Moves the soft tokens; what arrives here."""
    backward: Callable[[], torch.Tensor | None]
    """Moves the gradients, which are twice the soft tokens; what arrives here."""

    def move(self) -> None:
        """There and back."""
        self.forward()
        self.backward()


class Edge:
    """An encoder lane and a language lane, and two ways between them; collective over all ranks."""

    def __init__(self, platform: Platform, encoder_tp: int, language_tp: int, sequence_parallel: bool) -> None:
        """Make the groups."""
        self.platform, self.rank = platform, platform.rank
        self.layout = layout_of(encoder_tp, language_tp, sequence_parallel)
        self.source, self.target = self.layout.grids["vision"], self.layout.language
        self.groups = create_process_groups(self.layout, platform)
        self.leaders = LeaderBridge(self.source, self.target, DTYPE, platform.device)
        self.sends, self.receives = self.rank in self.source, self.rank in self.target

    def ways(self, soft_tokens_per_image: int, images: int, width: int) -> dict[str, Way]:
        """Both ways for microbatches of this size, checked; an idle rank's do nothing."""
        if not (self.sends or self.receives):
            return dict.fromkeys(("bridge", "leaders"), Way(lambda: None, lambda: None))
        multiple = sequence_multiple(1, self.target.tp if self.target.sequence_parallel else 1)
        manifest, device = one_microbatch(soft_tokens_per_image, images, multiple), self.platform.device
        generator = torch.Generator(device).manual_seed(0)
        vectors = torch.randn(soft_tokens_per_image * images, width, generator=generator, device=device).to(DTYPE)
        positions = torch.tensor([item.start + i for item in manifest.media for i in range(item.soft_tokens)]).to(
            device
        )
        gradient = torch.zeros(manifest.microbatches[0].seq_length, width, dtype=DTYPE, device=device)
        gradient[positions] = 2 * vectors
        if self.receives and self.target.sequence_parallel:
            gradient = gradient.chunk(self.target.tp)[self.target.coordinate(self.rank).tp]
        bridge, brought = self._bridge(manifest, vectors, gradient)
        leaders = self._leaders(vectors, gradient, positions)
        self._check("bridge", bridge, brought, vectors)
        self._check("leaders", leaders, vectors, vectors)
        return {"bridge": bridge, "leaders": leaders}

    def _bridge(
        self, manifest: StepManifest, vectors: torch.Tensor, gradient: torch.Tensor
    ) -> tuple[Way, torch.Tensor]:
        """The way, and the soft tokens that it should bring here, from the gradient [S/tp (local), H] of the
        sequence."""
        forward_group, backward_group = self.groups.bridge_to_language["vision"], self.groups.bridge_to_module["vision"]
        assert forward_group is not None and backward_group is not None
        bridge = Bridge(
            self.layout,
            "vision",
            self.rank,
            to_language_group=forward_group,
            to_module_group=backward_group,
            module_tp_group=self.groups.modules["vision"].tp if self.sends else None,
            language_tp_group=self.groups.modules["language"].tp if self.receives else None,
            hidden_size=vectors.shape[1],
            dtype=DTYPE,
            platform=self.platform,
        )
        route = bridge.route(manifest, 0)
        returning = gradient[route.positions.to(gradient.device)]

        def forward() -> torch.Tensor | None:
            received = bridge.recv_in_language(route, bridge.post_to_language(route, vectors if self.sends else None))
            return received if self.receives else None

        def backward() -> torch.Tensor | None:
            arrival = bridge.post_to_module(route, returning if self.receives else None)
            returned = bridge.recv_in_module(route, arrival)
            bridge.drain()
            return returned if self.sends else None

        return Way(forward, backward), returning / 2

    def _leaders(self, vectors: torch.Tensor, gradient: torch.Tensor, positions: torch.Tensor) -> Way:
        source = vectors if self.sends else None
        returning = gradient if self.leaders.gathers else 2 * vectors
        return Way(
            lambda: self.leaders.forward(source),
            lambda: self.leaders.backward(returning if self.receives else None, positions),
        )

    def _check(self, name: str, way: Way, brought: torch.Tensor, vectors: torch.Tensor) -> None:
        """Compare what arrives with what should."""
        received, returned = way.forward(), way.backward()
        if self.receives and len(brought):
            assert received is not None and torch.equal(received, brought), f"{name}: other soft tokens received"
        if self.sends:
            assert returned is not None and torch.equal(returned, 2 * vectors), f"{name}: other gradients came back"


def microseconds(way: Way, device: torch.device) -> float:
    """Time of a microbatch, mean of several in a row, until all that they enqueued is done."""
    dist.barrier(group=dist.group.WORLD)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    begin = time.perf_counter()
    for _ in range(ROUNDS):
        way.move()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return 1e6 * (time.perf_counter() - begin) / ROUNDS


def measured(ways: dict[str, Way], device: torch.device) -> dict[str, tuple[float, float, float, float]]:
    """By way: microseconds of a microbatch on the slowest rank; megabytes that reach the busiest rank and all ranks,
    and of the latter those that come from the other grid.
    """
    times: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(WARM_UP + TIMED):
        for name, way in ways.items():
            spent = microseconds(way, device)
            if turn >= WARM_UP:
                times[name].append(spent)
    found = {}
    for name, way in ways.items():
        with Traffic() as traffic:
            way.move()
        crossing = sum(message.received for message in traffic.messages if message.operation == "recv_")
        mine = torch.tensor([median(times[name]), traffic.received / 1e6, crossing / 1e6], device=device)
        slowest, total = mine.clone(), mine.clone()
        dist.all_reduce(slowest, op=dist.ReduceOp.MAX, group=dist.group.WORLD)
        dist.all_reduce(total, group=dist.group.WORLD)
        found[name] = (slowest[0].item(), slowest[1].item(), total[1].item(), total[2].item())
    return found


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="tiny sizes, for a CPU")
    options = parser.parse_args()
    platform = create_platform()
    table = []
    for encoder_tp, language_tp, sequence_parallel in GRIDS:
        if encoder_tp + language_tp > dist.get_world_size():
            continue
        edge = Edge(platform, encoder_tp, language_tp, sequence_parallel)
        for soft_tokens, images, width in TINY if options.tiny else SIZES:
            found = measured(edge.ways(soft_tokens, images, width), platform.device)
            (ours, *megabytes), (theirs, *their_megabytes) = found["bridge"], found["leaders"]
            grids = f"{encoder_tp} -> TP {language_tp}{' SP' if sequence_parallel else ''}"
            cells = [grids, f"{soft_tokens * images} x {width}", f"{ours:.0f}", f"{theirs:.0f}", f"{theirs / ours:.2f}"]
            pairs = zip(megabytes, their_megabytes, strict=True)
            table.append([*cells, *(f"{size:.3g}" for pair in pairs for size in pair)])
        edge.groups.destroy()
    if platform.rank == 0:
        print(
            f"{dist.get_world_size()} ranks, bf16, soft tokens there and gradients back; the slowest rank's median time"
        )
        columns = [
            "grids",
            "soft tokens",
            "bridge us",
            "leaders us",
            "ratio",
            "MB a rank",
            "(leaders)",
            "MB in all",
            "(leaders)",
            "MB crossing",
            "(leaders)",
        ]
        for row in [columns, *table]:
            print("  ".join(cell.rjust(12) for cell in row))
    destroy_distributed()


if __name__ == "__main__":
    main()
