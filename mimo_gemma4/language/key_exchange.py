"""Sends keys and values to the context-parallel ranks whose queries see them, and returns their gradients.

All index tensors and split sizes are planned on the host, once per microbatch and attention type. `start_exchange`
launches the exchange and `finish_exchange` waits for it, so work between the two overlaps with it. In backward
`finish_exchange` launches the return of gradients and `start_exchange` waits for it. Layers that share keys and values
use one exchange: autograd adds up their gradients before they return.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import torch
import torch.distributed as dist

States = tuple[torch.Tensor, ...]
"""Keys and values, or raw keys, each [S/cp, B, heads (local), D] before an exchange, [K, B, heads (local), D] after."""


class Pending(NamedTuple):
    """A collective under way."""

    result: torch.Tensor
    """Its output: [keys, number of states, B, heads (local), D]."""
    source: torch.Tensor
    """Its input, which must not be freed before the collective has finished."""
    work: dist.Work | None
    """Its handle; torch's asynchronous collectives return None only on ranks outside the group."""

    def wait(self) -> torch.Tensor:
        """The result, after it has arrived (on a GPU: for kernels enqueued from now on)."""
        assert self.work is not None
        self.work.wait()
        return self.result


class KeyExchange(Protocol):
    """An exchange of states, and the return of their gradients, each in two halves."""

    def send(self, states: States) -> Pending:
        """Launch the exchange."""

    def assemble(self, states: States, received: torch.Tensor) -> States:
        """States of all K keys in sequence order, from the local states and the result of `send`."""

    def send_back(self, gradients: States) -> tuple[States, Pending]:
        """The local keys' part of the gradients of all K keys, and the launched return of the others."""

    def add_returned(self, local: States, returned: torch.Tensor) -> States:
        """Gradients of the local states: `local` plus the result of `send_back`."""


def plan_exchange(
    needed: Sequence[torch.Tensor],
    held: Sequence[torch.Tensor],
    group: dist.ProcessGroup,
    put: Callable[[torch.Tensor], torch.Tensor],
    *,
    windowed: bool,
) -> KeyExchange | None:
    """The cheapest exchange that serves every rank, the same kind on all of them; None where no rank lacks a key.

    Args:
        needed: for each rank of `group`, bool [S]: the sequence indices of the keys that it needs.
        held: for each rank the sequence indices that it holds, ascending; all equally many.
        group: the context-parallel group.
        put: moves host tensors to the device.
        windowed: whether only keys near the rank's own are needed.
    """
    most = max(int(keys.sum()) - index.numel() for keys, index in zip(needed, held, strict=True))
    if most == 0:
        return None
    # A gather sends everything to every rank, but keeps all links busy and needs no copy per receiver.
    if not windowed and 2 * most >= needed[0].numel() - held[0].numel():
        return GatherExchange(needed, held, group, put)
    return HaloExchange(needed, held, group, put)


class HaloExchange:
    """Each rank receives exactly the keys that it needs, from however many ranks hold them."""

    def __init__(
        self,
        needed: Sequence[torch.Tensor],
        held: Sequence[torch.Tensor],
        group: dist.ProcessGroup,
        put: Callable[[torch.Tensor], torch.Tensor],
    ) -> None:
        """Plan as in `plan_exchange`."""
        rank, ranks = group.rank(), group.size()
        self.group = group
        keys = needed[rank].nonzero().squeeze(1)
        sends = [needed[peer][held[rank]].nonzero().squeeze(1) for peer in range(ranks)]
        receives = [held[peer][needed[rank][held[peer]]] for peer in range(ranks)]
        sends[rank] = receives[rank] = sends[rank][:0]
        self.send_counts, self.receive_counts = ([places.numel() for places in lists] for lists in (sends, receives))
        self.count = keys.numel()
        self.sent_places = put(torch.cat(sends))
        self.local_places = put(torch.searchsorted(keys, held[rank]))
        self.received_places = put(torch.searchsorted(keys, torch.cat(receives)))

    def send(self, states: States) -> Pending:
        """Launch the exchange of the keys that other ranks need."""
        packed = torch.stack([state.index_select(0, self.sent_places) for state in states], dim=1)
        return self._exchange(packed, self.send_counts, self.receive_counts)

    def assemble(self, states: States, received: torch.Tensor) -> States:
        """All K keys in sequence order."""
        whole = []
        for state, others in zip(states, received.unbind(1), strict=True):
            keys = state.new_empty(self.count, *state.shape[1:])
            keys.index_copy_(0, self.local_places, state)
            whole.append(keys.index_copy_(0, self.received_places, others))
        return tuple(whole)

    def send_back(self, gradients: States) -> tuple[States, Pending]:
        """Launch the return of the gradients of other ranks' keys."""
        packed = torch.stack([gradient.index_select(0, self.received_places) for gradient in gradients], dim=1)
        pending = self._exchange(packed, self.receive_counts, self.send_counts)
        return tuple(gradient.index_select(0, self.local_places) for gradient in gradients), pending

    def add_returned(self, local: States, returned: torch.Tensor) -> States:
        """Add up the gradients of a key from all ranks that used it, in a fixed order of ranks."""
        parts = zip(self.sent_places.split(self.send_counts), returned.split(self.send_counts), strict=True)
        for places, part in parts:
            if places.numel():
                for gradient, addend in zip(local, part.unbind(1), strict=True):
                    gradient.index_add_(0, places, addend)  # in place: `send_back` made it, nothing else reads it
        return local

    def _exchange(self, packed: torch.Tensor, sends: list[int], receives: list[int]) -> Pending:
        received = packed.new_empty(sum(receives), *packed.shape[1:])
        work = dist.all_to_all_single(received, packed, receives, sends, group=self.group, async_op=True)
        return Pending(received, packed, work)


