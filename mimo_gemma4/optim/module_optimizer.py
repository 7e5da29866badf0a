"""AdamW over the modules of this rank: gradient reduction, global-norm contribution, fp32 update, learning rate.

Every module has an optimizer of its own on its own process groups: megatron-core's `DistributedDataParallel` sums
gradients over dp_cp (reduce-scatter) into fp32 buffers, and its `DistributedOptimizer` (ZeRO-1) keeps fp32 main weights
and moments of this rank's shard. Further sums of gradients follow from the module's bindings. Losses are sums
(`calculate_per_token_loss`), so nothing here divides by a number of ranks; `step_reduction` computes the global token
count, norm and clip coefficient that every module applies.
"""

import copy
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, cast, get_args

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor, nn

from mimo_gemma4.config import OptimConfig
from mimo_gemma4.optim.gradient_fusion import fuse_weight_gradients
from mimo_gemma4.optim.step_reduction import StepResults
from mimo_gemma4.weights.bindings import Binding, BoundModule, GradientSum

SliceKey = tuple[str, tuple[tuple[int, int], ...]]
"""Name and bounds of a slice of a Hugging Face tensor."""


@dataclass(frozen=True)
class Shard:
    """The elements `[start, end)` of a flattened local tensor that this data-parallel rank updates and saves."""

    tensor: Tensor
    """Local parameter or buffer, whole."""
    start: int
    end: int
    state: dict[str, Tensor] = field(default_factory=dict)
    """The optimizer's `main_weight` (the weight's own memory if that is fp32), `exp_avg` and `exp_avg_sq`, each
    [end - start] fp32; empty for frozen parameters and buffers."""

    @property
    def values(self) -> Tensor:
        """The shard's elements of the tensor, [end - start], a view."""
        return self.tensor.detach().view(-1)[self.start : self.end]

    @property
    def gradient(self) -> Tensor:
        """The shard's elements of the reduced gradient, [end - start] fp32, a view."""
        main_grad: Tensor = self.tensor.main_grad  # type: ignore[attr-defined]  # megatron-core's DDP sets it
        return main_grad.view(-1)[self.start : self.end]


