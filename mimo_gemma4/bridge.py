"""Moves encoder rows to the language ranks that hold their tokens, and each row's gradient back exactly once.

Every shape follows from the step's manifest on the host: nothing is announced, and a round without rows sends nothing.
A row leaves from one of its encoder lane's tensor parallel ranks (each ships an equal share) and arrives at every rank
that holds its token: one (cp, tp) coordinate under sequence parallelism, all tensor parallel ranks of one CP rank
without it. Copies that are replicated over tensor parallel ranks carry equal gradients, so only one of them returns it.
A row whose source and destination are one rank is a local copy.

Rows and gradients are posted and received by separate calls. In each round a rank posts one batch a direction, which
holds what it sends as well as what it receives.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.distributed as dist

from mimo_gemma4.data.manifest import MediaSlot, StepManifest
from mimo_gemma4.layout import Coordinate, Layout
from mimo_gemma4.messages import Arrival, Mailbox
from mimo_gemma4.partition import CpLayout, cp_token_index
from mimo_gemma4.platform import Platform


@dataclass(frozen=True)
class Parcels:
    """What one rank sends to its peers, or receives from them, in one round."""

    counts: tuple[tuple[int, int], ...]
    """(peer, number of rows), by rank; only peers with rows."""
    index: torch.Tensor
    """Which rows [n], peer after peer, on the host."""

    @classmethod
    def of(cls, peers: torch.Tensor, index: torch.Tensor) -> "Parcels":
        """Parcels of the rows `index` [n] for or from `peers` [n], which are in order."""
        counts = enumerate(peers.bincount().tolist())
        return cls(tuple((peer, count) for peer, count in counts if count), index)

    def slices(self, rows: torch.Tensor) -> list[tuple[int, torch.Tensor]]:
        """(peer, its part of `rows` [n, …])."""
        parts = rows.split([count for _, count in self.counts])
        return [(peer, part) for (peer, _), part in zip(self.counts, parts, strict=True)]


@dataclass(frozen=True)
class Route:
    """What one rank sends and receives in one round of one edge."""

    sends: Parcels
    """Rows of this encoder lane's output, by destination."""
    receives: Parcels
    """Flat positions `local_sequence * B + b` in this rank's [S/(cp*tp), B, H] embeddings, by source."""
    gradient_sends: Parcels
    """Indices into the received rows, by the encoder rank that their gradients go back to."""
    gradient_receives: Parcels
    """Rows of this rank's share of its encoder lane's output, by the language rank that their gradients come from."""
    rows: int
    """Rows of this encoder lane's output; 0 where it has none."""
    share: int
    """How many of them each of the lane's tensor parallel ranks ships; the last ones may have fewer."""

    @property
    def positions(self) -> torch.Tensor:
        """Flat positions of all received rows, in the order in which they arrive."""
        return self.receives.index


