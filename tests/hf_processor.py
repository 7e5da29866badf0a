"""A Gemma 4 processor of transformers with the byte-level tokenizer, saved and read back as from a model directory."""

import copy
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerFast
from transformers.models.gemma4.feature_extraction_gemma4 import Gemma4AudioFeatureExtractor
from transformers.models.gemma4.image_processing_pil_gemma4 import Gemma4ImageProcessorPil
from transformers.models.gemma4.processing_gemma4 import Gemma4Processor
from transformers.processing_utils import ProcessorMixin

from mimo_gemma4.data.tokenizer import BYTE_CHAT_TEMPLATE, byte_tokenizer

SPECIAL = {
    "boi_token": "<|image>", "image_token": "<|image|>", "eoi_token": "<image|>",
    "boa_token": "<|audio>", "audio_token": "<|audio|>", "eoa_token": "<audio|>",
}  # fmt: skip


class PilProcessor(Gemma4Processor):
    """Gemma4Processor without its video processor, which cannot be made where torchvision is not installed."""

    def __init__(self, feature_extractor: Any, image_processor: Any, tokenizer: Any, chat_template: Any = None):
        parts = {"feature_extractor": feature_extractor, "image_processor": image_processor, "tokenizer": tokenizer}
        ProcessorMixin.__init__(self, **parts, chat_template=chat_template)
        for name in SPECIAL:
            setattr(self, name, getattr(tokenizer, name))
        self.image_token_id, self.audio_token_id = tokenizer.image_token_id, tokenizer.audio_token_id
        self.video_token = "<|video|>"
        self.video_token_id = tokenizer.convert_tokens_to_ids(self.video_token)


def saved_processor(folder: Path, max_soft_tokens: int = 280) -> PilProcessor:
    """Write tokenizer and processor to `folder` and read the processor from there."""
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=copy.deepcopy(byte_tokenizer()).backend_tokenizer,
        pad_token="<pad>",
        eos_token="<eos>",
        bos_token="<bos>",
        extra_special_tokens=SPECIAL,
        chat_template=BYTE_CHAT_TEMPLATE,
    )
    image_processor = Gemma4ImageProcessorPil(max_soft_tokens=max_soft_tokens)
    processor = PilProcessor(Gemma4AudioFeatureExtractor(), image_processor, tokenizer, BYTE_CHAT_TEMPLATE)
    processor.save_pretrained(folder)
    return PilProcessor.from_pretrained(folder)
