"""Computes matrix products of a compiled block by oneDNN, on processors where MKL is slow.

torch multiplies float32 matrices by MKL. On an AMD EPYC with AVX-512 MKL reaches half of oneDNN's
rate at every size tried, from 512 chains of 64 by 64 to 1024 of 784 by 256, with one thread and
with two. torch's compiler uses oneDNN for constant weights only, and ours are inputs. So the graph
calls an operation defined here, which costs 3 us a call.
"""

from __future__ import annotations

import functools
from pathlib import Path

import torch
from torch import Tensor
from torch.fx import GraphModule

aten = torch.ops.aten

LEAST = 2**19
"""Least number of multiplications that repays the cost of the call. With a bias it is twice as
many, since MKL adds the bias at no cost."""

# Kept in a global: torch removes the operation when its library object is deleted.
_LIBRARY = torch.library.Library("ebm_dist", "DEF")
_LIBRARY.define("linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor")


@torch.library.impl(_LIBRARY, "linear", "CPU")
def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


@torch.library.register_fake("ebm_dist::linear", lib=_LIBRARY)
def _(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0])


@functools.cache
def mkl_holds_back() -> bool:
    """Whether torch multiplies by MKL on a processor that is not Intel's."""
    if not (torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()):
        return False
    try:
        return "GenuineIntel" not in Path("/proc/cpuinfo").read_text()
    except OSError:
        return False


def products_by_onednn(graph: GraphModule) -> None:
    """Replace the larger products of float32 matrices on the CPU by calls of oneDNN."""
    call = graph.graph.call_function
    for node in list(graph.graph.nodes):
        if node.kwargs:
            continue
        if node.target == aten.mm.default:
            (x, weight), bias, least = node.args, None, LEAST
        elif node.target == aten.addmm.default:
            (bias, x, weight), least = node.args, 2 * LEAST
        else:
            continue
        values = [n.meta["val"] for n in (x, weight, bias) if n is not None]
        if any(v.dtype != torch.float32 or v.device.type != "cpu" for v in values):
            continue
        num = node.meta["val"].numel() * weight.meta["val"].shape[0]
        if num < least or (bias is not None and bias.meta["val"].ndim != 1):
            continue
        with graph.graph.inserting_before(node):
            transposed = call(aten.t.default, (weight,))
            instead = call(torch.ops.ebm_dist.linear.default, (x, transposed, bias))
        instead.meta = dict(node.meta)
        node.replace_all_uses_with(instead)
        graph.graph.erase_node(node)
    graph.recompile()
