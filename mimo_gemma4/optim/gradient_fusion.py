"""Has megatron-core's linears add their weights' gradients to the fp32 buffers themselves."""

from megatron.core.tensor_parallel import layers
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from torch import Tensor, nn

from mimo_gemma4.weights.main_gradients import add_product, main_gradient


class WeightGradientKernels:
    """Takes the place of the CUDA extension that megatron-core's linears call for this."""

    @staticmethod
    def wgrad_gemm_accum_fp32(inputs: Tensor, gradient: Tensor, buffer: Tensor) -> None:
        """Add `gradient.T @ inputs` to `buffer`."""
        add_product(buffer, gradient, inputs)


def fuse_weight_gradients(module: nn.Module) -> None:
    """Turn it on for every trainable linear of a module that has its buffers.

    Linears that some part of the module lists as `unfused_linears` are left out: their weights are also used by
    functions that return gradients, and megatron-core takes one way or the other for a whole step.
    """
    layers.fused_weight_gradient_mlp_cuda = WeightGradientKernels
    unfused = {id(linear) for part in module.modules() for linear in getattr(part, "unfused_linears", ())}
    for linear in module.modules():
        if isinstance(linear, ColumnParallelLinear | RowParallelLinear) and id(linear) not in unfused:
            linear.gradient_accumulation_fusion = main_gradient(linear.weight) is not None
