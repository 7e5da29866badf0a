"""Layouts and steps for the simulator: random ones of all kinds, and single lanes."""

import random
from dataclasses import replace

from mimo_gemma4.config import LayoutConfig, ModuleLayout
from mimo_gemma4.data.manifest import Microbatch, PlannedMedia, PlannedSample, StepManifest
from mimo_gemma4.distributed.layout import LANGUAGE, build_layout
from tests.schedule_simulator import World

DECODERS = ("pixels", "codes")


def make_world(choose: random.Random) -> World:
    """A random layout of up to three encoders, two decoders and eight stages, and a step with gaps of all kinds."""
    encoders = ("vision", "audio", "video")[: choose.choice([0, 1, 1, 2, 3])]
    pp = choose.choice([1, 1, 1, 2, 2, 2, 3, 4, 8])
    tp, cp, dp = ((1, 1, 1), (2, 1, 1), (1, 2, 1), (1, 1, 2), (1, 1, 3))[choose.randrange(5 if pp < 4 else 1)]
    ranks = tp * cp * dp * pp
    reads = {name: choose.choice(encoders) for name in DECODERS if encoders and choose.random() < 0.3}
    modules, module_ranks = {}, {}
    placement = choose.choice(["disjoint", "colocated", "mixed"])
    for name in (*encoders, *reads):
        module_tp, module_pp = choose.choice([1, 1, 1, 2, 4]), 1 if name in reads else choose.choice([1, 1, 2, 3])
        if placement == "colocated":
            if ranks % (module_tp * module_pp):
                module_tp = module_pp = 1
            modules[name] = ModuleLayout(tp=module_tp, pp=module_pp, reads=reads.get(name))
        else:
            module_ranks[name] = choose.randint(1, 3) * module_tp * module_pp
            modules[name] = ModuleLayout(module_ranks[name], tp=module_tp, pp=module_pp, reads=reads.get(name))
    modules[LANGUAGE] = ModuleLayout(None if placement == "colocated" else ranks, tp=tp, cp=cp, pp=pp)
    world_size = ranks + sum(module_ranks.values())
    if placement == "mixed":
        world_size = overlap(modules, choose)
    layout = build_layout(LayoutConfig(modules, placement=placement), world_size)
    count = choose.choice([0, 1, 1, 2, 2, 3, 4, 7])
    world = World(
        layout,
        make_manifest(choose, count, dp, {name: layout.grids[name].dp for name in (*encoders, *reads)}),
        {name: choose.randrange(modules[name].pp) for name in (*encoders, *reads) if choose.random() < 0.7},
        {name: choose.randint(1, 3) for name in encoders},
        train=choose.random() < 0.8,
        experts=choose.random() < 0.3,
    )
    world.observed = not world.train and choose.random() < 0.5
    for name in (*encoders, *reads):
        connect(world, name, choose)
    return world


def overlap(modules: dict[str, ModuleLayout], choose: random.Random) -> int:
    """Give every module a random list of ranks instead of their number; returns the number of ranks in use."""
    pool = range(max(module.ranks for module in modules.values()) + choose.randint(0, 3))
    lists = {name: choose.sample(pool, module.ranks) for name, module in modules.items()}
    number = {rank: position for position, rank in enumerate(sorted(set().union(*lists.values())))}
    for name, ranks in lists.items():
        modules[name].ranks = sorted(number[rank] for rank in ranks)
    return len(number)


def make_manifest(
    choose: random.Random, count: int, lanes: int, encoder_lanes: dict[str, int], gaps: float = 0.2
) -> StepManifest:
    """Every lane's microbatches, some of them empty, with media for some of the encoders' lanes."""
    microbatches, media = [], []
    for lane in range(lanes):
        for number in range(count):
            sequences = 0 if choose.random() < gaps else 1
            sample = PlannedSample(0, 0, lane, number, 0, 0, 8, 8)
            microbatches.append(Microbatch(lane, number, sequences, 8 * sequences, (sample,) * sequences))
            for name, module_lanes in encoder_lanes.items():
                for module_lane in range(module_lanes if sequences else 0):
                    if choose.random() < 1.0 - gaps:
                        media.append(PlannedMedia(name, 0, 0, 0, 2, lane, number, 0, 0, module_lane, 0))
    return StepManifest(0, count, tuple(microbatches), tuple(media))


