"""Finds the answers in a rendering whose anchors are known, in time that is linear in its length.

A turn is an answer if it opens as the template's generation prompt does; it ends with the end-of-turn token. A turn
may hold several messages, calls of tools and, in Gemma 4's form, what the tools answered: that part has no loss.
"""

from __future__ import annotations

import re
from bisect import bisect_left, bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from mimo_gemma4.data.anchors import Anchor
from mimo_gemma4.data.comparison import Answer, Span
from mimo_gemma4.data.messages import Messages

_RESPONSE_OPEN, _RESPONSE_CLOSE = "<|tool_response>", "<tool_response|>"


@dataclass(frozen=True)
class Rendering:
    """A rendered conversation and its anchors in text order."""

    text: str
    anchors: Sequence[Anchor]
    messages: Messages

    def outside(self, pattern: str, kinds: str = "cart") -> list[Span]:
        """Places of a text, except in what messages say; `kinds`: the kinds of anchors in which it does not count."""
        anchors = [anchor for anchor in self.anchors if anchor.kind in kinds]
        starts, found = [anchor.start for anchor in anchors], list[Span]()
        for match in re.finditer(re.escape(pattern), self.text):
            number = bisect_right(starts, match.end() - 1) - 1
            if number < 0 or anchors[number].end <= match.start():
                found.append(match.span())
        return found

    def within(self, span: Span) -> list[Anchor]:
        """The anchors that begin inside a span."""
        return list(self.anchors[bisect_left(self._starts, span[0]) : bisect_left(self._starts, span[1])])

    @cached_property
    def _starts(self) -> list[int]:
        return [anchor.start for anchor in self.anchors]


def find_turns(rendering: Rendering, answers: Mapping[str, Answer]) -> list[Span] | None:
    """Spans of the turns that are answers; None where the rendering is not as `answers`, by role, promise.

    A span begins after the opening and ends with the end-of-turn token, or with the token by which the model waits for
    a tool's answer.
    """
    text, spans = rendering.text, list[Span]()
    kinds = {(answer.opening, answer.prompt, answer.end_of_turn) for answer in answers.values()}
    if len(kinds) != 1:
        return None
    [(opening, prompt, end_of_turn)] = kinds
    openings, ends = rendering.outside(opening), rendering.outside(end_of_turn)
    waiting = rendering.outside(_RESPONSE_OPEN)
    for number, (begin, start) in enumerate(openings):
        limit = openings[number + 1][0] if number + 1 < len(openings) else len(text)
        start = begin + len(prompt) if text.startswith(prompt, begin) else start
        end = _first_end(ends, start, limit)
        foreign = [
            anchor.start
            for anchor in rendering.within((start, end or limit))
            if rendering.messages[anchor.message]["role"] not in {*answers, "tool"}
        ]
        if end is None or foreign:  # the turn ends with a call that no tool answers
            end = next((stop for _, stop in waiting if start < stop <= min([limit, *foreign])), None)
        if end is None:
            return None
        spans.append((start, end))
    spans = _with_continuations(rendering, spans, ends, answers)
    return spans if all(_is_tight(rendering, span, end_of_turn) for span in spans) and _all_found(
        rendering, spans, answers
    ) else None  # fmt: skip


def without_responses(rendering: Rendering, spans: list[Span]) -> list[Span]:
    """The spans without what tools answered. The token by which the model waits for the first answer stays.

    An answer's own text may hold such blocks, too; what tools say cannot end one.
    """
    closes = [stop for _, stop in rendering.outside(_RESPONSE_CLOSE, "r")]
    blocks: list[Span] = []
    for start, stop in rendering.outside(_RESPONSE_OPEN, "r"):
        close = next((end for end in closes[bisect_right(closes, start) :]), None)
        if close is None:
            continue
        follows = bool(blocks) and blocks[-1][1] == start
        blocks.append((start if follows else stop, close))
    # Another template's form is not known: there, at least the words of tools have no loss.
    words = [(anchor.start, anchor.end) for anchor in rendering.anchors if anchor.kind == "r"]
    blocks = sorted(blocks + words)
    kept = []
    for start, end in spans:
        position = start
        for first, last in blocks:
            if first >= end or last <= position:
                continue
            kept.append((position, max(position, first)))
            position = last
        kept.append((position, end))
    return [(start, end) for start, end in kept if start < end]


