"""From a configuration to the parts of a run: layout, groups, data, model, optimizers."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch.distributed as dist

from encoders.base import Encoder
from encoders.registry import build_processors
from mimo_gemma4 import checkpoint
from mimo_gemma4.config import Config, LoraConfig, ShardsConfig
from mimo_gemma4.cp_cost import AttentionCosts, cheaper_layout
from mimo_gemma4.data.chat import ConversationEncoder
from mimo_gemma4.data.dataset import ShardDataset, Source
from mimo_gemma4.data.digits import ensure_digits
from mimo_gemma4.data.loader import StepLoader
from mimo_gemma4.data.planner import StepPlanner
from mimo_gemma4.data.tokenizer import load_tokenizer, media_tokens
from mimo_gemma4.errors import ConfigError, DataError
from mimo_gemma4.evaluate import Evaluator
from mimo_gemma4.flops import text_flops
from mimo_gemma4.freezing import freeze
from mimo_gemma4.health import together
from mimo_gemma4.huggingface import HuggingFaceSource
from mimo_gemma4.language.config import Gemma4TextConfig
from mimo_gemma4.layout import Layout, build_layout
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
    return Foundation(config, hf_config, layout, platform, create_process_groups(layout, platform))


def build_trainer(foundation: Foundation) -> Trainer:
    """Everything of one rank, resumed where the configuration says so. Collective over all ranks."""
    config, groups = foundation.config, foundation.groups
    encoder = together(groups.host, lambda: build_conversation_encoder(foundation))
    prepare_shards(foundation)
    train_data = open_dataset(foundation, "train", config.data.train, encoder)
    valid_data = open_dataset(foundation, "valid", config.data.valid, encoder) if config.data.valid else None
    model = build_model(foundation)
    optimizers = {
        name: ModuleOptimizer(module, groups.modules[name], config.optim) for name, module in model.modules.items()
    }
    finished = resume(foundation, optimizers)
    evaluator = None
    if valid_data is not None:
        evaluator = Evaluator(config, model, build_loader(foundation, valid_data, train=False))
    return Trainer(config, model, optimizers, build_loader(foundation, train_data, train=True), evaluator, finished)


def build_conversation_encoder(foundation: Foundation) -> ConversationEncoder:
    """Tokenizer, chat template and the media processors of the encoders in the layout."""
    processors = [p for name in foundation.layout.encoders for p in build_processors(name, foundation.hf_config)]
    tokenizer = load_tokenizer(foundation.config.model.hf_path)
    return ConversationEncoder(tokenizer, processors, media_tokens(foundation.hf_config))


def prepare_shards(foundation: Foundation) -> None:
    """Write the quickstart's shards where they are missing, on one rank of every host."""
    data = foundation.config.data
    if data.quickstart is None:
        return

    def write() -> None:
        if foundation.platform.local_rank == 0:
            ensure_digits(Path(str(data.train.shards)).parent)

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
        packing=packing,
        row_multiple=segment_multiple(language.cp) if packing else sequence_multiple(language.cp, tp),
        total_multiple=pack_multiple(language.cp, tp),
        sample_cost=sample_cost,
        shuffle=train,
        repeat=train,
        limit=None if train else config.eval.samples,
        choose_cp_layout=cp_layout_chooser(foundation) if language.cp > 1 else None,
    )
    return StepLoader(
        planner,
        language_lane=language.coordinate(rank).dp if rank in language else None,
        encoder_lanes={
            name: layout.grids[name].coordinate(rank).dp for name in layout.encoders if rank in layout.grids[name]
        },
        group=foundation.groups.loading["train" if train else "valid"],
        on_bad_sample=config.data.on_bad_sample,
        max_bad_fraction=config.data.max_bad_fraction,
        workers=config.data.workers,
        stop=config.train.steps if train else None,
    )


def cp_layout_chooser(foundation: Foundation) -> Callable[[Sequence[int]], CpLayout]:
    """Picks the layout of a pack by the predicted cost of the model's attention."""
    language = foundation.layout.language
    costs = AttentionCosts.of(Gemma4TextConfig.from_hf(foundation.hf_config), language.tp)
    return partial(cheaper_layout, costs, cp_size=language.cp)


