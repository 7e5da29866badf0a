"""Every mistake in a configuration is a `ConfigError` that names the key, the nearest valid key and its origin."""

from pathlib import Path

import pytest

from mimo_gemma4.config import load_config
from mimo_gemma4.errors import ConfigError

BASE = """
layout:
  vision: {ranks: 2}
  language: {ranks: 2, tp: 2, sequence_parallel: true}
data:
  train: {shards: train.tar}
"""


@pytest.fixture
def base(tmp_path: Path) -> Path:
    path = tmp_path / "base.yaml"
    path.write_text(BASE)
    return path


@pytest.mark.parametrize(
    ("argument", "parts"),
    [
        ("train.stepz=3", ["`train.stepz`", "did you mean `steps`?"]),
        ("trian.steps=3", ["`trian`", "did you mean `train`?"]),
        ("layout.vision.tpp=2", ["`layout.vision.tpp`", "did you mean `tp`?"]),
        ("layout.placment=colocated", ["`layout.placment`", "did you mean `placement`?"]),
        ("layout.placement=disjoined", ["`layout.placement`", "did you mean `disjoint`?"]),
        ("modules.vison.lr=1", ["`modules.vison`", "did you mean `vision`?"]),
        ("model.precision=bf61", ["fp32 | bf16 | fp8", "did you mean `bf16`?"]),
        ("train.steps=many", ["`train.steps` must be int", "'many'"]),
        ("train.steps=1.5", ["`train.steps` must be int", "1.5"]),
        ("train.steps=true", ["`train.steps` must be int", "True"]),
        ("optim.lr=true", ["`optim.lr` must be float", "True"]),
        ("run.dir=[a]", ["`run.dir` must be str"]),
        ("data.train.shards=[a.tar,3]", ["`data.train.shards[1]` must be str", "3"]),
        ("modules.vision.freeze=towr", ["`modules.vision.freeze`", "bool | tower | list of str"]),
        ("modules.language.lora={rank: 4}", ["`modules.language.lora.targets` is missing"]),
        ("modules.language.lora={targets: []}", ["`modules.language.lora.targets` names no linear"]),
        ("modules.language.lora={targets: ['*'], rank: 0}", ["`modules.language.lora.rank` must be greater than 0"]),
        ("modules.language={freeze: false, lora: {targets: ['*']}}", ["`modules.language.freeze` false would train"]),
        ("layout.vision.ranks=[0,a]", ["`layout.vision.ranks[1]` must be int"]),
        ("layout=null", ["`layout` must be mapping, not null"]),
        ("data.train=null", ["`data.train` must be mapping, not null"]),
        ("train.microbatch_size=0", ["`train.microbatch_size` must be greater than 0, not 0"]),
        ("optim.lr=-1", ["`optim.lr` must not be negative", "-1"]),
        ("optim.beta2=1.0", ["`optim.beta2` must be in [0, 1)", "1.0"]),
        ("optim.lr=.nan", ["`optim.lr`", "nan"]),
        ("optim.lr=.inf", ["`optim.lr` must not be negative or infinite", "inf"]),
        ("optim.clip_grad=.inf", ["`optim.clip_grad` must be finite, not inf"]),
        ("run.timeout_seconds=.nan", ["`run.timeout_seconds` must be greater than 0, not nan"]),
        ("data.max_bad_fraction=1.5", ["`data.max_bad_fraction` must be in [0, 1], not 1.5"]),
        ("data.valid={held_out: {shards: a.tar, weight: .inf}}", ["`data.valid.held_out.weight` must be finite"]),
        ("layout.language.tp=0", ["`layout.language.tp` must be greater than 0, not 0"]),
        ("layout.vision.ep=-2", ["`layout.vision.ep` must be greater than 0, not -2"]),
        ("modules.language.lora={targets: ['*'], alpha: .inf}", ["`modules.language.lora.alpha` must be finite"]),
        ("modules.vision.lr=-1", ["`modules.vision.lr` must not be negative"]),
        ("modules.vision.warmup_steps=-1", ["`modules.vision.warmup_steps` must not be negative"]),
        ("modules.vision.schedule=cosin", ["`modules.vision.schedule` must be constant | linear | cosine | null"]),
        (
            "modules.vision.decoder=pixel_regression",
            ["`modules.vision.decoder` is for decoders", "`layout.vision.reads`"],
        ),
        ("modules.vision.loss_weight=2", ["`modules.vision.loss_weight` is for decoders"]),
        ("layout.pixels={ranks: 1, reads: vision}", ["`modules.pixels.decoder` is missing", "`layout.pixels.reads`"]),
        ("modules.language.run_ahead=3", ["`modules.language.run_ahead` is for encoders"]),
        ("layout.vision=null", ["unknown key `layout.vision` (a <module> there takes a mapping)"]),
        ("model.precision=fp8", ["`model.precision` fp8", "not available yet"]),
        ("profile.steps=20..22", ["`profile.steps` '20..22' is no range like 20-22"]),
        ("profile.steps=22-20", ["`profile.steps` '22-20' names no step"]),
        ("profile.steps=[]", ["`profile.steps` [] names no step"]),
        ("profile.steps=0", ["`profile.steps` names the steps 0 to 0", "from 1 to 100"]),
        ("profile.steps=[3,101]", ["`profile.steps` names the steps 3 to 101", "from 1 to 100"]),
        ("train.steps=${nothing}", ["nothing"]),
        ("run.dir.name=[", ["cannot be applied"]),
    ],
)
def test_a_wrong_argument_is_named(base: Path, argument: str, parts: list[str]):
    with pytest.raises(ConfigError) as caught:
        load_config([f"config={base}", "train.global_batch_size=8", argument])
    for part in [*parts, argument if "${" not in argument else str(base)]:
        assert part in str(caught.value)


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        (BASE + "train: {step: 3}", ["`train.step`", "did you mean `steps`?"]),
        ("data: {train: {shards: a}}", ["`layout` is missing"]),
        ("layout: {language: {ranks: 1}}", ["`data` is missing"]),
        ("layout: {language: {ranks: 1}}\ndata: {packing: true}", ["`data.train` is missing"]),
        ("layout: {language: {ranks: 1}}\ndata: {train: {}}", ["`data.train.shards` is missing"]),
        (
            "layout: {language: {ranks: 1}}\ndata: {train: {shards: a, web: {shards: b}}}",
            ["`data.train` has both `shards` and the sets `data.train.web`"],
        ),
        (
            "layout: {language: {ranks: 1}}\ndata: {train: {web: {shards: b, weight: 0}}}",
            ["`data.train.web.weight` must be greater than 0, not 0"],
        ),
        (
            "layout: {language: {ranks: 1}}\ndata: {quickstart: digits, train: {web: {shards: b}}}",
            ["`data.quickstart` writes the files of `data.train.shards`, which is missing"],
        ),
        (
            "layout: {language: {ranks: 1}}\ndata: {quickstart: digits, train: {shards: ['mine/train-000000.tar']}}",
            ["`data.quickstart` writes train-000000.tar", "data/digits/train-", "not ['mine/train-000000.tar']"],
        ),
        ("layout: {vision: {ranks: 1}}\ndata: {train: {shards: a}}", ["`layout` lacks `language`", "vision"]),
        ("layout: {}\ndata: {train: {shards: a}}", ["`layout` names no module"]),
        ("layout: [", ["not valid YAML"]),
        ("- 1", ["must hold a mapping"]),
    ],
)
def test_a_wrong_file_is_named(tmp_path: Path, text: str, parts: list[str]):
    path = tmp_path / "wrong.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_config([f"config={path}"])
    for part in [*parts, str(path)]:
        assert part in str(caught.value)


