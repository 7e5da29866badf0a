"""Which linears `modules.<name>.lora.targets` adapts, what it refuses, and where adapters start."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from mimo_gemma4.config import LoraConfig
from mimo_gemma4.errors import CheckpointError, ConfigError
from mimo_gemma4.weights.bindings import Binding, Constant, bind_replicated, bind_sharded, initialise, load
from mimo_gemma4.weights.lora import AdaptedModule, attach, has_adapter
from mimo_gemma4.weights.lora_files import AdapterSource, TrainedAdapters

LORA = LoraConfig(targets=["*.q_proj", "*.value"], rank=2, alpha=3.0)


class Block(nn.Module):
    """Two linears that share a weight, one of their own, a norm, and experts."""

    config = None

    def __init__(self) -> None:
        super().__init__()
        self.fused = nn.Linear(5, 12, bias=False)
        self.value = nn.Linear(12, 4)
        self.norm = nn.Parameter(torch.ones(5))
        self.experts = nn.Parameter(torch.randn(3, 4, 5))

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.value(self.fused(inputs * self.norm))

    def bindings(self) -> list[Binding]:
        return [
            bind_sharded("block.k_proj.weight", self.fused.weight, 0, None, at=slice(0, 7)),
            bind_sharded("block.q_proj.weight", self.fused.weight, 0, None, at=slice(7, 12)),
            bind_replicated("block.value.weight", self.value.weight),
            bind_replicated("block.value.bias", self.value.bias, Constant(0.5)),
            bind_replicated("block.norm.weight", self.norm),
            bind_replicated("block.experts.gate_up_proj", self.experts),
        ]


def adapted(lora: LoraConfig = LORA) -> AdaptedModule:
    return attach("language", Block(), lora)


def test_names_and_shapes_are_those_of_peft() -> None:
    found = {binding.name: binding.shape for binding in adapted().adapter_bindings()}
    assert found == {
        "block.q_proj.lora_A.weight": (2, 5),
        "block.q_proj.lora_B.weight": (5, 2),
        "block.value.lora_A.weight": (2, 12),
        "block.value.lora_B.weight": (4, 2),
    }


def test_a_linear_knows_whether_it_has_an_adapter() -> None:
    block = Block()
    attach("language", block, replace(LORA, targets=["*.value"]))
    assert has_adapter(block.value) and not has_adapter(block.fused)


def test_a_fresh_adapter_changes_nothing_and_starts_alike_everywhere() -> None:
    module = adapted()
    inputs = torch.randn(3, 5)
    initialise(module.bindings(), seed=4)
    values = {binding.name: binding.view().clone() for binding in module.adapter_bindings()}
    plain = Block()
    initialise(plain.bindings(), seed=4)
    assert torch.equal(module.base(inputs), plain(inputs))
    assert not values["block.value.lora_B.weight"].any()
    a = values["block.value.lora_A.weight"]
    assert 0.7 * 12**-0.5 < a.abs().max() <= 12**-0.5
    again = adapted(replace(LORA, targets=["*.value"]))  # whatever else is adapted
    initialise(again.bindings(), seed=4)
    assert torch.equal(again.adapter_bindings()[0].view(), a)


def test_the_output_is_that_of_the_merged_weights() -> None:
    module = adapted()
    initialise(module.bindings(), seed=4)
    for binding in module.adapter_bindings():
        nn.init.normal_(binding.view().data)
    inputs = torch.randn(2, 3, 5)
    expected = module.base(inputs)
    tensors = {binding.name: binding.view().detach() for binding in module.adapter_bindings()}
    trained = TrainedAdapters(tensors, {"block.q_proj": 1.5, "block.value": 1.5})
    merged = Block()
    with torch.no_grad():
        for mine, its in zip(merged.bindings(), module.base.bindings(), strict=True):
            first, rest = (
                its.view().detach().split((1, len(its.view()) - 1))
            )  # weights may be read a few rows at a time
            mine.view().copy_(torch.cat((trained.merged(its.name, first), trained.merged(its.name, rest, start=1))))
    torch.testing.assert_close(merged(inputs), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("*.gate", r"no linear matches '\*.gate'; known: k_proj, q_proj, value; names look like 'block.k_proj'"),
        ("*.qproj", "did you mean `q_proj`"),
        ("*.norm", r"'\*.norm' matches 'block.norm', which is no linear"),
        ("block.*", "matches 'block.experts.gate_up_proj'; experts are stacked tensors, not linears"),
    ],
)
def test_a_pattern_that_cannot_be_followed_is_refused(pattern: str, message: str) -> None:
    with pytest.raises(ConfigError, match=rf"modules.language.lora.targets: .*{message}"):
        adapted(LoraConfig(targets=["*.value", pattern]))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A PEFT adapter of what `LORA` names."""
    tensors = {binding.name: torch.randn(binding.shape) for binding in adapted().adapter_bindings()}
    path = tmp_path / "adapter"
    TrainedAdapters(tensors, {"block.q_proj": 1.5, "block.value": 1.5}).save(path, base_model=None)
    return path


