"""Tokens, loss spans and placeholders of a conversation follow the chat template, whatever its style."""

import copy

import numpy as np
import pytest

from mimo_gemma4.data.chat import ConversationEncoder
from mimo_gemma4.data.tokenizer import BYTE_CHAT_TEMPLATE, byte_tokenizer, load_tokenizer, media_tokens
from mimo_gemma4.errors import ConfigError, DataError
from tests.shard_maker import MEDIA_TOKENS, TileProcessor

MESSAGES = [
    {"role": "system", "content": "Be short."},
    {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "¿Qué? 🙂"}, {"type": "image"}]},
    {"role": "assistant", "content": [{"type": "text", "text": "Un café 🙂"}]},
    {"role": "user", "content": "Again <turn|>\n"},
    {"role": "assistant", "content": "Ja"},
]
UNMARKED = BYTE_CHAT_TEMPLATE.replace("{%- generation -%}", "").replace("{%- endgeneration -%}", "")
# As later Gemma 4 templates do: the generation prompt closes an empty thought that no rendered answer has.
THOUGHT = UNMARKED.replace("'<|turn>model\\n' -}}{%- endif", "'<|turn>model\\n<|audio>x<audio|>' -}}{%- endif")
# As many templates do: nothing may be rendered before the first question.
STRICT = "{%- if messages | length < 2 -%}{{ raise_exception('a question is needed') }}{%- endif -%}" + UNMARKED


def encoder(template: str = BYTE_CHAT_TEMPLATE) -> ConversationEncoder:
    tokenizer = copy.deepcopy(byte_tokenizer())
    tokenizer.chat_template = template
    return ConversationEncoder(tokenizer, [TileProcessor()], MEDIA_TOKENS)


def test_ids_are_one_tokenisation_of_the_rendering_with_placeholders_expanded():
    encode = encoder()
    encoded = encode.encode(MESSAGES, [3, 1])
    rendered = encode.tokenizer.apply_chat_template(MESSAGES, tokenize=False)
    image = "<|image>" + "<|image|>" * 3 + "<image|>", "<|image><|image|><image|>"
    first, second, rest = rendered.split("<|image|>")
    expected = encode.tokenizer(first + image[0] + second + image[1] + rest, add_special_tokens=False)["input_ids"]
    assert encoded.input_ids.tolist() == expected
    assert expected.count(2) == 1, "one bos"
    for start, count in zip(encoded.media_starts, (3, 1), strict=True):
        assert expected[start - 1 : start + count + 1] == [5, *[6] * count, 7]


def test_labels_are_the_next_token_of_answers_up_to_the_end_of_turn():
    encode = encoder()
    encoded = encode.encode(MESSAGES, [3, 1])
    learned = encoded.labels != -100
    assert (encoded.labels[learned] == encoded.input_ids[1:][learned[:-1]]).all()
    assert encoded.labels[-1] == -100
    assert encode.tokenizer.decode(encoded.labels[learned]) == "Un café 🙂<turn|>Ja<turn|>"
    assert encoded.loss_tokens == len("Un café 🙂".encode()) + 1 + 2 + 1


@pytest.mark.parametrize("template", [UNMARKED, THOUGHT, STRICT], ids=["unmarked", "thought", "strict"])
def test_an_unmarked_template_gives_the_labels_of_the_marked_one(template):
    marked, unmarked = encoder(), encoder(template)
    assert marked.template.marks_answers and not unmarked.template.marks_answers
    np.testing.assert_array_equal(marked.encode(MESSAGES, [3, 1]).labels, unmarked.encode(MESSAGES, [3, 1]).labels)


def test_role_names_come_from_the_template_alone():
    template = UNMARKED.replace("'assistant'", "'bot'").replace("'model'", "'robot'").replace("model\\n", "robot\\n")
    messages = [{**message, "role": message["role"].replace("assistant", "bot")} for message in MESSAGES]
    encode = encoder(template)
    labels = encode.encode(messages, [3, 1]).labels
    assert encode.tokenizer.decode(labels[labels != -100]) == "Un café 🙂<turn|>Ja<turn|>"


