"""What the data pipeline and the encoders agree on about one media item, so that neither imports the other."""

from dataclasses import dataclass
from typing import Any, Protocol

import torch


@dataclass(frozen=True)
class MediaHeader:
    """What is known of a media file without decoding it.

    `width`/`height` are pixels (images); `samples`/`sample_rate` are audio samples and Hz (audio). Unused fields are 0.
    """

    width: int = 0
    height: int = 0
    samples: int = 0
    sample_rate: int = 0


@dataclass(frozen=True)
class MediaTokens:
    """The token ids that stand for one media item: `begin`, then one `soft` per encoder row, then `end`."""

    begin: int
    soft: int
    end: int


class ItemProcessor(Protocol):
    """From a media file's header and bytes to what a module works on: an encoder's inputs, or a decoder's targets."""

    def cost(self, header: MediaHeader) -> float:
        """Relative cost of the module's work on the item, used to balance its lanes."""
        ...

    def decode(self, data: bytes) -> dict[str, torch.Tensor]:
        """Decode one file into the item's tensors (host). Raises `ValueError` or `OSError` for a corrupt file."""
        ...

    def placeholder(self, header: MediaHeader) -> dict[str, torch.Tensor]:
        """Tensors of the shapes that `decode` must give for this header; a file that decodes to others is corrupt."""
        ...

    def collate(self, items: list[dict[str, torch.Tensor]]) -> dict[str, Any]:
        """Join one or more items into keyword arguments of the module's `forward`: tensors and host ints or lists."""
        ...


class MediaProcessor(ItemProcessor, Protocol):
    """The host side of an encoder: it also says how many soft tokens an item becomes."""

    modality: str
    """Name of the module in `layout` that encodes these items, for example `vision`."""

    content_type: str
    """The `type` of the chat content parts it serves, for example `image`."""

    def soft_tokens(self, header: MediaHeader) -> int:
        """Number of soft tokens (encoder output rows) of an item, from its header alone."""
        ...


class FrameProcessor(MediaProcessor, Protocol):
    """The host side of an encoder that also takes videos: its items are single frames, `content_type` is `video`."""

    def sample(self, frames: int) -> list[int]:
        """Which of a video's frames, counted from 0, the model sees."""
        ...