def test_the_file_is_blamed_when_another_argument_is_innocent(base: Path):
    base.write_text(BASE + "train: {microbatch_size: 0}\n")
    with pytest.raises(ConfigError, match="base.yaml"):
        load_config([f"config={base}", "train.steps=3"])


def test_a_missing_file_is_named_with_the_nearest():
    with pytest.raises(ConfigError, match="`quikstart.yaml` not found.*did you mean `quickstart.yaml`"):
        load_config(["config=quikstart.yaml"])


def test_outside_a_checkout_the_shipped_files_are_proposed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="nor in configs/ or /.*/configs; did you mean `quickstart.yaml`"):
        load_config(["config=quikstart.yaml"])


@pytest.mark.parametrize("arguments", [[], ["steps"], ["=3"]])
def test_a_command_line_without_key_and_value(arguments: list[str]):
    with pytest.raises(ConfigError):
        load_config(arguments)


@pytest.mark.parametrize("option", ["hf_path: /models/x", "processor: {patch_size: 4}", "lora: {targets: ['*']}"])
def test_options_of_encoders_are_refused_for_decoders(base: Path, option: str):
    module = f"modules.pixels={{decoder: pixel_regression, {option}}}"
    with pytest.raises(ConfigError, match=rf"`modules.pixels.{option.partition(':')[0]}` is not for decoders"):
        load_config([f"config={base}", "layout.pixels={ranks: 1, reads: vision}", module])


def test_a_negative_loss_weight_is_refused(base: Path):
    module = "modules.pixels={decoder: pixel_regression, loss_weight: -1}"
    with pytest.raises(ConfigError, match="`modules.pixels.loss_weight` must not be negative"):
        load_config([f"config={base}", "layout.pixels={ranks: 1, reads: vision}", module])


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["data.valid.a.weight=2"], ["`data.valid.a.weight` is 2.0", "no weights", "argument `data.valid.a.weight=2`"]),
        (["eval.samples=1"], ["`eval.samples` 1 must be at least 2", "argument `eval.samples=1`"]),
        (["data.valid.b.weight=.inf"], ["`data.valid.b.weight` must be finite"]),
    ],
)
def test_held_out_sets_have_no_weights_and_each_is_evaluated(
    base: Path, arguments: list[str], parts: list[str]
) -> None:
    sets = ["data.valid.a.shards=a.tar", "data.valid.b.shards=b.tar"]
    with pytest.raises(ConfigError) as caught:
        load_config([f"config={base}", *sets, *arguments])
    assert all(part in str(caught.value) for part in parts), caught.value
    load_config([f"config={base}", *sets, "eval.samples=2", "data.valid.a.weight=1"])
