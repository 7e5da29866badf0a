"""Where the weights of a run come from: Hugging Face directories, a checkpoint, or random numbers."""

from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch.distributed as dist

from mimo_gemma4.checkpoint import save_load as checkpoint
from mimo_gemma4.config import LoraConfig
from mimo_gemma4.distributed.collective_errors import all_ranks_or_raise
from mimo_gemma4.encoders.base import Encoder
from mimo_gemma4.errors import ConfigError
from mimo_gemma4.model.mimo_model import MimoModel
from mimo_gemma4.optim.module_optimizer import ModuleOptimizer
from mimo_gemma4.train.recorded_training import check_recorded_parts, recorded_state
from mimo_gemma4.train.setup import RunSetup
from mimo_gemma4.weights.bindings import Binding, BoundModule, initialise, load
from mimo_gemma4.weights.huggingface import HuggingFaceSource, check_tensors
from mimo_gemma4.weights.lora import AdaptedModule
from mimo_gemma4.weights.lora_files import AdapterSource


def fill_adapters(setup: RunSetup, model: MimoModel) -> None:
    """First values of adapters, from `lora.path` or random. Collective.

    Raises `ConfigError` where a part of an adapter's folder is read by no module.
    """
    config, host = setup.config, setup.groups.host
    mine = {
        name: {binding.name for binding in module.adapter_bindings()}
        for name, module in model.modules.items()
        if isinstance(module, AdaptedModule)
    }
    everyone: list[dict[str, set[str]]] = [{}] * host.size()
    dist.all_gather_object(everyone, mine, group=host)

    def load_all() -> None:
        for name, module in model.modules.items():
            lora = config.module(name).lora
            if not isinstance(module, AdaptedModule) or lora is None:
                continue
            if lora.path is not None:
                sharing = {other for other, own in config.modules.items() if own.lora and own.lora.path == lora.path}
                read = set[str]().union(*(held.get(other, set()) for held in everyone for other in sharing))
                AdapterSource(Path(lora.path), f"modules.{name}.lora", lora).check_all_read(read)
            load_adapters(name, module, lora, config.run.seed)

    all_ranks_or_raise(host, load_all)


def load_adapters(name: str, module: AdaptedModule, lora: LoraConfig, seed: int) -> None:
    """First values of one module's adapters. Raises `ConfigError` or `CheckpointError`."""
    bindings = module.adapter_bindings()
    if lora.path is None:
        initialise(bindings, seed)
        return
    source = AdapterSource(Path(lora.path), f"modules.{name}.lora", lora)
    load(bindings, source, f"modules.{name}.lora.path {lora.path}")


def fill_decoders(setup: RunSetup, model: MimoModel) -> None:
    """First values of decoders: random, since no Hugging Face directory holds them."""
    for decoder in model.decoders.values():
        initialise(decoder.bindings(), setup.config.run.seed)


def fill_weights(setup: RunSetup, model: MimoModel) -> None:
    """First weights, from Hugging Face directories (a rank reads only what it holds) or random. Collective."""
    bases = {
        name: module.base if isinstance(module, AdaptedModule) else module
        for name, module in model.modules.items()
        if name not in model.decoders
    }
    fill_adapters(setup, model)
    fill_decoders(setup, model)
    modules = setup.config.module
    own = {name: path for name in setup.layout.grids if (path := modules(name).hf_path) is not None}
    fill_from_model_directory(setup, [module for name, module in bases.items() if name not in own])
    for name, path in own.items():
        all_ranks_or_raise(
            setup.groups.host, partial(check_own_directory, name, bases.get(name), path, setup.config.model.hf_path)
        )
        fill_from_own_directory(name, bases.get(name), path, setup.config.run.seed, setup.groups.host)


def fill_from_model_directory(setup: RunSetup, modules: list[BoundModule]) -> None:
    """First weights of this rank's `modules` from `model.hf_path`, or random without one. Collective over all ranks."""
    config, host = setup.config, setup.groups.host
    bindings = [binding for module in modules for binding in module.bindings()]
    if config.model.hf_path is None:
        initialise(bindings, config.run.seed)
        return
    origin, path = f"model.hf_path {config.model.hf_path}", config.model.hf_path
    source = all_ranks_or_raise(host, lambda: HuggingFaceSource(path))
    all_ranks_or_raise(host, lambda: source.check_head() if setup.platform.rank == 0 else None)
    unused = {name for module in modules for name in module.unused_tensors()}
    left = check_tensors(origin, source, bindings, unused, host)
    all_ranks_or_raise(host, lambda: load(bindings, source, origin))
    if setup.platform.rank == 0:
        for part, count in left.items():
            print(f"model.hf_path: {count} tensors of {part} are not in this layout and were not read", flush=True)


