"""Moves rows between a module and the language ranks that hold their tokens: each row once each way.

Every shape follows from the step's manifest on the host: nothing is announced, and a round without rows sends nothing.
An edge has an end at the module, where the rows are those of a data parallel lane, and one at the language model, where
they are those of a context parallel rank's tokens. At both ends the tensor parallel ranks need all rows and answer for
equal shares of them: the one that answers for a row at one end exchanges it with the one that does at the other, and an
all-gather completes what arrives. Under sequence parallelism a language rank needs the rows of its own tokens alone and
answers for all of them. A row both of whose ends are one rank is a local copy.

Each direction is posted and received by separate calls. In each round a rank posts one batch a direction, which holds
what it sends as well as what it receives.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.distributed as dist

from mimo_gemma4.data.manifest import MediaSlot, StepManifest
from mimo_gemma4.distributed.layout import Coordinate, Layout
from mimo_gemma4.distributed.p2p import Arrival, Mailbox
from mimo_gemma4.distributed.platform import Platform
from mimo_gemma4.partition import CpLayout, cp_token_index


@dataclass(frozen=True)
class Parcel:
    """Rows that a rank exchanges with one at the other end: it sends them one way and receives them the other way."""

    peer: int
    rows: slice | torch.Tensor
    """Which rows of its end: a range, or an ascending index [n] on the host where others lie between them."""

    @classmethod
    def of(cls, peer: int, index: torch.Tensor) -> "Parcel":
        """A parcel of the rows `index` [n], ascending and at least one."""
        first, last = int(index[0]), int(index[-1])
        return cls(peer, slice(first, last + 1) if last - first + 1 == len(index) else index)

    @property
    def count(self) -> int:
        """Number of rows."""
        return self.rows.stop - self.rows.start if isinstance(self.rows, slice) else len(self.rows)


@dataclass(frozen=True)
class Share:
    """The rows that one rank answers for in one round, at one end of an edge."""

    rows: int = 0
    """Rows that the rank needs: it has all of them before they leave and when they have arrived."""
    size: int = 0
    """How many of them each of its tensor parallel ranks answers for, in their order; the last may have fewer."""
    parcels: tuple[Parcel, ...] = ()
    """What this rank answers for, by peer."""

    @classmethod
    def of(cls, rows: int, size: int, peers: torch.Tensor, index: torch.Tensor) -> "Share":
        """The share of the rows `index` [n], which are exchanged with `peers` [n] and ascend for each of them."""
        order = peers.argsort(stable=True)
        ranks, counts = peers[order].unique_consecutive(return_counts=True)
        parts = index[order].split(counts.tolist())
        return cls(rows, size, tuple(map(Parcel.of, ranks.tolist(), parts)))


@dataclass(frozen=True)
class Route:
    """What one rank exchanges in one round of one edge."""

    module: Share
    """Of its module's lane's rows; empty where it has none."""
    language: Share
    """Of the rows that fall on its tokens; empty where none do."""
    positions: torch.Tensor
    """Flat positions `local_sequence * B + b` of those rows [n] in its [S/(cp*tp) (local), B, H] activations, where tp
    counts under sequence parallelism only."""


class Bridge:
    """One edge of the module graph: an encoder's rows into the embeddings, or final hidden states to a decoder.

    What an encoder's edge carries to the language model are rows, and to the module their gradients; on a decoder's,
    states travel to the module, and their gradients to the language model.
    """

    def __init__(
        self,
        layout: Layout,
        name: str,
        rank: int,
        *,
        forward_group: dist.ProcessGroup,
        backward_group: dist.ProcessGroup,
        module_tp_group: dist.ProcessGroup | None,
        language_tp_group: dist.ProcessGroup | None,
        hidden_size: int,
        dtype: torch.dtype,
        platform: Platform,
    ):
        """Keep the grids of both ends.

        Args:
            layout: all grids.
            name: the encoder or decoder.
            rank: this process's global rank.
            forward_group: group of the ranks of both ends that carries what travels to the language model.
            backward_group: group of the same ranks that carries what travels to the module.
            module_tp_group: this rank's tensor parallel group in the module's grid, None outside it.
            language_tp_group: this rank's tensor parallel group in the language model's grid, None outside it.
            hidden_size: width H of the language model.
            dtype: type of rows and gradients.
            platform: where they live.
        """
        self.name, self.rank = name, rank
        self.module, self.language = layout.grids[name], layout.language
        self.to_language, self.to_module = Mailbox(forward_group), Mailbox(backward_group)
        self.module_tp_group = module_tp_group
        # Under sequence parallelism every language rank receives all that it needs.
        self.language_tp_group = None if self.language.sequence_parallel else language_tp_group
        self.hidden_size, self.dtype = hidden_size, dtype
        self.platform, self.device = platform, platform.device
        module_ranks, language_ranks = layout.edge(name)
        self._module_ranks = torch.tensor(module_ranks).view(self.module.dp, self.module.tp)
        self._language_ranks = torch.tensor(language_ranks).view(self.language.dp, self.language.cp, self.language.tp)
        self._module_at = self.module.coordinate(rank) if rank in module_ranks else None
        self._language_at = self.language.coordinate(rank) if rank in language_ranks else None

    # --- planning (host) ---

    def route(self, manifest: StepManifest, round_: int) -> Route:
        """This rank's part of round `round_`, from the manifest alone."""
        module, language, positions = Share(), Share(), torch.empty(0, dtype=torch.long)
        if self._module_at is not None and manifest.encoded(self.name, round_, self._module_at.dp):
            module = self._module_share(manifest, round_, self._module_at)
        if self._language_at is not None and manifest.awaited(self.name, round_, self._language_at.dp):
            language, positions = self._language_share(manifest, round_, self._language_at)
        return Route(module, language, positions)

    def _module_share(self, manifest: StepManifest, round_: int, at: Coordinate) -> Share:
        """This rank's share of its module lane's rows."""
        slots = manifest.encoded(self.name, round_, at.dp)
        lanes = [self._rows(manifest, round_, lane, at.dp) for lane in sorted({slot.lane for slot in slots})]
        module_rank, row, language_rank, _, _ = map(torch.cat, zip(*lanes, strict=True))
        mine = module_rank == self.rank
        return Share.of(_total(slots), _share_size(_total(slots), self.module.tp), language_rank[mine], row[mine])

    def _language_share(self, manifest: StepManifest, round_: int, at: Coordinate) -> tuple[Share, torch.Tensor]:
        """This rank's share of the rows that fall on its tokens, and the flat positions [n] of all of them."""
        module_rank, _, language_rank, cp, position = self._rows(manifest, round_, at.dp)
        sequence_parallel = self.language.sequence_parallel
        needed = language_rank == self.rank if sequence_parallel else cp == at.cp
        module_rank, language_rank = module_rank[needed], language_rank[needed]
        mine, rows = language_rank == self.rank, len(language_rank)
        size = rows if sequence_parallel else _share_size(rows, self.language.tp)
        return Share.of(rows, size, module_rank[mine], mine.nonzero().flatten()), position[needed]

    def _rows(
        self, manifest: StepManifest, round_: int, lane: int, module_lane: int | None = None
    ) -> tuple[torch.Tensor, ...]:
        """Rows of a language lane in a round, item after item: of one lane of the module, or of all.

        Returns:
            Five host tensors [n]: the module's rank that answers for the row, the row's number in that rank's lane, the
            language rank that answers for it, its context parallel rank, and its flat position on that.
        """
        slots = manifest.awaited(self.name, round_, lane)
        microbatch, language = manifest.microbatch(lane, round_), self.language
        columns = [(slot.rows, slot.encoder_lane, slot.encoder_offset, slot.start, slot.row) for slot in slots]
        counts, source, offset, start, sequence = torch.tensor(columns).unbind(1)
        source_rows = torch.tensor([_total(manifest.encoded(self.name, round_, slot.encoder_lane)) for slot in slots])
        chosen = torch.arange(len(slots)) if module_lane is None else (source == module_lane).nonzero().flatten()
        item = chosen.repeat_interleave(counts[chosen])
        first = counts[chosen].cumsum(0) - counts[chosen]
        inside = torch.arange(len(item)) - first.repeat_interleave(counts[chosen])
        row, token = offset[item] + inside, start[item] + inside
        places = _places(microbatch.seq_length, language.cp, microbatch.segment_starts, microbatch.cp_layout)
        cp, local = places.cp[token], places.local[token]
        if language.sequence_parallel:
            length = microbatch.seq_length // (language.cp * language.tp)
            tp, local = local // length, local % length
        else:  # equal runs of all that falls on a context parallel rank's tokens, which may be parts of items
            of_item = places.before[start + counts] - places.before[start]
            size = _share_size(of_item.sum(0), language.tp)
            earlier = of_item.cumsum(0) - of_item - places.before[start]
            tp = (earlier[item, cp] + places.before[token, cp]) // size[cp]
        module_rank = self._module_ranks[source[item], row // _share_size(source_rows, self.module.tp)[item]]
        return module_rank, row, self._language_ranks[lane, cp, tp], cp, local * microbatch.rows + sequence[item]

    # --- moving (device) ---

    def post_to_language(self, route: Route, rows: torch.Tensor | None) -> Arrival:
        """Start sending this rank's share of its module lane's rows, and receiving its share of those of its tokens.

        Args:
            route: this rank's route.
            rows: output [rows, H] of an encoder, or gradient of a decoder's states; None where the lane has none.

        Returns:
            On its way, what `receive_in_language` takes.
        """
        return self._post(self.to_language, route.module, rows, route.language, self.language_tp_group)

    def receive_in_language(self, route: Route, arrival: Arrival) -> torch.Tensor:
        """Wait for what falls on this rank's tokens; collective over the tensor parallel ranks where it has rows.

        Returns:
            Rows [n, H] in the order of `route.positions`.
        """
        return self._receive(route.language, arrival, self.language_tp_group)

    def post_to_module(self, route: Route, rows: torch.Tensor | None) -> Arrival:
        """Start sending this rank's share of the rows of its tokens, and receiving its share of its module lane's.

        Args:
            route: this rank's route.
            rows: gradients [n, H] of an encoder's rows, or states for a decoder, in the order of `route.positions`;
                None where there are none.

        Returns:
            On its way, what `receive_in_module` takes.
        """
        return self._post(self.to_module, route.language, rows, route.module, self.module_tp_group)

    def receive_in_module(self, route: Route, arrival: Arrival) -> torch.Tensor:
        """Wait for the rows of this rank's module lane; collective over its tensor parallel ranks where it has rows.

        Returns:
            Rows [rows, H] in the order of the lane's items.
        """
        return self._receive(route.module, arrival, self.module_tp_group)

    def drain(self) -> None:
        """Let go of everything that this rank has sent, when it has left."""
        self.to_language.drain()
        self.to_module.drain()

    def _post(
        self,
        mailbox: Mailbox,
        leaving: Share,
        rows: torch.Tensor | None,
        arriving: Share,
        group: dist.ProcessGroup | None,
    ) -> Arrival:
        """One batch of sends and receives; what goes from this rank to itself is copied at once.

        Returns:
            Room for all rows that `group` completes, and what each parcel fills: a part of it, or a buffer for rows
            that do not lie together there.
        """
        whole = self._empty(arriving.size * (1 if group is None else group.size()))
        parts = {p.peer: whole[p.rows] if isinstance(p.rows, slice) else self._empty(p.count) for p in arriving.parcels}
        buffers, sends = [whole, *parts.values()], []
        for parcel in leaving.parcels:
            assert rows is not None, "a route sends rows that this rank does not have"
            assert rows.dtype == self.dtype, f"rows of {self.name} are {rows.dtype}, the bridge {self.dtype}"
            taken = self._taken(rows.detach(), parcel)
            if parcel.peer == self.rank:
                parts.pop(parcel.peer).copy_(taken)
            else:
                sends.append((parcel.peer, taken))
        return Arrival(buffers, mailbox.post(sends, list(parts.items())).works)

    def _receive(self, share: Share, arrival: Arrival, group: dist.ProcessGroup | None) -> torch.Tensor:
        """All rows of an end, of which this rank's share arrives."""
        whole, *parts = arrival.wait()
        for parcel, part in zip(share.parcels, parts, strict=True):
            if isinstance(parcel.rows, torch.Tensor):
                whole.index_copy_(0, self.platform.put(parcel.rows), part)
        if share.rows and group is not None and group.size() > 1:
            own = whole[group.rank() * share.size : (group.rank() + 1) * share.size]
            dist.all_gather_into_tensor(whole, own, group=group)
        return whole[: share.rows]

    def _taken(self, rows: torch.Tensor, parcel: Parcel) -> torch.Tensor:
        """A parcel's rows, copied only where they do not lie together."""
        if isinstance(parcel.rows, slice):
            return rows[parcel.rows].contiguous()
        return rows.index_select(0, self.platform.put(parcel.rows))

    def _empty(self, rows: int) -> torch.Tensor:
        return torch.empty(rows, self.hidden_size, dtype=self.dtype, device=self.device)


def _share_size[Count: (int, torch.Tensor)](rows: Count, tp_size: int) -> Count:
    """How many of `rows` each tensor parallel rank answers for; the last may have fewer."""
    return -(-rows // tp_size)


def _total(slots: Sequence[MediaSlot]) -> int:
    """Rows of all items of a module's lane in one round."""
    return slots[-1].encoder_offset + slots[-1].rows if slots else 0


@dataclass(frozen=True)
class _Places:
    """Where the positions of a sequence of S tokens are, on the host."""

    cp: torch.Tensor
    """The context parallel rank [S] that holds each."""
    local: torch.Tensor
    """Its place [S] in that rank's order."""
    before: torch.Tensor
    """How many before each, and in all, each rank holds [S + 1, cp]."""


@lru_cache(maxsize=16)
def _places(seq_len: int, cp_size: int, starts: tuple[int, ...] | None, layout: CpLayout) -> _Places:
    """The places of a sequence's positions, cut over `cp_size` ranks."""
    cp, local = torch.empty(seq_len, dtype=torch.long), torch.empty(seq_len, dtype=torch.long)
    before = torch.zeros(seq_len + 1, cp_size, dtype=torch.int32)
    for rank in range(cp_size):
        index = cp_token_index(seq_len, cp_size, rank, starts, layout)
        cp[index] = rank
        local[index] = torch.arange(len(index))
        before[index + 1, rank] = 1
    return _Places(cp, local, before.cumsum(0, dtype=torch.int32))
