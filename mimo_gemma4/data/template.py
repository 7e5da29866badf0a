"""Renders conversations with a tokenizer's chat template and finds the answers in the text.

Only the template knows role names. It marks answers with `{% generation %}`; otherwise a turn is an answer if it opens
as the template's generation prompt does.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from mimo_gemma4.data import turns
from mimo_gemma4.data.anchors import marked, unmarked
from mimo_gemma4.data.comparison import ADVICE, Answer, PrefixComparison, Span
from mimo_gemma4.data.messages import Conversation, Messages, handed_over, is_learned, tools_of
from mimo_gemma4.data.thoughts import ThoughtForm, Thoughts, count_lost, find_form, insert, thought_of
from mimo_gemma4.data.turns import Rendering
from mimo_gemma4.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
_WRITTEN_BY_NAME = ("tool_calls", "tool_responses")
"""Keys of a message that only a template which names them can write."""


@dataclass(frozen=True)
class Located:
    """A rendered conversation."""

    text: str
    spans: list[Span]
    """Characters with a loss, in order."""
    left_out: tuple[str, ...]
    """Names of what the conversation holds and the text does not: unknown keys, `tools`, `thoughts`, …; one each."""


class ChatTemplate:
    """The chat template of a tokenizer."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, thoughts: Thoughts = "learn") -> None:
        """Take the tokenizer's template. Raises `DataError` if it has none."""
        try:
            self.source: str = tokenizer.get_chat_template()
        except ValueError as error:
            raise DataError(
                f"the tokenizer {tokenizer.name_or_path!r} has no chat template; put a chat_template.jinja beside it"
            ) from error
        self.thoughts = thoughts
        self.marks_answers = _GENERATION.search(self.source) is not None
        self._special_tokens = tokenizer.special_tokens_map
        contents = (token.content for token in tokenizer.added_tokens_decoder.values())
        self._comparison = PrefixComparison(self, [content for content in contents if content.strip()])
        self._answers: dict[str, Answer | None] = {}
        self._named: dict[str, bool] = {}

    def render(self, messages: Messages, *, add_generation_prompt: bool = False) -> str:
        """The conversation as text. Raises `DataError` if the template rejects it."""
        return self._render(self._hand_over(messages), add_generation_prompt)[0]

    def answers(self, messages: Messages) -> tuple[str, list[Span]]:
        """The rendered conversation and the character spans of its answers, in order.

        A span ends with the end-of-turn token. Raises `DataError` if there is no answer or it cannot be located.
        """
        located = self.locate(messages)
        return located.text, located.spans

    def locate(self, messages: Messages) -> Located:
        """The rendered conversation, what has a loss, and what is left out. Raises `DataError` as `answers` does.

        Loss falls on answers, without those that are not to be learned and without what tools said.
        """
        handed = self._hand_over(messages)
        silent = {number for number, message in enumerate(messages) if not is_learned(message)}
        answering = self._answering(message["role"] for message in handed)
        learned = [n for n, message in enumerate(handed) if n not in silent and message["role"] in answering]
        told = [handed[number] for number in learned]  # thoughts are taken out of copies
        thoughts: dict[int, str] = {}
        if self.thoughts == "learn" and any(self._may_think(message) for message in told):
            thoughts = self._take_thoughts(handed, learned)
        text, spans, rendering = self._spans(handed, answering, whole=not silent and not thoughts)
        if not spans:
            raise DataError(f"the conversation has no answer to learn from; if it should have one, {ADVICE}")
        if rendering is not None:
            parts = turns.without_responses(rendering, spans)
            places = [(turns.message_start(rendering, parts, number), number) for number in thoughts]
            spans = turns.learned_parts(rendering, parts, silent, set(answering) or None)
            pieces = sorted((place, self._form_of(thoughts[number])) for place, number in places if place is not None)
            text, spans = insert(text, spans, pieces)
            if not spans:
                raise DataError("none of the conversation's answers is to be learned: its messages say so themselves")
        lost = count_lost(told, self._form if any(map(self._may_think, told)) else None, text)
        return Located(text, spans, (*self._left_out(messages), *["thoughts"] * lost))

    def _spans(
        self, handed: Conversation, answering: dict[str, Answer], *, whole: bool
    ) -> tuple[str, list[Span], Rendering | None]:
        """Text, spans of whole turns, and the anchors where they are needed. `whole`: all answers are learned."""
        tools = any(message.get("tool_calls") or message.get("tool_responses") for message in handed)
        if self.marks_answers:
            text, spans = self._render(handed, False)
            if whole and not tools:
                return text, spans, Rendering(text, (), handed)
            rendering = self._anchored(handed, text)
        else:
            text = self._render(handed, False)[0]
            rendering = self._anchored(handed, text)
            found = turns.find_turns(rendering, answering) if rendering and answering else None
            spans = self._comparison.spans(handed)[1] if found is None else found
        if rendering is None and (tools or not whole):
            raise DataError(
                "the chat template changes what messages say, so the parts of an answer cannot be told apart: its "
                "calls of tools, thoughts, or messages that are not to be learned"
            )
        return text, spans, rendering

    def _render(self, handed: Messages, add_generation_prompt: bool) -> tuple[str, list[Span]]:
        from jinja2 import TemplateError
        from transformers.utils.chat_template_utils import render_jinja_template

        options: dict[str, Any] = {
            **self._special_tokens,
            "tools": tools_of(handed),
            "chat_template": self.source,
            "return_assistant_tokens_mask": self.marks_answers,
            "add_generation_prompt": add_generation_prompt,
        }
        try:
            rendered: Any = render_jinja_template([list(handed)], **options)
        except (TemplateError, TypeError, KeyError, ValueError, AttributeError) as error:
            raise DataError(f"the chat template rejects the conversation: {error}") from error
        texts, spans = rendered
        return texts[0], [(start, end) for start, end in spans[0]] if spans else []

    def _hand_over(self, messages: Messages) -> Conversation:
        return Conversation(handed_over(messages, as_parts=not self._takes_strings), tools_of(messages))

    @cached_property
    def _takes_strings(self) -> bool:
        """Whether content may be a string; some templates go through it as a list of parts and then write nothing."""
        probe = [{"role": "user", "content": "qzqz"}, {"role": "assistant", "content": "zqzq"}]
        parts = [{**message, "content": [{"type": "text", "text": message["content"]}]} for message in probe]
        texts = []
        for messages in (probe, parts):
            try:
                text = self._render(messages, False)[0]
            except DataError:
                text = ""
            texts.append(all(str(message["content"]) in text for message in probe))
        return texts[0] or not texts[1]

    def _anchored(self, handed: Conversation, text: str) -> Rendering | None:
        """The rendering with its anchors; None where the template treats marked text in another way."""
        try:
            found = unmarked(self._render(Conversation(marked(handed), handed.tools), False)[0])
        except DataError:
            return None
        return Rendering(text, found[1], handed) if found is not None and found[0] == text else None

    def _answering(self, roles: Iterable[str]) -> dict[str, Answer]:
        """How the answers of each role open and end, for the roles that answer."""
        found = {role: self._answer_of(role) for role in dict.fromkeys(roles)}
        return {role: answer for role, answer in found.items() if answer is not None}

    def _answer_of(self, role: str) -> Answer | None:
        """Found once for each role, with a short conversation."""
        if role not in self._answers:
            question, reply = {"role": "user", "content": "0"}, {"role": role, "content": "1"}
            instruction = {"role": "system", "content": "2"}
            answer = None
            for context in ([question], [instruction, question], [question, reply, question]):
                try:
                    answer = answer or self._comparison.answer([*context, reply])
                except DataError:
                    continue
            self._answers[role] = answer
        return self._answers[role]

    @cached_property
    def _form(self) -> ThoughtForm | None:
        """Found once, with the role of the first answer; only used where there is one."""
        role, answer = next((role, answer) for role, answer in self._answers.items() if answer)
        return find_form(self, self.source, role, answer)

    def _form_of(self, thought: str) -> str:
        return "" if self._form is None else self._form.write(thought)

    def _may_think(self, message: dict[str, Any]) -> bool:
        """A quick look, so that messages without thoughts cost nothing."""
        if message.get("reasoning_content") or message.get("reasoning"):
            return True
        content = message["content"]
        texts = [content] if isinstance(content, str) else [part.get("text", "") for part in content]
        return self._form is not None and any(self._form.before.rstrip() in text for text in texts)

    def _take_thoughts(self, handed: Conversation, numbers: list[int]) -> dict[int, str]:
        """Take the thoughts that the template would not write out of messages `numbers`, by message."""
        if self._form is None:
            return {}
        found = {number: thought_of(handed[number], self._form) for number in numbers}
        found = {number: pair for number, pair in found.items() if pair[0]}
        for number, (thought, rest) in found.items():
            handed[number] = {**rest, "reasoning_content": thought}
        rendering = self._anchored(handed, self._render(handed, False)[0])
        written = set() if rendering is None else {anchor.message for anchor in rendering.anchors if anchor.kind == "t"}
        taken = {number: pair for number, pair in found.items() if number not in written}
        for number, (_, rest) in taken.items():
            handed[number] = rest
        return {number: thought for number, (thought, _) in taken.items()}

    def _left_out(self, messages: Messages) -> list[str]:
        names = [] if not isinstance(messages, Conversation) else list(messages.unknown)
        names += ["tools"] if tools_of(messages) else []
        names += [f"messages.{key}" for key in _WRITTEN_BY_NAME if any(message.get(key) for message in messages)]
        return [name for name in names if not self._names(name.rpartition(".")[2])]

    def _names(self, key: str) -> bool:
        """Whether the template's source holds a word."""
        if key not in self._named:
            self._named[key] = re.search(rf"\b{re.escape(key)}\b", self.source) is not None
        return self._named[key]
