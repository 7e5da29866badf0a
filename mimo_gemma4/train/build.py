"""From a configuration to the parts of a run: data, model, optimizers."""

from collections.abc import Callable, Sequence
from dataclasses import astuple
from functools import cache, partial
from pathlib import Path

import torch.distributed as dist

from mimo_gemma4.config import ShardsConfig, save_config
from mimo_gemma4.config.model_description import check_token_ids
from mimo_gemma4.convert import model_files
from mimo_gemma4.data.chat import ConversationEncoder
from mimo_gemma4.data.dataset import ShardDataset, Source
from mimo_gemma4.data.loader import StepLoader
from mimo_gemma4.data.order import OrderStart
from mimo_gemma4.data.planner import DecoderTargets, StepPlanner
from mimo_gemma4.data.quickstart import ensure_shards
from mimo_gemma4.data.retries import POLICY
from mimo_gemma4.data.tokenizer import byte_media_tokens, load_tokenizer, media_tokens
from mimo_gemma4.decoders.registry import build_target_processors
from mimo_gemma4.distributed.collective_errors import all_ranks_or_raise
from mimo_gemma4.distributed.cp_cost import AttentionCosts, cheaper_layout
from mimo_gemma4.distributed.layout import LANGUAGE
from mimo_gemma4.encoders.registry import build_processors
from mimo_gemma4.errors import ConfigError, DataError
from mimo_gemma4.flops import text_flops
from mimo_gemma4.language.config import Gemma4TextConfig
from mimo_gemma4.model.mimo_model import MimoModel
from mimo_gemma4.optim.module_optimizer import ModuleOptimizer
from mimo_gemma4.partition import CpLayout, pack_multiple, segment_multiple, sequence_multiple
from mimo_gemma4.train.data_record import DataPoint, resume_data
from mimo_gemma4.train.evaluate import Evaluator
from mimo_gemma4.train.initial_weights import (
    StartCheckpoint,
    fill_adapters,
    fill_decoders,
    fill_weights,
    find_start_checkpoint,
    restore,
)
from mimo_gemma4.train.recorded_rates import warn_of_jumps
from mimo_gemma4.train.setup import RunSetup
from mimo_gemma4.train.trainer import Trainer
from mimo_gemma4.weights.freezing import freeze
from mimo_gemma4.weights.lora import attach


def build_trainer(setup: RunSetup) -> Trainer:
    """The trainer of this rank, resumed where the configuration asks for it. Collective over all ranks."""
    config, groups = setup.config, setup.groups
    keep_model(setup)
    encoder = all_ranks_or_raise(groups.host, lambda: build_conversation_encoder(setup))
    prepare_shards(setup)
    train_data = open_dataset(setup, "train", config.data.train, encoder)
    valid_data = open_dataset(setup, "valid", config.data.valid, encoder) if config.data.valid else None
    start = find_start_checkpoint(setup)
    point = find_data_point(setup, start, train_data)
    model = build_modules(setup)
    if start is None:
        fill_weights(setup, model)
    elif start.weights_only:
        fill_adapters(setup, model)
        fill_decoders(setup, model)
    optimizers = {
        name: ModuleOptimizer(module, groups.modules[name], config.module_optim(name))
        for name, module in model.modules.items()
    }
    finished = 0 if start is None else restore(setup, start, optimizers)
    evaluator = None
    if valid_data is not None:
        evaluator = Evaluator(config, model, build_loader(setup, valid_data, train=False))
    loader = build_loader(setup, train_data, train=True, start=point.start)
    return Trainer(config, model, optimizers, loader, evaluator, finished, point)


def find_data_point(setup: RunSetup, start: StartCheckpoint | None, dataset: ShardDataset) -> DataPoint:
    """Where the run enters its data; says what has changed since the checkpoint. Raises `ConfigError`. Collective."""
    if start is None or start.weights_only:
        return DataPoint()
    config, first = setup.config, setup.platform.rank == 0
    point = all_ranks_or_raise(setup.groups.host, lambda: resume_data(config, dataset, start.path, report=first))
    if first:
        warn_of_jumps(config, start.path)
    return point


