"""Low-rank adapters on the linears of any module: `weight + scale * B A`, of which only A and B train.

The method is from Hu et al. 2021 (arXiv:2106.09685). Adapters attach to a module from outside: its bindings determine
which local linear holds which rows of a Hugging Face weight, and the linear's class how these are cut over
tensor-parallel ranks. A and B are cut like their weight, so all that ranks exchange is `rank` wide.
"""

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Sequence
from fnmatch import fnmatchcase
from functools import partial
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from torch import Tensor, nn

from mimo_gemma4.config import LoraConfig
from mimo_gemma4.config.structured import did_you_mean
from mimo_gemma4.errors import ConfigError
from mimo_gemma4.weights.bindings import Binding, BoundModule, Constant, GradientSum, Uniform

LINEARS = (nn.Linear, ColumnParallelLinear, RowParallelLinear)
WEIGHT = ".weight"


@runtime_checkable
class SelectsRows(Protocol):
    """A linear whose weight holds more output rows than this rank computes."""

    def local_rows(self, whole: Tensor) -> Tensor:
        """The rows that this rank computes, of a tensor with as many rows as the weight."""
        ...


class LowRankAdapter(nn.Module):
    """The adapters of all targets in one local weight: their A are stacked and read the input once.

    Between A and B stands the base's communication between its input and its output. Before a column-parallel base
    under sequence parallelism, for example, it gathers [S/tp, B, targets * rank] instead of [S/tp, B, H].
    """

    def __init__(self, base: nn.Module, targets: Iterable[Binding], lora: LoraConfig):
        """Allocate A and B, uninitialised, for the `targets`, bindings of `base.weight` [outputs, inputs] (local)."""
        super().__init__()
        self.targets = sorted(targets, key=lambda binding: binding.region[0].start)
        self.rank, self.scale = lora.rank, lora.scale
        weight: Tensor = base.weight  # type: ignore[assignment]
        rows = sum(_length(target.region[0]) for target in self.targets)
        self.cut = _cut(base, self.targets)
        self.a = nn.Parameter(weight.new_empty(len(self.targets) * self.rank, weight.shape[1]))
        """[targets * rank, inputs (local)]."""
        self.b = nn.Parameter(weight.new_empty(rows, self.rank))
        """[output rows of the targets (local), rank]."""
        self.outputs = weight.shape[0]
        # A base may hold more output rows than it computes; it selects the same rows of B.
        self.select = base.local_rows if isinstance(base, SelectsRows) else _unchanged

    def forward(self, inputs: Tensor, output: Tensor) -> Tensor:
        """Add the adapters' terms for `inputs` [..., inputs (local)] to the base's `output` [..., outputs (local)]."""
        low = self.cut.combine(F.linear(inputs, self.a))  # [..., targets * rank]
        matrix = self.select(self._block_diagonal())
        return torch.addmm(output.flatten(0, -2), low.flatten(0, -2), matrix.t(), alpha=self.scale).view_as(output)

    def _block_diagonal(self) -> Tensor:
        """B of all targets as one matrix [rows of the base, targets * rank]; rows outside of targets are zero."""
        if len(self.b) == self.outputs and len(self.targets) == 1:
            return self.b
        blocks, row, taken = [], 0, 0
        for target in self.targets:
            start, rows = target.region[0].start, _length(target.region[0])
            blocks += [self.b.new_zeros(start - row, 0), self.b[taken : taken + rows]]
            row, taken = start + rows, taken + rows
        return torch.block_diag(*blocks, self.b.new_zeros(self.outputs - row, 0))

    def bindings(self) -> list[Binding]:
        """A and B of every target under PEFT's names, `<linear>.lora_A.weight` and `.lora_B.weight`.

        A [rank, inputs] starts uniform within 1 / sqrt(inputs), as in PEFT, and B [outputs, rank] at zero.
        """
        bound, taken = [], 0
        low = slice(0, self.rank)
        for number, target in enumerate(self.targets):
            name, (outputs, inputs), (rows, columns) = _linear(target), target.shape, target.index
            of_a = (slice(number * self.rank, (number + 1) * self.rank), slice(0, self.a.shape[1]))
            of_b = (slice(taken, taken + _length(rows)), low)
            taken += _length(rows)
            shape_a, index_a, initial_a = (self.rank, inputs), (low, columns), Uniform(inputs**-0.5)
            shape_b, index_b, initial_b = (outputs, self.rank), (rows, low), Constant(0.0)
            sum_a, sum_b = self.cut.sum_a, self.cut.sum_b
            bound += [
                Binding(f"{name}.lora_A.weight", shape_a, index_a, self.a, of_a, initial_a, sum_a),
                Binding(f"{name}.lora_B.weight", shape_b, index_b, self.b, of_b, initial_b, sum_b),
            ]
        return bound


