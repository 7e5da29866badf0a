"""Renders conversations with a tokenizer's chat template and finds the answers in the text.

Only the template knows role names. It marks answers with `{% generation %}`; otherwise renderings are compared: a turn
is an answer if it opens as the template's generation prompt does.
"""

from __future__ import annotations

import os
import re
from typing import TYPE_CHECKING, Any

from mimo_gemma4.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
_ADVICE = "mark the answers in the chat template with {% generation %} … {% endgeneration %}"

Messages = list[dict[str, Any]]
Span = tuple[int, int]


class ChatTemplate:
    """The chat template of a tokenizer."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        """Take the tokenizer's template. Raises `DataError` if it has none."""
        try:
            self.source: str = tokenizer.get_chat_template()
        except ValueError as error:
            raise DataError(
                f"the tokenizer {tokenizer.name_or_path!r} has no chat template; put a chat_template.jinja beside it"
            ) from error
        self.marks_answers = _GENERATION.search(self.source) is not None
        self._special_tokens = tokenizer.special_tokens_map
        contents = (token.content for token in tokenizer.added_tokens_decoder.values())
        self._added_tokens = frozenset(content for content in contents if content.strip())
        self._added_lengths = sorted({len(content) for content in self._added_tokens}, reverse=True)

    def render(self, messages: Messages, *, add_generation_prompt: bool = False) -> str:
        """The conversation as text. Raises `DataError` if the template rejects it."""
        return self._render(messages, add_generation_prompt)[0]

    def answers(self, messages: Messages) -> tuple[str, list[Span]]:
        """The rendered conversation and the character spans of its answers, in order.

        A span ends with the end-of-turn token. Raises `DataError` if there is no answer or it cannot be located.
        """
        if self.marks_answers:
            text, spans = self._render(messages, False)
        else:
            text, spans = self._compare(messages)
        if not spans:
            raise DataError(f"the conversation has no answer to learn from; if it should have one, {_ADVICE}")
        return text, spans

    def _render(self, messages: Messages, add_generation_prompt: bool) -> tuple[str, list[Span]]:
        from jinja2 import TemplateError
        from transformers.utils.chat_template_utils import render_jinja_template

        options: dict[str, Any] = {
            **self._special_tokens,
            "chat_template": self.source,
            "return_assistant_tokens_mask": self.marks_answers,
            "add_generation_prompt": add_generation_prompt,
        }
        try:
            rendered: Any = render_jinja_template([messages], **options)
        except (TemplateError, TypeError, KeyError, ValueError) as error:
            raise DataError(f"the chat template rejects the conversation: {error}") from error
        texts, spans = rendered
        return texts[0], [(start, end) for start, end in spans[0]] if spans else []

    def _compare(self, messages: Messages) -> tuple[str, list[Span]]:
        """Find the spans by comparing renderings of the first one, two, … messages."""
        text = self.render(messages)
        spans: list[Span] = []
        answering_roles, other_roles = set(), set()
        for number in range(1, len(messages)):
            span = self._answer(messages[: number + 1])
            role = messages[number]["role"]
            if span is None:
                other_roles.add(role)
                continue
            answering_roles.add(role)
            if text[: span[1]] != self.render(messages[: number + 1])[: span[1]]:
                raise DataError(f"the chat template rewrites message {number} once others follow it; {_ADVICE}")
            spans.append(span)
        if answering_roles & other_roles:
            raise DataError(f"the chat template opens turns of {sorted(answering_roles)} in several ways; {_ADVICE}")
        return text, spans

    def _answer(self, messages: Messages) -> Span | None:
        """Span of the last message in the rendering of `messages`; None if it is no answer."""
        try:
            before = self.render(messages[:-1])
            prompt = self.render(messages[:-1], add_generation_prompt=True)
            text = self.render(messages)
            opening = prompt if text.startswith(prompt) else self._opening(messages)
        except DataError:  # many templates reject a conversation that ends after, for example, the system message
            return None
        has_prompt = len(prompt) > len(before) and prompt.startswith(before)
        if not has_prompt or len(opening) <= len(before) or not prompt.startswith(opening):
            return None
        return len(opening), len(opening) + self._turn_length(text[len(opening) :])

    def _opening(self, messages: Messages) -> str:
        """The rendering of `messages` up to the last one's content: what renderings with two contents share."""
        *context, last = messages
        texts = []
        for probe in ("0", "1"):
            content = probe if isinstance(last["content"], str) else [{"type": "text", "text": probe}]
            texts.append(self.render([*context, {**last, "content": content}]))
        return os.path.commonprefix(texts)

    def _turn_length(self, turn: str) -> int:
        """Number of characters up to the end of the end-of-turn token, after which only white space may follow."""
        length = len(turn.rstrip())
        if any(turn[length - size : length] in self._added_tokens for size in self._added_lengths if size <= length):
            return length
        raise DataError(f"the chat template closes an answer without a special token ({turn[-40:]!r}); {_ADVICE}")
