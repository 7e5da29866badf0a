"""Attention masks from metadata are those that transformers builds for the same documents and images."""

import pytest
import torch
from transformers import Gemma4TextConfig as HuggingFaceTextConfig
from transformers.masking_utils import create_causal_mask, create_masks_for_generate, create_sliding_window_causal_mask
from transformers.models.gemma4.modeling_gemma4 import create_masks_for_vision_model

from mimo_gemma4.language.attention_context import AttentionContext
from mimo_gemma4.language.config import FULL, SLIDING, Gemma4TextConfig
from mimo_gemma4.language.reference_attention import ReferenceAttention

LENGTH, WINDOW = 24, 4
GROUPS = torch.tensor([[0] * 3 + [1] * 6 + [0] * 2 + [2] * 2 + [3] * 7 + [0] * 4])  # shorter and longer than WINDOW


def masks(model_type: str, context: AttentionContext, bidirectional: str | None) -> dict[str, torch.Tensor]:
    text = Gemma4TextConfig(model_type=model_type, sliding_window=WINDOW, use_bidirectional_attention=bidirectional)
    backend = ReferenceAttention(text, recompute=False)
    return {attention: backend.plan(context, attention) for attention in (SLIDING, FULL)}


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


def one_document(groups: torch.Tensor | None) -> AttentionContext:
    positions, segments = torch.arange(LENGTH)[None], torch.ones(1, LENGTH, dtype=torch.long)
    return AttentionContext(positions, segments, positions, segments, groups, groups)


@pytest.mark.parametrize("model_type", ["gemma4_text", "gemma4_unified_text"])
@pytest.mark.parametrize("groups", [None, GROUPS], ids=["text", "images"])
def test_one_document_matches_transformers(model_type: str, groups: torch.Tensor | None) -> None:
    mine = masks(model_type, one_document(groups), None if groups is None else "vision")
    expected = huggingface_masks(model_type, groups)
    for attention in (SLIDING, FULL):
        assert torch.equal(mine[attention], expected[attention]), attention


@pytest.mark.parametrize("model_type", ["gemma4_text", "gemma4_unified_text"])
def test_packed_and_permuted_documents_have_the_masks_of_each_alone(model_type: str) -> None:
    """Two copies of the document in a row, cut in any order: block-diagonal masks, rows and columns permuted."""
    single = masks(model_type, one_document(GROUPS), "vision")
    order = torch.randperm(2 * LENGTH, generator=torch.Generator().manual_seed(0))
    mine = order[:20]
    positions = torch.arange(LENGTH).repeat(2)[None]
    segments = torch.arange(1, 3).repeat_interleave(LENGTH)[None]
    groups = torch.cat((GROUPS, torch.where(GROUPS > 0, GROUPS + 3, 0)), dim=1)
    keys = (positions[:, order], segments[:, order])
    context = AttentionContext(
        positions[:, mine], segments[:, mine], *keys, groups=groups[:, mine], key_groups=groups[:, order]
    )
    for attention, mask in masks(model_type, context, "vision").items():
        packed = torch.block_diag(single[attention][0, 0], single[attention][0, 0]).bool()
        assert torch.equal(mask[0, 0], packed[mine][:, order]), attention


def test_padding_attends_to_itself_only() -> None:
    """No row of a mask is empty, so padding stays finite, and no real token sees it."""
    segments = torch.tensor([[1] * 5 + [0] * (LENGTH - 5)])
    positions = torch.cat((torch.arange(5), torch.zeros(LENGTH - 5, dtype=torch.long)))[None]
    context = AttentionContext(positions, segments, positions, segments)
    for mask in masks("gemma4_text", context, None).values():
        assert mask.any(dim=-1).all()
        assert not mask[0, 0, :5, 5:].any() and not mask[0, 0, 5:, :5].any()
