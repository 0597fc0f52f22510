"""What a graph of steps is rewritten to before it is compiled: the same numbers, to rounding.

One rewriting is for correctness. The others say what torch's compiler (2.13) does not see, and
are worth 9% at 4096 chains of an MLP 2-64-64-1 and 15% at 512 (one AVX-512 core).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

aten = torch.ops.aten


def _mm(a: Tensor, b: Tensor) -> Tensor:
    # Of (B, 1) and (1, N): the gradient of a head with one output. As a product it is a call that
    # writes a whole layer; written out, it disappears into the loop that reads it. Longer
    # sides were tried: 2 gains nothing, and (B, K) @ (K, 1) as a sum costs 20%.
    return a * b if a.shape[1] == 1 and a.dtype == b.dtype else NotImplemented


_FEW_CHANNELS = 4
"""Of images. The library's gradient fills the lanes of a vector with channels, most of them with
nothing here: a strided stem (24 filters of 4x4, stride 2, on 32 images of 1x28x28) took .7 ms of a
step of 5.2 ms on one AVX-512 core, and .2 ms so. Where patches overlap more, as those of 3x3 at
stride 1, the products are larger than what they save (bf16, 64 filters: a sixth slower)."""


def _convolution_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias_sizes: Any,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    transposed: bool,
    output_padding: list[int],
    groups: int,
    output_mask: list[bool],
) -> Any:
    # The last step of an energy's gradient, from the first convolution back into the image: one
    # product gives what each output says of each tap of its patch, and what a pixel gets from
    # all patches that hold it is a sum of shifts, which the compiler makes one loop.
    if (
        list(output_mask) != [True, False, False]
        or transposed
        or groups != 1
        or x.ndim != 4
        or x.shape[1] > _FEW_CHANNELS
        or any(k > 2 * s for k, s in zip(weight.shape[2:], stride))
        or any(d != 1 for d in dilation)
    ):
        return NotImplemented
    num, channels, *size = x.shape
    out_channels, _, *kernel = weight.shape
    rows, columns = grad.shape[2:]
    products = grad.permute(0, 2, 3, 1).reshape(-1, out_channels) @ weight.permute(
        0, 2, 3, 1
    ).reshape(out_channels, -1)
    taps = products.reshape(num, rows, columns, *kernel, channels)
    # In the padded image pixel i = stride * m + r lies in the patches m, m - 1, ... that look at
    # it through the taps r, r + stride, ...
    across = [-(-(n + 2 * p) // s) for n, p, s in zip(size, padding, stride)]
    phases = []
    for r in range(stride[0]):
        for q in range(stride[1]):
            pieces = []
            for i, u in enumerate(range(r, kernel[0], stride[0])):
                for j, v in enumerate(range(q, kernel[1], stride[1])):
                    fill = (0, 0, j, across[1] - columns - j, i, across[0] - rows - i)
                    pieces.append(aten.constant_pad_nd(taps[:, :, :, u, v], fill))
            zero = taps.new_zeros(num, *across, channels)
            phases.append(functools.reduce(torch.add, pieces) if pieces else zero)
    whole = torch.stack(phases).reshape(*stride, num, *across, channels)
    image = whole.permute(2, 5, 3, 0, 4, 1).reshape(
        num, channels, across[0] * stride[0], across[1] * stride[1]
    )
    image = image[:, :, padding[0] : padding[0] + size[0], padding[1] : padding[1] + size[1]]
    # As the library lays it out: the next block takes it as it comes.
    channels_last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    layout = torch.channels_last if channels_last else torch.contiguous_format
    return image.contiguous(memory_format=layout), None, None


DECOMPOSITIONS: dict[Any, Callable[..., Any]] = {
    aten.mm.default: _mm,
    aten.convolution_backward.default: _convolution_backward,
}
"""For the tracer: what products are written out as."""


def share_sigmoids(graph: GraphModule) -> None:
    """SiLU and its derivative at one place from one sigmoid, which costs as much as all else there.

    That the place has not been overwritten in between is autograd's promise to the derivative.
    """
    nodes, call = list(graph.graph.nodes), graph.graph.call_function
    wanted = {node.args[1] for node in nodes if node.target == aten.silu_backward.default}
    sigmoids: dict[Any, Node] = {}
    for node in nodes:
        with graph.graph.inserting_before(node):
            if node.target == aten.silu.default and node.args[0] in wanted:
                (x,) = node.args
                sigmoids[x] = call(aten.sigmoid.default, (x,))
                instead = call(aten.mul.Tensor, (x, sigmoids[x]))
            elif node.target == aten.silu_backward.default and node.args[1] in sigmoids:
                grad, x = node.args
                s = sigmoids[x]
                # d/dx x s(x) = s (1 + x (1 - s))
                slope = call(aten.mul.Tensor, (x, call(aten.rsub.Scalar, (s, 1))))
                slope = call(aten.mul.Tensor, (s, call(aten.add.Scalar, (slope, 1))))
                instead = call(aten.mul.Tensor, (grad, slope))
            else:
                continue
        instead.meta = dict(node.meta)
        node.replace_all_uses_with(instead)
        graph.graph.erase_node(node)
    graph.recompile()


def scale_before_adding(graph: GraphModule) -> None:
    """x + alpha * y as two operations.

    torch's compiler (2.13) fuses `add(x, mm(a, b), alpha=c)` into one product and loses c:
    seen as a drift h times too large. Two operations are fused as well, and rightly.
    """
    adds = (aten.add.Tensor, aten.add_.Tensor, aten.sub.Tensor, aten.sub_.Tensor)
    for node in list(graph.graph.nodes):
        if node.target in adds and node.kwargs.get("alpha", 1) != 1:
            with graph.graph.inserting_before(node):
                scaled = graph.graph.call_function(
                    aten.mul.Tensor, (node.args[1], node.kwargs["alpha"])
                )
                scaled.meta = dict(node.meta)
            node.args = (node.args[0], scaled)
            node.kwargs = {}
    graph.recompile()
