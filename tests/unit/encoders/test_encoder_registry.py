"""A third party's encoder is found from one file, and wrong modalities, architectures and freeze patterns are named."""

import io
import re

import pytest
import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection
from PIL import Image

from mimo_gemma4 import encoders
from mimo_gemma4.distributed.module_context import ModuleContext
from mimo_gemma4.encoders.base import Encoder
from mimo_gemma4.encoders.registry import build_encoder, build_processor
from mimo_gemma4.errors import ConfigError
from mimo_gemma4.media import MediaHeader
from mimo_gemma4.weights.bindings import initialise
from mimo_gemma4.weights.freezing import FreezeRule, freeze
from tests import REPOSITORY
from tests.dist.harness import run_ranks

GUIDE = REPOSITORY / "docs" / "add_an_encoder.md"
GUIDE_MODEL = {
    "vision_config": dict(
        model_type="third_party",
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=16,
        patch_size=8,
    )
}
GEMMA4 = {
    "vision_config": dict(
        model_type="gemma4_vision",
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        head_dim=8,
        position_embedding_size=840,
    )
}


def build(hf_config: dict) -> Encoder:
    context = ModuleContext(
        ProcessGroupCollection(tp=dist.group.WORLD),
        language_hidden=8,
        dtype=torch.float32,
        device=torch.device("cpu"),
    )
    encoder = build_encoder("vision", hf_config, context)
    initialise(encoder.bindings(), seed=0)
    return encoder


def guide_code() -> str:
    """The Python blocks of the guide, as one file."""
    blocks = re.findall(r"^```python\n(.*?)^```", GUIDE.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    return "".join(blocks)


def test_the_guide_shows_the_whole_file():
    shipped = (REPOSITORY / "encoders" / "siglip.py").read_text(encoding="utf-8")
    assert [line for line in guide_code().splitlines() if line] == [line for line in shipped.splitlines() if line]


def train_the_guide_s_encoder(rank: int, folder: str) -> None:
    encoders.__path__.append(folder)  # of this rank alone
    processor, encoder = build_processor("vision", GUIDE_MODEL), build(GUIDE_MODEL)
    assert type(encoder).__module__ == "mimo_gemma4.encoders.third_party"
    buffer = io.BytesIO()
    Image.new("RGB", (40, 30), (255, 255, 255)).save(buffer, "PNG")
    header = MediaHeader(width=40, height=30)
    items = [processor.decode(buffer.getvalue()), processor.placeholder(header), processor.decode(buffer.getvalue())]
    soft_tokens = encoder(**processor.collate(items)).view(3, processor.soft_tokens(header), 8)
    assert torch.equal(soft_tokens[0], soft_tokens[2]) and not torch.allclose(soft_tokens[0], soft_tokens[1])
    soft_tokens.square().sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in encoder.parameters())
    assert encoder.projector[0].weight.grad.norm() > 0


def test_the_encoder_of_the_guide_registers_and_trains(tmp_path):
    code = guide_code().replace('"siglip_vision_model"', '"third_party"')
    (tmp_path / "third_party.py").write_text(code)
    run_ranks(1, train_the_guide_s_encoder, str(tmp_path))


def test_unknown_modalities_and_architectures_name_the_known_ones():
    with pytest.raises(ConfigError, match=r"no encoder for modality 'smell'; known: .*vision"):
        build_processor("smell", {})
    with pytest.raises(ConfigError, match=r"the model configuration has no vision_config"):
        build_processor("vision", {"text_config": {}})
    with pytest.raises(ConfigError, match=r"vision_config.model_type is 'clip'; known for vision: .*gemma4_vision"):
        build_processor("vision", {"vision_config": {"model_type": "clip"}})
    with pytest.raises(ConfigError, match="vision_config lacks hidden_size, intermediate_size"):
        build_processor("vision", {"vision_config": {"model_type": "gemma4_vision"}})


def trained_after(rank: int, what: FreezeRule) -> dict[str, bool] | str:
    """Which tensors train once the rule is applied; where it is refused, why."""
    encoder = build(GEMMA4)
    try:
        freeze("vision", encoder, what)
    except ConfigError as error:
        return str(error)
    return {binding.name: binding.tensor.requires_grad for binding in encoder.bindings()}


@pytest.mark.parametrize(
    ("what", "trained"),
    [
        (False, lambda name: True),
        (True, lambda name: False),
        ("tower", lambda name: name == "model.embed_vision.embedding_projection.weight"),
        (["*.layers.0.*", "*.patch_embedder.*"], lambda name: ".layers.0." not in name and "embedder" not in name),
    ],
    ids=["false", "true", "tower", "patterns"],
)
def test_freeze_stops_exactly_what_is_asked(what, trained):
    (found,) = run_ranks(1, trained_after, what)
    assert found and found == {name: trained(name) for name in found}


@pytest.mark.parametrize(
    ("what", "message"),
    [
        (
            ["*.layer.0.*"],
            r"modules.vision.freeze: no parameter matches '\*.layer.0.\*'; names look like 'model.vision",
        ),
        ("towers", "modules.vision.freeze is 'towers'; it takes true, false, tower or a list"),
    ],
)
def test_freeze_refuses_what_matches_nothing(what, message):
    (error,) = run_ranks(1, trained_after, what)
    assert re.search(message, error)
