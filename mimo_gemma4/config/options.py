"""Every option of a training run, with its default and its meaning; `loading.py` reads and checks them."""

import math
from dataclasses import dataclass, field, replace
from typing import Literal

from mimo_gemma4.config.ranges import option
from mimo_gemma4.config.structured import inline


@dataclass
class RunConfig:
    """The run as a whole: where it writes, and what makes it repeatable."""

    dir: str = "runs/{name}"
    """Folder of everything the run writes. `{name}` stands for the name of the configuration file."""
    seed: int = 1234
    """Seed of the initial weights (with each tensor's name), of the order of the data (with the epoch), and of torch's
    random generators on every rank."""
    deterministic: bool = False
    """Two runs on the same machine give the same bits. Slower on GPUs."""
    timeout_seconds: float = option(600.0, above=0)
    """A rank that waits longer than this for the others ends the run with an error."""


@dataclass
class ModelConfig:
    """Which model is trained, and in which precision."""

    preset: str = "gemma4_e4b"
    """One of `configs/model/*.yaml`: an architecture with random weights and a byte tokenizer. Only `gemma4_tiny` has
    tokens for media. Ignored where `hf_path` is set."""
    hf_path: str | None = None
    """Hugging Face Gemma 4 directory (`config.json`, `*.safetensors`, tokenizer) whose weights training starts from.
    The weights may be absent where `checkpoint.resume` or `checkpoint.init_from` gives them."""
    precision: Literal["fp32", "bf16", "fp8"] = "bf16"
    """`fp32` computes everything in fp32; `bf16` keeps fp32 main weights. `fp8` is not available yet."""
    backend: Literal["local", "te"] = "local"
    """`local` needs PyTorch alone. `te`: Transformer Engine does the attention of sliding layers without media."""
    attention: Literal["auto", "flex"] = "auto"
    """Kernels of attention on CUDA. `auto`: the fastest packed kernel that is installed (extra `kernels`) and fits the
    layers; FlexAttention elsewhere, as for images whose tokens see one another. `flex`: FlexAttention everywhere. The
    start of a run prints what each type of layers got, and why. On the CPU it is plain torch."""


@dataclass
class ModuleLayout:
    """The grid of one module. Its data-parallel size is ranks / (tp * cp * pp)."""

    ranks: int | list[int] | None = None
    """Number of ranks, taken in the order in which modules are written, or a list of global ranks. Null: every rank."""
    tp: int = option(1, above=0)
    """Tensor-parallel size."""
    cp: int = option(1, above=0)
    """Context-parallel size: over how many ranks a sequence is cut."""
    pp: int = option(1, above=0)
    """Pipeline-parallel size: into how many stages of consecutive layers the module is cut."""
    ep: int = option(1, above=0)
    """Expert-parallel size: over how many ranks experts are cut. It must divide dp * cp."""
    reads: str | None = None
    """Makes the module a decoder, whose inputs are the language model's final hidden states at the soft tokens of this
    encoder. Null: the module is an encoder, or the language model."""
    sequence_parallel: bool = False
    """Cut activations between tensor-parallel layers along the sequence. Needs tp > 1."""
    part_shared_key_values: bool = False
    """Let pipeline stages separate layers that share keys and values, which then travel between stages. E2B and E4B
    share them in their last 20 and 18 layers, which otherwise stay in one stage."""


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
    """Like `shards` of a single set."""
    weight: float = option(1.0, above=0)
    """Its share of the samples of a step, relative to the other sets. Each set has epochs of its own. Sets of
    `data.valid` have no weights: every sample counts once."""


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
    seq_length: int = option(4096, above=0)
    """Most tokens of a sample, and of a pack of samples, media included. A longer sample counts as bad."""
    packing: bool = True
    """Lay samples end to end in one sequence, where each attends to itself alone (THD). False: one sample per sequence,
    padded on the right."""
    thoughts: Literal["learn", "as_template"] = "learn"
    """Thoughts of answers (`reasoning_content`, `<|channel>thought…`). `learn`: train on those of every answer with a
    loss, in the template's form. `as_template`: the chat template decides; what it strips is counted in a warning."""
    on_bad_sample: Literal["skip", "fail"] = "skip"
    """`skip`: leave out samples that are malformed or too long, replace those whose media cannot be decoded, and log
    them to `<run.dir>/bad_samples.jsonl`. `fail`: end the run at the first."""
    max_bad_fraction: float = option(0.01, at_least=0, at_most=1)
    """Share of malformed or undecodable samples that ends the run in spite of `skip`."""
    workers: int = option(2, at_least=0)
    """Threads per rank that decode media ahead of the training step. 0: the thread that reads ahead decodes, too."""
    retries: int = option(5, at_least=0)
    """How often a failed or short answer of a remote file system is asked for again, after pauses that double from
    0.25 s. What fails in spite of it ends the run; it never counts as a bad sample."""
    retry_seconds: float = option(60.0, at_least=0)
    """No request is tried again later than this after its first attempt."""


