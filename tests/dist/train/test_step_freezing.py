"""What is frozen keeps its weights, and what only frozen modules would need is neither computed nor moved."""

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from mimo_gemma4.config import load_config
from mimo_gemma4.model.bridge import Bridge
from mimo_gemma4.train.build import build_trainer
from mimo_gemma4.train.setup import set_up_run
from tests.dist.harness import run_ranks
from tests.vlm_reference import write_shards

PROJECTOR = "model.embed_vision.embedding_projection.weight"
TENSOR_PARALLEL = ["layout.vision.ranks=2", "layout.language={ranks: 2, tp: 2, sequence_parallel: true}"]
CONTEXT_PARALLEL = ["layout.vision.ranks=1", "layout.language={ranks: 2, cp: 2}"]
PIPELINE = ["layout.vision.ranks=1", "layout.language={ranks: 2, pp: 2}"]
ENCODER_PIPELINE = ["layout.vision={ranks: 2, pp: 2}", "layout.language.ranks=1"]
ONE_RANK = ["layout.placement=colocated"]


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("freezing")
    shard = write_shards(folder)
    (folder / "run.yaml").write_text(
        f"""
        run: {{dir: {folder}/run}}
        model: {{preset: gemma4_tiny, precision: fp32}}
        layout: {{vision: {{}}, language: {{}}}}
        data: {{train: {{shards: "{shard}"}}, seq_length: 300, packing: false}}
        train: {{global_batch_size: 10, microbatch_size: 1}}
        logging: {{tensorboard: false}}
        """
    )
    return folder


@dataclass(frozen=True)
class Steps:
    """What two training steps did on one rank, or on all of them."""

    changed: set[str]
    """Names of the parameters that changed."""
    held: set[str]
    """Names of the parameters for which gradients or optimizer state are kept."""
    elements: tuple[int, int]
    """Of the parameters that train, and of the gradient buffers, which pad them."""
    returned: int
    """Row gradients that the language ranks gave back."""
    norms: list[float]
    """Gradient norm of each step over all modules."""


def two_steps(rank: int, folder: Path, overrides: list[str]) -> Steps:
    returned: list[int] = []
    post = Bridge.post_to_module

    def counted(self: Bridge, route, gradients):  # noqa: ANN001, ANN202
        returned.append(sum(parcel.count for parcel in route.language.parcels))
        return post(self, route, gradients)

    Bridge.post_to_module = counted
    config = load_config([f"config={folder}/run.yaml", *overrides])
    trainer = build_trainer(set_up_run(config))
    bindings = [
        binding
        for module in trainer.model.modules.values()
        for binding in module.bindings()
        if isinstance(binding.tensor, torch.nn.Parameter)
    ]
    before = [binding.view().detach().clone() for binding in bindings]
    norms = [float(trainer.train_step().grad_norm) for _ in range(2)]
    trainer.loader.close()
    changed = {b.name for b, old in zip(bindings, before, strict=True) if not torch.equal(b.view(), old)}
    with_state = {id(shard.tensor) for optimizer in trainer.optimizers.values() for shard in optimizer.trainable_shards}
    held = {b.name for b in bindings if id(b.tensor) in with_state or hasattr(b.tensor, "main_grad")}
    buffers = [buffer for o in trainer.optimizers.values() if o.ddp is not None for buffer in o.ddp.buffers]
    trained = {id(b.tensor): b.tensor.numel() for b in bindings if b.tensor.requires_grad}
    elements = (sum(trained.values()), sum(buffer.grad_data.numel() for buffer in buffers))
    return Steps(changed, held, elements, sum(returned), norms)


def steps_of_all(folder: Path, layout: list[str], ranks: int, *arguments: str) -> Steps:
    results = run_ranks(ranks, two_steps, folder, [*layout, *arguments], timeout=60)
    assert all(result.norms == results[0].norms for result in results)
    changed, held = (set().union(*(getattr(result, name) for result in results)) for name in ("changed", "held"))
    assert held == changed, "what is frozen has no gradients and no optimizer state; what trains has moved"
    elements = tuple(map(sum, zip(*(result.elements for result in results), strict=True)))
    return Steps(changed, held, elements, sum(result.returned for result in results), results[0].norms)


def in_language(name: str) -> bool:
    return name.startswith("model.language_model.")


def test_a_frozen_encoder_keeps_its_weights_and_no_gradient_is_returned(run_folder: Path) -> None:
    steps = steps_of_all(run_folder, TENSOR_PARALLEL, 4, "modules.vision.freeze=true")
    assert steps.returned == 0
    assert steps.changed and all(map(in_language, steps.changed))


def test_patterns_may_name_parameters_of_any_stage(run_folder: Path) -> None:
    """The first pattern matches on the first stage alone, the last on the last; embedding and head are on both."""
    patterns = ["*.layers.0.*", "*.embed_tokens.weight", "*.language_model.norm.weight"]
    steps = steps_of_all(run_folder, PIPELINE, 3, f"modules.language.freeze={patterns}")
    language = {name.removeprefix("model.language_model.") for name in steps.changed if in_language(name)}
    assert language
    assert not {"embed_tokens.weight", "norm.weight"} & language
    assert {name.split(".")[1] for name in language if name.startswith("layers.")} == set("12345")


