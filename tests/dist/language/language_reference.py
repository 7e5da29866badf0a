"""Tiny Gemma 4 models of every variant, a packed multimodal batch, and what transformers makes of both."""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from transformers import AutoConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.gemma4.modeling_gemma4 import Gemma4ForConditionalGeneration, get_block_sequence_ids_for_mask
from transformers.models.gemma4_unified.modeling_gemma4_unified import Gemma4UnifiedForConditionalGeneration

from tests.random_weights import vary_norms

IMAGE, VIDEO, AUDIO = 6, 7, 8
S, F = "sliding_attention", "full_attention"

# Widths that are no powers of two but divide over eight ranks, and a window shorter than documents and some media.
# Per-layer inputs have ten channels or more: the norm of fewer divides by almost nothing for some token.
COMMON = dict(
    model_type="gemma4_text",
    vocab_size=120,
    vocab_size_per_layer_input=120,
    sliding_window=5,
    hidden_size_per_layer_input=0,
    final_logit_softcapping=3.0,
    initializer_range=0.1,
)
VISION = dict(use_bidirectional_attention="vision", attention_k_eq_v=True)
VARIANTS: dict[str, dict[str, Any]] = {
    "e2b": COMMON
    | dict(hidden_size=36, intermediate_size=56, num_attention_heads=8, num_key_value_heads=1)
    | dict(head_dim=6, global_head_dim=10, layer_types=[S, S, S, F] * 2, hidden_size_per_layer_input=14)
    | dict(num_kv_shared_layers=4, use_double_wide_mlp=True),
    "e4b": COMMON
    | dict(hidden_size=44, intermediate_size=72, num_attention_heads=8, num_key_value_heads=2)
    | dict(head_dim=8, global_head_dim=12, layer_types=[S, S, F] * 2, hidden_size_per_layer_input=10)
    | dict(num_kv_shared_layers=3),
    "12b": COMMON
    | VISION
    | dict(model_type="gemma4_unified_text", hidden_size=52, intermediate_size=88, num_attention_heads=16)
    | dict(num_key_value_heads=8, num_global_key_value_heads=1, head_dim=4, global_head_dim=8)
    | dict(layer_types=[S, S, F, S, F]),
    "31b": COMMON
    | VISION
    | dict(hidden_size=60, intermediate_size=104, num_attention_heads=24, num_key_value_heads=8)
    | dict(num_global_key_value_heads=4, head_dim=4, global_head_dim=6, layer_types=[S, S, S, F, S, F]),
    "26b": COMMON
    | VISION
    | dict(hidden_size=44, intermediate_size=56, num_attention_heads=8, num_key_value_heads=8)
    | dict(num_global_key_value_heads=2, head_dim=4, global_head_dim=6, layer_types=[S, S, F, S, F])
    | dict(enable_moe_block=True, num_experts=12, top_k_experts=3, moe_intermediate_size=12),
    # Mixtures that no released model has, for what only shows where features are apart or together.
    "per layer embeddings without sharing": COMMON
    | dict(hidden_size=28, intermediate_size=40, num_attention_heads=8, num_key_value_heads=4, pad_token_id=3)
    | dict(head_dim=6, global_head_dim=6, layer_types=[F, S, S, F], hidden_size_per_layer_input=12)
    | dict(attention_k_eq_v=True, final_logit_softcapping=None),
    "sharing without per layer embeddings": COMMON
    | VISION
    | dict(model_type="gemma4_unified_text", hidden_size=20, intermediate_size=24, num_attention_heads=8)
    | dict(
        num_key_value_heads=4, num_global_key_value_heads=2, head_dim=4, global_head_dim=8, layer_types=[S, F, F, S, F]
    )
    | dict(num_kv_shared_layers=2, use_double_wide_mlp=True),
    "threes": COMMON
    | dict(vocab_size=126, hidden_size=30, intermediate_size=42, num_attention_heads=6, num_key_value_heads=3)
    | dict(vocab_size_per_layer_input=126, hidden_size_per_layer_input=10, num_kv_shared_layers=2)
    | dict(head_dim=6, global_head_dim=10, layer_types=[S, F, S, F]),
}

# Packed documents of each sequence: text, image, video frame and audio tokens. Media are shorter and longer than the
# window, one token apart, next to one another, and first and last in their document.
DOCUMENTS = [
    ["ttiiitiiiiiiiiittaaatttttttt", "ivtttttttvvvvvvvi"],
    ["tttiiitiitvvvviiittttttttttttttiiiiiittttt"],
]
LENGTH = 48


