"""Checks a model's configuration as a whole: one error lists every value that no Gemma 4 model can have.

Only keys that are present are checked; what is left out has the default of the class that reads it.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from mimo_gemma4.errors import ConfigError

Check = Callable[[Any], bool]
TEXT_TYPES = ("gemma4_text", "gemma4_unified_text")
LAYER_TYPES = ("sliding_attention", "full_attention")
ROPE_TYPES = ("default", "proportional")
FIXED: dict[str, Any] = {
    "attention_bias": False,
    "attention_dropout": 0.0,
    "hidden_activation": "gelu_pytorch_tanh",
    "tie_word_embeddings": True,
}
"""Keys of `text_config` with the only value that is supported."""
SOFT_IDS = ("image_token_id", "video_token_id", "audio_token_id")
"""Tokens that soft tokens replace."""
MEDIA_IDS = (*SOFT_IDS, "boi_token_id", "eoi_token_id", "boa_token_id", "eoa_token_id", "eoa_token_index")
DEFAULTS = {"num_hidden_layers": 30, "num_attention_heads": 8, "num_key_value_heads": 4, "vocab_size": 262_144}
"""Class defaults in transformers of the values that others are compared with."""


def _is_count(value: Any) -> bool:
    return type(value) is int and value > 0


def _is_size(value: Any) -> bool:
    return type(value) is int and value >= 0


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _is_positive(value: Any) -> bool:
    return _is_number(value) and value > 0


def _is_even(value: Any) -> bool:
    return _is_count(value) and value % 2 == 0


def _named(names: str, check: Check, wanted: str) -> dict[str, tuple[Check, str]]:
    return dict.fromkeys(names.split(), (check, wanted))


KINDS: dict[str, tuple[Check, str]] = {
    **_named(
        "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads "
        "num_global_key_value_heads max_position_embeddings sliding_window vocab_size_per_layer_input patch_size "
        "pooling_kernel_size position_embedding_size output_proj_dims conv_kernel_size attention_chunk_size "
        "mm_embed_dim mm_posemb_size audio_embed_dim image_size",
        _is_count,
        "a positive integer",
    ),
    **_named("head_dim global_head_dim", _is_even, "an even positive integer"),
    **_named(
        "hidden_size_per_layer_input num_kv_shared_layers pad_token_id num_experts top_k_experts "
        "moe_intermediate_size attention_context_left attention_context_right",
        _is_size,
        "an integer from 0 on",
    ),
    **_named(
        "rms_norm_eps layer_norm_eps initializer_range final_logit_softcapping attention_logit_cap gradient_clipping",
        _is_positive,
        "a positive number",
    ),
    **_named("residual_weight attention_dropout", _is_number, "a number"),
    **_named(
        "attention_k_eq_v use_double_wide_mlp enable_moe_block attention_bias tie_word_embeddings "
        "use_clipped_linears standardize",
        lambda value: type(value) is bool,
        "true or false",
    ),
    "layer_types": (
        lambda value: isinstance(value, list | tuple) and all(entry in LAYER_TYPES for entry in value),
        f"a list of {' and '.join(LAYER_TYPES)}",
    ),
    "subsampling_conv_channels": (
        lambda value: isinstance(value, list | tuple) and len(value) == 2 and all(map(_is_count, value)),
        "a list of two positive integers",
    ),
    "num_channels": (lambda value: value == 3, "3"),
}
"""By key of `text_config`, `vision_config` or `audio_config`: whether a value can be right, and what it must be."""


def check_model_config(config: Mapping[str, Any], source: object) -> None:
    """Raise one `ConfigError` that lists all wrong values of a model configuration, read from `source`."""
    problems = list(_top_level(config))
    for name in ("text_config", "vision_config", "audio_config"):
        section = config.get(name)
        if section is None:
            continue
        if not isinstance(section, Mapping):
            problems.append(f"{name} is {section!r}; it must be a table of keys and values")
        elif name == "text_config" or str(section.get("model_type", "gemma4")).startswith(("gemma4", "siglip")):
            wrong = {key: f"{name}.{key} is {section[key]!r}; it must be {KINDS[key][1]}" for key in _misfits(section)}
            problems += wrong.values()
            problems += _rope(name, section.get("rope_parameters"))
            if name == "text_config":
                problems += _text({key: value for key, value in section.items() if key not in wrong})
            elif (width := section.get("hidden_size")) and str(section.get("model_type")).startswith("siglip"):
                heads = section.get("num_attention_heads")
                if not wrong and heads and width % heads:
                    problems.append(f"{name}.hidden_size = {width} is not a multiple of num_attention_heads = {heads}")
    if problems:
        count = f" ({len(problems)} values)" if len(problems) > 1 else ""
        raise ConfigError(f"{source} describes no model that can be trained here{count}: " + "; ".join(problems))


def unsupported(text: Mapping[str, Any]) -> list[str]:
    """What in a `text_config` is valid in transformers but not supported here."""
    problems = [
        f"text_config.{key} = {text[key]!r} is not supported; Gemma 4 has {value!r}"
        for key, value in FIXED.items()
        if text.get(key, value) != value
    ]
    if text.get("use_bidirectional_attention") not in (None, "vision"):
        mode = text["use_bidirectional_attention"]
        problems.append(f"text_config.use_bidirectional_attention = {mode!r} is not supported; known: null, vision")
    return problems


def check_token_ids(
    vocabulary: Mapping[str, int], config: Mapping[str, Any], source: object, media: Mapping[str, Iterable[int]]
) -> None:
    """Raise `ConfigError` where tokens have ids beyond the embedding, or media have ids that are no token's.

    Args:
        vocabulary: ids of all tokens.
        config: the model configuration.
        source: where both come from.
        media: by content type that samples may have, the ids of its tokens in the configuration.
    """
    known = set(vocabulary.values())
    if strange := {kind: ids for kind, ids in media.items() if not known.issuperset(ids)}:
        raise ConfigError(
            f"{source}: config.json gives media the token ids {strange}, but its tokenizer has no tokens of these ids: "
            "correct image_token_id, boi_token_id and so on, or take the tokenizer of this model"
        )
    text = config["text_config"]
    sizes = {"vocab_size": text.get("vocab_size", DEFAULTS["vocab_size"])}
    if text.get("hidden_size_per_layer_input", 256):
        key = "vocab_size_per_layer_input"
        sizes[key] = text.get(key, DEFAULTS["vocab_size"])
    for key, size in sizes.items():
        beyond = sorted((number, token) for token, number in vocabulary.items() if number >= size)
        if beyond:
            shown = ", ".join(f"{token!r} ({number})" for number, token in beyond[:5])
            raise ConfigError(
                f"{source}: text_config.{key} is {size}, but its tokenizer has {len(beyond)} tokens with ids from "
                f"{size} on, such as {shown}. Take the tokenizer of this model, or enlarge the embedding first "
                "(transformers' `resize_token_embeddings`)"
            )


def _misfits(section: Mapping[str, Any]) -> list[str]:
    """Keys with values of a wrong type or range."""
    return [key for key, (fits, _) in KINDS.items() if section.get(key) is not None and not fits(section[key])]


def _top_level(config: Mapping[str, Any]) -> Iterable[str]:
    kind = config.get("model_type", "gemma4")
    if not str(kind).startswith("gemma4"):
        yield f"model_type is {kind!r}; it must be gemma4 or gemma4_unified"
    if config.get("tie_word_embeddings") not in (None, True):
        yield f"tie_word_embeddings is {config['tie_word_embeddings']!r}; Gemma 4's head is its embedding: true"
    given = {key: config[key] for key in MEDIA_IDS if config.get(key) is not None}
    for key, value in given.items():
        if not _is_size(value):
            yield f"{key} is {value!r}; it must be a token id"
    soft = [value for key, value in given.items() if key in SOFT_IDS]
    if any(soft.count(value) > 1 for value in soft):
        yield f"{', '.join(SOFT_IDS)} are {soft}; they must differ from one another"


def _text(text: Mapping[str, Any]) -> Iterable[str]:
    """Values that do not go with others, of those whose types are right."""
    yield from unsupported({key: value for key, value in text.items() if value is not None})
    if text.get("model_type") not in (None, *TEXT_TYPES):
        yield f"text_config.model_type is {text['model_type']!r}; it must be {' or '.join(TEXT_TYPES)}"
    values = DEFAULTS | {key: value for key, value in text.items() if value is not None}
    heads, layers = values["num_attention_heads"], values["num_hidden_layers"]
    for key in ("num_key_value_heads", "num_global_key_value_heads"):
        if key in values and heads % values[key]:
            yield f"text_config.num_attention_heads = {heads} is not a multiple of {key} = {values[key]}"
    if values.get("layer_types") and len(values["layer_types"]) != layers:
        yield f"text_config: {len(values['layer_types'])} `layer_types` for {layers} `num_hidden_layers`"
    if values.get("num_kv_shared_layers", 0) >= layers:
        yield f"text_config.num_kv_shared_layers = {values['num_kv_shared_layers']} of {layers} layers leaves none"
    if values.get("pad_token_id", 0) >= values["vocab_size"]:
        yield f"text_config.pad_token_id = {values['pad_token_id']} is not below vocab_size = {values['vocab_size']}"


def _rope(name: str, rope: Any) -> Iterable[str]:
    """Problems of `rope_parameters`: by layer type for text, for other sections flat."""
    if rope is None:
        return
    tables = {f"{name}.rope_parameters": rope}
    if name == "text_config" and isinstance(rope, Mapping):
        tables = {f"{name}.rope_parameters.{kind}": rope[kind] for kind in LAYER_TYPES if kind in rope}
    for key, table in tables.items():
        if not isinstance(table, Mapping):
            yield f"{key} is {table!r}; it must be a table of keys and values"
            continue
        if name == "text_config" and table.get("rope_type") not in ROPE_TYPES:
            yield f"{key}.rope_type is {table.get('rope_type')!r}; known: {ROPE_TYPES}"
        if not _is_positive(table.get("rope_theta", 1.0)):
            yield f"{key}.rope_theta is {table['rope_theta']!r}; it must be a positive number"
        share = table.get("partial_rotary_factor", 1.0)
        if not _is_positive(share) or share > 1:
            yield f"{key}.partial_rotary_factor is {share!r}; it must be above 0 and at most 1"