def test_an_adapter_with_several_ranks_is_written_with_patterns(tmp_path: Path) -> None:
    tensors = {f"{n}.lora_A.weight": torch.ones(r, 5) for n, r in (("x.one", 2), ("x.two", 4))}
    tensors |= {f"{n}.lora_B.weight": torch.ones(3, r) for n, r in (("x.one", 2), ("x.two", 4))}
    TrainedAdapters(tensors, {"x.one": 1.5, "x.two": 2.0}).save(tmp_path / "adapter", base_model="base")
    written = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (written["r"], written["lora_alpha"]) == (2, 3.0)
    assert written["rank_pattern"] == {"x.two": 4} and written["alpha_pattern"] == {"x.two": 8.0}


@pytest.mark.parametrize(
    ("lora", "error", "message"),
    [
        (replace(LORA, rank=3), ConfigError, "has r 2 and a scale of 1.5 for block.*, but modules.*asks for rank 3"),
        (replace(LORA, alpha=1.0), ConfigError, "asks for rank 2 and a scale of 0.5: set rank and alpha"),
        (replace(LORA, targets=["*.value"]), ConfigError, "also adapts 1 linears, such as 'block.q_proj'"),
        (replace(LORA, targets=["*.[kq]_proj", "*.value"]), CheckpointError, "lacks 2 tensors .*k_proj.lora_A.weight"),
    ],
    ids=["rank", "scale", "more than configured", "less than configured"],
)
def test_an_adapter_that_does_not_fit_is_refused(
    lora: LoraConfig, error: type[Exception], message: str, folder: Path
) -> None:
    module = adapted(lora)
    with pytest.raises(error, match=message):
        source = AdapterSource(folder, "modules.language.lora", lora)
        source.check_all_read({binding.name for binding in module.adapter_bindings()})
        load(module.adapter_bindings(), source, "the adapter")


CHANGES = {
    "use_dora": True,
    "bias": "lora_only",
    "lora_bias": True,
    "modules_to_save": ["lm_head"],
    "trainable_token_indices": [5],
    "target_parameters": ["experts.down_proj"],
    "layer_replication": [[0, 2]],
    "fan_in_fan_out": True,
    "alora_invocation_tokens": [3],
    "some_later_method": {"strength": 1},
    "peft_type": "LOHA",
    "init_lora_weights": "pissa_niter_4",
}


@pytest.mark.parametrize("key", CHANGES)
def test_an_adapter_that_is_more_than_low_rank_products_is_refused_by_name(key: str, folder: Path) -> None:
    change_config(folder, **{key: CHANGES[key]})
    with pytest.raises(ConfigError, match=f"{key} .*is not supported: only LoRA on linears"):
        AdapterSource(folder, "modules.language.lora", LORA)


def change_config(folder: Path, **values: object) -> None:
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | values))


@pytest.mark.parametrize(
    "name",
    [
        "embed_tokens.token_adapter.trainable_tokens_delta",
        "embed_tokens.lora_embedding_A",
        "lm_head.weight",
        "value.lora_magnitude_vector",
        "value.lora_B.bias",
    ],
)
def test_a_tensor_that_is_no_linear_s_product_is_refused_by_name(name: str, folder: Path) -> None:
    tensors = load_file(folder / "adapter_model.safetensors")
    save_file(tensors | {f"base_model.model.{name}": torch.ones(2)}, folder / "adapter_model.safetensors")
    with pytest.raises(ConfigError, match=f"1 tensors that are no linear's A or B, such as {name}"):
        AdapterSource(folder, "modules.language.lora", LORA)