class Bridge:
    """One edge of the module graph: an encoder's rows into the embeddings, or final hidden states to a decoder.

    Names are those of an encoder's edge. A decoder's takes the same routes, in the other order: hidden states travel as
    gradients of rows do, from the one holder of a token that answers for it to the decoder's lane; their gradients
    travel as rows do, to every holder.
    """

    def __init__(
        self,
        layout: Layout,
        encoder: str,
        rank: int,
        *,
        forward_group: dist.ProcessGroup,
        backward_group: dist.ProcessGroup,
        encoder_tp_group: dist.ProcessGroup | None,
        hidden_size: int,
        dtype: torch.dtype,
        platform: Platform,
    ):
        """Keep the grids of both ends.

        Args:
            layout: all grids.
            encoder: the encoder's name in the layout, or the decoder's.
            rank: this process's global rank.
            forward_group: group that carries rows, of the ranks of the encoder's last and the language's first stage.
            backward_group: group of the same ranks that carries gradients.
            encoder_tp_group: this rank's tensor parallel group in the encoder's grid, None outside it.
            hidden_size: width H of the language module.
            dtype: type of rows and gradients.
            platform: where they live.
        """
        self.source, self.target = layout.grids[encoder], layout.language
        self.encoder, self.rank = encoder, rank
        self.rows, self.gradients = Mailbox(forward_group), Mailbox(backward_group)
        self.encoder_tp_group = encoder_tp_group
        self.hidden_size, self.dtype = hidden_size, dtype
        self.platform, self.device = platform, platform.device
        source, target, stage = self.source, self.target, layout.language_stage(encoder)
        self._source_ranks = torch.tensor(
            [[source.rank_at(tp=tp, dp=lane, pp=source.pp - 1) for tp in range(source.tp)] for lane in range(source.dp)]
        )
        self._target_ranks = torch.tensor(
            [
                [
                    [target.rank_at(tp=tp, cp=cp, dp=lane, pp=stage) for tp in range(target.tp)]
                    for cp in range(target.cp)
                ]
                for lane in range(target.dp)
            ]
        )
        self._encoder_lane = source.coordinate(rank).dp if rank in source.stage_ranks(source.pp - 1) else None
        self._target_at = target.coordinate(rank) if rank in target.stage_ranks(stage) else None

    # --- planning (host) ---

    def route(self, manifest: StepManifest, round_: int) -> Route:
        """This rank's part of round `round_`, from the manifest alone."""
        encoded: tuple[MediaSlot, ...] = ()
        awaited: tuple[MediaSlot, ...] = ()
        if self._encoder_lane is not None:
            encoded = manifest.encoded(self.encoder, round_, self._encoder_lane)
        if self._target_at is not None:
            awaited = manifest.awaited(self.encoder, round_, self._target_at.dp)
        target, row, _, returned = self._copies(manifest, encoded, None)
        source, _, position, owned = self._copies(manifest, awaited, self._target_at)
        rows = _total(encoded)
        share = -(-rows // self.source.tp)
        first_row = 0 if self.encoder_tp_group is None else self.encoder_tp_group.rank() * share
        return Route(
            sends=Parcels.of(target, row),
            receives=Parcels.of(source, position),
            gradient_sends=Parcels.of(source[owned], owned.nonzero().flatten()),
            gradient_receives=Parcels.of(target[returned], row[returned] - first_row),
            rows=rows,
            share=share,
        )

    def _copies(
        self, manifest: StepManifest, slots: Sequence[MediaSlot], target_at: Coordinate | None
    ) -> tuple[torch.Tensor, ...]:
        """The copies of one round's `slots` that come to `target_at`, this rank's coordinate; None: that leave from it.

        Returns:
            Four host tensors [n], by peer and then in the order of the slots: the rank at the other end, the row of the
            encoder lane's output, the flat position on the target, and whether this copy's gradient goes back.
        """
        if not slots:
            return *(torch.empty(0, dtype=torch.long),) * 3, torch.empty(0, dtype=torch.bool)
        target, items, cps, places = self.target, [], [], []
        scattered = target.tp if target.sequence_parallel else 1
        for slot in slots:
            microbatch = manifest.microbatch(slot.lane, slot.microbatch)
            cp_of, local_of = _owners(microbatch.seq_length, target.cp, microbatch.segment_starts, microbatch.cp_layout)
            cps.append(cp_of[slot.start : slot.start + slot.rows])
            places.append(local_of[slot.start : slot.start + slot.rows])
            of_lane = _total(manifest.encoded(self.encoder, slot.microbatch, slot.encoder_lane))
            of_rank = microbatch.seq_length // target.cp // scattered
            items.append((slot.encoder_lane, of_lane, slot.lane, microbatch.rows, slot.row, of_rank))
        counts = torch.tensor([slot.rows for slot in slots])
        offsets = torch.tensor([slot.encoder_offset for slot in slots])
        row = torch.arange(int(counts.sum())) + (offsets - counts.cumsum(0) + counts).repeat_interleave(counts)
        columns = torch.tensor(items).repeat_interleave(counts, dim=0)
        cp, local = torch.cat(cps), torch.cat(places)
        source = self._source_ranks[columns[:, 0], row // -(-columns[:, 1] // self.source.tp)]
        here = source == self.rank if target_at is None else cp == target_at.cp
        if target_at is not None and scattered > 1:
            here &= local // columns[:, 5] == target_at.tp
        row, cp, local, source, columns = (part[here] for part in (row, cp, local, source, columns))
        _, total, lane, width, place, length = columns.unbind(1)
        if scattered > 1:
            tp, owned = local // length, torch.ones_like(row, dtype=torch.bool)
        else:  # every tensor parallel rank has a copy, and returns an equal part of the gradients
            tp = torch.arange(target.tp)[:, None] if target_at is None else torch.tensor([[target_at.tp]])
            owned = row * target.tp // total == tp
        peer = self._target_ranks[lane, cp, tp] if target_at is None else source
        parts = torch.broadcast_tensors(peer, row, local % length * width + place, owned)
        order = parts[0].flatten().argsort(stable=True)
        return tuple(part.flatten()[order] for part in parts)

    # --- moving (device) ---

    def post_rows(self, route: Route, rows: torch.Tensor | None) -> Arrival:
        """Start sending this rank's share of `rows` and receiving what falls on its tokens.

        Args:
            route: this rank's route.
            rows: output [rows, H] of this rank's encoder lane; None where it has none.

        Returns:
            On its way, the one tensor [n, H] of received rows in the order of `route.positions`; none where n is 0.
        """
        return self._post(self.rows, route.sends, rows, route.receives)

    def post_gradients(self, route: Route, gradients: torch.Tensor | None) -> Arrival:
        """Start returning the gradients of received rows and collecting those of this rank's own output.

        Args:
            route: the route that the rows took.
            gradients: gradients [n, H] of the received rows; None where there were none.

        Returns:
            On its way, what `output_gradient` takes.
        """
        return self._post(self.gradients, route.gradient_sends, gradients, route.gradient_receives)

    def output_gradient(self, route: Route, arrival: Arrival) -> torch.Tensor:
        """Wait for the returned gradients and put them in order.

        Returns:
            Gradient [rows, H] of the encoder lane's output, equal on its tensor parallel ranks.
        """
        share = torch.empty(route.share, self.hidden_size, dtype=self.dtype, device=self.device)
        for gradients in arrival.wait():
            share.index_copy_(0, self.platform.put(route.gradient_receives.index), gradients)
        group = self.encoder_tp_group
        if group is None or group.size() == 1:
            return share
        whole = share.new_empty(route.share * group.size(), self.hidden_size)
        dist.all_gather_into_tensor(whole, share, group=group)  # each rank got back the share that it had shipped
        return whole[: route.rows]

    def drain(self) -> None:
        """Let go of everything that this rank has sent, when it has left."""
        self.rows.drain()
        self.gradients.drain()

    def _post(self, mailbox: Mailbox, leaving: Parcels, rows: torch.Tensor | None, arriving: Parcels) -> Arrival:
        """One batch of sends and receives; what goes from this rank to itself is copied at once."""
        sends, receives, buffers = [], {}, []
        if arriving.counts:
            buffers.append(torch.empty(len(arriving.index), self.hidden_size, dtype=self.dtype, device=self.device))
            receives = dict(arriving.slices(buffers[0]))
        if leaving.counts:
            assert rows is not None, "a route sends rows that this rank did not compute"
            assert rows.dtype == self.dtype, f"{self.encoder} rows are {rows.dtype}, the bridge {self.dtype}"
            for peer, index in leaving.slices(self.platform.put(leaving.index)):
                if peer == self.rank:
                    torch.index_select(rows.detach(), 0, index, out=receives.pop(peer))
                else:
                    sends.append((peer, rows.detach().index_select(0, index)))
        return Arrival(buffers, mailbox.post(sends, list(receives.items())).works)


def _total(slots: Sequence[MediaSlot]) -> int:
    """Rows of all items of an encoder lane in one round."""
    return slots[-1].encoder_offset + slots[-1].rows if slots else 0


@lru_cache(maxsize=64)
def _owners(
    seq_len: int, cp_size: int, starts: tuple[int, ...] | None, layout: CpLayout
) -> tuple[torch.Tensor, torch.Tensor]:
    """For each global position, the CP rank that holds it and its place in that rank's local order: two [S]."""
    cp_of, local_of = torch.empty(seq_len, dtype=torch.long), torch.empty(seq_len, dtype=torch.long)
    for cp_rank in range(cp_size):
        index = cp_token_index(seq_len, cp_size, cp_rank, starts, layout)
        cp_of[index] = cp_rank
        local_of[index] = torch.arange(len(index))
    return cp_of, local_of