@pytest.mark.parametrize(
    "template, message",
    [
        (UNMARKED.rpartition("{%- if add_generation_prompt")[0], "no answer to learn from"),
        (UNMARKED.replace("body + '<turn|>'", "body"), "without a special token"),
        (UNMARKED.replace("{{- body", "{{- ('' if loop.last else '!') + body", 1), "rewrites message 2"),
        ("{{ raise_exception('never') }}", "never"),
    ],
    ids=["no generation prompt", "no end of turn", "rewritten turns", "refusal"],
)
def test_a_template_that_hides_its_answers_is_a_data_error(template, message):
    with pytest.raises(DataError, match=message):
        encoder(template).encode(MESSAGES, [3, 1])


def test_media_tokens_in_an_answer_have_no_loss():
    parts = [{"type": "text", "text": "a"}, {"type": "image"}, {"type": "text", "text": "b"}]
    encoded = encoder().encode([MESSAGES[3], {"role": "assistant", "content": parts}], [2])
    assert encoded.labels[encoded.labels != -100].tolist() == [16 + ord("a"), 16 + ord("b"), 4]


@pytest.mark.parametrize("soft_tokens, text", [([3], "x"), ([3, 1, 1], "x"), ([3, 1], "<|image|>")])
def test_placeholders_and_media_that_do_not_match_are_a_data_error(soft_tokens, text):
    messages = [*MESSAGES[:3], {"role": "user", "content": text}, MESSAGES[4]]
    with pytest.raises(DataError, match="2 media"):
        encoder().encode(messages, soft_tokens)


def test_an_answer_stops_at_the_end_of_a_turn_or_sequence_and_is_read_without_special_tokens():
    encode = encoder()
    assert encode.stop_ids == {1, 4}
    labels = encode.encode(MESSAGES, [3, 1]).labels
    last_answer = labels[labels != -100][-3:]
    assert last_answer[-1] in encode.stop_ids
    assert encode.decode(last_answer) == "Ja"


def test_bytes_stand_at_sixteen_and_after():
    tokenizer = byte_tokenizer()
    text = bytes(range(256)).decode("latin-1")
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert ids == [16 + byte for byte in text.encode()]
    assert tokenizer.decode(ids) == text
    assert [tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.bos_token_id] == [0, 1, 2]
    assert max(tokenizer.get_vocab().values()) < 384


def test_a_tokenizer_directory_gives_the_same_tokens(tmp_path):
    byte_tokenizer().save_pretrained(tmp_path)
    loaded = ConversationEncoder(load_tokenizer(tmp_path), [TileProcessor()], MEDIA_TOKENS)
    np.testing.assert_array_equal(loaded.encode(MESSAGES, [3, 1]).labels, encoder().encode(MESSAGES, [3, 1]).labels)
    assert loaded.template.source == encoder().template.source
    (tmp_path / "chat_template.jinja").unlink()
    with pytest.raises(DataError, match="no chat template"):
        ConversationEncoder(load_tokenizer(tmp_path))
    with pytest.raises(ConfigError, match="model.hf_path is .*not a directory"):
        load_tokenizer(tmp_path / "none")


def test_media_ids_come_from_the_model_configuration():
    config = {"boi_token_id": 5, "image_token_id": 6, "eoi_token_id": 7, "audio_token_id": 9, "boa_token_id": 8}
    assert media_tokens(config) == {"image": MEDIA_TOKENS["image"]}
    assert media_tokens({**config, "eoa_token_index": 10}) == MEDIA_TOKENS  # as Hugging Face writes it
    with pytest.raises(DataError, match="token ids for 'image'"):
        ConversationEncoder(byte_tokenizer(), [TileProcessor()], {})