class Batch:
    """Random sequences of LENGTH tokens with documents, padding, ignored labels, soft tokens and a real padding token.

    Everything is [B, LENGTH] but `media_soft_tokens` [B, LENGTH, H], of which only those on images and videos count:
    audio tokens are left without, so that they show as what they embed as.
    """

    def __init__(self, variant: str) -> None:
        text = VARIANTS[variant]
        generator = torch.Generator().manual_seed(3)
        shape, padding = (len(DOCUMENTS), LENGTH), text.get("pad_token_id", 0)
        self.input_ids = torch.randint(9, text["vocab_size"], shape, generator=generator)
        self.input_ids[0, 18] = padding
        self.labels = torch.randint(0, text["vocab_size"], shape, generator=generator)
        self.labels[torch.rand(shape, generator=generator) < 0.3] = -100
        self.media_soft_tokens = torch.randn(*shape, text["hidden_size"], generator=generator)
        self.positions, self.segments, self.types = (torch.zeros(shape, dtype=torch.long) for _ in range(3))
        self.spans: list[tuple[int, slice]] = []
        for sequence, documents in enumerate(DOCUMENTS):
            start = 0
            for number, document in enumerate(documents, start=1):
                span = slice(start, start + len(document))
                self.spans.append((sequence, span))
                self.positions[sequence, span] = torch.arange(len(document))
                self.segments[sequence, span] = number
                self.types[sequence, span] = torch.tensor(["tiva".index(token) for token in document])
                start = span.stop
            self.input_ids[sequence, start:], self.labels[sequence, start:] = padding, -100
        for kind, placeholder in enumerate((IMAGE, VIDEO, AUDIO), start=1):
            self.input_ids[self.types == kind] = placeholder
        self.media = (self.types == 1) | (self.types == 2)

    @cached_property
    def groups(self) -> torch.Tensor:
        """Media groups by transformers' own rule, numbered from 1 in each document; 0: none."""
        groups = torch.zeros_like(self.types)
        for sequence, span in self.spans:
            found = get_block_sequence_ids_for_mask(self.types[sequence, span][None], self.types.device)[0]
            groups[sequence, span] = torch.where(found >= 0, found + 1 + groups[sequence].max(), 0)
        return groups

    def documents(self, tensor: torch.Tensor, padding: int = 0) -> torch.Tensor:
        """The documents of `tensor` [B, LENGTH] each as a sequence of its own, padded on the right."""
        parts = [tensor[sequence, span] for sequence, span in self.spans]
        return torch.nn.utils.rnn.pad_sequence(parts, batch_first=True, padding_value=padding)


@dataclass(frozen=True)
class Reference:
    """What transformers computes in one process: logits [B, LENGTH, vocabulary], summed loss, all gradients."""

    logits: torch.Tensor
    loss: float
    gradients: dict[str, torch.Tensor]


def huggingface_model(variant: str, attention: str = "eager") -> PreTrainedModel:
    """The whole random model, without towers: media enter as soft tokens."""
    text = VARIANTS[variant]
    unified = text["model_type"].startswith("gemma4_unified")
    config = AutoConfig.for_model(
        "gemma4_unified" if unified else "gemma4",
        text_config=text | {"num_hidden_layers": len(text["layer_types"])},
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        audio_token_id=AUDIO,
        attn_implementation=attention,
    )
    torch.manual_seed(0)
    model = (Gemma4UnifiedForConditionalGeneration if unified else Gemma4ForConditionalGeneration)(config)
    vary_norms(model)
    return model


def huggingface_results(variant: str, attention: str = "eager") -> Reference:
    """Every document a sequence of its own through the whole model: its placeholders, masks and padding, no packing."""
    model, batch = huggingface_model(variant, attention), Batch(variant)
    soft_tokens = batch.media_soft_tokens.clone().requires_grad_()
    outputs = {
        name: BaseModelOutputWithPooling(pooler_output=[soft_tokens[batch.types == kind]])
        for name, kind in (("image", 1), ("video", 2))
    }
    packed = model(
        input_ids=batch.documents(batch.input_ids, padding=VARIANTS[variant].get("pad_token_id", 0)),
        attention_mask=batch.documents(torch.ones_like(batch.input_ids)),
        mm_token_type_ids=batch.documents(batch.types),
        mm_encoder_outputs=outputs,
        use_cache=False,
    ).logits
    labels = batch.documents(batch.labels, padding=-100)
    loss = torch.nn.functional.cross_entropy(packed.flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="sum")
    loss.backward()
    logits = torch.zeros(*batch.input_ids.shape, packed.shape[-1])
    for document, (sequence, span) in enumerate(batch.spans):
        logits[sequence, span] = packed[document, : span.stop - span.start].detach()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    return Reference(logits, loss.item(), gradients | {"soft tokens": soft_tokens.grad})