def keep_config(setup: RunSetup) -> None:
    """Make the run's directory and save the configuration in it. Raises `ConfigError`. Collective."""
    directory = Path(setup.config.run.dir)

    def keep() -> None:
        if setup.platform.rank != 0:
            return
        try:
            directory.mkdir(parents=True, exist_ok=True)
            save_config(setup.config, directory / "config.yaml")
        except OSError as error:
            raise ConfigError(f"`run.dir` {directory} cannot be written: {error}") from error

    all_ranks_or_raise(setup.groups.host, keep)


def keep_model(setup: RunSetup) -> None:
    """Save the model's configuration and tokenizer in the run's directory, for an export. Collective."""
    config = setup.config

    def keep() -> None:
        if setup.platform.rank == 0:
            folder = Path(config.run.dir) / model_files.FOLDER
            modules = setup.layout.grids
            own = [name for name in modules if config.module(name).hf_path is not None]
            model_files.keep_model_files(folder, config.model, setup.hf_config, modules, own)

    all_ranks_or_raise(setup.groups.host, keep)


def build_conversation_encoder(setup: RunSetup) -> ConversationEncoder:
    """Tokenizer, chat template and the media processors of the encoders in the layout.

    Raises `ConfigError` where the media tokens of a preset are not those of the tokenizer that presets have.
    """
    model, tokens = setup.config.model, media_tokens(setup.hf_config)
    processors = [p for name in setup.layout.encoders for p in build_processors(name, setup.hf_config)]
    known, types = byte_media_tokens(), [processor.content_type for processor in processors]
    if model.hf_path is None and any(tokens.get(kind) != known.get(kind) for kind in types):
        raise ConfigError(
            f"`model.preset` {model.preset} has the media tokens of its own tokenizer, which a preset does not have: "
            "set `model.hf_path` to a directory of that model, or train on text alone"
        )
    tokenizer = load_tokenizer(model.hf_path)
    if model.hf_path is not None:
        media = {kind: astuple(tokens[kind]) for kind in types if kind in tokens}
        check_token_ids(tokenizer.get_vocab(), setup.hf_config, f"model.hf_path {model.hf_path}", media)
    return ConversationEncoder(tokenizer, processors, tokens, setup.config.data.thoughts)


def prepare_shards(setup: RunSetup) -> None:
    """Write the quickstart's shards where they are missing, on one rank of every host."""
    data = setup.config.data
    quickstart = data.quickstart
    if quickstart is None:
        return

    def write() -> None:
        if setup.platform.local_rank == 0:
            ensure_shards(quickstart, Path(str(data.train.shards)).parent)

    all_ranks_or_raise(setup.groups.host, write)


def open_dataset(setup: RunSetup, split: str, shards: ShardsConfig, encoder: ConversationEncoder) -> ShardDataset:
    """The indexed samples of the shards of `data.<split>`; collective."""
    data = setup.config.data
    POLICY.retries, POLICY.seconds = data.retries, data.retry_seconds
    try:
        return ShardDataset.open(
            shards.shards or [Source(source.shards, source.weight, name) for name, source in shards.sources.items()],
            encoder,
            seq_length=data.seq_length,
            on_bad_sample=data.on_bad_sample,
            max_bad_fraction=data.max_bad_fraction,
            group=setup.groups.host,
        )
    except DataError as error:
        raise DataError(f"data.{split}: {error}") from error


def build_loader(setup: RunSetup, dataset: ShardDataset, *, train: bool, start: OrderStart | None = None) -> StepLoader:
    """The loader of this rank's part of training steps, or of an evaluation: one pass in order, padded.

    `start`: where a resumed run enters the order.
    """
    config, layout, rank = setup.config, setup.layout, setup.platform.rank
    language = layout.language
    tp = language.tp if language.sequence_parallel else 1
    packing = config.data.packing and train
    text = Gemma4TextConfig.from_hf(setup.hf_config)

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
        decoders=decoder_targets(setup, dataset.encoder),
        packing=packing,
        row_multiple=segment_multiple(language.cp) if packing else sequence_multiple(language.cp, tp),
        total_multiple=pack_multiple(language.cp, tp),
        sample_cost=sample_cost,
        shuffle=train,
        repeat=train,
        limit=None if train else config.eval.samples,
        start=start,
        choose_cp_layout=cp_layout_chooser(setup) if language.cp > 1 else None,
    )
    lanes = {name: grid.coordinate(rank).dp for name, grid in layout.grids.items() if rank in grid}
    return StepLoader(
        planner,
        language_lane=lanes.get(LANGUAGE),
        encoder_lanes={name: lanes[name] for name in layout.encoders if name in lanes},
        decoder_lanes={name: lanes[name] for name in layout.decoders if name in lanes},
        group=setup.groups.loading["train" if train else "valid"],
        on_bad_sample=config.data.on_bad_sample,
        max_bad_fraction=config.data.max_bad_fraction,
        workers=config.data.workers,
        stop=config.train.steps if train else None,
    )


