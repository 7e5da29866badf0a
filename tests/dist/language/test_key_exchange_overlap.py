"""Keys and values are on their way while queries are projected, and their gradients while those of queries are."""

from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from mimo_gemma4.language.attention_context import attention_context
from mimo_gemma4.language.config import FULL, Gemma4TextConfig
from mimo_gemma4.language.key_exchange import GatherExchange, Transit
from mimo_gemma4.language.model import Gemma4LanguageModel
from mimo_gemma4.weights.bindings import initialise
from tests.dist.harness import run_ranks
from tests.dist.language.language_ranks import language_groups

TP, CP, HIDDEN, HEADS, HEAD_DIM, LENGTH = 2, 2, 16, 8, 6, 16
QUERIES, KEYS_AND_VALUES = HEADS // TP * HEAD_DIM, 2 * HEAD_DIM
"""Local rows of the two products: unlike each other and any other width of the model."""


class Recorder(TorchDispatchMode):
    """The products of the attention's input and the gathers, in the order in which they are launched.

    The product of the attention's result has the queries' widths the other way round: it goes by their gradient's name.
    """

    def __init__(self) -> None:
        super().__init__()
        self.events: list[str] = []

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        name = function.overloadpacket._qualified_op_name.partition("::")[2]
        if name in ("mm", "addmm"):
            inner, outer = arguments[-1].shape
            widths = {QUERIES: "query", KEYS_AND_VALUES: "keys and values"}
            if HIDDEN in (inner, outer) and (width := inner if outer == HIDDEN else outer) in widths:
                self.events.append(widths[width] if inner == HIDDEN else f"gradient of {widths[width]}")
        if name == "_allgather_base_":
            self.events.append("gather")
        return function(*arguments, **(options or {}))

    def named(self, owner: type, method: str, event: str):
        """A patch under which calls of the owner's method are an event, too."""
        original = getattr(owner, method)

        def call(*arguments):
            self.events.append(event)
            return original(*arguments)

        return mock.patch.object(owner, method, call)


@contextmanager
def recorded() -> Iterator[list[str]]:
    """What happens, with the moments at which an exchange is launched and waited for."""
    recorder = Recorder()
    there, back = (recorder.named(GatherExchange, method, "start") for method in ("send", "send_back"))
    with recorder, there, back, recorder.named(Transit, "wait", "finish"):
        yield recorder.events


def events_of_rank(rank: int, key_value_heads: int) -> tuple[list[str], list[str]]:
    """Events of the forward and of the backward pass of a layer, sequence parallel."""
    text = Gemma4TextConfig(
        vocab_size=32,
        vocab_size_per_layer_input=32,
        hidden_size=HIDDEN,
        intermediate_size=20,
        num_hidden_layers=1,
        num_attention_heads=HEADS,
        num_key_value_heads=key_value_heads,
        global_head_dim=HEAD_DIM,
        hidden_size_per_layer_input=0,
        layer_types=(FULL,),
    )
    groups, device = language_groups(rank, TP, CP), torch.device("cpu")
    model = Gemma4LanguageModel(text, groups, sequence_parallel=True, dtype=torch.float32, device=device)
    initialise(model.bindings(), 0)
    held = list(torch.arange(LENGTH).chunk(CP))
    context = attention_context(
        text, torch.arange(LENGTH)[None], torch.ones(1, LENGTH), None, held=held, cp_group=groups.cp, put=torch.clone
    )
    ids = torch.ones(1, LENGTH // CP, dtype=torch.long)
    inputs = model.first_inputs(model.embed(ids))
    with recorded() as forward:
        hidden = model(inputs, ids, context).hidden
    with recorded() as backward:
        hidden.sum().backward()
    return forward, backward


@pytest.mark.parametrize("key_value_heads", [2, 1], ids=["heads cut", "head on every rank"])
def test_queries_are_projected_while_keys_travel(key_value_heads: int) -> None:
    for forward, backward in run_ranks(TP * CP, events_of_rank, key_value_heads):
        # The second gather is the exchange itself.
        assert forward[:6] == ["gather", "keys and values", "start", "gather", "query", "finish"]
        ours = ("start", "finish", "gradient of query", "gradient of keys and values")
        assert [event for event in backward if event in ours] == [ours[0], ours[2], ours[1], ours[3]]