class ModuleOptimizer:
    """Gradients and optimizer state of one module on this rank. A frozen module has the same interface and no state.

    A step is `zero_gradients`, the forward and backward passes, `finish_gradients`, `StepReduction.reduce` (which asks
    for `square_norm`), `apply`.
    """

    def __init__(self, module: BoundModule, groups: ProcessGroupCollection, config: OptimConfig):
        """Wrap `module`, whose weights are loaded and whose `requires_grad` flags are final. Collective over its grid.

        Args:
            module: an encoder, decoder or the language module, with `bindings()` and `config: TransformerConfig`.
                Its bindings name the groups over which each parameter's gradient is summed.
            groups: the module's process groups; `tp`, `pp`, `embd`, `dp`, `dp_cp` and, for experts, `ep` and `expt_dp`.
            config: AdamW's constants (`Config.module_optim`). The learning rate is an argument of each step.

        Raises `ValueError` where bindings of one tensor name different groups.
        """
        self.module = module
        self.groups = groups
        self.bindings: list[Binding] = module.bindings()
        self.by_tensor = binding_by_tensor(self.bindings)
        """One binding of each bound tensor, by the tensor's id."""
        self.owned = owned_bindings(self.bindings, groups)
        self.ddp: DistributedDataParallel | None = None
        self.optimizers: list[DistributedOptimizer] = []
        trainable = [parameter for parameter in module.parameters() if parameter.requires_grad]
        assert all(id(parameter) in self.by_tensor for parameter in trainable), "a trainable parameter has no binding"
        if trainable:
            _mark_for_megatron(self.by_tensor.values())
            self.ddp = _wrap(module, groups, trainable)
            fuse_weight_gradients(cast(nn.Module, module))
            for buffers in (self.ddp.buffers, self.ddp.expert_parallel_buffers):
                if buffers:
                    self.optimizers.append(_distributed_adamw(self.ddp, buffers, config))
        self.trainable_shards = [shard for optimizer in self.optimizers for shard in _shards(optimizer)]
        self._summed = self._summed_shards()

    @property
    def trainable(self) -> bool:
        """Whether this rank holds any trainable parameter of the module."""
        return self.ddp is not None

    def zero_gradients(self) -> None:
        """Clear the fp32 gradient buffers: call before the first backward of a step."""
        if self.ddp is not None:
            self.ddp.zero_grad_buffer()

    def finish_gradients(self) -> None:
        """Sum gradients over replicas, each rank keeping its shard, then over the bindings' `gradient_sum` groups.

        Ranks of such a group own the same element ranges, so these sums move only shards.
        """
        if self.ddp is None:
            return
        self.ddp.finish_grad_sync()
        for group, shards in self._summed:
            gradients = [shard.gradient for shard in shards]
            if len(gradients) == 1:  # possibly a large table: sum it in place, without a copy
                dist.all_reduce(gradients[0], group=group)
                continue
            total = torch.cat(gradients)
            dist.all_reduce(total, group=group)
            torch._foreach_copy_(gradients, list(total.split([len(gradient) for gradient in gradients])))

    def square_norm(self) -> Tensor:
        """This rank's part of the squared norm of the gradient sum: fp64 scalar on the device, no host sync.

        The sum over all ranks of the module counts each element of each trainable Hugging Face parameter once: shards
        partition a parameter over data-parallel ranks, and `owned_bindings` picks one holder among replicas. It is not
        finite if a counted element is not. Call after `finish_gradients`.
        """
        gradients = [
            gradient if mask is None else torch.where(mask, gradient, 0.0)
            for gradient, mask in ((shard.gradient, mask) for shard, mask in self._counted)
        ]
        if not gradients:
            return torch.zeros((), dtype=torch.float64, device=self.device)
        return torch.stack(torch._foreach_norm(gradients, 2.0, torch.float64)).square().sum()

    @torch.no_grad()
    def apply(self, results: StepResults, learning_rate: float) -> None:
        """One AdamW step with gradients divided by `results.gradient_divisor`, then the new weights to all dp_cp ranks.

        If a gradient anywhere is not finite, weights, moments and step count stay unchanged on every rank of every
        module; the decision is made on the device.
        """
        if self.ddp is None:
            return
        for optimizer in self.optimizers:
            adamw = optimizer.optimizer
            for group in adamw.param_groups:
                group["lr"] = learning_rate
            # torch's contract of gradient scaler and fused optimizer: divide by grad_scale, skip if found_inf is 1
            adamw.grad_scale = results.gradient_divisor.float()
            adamw.found_inf = results.nonfinite.float()
            optimizer.prepare_grads()
            optimizer.step_with_ready_grads()
        self.ddp.start_param_sync()

    @torch.no_grad()
    def main_weights_to_model(self) -> None:
        """Round the main weights into the module's weights on all dp_cp ranks, after loading a checkpoint."""
        if self.ddp is None:
            return
        for shard in self.trainable_shards:
            if shard.state["main_weight"].data_ptr() != shard.values.data_ptr():
                shard.values.copy_(shard.state["main_weight"])
        self.ddp.start_param_sync()

    @property
    def step_counts(self) -> list[Tensor]:
        """AdamW's update counts of this rank's shards (fp32 scalars on the device, all equal)."""
        return [state["step"] for optimizer in self.optimizers for state in optimizer.optimizer.state.values()]

    @cached_property
    def device(self) -> torch.device:
        """The device of the module's tensors."""
        return self.bindings[0].tensor.device

    def shards(self) -> list[Shard]:
        """This rank's shard of every bound tensor: trainable ones as cut by ZeRO-1, others cut evenly."""
        trained = {id(shard.tensor) for shard in self.trainable_shards}
        trained |= {id(p) for p in self.module.parameters() if p.requires_grad}
        rest = [binding for number, binding in self.by_tensor.items() if number not in trained]
        return self.trainable_shards + [_even_shard(b.tensor, _replicas(b, self.groups)) for b in rest]

    @cached_property
    def _counted(self) -> list[tuple[Shard, Tensor | None]]:
        """Trainable shards that count in the norm, with a mask [end - start] if only some of their elements do."""
        regions: dict[int, list[Binding]] = {}
        for binding in self.owned:
            regions.setdefault(id(binding.tensor), []).append(binding)
        counted: list[tuple[Shard, Tensor | None]] = []
        for shard in self.trainable_shards:
            mask = torch.zeros(shard.tensor.shape, dtype=torch.bool)
            for binding in regions.get(id(shard.tensor), ()):
                binding.view(mask).fill_(True)
            mask = mask.view(-1)[shard.start : shard.end]
            if mask.all():
                counted.append((shard, None))
            elif mask.any():
                counted.append((shard, mask.to(shard.tensor.device)))
        return counted

    def _summed_shards(self) -> list[tuple[dist.ProcessGroup, list[Shard]]]:
        """Groups over which gradients are summed after their replicas, each with the shards of these gradients.

        Collective over these groups.
        """
        summed = []
        for name in get_args(GradientSum):
            shards = [s for s in self.trainable_shards if name in self.by_tensor[id(s.tensor)].gradient_sum]
            group = getattr(self.groups, name, None)
            assert group is not None or not shards, f"there is no process group {name!r} to sum gradients over"
            if group is None or group.size() == 1:
                continue
            ranges = [(tuple(shard.tensor.shape), shard.start, shard.end) for shard in shards]
            peers = _gather(ranges, group)
            assert all(peer == ranges for peer in peers), f"{name} ranks cut their gradients differently: {peers}"
            if shards:
                summed.append((group, shards))
        return summed