def connect(world: World, name: str, choose: random.Random | None = None) -> None:
    """Have the ranks of each item's two lanes exchange its soft tokens and their gradients: all, or some by chance."""

    def chosen(share: float) -> bool:
        return choose is None or choose.random() < share

    source, target, stage = world.layout.grids[name], world.layout.language, world.layout.language_stage(name)
    for item in world.manifest.media:
        if item.module != name:
            continue
        pairs = [
            (
                source.rank_at(tp=source_tp, dp=item.module_lane, pp=source.pp - 1),
                target.rank_at(tp=tp, cp=cp, dp=item.lane, pp=stage),
            )
            for source_tp in range(source.tp)
            for tp in range(target.tp)
            for cp in range(target.cp)
        ]
        pairs = [pair for pair in pairs if pair[0] != pair[1] and chosen(0.8)]
        to_language = world.to_language.setdefault((name, item.microbatch), [])
        to_module = world.to_module.setdefault((name, item.microbatch), [])
        to_language += [pair for pair in pairs if pair not in to_language]
        to_module += [(t, s) for s, t in pairs if chosen(0.7) and (t, s) not in to_module]


def pipeline(stages: int, count: int, encoder_stages: int = 1, **encoders: int) -> World:
    """One lane of `stages` ranks behind encoders which may run ahead so far, with media for all in every microbatch.

    Each encoder has as many ranks, one for each of its stages.
    """
    modules = {name: ModuleLayout(encoder_stages, pp=encoder_stages) for name in encoders}
    modules[LANGUAGE] = ModuleLayout(stages, pp=stages)
    layout = build_layout(modules, stages + len(encoders) * encoder_stages)
    manifest = make_manifest(random.Random(0), count, 1, dict.fromkeys(encoders, 1), gaps=0.0)
    world = World(layout, manifest, dict.fromkeys(encoders, 0), encoders)
    for name in encoders:
        connect(world, name)
    return world


def colocated(stages: int, count: int, run_ahead: int) -> World:
    """One lane of `stages` ranks, each of which also holds all of an encoder with an item in every microbatch."""
    modules = {"vision": ModuleLayout(), LANGUAGE: ModuleLayout(pp=stages)}
    layout = build_layout(LayoutConfig(modules, placement="colocated"), stages)
    manifest = make_manifest(random.Random(0), count, 1, {"vision": stages}, gaps=0.0)
    world = World(layout, manifest, {"vision": 0}, {"vision": run_ahead})
    connect(world, "vision")
    return world


def with_decoder(world: World, own_rank: bool) -> World:
    """`world`, and a decoder of a rank, its own or that of the last stage, which reads every microbatch's media."""
    rank = world.layout.world_size if own_rank else world.layout.language.ranks[-1]
    decoder = replace(world.layout.grids["vision"], name="pixels", ranks=(rank,), pp=1, reads="vision")
    layout = replace(
        world.layout, grids=world.layout.grids | {"pixels": decoder}, world_size=world.layout.world_size + own_rank
    )
    media = tuple(replace(item, module="pixels") for item in world.manifest.media)
    manifest = replace(world.manifest, media=world.manifest.media + media)
    trained_from = world.trained_from | {"pixels": 0}
    to_language, to_module = dict(world.to_language), dict(world.to_module)
    world = replace(
        world, layout=layout, manifest=manifest, trained_from=trained_from, to_language=to_language, to_module=to_module
    )
    connect(world, "pixels")
    return world
