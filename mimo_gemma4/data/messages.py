"""A conversation as data hold it: which keys are understood, which messages are learned, what a template is handed."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

Messages = list[dict[str, Any]]

LOSS_KEYS = ("loss", "train", "weight", "loss_mask", "trainable")
"""Keys by which a message says whether it is learned; false or 0 in any of them: it is not."""
MESSAGE_KEYS = frozenset({
    "role", "content", "name", "tool_calls", "tool_call_id", "tool_responses", "reasoning_content", "reasoning",
    *LOSS_KEYS,
})  # fmt: skip
"""Keys of a message that are used."""
DOCUMENT_KEYS = frozenset({"messages", "tools", "id", "source"})
"""Keys of a sample's JSON that are used; `id` and `source` name the row that the sample comes from."""
PART_KEYS = frozenset({"type", "text", "frames", "fps"})
"""Keys of a part of a message's content that are used."""


class Conversation(list[dict[str, Any]]):
    """The messages of one sample, with what its JSON says besides."""

    def __init__(
        self, messages: Iterable[dict[str, Any]], tools: list[Any] | None = None, unknown: Iterable[str] = ()
    ) -> None:
        """`tools`: descriptions of functions, for the template; `unknown`: names of keys that nothing here uses."""
        super().__init__(messages)
        self.tools = tools
        self.unknown = tuple(unknown)


def tools_of(messages: Messages) -> list[Any] | None:
    """The tools of a `Conversation`; None for a bare list of messages."""
    return messages.tools if isinstance(messages, Conversation) else None


def is_learned(message: dict[str, Any]) -> bool:
    """Whether an answer has a loss, by its `LOSS_KEYS`."""
    return all(message.get(key) is None or bool(message[key]) for key in LOSS_KEYS)


def unknown_keys(document: dict[str, Any]) -> list[str]:
    """Names of keys that nothing uses: `key` of the document, `messages.key`, `content.key`. Each once, sorted."""
    names = set(document) - DOCUMENT_KEYS
    for message in document["messages"]:
        names.update(f"messages.{key}" for key in message.keys() - MESSAGE_KEYS)
        if isinstance(message.get("content"), list):
            names.update(f"content.{key}" for part in message["content"] for key in part.keys() - PART_KEYS)
    return sorted(names)


def handed_over(messages: Messages, *, as_parts: bool = False) -> Messages:
    """Copies of the messages as a chat template gets them.

    Content of text alone is a string, as most templates expect it; `as_parts`: for a template that reads lists of parts
    alone. Absent content is an empty string, a call's arguments are a mapping, and marks of the loss are left out.
    """
    return [_handed_over(message, as_parts) for message in messages]


def _handed_over(message: dict[str, Any], as_parts: bool) -> dict[str, Any]:
    copy = {key: value for key, value in message.items() if key not in LOSS_KEYS}
    content = copy.get("content")
    if content is None:
        content = ""
    elif isinstance(content, list) and all(part["type"] == "text" for part in content):
        content = "".join(part["text"] for part in content)
    if as_parts and isinstance(content, str):
        content = [{"type": "text", "text": content}] if content else []
    copy["content"] = content
    if copy.get("tool_calls"):
        copy["tool_calls"] = [_with_mapping(call) for call in copy["tool_calls"]]
    return copy


def _with_mapping(call: dict[str, Any]) -> dict[str, Any]:
    """A call whose arguments are a mapping, where they are the JSON text of one, as OpenAI writes them."""
    function = call.get("function")
    if not isinstance(function, dict) or not isinstance(function.get("arguments"), str):
        return call
    try:
        arguments = json.loads(function["arguments"])
    except (ValueError, RecursionError):
        return call
    return {**call, "function": {**function, "arguments": arguments}} if isinstance(arguments, dict) else call