def binding_by_tensor(bindings: Iterable[Binding]) -> dict[int, Binding]:
    """The first binding of each tensor, by the tensor's id.

    Raises `ValueError` where bindings of one tensor name different groups: its gradient is summed as a whole.
    """
    found: dict[int, Binding] = {}
    for binding in bindings:
        first = found.setdefault(id(binding.tensor), binding)
        if set(first.gradient_sum) != set(binding.gradient_sum) or first.replicas != binding.replicas:
            named = (f"{b.name}: gradient_sum={b.gradient_sum!r}, replicas={b.replicas!r}" for b in (first, binding))
            raise ValueError("bindings of one tensor name different groups: " + "; ".join(named))
    return found


def _mark_for_megatron(bindings: Iterable[Binding]) -> None:
    """Set the attributes by which megatron-core's data parallelism sorts parameters into buffers and buckets.

    `allreduce = False` gives experts a buffer of their own, reduced over `expt_dp`. `shared_embedding` gives a tensor a
    bucket of its own, so that the shards of all pipeline stages hold the same elements of it.
    """
    for binding in bindings:
        if binding.replicas == "expt_dp":
            binding.tensor.allreduce = False  # type: ignore[attr-defined]
        if not {"embd", "pp"}.isdisjoint(binding.gradient_sum):
            binding.tensor.shared_embedding = True  # type: ignore[attr-defined]


def owned_bindings(bindings: Sequence[Binding], groups: ProcessGroupCollection) -> list[Binding]:
    """The bindings that this rank owns: it counts them in the norm and saves them, each replica its own shard.

    Several ranks may hold the same slice of a Hugging Face tensor: tensor-parallel replicas, key-value heads shared by
    part of the tensor-parallel group, a head tied across pipeline stages. The lowest rank of these owns it, together
    with its data-parallel replicas. Collective over `tp` and `pp`.
    """
    mine = [(_slice_key(b), dist.get_process_group_ranks(_replicas(b, groups))[0]) for b in bindings]
    owners: dict[SliceKey, int] = {}
    for stage in _gather(_gather(mine, groups.tp), groups.pp):
        for peer in stage:
            for key, holder in peer:
                owners[key] = min(holder, owners.get(key, holder))
    owned = {key: b for (key, holder), b in zip(mine, bindings, strict=True) if owners[key] == holder}
    return list(owned.values())


def _slice_key(binding: Binding) -> SliceKey:
    return binding.name, tuple((part.start, part.stop) for part in binding.index)


