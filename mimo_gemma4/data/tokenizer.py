"""Tokenizers: loaded from a Hugging Face directory, or a built-in byte-level one for models without files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mimo_gemma4.errors import ConfigError
from mimo_gemma4.media import MediaTokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

BYTE_TOKENS = (
    "<pad>", "<eos>", "<bos>", "<|turn>", "<turn|>", "<|image>", "<|image|>", "<image|>",
    "<|audio>", "<|audio|>", "<audio|>", "<|video|>",
)  # fmt: skip
"""Special tokens of the byte-level tokenizer; the id is the place in this list."""
BYTE_OFFSET = 16
"""Id of byte 0 in the byte-level tokenizer; the ids between the special tokens and byte 0 are unused."""

BYTE_CHAT_TEMPLATE = """\
{{- bos_token -}}
{%- for message in messages -%}
    {%- set role = 'model' if message['role'] == 'assistant' else message['role'] -%}
    {{- '<|turn>' + role + '\\n' -}}
    {%- set body -%}
        {%- if message['content'] is string -%}
            {{- message['content'] -}}
        {%- else -%}
            {%- for part in message['content'] -%}
                {{- part['text'] if part['type'] == 'text' else '<|' + part['type'] + '|>' -}}
            {%- endfor -%}
        {%- endif -%}
    {%- endset -%}
    {%- if role == 'model' -%}
        {%- generation -%}{{- body + '<turn|>' -}}{%- endgeneration -%}
    {%- else -%}
        {{- body + '<turn|>' -}}
    {%- endif -%}
    {{- '\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|turn>model\\n' -}}{%- endif -%}
"""
"""Chat template with Gemma 4's turns; answers are marked for the loss."""

_MEDIA_KEYS = {
    "image": (("boi_token_id",), ("image_token_id",), ("eoi_token_id",)),
    "video": (("boi_token_id",), ("video_token_id",), ("eoi_token_id",)),
    "audio": (("boa_token_id",), ("audio_token_id",), ("eoa_token_id", "eoa_token_index")),
}


def load_tokenizer(hf_path: str | Path | None) -> PreTrainedTokenizerFast:
    """The fast tokenizer of a Hugging Face directory, or the byte-level one for None. Raises `ConfigError`."""
    if hf_path is None:
        return byte_tokenizer()
    if not Path(hf_path).is_dir():
        raise ConfigError(f"model.hf_path is {str(hf_path)!r}, which is not a directory")
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    try:
        tokenizer = AutoTokenizer.from_pretrained(str(hf_path), local_files_only=True)
    except Exception as error:  # a damaged tokenizer.json raises whatever its reader stumbles over
        raise ConfigError(f"model.hf_path is {str(hf_path)!r}, which holds no usable tokenizer: {error!r}") from error
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise ConfigError(f"model.hf_path is {str(hf_path)!r}; it needs a fast tokenizer (tokenizer.json)")
    return tokenizer


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer without files: the special tokens of `BYTE_TOKENS`, and byte b at id 16 + b."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {_byte_symbol(byte): BYTE_OFFSET + byte for byte in range(256)}
    tokenizer = Tokenizer(models.BPE(vocab={**{t: i for i, t in enumerate(BYTE_TOKENS)}, **vocabulary}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in BYTE_TOKENS])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<eos>",
        bos_token="<bos>",
        chat_template=BYTE_CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def byte_media_tokens() -> dict[str, MediaTokens]:
    """Begin, soft and end token of every media type in the byte-level tokenizer."""
    ids = {token: place for place, token in enumerate(BYTE_TOKENS)}
    image = MediaTokens(ids["<|image>"], ids["<|image|>"], ids["<image|>"])
    audio = MediaTokens(ids["<|audio>"], ids["<|audio|>"], ids["<audio|>"])
    return {"image": image, "video": replace(image, soft=ids["<|video|>"]), "audio": audio}


def _byte_symbol(byte: int) -> str:
    """The character that byte-level pre-tokenisation writes for a byte, as in GPT-2.

    A printable Latin-1 byte is its own character; the other bytes, in order, are the code points from 256 on.
    """
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    if byte in printable:
        return chr(byte)
    return chr(256 + sum(other not in printable for other in range(byte)))


def media_tokens(hf_config: Mapping[str, Any]) -> dict[str, MediaTokens]:
    """Begin, soft and end token of every media type for which a model configuration (`config.json`) has ids."""
    found = {}
    for media_type, groups in _MEDIA_KEYS.items():
        ids = [hf_config[key] for keys in groups for key in keys if hf_config.get(key) is not None]
        if len(ids) == len(groups):
            found[media_type] = MediaTokens(*ids)
    return found