class AdaptedModule(nn.Module):
    """A module of the layout together with the adapters on its linears; `base` computes."""

    def __init__(self, base: BoundModule, adapters: Iterable[LowRankAdapter]):
        """Take `base`, an `nn.Module` whose linears already hold `adapters`."""
        super().__init__()
        self.base, self.config = base, base.config
        self.adapters = nn.ModuleList(adapters)

    def bindings(self) -> list[Binding]:
        """The base's bindings, then the adapters'."""
        return [*self.base.bindings(), *self.adapter_bindings()]

    def unused_tensors(self) -> Collection[str]:
        """The base's unused tensors."""
        return self.base.unused_tensors()

    def adapter_bindings(self) -> list[Binding]:
        """This rank's slices of every A and B."""
        return [binding for adapter in self.adapters for binding in adapter.bindings()]  # type: ignore[operator]


def attach(name: str, module: BoundModule, lora: LoraConfig, elsewhere: Collection[str] = ()) -> AdaptedModule:
    """Put adapters on the linears of `module` that match `lora.targets`; their values are uninitialised.

    Args:
        name: the module's name in the layout.
        module: an `nn.Module`; only the forward of its linears changes.
        lora: rank, scale, and name patterns of the linears.
        elsewhere: Hugging Face names of parameters on other pipeline stages of the module; a pattern may match only
            these.

    Raises `ConfigError` for a pattern that names no linear, an expert's weight, or a linear held in several pieces.
    """
    assert isinstance(module, nn.Module)
    owners = {id(part.weight): part for part in module.modules() if isinstance(part, LINEARS)}
    bindings = [binding for binding in module.bindings() if isinstance(binding.tensor, nn.Parameter)]
    linears = {_linear(binding): binding for binding in bindings if id(binding.tensor) in owners}
    others = [_linear(binding) for binding in bindings if id(binding.tensor) not in owners]
    other_stages = {name.removesuffix(WEIGHT) for name in elsewhere} - linears.keys() - set(others)
    for pattern in lora.targets:
        if any(fnmatchcase(linear, pattern) for linear in other_stages):  # those stages check that these are linears
            continue
        _check_pattern(f"modules.{name}.lora.targets", pattern, list(linears), others)
    targets: dict[nn.Module, list[Binding]] = {}
    pieces = Counter(_linear(binding) for binding in bindings)
    for linear, binding in linears.items():
        if any(fnmatchcase(linear, pattern) for pattern in lora.targets):
            if pieces[linear] > 1:
                raise ConfigError(
                    f"modules.{name}.lora.targets: a rank holds {pieces[linear]} pieces of {linear!r}, which takes no "
                    f"adapter then: name other linears, or set layout.{name}.tp to 1"
                )
            targets.setdefault(owners[id(binding.tensor)], []).append(binding)
    adapters = []
    for base, found in targets.items():
        adapter = LowRankAdapter(base, found, lora)
        base.add_module("low_rank", adapter)
        base.register_forward_hook(partial(_add_adapter, adapter))
        adapters.append(adapter)
    return AdaptedModule(module, adapters)