def _replicas(binding: Binding, groups: ProcessGroupCollection) -> dist.ProcessGroup:
    """The group whose ranks hold copies of the binding's tensor and shards of its optimizer state."""
    return groups.dp_cp if binding.replicas == "dp_cp" else groups.expt_dp


def _gather(value: list[Any], group: dist.ProcessGroup) -> list[list[Any]]:
    gathered: list[list[Any]] = [[] for _ in range(group.size())]
    dist.all_gather_object(gathered, value, group=group)
    return gathered


def _even_shard(tensor: Tensor, group: dist.ProcessGroup) -> Shard:
    count, parts, part = tensor.numel(), group.size(), group.rank()
    return Shard(tensor, count * part // parts, count * (part + 1) // parts)


def _wrap(
    module: BoundModule, groups: ProcessGroupCollection, trainable: Sequence[nn.Parameter]
) -> DistributedDataParallel:
    ddp_config = DistributedDataParallelConfig(use_distributed_optimizer=True, grad_reduce_in_fp32=True)
    config = copy.copy(module.config)
    config.calculate_per_token_loss = True  # gradients are summed, never averaged
    experts = getattr(groups, "expt_dp", None)
    layout = DistributedOptimizer.compute_full_param_layout(
        list(trainable), None, groups.dp_cp.size(), ddp_config, experts.size() if experts is not None else None
    )
    return DistributedDataParallel(config, ddp_config, module, pg_collection=groups, full_param_layout=layout)


def _distributed_adamw(ddp: DistributedDataParallel, buffers: list[Any], config: OptimConfig) -> DistributedOptimizer:
    """ZeRO-1 AdamW over the parameters of some gradient buffers.

    Built directly, because megatron-core's factory gathers parameter groups over the whole world, which modules on
    disjoint ranks cannot do together. torch's fused AdamW works on CPU and CUDA, so a checkpoint does not depend on
    installed optional packages.
    """
    parameters = [parameter for buffer in buffers for parameter in buffer.params]
    adamw = torch.optim.AdamW(
        [
            {"params": [p for p in parameters if p.ndim > 1], "weight_decay": config.weight_decay},
            {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
        ],
        lr=config.lr,
        betas=(config.beta1, config.beta2),
        eps=config.eps,
        fused=True,
    )
    settings = OptimizerConfig(optimizer="adam", lr=config.lr, use_distributed_optimizer=True, clip_grad=0.0)
    optimizer = DistributedOptimizer(
        adamw,
        settings,
        grad_scaler=None,
        init_state_fn=None,
        model_chunks=[ddp],
        per_model_buffers={0: buffers},
        data_parallel_group=buffers[0].data_parallel_group,
        data_parallel_group_gloo=None,
        data_parallel_group_idx=0,
        distributed_optimizer_instance_id=0,
    )
    optimizer._defer_param_sync = True  # once per module, by ModuleOptimizer.apply
    for main_weight in _main_weights(optimizer):  # state exists from the start: memory and checkpoints know its size
        adamw.state[main_weight] = {
            "step": torch.zeros((), dtype=torch.float32, device=main_weight.device),
            "exp_avg": torch.zeros_like(main_weight, requires_grad=False),
            "exp_avg_sq": torch.zeros_like(main_weight, requires_grad=False),
        }
    return optimizer


def _main_weights(optimizer: DistributedOptimizer) -> Iterable[Tensor]:
    return (weight for group in optimizer.optimizer.param_groups for weight in group["params"])


def _shards(optimizer: DistributedOptimizer) -> list[Shard]:
    shards = []
    for parameter, (group, order) in optimizer.model_param_group_index_map.items():
        span = optimizer._get_model_param_range_map(parameter)["param"]
        main_weight = optimizer.optimizer.param_groups[group]["params"][order]
        state = optimizer.optimizer.state[main_weight]
        moments = {kind: state[kind] for kind in ("exp_avg", "exp_avg_sq")}
        shards.append(Shard(parameter, span.start, span.end, {"main_weight": main_weight.detach()} | moments))
    return shards
