"""What a row says is used, refused or counted: nothing is lost in silence."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mimo_gemma4.data.convert.__main__ import main
from mimo_gemma4.data.convert.choices import Choices
from mimo_gemma4.data.convert.conversation import ConversationReader
from tests.shard_maker import TileProcessor, open_dataset

LAMP = {"name": "lamp", "description": "Switch it.", "parameters": {"type": "object", "properties": {}}}
CALL = {"name": "lamp", "arguments": {"on": True}}
CALLED = {"role": "assistant", "content": None, "tool_calls": [{"type": "function", "function": CALL}]}


def read(row, *ignored):
    return ConversationReader(ignored=frozenset(ignored)).read(row)


def said(conversation):
    """(Role, text with `<type>` for media) of every message."""
    return [
        (m["role"], "".join(part.get("text", f"<{part['type']}>") for part in m["content"] or []))
        for m in conversation.messages
    ]


def chat(*texts, **keys):
    roles = ("user", "assistant")
    return {"messages": [{"role": roles[n % 2], "content": text} for n, text in enumerate(texts)], **keys}


PROMPTED = [("system", "S"), ("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")]


@pytest.mark.parametrize(
    "row",
    [
        {"system": "S", "history": [["a", "b"]], "query": "c", "response": "d"},
        {"system_prompt": " S ", "history": chat("a", "b")["messages"], **chat("c", "d")},
        {"system": "S", "messages": json.dumps([{"from": "system", "value": "S"}, *chat(*"abcd")["messages"]])},
        {"system": "S", "history": [{"user": "a", "assistant": "b"}], "instruction": "c", "input": "", "output": "d"},
    ],
)  # fmt: skip
def test_system_prompt_and_history_come_first(row):
    conversation = read(row)
    assert said(conversation) == PROMPTED and conversation.unused == ()


def test_context_stands_below_its_question():
    rows = [
        {"instruction": "Translate.", "input": "Haus", "output": "house"},
        {"question": "Translate.", "context": "Haus", "answers": {"text": ["house"]}},
    ]
    for row in rows:
        assert said(read(row)) == [("user", "Translate.\nHaus"), ("assistant", "house")]


TWO = "q\nA. trout\nB. whale"


@pytest.mark.parametrize(
    "columns",
    [
        {"choices": ["trout", "whale"], "answer": 1},
        {"choices": ["trout", "whale"], "answer": 1.0},
        {"choices": ["trout", "whale"], "answer": "whale"},
        {"options": "['trout', 'whale']", "answer": "(b)"},
        {"options": ["A. trout", "B. whale"], "answer": "B. whale"},
        {"choices": {"text": ["trout", "whale"], "label": ["A", "B"]}, "answerKey": "B"},
        {"options": {"A": "trout", "B": "whale"}, "answer_idx": "B"},
        {"A": "trout", "B": "whale", "answer": "B"},
    ],
)
def test_choices_are_written_out_in_every_form(columns):
    conversation = read({"question": "q", **columns})
    assert said(conversation) == [("user", TWO), ("assistant", "B. whale")] and conversation.unused == ()


def test_numbers_are_labels_before_they_are_places():
    choices = Choices.read({"label": ["1", "2", "3"], "text": ["x", "y", "z"]})
    assert choices.answer(1) == choices.answer("1") == "1. x"
    assert Choices.read([3, 4, 5]).answer(5) == "C. 5", "number 5 is beyond the choices, so 5 is a text"
    assert Choices.read(["x", "y", "z"]).answer(["C", "A"]) == "A. x\nC. z"


@pytest.mark.parametrize("tools", [[LAMP], [{"type": "function", "function": LAMP}], json.dumps([LAMP]), LAMP])
def test_tools_of_every_form_are_kept(tools):
    conversation = read(chat("a", "b", tools=tools))
    assert conversation.tools == [{"type": "function", "function": LAMP}] and conversation.unused == ()


@pytest.mark.parametrize(
    "message",
    [
        {"role": "assistant", "content": None, "tool_calls": [{"type": "function", "function": CALL}]},
        {"role": "assistant", "content": "", "tool_calls": json.dumps([CALL])},
        {"role": "assistant", "function_call": CALL},
        {"from": "function_call", "value": json.dumps(CALL)},
        {"role": "tool_call", "content": json.dumps(CALL)},
    ],
)
def test_tool_calls_of_every_form_are_kept(message):
    answer = {"role": "tool", "content": {"state": "<image>"}, "name": "lamp", "tool_call_id": "1"}
    conversation = read({"messages": [{"role": "user", "content": "Light!"}, message, answer]})
    assert conversation.messages[1] == CALLED
    assert conversation.messages[2] == {**answer, "content": [{"type": "text", "text": '{"state": "<image>"}'}]}
    assert conversation.unused == ()


def test_marks_of_the_loss_and_thoughts_have_one_form():
    marks = [{"weight": 0}, {"train": False}, {"loss": 0.0}, {"loss_mask": 0}, {"trainable": False}]
    for mark in [*marks, {"weight": 1}, {"train": True}, {"loss": None}, {}]:
        row = chat("a", "b")
        row["messages"][1].update(mark, thinking="hm")
        answer = read(row).messages[1]
        assert answer.get("loss") == (False if mark in marks else None) and answer["reasoning_content"] == "hm"
        assert not answer.keys() & {"weight", "train", "loss_mask", "trainable", "thinking"}
    row["messages"][0]["train"] = True
    assert read(row).unused == ("messages.train",), "words of the user are never learned"


def test_an_index_chooses_the_image():
    parts = [{"type": "image", "index": 2}, {"type": "image"}, {"type": "image", "index": 0}]
    row = {"images": ["0.png", "1.png", "2.png"], **chat(parts, "b")}
    assert [reference.source for reference in read(row).media] == ["2.png", "1.png", "0.png"]
    assert read(row).unused == ()


@pytest.mark.parametrize(
    ("question", "answer"),
    [
        ("Which tag shows a film?", "<video>"),
        ("What does <image> do?", "It shows.\n<image>\n"),
        ("<audio> or <video>?", "Both."),
        ("Mend this:\n<video>\n<source>\n</video>", "Done."),
    ],
)
def test_tags_in_text_alone_are_text(question, answer):
    conversation = read(chat(question, answer))
    assert said(conversation) == [("user", question), ("assistant", answer)] and not conversation.media
    assert set(conversation.unused) <= {"<image>", "<audio>", "<video>"} and conversation.unused


def test_tags_beside_media_of_the_row():
    spoken = read({"image": "a.png", **chat("<image>\nWhich tags show it?", "<image>, or\n<video>\nfor films")})
    assert said(spoken) == [("user", "<image>Which tags show it?"), ("assistant", "<image>, or\n<video>\nfor films")]
    assert len(spoken.media) == 1 and spoken.unused == ("<image>", "<video>")
    assert said(read(chat("<image>\nWhat?", "b"), "<image>"))[0] == ("user", "<image>\nWhat?")


def test_what_is_not_used_is_named():
    row = {
        "id": 7, "lecture": "Fish swim.", "empty": [],
        "images": [{"bytes": b"x", "path": "a", "height": 3}], "image": "b",
        "conversations": [
            {"from": "human", "value": "a", "mood": "glad", "images": ["c.png"]},
            {"from": "gpt", "value": [{"type": "text", "text": "b", "cache_control": {"type": "x"}}]},
        ],
    }  # fmt: skip
    expected = ("content.cache_control", "conversations.images", "conversations.mood", "images", "lecture")
    assert read(row).unused == expected
    assert read(row, "lecture", "conversations.mood").unused == (
        "content.cache_control",
        "conversations.images",
        "images",
    )
    assert read({"images": row["images"], **chat("a", "b")}).unused == ("image.height",)
    assert read({"dialogue": "A: hi", "question": "q", "answer": "a"}).unused == ("dialogue",)
    assert read({"question": "q", "answers": [{"answer": "a", "id": 1}, {"answer": "b"}]}).unused == (
        "answers.id",
        "answers.others",
    )


def test_counts_are_reported_and_strict_makes_them_an_error(tmp_path, capsys):
    rows = [{"question": "q", "answer": "a", "lecture": "l"}, {"question": "q", "answer": "b"}]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    command = [str(tmp_path / "a.jsonl"), "--out", str(tmp_path / "out"), "--workers", "1"]
    assert main([*command, "--strict"]) == 2
    assert "nothing uses lecture (1 samples)" in capsys.readouterr().err and not list((tmp_path / "out").glob("*.tar"))
    assert main(command) == 0 and "not used: lecture (1 samples)" in capsys.readouterr().out
    assert json.loads((tmp_path / "out" / "report.json").read_text())["unused"] == {"lecture": 1}
    assert main([*command, "--strict"]) == 2, "a finished conversion knows it, too"
    assert main([*command, "--strict", "--ignore", "lecture"]) == 0
    assert main([*command, "--ignore", "question"]) == 2 and "other ignored" in capsys.readouterr().err


def test_keys_that_a_table_adds_are_not_there(tmp_path):
    calls = [{"name": "lamp", "arguments": {"on": True}}, {"name": "door", "arguments": {"angle": 9}}]
    rows = [chat("a", "b") for _ in calls]
    for row, call in zip(rows, calls, strict=True):
        row["messages"][1]["tool_calls"] = [{"type": "function", "function": call}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    assert main([str(tmp_path / "a.parquet"), "--out", str(tmp_path / "out"), "--workers", "1"]) == 0
    dataset = open_dataset(f"{tmp_path}/out/train-*.tar", TileProcessor())
    assert [dataset.messages(n)[1]["tool_calls"][0]["function"] for n in range(2)] == calls
