"""The runs of keys that queries see are the masks that transformers builds for the same documents and images."""

import pytest
import torch
from transformers import Gemma4TextConfig as HuggingFaceTextConfig
from transformers.masking_utils import create_causal_mask, create_masks_for_generate, create_sliding_window_causal_mask
from transformers.models.gemma4.modeling_gemma4 import create_masks_for_vision_model

from mimo_gemma4.language.attention_context import mask_rules, visible_runs
from mimo_gemma4.language.config import FULL, SLIDING, Gemma4TextConfig

LENGTH, WINDOW = 24, 4
GROUPS = torch.tensor([[0] * 3 + [1] * 6 + [0] * 2 + [2] * 2 + [3] * 7 + [0] * 4])  # shorter and longer than WINDOW


def masks(
    model_type: str, segments: torch.Tensor, groups: torch.Tensor | None, bidirectional: str | None
) -> dict[str, torch.Tensor]:
    """Bool [B, 1, S, S] per attention type, from the runs."""
    text = Gemma4TextConfig(model_type=model_type, sliding_window=WINDOW, use_bidirectional_attention=bidirectional)
    keys = torch.arange(segments.shape[1])
    found = {}
    for attention, rule in mask_rules(text).items():
        first, last = visible_runs(rule, segments, groups)
        found[attention] = ((keys >= first[..., None]) & (keys <= last[..., None]))[:, None]
    return found


def huggingface_masks(model_type: str, groups: torch.Tensor | None) -> dict[str, torch.Tensor]:
    config = HuggingFaceTextConfig(num_hidden_layers=6, sliding_window=WINDOW)
    config._attn_implementation = "sdpa"
    arguments = {
        "config": config,
        "inputs_embeds": torch.zeros(1, LENGTH, 1),
        "attention_mask": None,
        "past_key_values": None,
        "position_ids": None,
    }
    if groups is None:
        return {
            SLIDING: create_sliding_window_causal_mask(**arguments, allow_is_causal_skip=False),
            FULL: create_causal_mask(**arguments, allow_is_causal_skip=False),
        }
    build = create_masks_for_vision_model if model_type == "gemma4_text" else create_masks_for_generate
    found = build(**arguments, block_sequence_ids=groups - 1)
    if found[FULL] is None:  # plain causal, left to the attention kernel
        found[FULL] = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()[None, None]
    return found


@pytest.mark.parametrize("model_type", ["gemma4_text", "gemma4_unified_text"])
@pytest.mark.parametrize("groups", [None, GROUPS], ids=["text", "images"])
def test_one_document_matches_transformers(model_type: str, groups: torch.Tensor | None) -> None:
    segments = torch.ones(1, LENGTH, dtype=torch.long)
    mine = masks(model_type, segments, groups, None if groups is None else "vision")
    expected = huggingface_masks(model_type, groups)
    for attention in (SLIDING, FULL):
        assert torch.equal(mine[attention], expected[attention]), attention


@pytest.mark.parametrize("model_type", ["gemma4_text", "gemma4_unified_text"])
def test_packed_documents_have_the_masks_of_each_alone(model_type: str) -> None:
    """Two copies of the document in a sequence, the first of which ends in an image."""
    document = GROUPS[:, :20]
    single = masks(model_type, torch.ones(1, 20, dtype=torch.long), document, "vision")
    segments = torch.arange(1, 3).repeat_interleave(20)[None]
    groups = torch.cat((document, torch.where(document > 0, document + 3, 0)), dim=1)
    for attention, mask in masks(model_type, segments, groups, "vision").items():
        packed = torch.block_diag(single[attention][0, 0], single[attention][0, 0]).bool()
        assert torch.equal(mask[0, 0], packed), attention


def test_padding_attends_to_itself_only() -> None:
    """No row of a mask is empty, so padding stays finite, and no real token sees it."""
    segments = torch.tensor([[1] * 5 + [0] * 3 + [2] * 6 + [0] * (LENGTH - 14)])
    padding = (segments == 0)[0]
    for mask in masks("gemma4_text", segments, None, None).values():
        assert torch.equal(mask[0, 0, padding], torch.eye(LENGTH, dtype=torch.bool)[padding])
        assert not mask[0, 0, ~padding][:, padding].any()
