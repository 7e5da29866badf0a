"""Moves encoder rows to the language ranks that hold their tokens, and each row's gradient back exactly once.

Every shape follows from the step's manifest on the host: nothing is announced, and a round without rows sends nothing.
A row leaves from one of its encoder lane's tensor parallel ranks (each ships an equal share) and arrives at every rank
that holds its token: one (cp, tp) coordinate under sequence parallelism, all tensor parallel ranks of one CP rank
without it. Copies that are replicated over tensor parallel ranks carry equal gradients, so only one of them returns it.
A row whose source and destination are one rank is a local copy.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.distributed as dist

from mimo_gemma4.data.manifest import MediaSlot, StepManifest
from mimo_gemma4.layout import Layout
from mimo_gemma4.partition import CpLayout, cp_token_index
from mimo_gemma4.platform import Platform


@dataclass(frozen=True)
class Route:
    """What one rank sends and receives in one round of one edge; host indices, lists in a fixed order of peers."""

    sends: tuple[tuple[int, torch.Tensor], ...]
    """(destination rank, rows of this encoder lane's output)."""
    receives: tuple[tuple[int, torch.Tensor], ...]
    """(source rank, flat positions `local_sequence * B + b` in this rank's [S/(cp*tp), B, H] embeddings)."""
    gradient_sends: tuple[tuple[int, torch.Tensor], ...]
    """(encoder rank, indices into the received rows whose gradients go back to it)."""
    gradient_receives: tuple[tuple[int, torch.Tensor], ...]
    """(language rank, rows of this encoder lane's output whose gradients come from it)."""

    @property
    def positions(self) -> torch.Tensor:
        """Flat positions of all received rows, in the order in which `Bridge.forward` returns them."""
        parts = [index for _, index in self.receives]
        return torch.cat(parts) if parts else torch.empty(0, dtype=torch.long)


class Bridge:
    """One edge of the module graph: an encoder's rows into the language module's embeddings."""

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
            encoder: the encoder's name in the layout.
            rank: this process's global rank.
            forward_group: group of both grids' ranks that carries rows.
            backward_group: group of the same ranks that carries gradients.
            encoder_tp_group: this rank's tensor parallel group in the encoder's grid, None outside it.
            hidden_size: width H of the language module.
            dtype: type of rows and gradients.
            platform: where they live.
        """
        self.source, self.target = layout.grids[encoder], layout.language
        self.encoder, self.rank = encoder, rank
        self.forward_group, self.backward_group = forward_group, backward_group
        self.encoder_tp_group = encoder_tp_group
        self.hidden_size, self.dtype = hidden_size, dtype
        self.platform, self.device = platform, platform.device
        self._pending: list[tuple[list[dist.Work], list[torch.Tensor]]] = []

    # --- planning (host) ---

    def route(self, manifest: StepManifest, round_: int) -> Route:
        """This rank's part of round `round_`, from the manifest alone."""
        sends, receives, gradient_sends, gradient_receives = {}, {}, {}, {}
        owned = {}
        for source_rank, target_rank, rows, positions, owner in self._transfers(manifest, round_):
            if source_rank == self.rank:
                sends[target_rank] = rows
                gradient_receives[target_rank] = rows[owner]
            if target_rank == self.rank:
                receives[source_rank] = positions
                owned[source_rank] = owner
        start = 0
        for source_rank in sorted(receives):
            gradient_sends[source_rank] = start + owned[source_rank].nonzero().flatten()
            start += len(receives[source_rank])
        return Route(*(_in_peer_order(part) for part in (sends, receives, gradient_sends, gradient_receives)))

    def _transfers(
        self, manifest: StepManifest, round_: int
    ) -> Iterator[tuple[int, int, torch.Tensor, torch.Tensor, torch.Tensor]]:
        """Yield (source rank, target rank, source rows, target positions, owner mask), once for each pair of ranks."""
        for lane in range(self.source.dp):
            slots = manifest.encoded(self.encoder, round_, lane)
            if not slots:
                continue
            table = self._rows_of(manifest, slots)
            pairs = table[:, 0] * self.target_size + table[:, 1]
            for pair in pairs.unique().tolist():
                part = table[pairs == pair]
                source_tp, target = divmod(pair, self.target_size)
                source_rank = self.source.rank_at(tp=source_tp, dp=lane, pp=self.source.pp - 1)
                yield source_rank, target, part[:, 2], part[:, 3], part[:, 4].bool()

    @property
    def target_size(self) -> int:
        """One more than the largest global rank of the language grid."""
        return max(self.target.ranks) + 1

    def _rows_of(self, manifest: StepManifest, slots: tuple[MediaSlot, ...]) -> torch.Tensor:
        """A line per (row, target): source tp, target rank, row, flat position, whether it returns the gradient."""
        total = sum(slot.rows for slot in slots)
        sequence_parallel = self.target.sequence_parallel and self.target.tp > 1
        lines = []
        for slot in slots:
            microbatch = manifest.microbatch(slot.lane, slot.microbatch)
            cp_of, local_of = _owners(
                microbatch.seq_length, self.target.cp, microbatch.segment_starts, microbatch.cp_layout
            )
            span = slice(slot.start, slot.start + slot.rows)
            rows = torch.arange(slot.encoder_offset, slot.encoder_offset + slot.rows)
            source_tp = rows * self.source.tp // total
            share = rows * self.target.tp // total
            cp, local = cp_of[span], local_of[span]
            local_length = microbatch.seq_length // self.target.cp // (self.target.tp if sequence_parallel else 1)
            targets = (
                [local // local_length]
                if sequence_parallel
                else [torch.full_like(rows, t) for t in range(self.target.tp)]
            )
            for tp in targets:
                rank = self._target_ranks(slot.lane)[cp, tp]
                position = (local % local_length) * microbatch.rows + slot.row
                owner = torch.ones_like(rows) if sequence_parallel else (tp == share).long()
                lines.append(torch.stack([source_tp, rank, rows, position, owner], dim=1))
        return torch.cat(lines)

    @lru_cache(maxsize=1024)  # noqa: B019 - a bridge lives as long as the run
    def _target_ranks(self, lane: int) -> torch.Tensor:
        """Global ranks of a language lane's first stage: [cp, tp]."""
        target = self.target
        return torch.tensor(
            [[target.rank_at(tp=tp, cp=cp, dp=lane) for tp in range(target.tp)] for cp in range(target.cp)]
        )

    # --- moving (device) ---

    def forward(self, route: Route, rows: torch.Tensor | None) -> torch.Tensor | None:
        """Send this rank's share of `rows` and receive its own.

        Args:
            route: this rank's route.
            rows: output [rows, H] of this rank's encoder lane; None where it has none.

        Returns:
            The received rows [n, H] in the order of `route.positions`; None where none arrive.
        """
        arrived = self._exchange(route.sends, rows, _lengths(route.receives), self.forward_group)
        return torch.cat(arrived) if arrived else None

    def backward(self, route: Route, gradients: torch.Tensor | None, rows: int) -> torch.Tensor | None:
        """Return the gradients of received rows, and collect those of this rank's own output.

        Args:
            route: the round's route.
            gradients: gradients [n, H] of the rows that `forward` returned; None where there were none.
            rows: number of rows of this rank's encoder output in the round, 0 where it has none.

        Returns:
            Gradient [rows, H] of the encoder lane's output, equal on its tensor parallel ranks; None where rows is 0.
        """
        arrived = self._exchange(
            route.gradient_sends, gradients, _lengths(route.gradient_receives), self.backward_group
        )
        if rows == 0:
            return None
        gradient = torch.zeros(rows, self.hidden_size, dtype=self.dtype, device=self.device)
        for (_, index), part in zip(route.gradient_receives, arrived, strict=True):
            gradient.index_copy_(0, self.platform.put(index), part)
        if self.encoder_tp_group is not None and self.encoder_tp_group.size() > 1:
            dist.all_reduce(gradient, group=self.encoder_tp_group)  # each TP rank collected the share it had sent
        return gradient

    def drain(self) -> None:
        """Wait for all sends of the step and release their buffers."""
        for works, _ in self._pending:
            for work in works:
                work.wait()
        self._pending.clear()

    def _exchange(
        self,
        sends: tuple[tuple[int, torch.Tensor], ...],
        rows: torch.Tensor | None,
        receives: list[tuple[int, int]],
        group: dist.ProcessGroup,
    ) -> list[torch.Tensor]:
        """One batch of sends and receives; sends stay pending until `drain`, receives are complete on return."""
        operations, buffers, incoming, local = [], [], [], {}
        assert rows is None or rows.dtype == self.dtype, (
            f"{self.encoder} rows are {rows.dtype}, the bridge {self.dtype}"
        )
        for peer, index in sends:
            assert rows is not None, "a route sends rows that this rank did not compute"
            payload = rows.detach().index_select(0, self.platform.put(index))
            if peer == self.rank:
                local[peer] = payload
            else:
                buffers.append(payload)
                operations.append(dist.P2POp(dist.isend, payload, peer, group))
        for peer, count in receives:
            if peer == self.rank:
                incoming.append(local[peer])
            else:
                buffer = torch.empty(count, self.hidden_size, dtype=self.dtype, device=self.device)
                incoming.append(buffer)
                operations.append(dist.P2POp(dist.irecv, buffer, peer, group))
        works = dist.batch_isend_irecv(operations) if operations else []
        if len(works) == len(operations):  # gloo: a handle for each operation, sends first
            works, receiving = works[: len(buffers)], works[len(buffers) :]
        else:  # NCCL: one handle for the batch; waiting for it orders the streams and does not block the host
            receiving = works if len(operations) > len(buffers) else []
        for work in receiving:
            work.wait()
        self._pending.append((works, buffers))
        return incoming


def _lengths(parts: tuple[tuple[int, torch.Tensor], ...]) -> list[tuple[int, int]]:
    return [(peer, len(index)) for peer, index in parts]


def _in_peer_order(parts: dict[int, torch.Tensor]) -> tuple[tuple[int, torch.Tensor], ...]:
    """The non-empty parts, by rank."""
    return tuple((peer, parts[peer]) for peer in sorted(parts) if len(parts[peer]))


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
