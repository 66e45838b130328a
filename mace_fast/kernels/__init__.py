"""Generated kernels for the contractions of equivariant networks: description, plan, source, build, op.

Each public op takes a description and tensors in ``ir_mul`` layout (an irreps block is stored [2l+1, multiplicity]),
runs on CPU and CUDA in float32 and float64, is differentiable at least twice and gives the same bits every time.
"""

from mace_fast.kernels.description.channelwise import ChannelwiseTensorProduct, Path
from mace_fast.kernels.description.elementwise import ElementwiseTensorProduct
from mace_fast.kernels.description.fully_connected import FullyConnectedTensorProduct
from mace_fast.kernels.ops.channelwise import channelwise_tp, channelwise_tp_conv, describe_plan
from mace_fast.kernels.ops.elementwise import elementwise_tp
from mace_fast.kernels.ops.fully_connected import fully_connected_tp, fully_connected_tp_conv
from mace_fast.kernels.ops.graph import EdgeGraph, edge_graph
from mace_fast.kernels.ops.prepare import prepare

__all__ = [
    "ChannelwiseTensorProduct",
    "EdgeGraph",
    "ElementwiseTensorProduct",
    "FullyConnectedTensorProduct",
    "Path",
    "channelwise_tp",
    "channelwise_tp_conv",
    "describe_plan",
    "edge_graph",
    "elementwise_tp",
    "fully_connected_tp",
    "fully_connected_tp_conv",
    "prepare",
]
