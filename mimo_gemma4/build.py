"""From a configuration to the parts of a run: layout, groups, data, model, optimizers."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch.distributed as dist

from encoders.base import Encoder
from encoders.registry import build_processors
from mimo_gemma4 import checkpoint, model_files
from mimo_gemma4.config import Config, LoraConfig, ShardsConfig
from mimo_gemma4.cp_cost import AttentionCosts, cheaper_layout
from mimo_gemma4.data.chat import ConversationEncoder
from mimo_gemma4.data.dataset import ShardDataset, Source
from mimo_gemma4.data.loader import StepLoader
from mimo_gemma4.data.planner import DecoderTargets, StepPlanner
from mimo_gemma4.data.quickstart import ensure_shards
from mimo_gemma4.data.tokenizer import load_tokenizer, media_tokens
from mimo_gemma4.decoders.registry import build_target_processors
from mimo_gemma4.errors import ConfigError, DataError
from mimo_gemma4.evaluate import Evaluator
from mimo_gemma4.flops import text_flops
from mimo_gemma4.freezing import freeze
from mimo_gemma4.health import together
from mimo_gemma4.huggingface import HuggingFaceSource, check_tensors
from mimo_gemma4.language.config import Gemma4TextConfig
from mimo_gemma4.layout import LANGUAGE, Layout, build_layout
from mimo_gemma4.lora import AdaptedModule, attach
from mimo_gemma4.lora_files import AdapterSource, adapted_linears
from mimo_gemma4.model import MimoModel
from mimo_gemma4.optim import ModuleOptimizer
from mimo_gemma4.partition import CpLayout, pack_multiple, segment_multiple, sequence_multiple
from mimo_gemma4.platform import Platform, create_platform, ranks_per_host
from mimo_gemma4.presets import load_model_config
from mimo_gemma4.process_groups import ProcessGroups, create_process_groups
from mimo_gemma4.trainer import Trainer
from mimo_gemma4.weights import BoundModule, initialise, load


@dataclass(frozen=True)
class Foundation:
    """What every part of a run stands on."""

    config: Config
    hf_config: dict[str, Any]
    layout: Layout
    platform: Platform
    groups: ProcessGroups


def lay_foundation(config: Config) -> Foundation:
    """Join the other ranks, place the modules and create their groups. Collective over all ranks."""
    hf_config = load_model_config(config.model, config.modules)
    platform = create_platform(
        deterministic=config.run.deterministic, timeout=timedelta(seconds=config.run.timeout_seconds)
    )
    layout = build_layout(config.layout, dist.get_world_size(), ranks_per_host())
    check_decoder_names(layout, hf_config)
    return Foundation(config, hf_config, layout, platform, create_process_groups(layout, platform))


def check_decoder_names(layout: Layout, hf_config: Mapping[str, Any]) -> None:
    """Raise `ConfigError` where a decoder is called like one of the model's encoders."""
    for name in layout.decoders:
        if hf_config.get(f"{name}_config"):
            raise ConfigError(
                f"`layout.{name}` has `reads`, which makes it a decoder, but the model has an encoder called {name}: "
                "give the decoder another name"
            )


def build_trainer(foundation: Foundation) -> Trainer:
    """Everything of one rank, resumed where the configuration says so. Collective over all ranks."""
    config, groups = foundation.config, foundation.groups
    keep_model(foundation)
    encoder = together(groups.host, lambda: build_conversation_encoder(foundation))
    prepare_shards(foundation)
    train_data = open_dataset(foundation, "train", config.data.train, encoder)
    valid_data = open_dataset(foundation, "valid", config.data.valid, encoder) if config.data.valid else None
    start = find_start(foundation)
    model = build_modules(foundation)
    if start is None:
        fill(foundation, model)
    elif start.weights_only:
        fill_adapters(foundation, model)
        fill_decoders(foundation, model)
    optimizers = {
        name: ModuleOptimizer(module, groups.modules[name], config.optim) for name, module in model.modules.items()
    }
    finished = 0 if start is None else restore(foundation, start, optimizers)
    evaluator = None
    if valid_data is not None:
        evaluator = Evaluator(config, model, build_loader(foundation, valid_data, train=False))
    return Trainer(config, model, optimizers, build_loader(foundation, train_data, train=True), evaluator, finished)


def keep_model(foundation: Foundation) -> None:
    """Keep configuration and tokenizer in the run's directory, where an export finds them. Collective."""
    config = foundation.config

    def keep() -> None:
        if foundation.platform.rank == 0:
            folder = Path(config.run.dir) / model_files.FOLDER
            model_files.keep_model_files(folder, config.model, foundation.hf_config, foundation.layout.grids)

    together(foundation.groups.host, keep)


