"""Every option of a training run, with its default and its meaning; `config.py` reads and checks them."""

import math
from dataclasses import dataclass, field, replace
from typing import Literal

from mimo_gemma4.config.structured import inline


@dataclass
class RunConfig:
    """The run as a whole: where it writes, and what makes it repeatable."""

    dir: str = "runs/{name}"
    """Folder of everything the run writes. `{name}` stands for the name of the configuration file."""
    seed: int = 1234
    """Initial weights depend on it and on the name of the tensor, the order of the data on it and on the epoch, and
    torch's random generators start from it on every rank."""
    deterministic: bool = False
    """Two runs on the same machine give the same bits. Slower on GPUs."""
    timeout_seconds: float = 600.0
    """A rank that waits longer than this for the others ends the run with an error."""


@dataclass
class ModelConfig:
    """Which model is trained, and in what arithmetic."""

    preset: str = "gemma4_e4b"
    """One of `configs/model/*.yaml`: an architecture with random weights and a byte tokenizer, in which `gemma4_tiny`
    alone has tokens for media. `hf_path` wins."""
    hf_path: str | None = None
    """Hugging Face Gemma 4 directory (`config.json`, `*.safetensors`, tokenizer) whose weights training starts from.
    The weights may be absent where `checkpoint.resume` or `checkpoint.init_from` gives them."""
    precision: Literal["fp32", "bf16", "fp8"] = "bf16"
    """`fp32` computes everything in fp32; `bf16` keeps fp32 main weights. `fp8` is not available yet."""
    backend: Literal["local", "te"] = "local"
    """Kernels of attention. `local` needs PyTorch alone: FlexAttention on CUDA, plain torch on the CPU. `te` has
    Transformer Engine do sliding layers without media groups, and FlexAttention the others."""


@dataclass
class ModuleLayout:
    """The grid of one module. Its data-parallel size is ranks / (tp * cp * pp)."""

    ranks: int | list[int] | None = None
    """Number of ranks, taken in the order in which modules are written, or a list of global ranks. Null: every rank."""
    tp: int = 1
    """Tensor-parallel size."""
    cp: int = 1
    """Context-parallel size: over how many ranks a sequence is cut."""
    pp: int = 1
    """Pipeline-parallel size: into how many stages of consecutive layers the module is cut."""
    ep: int = 1
    """Expert-parallel size: over how many ranks of dp * cp, which it divides, experts are cut."""
    reads: str | None = None
    """Makes the module a decoder, which is given the language model's final hidden states at the soft tokens of this
    encoder. Null: the module is an encoder, or the language model."""
    sequence_parallel: bool = False
    """Cut activations between tensor-parallel layers along the sequence. Needs tp > 1."""
    part_shared_key_values: bool = False
    """Let pipeline stages part layers from those whose keys and values they share, which then travel between stages.
    E2B and E4B share them in their last 20 and 18 layers, which stay in one stage otherwise."""


@dataclass
class LayoutConfig:
    """Which module runs on which ranks: one entry per module (`language`, `vision`, `audio`, …), in rank order."""

    modules: dict[str, ModuleLayout] = inline("module")
    placement: Literal["disjoint", "colocated", "mixed"] = "disjoint"
    """`disjoint`: every rank holds one module. `colocated`: all modules share the same ranks. `mixed`: modules share
    the ranks that their lists of ranks have in common; a count takes ranks that no list names."""
    allow_tp_across_hosts: bool = False
    """Permit a tensor-parallel group to span hosts, which is slow without NVLink between them."""


@dataclass
class SourceConfig:
    """One of several sets of WebDataset tar files that are mixed."""

    shards: str | list[str]
    """As `shards` of a single set."""
    weight: float = 1.0
    """Its share of the samples of a step, relative to the other sets. Each set has passes of its own."""


@dataclass
class ShardsConfig:
    """WebDataset tar files: `shards`, or several named sets of them with weights."""

    shards: str | list[str] | None = None
    """Paths or fsspec URLs (`s3://…`); `{000000..000007}` and `*` expand."""
    sources: dict[str, SourceConfig] = inline("name")


