"""Moves soft tokens between a module and the language ranks that hold them: each once each way.

A soft token is a vector of the language model's width H: an encoder's output or its gradient, a final hidden state for
a decoder or its gradient. Every shape follows from the step's manifest on the host: nothing is announced, and a
microbatch without soft tokens sends nothing.

An edge has an end at the module, with the soft tokens of a data-parallel lane, and one at the language model, with
those among a context-parallel rank's tokens. At both ends the tensor-parallel ranks need all of them and answer for
equal shares: the rank that answers for a soft token at one end exchanges it with the rank that does at the other end,
and an all-gather completes what arrives. Under sequence parallelism a language rank needs the soft tokens among its own
tokens alone and answers for all of them. Where both ends are one rank it is a local copy.

Each direction is posted and received by separate calls. For each microbatch a rank posts one batch a direction, which
holds what it sends as well as what it receives.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.distributed as dist

from mimo_gemma4.data.manifest import Microbatch, PlannedMedia, StepManifest
from mimo_gemma4.distributed.layout import Coordinate, Layout
from mimo_gemma4.distributed.p2p import P2PChannel, PendingRecv
from mimo_gemma4.distributed.platform import Platform


@dataclass(frozen=True)
class Parcel:
    """Soft tokens that a rank exchanges with one at the other end: it sends them one way and receives them back."""

    peer: int
    index: slice | torch.Tensor
    """Which of its end: a range, or ascending numbers [n] on the host where others lie between them."""

    @classmethod
    def of(cls, peer: int, index: torch.Tensor, first: int, last: int) -> "Parcel":
        """A parcel of the soft tokens `index` [n], which ascend from `first` to `last`."""
        return cls(peer, slice(first, last + 1) if last - first + 1 == len(index) else index)

    @property
    def count(self) -> int:
        """How many there are."""
        return self.index.stop - self.index.start if isinstance(self.index, slice) else len(self.index)


@dataclass(frozen=True)
class Share:
    """The soft tokens of one microbatch that one rank answers for, at one end of an edge."""

    needed: int = 0
    """Soft tokens that the rank needs: it has all of them before they leave and when they have arrived."""
    per_rank: int = 0
    """How many of them each of its tensor-parallel ranks answers for, in their order; the last may have fewer."""
    parcels: tuple[Parcel, ...] = ()
    """What this rank answers for, by peer."""

    @classmethod
    def of(cls, needed: int, per_rank: int, peers: torch.Tensor, index: torch.Tensor) -> "Share":
        """The share of the soft tokens `index` [n], exchanged with `peers` [n] and ascending for each of them."""
        order = peers.argsort(stable=True)
        ranks, counts = peers[order].unique_consecutive(return_counts=True)
        index, ends = index[order], counts.cumsum(0)
        firsts, lasts = index[ends - counts].tolist(), index[ends - 1].tolist()
        parts = index.split(counts.tolist())
        return cls(needed, per_rank, tuple(map(Parcel.of, ranks.tolist(), parts, firsts, lasts)))


@dataclass(frozen=True)
class Route:
    """What one rank exchanges for one microbatch over one edge."""

    module: Share
    """Of its module's lane; empty where that has no items."""
    language: Share
    """Of the soft tokens among its tokens; empty where there are none."""
    positions: torch.Tensor
    """Flat positions `local_position * B + b` of those soft tokens [n] in its [S/(cp*tp) (local), B, H] activations,
    where tp counts under sequence parallelism only."""