def build_conversation_encoder(foundation: Foundation) -> ConversationEncoder:
    """Tokenizer, chat template and the media processors of the encoders in the layout."""
    processors = [p for name in foundation.layout.encoders for p in build_processors(name, foundation.hf_config)]
    tokenizer = load_tokenizer(foundation.config.model.hf_path)
    return ConversationEncoder(tokenizer, processors, media_tokens(foundation.hf_config))


def prepare_shards(foundation: Foundation) -> None:
    """Write the quickstart's shards where they are missing, on one rank of every host."""
    data = foundation.config.data
    quickstart = data.quickstart
    if quickstart is None:
        return

    def write() -> None:
        if foundation.platform.local_rank == 0:
            ensure_shards(quickstart, Path(str(data.train.shards)).parent)

    together(foundation.groups.host, write)


def open_dataset(
    foundation: Foundation, split: str, shards: ShardsConfig, encoder: ConversationEncoder
) -> ShardDataset:
    """The indexed samples of the shards of `data.<split>`; collective."""
    data = foundation.config.data
    try:
        return ShardDataset.open(
            shards.shards or [Source(source.shards, source.weight) for source in shards.sources.values()],
            encoder,
            seq_length=data.seq_length,
            on_bad_sample=data.on_bad_sample,
            max_bad_fraction=data.max_bad_fraction,
            group=foundation.groups.host,
        )
    except DataError as error:
        raise DataError(f"data.{split}: {error}") from error


def build_loader(foundation: Foundation, dataset: ShardDataset, *, train: bool) -> StepLoader:
    """Plans and reads this rank's part of training steps, or of an evaluation: one pass in order, padded."""
    config, layout, rank = foundation.config, foundation.layout, foundation.platform.rank
    language = layout.language
    tp = language.tp if language.sequence_parallel else 1
    packing = config.data.packing and train
    text = Gemma4TextConfig.from_hf(foundation.hf_config)

    @cache
    def sample_cost(length: int) -> float:
        return text_flops(text, [length]).forward

    planner = StepPlanner(
        dataset,
        global_batch_size=config.train.global_batch_size if train else config.eval.batch_size,
        microbatch_size=config.train.microbatch_size,
        seed=config.run.seed,
        language_lanes=language.dp,
        encoder_lanes={name: layout.grids[name].dp for name in layout.encoders},
        decoders=decoder_targets(foundation, dataset.encoder),
        packing=packing,
        row_multiple=segment_multiple(language.cp) if packing else sequence_multiple(language.cp, tp),
        total_multiple=pack_multiple(language.cp, tp),
        sample_cost=sample_cost,
        shuffle=train,
        repeat=train,
        limit=None if train else config.eval.samples,
        choose_cp_layout=cp_layout_chooser(foundation) if language.cp > 1 else None,
    )
    lanes = {name: grid.coordinate(rank).dp for name, grid in layout.grids.items() if rank in grid}
    return StepLoader(
        planner,
        language_lane=lanes.get(LANGUAGE),
        encoder_lanes={name: lanes[name] for name in layout.encoders if name in lanes},
        decoder_lanes={name: lanes[name] for name in layout.decoders if name in lanes},
        group=foundation.groups.loading["train" if train else "valid"],
        on_bad_sample=config.data.on_bad_sample,
        max_bad_fraction=config.data.max_bad_fraction,
        workers=config.data.workers,
        stop=config.train.steps if train else None,
    )


def decoder_targets(foundation: Foundation, encoder: ConversationEncoder) -> dict[str, DecoderTargets]:
    """What the decoders of the layout do with media, by name."""
    targets = {}
    for name in foundation.layout.decoders:
        grid, options = foundation.layout.grids[name], foundation.config.module(name)
        assert grid.reads is not None
        media = [processor for processor in encoder.processors.values() if processor.modality == grid.reads]
        processors = build_target_processors(name, options.decoder, options.decoder_options, media)
        targets[name] = DecoderTargets(grid.reads, grid.dp, processors)
    return targets


def cp_layout_chooser(foundation: Foundation) -> Callable[[Sequence[int]], CpLayout]:
    """Picks the layout of a pack by the predicted cost of the model's attention."""
    language = foundation.layout.language
    costs = AttentionCosts.of(Gemma4TextConfig.from_hf(foundation.hf_config), language.tp)
    return partial(cheaper_layout, costs, cp_size=language.cp)


def build_model(foundation: Foundation) -> MimoModel:
    """This rank's modules with their first weights, frozen as configured. Collective over all ranks."""
    model = build_modules(foundation)
    fill(foundation, model)
    return model