@dataclass
class DataConfig:
    """Samples and how they are cut into sequences."""

    train: ShardsConfig
    """Shards to train on."""
    valid: ShardsConfig | None = None
    """Held-out shards. Without them the run does not evaluate."""
    quickstart: Literal["digits", "digits_and_tones"] | None = None
    """Write missing shards of `train` and `valid` on first use. `digits`: scikit-learn's handwritten digits.
    `digits_and_tones`: those, digits dialled on a telephone, both together, and digits spelled out."""
    seq_length: int = 4096
    """Most tokens of a sample, and of a pack of samples, media included. A longer sample counts as bad."""
    packing: bool = True
    """Lay samples end to end in one row that keeps them apart (THD). False: one sample a row, padded on the right."""
    on_bad_sample: Literal["skip", "fail"] = "skip"
    """`skip`: leave out samples that are malformed or too long, put others in the places of those whose media cannot be
    decoded, and log them to `<run.dir>/bad_samples.jsonl`. `fail`: end the run at the first."""
    max_bad_fraction: float = 0.01
    """Share of malformed or undecodable samples that ends the run in spite of `skip`."""
    workers: int = 2
    """Threads per rank that decode media ahead of the training step. 0: the one that reads ahead decodes, too."""


@dataclass
class TrainConfig:
    """Length and batch of the training."""

    steps: int = 100
    """Optimizer steps."""
    global_batch_size: int = 32
    """Samples per optimizer step over all ranks, packed or not. Need not divide by anything."""
    microbatch_size: int = 1
    """Rows per forward pass and language lane: samples when padded, packs when packed."""
    activation_checkpointing: Literal["none", "selective", "full"] = "none"
    """What the backward pass computes again instead of keeping: nothing, the attention (no backend ever keeps its
    scores, so `selective` is as `none`), or every layer."""


@dataclass
class OptimConfig:
    """AdamW and its learning rate."""

    lr: float = 1.0e-4
    """Highest learning rate. 0 is legal."""
    min_lr: float = 0.0
    """Learning rate that `cosine` and `linear` end at."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Course of the learning rate after the warm-up."""
    warmup_steps: int = 0
    """Steps over which the learning rate rises linearly from 0."""
    weight_decay: float = 0.0
    """Decoupled weight decay of matrices; vectors and scalars have none."""
    beta1: float = 0.9
    """Decay of the first moment."""
    beta2: float = 0.999
    """Decay of the second moment."""
    eps: float = 1.0e-8
    """Added to the root of the second moment."""
    clip_grad: float | None = 1.0
    """Largest global gradient norm over all modules. Null: gradients are not clipped."""


@dataclass
class LoraConfig:
    """Low-rank adapters on a module's linears."""

    targets: list[str]
    """Name patterns (`*` and `?` are wildcards) of the linears that get an adapter, by their Hugging Face names
    without `.weight`: `*.q_proj`, `*.layers.3.mlp.*`."""
    rank: int = 16
    """Inner size of the adapters."""
    alpha: float = 32.0
    """The adapter's product counts alpha / rank times."""
    rank_stabilized: bool = False
    """Count it alpha / sqrt(rank) times instead (PEFT's `use_rslora`)."""
    path: str | None = None
    """Folder of a PEFT adapter (`adapter_model.safetensors`) that training starts from; null: B starts at zero."""

    @property
    def scale(self) -> float:
        """Factor of the adapter's product."""
        return self.alpha / (math.sqrt(self.rank) if self.rank_stabilized else self.rank)


@dataclass
class ModuleConfig:
    """How one module is trained."""

    freeze: bool | Literal["tower"] | list[str] | None = None
    """True: none of the module's own weights train. `tower`: only its projector does. A list of name patterns
    (`*` and `?` are wildcards): the parameters that match one do not; a pattern behind `!` makes them train after all,
    the last match wins. Null: true with `lora`, else false. Adapters always train."""
    lora: LoraConfig | None = None
    """Low-rank adapters (LoRA) on the module's linears; null: none."""
    lr: float | None = None
    """Highest learning rate of this module; null: `optim.lr`."""
    min_lr: float | None = None
    """Learning rate that its `cosine` or `linear` schedule ends at; null: `optim.min_lr`."""
    schedule: Literal["constant", "linear", "cosine"] | None = None
    """Course of its learning rate after the warm-up; null: `optim.schedule`."""
    warmup_steps: int | None = None
    """Steps over which its learning rate rises linearly from 0; null: `optim.warmup_steps`."""
    weight_decay: float | None = None
    """Decoupled weight decay of its matrices; null: `optim.weight_decay`."""
    hf_path: str | None = None
    """Hugging Face directory that this encoder comes from instead of `model.hf_path`, that of SigLIP for example: its
    `config.json`, or the section `<module>_config` in it, selects and sizes the encoder; its weights fill the tower.
    The projector starts from random weights."""
    decoder: str | None = None
    """What a decoder is: the `architecture` of a class in `mimo_gemma4/decoders/`, `pixel_regression` for example."""
    decoder_options: dict[str, bool | int | float | str] | None = None
    """Options of that class; null: their defaults."""
    loss_weight: float = 1.0
    """How often the summed loss of a decoder counts beside the summed loss of the tokens."""
    processor: dict[str, int] | None = None
    """What to change in this encoder's preprocessing, `{max_soft_tokens: 560}` for example. Null: it is that of the
    model directory or preset."""
    run_ahead: int = 2
    """Microbatches that an encoder may have encoded, beyond one for each further stage between it and the last of the
    language module, without having their gradients back; each keeps its activations. With 1 it waits for every
    transfer, with 2 transfers travel while it works. Not bounded where the encoder is frozen and has ranks of its own.
    """

    @property
    def frozen(self) -> bool | Literal["tower"] | list[str]:
        """`freeze` with its default filled in."""
        return self.lora is not None if self.freeze is None else self.freeze


