"""Finds the answers of an unmarked chat template by comparing renderings of the first one, two, … messages.

Its cost grows with the square of the number of messages. `turns.py` finds the same answers faster where it can.
"""

from __future__ import annotations

import os
from collections.abc import Collection
from dataclasses import dataclass
from typing import Protocol

from mimo_gemma4.data.messages import Conversation, Messages, tools_of
from mimo_gemma4.errors import DataError

ADVICE = "mark the answers in the chat template with {% generation %} … {% endgeneration %}"

Span = tuple[int, int]


class Renderer(Protocol):
    """Renders conversations."""

    def render(self, messages: Messages, *, add_generation_prompt: bool = False) -> str:
        """The conversation as text. Raises `DataError` if the template rejects it."""


@dataclass(frozen=True)
class Answer:
    """The last message of a rendered conversation, which is an answer."""

    opening: str
    """What the template writes before its content."""
    prompt: str
    """The generation prompt; it begins with the opening, or the opening is all of it."""
    span: Span
    """Its characters, from its content to the end-of-turn token."""
    end_of_turn: str
    """The special token that closes it."""


class PrefixComparison:
    """Answers of one template."""

    def __init__(self, template: Renderer, added_tokens: Collection[str]) -> None:
        """`added_tokens`: texts of the tokenizer's added tokens, which may end a turn."""
        self._template = template
        self._added_tokens = frozenset(added_tokens)
        self._lengths = sorted({len(token) for token in added_tokens}, reverse=True)

    def spans(self, messages: Messages) -> tuple[str, list[Span]]:
        """The rendering and the spans of all answers after message 0. Raises `DataError` if they cannot be located."""
        text = self._template.render(messages)
        spans: list[Span] = []
        answering_roles, other_roles = set(), set()
        for number in range(1, len(messages)):
            beginning = Conversation(messages[: number + 1], tools_of(messages))
            answer = self.answer(beginning)
            role = messages[number]["role"]
            if answer is None:
                other_roles.add(role)
                continue
            answering_roles.add(role)
            if text[: answer.span[1]] != self._template.render(beginning)[: answer.span[1]]:
                raise DataError(f"the chat template rewrites message {number} once others follow it; {ADVICE}")
            spans.append(answer.span)
        if answering_roles & other_roles or messages[0]["role"] in answering_roles:
            raise DataError(f"the chat template opens turns of {sorted(answering_roles)} in several ways; {ADVICE}")
        return text, spans

    def answer(self, messages: Messages) -> Answer | None:
        """The last message in the rendering of `messages`; None if it is no answer."""
        context = Conversation(messages[:-1], tools_of(messages))
        try:
            before = self._template.render(context)
            prompt = self._template.render(context, add_generation_prompt=True)
            text = self._template.render(messages)
            opening = prompt if text.startswith(prompt) else self._opening(messages)
        except DataError:  # many templates reject a conversation that ends after, for example, the system message
            return None
        has_prompt = len(prompt) > len(before) and prompt.startswith(before)
        if not has_prompt or len(opening) <= len(before) or not prompt.startswith(opening):
            return None
        length, token = self.turn_end(text[len(opening) :])
        span = (len(opening), len(opening) + length)
        return Answer(opening[len(before) :], prompt[len(before) :], span, token)

    def turn_end(self, turn: str) -> tuple[int, str]:
        """Number of characters up to the end of the end-of-turn token, after which only white space follows.

        Also the token. Raises `DataError` if there is none.
        """
        length = len(turn.rstrip())
        for size in self._lengths:
            if size <= length and turn[length - size : length] in self._added_tokens:
                return length, turn[length - size : length]
        raise DataError(f"the chat template closes an answer without a special token ({turn[-40:]!r}); {ADVICE}")

    def _opening(self, messages: Messages) -> str:
        """The rendering of `messages` up to the last one's content: what renderings with two contents share."""
        *context, last = messages
        texts = []
        for probe in ("0", "1"):
            content = probe if isinstance(last["content"], str) else [{"type": "text", "text": probe}]
            probed = Conversation([*context, {**last, "content": content}], tools_of(messages))
            texts.append(self._template.render(probed))
        return os.path.commonprefix(texts)