def build_modules(foundation: Foundation) -> MimoModel:
    """This rank's modules, frozen as configured; their weights are yet to be filled or restored."""
    config, host = foundation.config, foundation.groups.host
    model = together(
        host,
        lambda: MimoModel(config, foundation.hf_config, foundation.layout, foundation.groups, foundation.platform),
    )

    names = tensor_names(foundation, model)

    def freeze_and_attach() -> None:
        for name, module in list(model.modules.items()):
            options, elsewhere = config.module(name), names[name] - {binding.name for binding in module.bindings()}
            freeze(name, module, options.frozen, elsewhere)
            if options.lora is not None:
                model.modules[name] = attach(name, module, options.lora, elsewhere)

    together(host, freeze_and_attach)
    model.trained_from = first_trained_stages(foundation, model)
    return model


def tensor_names(foundation: Foundation, model: MimoModel) -> dict[str, set[str]]:
    """Per module of the layout, the Hugging Face names of what any rank holds of it. Collective over all ranks."""
    host = foundation.groups.host
    mine = {name: {binding.name for binding in module.bindings()} for name, module in model.modules.items()}
    everyone: list[dict[str, set[str]]] = [{}] * host.size()
    dist.all_gather_object(everyone, mine, group=host)
    return {name: set().union(*(held.get(name, set()) for held in everyone)) for name in foundation.layout.grids}


def first_trained_stages(foundation: Foundation, model: MimoModel) -> dict[str, int]:
    """Per encoder that trains, the first pipeline stage with a parameter that does. Collective over all ranks.

    Decoders are in it, with their only stage, where the language model or an encoder trains.
    """
    layout, host = foundation.layout, foundation.groups.host
    mine = {
        name: layout.grids[name].coordinate(model.rank).pp
        for name, module in model.modules.items()
        if any(parameter.requires_grad for parameter in module.parameters())
    }
    everyone: list[dict[str, int]] = [{}] * host.size()
    dist.all_gather_object(everyone, mine, group=host)
    trained = {
        name: min(held[name] for held in everyone if name in held)
        for name in (*layout.encoders, LANGUAGE)
        if any(name in held for held in everyone)
    }
    decoders = dict.fromkeys(layout.decoders if trained else (), 0)
    trained.pop(LANGUAGE, None)
    return trained | decoders


def fill_adapters(foundation: Foundation, model: MimoModel) -> None:
    """First values of adapters, from `lora.path` or random. Collective."""

    def load_all() -> None:
        for name, module in model.modules.items():
            lora = foundation.config.module(name).lora
            if isinstance(module, AdaptedModule) and lora is not None:
                load_adapters(name, module, lora, foundation.config.run.seed)

    together(foundation.groups.host, load_all)


def load_adapters(name: str, module: AdaptedModule, lora: LoraConfig, seed: int) -> None:
    """First values of one module's adapters. Raises `ConfigError` or `CheckpointError`."""
    bindings = module.adapter_bindings()
    if lora.path is None:
        initialise(bindings, seed)
        return
    source = AdapterSource(Path(lora.path), f"modules.{name}.lora", lora)
    source.check_all_read(
        (binding.name.removesuffix(".weight") for binding in module.base.bindings()),
        adapted_linears(binding.name for binding in bindings),
    )
    load(bindings, source, f"modules.{name}.lora.path {lora.path}")


def fill_decoders(foundation: Foundation, model: MimoModel) -> None:
    """First values of decoders, which no Hugging Face directory holds: random."""
    for decoder in model.decoders.values():
        initialise(decoder.bindings(), foundation.config.run.seed)


def fill(foundation: Foundation, model: MimoModel) -> None:
    """First weights: from Hugging Face directories, of which a rank reads only what it holds, or random. Collective."""
    bases = {
        name: module.base if isinstance(module, AdaptedModule) else module
        for name, module in model.modules.items()
        if name not in model.decoders
    }
    fill_adapters(foundation, model)
    fill_decoders(foundation, model)
    modules = foundation.config.module
    own = {name: path for name in foundation.layout.grids if (path := modules(name).hf_path) is not None}
    fill_from_model(foundation, [module for name, module in bases.items() if name not in own])
    for name, path in own.items():
        fill_from_own(name, bases.get(name), path, foundation.config.run.seed, foundation.groups.host)


