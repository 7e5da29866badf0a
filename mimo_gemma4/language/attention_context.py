"""Who may attend to whom: positions, segments and media groups of one microbatch, and the mask they imply."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class AttentionContext:
    """Metadata of one microbatch. A token attends inside its own segment only."""

    positions: torch.Tensor
    """[B, S/cp] (local): position of each token in its segment."""
    segments: torch.Tensor
    """[B, S/cp] (local): number of the token's segment in its row; 0 is padding."""
    key_positions: torch.Tensor
    """[B, S]: positions of all tokens, in the order in which context parallel ranks' keys are concatenated."""
    key_segments: torch.Tensor
    """[B, S]: segments of all tokens, in that order."""
    groups: torch.Tensor | None = None
    """[B, S/cp] (local): number of the media item the token belongs to, 0 for text; None: attention is causal."""
    key_groups: torch.Tensor | None = None
    """[B, S]: media groups of all tokens, in the order of the keys."""

    def mask(self, window: int | None, *, groups: str | None = None) -> torch.Tensor:
        """What each local query may attend to, bool [B, 1, S/cp (local), S].

        `window` is the number of keys a query sees, itself included (None: all). `groups` says what tokens of one media
        item may see besides: None nothing, `inside_window` later tokens of the item, `always` the whole item. Every
        query sees itself, padding too, so no row of the mask is empty.
        """
        query, key = self.positions[:, None, :, None], self.key_positions[:, None, None, :]
        allowed = query >= key
        near = None if window is None else key > query - window
        same_group = None
        if groups is not None and self.groups is not None and self.key_groups is not None:
            query_group, key_group = self.groups[:, None, :, None], self.key_groups[:, None, None, :]
            same_group = (query_group == key_group) & (query_group > 0)
        if same_group is not None and groups == "inside_window":
            allowed = allowed | same_group
        if near is not None:
            allowed = allowed & near
        if same_group is not None and groups == "always":
            allowed = allowed | same_group
        return allowed & (self.segments[:, None, :, None] == self.key_segments[:, None, None, :])