class GatherExchange:
    """All ranks gather all keys and select those that they need; gradients return by a reduce-scatter."""

    def __init__(
        self,
        needed: Sequence[torch.Tensor],
        held: Sequence[torch.Tensor],
        group: dist.ProcessGroup,
        put: Callable[[torch.Tensor], torch.Tensor],
    ) -> None:
        """Plan as in `plan_exchange`."""
        self.group, self.local_count = group, held[0].numel()
        gathered = torch.cat(list(held))
        place_of_index = torch.empty_like(gathered)
        place_of_index[gathered] = torch.arange(gathered.numel())
        self.places = put(place_of_index[needed[group.rank()]])

    def send(self, states: States) -> Pending:
        """Launch the all-gather."""
        packed = torch.stack(states, dim=1)
        gathered = packed.new_empty(packed.shape[0] * self.group.size(), *packed.shape[1:])
        work = dist.all_gather_into_tensor(gathered, packed, group=self.group, async_op=True)
        return Pending(gathered, packed, work)

    def assemble(self, states: States, received: torch.Tensor) -> States:
        """All K keys in sequence order for any number of ranks, so that kernels always sum in the same order."""
        return tuple(gathered.index_select(0, self.places) for gathered in received.unbind(1))

    def send_back(self, gradients: States) -> tuple[States, Pending]:
        """Launch the reduce-scatter; its result are the local keys' whole gradients, so their part here is zero."""
        count, shape = self.local_count, gradients[0].shape[1:]
        packed = gradients[0].new_zeros(count * self.group.size(), len(gradients), *shape)
        for number, gradient in enumerate(gradients):
            packed[:, number].index_copy_(0, self.places, gradient)
        summed = packed.new_empty(count, *packed.shape[1:])
        work = dist.reduce_scatter_tensor(summed, packed, group=self.group, async_op=True)
        nothing = packed.new_zeros(()).expand(count, *shape)
        return tuple(nothing for _ in gradients), Pending(summed, packed, work)

    def add_returned(self, local: States, returned: torch.Tensor) -> States:
        """The result of the reduce-scatter."""
        return returned.unbind(1)


class Transit:
    """The exchange of one layer's states between its two halves, forward and then backward."""

    def __init__(self, exchange: KeyExchange) -> None:
        """Nothing is under way yet."""
        self.exchange = exchange
        self.pending: Pending | None = None

    def wait(self) -> torch.Tensor:
        """The result of the launched half; releases its buffers."""
        assert self.pending is not None
        pending, self.pending = self.pending, None
        return pending.wait()


class StartedExchange(NamedTuple):
    """States whose exchange is under way."""

    transit: Transit | None
    """None: there is nothing to exchange."""
    states: States
    """The local states, as inputs of `finish_exchange` for autograd."""


def start_exchange(exchange: KeyExchange | None, states: States) -> StartedExchange:
    """Launch the exchange of `states`, each [S/cp, B, heads (local), D]."""
    if exchange is None:
        return StartedExchange(None, states)
    transit = Transit(exchange)
    return StartedExchange(transit, _StartExchange.apply(transit, *states))


def finish_exchange(started: StartedExchange) -> States:
    """The states of all K keys in sequence order, each [K, B, heads (local), D]."""
    if started.transit is None:
        return started.states
    return _FinishExchange.apply(started.transit, *started.states)


class _StartExchange(torch.autograd.Function):
    """The identity, which launches the exchange, and in backward waits for the returned gradients."""

    @staticmethod
    def forward(ctx: Any, transit: Transit, *states: torch.Tensor) -> States:
        ctx.transit = transit
        transit.pending = transit.exchange.send(states)
        return tuple(state.view_as(state) for state in states)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return None, *ctx.transit.exchange.add_returned(gradients, ctx.transit.wait())


class _FinishExchange(torch.autograd.Function):
    """Waits for the exchange, and in backward launches the return of gradients."""

    @staticmethod
    def forward(ctx: Any, transit: Transit, *states: torch.Tensor) -> States:
        ctx.transit = transit
        return transit.exchange.assemble(states, transit.wait())

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        local, ctx.transit.pending = ctx.transit.exchange.send_back(gradients)
        return None, *local