def learned_parts(rendering: Rendering, spans: list[Span], silent: set[int], roles: set[str] | None) -> list[Span]:
    """The spans without the `silent` messages. `roles`: those of answers; None: of any text in a span.

    Spans that hold several messages are parted where the earlier message's text ends.
    """
    messages = rendering.messages
    if not silent:
        return spans
    with_text = {anchor.message for anchor in rendering.anchors}
    kept = []
    for start, end in spans:
        mine = [
            anchor
            for anchor in rendering.within((start, end))
            if anchor.kind != "r" and (roles is None or messages[anchor.message]["role"] in roles)
        ]
        if not mine:
            kept += [] if silent - with_text else [(start, end)]
            continue
        position, owner = start, mine[0].message
        for earlier, later in zip(mine, mine[1:], strict=False):
            if later.message != owner:
                kept += [] if owner in silent else [(position, earlier.end)]
                position, owner = earlier.end, later.message
        kept += [] if owner in silent else [(position, end)]
    return [(start, end) for start, end in kept if start < end]


def message_start(rendering: Rendering, spans: list[Span], number: int) -> int | None:
    """Where the text of a message in a span of `without_responses` begins: at the span's start; None if unknown."""
    places = [anchor.start for anchor in rendering.anchors if anchor.message == number and anchor.kind != "r"]
    if not places:
        return None
    return next((start for start, end in spans if start <= min(places) <= end), None)


def _first_end(ends: list[Span], start: int, limit: int) -> int | None:
    number = bisect_right(ends, (start - 1, limit))
    return ends[number][1] if number < len(ends) and ends[number][0] >= start and ends[number][1] <= limit else None


def _with_continuations(
    rendering: Rendering, spans: list[Span], ends: list[Span], answers: Mapping[str, Answer]
) -> list[Span]:
    """Also the answers that follow another without an opening of their own."""
    found = sorted(spans)
    for anchor in rendering.anchors:
        if anchor.kind != "c" or rendering.messages[anchor.message]["role"] not in answers:
            continue
        number = bisect_right(found, (anchor.start, len(rendering.text))) - 1
        if number < 0 or anchor.end <= found[number][1] or rendering.text[found[number][1] : anchor.start].strip():
            continue
        end = _first_end(ends, anchor.end, len(rendering.text))
        if end is not None:
            found.insert(number + 1, (anchor.start, end))
    return found


def _is_tight(rendering: Rendering, span: Span, end_of_turn: str) -> bool:
    """Whether a span begins and ends with what its messages say, where they call no tools."""
    anchors = rendering.within(span)
    messages = rendering.messages
    if not anchors:
        body = rendering.text[span[0] : span[1]].removesuffix(end_of_turn)
        return not body.strip() or any(message.get("tool_calls") for message in messages)
    first, last = anchors[0], anchors[-1]
    begins = first.kind != "c" or not rendering.text[span[0] : first.start].strip()
    ends = last.kind != "c" or rendering.text[last.end : span[1]].strip() == end_of_turn
    calls = any(messages[anchor.message].get("tool_calls") for anchor in (first, last))
    return calls or (begins and ends)


def _all_found(rendering: Rendering, spans: list[Span], answers: Mapping[str, Answer]) -> bool:
    """Whether every answer with text is in a span."""
    starts = [start for start, _ in spans]
    for anchor in rendering.anchors:
        if anchor.kind == "c" and rendering.messages[anchor.message]["role"] in answers:
            number = bisect_right(starts, anchor.start) - 1
            if number < 0 or anchor.end > spans[number][1]:
                return False
    return True