class Bridge:
    """One edge of the module graph: from an encoder into the embeddings, or from final hidden states to a decoder.

    An encoder's edge carries its outputs to the language model and their gradients back to the module; a decoder's
    carries hidden states to the module and their gradients back to the language model.
    """

    def __init__(
        self,
        layout: Layout,
        name: str,
        rank: int,
        *,
        to_language_group: dist.ProcessGroup,
        to_module_group: dist.ProcessGroup,
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
            to_language_group: group of the ranks of both ends that carries what travels to the language model.
            to_module_group: group of the same ranks that carries what travels to the module.
            module_tp_group: this rank's tensor-parallel group in the module's grid, None outside it.
            language_tp_group: this rank's tensor-parallel group in the language model's grid, None outside it.
            hidden_size: width H of the language model.
            dtype: type of soft tokens and gradients.
            platform: where they live.
        """
        self.name, self.rank = name, rank
        self.module, self.language = layout.grids[name], layout.language
        self.to_language, self.to_module = P2PChannel(to_language_group), P2PChannel(to_module_group)
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

    def route(self, manifest: StepManifest, microbatch: int) -> Route:
        """This rank's part of a microbatch, from the manifest alone."""
        module, language, positions = Share(), Share(), torch.empty(0, dtype=torch.long)
        if self._module_at is not None and manifest.items_of_module(self.name, microbatch, self._module_at.dp):
            module = self._module_share(manifest, microbatch, self._module_at)
        if self._language_at is not None and manifest.items_of_lane(self.name, microbatch, self._language_at.dp):
            language, positions = self._language_share(manifest, microbatch, self._language_at)
        return Route(module, language, positions)

    def _module_share(self, manifest: StepManifest, microbatch: int, at: Coordinate) -> Share:
        """This rank's share of its module lane's soft tokens."""
        items = manifest.items_of_module(self.name, microbatch, at.dp)
        lanes = sorted({item.lane for item in items})
        module_rank, number, language_rank, _, _ = self._places(manifest, microbatch, lanes, at.dp)
        mine, total = module_rank == self.rank, _total(items)
        return Share.of(total, _per_rank(total, self.module.tp), language_rank[mine], number[mine])

    def _language_share(self, manifest: StepManifest, microbatch: int, at: Coordinate) -> tuple[Share, torch.Tensor]:
        """This rank's share of the soft tokens among its tokens, and the flat positions [n] of all of those."""
        module_rank, _, language_rank, cp, position = self._places(manifest, microbatch, [at.dp])
        sequence_parallel = self.language.sequence_parallel
        needed = language_rank == self.rank if sequence_parallel else cp == at.cp
        module_rank, language_rank = module_rank[needed], language_rank[needed]
        mine, count = language_rank == self.rank, len(language_rank)
        per_rank = count if sequence_parallel else _per_rank(count, self.language.tp)
        return Share.of(count, per_rank, module_rank[mine], mine.nonzero().flatten()), position[needed]

    def _places(
        self, manifest: StepManifest, microbatch: int, lanes: Sequence[int], module_lane: int | None = None
    ) -> tuple[torch.Tensor, ...]:
        """Where the soft tokens of language lanes' microbatches are, item after item: of one module lane, or of all.

        Returns:
            Five host tensors [n]: the module's rank that answers for the soft token, its number in that rank's lane,
            the language rank that answers for it, its context-parallel rank, and its flat position on that.
        """
        tokens = [manifest.microbatch(lane, microbatch) for lane in lanes]
        by_lane = [manifest.items_of_lane(self.name, microbatch, lane) for lane in lanes]
        columns = [
            (i.soft_tokens, i.module_lane, i.module_offset, i.start, i.sequence, lane)
            for lane, items in enumerate(by_lane)
            for i in items
        ]
        counts, source, offset, start, sequence, lane = torch.tensor(columns).unbind(1)  # each [items]
        of_source = [_total(manifest.items_of_module(self.name, microbatch, at)) for at in source.tolist()]
        chosen = torch.arange(len(columns)) if module_lane is None else (source == module_lane).nonzero().flatten()
        item = chosen.repeat_interleave(counts[chosen])  # [n]: the item of each soft token
        first = counts[chosen].cumsum(0) - counts[chosen]
        inside = torch.arange(len(item)) - first.repeat_interleave(counts[chosen])
        number = offset[item] + inside
        cut = _Cut.of(tokens, self.language.cp, lane, start)
        cp, local = cut.places(item, inside)
        tp, local = self._tensor_parallel(tokens, cut, counts, lane, item, cp, local)
        module_tp = number // _per_rank(torch.tensor(of_source), self.module.tp)[item]
        module_rank = self._module_ranks[source[item], module_tp]
        language_rank = self._language_ranks[torch.tensor(lanes)[lane][item], cp, tp]
        sequences = torch.tensor([microbatch.sequences for microbatch in tokens])[lane]
        return module_rank, number, language_rank, cp, local * sequences[item] + sequence[item]

    def _tensor_parallel(
        self,
        tokens: Sequence[Microbatch],
        cut: "_Cut",
        counts: torch.Tensor,
        lane: torch.Tensor,
        item: torch.Tensor,
        cp: torch.Tensor,
        local: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The tensor-parallel rank [n] that answers for each soft token, and its place [n] on that rank.

        Args:
            tokens: microbatches of the lanes.
            cut: cut of the items' sequences.
            counts, lane: of each item [items], its soft tokens and its place in `tokens`.
            item, cp, local: of each soft token [n], its item, and its context-parallel rank and place there.
        """
        language = self.language
        if language.sequence_parallel:
            lengths = torch.tensor([microbatch.seq_length for microbatch in tokens])[lane]
            length = (lengths // (language.cp * language.tp))[item]
            return local // length, local % length
        # Equal runs of all that falls on a context-parallel rank's tokens, which may be parts of items.
        before = cut.before(torch.zeros_like(counts))
        of_item = cut.before(counts) - before  # [items, cp]
        of_lane = torch.zeros(len(tokens), language.cp, dtype=torch.long).index_add_(0, lane, of_item)
        earlier = of_item.cumsum(0) - of_item - (of_lane.cumsum(0) - of_lane)[lane] - before
        per_rank = _per_rank(of_lane, language.tp)[lane]
        return (earlier[item, cp] + local) // per_rank[item, cp], local

    # --- moving (device) ---

    def post_to_language(self, route: Route, leaving: torch.Tensor | None) -> PendingRecv:
        """Start sending this rank's share of its module lane's soft tokens, and receiving its share of its tokens'.

        Args:
            route: this rank's route.
            leaving: output [soft tokens, H] of an encoder, or gradient of a decoder's states; None where the lane has
                no items.

        Returns:
            On its way, what `recv_in_language` takes.
        """
        return self._post(self.to_language, route.module, leaving, route.language, self.language_tp_group)

    def recv_in_language(self, route: Route, pending: PendingRecv) -> torch.Tensor:
        """Wait for the soft tokens among this rank's tokens; collective over the tensor-parallel ranks if it has any.

        Returns:
            [n, H] in the order of `route.positions`.
        """
        return self._recv(route.language, pending, self.language_tp_group)

    def post_to_module(self, route: Route, leaving: torch.Tensor | None) -> PendingRecv:
        """Start sending this rank's share of its tokens' soft tokens, and receiving its share of its module lane's.

        Args:
            route: this rank's route.
            leaving: gradients [n, H] of an encoder's output, or states for a decoder, in the order of
                `route.positions`; None where there are none.

        Returns:
            On its way, what `recv_in_module` takes.
        """
        return self._post(self.to_module, route.language, leaving, route.module, self.module_tp_group)

    def recv_in_module(self, route: Route, pending: PendingRecv) -> torch.Tensor:
        """Wait for the soft tokens of this rank's module lane; collective over its tensor-parallel ranks if it has any.

        Returns:
            [soft tokens, H] in the order of the lane's items.
        """
        return self._recv(route.module, pending, self.module_tp_group)

    def drain(self) -> None:
        """Let go of everything that this rank has sent, when it has left."""
        self.to_language.drain()
        self.to_module.drain()

    def _post(
        self,
        channel: P2PChannel,
        sent: Share,
        leaving: torch.Tensor | None,
        received: Share,
        group: dist.ProcessGroup | None,
    ) -> PendingRecv:
        """One batch of sends and receives; what goes from this rank to itself is copied at once.

        Returns:
            Room for all that `group` completes, and what each parcel fills: a part of it, or a buffer where the
            parcel's soft tokens do not lie side by side.
        """
        whole = self._empty(received.per_rank * (1 if group is None else group.size()))  # [tp * per_rank, H]
        parts = {
            parcel.peer: whole[parcel.index] if isinstance(parcel.index, slice) else self._empty(parcel.count)
            for parcel in received.parcels
        }
        buffers, sends = [whole, *parts.values()], []
        for parcel in sent.parcels:
            assert leaving is not None, "a route sends soft tokens that this rank does not have"
            assert leaving.dtype == self.dtype, f"{self.name} gives {leaving.dtype}, the bridge moves {self.dtype}"
            taken = self._taken(leaving.detach(), parcel)
            if parcel.peer == self.rank:
                parts.pop(parcel.peer).copy_(taken)
            else:
                sends.append((parcel.peer, taken))
        return PendingRecv(buffers, channel.post(sends, list(parts.items())).works)

    def _recv(self, share: Share, pending: PendingRecv, group: dist.ProcessGroup | None) -> torch.Tensor:
        """All soft tokens of an end, of which this rank's share has arrived."""
        whole, *parts = pending.wait()
        for parcel, part in zip(share.parcels, parts, strict=True):
            if isinstance(parcel.index, torch.Tensor):
                whole.index_copy_(0, self.platform.put(parcel.index), part)
        if share.needed and group is not None and group.size() > 1:
            own = whole[group.rank() * share.per_rank : (group.rank() + 1) * share.per_rank]
            dist.all_gather_into_tensor(whole, own, group=group)  # [per_rank, H] of each → [tp * per_rank, H]
        return whole[: share.needed]

    def _taken(self, leaving: torch.Tensor, parcel: Parcel) -> torch.Tensor:
        """A parcel's soft tokens, copied only where they do not lie side by side."""
        if isinstance(parcel.index, slice):
            return leaving[parcel.index].contiguous()
        return leaving.index_select(0, self.platform.put(parcel.index))

    def _empty(self, count: int) -> torch.Tensor:
        return torch.empty(count, self.hidden_size, dtype=self.dtype, device=self.device)


def _per_rank[Count: (int, torch.Tensor)](count: Count, tp_size: int) -> Count:
    """How many of `count` each tensor-parallel rank answers for; the last may have fewer."""
    return -(-count // tp_size)


def _total(items: Sequence[PlannedMedia]) -> int:
    """Soft tokens of all items of a module's lane in one microbatch."""
    return items[-1].module_offset + items[-1].soft_tokens if items else 0


@dataclass(frozen=True)
class _Cut:
    """How the sequences that hold some items are cut over context-parallel ranks, on the host.

    A segment of a sequence is cut into chunks of equal length: 2 * cp of them as a zigzag, chunks r and 2 * cp - 1 - r
    for rank r, or cp of them. Every item lies in one segment.
    """

    cp_size: int
    inside: torch.Tensor
    """Position [items] of each item's first soft token in its segment."""
    local: torch.Tensor
    """Place [items] of its segment's first position in the order of each rank."""
    chunk: torch.Tensor
    """Length [items] of the chunks of its segment."""

    @classmethod
    def of(cls, microbatches: Sequence[Microbatch], cp_size: int, lane: torch.Tensor, start: torch.Tensor) -> "_Cut":
        """The cut of items, each given by its number among the `microbatches` [items] and first position [items]."""
        segments, first = [], 0  # segments as (number of the first position among those of all, the same local, chunk)
        firsts = []
        for microbatch in microbatches:
            length, starts, parts = microbatch.seq_length, microbatch.segment_starts, 2 * cp_size
            if cp_size == 1 or microbatch.cp_layout == "contiguous":
                starts, parts = None, cp_size
            for begin, end in pairwise(starts or (0, length)):
                segments.append((first + begin, begin // cp_size, (end - begin) // parts))
            firsts.append(first)
            first += length
        begins, local, chunk = torch.tensor(segments).T.contiguous()
        position = torch.tensor(firsts)[lane] + start
        segment = torch.searchsorted(begins, position, right=True) - 1
        return cls(cp_size, position - begins[segment], local[segment], chunk[segment])

    def places(self, item: torch.Tensor, inside: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The rank [n] of each soft token, and its place [n] in that rank's order.

        `item` [n] and `inside` [n]: its item, and its number among those of the item.
        """
        position, chunk = self.inside[item] + inside, self.chunk[item]
        number = position // chunk
        second = number >= self.cp_size
        cp = torch.where(second, 2 * self.cp_size - 1 - number, number)
        return cp, self.local[item] + position - (number - second.long()) * chunk

    def before(self, inside: torch.Tensor) -> torch.Tensor:
        """How many positions before the soft token `inside` [items] of each item every rank holds [items, cp]."""
        ranks, zero, chunk = torch.arange(self.cp_size), torch.tensor(0), self.chunk[:, None]
        position = (self.inside + inside)[:, None]
        of_first = (position - ranks * chunk).clamp(zero, chunk)
        of_second = (position - (2 * self.cp_size - 1 - ranks) * chunk).clamp(zero, chunk)
        return self.local[:, None] + of_first + of_second
