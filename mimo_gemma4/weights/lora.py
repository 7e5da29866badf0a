"""Low-rank adapters on the linears of any module: `weight + scale * B A`, of which only A and B train.

The method is that of Hu et al. 2021 (arXiv:2106.09685). Adapters attach to a module from outside: its bindings tell
which local linear holds the rows of which Hugging Face weight, and the class of the linear how it is cut over tensor
parallel ranks. A and B are cut like the weight they belong to, so whatever travels between ranks is `rank` wide.
"""

from collections import Counter
from collections.abc import Callable, Collection, Iterable
from fnmatch import fnmatchcase
from functools import partial
from typing import NamedTuple

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
from mimo_gemma4.weights.bindings import Binding, BoundModule, Constant, Uniform, share_between_stages

LINEARS = (nn.Linear, ColumnParallelLinear, RowParallelLinear)
WEIGHT = ".weight"


class LowRankAdapter(nn.Module):
    """The adapters of all targets that one local weight holds: their A are stacked and read the input once.

    Between A and B stands what the base does between its input and its output: under sequence parallelism a gather of
    [S/tp, B, targets * rank] before a column-parallel base, for example, instead of one of [S/tp, B, H].
    """

    def __init__(self, base: nn.Module, targets: Iterable[Binding], lora: LoraConfig):
        """Allocate A and B, uninitialised, for the `targets`, bindings of `base.weight` [outputs, inputs] (local)."""
        super().__init__()
        self.targets = sorted(targets, key=lambda binding: binding.region[0].start)
        self.rank, self.scale = lora.rank, lora.scale
        weight: Tensor = base.weight  # type: ignore[assignment]
        rows = sum(_length(target.region[0]) for target in self.targets)
        cut = _cut(base)
        self.a = _parameter(weight.new_empty(len(self.targets) * self.rank, weight.shape[1]), cut.partial_a)
        """[targets * rank, inputs (local)]."""
        if isinstance(base, nn.Linear) and any(_length(t.index[0]) < t.shape[0] for t in self.targets):
            share_between_stages(self.a, "pp")  # each stage has its layers' rows of the base, and so of B, but all of A
        self.b = _parameter(weight.new_empty(rows, self.rank), cut.partial_b)
        """[output rows of the targets (local), rank]."""
        self.combine = cut.combine
        self.outputs = weight.shape[0]
        # A base that holds more output rows than it computes selects its own from whatever has as many rows.
        self.select: Callable[[Tensor], Tensor] = getattr(base, "local_rows", lambda whole: whole)

    def forward(self, inputs: Tensor, output: Tensor) -> Tensor:
        """`output` [..., outputs (local)] of the base for `inputs` [..., inputs (local)], with the adapters' added."""
        low = self.combine(F.linear(inputs, self.a))  # [..., targets * rank]
        matrix = self.select(self._block_diagonal())
        return torch.addmm(output.flatten(0, -2), low.flatten(0, -2), matrix.t(), alpha=self.scale).view_as(output)

    def _block_diagonal(self) -> Tensor:
        """B of all targets as one matrix [rows of the base, targets * rank]; rows that are no target's are zero."""
        if len(self.b) == self.outputs and len(self.targets) == 1:
            return self.b
        blocks, row, taken = [], 0, 0
        for target in self.targets:
            start, rows = target.region[0].start, _length(target.region[0])
            blocks += [self.b.new_zeros(start - row, 0), self.b[taken : taken + rows]]
            row, taken = start + rows, taken + rows
        return torch.block_diag(*blocks, self.b.new_zeros(self.outputs - row, 0))

    def bindings(self) -> list[Binding]:
        """A and B of every target, under the name that PEFT gives them: `<linear>.lora_A.weight`, `.lora_B.weight`.

        A [rank, inputs] starts uniform within 1 / sqrt(inputs), as PEFT's, and B [outputs, rank] at zero.
        """
        bound, taken = [], 0
        low = slice(0, self.rank)
        for number, target in enumerate(self.targets):
            name, (outputs, inputs), (rows, columns) = _linear(target), target.shape, target.index
            of_a = (slice(number * self.rank, (number + 1) * self.rank), slice(0, self.a.shape[1]))
            of_b = (slice(taken, taken + _length(rows)), low)
            taken += _length(rows)
            initial = Uniform(inputs**-0.5)
            bound += [
                Binding(f"{name}.lora_A.weight", (self.rank, inputs), (low, columns), self.a, of_a, initial),
                Binding(f"{name}.lora_B.weight", (outputs, self.rank), (rows, low), self.b, of_b, Constant(0.0)),
            ]
        return bound


