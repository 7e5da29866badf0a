"""Conversations to tokens: one rendering by the chat template, one tokenisation, loss spans, media placeholders."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from mimo_gemma4.data.comparison import Span
from mimo_gemma4.data.messages import Messages
from mimo_gemma4.data.sample import file_count, media_parts, media_types
from mimo_gemma4.data.template import ChatTemplate
from mimo_gemma4.data.thoughts import Thoughts
from mimo_gemma4.errors import DataError
from mimo_gemma4.media import FrameProcessor, MediaHeader, MediaProcessor, MediaTokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

IGNORE = -100
"""Label of a position without loss."""

_ENCODING = "2"
"""Raised when the same messages become other ids or labels."""
_PROBE_SIDES = (1, 47, 48, 224, 640, 1080, 4000)
_PROBE_FRAMES = (1, 2, 10, 100, 1000, 10_000)
_PROBE_SAMPLES = (1, 160, 16_000, 100_001, 480_000, 5_000_000)


@dataclass(frozen=True)
class EncodedConversation:
    """A conversation as the language model sees it."""

    input_ids: np.ndarray
    """[length] int64; every media placeholder is expanded to its begin token, soft tokens and end token."""
    labels: np.ndarray
    """[length] int64: at position t the id at t + 1, or `IGNORE`."""
    media_starts: tuple[int, ...]
    """Position of the first soft token of every media item, in message order."""
    left_out: tuple[str, ...] = ()
    """Names of what the conversation holds and the ids do not (`template.Located.left_out`)."""

    @property
    def length(self) -> int:
        """Number of tokens, soft tokens included."""
        return len(self.input_ids)

    @property
    def loss_tokens(self) -> int:
        """Number of positions with a label."""
        return int((self.labels != IGNORE).sum())


class ConversationEncoder:
    """Turns messages into token ids, labels and places of soft tokens."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerFast,
        processors: Sequence[MediaProcessor] = (),
        media_tokens: Mapping[str, MediaTokens] | None = None,
        thoughts: Thoughts = "learn",
    ) -> None:
        """`processors`: one per module of the layout that encodes media; `media_tokens`: ids by media type.

        `thoughts`: whether thoughts of answers are learned, or left to the template.

        Raises `DataError` if the tokenizer has no chat template or a media type has no ids.
        """
        self.tokenizer = tokenizer
        self.processors = {processor.content_type: processor for processor in processors}
        self.media_tokens = dict(media_tokens or {})
        self.template = ChatTemplate(tokenizer, thoughts)
        self._fingerprints: dict[tuple[str, ...], str] = {}
        missing = sorted(set(self.processors) - set(self.media_tokens))
        if missing:
            raise DataError(f"the model configuration has no begin, soft and end token ids for {missing[0]!r} content")

    def encode(self, messages: Messages, soft_tokens: Sequence[int] = ()) -> EncodedConversation:
        """Ids and labels of a conversation.

        `soft_tokens`: number of soft tokens of every shown media item, in message order. Raises `DataError` if
        placeholders and media do not match, or if the answers cannot be located.
        """
        located = self.template.locate(messages)
        text, spans = self._write_frames(located.text, located.spans, messages)
        ids, offsets = self._tokenise(text)
        learned = _covered(offsets, spans)
        expanded, sources, starts = self._expand(ids, messages, soft_tokens)
        targets = np.where(learned[sources] & ~np.isin(expanded, self._media_ids), expanded, IGNORE)
        labels = np.append(targets[1:], IGNORE)
        return EncodedConversation(expanded, labels, starts, located.left_out)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of generated ids, without special tokens and without white space at its ends."""
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True)).strip()

    @cached_property
    def stop_ids(self) -> frozenset[int]:
        """Ids that end an answer: the template's end-of-turn token and the tokenizer's end-of-sequence token."""
        probe = self.encode([{"role": "user", "content": "0"}, {"role": "assistant", "content": "1"}])
        last = probe.labels[probe.labels != IGNORE][-1]
        return frozenset({int(last), self.tokenizer.eos_token_id} - {None})

    @property
    def pad_id(self) -> int:
        """Token id of padding."""
        pad = self.tokenizer.pad_token_id
        return 0 if pad is None else pad

    @cached_property
    def fingerprint(self) -> str:
        """Hash of all that ids and labels depend on: tokenizer, template, media ids, soft tokens of probe sizes."""
        return self.fingerprint_for(self.processors)

    def fingerprint_for(self, media_types: Iterable[str]) -> str:
        """The same for samples with no other media than these types, whatever else the encoder knows."""
        types = tuple(sorted(set(media_types)))
        if types not in self._fingerprints:
            parts = [self._text_fingerprint, *map(self._media_fingerprint, types)]
            self._fingerprints[types] = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]
        return self._fingerprints[types]

    @cached_property
    def _text_fingerprint(self) -> str:
        vocabulary = self.tokenizer.backend_tokenizer.to_str()
        parts = [_ENCODING, vocabulary, self.template.source, self.template.thoughts]
        parts.append(repr(sorted(self.media_tokens.items())))
        return hashlib.sha256("\0".join(parts).encode()).hexdigest()

    def _media_fingerprint(self, media_type: str) -> str:
        processor = self.processors[media_type]
        images = [MediaHeader(width=width, height=height) for width in _PROBE_SIDES for height in _PROBE_SIDES]
        sounds = [MediaHeader(samples=samples, sample_rate=16_000) for samples in _PROBE_SAMPLES]
        headers = sounds if media_type == "audio" else images
        counts = repr((media_type, [_soft_tokens_or_none(processor, header) for header in headers]))
        if media_type != "video":
            return counts
        return counts + repr([cast(FrameProcessor, processor).sample(count) for count in _PROBE_FRAMES])

    def shown_media(self, messages: Messages) -> list[int]:
        """Numbers, from 0, of the messages' media files that the model sees: not all frames of a video.

        Raises `DataError` for a video if no module of the layout takes videos.
        """
        shown, first = [], 0
        for part in media_parts(messages):
            shown += [first + frame for frame in (self._frames(part) if part["type"] == "video" else [0])]
            first += file_count(part)
        return shown

    def _shown_types(self, messages: Messages) -> list[str]:
        types = media_types(messages)
        return [types[file] for file in self.shown_media(messages)]

    def _frames(self, part: Mapping[str, Any]) -> list[int]:
        if "video" not in self.processors:
            raise DataError(f"no module of layout takes 'video' content, only {', '.join(sorted(self.processors))}")
        return cast(FrameProcessor, self.processors["video"]).sample(part["frames"])

    def _write_frames(self, text: str, spans: list[Span], messages: Messages) -> tuple[str, list[Span]]:
        """Replace each video's placeholder by times and placeholders of its frames; shift the spans accordingly.

        Gemma 4 writes "00:00 <frame> 00:01 <frame> …", in minutes and seconds. This happens before tokenisation, as
        times may merge with the text around them.
        """
        videos = [part for part in media_parts(messages) if part["type"] == "video"]
        if not videos:
            return text, spans
        frames = [self._frames(part) for part in videos]
        placeholder = str(self.tokenizer.convert_ids_to_tokens(self.media_tokens["video"].soft))
        pieces = text.split(placeholder)
        if len(pieces) != len(videos) + 1:
            raise DataError(
                f"its messages name {len(videos)} videos, but the rendered text holds {len(pieces) - 1} {placeholder}"
            )
        written = pieces[0]
        growth: list[tuple[int, int]] = []
        for part, numbers, piece in zip(videos, frames, pieces[1:], strict=True):
            times = [number / part["fps"] for number in numbers]
            video = " ".join(f"{int(time // 60):02d}:{int(time % 60):02d} {placeholder}" for time in times)
            growth.append((len(written), len(video) - len(placeholder)))
            written += video + piece
        for place, characters in growth:  # `place` counts in the new text; the spans are shifted by all earlier videos
            spans = [(start + characters * (start > place), end + characters * (end > place)) for start, end in spans]
        return written, spans

    @cached_property
    def _media_ids(self) -> np.ndarray:
        return np.array([i for t in self.media_tokens.values() for i in (t.begin, t.soft, t.end)], np.int64)

    def _tokenise(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        """Ids [tokens] and character offsets [tokens, 2] of rendered text, which holds all special tokens."""
        encoding = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        ids, offsets = encoding["input_ids"], encoding["offset_mapping"]
        places = np.fromiter(chain.from_iterable(offsets), np.int64, 2 * len(offsets))
        return np.array(ids, np.int64), places.reshape(-1, 2)

    def _expand(
        self, ids: np.ndarray, messages: Messages, soft_tokens: Sequence[int]
    ) -> tuple[np.ndarray, np.ndarray, tuple[int, ...]]:
        """Expanded ids, the place in `ids` of each, and the position of every media item's first soft token."""
        types = self._shown_types(messages)
        absent = sorted(set(types) - set(self.media_tokens))
        if absent:
            raise DataError(f"the model configuration has no token ids for {absent[0]!r} content")
        tokens = [self.media_tokens[media_type] for media_type in types]
        soft_ids = sorted({media.soft for media in self.media_tokens.values()})
        places = np.flatnonzero(np.isin(ids, soft_ids)).tolist()
        if [int(ids[place]) for place in places] != [media.soft for media in tokens]:
            raise DataError(
                f"its messages name {len(types)} media ({', '.join(types) or 'none'}), but the rendered text holds "
                f"{len(places)} placeholder tokens {[int(ids[place]) for place in places]}"
            )
        if len(soft_tokens) != len(types):
            raise DataError(f"its messages name {len(types)} media, but there are {len(soft_tokens)} media files")
        repeats = np.ones(len(ids), np.int64)
        repeats[places] = np.array([count + 2 for count in soft_tokens], np.int64)
        sources = np.repeat(np.arange(len(ids)), repeats)
        expanded = ids[sources]
        first = np.cumsum(repeats) - repeats
        for place, media, count in zip(places, tokens, soft_tokens, strict=True):
            expanded[first[place]] = media.begin
            expanded[first[place] + count + 1] = media.end
        return expanded, sources, tuple(int(first[place]) + 1 for place in places)


def _covered(offsets: np.ndarray, spans: list[Span]) -> np.ndarray:
    """[tokens] bool: whether the token shares a character with a span."""
    starts, ends = offsets[:, 0], offsets[:, 1]
    covered = np.zeros(len(offsets), bool)
    if (starts[1:] >= starts[:-1]).all() and (ends[1:] >= ends[:-1]).all():
        for start, end in spans:
            covered[np.searchsorted(ends, start, "right") : np.searchsorted(starts, end, "left")] = True
        return covered
    for start, end in spans:
        covered |= (starts < end) & (ends > start)
    return covered


def _soft_tokens_or_none(processor: MediaProcessor, header: MediaHeader) -> int | None:
    try:
        return processor.soft_tokens(header)
    except ValueError:
        return None
