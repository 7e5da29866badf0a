"""Rows of every form become the same conversations, and every fault of a row is named."""

import base64

import pytest

from mimo_gemma4.data.convert.conversation import ConversationReader
from mimo_gemma4.data.convert.samples import make_sample
from mimo_gemma4.data.sample import BadSampleError, parse_messages
from mimo_gemma4.errors import DataError
from tests.shard_maker import jpeg, png, text_of, wav

PICTURE, SOUND = png(16, 8, 1), wav(900)
PICTURE_URL = f"data:image/png;base64,{base64.b64encode(PICTURE).decode()}"


@pytest.fixture
def media(tmp_path):
    folder = tmp_path / "media"
    folder.mkdir()
    (folder / "a.jpg").write_bytes(PICTURE)  # a PNG under another name
    (folder / "b.png").write_bytes(png(8, 16, 2))
    (folder / "a.wav").write_bytes(SOUND)
    (folder / "cut.jpg").write_bytes(jpeg(64, 64)[:-400])
    (folder / "photo.tiff").write_bytes(b"II*\0" + bytes(100))
    (tmp_path / "secret.png").write_bytes(PICTURE)
    return folder


def outline(members):
    """Turns as role and content, each part of it text or the type of a media file."""
    return [
        (message["role"], [part.get("text", f"<{part['type']}>") for part in message["content"]])
        for message in parse_messages(members["json"])
    ]


def turns(*texts, who="from", what="value", names=("human", "gpt")):
    return [{who: names[number % 2], what: text} for number, text in enumerate(texts)]