@dataclass
class TrainConfig:
    """Length and batch of the training."""

    steps: int = option(100, at_least=0)
    """Optimizer steps."""
    global_batch_size: int = option(32, above=0)
    """Samples per optimizer step over all ranks, packed or not. Need not divide by anything."""
    microbatch_size: int = option(1, above=0)
    """Samples, or packs of samples with `data.packing`, per forward pass of a language lane."""
    activation_checkpointing: Literal["none", "selective", "full"] = "none"
    """What the backward pass recomputes instead of keeping: nothing, the attention scores (which no backend keeps, so
    `selective` equals `none`), or every layer."""


@dataclass
class OptimConfig:
    """AdamW and its learning rate."""

    lr: float = option(1.0e-4, at_least=0)
    """Highest learning rate. 0 is legal."""
    min_lr: float = option(0.0, at_least=0)
    """Learning rate that `cosine` and `linear` end at."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Course of the learning rate after the warm-up."""
    warmup_steps: int = option(0, at_least=0)
    """Steps over which the learning rate rises linearly from 0."""
    weight_decay: float = option(0.0, at_least=0)
    """Decoupled weight decay of matrices; vectors and scalars have none."""
    beta1: float = option(0.9, at_least=0, below=1)
    """Decay of the first moment."""
    beta2: float = option(0.999, at_least=0, below=1)
    """Decay of the second moment."""
    eps: float = option(1.0e-8, above=0)
    """Added to the root of the second moment."""
    clip_grad: float | None = option(1.0, above=0)
    """Largest global gradient norm over all modules. Null: gradients are not clipped."""


@dataclass
class LoraConfig:
    """Low-rank adapters on a module's linears."""

    targets: list[str]
    """Name patterns (`*` and `?` are wildcards) of the linears that get an adapter, by their Hugging Face names
    without `.weight`: `*.q_proj`, `*.layers.3.mlp.*`."""
    rank: int = option(16, above=0)
    """Inner size of the adapters."""
    alpha: float = option(32.0, above=0)
    """The adapter's output is scaled by alpha / rank."""
    rank_stabilized: bool = False
    """Scale it by alpha / sqrt(rank) instead (PEFT's `use_rslora`)."""
    path: str | None = None
    """Folder of a PEFT adapter (`adapter_model.safetensors`) that training starts from; null: B starts at zero."""

    @property
    def scale(self) -> float:
        """Factor of the adapter's output."""
        return self.alpha / (math.sqrt(self.rank) if self.rank_stabilized else self.rank)