def fill_from_model(foundation: Foundation, modules: list[BoundModule]) -> None:
    """First weights of this rank's `modules` from `model.hf_path`, or random without one. Collective over all ranks."""
    config, host = foundation.config, foundation.groups.host
    bindings = [binding for module in modules for binding in module.bindings()]
    if config.model.hf_path is None:
        initialise(bindings, config.run.seed)
        return
    origin, path = f"model.hf_path {config.model.hf_path}", config.model.hf_path
    source = together(host, lambda: HuggingFaceSource(path))
    unused = {name for module in modules for name in module.unused_tensors()}
    left = check_tensors(origin, source, bindings, unused, host)
    together(host, lambda: load(bindings, source, origin))
    if foundation.platform.rank == 0:
        for part, count in left.items():
            print(f"model.hf_path: {count} tensors of {part} are not in this layout and were not read", flush=True)


def fill_from_own(name: str, module: BoundModule | None, path: str, seed: int, host: dist.ProcessGroup) -> None:
    """First weights of a module from its own directory; None: this rank does not hold it. Collective over all ranks."""
    origin = f"modules.{name}.hf_path {path}"
    bindings = [] if module is None else module.bindings()
    fresh: set[int] = set()
    if isinstance(module, Encoder):  # a projector fits one language model: an encoder's directory has none
        fresh = {id(parameter) for parameter in module.projector_parameters()}
    initialise([binding for binding in bindings if id(binding.tensor) in fresh], seed)
    bindings = [binding for binding in bindings if id(binding.tensor) not in fresh]
    source = together(host, lambda: HuggingFaceSource(path))
    check_tensors(origin, source, bindings, None, host)
    together(host, lambda: load(bindings, source, origin))


@dataclass(frozen=True)
class Start:
    """Where a run takes its weights from, if not from `model`."""

    checkpoint: Path
    weights_only: bool
    """Leave the optimizer and the step count at their beginning."""


def find_start(foundation: Foundation) -> Start | None:
    """The checkpoint that `checkpoint.resume`, else `checkpoint.init_from`, asks for. Collective."""
    host, options = foundation.groups.host, foundation.config.checkpoint
    found = checkpoint.resolve(options.resume, Path(foundation.config.run.dir) / "checkpoints", host=host)
    if found is not None:
        return Start(found, weights_only=False)
    if options.init_from is None:
        return None
    return Start(checkpoint.initial(options.init_from, host=host), weights_only=True)


def restore(foundation: Foundation, start: Start, optimizers: dict[str, ModuleOptimizer]) -> int:
    """Load a checkpoint; the number of steps that are finished. Collective.

    Only weights: decoders that the checkpoint does not hold, and adapters on a module that has none in it, keep their
    first values.
    """
    host, path = foundation.groups.host, start.checkpoint
    recorded = recorded_adapters(foundation, path)
    check_adapters(foundation, start, recorded)
    modules = [
        optimizer.module
        for name, optimizer in optimizers.items()
        if start.weights_only and name not in recorded and isinstance(optimizer.module, AdaptedModule)
    ]
    fresh = {binding.name for module in modules for binding in module.adapter_bindings()}
    if start.weights_only:
        held = recorded_state(path).get("decoders", [])
        absent = [name for name in foundation.layout.decoders if name in optimizers and name not in held]
        fresh |= {binding.name for name in absent for binding in optimizers[name].bindings}
    state = checkpoint.load(path, optimizers, host=host, weights_only=start.weights_only, keep=fresh)
    step = int(state["step"])
    if foundation.platform.rank == 0:
        print(f"resumed from {path} after {step} steps" if step else f"weights of {path}", flush=True)
    return step


def recorded_adapters(foundation: Foundation, path: Path) -> dict[str, float]:
    """The scale of a checkpoint's adapters on modules of the layout."""
    recorded = recorded_state(path).get("lora", {})
    return {name: scale for name, scale in recorded.items() if name in foundation.layout.grids}


def recorded_state(path: Path) -> dict[str, Any]:
    """The trainer state of a checkpoint; empty where it is damaged, which loading it reports."""
    marker = checkpoint.read_marker(path)
    return {} if isinstance(marker, str) else marker["trainer"]


def check_adapters(foundation: Foundation, start: Start, recorded: Mapping[str, float]) -> None:
    """Raise `ConfigError` where a checkpoint's adapters would be left out or count with another factor."""
    expected, key = foundation.config.lora_scales, "checkpoint.resume"
    names = set(recorded) | set(expected)
    if start.weights_only:
        names, key = set(recorded), "checkpoint.init_from"
    for name in sorted(names):
        if recorded.get(name) != expected.get(name):
            raise ConfigError(
                f"{key}: the adapters of {name} in {start.checkpoint} have the scale {recorded.get(name)}, but "
                f"modules.{name}.lora asks for {expected.get(name)} (None: no adapters); use the rank and alpha they "
                "were trained with, or export them merged and start from that"
            )
