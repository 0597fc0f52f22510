"""Integrals of exp(-E/T) by composite Gauss-Legendre quadrature, in float64."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor


def gauss_legendre(edges: Sequence[float] | np.ndarray, order: int = 16) -> tuple[Tensor, Tensor]:
    """Nodes and weights (P * order,) on the panels between `edges` (P + 1,), increasing.

    Exact for polynomials of degree 2 * order - 1 on each panel; put kinks on an edge.
    """
    unit_node, unit_weight = np.polynomial.legendre.leggauss(order)
    edges = np.asarray(edges, dtype=np.float64)
    half = 0.5 * np.diff(edges)[:, None]
    centre = 0.5 * (edges[1:] + edges[:-1])[:, None]
    node = (centre + half * unit_node).reshape(-1)
    weight = (half * unit_weight).reshape(-1)
    return torch.from_numpy(node), torch.from_numpy(weight)


def log_integral(
    energy: Callable[[Tensor], Tensor],
    edges: Sequence[Sequence[float] | np.ndarray],
    temperature: float = 1.0,
    order: int = 16,
) -> float:
    """log of the integral of exp(-energy/T) over a box, panels given for each dimension.

    Args:
        energy: maps float64 (B, D) to (B,).
        edges: for each of the D dimensions the increasing panel edges; D is 1 or 2.
    """
    grids = [gauss_legendre(edge, order) for edge in edges]
    parts = []
    # Slab by slab along the first dimension: a 2-D grid has millions of nodes.
    chunk = max(1, 2**18 // math.prod(len(node) for node, _ in grids[1:]))
    first_node, first_weight = grids[0]
    with torch.no_grad():
        for start in range(0, len(first_node), chunk):
            nodes = [first_node[start : start + chunk], *(node for node, _ in grids[1:])]
            weights = [first_weight[start : start + chunk], *(weight for _, weight in grids[1:])]
            x = torch.stack(torch.meshgrid(*nodes, indexing="ij"), -1).reshape(-1, len(grids))
            log_weight = torch.zeros(())
            for weight in weights:
                log_weight = log_weight[..., None] + weight.log()
            parts.append((log_weight.reshape(-1) - energy(x) / temperature).logsumexp(0))
    return torch.stack(parts).logsumexp(0).item()