@dataclass
class ModuleConfig:
    """How one module is trained."""

    freeze: bool | Literal["tower"] | list[str] | None = None
    """True: freeze all of the module's own weights. `tower`: all but its projector. A list of name patterns (`*` and
    `?` are wildcards): freeze the parameters that match one; a pattern after `!` makes them train after all, and the
    last match wins. Null: true with `lora`, else false. Adapters always train."""
    lora: LoraConfig | None = None
    """Low-rank adapters (LoRA) on the module's linears; null: none."""
    lr: float | None = option(None, at_least=0)
    """Highest learning rate of this module; null: `optim.lr`."""
    min_lr: float | None = option(None, at_least=0)
    """Learning rate that its `cosine` or `linear` schedule ends at; null: `optim.min_lr`."""
    schedule: Literal["constant", "linear", "cosine"] | None = None
    """Course of its learning rate after the warm-up; null: `optim.schedule`."""
    warmup_steps: int | None = option(None, at_least=0)
    """Steps over which its learning rate rises linearly from 0; null: `optim.warmup_steps`."""
    weight_decay: float | None = option(None, at_least=0)
    """Decoupled weight decay of its matrices; null: `optim.weight_decay`."""
    hf_path: str | None = None
    """Hugging Face directory that this encoder comes from instead of `model.hf_path`, for example one of SigLIP. Its
    `config.json`, or the section `<module>_config` in it, selects and sizes the encoder; its weights fill the tower.
    The projector starts from random weights."""
    decoder: str | None = None
    """The `architecture` of a decoder's class in `mimo_gemma4/decoders/`, for example `pixel_regression`."""
    decoder_options: dict[str, bool | int | float | str] | None = None
    """Options of the decoder's class; null: their defaults."""
    loss_weight: float = option(1.0, at_least=0)
    """Factor of a decoder's summed loss, which is added to the summed loss of the tokens."""
    processor: dict[str, int] | None = None
    """Changes to this encoder's preprocessing, for example `{max_soft_tokens: 560}`. Null: as in the model directory or
    preset."""
    run_ahead: int = option(2, above=0)
    """Microbatches that an encoder may encode before it has their gradients, beyond one for each further stage between
    it and the last of the language module; each keeps its activations. With 1 it waits for every transfer, with 2
    transfers overlap with its work. Not bounded where the encoder is frozen and has ranks of its own."""

    @property
    def frozen(self) -> bool | Literal["tower"] | list[str]:
        """`freeze` with its default filled in."""
        return self.lora is not None if self.freeze is None else self.freeze


@dataclass
class CheckpointConfig:
    """Saving and resuming."""

    every: int | None = option(100, above=0)
    """Steps between checkpoints; one is also written at the end. Null: only that one."""
    keep: int = option(3, above=0)
    """Newest checkpoints that stay on disk."""
    resume: str = "auto"
    """`auto`: from the newest complete checkpoint of `run.dir`, if there is one. `never`: from the beginning. Else the
    path of a checkpoint."""
    resume_data: Literal["strict", "continue"] = "strict"
    """Whether a run may go on with other data than its checkpoint records: other sources, `run.seed` or
    `data.seq_length`. `strict`: no. `continue`: sources that are as before go on at their next sample, each other one
    begins a new pass. A changed `train.global_batch_size` goes on at the next sample either way."""
    init_from: str | None = None
    """Checkpoint, or run directory, whose weights a run starts from where it has nothing to resume: at step 0, with a
    new optimizer."""


@dataclass
class EvalConfig:
    """Evaluation on `data.valid`."""

    every: int | None = option(None, above=0)
    """Steps between evaluations; one also runs at the end. Null: only that one."""
    samples: int | None = option(None, above=0)
    """How many held-out samples to evaluate, from the first; of several sets, in proportion to their sizes and at
    least one each. Null: all."""
    batch_size: int = option(32, above=0)
    """Samples per evaluation batch over all ranks."""
    max_new_tokens: int = option(0, at_least=0)
    """Longest greedy answer, compared with the true one. 0: only the loss is computed."""
    pictures: int = option(32, at_least=0)
    """Answers that `samples.png` shows, each with the first image and the spectrogram of the first sound."""


@dataclass
class LoggingConfig:
    """Log output beside `metrics.jsonl`."""

    every: int = option(10, above=0)
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
        """`optim` with the values that `modules.<name>` overrides."""
        module = self.module(name)
        own = {key: getattr(module, key) for key in ("lr", "min_lr", "schedule", "warmup_steps", "weight_decay")}
        return replace(self.optim, **{key: value for key, value in own.items() if value is not None})

    @property
    def lora_scales(self) -> dict[str, float]:
        """Factor of the adapters' output, by module that has adapters."""
        return {name: module.lora.scale for name, module in self.modules.items() if module.lora is not None}