class AdaptedModule(nn.Module):
    """A module of the layout together with the adapters on its linears; it computes as before, through `base`."""

    def __init__(self, base: BoundModule, adapters: Iterable[LowRankAdapter]):
        """Take `base`, an `nn.Module` whose linears already hold `adapters`."""
        super().__init__()
        self.base, self.config = base, base.config
        self.adapters = nn.ModuleList(adapters)

    def bindings(self) -> list[Binding]:
        """The base's, then the adapters'."""
        return [*self.base.bindings(), *self.adapter_bindings()]

    def unused_tensors(self) -> Collection[str]:
        """The base's."""
        return self.base.unused_tensors()

    def adapter_bindings(self) -> list[Binding]:
        """What this rank holds of every A and B."""
        return [binding for adapter in self.adapters for binding in adapter.bindings()]  # type: ignore[operator]


def attach(name: str, module: BoundModule, lora: LoraConfig, elsewhere: Collection[str] = ()) -> AdaptedModule:
    """Put adapters on the linears of `module` that `lora.targets` name; their values are uninitialised.

    Args:
        name: the module's name in the layout.
        module: an `nn.Module` of which only the linears' forward changes.
        lora: rank, scale, and name patterns of the linears.
        elsewhere: Hugging Face names of parameters that other pipeline stages of the module hold; a pattern may match
            those alone.

    Raises `ConfigError` for a pattern that names no linear, an expert's weight, or a linear held in several pieces.
    """
    assert isinstance(module, nn.Module)
    owners = {id(part.weight): part for part in module.modules() if isinstance(part, LINEARS)}
    bindings = [binding for binding in module.bindings() if isinstance(binding.tensor, nn.Parameter)]
    linears = {_linear(binding): binding for binding in bindings if id(binding.tensor) in owners}
    others = [_linear(binding) for binding in bindings if id(binding.tensor) not in owners]
    other_stages = {name.removesuffix(WEIGHT) for name in elsewhere} - linears.keys() - set(others)
    for pattern in lora.targets:
        if any(fnmatchcase(linear, pattern) for linear in other_stages):  # which say whether they are linears
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
    for base, found in targets.items():
        base.low_rank = LowRankAdapter(base, found, lora)
        base.register_forward_hook(_add_adapters)
    return AdaptedModule(module, [base.low_rank for base in targets])  # type: ignore[misc]


def _add_adapters(base: nn.Module, inputs: tuple[Tensor, ...], output: Tensor | tuple) -> Tensor | tuple:
    adapter: LowRankAdapter = base.low_rank  # type: ignore[assignment]
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
    """How the adapter of a base that is cut over tensor parallel ranks is cut itself."""

    combine: Callable[[Tensor], Tensor]
    """What happens to A's product [..., targets * rank] before B multiplies it."""
    partial_a: bool
    """Whether ranks hold equal A and each computes a part of its gradient."""
    partial_b: bool
    """The same of B."""


def _cut(base: nn.Module) -> _Cut:
    if isinstance(base, ColumnParallelLinear):
        assert not base.gather_output, "an adapter needs the linear's local output rows"
        if base.sequence_parallel:
            return _Cut(partial(gather_from_sequence_parallel_region, group=base.tp_group), True, False)
        if base.disable_grad_reduce:  # the caller sums input gradients over ranks, so each rank's is a part
            return _Cut(_unchanged, True, False)
        return _Cut(partial(copy_to_tensor_model_parallel_region, group=base.tp_group), False, False)
    if isinstance(base, RowParallelLinear):
        assert base.input_is_parallel, "an adapter needs the linear's local input columns"
        if base.sequence_parallel:
            return _Cut(partial(reduce_scatter_to_sequence_parallel_region, group=base.tp_group), False, True)
        return _Cut(partial(reduce_from_tensor_model_parallel_region, group=base.tp_group), False, False)
    partial_gradient = getattr(base.weight, "tp_gradient_partial", False)
    return _Cut(_unchanged, partial_gradient, partial_gradient)


def _unchanged(low: Tensor) -> Tensor:
    return low


def _parameter(values: Tensor, partial_gradient: bool) -> nn.Parameter:
    parameter = nn.Parameter(values)
    if partial_gradient:
        parameter.tp_gradient_partial = True  # type: ignore[attr-defined]
    return parameter


def _linear(binding: Binding) -> str:
    """The Hugging Face name of the linear whose weight is bound."""
    return binding.name.removesuffix(WEIGHT)


def _length(part: slice) -> int:
    return part.stop - part.start
