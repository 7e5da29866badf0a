"""Thoughts of answers: found in a message, and written in the form that the chat template has for them."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from mimo_gemma4.data.comparison import Answer, Renderer, Span
from mimo_gemma4.errors import DataError

Thoughts = Literal["learn", "as_template"]
"""`learn`: thoughts of learned answers are trained on; `as_template`: the chat template decides."""

_KEYS = ("reasoning_content", "reasoning")
_PROBE = "\ufdd3"


@dataclass(frozen=True)
class ThoughtForm:
    """What a template writes around a thought."""

    before: str
    after: str

    def write(self, thought: str) -> str:
        """A thought as the template writes it."""
        return f"{self.before}{thought}{self.after}"

    def split(self, text: str) -> tuple[str, str]:
        """The thought that a text begins with, and the rest; an empty thought where there is none."""
        body, opening = text.lstrip(), self.before.rstrip()
        thought, close, rest = body.removeprefix(opening).partition(self.after.strip())
        if not body.startswith(opening) or not close or not thought.strip():
            return "", text
        return thought.strip(), rest


GEMMA4_FORM = ThoughtForm("<|channel>thought\n", "\n<channel|>")


def find_form(template: Renderer, source: str, role: str, answer: Answer) -> ThoughtForm | None:
    """The form of a template, found by rendering a thought; Gemma 4's if the source names its tokens; else None."""
    question = {"role": "user", "content": "0"}
    call = {"type": "function", "function": {"name": "f", "arguments": {}}}
    for probe in ({"content": "1"}, {"content": "", "tool_calls": [call]}):
        try:
            bare = template.render([question, {"role": role, **probe}])
            text = template.render([question, {"role": role, **probe, "reasoning_content": _PROBE}])
        except DataError:
            continue
        written = text[text.rfind(answer.opening) + len(answer.opening) :][: len(text) - len(bare)]
        before, found, after = written.partition(_PROBE)
        if found and before.strip() and after.strip():
            return ThoughtForm(before, after)
    return GEMMA4_FORM if "<|channel>" in source else None


def thought_of(message: dict[str, Any], form: ThoughtForm | None) -> tuple[str, dict[str, Any]]:
    """The thought of a message and the message without it. It is in a key of its own or begins the content."""
    rest = {key: value for key, value in message.items() if key not in _KEYS}
    thought = next((message[key].strip() for key in _KEYS if isinstance(message.get(key), str)), "")
    content = message["content"]
    if form is not None and isinstance(content, str):
        first, rest["content"] = form.split(content)
        thought = thought or first
    elif form is not None and content and content[0]["type"] == "text":
        first, text = form.split(content[0]["text"])
        rest["content"] = [{**content[0], "text": text}, *content[1:]]
        thought = thought or first
    return thought, rest


def count_lost(messages: Sequence[dict[str, Any]], form: ThoughtForm | None, text: str) -> int:
    """Number of thoughts of messages, anywhere in them, that a rendering does not hold."""
    opening = "" if form is None else form.before.rstrip()
    told = Counter[str]()
    for message in messages:
        own = [message[key].strip() for key in _KEYS if isinstance(message.get(key), str)][:1]
        content = message["content"]
        for part in [content] if isinstance(content, str) else [part.get("text", "") for part in content]:
            if form is not None:
                own += [piece.partition(form.after.strip())[0].strip() for piece in part.split(opening)[1:]]
        told.update(thought for thought in own if thought)
    written = {thought: len(re.findall(rf"{re.escape(opening)}\s*{re.escape(thought)}", text)) for thought in told}
    return sum(max(0, count - written[thought]) for thought, count in told.items())


def insert(text: str, spans: Sequence[Span], pieces: Sequence[tuple[int, str]]) -> tuple[str, list[Span]]:
    """The text with pieces inserted at positions, in order; a span that begins at a position holds the piece."""
    written, position = [], 0
    for place, piece in pieces:
        written += [text[position:place], piece]
        position = place

    def shift(point: int) -> int:
        return point + sum(len(piece) for place, piece in pieces if place < point)

    return "".join([*written, text[position:]]), [(shift(start), shift(end)) for start, end in spans]