def decoder_targets(setup: RunSetup, encoder: ConversationEncoder) -> dict[str, DecoderTargets]:
    """What the decoders of the layout read, by name."""
    targets = {}
    for name in setup.layout.decoders:
        grid, options = setup.layout.grids[name], setup.config.module(name)
        assert grid.reads is not None
        media = [processor for processor in encoder.processors.values() if processor.modality == grid.reads]
        processors = build_target_processors(name, options.decoder, options.decoder_options, media)
        targets[name] = DecoderTargets(grid.reads, grid.dp, processors)
    return targets


def cp_layout_chooser(setup: RunSetup) -> Callable[[Sequence[int]], CpLayout]:
    """Picks the layout of a pack by the predicted cost of the model's attention."""
    language = setup.layout.language
    costs = AttentionCosts.of(Gemma4TextConfig.from_hf(setup.hf_config), language.tp)
    return partial(cheaper_layout, costs, cp_size=language.cp)


def build_model(setup: RunSetup) -> MimoModel:
    """This rank's modules with their first weights, frozen as configured. Collective over all ranks."""
    model = build_modules(setup)
    fill_weights(setup, model)
    return model


def build_modules(setup: RunSetup) -> MimoModel:
    """This rank's modules, frozen as configured; their weights are yet to be filled or restored."""
    config, host = setup.config, setup.groups.host
    model = all_ranks_or_raise(
        host,
        lambda: MimoModel(config, setup.hf_config, setup.layout, setup.groups, setup.platform),
    )

    names = tensor_names(setup, model)

    def freeze_and_attach() -> None:
        for name, module in list(model.modules.items()):
            options, elsewhere = config.module(name), names[name] - {binding.name for binding in module.bindings()}
            freeze(name, module, options.frozen, elsewhere)
            if options.lora is not None:
                model.modules[name] = attach(name, module, options.lora, elsewhere)

    all_ranks_or_raise(host, freeze_and_attach)
    model.trained_from = first_trained_stages(setup, model)
    return model


def tensor_names(setup: RunSetup, model: MimoModel) -> dict[str, set[str]]:
    """Hugging Face names of each module's tensors on all ranks, by module. Collective over all ranks."""
    host = setup.groups.host
    mine = {name: {binding.name for binding in module.bindings()} for name, module in model.modules.items()}
    everyone: list[dict[str, set[str]]] = [{}] * host.size()
    dist.all_gather_object(everyone, mine, group=host)
    return {name: set().union(*(held.get(name, set()) for held in everyone)) for name in setup.layout.grids}


def first_trained_stages(setup: RunSetup, model: MimoModel) -> dict[str, int]:
    """By encoder that trains, its first pipeline stage with a trainable parameter. Collective over all ranks.

    Decoders are included, with their only stage, where the language model or an encoder trains. Raises `ConfigError`
    where nothing trains although `train.steps` is positive.
    """
    layout, host = setup.layout, setup.groups.host
    mine = {
        name: layout.grids[name].coordinate(model.rank).pp
        for name, module in model.modules.items()
        if any(parameter.requires_grad for parameter in module.parameters())
    }
    everyone: list[dict[str, int]] = [{}] * host.size()
    dist.all_gather_object(everyone, mine, group=host)
    steps = setup.config.train.steps
    if steps and not any(everyone):
        raise ConfigError(
            f"everything is frozen, so `train.steps` {steps} would change nothing: free a part of a module by "
            "`modules.<module>.freeze`, give one adapters by `modules.<module>.lora`, or set `train.steps` to 0"
        )
    trained = {
        name: min(held[name] for held in everyone if name in held)
        for name in (*layout.encoders, LANGUAGE)
        if any(name in held for held in everyone)
    }
    decoders = dict.fromkeys(layout.decoders if trained else (), 0)
    trained.pop(LANGUAGE, None)
    return trained | decoders