@dataclass
class CheckpointConfig:
    """Saving and resuming."""

    every: int | None = 100
    """Steps between checkpoints; one is also written at the end. Null: only that one."""
    keep: int = 3
    """Newest checkpoints that stay on disk."""
    resume: str = "auto"
    """`auto`: from the newest complete checkpoint of `run.dir`, if there is one. `never`: from the beginning. Else the
    path of a checkpoint."""
    init_from: str | None = None
    """Checkpoint, or run directory, whose weights a run starts from where it has nothing to resume: at step 0, with a
    new optimizer."""


@dataclass
class EvalConfig:
    """Evaluation on `data.valid`."""

    every: int | None = None
    """Steps between evaluations; one also runs at the end. Null: only that one."""
    samples: int | None = None
    """Held-out samples to evaluate, the first of the set; null: all."""
    batch_size: int = 32
    """Samples per evaluation batch over all ranks."""
    max_new_tokens: int = 0
    """Longest greedy answer, compared with the true one. 0: only the loss is computed."""
    pictures: int = 32
    """Answers that `samples.png` shows, each with the first image and the spectrogram of the first sound."""


@dataclass
class LoggingConfig:
    """What the run tells beside `metrics.jsonl`."""

    every: int = 10
    """Steps between log lines."""
    tensorboard: bool = True
    """Write TensorBoard event files to `<run.dir>/tensorboard`."""
    wandb: str | None = None
    """Weights & Biases project to log to; needs the `wandb` extra."""


@dataclass
class ProfileConfig:
    """Traces of single steps, for `python -m mimo_gemma4.timeline` and trace viewers."""

    steps: int | str | list[int] | None = None
    """Training steps to trace: a number, a list (`[20,21]`) or a range (`20-22`). Every rank writes a Chrome trace of
    them to `<run.dir>/profile/rank-<rank>.json`. Null: none, at no cost."""

    @property
    def numbers(self) -> tuple[int, ...]:
        """The steps to trace, ascending. Raises `ValueError` for a string that is no range."""
        if isinstance(self.steps, str):
            first, last = (int(part) for part in self.steps.split("-"))
            return tuple(range(first, last + 1))
        if isinstance(self.steps, list):
            return tuple(sorted(set(self.steps)))
        return () if self.steps is None else (self.steps,)


@dataclass
class Config:
    """All options of one run."""

    layout: LayoutConfig
    data: DataConfig
    run: RunConfig = field(default_factory=RunConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    modules: dict[str, ModuleConfig] = field(default_factory=dict)
    """Per module of the layout; a module that is not named trains with the defaults."""
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    profile: ProfileConfig = field(default_factory=ProfileConfig)

    def module(self, name: str) -> ModuleConfig:
        """How module `name` of the layout is trained."""
        return self.modules.get(name, ModuleConfig())

    def module_optim(self, name: str) -> OptimConfig:
        """`optim` as it is for module `name`, with what that sets itself."""
        module = self.module(name)
        own = {key: getattr(module, key) for key in ("lr", "min_lr", "schedule", "warmup_steps", "weight_decay")}
        return replace(self.optim, **{key: value for key, value in own.items() if value is not None})

    @property
    def lora_scales(self) -> dict[str, float]:
        """Factor of the adapters' product, by module that has adapters."""
        return {name: module.lora.scale for name, module in self.modules.items() if module.lora is not None}
