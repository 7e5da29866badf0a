"""megatron-core's layers, data parallelism and optimizer on gloo train like plain torch in one process.

TP 2 x DP 2 with sequence parallelism against one process: weights after three clipped AdamW steps agree to 1e-6 of the
largest weight, a few fp32 roundings; gradient norms to 1e-6. A wrong factor or a missing reduction is off by percents.
"""

import math

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core import tensor_parallel
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig, get_megatron_optimizer
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear, VocabParallelEmbedding
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from mimo_gemma4.distributed.layout import ModuleLayout, build_layout
from mimo_gemma4.distributed.platform import create_platform
from mimo_gemma4.distributed.process_groups import create_process_groups
from tests.dist.harness import run_ranks

VOCAB, HIDDEN, INNER, LENGTH, ROWS, STEPS = 12, 8, 16, 8, 4, 3
CLIP = 0.05
SHAPES = {"embedding": (VOCAB, HIDDEN), "up": (INNER, HIDDEN), "down": (HIDDEN, INNER), "bias": (HIDDEN,)} | {
    "head": (VOCAB, HIDDEN)
}


def reference_weights() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator) * 0.3 for name, shape in SHAPES.items()}


def tokens() -> Tensor:
    return torch.randint(VOCAB, (STEPS, ROWS, LENGTH + 1), generator=torch.Generator().manual_seed(1))


def reference_steps() -> tuple[list[float], dict[str, Tensor]]:
    """Norms before clipping and final weights, from torch alone."""
    weights = {name: weight.requires_grad_() for name, weight in reference_weights().items()}
    optimizer = torch.optim.AdamW(weights.values(), lr=0.01, weight_decay=0.1, betas=(0.9, 0.95), eps=1e-5)
    norms = []
    for batch in tokens():
        x = F.embedding(batch[:, :-1], weights["embedding"])
        x = x + F.gelu(x @ weights["up"].T) @ weights["down"].T + weights["bias"]
        loss = F.cross_entropy((x @ weights["head"].T).flatten(0, 1), batch[:, 1:].flatten(), reduction="sum")
        optimizer.zero_grad()
        loss.backward()
        norms.append(torch.nn.utils.clip_grad_norm_(weights.values(), CLIP).item())
        optimizer.step()
    return norms, {name: weight.detach() for name, weight in weights.items()}


class Model(MegatronModule):
    def __init__(self, groups: ProcessGroupCollection):
        config = TransformerConfig(
            num_layers=1,
            hidden_size=HIDDEN,
            num_attention_heads=4,
            tensor_model_parallel_size=groups.tp.size(),
            sequence_parallel=groups.tp.size() > 1,
            calculate_per_token_loss=True,
            use_cpu_initialization=True,
            gradient_accumulation_fusion=False,
        )
        super().__init__(config)
        self.groups = groups
        init = torch.nn.init.zeros_
        shared = {"config": config, "init_method": init, "tp_group": groups.tp}
        linear = shared | {"skip_bias_add": False}
        self.embedding = VocabParallelEmbedding(VOCAB, HIDDEN, reduce_scatter_embeddings=True, **shared)
        self.up = ColumnParallelLinear(HIDDEN, INNER, bias=False, gather_output=False, **linear)
        self.down = RowParallelLinear(INNER, HIDDEN, bias=True, input_is_parallel=True, **linear)
        self.head = ColumnParallelLinear(HIDDEN, VOCAB, bias=False, gather_output=False, **linear)
        with torch.no_grad():
            for name, weight in reference_weights().items():
                self.local(name).copy_(self.cut(name, weight))

    def local(self, name: str) -> Tensor:
        return self.down.bias if name == "bias" else getattr(self, name).weight

    def cut(self, name: str, whole: Tensor) -> Tensor:
        tp = self.groups.tp
        return whole if name == "bias" else whole.chunk(tp.size(), dim=1 if name == "down" else 0)[tp.rank()]

    def forward(self, batch: Tensor) -> Tensor:
        x = self.embedding(batch[:, :-1])
        x = x + self.down(F.gelu(self.up(x)[0]))[0]
        logits = self.head(x)[0]
        labels = batch[:, 1:].T.contiguous()
        return tensor_parallel.vocab_parallel_cross_entropy(logits, labels, tp_group=self.groups.tp).sum()


def build(groups: ProcessGroupCollection, overlap: bool) -> tuple[DistributedDataParallel, MegatronOptimizer]:
    model = Model(groups)
    reduction = DistributedDataParallelConfig(
        use_distributed_optimizer=True, grad_reduce_in_fp32=True, overlap_grad_reduce=overlap
    )
    ddp = DistributedDataParallel(model.config, reduction, model, pg_collection=groups)
    options = OptimizerConfig(
        optimizer="adam",
        lr=0.01,
        weight_decay=0.1,
        adam_beta2=0.95,
        adam_eps=1e-5,
        clip_grad=CLIP,
        use_distributed_optimizer=True,
    )
    optimizer = get_megatron_optimizer(
        options, [ddp], config_overrides={}, use_gloo_process_groups=False, pg_collection=groups
    )
    return ddp, optimizer


def language_groups(tp: int) -> ProcessGroupCollection:
    layout = build_layout({"language": ModuleLayout(tp=tp, sequence_parallel=True)}, dist.get_world_size())
    return create_process_groups(layout, create_platform()).modules["language"]


def step(
    ddp: DistributedDataParallel, optimizer: MegatronOptimizer, groups: ProcessGroupCollection, batch: Tensor
) -> float:
    """One optimizer step on this lane's samples; the gradient norm before clipping."""
    ddp.zero_grad_buffer()
    optimizer.zero_grad()
    ddp(batch[groups.dp.rank() :: groups.dp.size()]).backward()
    finalize_model_grads([ddp], None, pg_collection=groups)
    succeeded, norm, _ = optimizer.step()
    assert succeeded
    return float(norm)


def train(rank: int, tp: int, overlap: bool) -> tuple[list[float], dict[str, float]]:
    groups = language_groups(tp)
    ddp, optimizer = build(groups, overlap)
    norms = [step(ddp, optimizer, groups, batch) for batch in tokens()]
    errors = {}
    for name, expected in reference_steps()[1].items():
        local = ddp.module.local(name)
        errors[name] = ((local - ddp.module.cut(name, expected)).abs().max() / expected.abs().max()).item()
    return norms, errors


@pytest.mark.parametrize(("tp", "overlap"), [(1, False), (2, False), (2, True), (4, False)])
def test_training_on_gloo_equals_one_process(tp: int, overlap: bool) -> None:
    norms = reference_steps()[0]
    assert all(norm > 2 * CLIP for norm in norms), "clipping must act, or the test proves nothing about it"
    for rank_norms, errors in run_ranks(4, train, tp, overlap):
        assert all(math.isclose(a, b, rel_tol=1e-6) for a, b in zip(rank_norms, norms, strict=True))
        assert max(errors.values()) < 1e-6, errors