def test_patterns_count_as_in_peft(folder: Path) -> None:
    """PEFT takes the first pattern that matches the end of a name, and `r` and `lora_alpha` for all others."""
    change_config(folder, r=7, lora_alpha=70, rank_pattern={"value": 2, r"block\.\w_proj": 2})
    change_config(folder, alpha_pattern={".*proj": 3, "value": 3, "k_proj": 9})
    module, source = adapted(), AdapterSource(folder, "modules.language.lora", LORA)
    load(module.adapter_bindings(), source, "the adapter")
    change_config(folder, alpha_pattern={".*proj": 3, "value": 4})
    with pytest.raises(ConfigError, match="has r 2 and a scale of 2 for block.value"):
        load(module.adapter_bindings(), AdapterSource(folder, "modules.language.lora", LORA), "the adapter")


@pytest.mark.parametrize("prefix", ["model.language_model.", "model.", "language_model.", ""])
def test_linears_are_known_under_the_names_of_every_class(prefix: str, folder: Path) -> None:
    tensors = load_file(folder / "adapter_model.safetensors")
    renamed = {name.replace("model.block.", f"model.{prefix}layers.3."): tensor for name, tensor in tensors.items()}
    save_file(renamed, folder / "adapter_model.safetensors")
    names = AdapterSource(folder, "modules.language.lora", LORA).names
    linears = ("q_proj", "value")
    expected = {f"model.language_model.layers.3.{linear}.lora_{end}.weight" for linear in linears for end in "AB"}
    assert set(names) == expected


def test_a_text_only_adapter_has_the_names_of_its_class_and_comes_back(tmp_path: Path) -> None:
    linear = "model.language_model.layers.0.mlp.up_proj"
    tensors = {f"{linear}.lora_A.weight": torch.ones(2, 5), f"{linear}.lora_B.weight": torch.ones(3, 2)}
    TrainedAdapters(tensors, {linear: 1.5}).save(tmp_path / "a", base_model=None, text_only=True)
    stored = load_file(tmp_path / "a" / "adapter_model.safetensors")
    assert set(stored) == {f"base_model.model.model.layers.0.mlp.up_proj.lora_{end}.weight" for end in "AB"}
    assert json.loads((tmp_path / "a/adapter_config.json").read_text())["target_modules"] == [
        "model.layers.0.mlp.up_proj"
    ]
    source = AdapterSource(tmp_path / "a", "modules.language.lora", LORA)
    assert set(source.names) == set(tensors)
    foreign = {name.replace(linear, "model.vision_tower.x"): tensor for name, tensor in tensors.items()}
    with pytest.raises(CheckpointError, match="model.vision_tower.x has an adapter, but .* text alone"):
        TrainedAdapters(foreign, {"model.vision_tower.x": 1.5}).save(tmp_path / "b", base_model=None, text_only=True)


DAMAGE = {
    "no JSON": ("adapter_config.json", b"{", "is no usable configuration"),
    "a list": ("adapter_config.json", b"[]", "is no usable configuration"),
    "no rank": ("adapter_config.json", b'{"peft_type": "LORA", "lora_alpha": 3}', "is no usable configuration"),
    "rank of 0": ("adapter_config.json", b'{"r": 0, "lora_alpha": 3}', "must be positive"),
    "a bad pattern": ("adapter_config.json", b'{"r": 2, "lora_alpha": 3, "rank_pattern": {"(": 2}}', "no usable"),
    "no tensors": ("adapter_model.safetensors", b"", "is no readable safetensors file"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_adapter_is_named(kind: str, folder: Path) -> None:
    name, content, message = DAMAGE[kind]
    (folder / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        AdapterSource(folder, "modules.language.lora", LORA)


def test_a_folder_without_adapter_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="lacks adapter_config.json and adapter_model.safetensors"):
        AdapterSource(tmp_path, "modules.language.lora", LORA)