ASKED = [("user", ["<image>", "What?"]), ("assistant", ["That."])]
FORMS = {
    "llava": {"image": "a.jpg", "conversations": turns("<image>\nWhat?", "That.")},
    "llava, marker behind": {"image": "a.jpg", "conversations": turns("What?\n<image>", "That.")},
    "sharegpt without marker": {"images": ["a.jpg"], "conversations": turns("What?", "That.")},
    "empty system message": {
        "image": "a.jpg",
        "conversations": [{"from": "system", "value": ""}, *turns("<image>What?", "That.")],
    },
    "roles and contents": {
        "images": [{"bytes": PICTURE, "path": None}],
        "messages": turns("<image>What?", "That.", who="role", what="content", names=("user", "assistant")),
    },
    "typed parts": {
        "images": [{"bytes": PICTURE, "path": "gone.png"}],
        "messages": [
            {
                "role": "user",
                "content": [
                    {"type": "image", "text": None},
                    {"type": "text", "text": "What?"},
                ],
            },
            {"role": "assistant", "content": [{"type": "text", "text": "That."}]},
        ],
    },
    "a URL that holds the data": {
        "messages": [
            {
                "role": "user",
                "content": [
                    {"type": "image_url", "image_url": {"url": PICTURE_URL}},
                    {"type": "text", "text": "What?"},
                ],
            },
            {"role": "assistant", "content": "That."},
        ]
    },
    "pairs": {"images": [PICTURE], "texts": [{"user": "What?", "assistant": "That.", "source": "x"}]},
    "question": {"image": "a.jpg", "question": "What?", "answer": "That."},
    "question with answers": {
        "image": {"bytes": PICTURE},
        "question": "What?",
        "answers": [{"answer": "This."}, {"answer": "That."}, {"answer": "That."}],
    },
    "file and caption": {"file_name": "b.png", "text": "That."},
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_every_form_becomes_the_same_conversation(media, form):
    members = make_sample(form, FORMS[form], ConversationReader(prompt="What?"), media)
    expected = [("user", ["What?", "<image>"]), ASKED[1]] if form == "llava, marker behind" else ASKED
    assert outline(members) == expected
    picture = (media / "b.png").read_bytes() if form == "file and caption" else PICTURE
    assert members["0.png"] == picture and len(members) == 2


def test_media_of_several_types_are_numbered_as_the_messages_name_them(media):
    row = {
        "images": ["a.jpg", "b.png"],
        "audio": "a.wav",
        "conversations": turns("<image> or <audio>?", "First.", "And\n<image>\nthis?", "Second."),
    }
    members = make_sample("x", row, ConversationReader(), media)
    assert outline(members) == [
        ("user", ["<image>", " or ", "<audio>", "?"]),
        ("assistant", ["First."]),
        ("user", ["And", "<image>", "this?"]),
        ("assistant", ["Second."]),
    ]
    assert [members["0.png"], members["1.wav"]] == [PICTURE, SOUND]
    assert members["2.png"] == (media / "b.png").read_bytes()


def test_numbers_are_answers_and_prompts_suit_the_media(media):
    def said(row):
        return [
            text_of(message) for message in parse_messages(make_sample("x", row, ConversationReader(), media)["json"])
        ]

    assert said({"question": "2 + 2?", "answer": 4}) == ["2 + 2?", "4"]
    assert said({"audio": "a.wav", "sentence": "hello"}) == ["Transcribe the audio.", "hello"]
    assert said({"image": "b.png", "captions": ["first", "second"]}) == ["Describe the image.", "first"]


def test_columns_can_be_named():
    reader = ConversationReader({"question": "frage", "answer": "antwort"})
    row = {"frage": "Was?", "antwort": "Das.", "question": "not this"}
    assert [text_of(message) for message in reader.read(row).messages] == ["Was?", "Das."]
    with pytest.raises(DataError, match="--column picture=.*known meanings are messages, question"):
        ConversationReader({"picture": "img"})


FAULTS = {
    "unknown columns": ({"foo": 1}, "json", r"none of its columns \['foo'\].*--column"),
    "half a character": ({"question": "\ud800", "answer": "a"}, "json", "surrogates"),
    "no such file": ({"image": "none.jpg", "caption": "x"}, "members", "'none.jpg' cannot be read.*No such file"),
    "a folder": ({"image": ".", "caption": "x"}, "members", "outside"),
    "a zero byte in a name": ({"image": "a\0.jpg", "caption": "x"}, "members", "cannot be read.*null byte"),
    "a path to elsewhere": ({"image": "../secret.png", "caption": "x"}, "members", "lies outside of .*--media"),
    "an absolute path": ({"image": "/etc/passwd", "caption": "x"}, "members", "lies outside"),
    "a URL": ({"image": "https://x.org/a.jpg", "caption": "x"}, "members", "is a URL; download it"),
    "broken base64": ({"image": "data:image/png;base64,?", "caption": "x"}, "members", "base64"),
    "too many markers": (
        {"image": "a.jpg", "conversations": turns("<image><image>?", "a")},
        "members",
        "name more image files than it has",
    ),
    "markers without image": ({"conversations": turns("<image>\n?", "a")}, "members", "name more image.*--ignore"),
    "markers behind, without image": ({"conversations": turns("?\n<image><image>", "a")}, "members", "name more image"),
    "too few markers": (
        {"images": ["a.jpg", "b.png"], "conversations": turns("<image>?", "a")},
        "members",
        "1 image files more than",
    ),
    "a caption of nothing": ({"caption": "x"}, "members", "no image or sound"),
    "a struct without content": ({"image": {"height": 3}, "caption": "x"}, "members", "neither bytes nor a path"),
    "a number for an image": ({"image": 7, "caption": "x"}, "members", "must be a path or bytes"),
    "a file of no known kind": ({"file_name": "a.mp3", "caption": "x"}, "members", "no suffix of an image or sound"),
    "a video": ({"video": "a.mp4", "question": "q", "answer": "a"}, "members", "frames as images"),
    "a format without decoder": ({"image": "photo.tiff", "caption": "x"}, "image", "one of jpg, png, gif, bmp, webp"),
    "a sound for an image": ({"image": "a.wav", "caption": "x"}, "image", "must be one of jpg"),
    "a picture cut short": ({"image": "cut.jpg", "caption": "x"}, "image", "'cut.jpg': .*truncated"),
    "a sound cut short": ({"audio": SOUND[:500], "caption": "x"}, "audio", "its audio of 500 bytes"),
    "an image for a sound": ({"audio": PICTURE, "caption": "x"}, "audio", "must be one of wav, flac"),
    "an unknown role": ({"conversations": [{"from": "narrator", "value": "x"}]}, "chat", "is 'narrator'"),
    "an empty message": ({"conversations": turns("?", " ")}, "chat", "message of assistant is empty"),
    "no content": ({"messages": [{"role": "user", "content": None}]}, "chat", "has no content"),
    "a message that is none": ({"messages": ["hello"]}, "chat", "a message is 'hello'"),
    "an unknown part": ({"messages": [{"role": "user", "content": [{"type": "smell"}]}]}, "chat", "'smell' is not"),
    "no answer": ({"conversations": turns("?")}, "chat", "no answer to learn from"),
    "an answer that is no text": ({"question": "q", "answers": []}, "chat", "its answer is None"),
    "a placeholder in the text": ({"question": "<|image|>", "answer": "a"}, "chat", "placeholder tokens"),
    "a placeholder of a video": ({"question": "<|video|>", "answer": "a"}, "chat", "placeholder tokens"),
    "a mark between": ({"messages": [{"role": "assistant", "content": "a", "weight": 0.5}]}, "chat", "weight .*0.5"),
    "two system prompts": (
        {"system": "Be brief.", "conversations": [{"from": "system", "value": "Be long."}, *turns("?", "a")]},
        "chat",
        "'Be brief.', and a message of system is 'Be long.'; --ignore system",
    ),
    "a history that is text": ({"history": '"hello"', "query": "q", "response": "a"}, "chat", "is 'hello'"),
    "tools that are none": ({"tools": ["lamp"], "query": "q", "response": "a"}, "chat", "list of functions"),
    "a call without name": (
        {"messages": [{"role": "assistant", "tool_calls": [{"arguments": {}}]}]},
        "chat",
        "a function has no name",
    ),
    "a call that is no JSON": ({"conversations": [{"from": "function_call", "value": "lamp("}]}, "chat", "not JSON"),
    "an index too large": (
        {"images": ["a.jpg"], "messages": [{"role": "user", "content": [{"type": "image", "index": 1}]}]},
        "members",
        "name image 1, but it has 1",
    ),
    "an answer beyond the choices": ({"question": "q", "choices": ["x", "y"], "answer": 2}, "chat", "is none of its"),
    "an answer counted from who knows": (
        {"question": "q", "choices": ["x", "y"], "answer": "1"},
        "chat",
        "count from 0 or 1",
    ),
    "an answer that may be two": ({"question": "q", "choices": ["1", "2"], "answer": 1}, "chat", "may be each of"),
    "choices without answer": ({"question": "q", "choices": ["x", "y"]}, "chat", "answer None is none of"),
    "one choice": ({"question": "q", "choices": ["x"], "answer": "x"}, "chat", "two or more"),
    "an image that no user shows": (
        {"image": "a.jpg", "conversations": [{"from": "gpt", "value": "x"}]},
        "chat",
        "no message of the user",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FAULTS)
def test_every_fault_is_named(media, name):
    row, fault, reason = FAULTS[name]
    with pytest.raises(BadSampleError, match=reason) as caught:
        make_sample("x", row, ConversationReader(), media)
    assert caught.value.fault == fault


def test_a_decompression_bomb_is_one(media, monkeypatch):
    monkeypatch.setattr("PIL.Image.MAX_IMAGE_PIXELS", 10)
    with pytest.raises(BadSampleError, match="decompression bomb") as caught:
        make_sample("x", {"image": "a.jpg", "caption": "x"}, ConversationReader(), media)
    assert caught.value.fault == "bomb"