def has_adapter(linear: nn.Module) -> bool:
    """Whether `attach` has put an adapter on a linear: then its output is more than the product with its weight."""
    return any(isinstance(child, LowRankAdapter) for child in linear.children())


def _add_adapter(adapter: LowRankAdapter, base: nn.Module, inputs: tuple[Tensor, ...], output: Any) -> Any:
    """Forward hook of a linear."""
    if isinstance(output, tuple):  # megatron-core's linears return (output, bias)
        return adapter(inputs[0], output[0]), *output[1:]
    return adapter(inputs[0], output)


def _check_pattern(key: str, pattern: str, linears: list[str], others: list[str]) -> None:
    """Raise `ConfigError` where a pattern names an expert's weight or no linear at all."""
    wrong = [name for name in others if fnmatchcase(name, pattern)]
    experts = [name for name in wrong if ".experts." in name]
    if experts:
        raise ConfigError(
            f"{key}: {pattern!r} matches {experts[0]!r}; experts are stacked tensors, not linears, and take no "
            "adapters: name the linears beside them, such as '*.self_attn.*' and '*.mlp.*'"
        )
    if any(fnmatchcase(name, pattern) for name in linears):
        return
    if wrong:
        raise ConfigError(f"{key}: {pattern!r} matches {wrong[0]!r}, which is no linear; only linears take adapters")
    ends = sorted({name.rpartition(".")[2] for name in linears})
    raise ConfigError(
        f"{key}: no linear matches {pattern!r}{did_you_mean(pattern.rpartition('.')[2], ends)}; "
        f"names look like {linears[0]!r}"
    )


class _Cut(NamedTuple):
    """How an adapter is cut over tensor-parallel ranks, given its base."""

    combine: Callable[[Tensor], Tensor]
    """Communication between A's product [..., targets * rank] and B."""
    sum_a: tuple[GradientSum, ...] = ()
    """Groups over which A's gradient is summed: their ranks hold equal A and each computes a part of its gradient."""
    sum_b: tuple[GradientSum, ...] = ()
    """The same for B."""


def _cut(base: nn.Module, targets: Sequence[Binding]) -> _Cut:
    if isinstance(base, ColumnParallelLinear):
        assert not base.gather_output, "an adapter needs the linear's local output rows"
        if base.sequence_parallel:
            return _Cut(partial(gather_from_sequence_parallel_region, group=base.tp_group), sum_a=("tp",))
        if base.disable_grad_reduce:  # the caller sums input gradients over ranks, so each rank's is a part
            return _Cut(_unchanged, sum_a=("tp",))
        return _Cut(partial(copy_to_tensor_model_parallel_region, group=base.tp_group))
    if isinstance(base, RowParallelLinear):
        assert base.input_is_parallel, "an adapter needs the linear's local input columns"
        if base.sequence_parallel:
            return _Cut(partial(reduce_scatter_to_sequence_parallel_region, group=base.tp_group), sum_b=("tp",))
        return _Cut(partial(reduce_from_tensor_model_parallel_region, group=base.tp_group))
    whole = targets[0].gradient_sum  # every rank holds the base whole, and so A and B
    if any(_length(target.index[0]) < target.shape[0] for target in targets):
        # Each pipeline stage has its layers' rows of the base, and so of B, but all of A.
        return _Cut(_unchanged, sum_a=(*whole, "pp"), sum_b=whole)
    return _Cut(_unchanged, sum_a=whole, sum_b=whole)


def _unchanged(low: Tensor) -> Tensor:
    return low


def _linear(binding: Binding) -> str:
    """The Hugging Face name of the linear whose weight is bound."""
    return binding.name.removesuffix(WEIGHT)


def _length(part: slice) -> int:
    return part.stop - part.start