def fill_from_own_directory(
    name: str, module: BoundModule | None, path: str, seed: int, host: dist.ProcessGroup
) -> None:
    """First weights of a module from its own directory; None: this rank does not hold it. Collective over all ranks.

    A projector fits one language model. It is random unless the directory, an export of ours, has one of its shape.
    """
    origin = f"modules.{name}.hf_path {path}"
    bindings = [] if module is None else module.bindings()
    source = all_ranks_or_raise(host, lambda: HuggingFaceSource(path))
    fresh: set[int] = set()
    if isinstance(module, Encoder) and not all(holds(source, binding) for binding in projector_bindings(module)):
        fresh = {id(parameter) for parameter in module.projector_parameters()}
    initialise([binding for binding in bindings if id(binding.tensor) in fresh], seed)
    bindings = [binding for binding in bindings if id(binding.tensor) not in fresh]
    check_tensors(origin, source, bindings, None, host)
    all_ranks_or_raise(host, lambda: load(bindings, source, origin))


def check_own_directory(name: str, module: BoundModule | None, path: str, model_path: str | None) -> None:
    """Raise `ConfigError` where a trained projector in `model.hf_path` would give way to a random one."""
    if not isinstance(module, Encoder) or model_path is None:
        return
    own, model = HuggingFaceSource(path), HuggingFaceSource(model_path)
    projector = projector_bindings(module)
    if any(binding.name in own.tensors for binding in projector):
        return
    if projector and all(holds(model, binding) for binding in module.bindings()):
        raise ConfigError(
            f"modules.{name}.hf_path {path} has no projector, while model.hf_path {model_path} holds the same encoder "
            f"with a trained one, which would be lost: leave modules.{name}.hf_path out to train on from it"
        )


def projector_bindings(encoder: Encoder) -> list[Binding]:
    """The bindings of this rank's part of a projector."""
    parameters = {id(parameter) for parameter in encoder.projector_parameters()}
    return [binding for binding in encoder.bindings() if id(binding.tensor) in parameters]


def holds(source: HuggingFaceSource, binding: Binding) -> bool:
    """Whether a directory has the bound tensor, in its shape."""
    stored = source.tensors.get(binding.name)
    return stored is not None and stored.entry.shape == binding.shape


@dataclass(frozen=True)
class StartCheckpoint:
    """The checkpoint that a run starts from, in place of the weights of `model`."""

    path: Path
    weights_only: bool
    """Start with a fresh optimizer and at step 0."""


def find_start_checkpoint(setup: RunSetup) -> StartCheckpoint | None:
    """The checkpoint that `checkpoint.resume`, else `checkpoint.init_from`, asks for. Collective."""
    host, options = setup.groups.host, setup.config.checkpoint
    found = checkpoint.resolve(options.resume, Path(setup.config.run.dir) / "checkpoints", host=host)
    if found is not None:
        return StartCheckpoint(found, weights_only=False)
    if options.init_from is None:
        return None
    return StartCheckpoint(checkpoint.initial(options.init_from, host=host), weights_only=True)


def restore(setup: RunSetup, start: StartCheckpoint, optimizers: dict[str, ModuleOptimizer]) -> int:
    """Load a checkpoint and return the number of finished steps. Collective.

    With `weights_only`, decoders and adapters that the checkpoint does not hold keep their first values.
    """
    host, path = setup.groups.host, start.path
    check_recorded_parts(path, optimizers, setup.config.lora_scales, host, weights_only=start.weights_only)
    recorded = recorded_state(path)
    modules = [
        optimizer.module
        for name, optimizer in optimizers.items()
        if start.weights_only and name not in recorded.get("lora", {}) and isinstance(optimizer.module, AdaptedModule)
    ]
    fresh = {binding.name for module in modules for binding in module.adapter_bindings()}
    if start.weights_only:
        held = recorded.get("decoders", [])
        absent = [name for name in setup.layout.decoders if name in optimizers and name not in held]
        fresh |= {binding.name for name in absent for binding in optimizers[name].bindings}
    state = checkpoint.load(path, optimizers, host=host, weights_only=start.weights_only, keep=fresh)
    step, steps = int(state["step"]), setup.config.train.steps
    if setup.platform.rank == 0:
        done = f"; train.steps={steps} leaves nothing to do" if step >= steps else ""
        print(f"resumed from {path} after {step} steps{done}" if step else f"weights of {path}", flush=True)
    return step