def build_model(foundation: Foundation) -> MimoModel:
    """This rank's modules with their first weights, frozen as configured."""
    config = foundation.config
    model = together(
        foundation.groups.host,
        lambda: MimoModel(config, foundation.hf_config, foundation.layout, foundation.groups, foundation.platform),
    )

    def fill() -> None:
        for name, module in list(model.modules.items()):
            options = config.module(name)
            fill_weights(config, name, module)
            freeze(name, module, options.frozen)
            if options.lora is not None:
                model.modules[name] = attach_adapters(name, module, options.lora, config.run.seed)

    together(foundation.groups.host, fill)
    if config.model.hf_path is not None:
        tell_unread_tensors(foundation, model)
    return model


def attach_adapters(name: str, module: BoundModule, lora: LoraConfig, seed: int) -> AdaptedModule:
    """`module` with the adapters that `lora` asks for, and their first values."""
    adapted = attach(name, module, lora)
    if lora.path is None:
        initialise(adapted.adapter_bindings(), seed)
    else:
        source = AdapterSource(Path(lora.path), f"modules.{name}.lora", lora)
        source.check_all_read(
            (binding.name.removesuffix(".weight") for binding in module.bindings()),
            adapted_linears(binding.name for binding in adapted.adapter_bindings()),
        )
        load(adapted.adapter_bindings(), source, f"modules.{name}.lora.path {lora.path}")
    return adapted


def fill_weights(config: Config, name: str, module: BoundModule) -> None:
    """First weights of a module: from its own Hugging Face directory, from the model's, or drawn."""
    own, bindings = config.module(name).hf_path, module.bindings()
    path, key = (own, f"modules.{name}.hf_path") if own else (config.model.hf_path, "model.hf_path")
    if path is None:
        initialise(bindings, config.run.seed)
        return
    fresh: set[int] = set()
    if own and isinstance(module, Encoder):  # a projector fits one language model: an encoder's directory has none
        fresh = {id(parameter) for parameter in module.projector_parameters()}
    initialise([binding for binding in bindings if id(binding.tensor) in fresh], config.run.seed)
    load([binding for binding in bindings if id(binding.tensor) not in fresh], HuggingFaceSource(path), f"{key} {path}")


def tell_unread_tensors(foundation: Foundation, model: MimoModel) -> None:
    """Print which tensors of `model.hf_path` no module of the layout has read, those of left-out encoders, say."""
    host = foundation.groups.host
    mine = {binding.name for module in model.modules.values() for binding in module.bindings()}
    everyone: list[set[str]] = [set()] * host.size()
    dist.all_gather_object(everyone, mine, group=host)
    if foundation.platform.rank == 0:
        left = HuggingFaceSource(str(foundation.config.model.hf_path)).unread(set().union(*everyone))
        for prefix, count in left.items():
            print(f"model.hf_path: {count} tensors of {prefix} are not in this layout and were not read", flush=True)


def resume(foundation: Foundation, optimizers: dict[str, ModuleOptimizer]) -> int:
    """Load the checkpoint that `checkpoint.resume` asks for; the number of finished steps, 0 without one."""
    host = foundation.groups.host
    folder = Path(foundation.config.run.dir) / "checkpoints"
    path = checkpoint.resolve(foundation.config.checkpoint.resume, folder, host=host)
    if path is None:
        return 0
    check_adapters(foundation, path)
    state = checkpoint.load(path, optimizers, host=host)
    if foundation.platform.rank == 0:
        print(f"resumed from {path} after {state['step']} steps", flush=True)
    return int(state["step"])


def check_adapters(foundation: Foundation, path: Path) -> None:
    """Raise `ConfigError` where a checkpoint's adapters would be left out or count with another factor."""
    marker = checkpoint.read_marker(path)
    recorded = {} if isinstance(marker, str) else marker["trainer"].get("lora", {})
    scales = {name: scale for name, scale in recorded.items() if name in foundation.layout.grids}
    expected = foundation.config.lora_scales
    for name in sorted(scales.keys() | expected.keys()):
        if scales.get(name) != expected.get(name):
            raise ConfigError(
                f"checkpoint.resume: the adapters of {name} in {path} have the scale {scales.get(name)}, but "
                f"modules.{name}.lora asks for {expected.get(name)} (None: no adapters); use the rank and alpha they "
                "were trained with, or export them merged and start from that"
            )