def test_a_frozen_tower_trains_its_projector_alone(run_folder: Path) -> None:
    steps = steps_of_all(run_folder, TENSOR_PARALLEL, 4, "modules.vision.freeze=tower")
    assert steps.returned > 0
    assert {name for name in steps.changed if not in_language(name)} == {PROJECTOR}
    assert any(map(in_language, steps.changed))


@pytest.mark.parametrize("trained", ["tower.encoder.layers.1.", "tower.encoder.layers.0."], ids=["last", "first"])
def test_one_stage_of_an_encoder_trains_alone(run_folder: Path, trained: str) -> None:
    steps = steps_of_all(run_folder, ENCODER_PIPELINE, 3, f"modules.vision.freeze=['*','!*{trained}*']")
    encoder = {name for name in steps.changed if not in_language(name)}
    assert steps.returned > 0
    assert encoder and all(trained in name for name in encoder)


def test_patterns_freeze_what_they_match(run_folder: Path) -> None:
    changed = steps_of_all(
        run_folder,
        ONE_RANK,
        1,
        "modules.vision.freeze=['*.layers.0.*']",
        "modules.language.freeze=['*.embed_tokens.*']",
    ).changed
    assert PROJECTOR in changed and any("vision_tower.encoder.layers.1." in name for name in changed)
    assert not any("vision_tower.encoder.layers.0." in name for name in changed)
    assert any("language_model.layers.0." in name for name in changed)
    assert not any(".embed_tokens." in name for name in changed)


def test_exceptions_train_what_patterns_would_freeze(run_folder: Path) -> None:
    changed = steps_of_all(
        run_folder,
        ONE_RANK,
        1,
        "modules.vision.freeze=true",
        "modules.language.freeze=['*','!*.layers.5.*norm.weight']",
    ).changed
    assert changed and all(".language_model.layers.5." in name and name.endswith("norm.weight") for name in changed)


def test_each_module_goes_by_its_own_learning_rate(run_folder: Path) -> None:
    [steps] = run_ranks(1, two_steps, run_folder, [*ONE_RANK, "modules.language.lr=0"], timeout=60)
    assert steps.changed and not any(map(in_language, steps.changed))
    assert any(map(in_language, steps.held)), "it trains, at no speed"


@pytest.mark.parametrize(
    ("layout", "ranks"), [(TENSOR_PARALLEL, 4), (CONTEXT_PARALLEL, 3), (PIPELINE, 3)], ids=["tp 2 sp", "cp 2", "pp 2"]
)
def test_a_frozen_language_model_trains_the_encoder_alone(run_folder: Path, layout: list[str], ranks: int) -> None:
    """Also where a microbatch, or one rank's part of it, has no media: three of the ten samples are text alone.

    The gradient is that of one rank to a few fp32 roundings; the second follows an update that divides by the first.
    """
    alone = steps_of_all(run_folder, ONE_RANK, 1, "modules.language.freeze=true")
    steps = steps_of_all(run_folder, layout, ranks, "modules.language.freeze=true")
    assert steps.returned > 0
    assert steps.changed == alone.changed and not any(map(in_language, steps.changed))
    assert steps.norms[0] == pytest.approx(alone.norms[0], rel=1e-5)
    assert steps.norms[1] == pytest.approx(alone.norms[1], rel=1e-3)


LORA = "{targets: ['*.q_proj', '*.v_proj', '*.mlp.*'], rank: 4}"


def test_adapters_of_the_language_model_train_alone_behind_a_frozen_encoder(run_folder: Path) -> None:
    """A starts from values that no layout changes: with B = 0 the first norm depends on them."""
    arguments = ["modules.vision.freeze=true", f"modules.language.lora={LORA}"]
    alone = steps_of_all(run_folder, ONE_RANK, 1, *arguments)
    steps = steps_of_all(run_folder, TENSOR_PARALLEL, 4, *arguments)
    assert steps.returned == 0
    assert steps.changed == alone.changed and all(".lora_" in name for name in steps.changed)
    assert any(".q_proj.lora_A" in name for name in steps.changed)
    assert steps.norms[0] == pytest.approx(alone.norms[0], rel=1e-5)
    trained, buffered = alone.elements
    assert trained <= buffered < 1.5 * trained  # parameters start at multiples of 64 elements


def test_adapters_of_an_encoder_train_below_a_frozen_language_model(run_folder: Path) -> None:
    lora = "{targets: ['*.linear'], rank: 2}"
    steps = steps_of_all(
        run_folder,
        TENSOR_PARALLEL,
        4,
        f"modules.vision.lora={lora}",
        "modules.vision.freeze=tower",
        "modules.language.freeze=true",
    )
    assert steps.returned > 0
    assert PROJECTOR in steps.changed and any(".lora_B" in name for name in steps.changed)
    assert all(name == PROJECTOR or ".lora_" in name for name in steps.changed)
