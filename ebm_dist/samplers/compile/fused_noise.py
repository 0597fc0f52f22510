"""Noise that a compiled block draws inside its graph, from seeds that are inputs of the graph.

For GPUs. There a tape costs one more pass over memory and a launch for every draw of the block;
this noise is computed where it is used. It has the law that the kernel asks for, but other numbers
than the same generator gives to single steps.

A number is Philox-4x32-10 of the draw's seed and the number's index in the draw, and of nothing
else. So it is built on torch's `inductor_randint` and not on `inductor_random`: numbers of the
latter depend on the tiling of the GPU kernel that draws them (torch 2.13 for CUDA), and could not
be compared with anything. `in_torch` computes the same integers by torch's own operations, and the
compiled block is checked against those, to rounding.

Every draw of every block has a seed of 64 bits from the generator of the round. On the CPU the
compiler uses 32 of them, which is enough for tests and one more reason to use the tape there.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule

from ebm_dist.samplers.compile.recorded_noise import Draw, Tape

_RANGE = 2**56
"""Range of the integer behind a number: 32 bits for the radius of a normal number, 24 for its
angle. A power of two, so that the compiler's modulo is a mask, and below the sign bit of int64."""

_WORD = 2**32 - 1

_RANDINT = "prims.inductor_randint.default"


class SeededNoise:
    """The noise of `draws` as inputs of a graph: one seed for each draw that the graph makes.

    The graph makes normal and uniform draws in float32. All others stay on a tape, filled by one
    call for each kind: raw bits, since kernels view them as other integers, before which the
    compiler writes them to memory anyway; and float64, for which the compiler's Philox is too
    coarse.
    """

    def __init__(self, draws: Sequence[Draw], device: torch.device) -> None:
        self._draws = draws
        self.num_fused = sum(map(_is_fused, draws))
        """Number of draws that the graph makes itself."""
        seeds = torch.empty(self.num_fused, dtype=torch.int64, device=device)
        self._seeds = [seeds][: self.num_fused]
        self._rest = _Gathered([d for d in draws if not _is_fused(d)], device)

    def fill(self, generator: torch.Generator) -> list[Tensor]:
        """New inputs; advances `generator`, so that the next call gives others."""
        for seeds in self._seeds:
            seeds.random_(-(2**63), None, generator=generator)
        return [*self._seeds, *self._rest.fill(generator)]

    def numbers(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """The numbers of each draw, from the tensors that `fill` returned; for tracing."""
        # The import registers the two operations below.
        import torch._inductor.inductor_prims

        seeds, rest = inputs[: len(self._seeds)], iter(inputs[len(self._seeds) :])
        out: list[Tensor] = []
        num_seeds = 0
        for draw in self._draws:
            if not _is_fused(draw):
                out.append(next(rest))
                continue
            # A look-up by index, not a slice: the GPU kernels of all steps then differ in one
            # argument only, and are compiled once.
            seed = torch.ops.prims.inductor_lookup_seed.default(*seeds, num_seeds)
            size = list(draw.shape)
            whole = torch.ops.prims.inductor_randint.default(0, _RANGE, size, seed)
            out.append(_normal(draw, whole) if draw.method == "normal_" else _uniform(draw, whole))
            num_seeds += 1
        return out


def _is_fused(draw: Draw) -> bool:
    return draw.method in ("normal_", "uniform_") and draw.dtype == torch.float32


def _normal(draw: Draw, whole: Tensor) -> Tensor:
    """Box-Muller: a radius in [0, 6.66] and an angle."""
    mean, std = (*draw.arguments, *(0.0, 1.0)[len(draw.arguments) :])
    radius = (((whole & _WORD).float() + 1) * 2.0**-32).log().mul(-2).sqrt()
    number = radius * ((whole >> 32).float() * (2 * math.pi * 2.0**-24)).cos()
    return number if (mean, std) == (0, 1) else number * std + mean


def _uniform(draw: Draw, whole: Tensor) -> Tensor:
    """A uniform number of 24 bits, as torch's own; one of 32 bits could round to 1."""
    low, high = (*draw.arguments, *(0.0, 1.0)[len(draw.arguments) :])
    number = (whole >> 32).float() * 2.0**-24
    return number if (low, high) == (0, 1) else number * (high - low) + low


class _Gathered:
    """A tape that stores draws of one kind contiguously and fills them by one call."""

    _ALIGNMENT = 64
    """In numbers: each draw begins on a cache line, which compiled code relies on."""

    def __init__(self, draws: Sequence[Draw], device: torch.device) -> None:
        kinds: dict[Any, int] = {}
        at: list[tuple[Any, int]] = []
        for draw in draws:
            kind = (draw.method, draw.dtype, draw.arguments)
            at.append((kind, kinds.get(kind, 0)))
            size = -(-math.prod(draw.shape) // self._ALIGNMENT) * self._ALIGNMENT
            kinds[kind] = at[-1][1] + size
        self._tape = Tape([Draw(k[0], (size,), k[1], k[2]) for k, size in kinds.items()], device)
        whole = dict(zip(kinds, self._tape.memory))
        self._views = [
            whole[kind][start : start + math.prod(draw.shape)].view(draw.shape)
            for draw, (kind, start) in zip(draws, at)
        ]

    def fill(self, generator: torch.Generator) -> list[Tensor]:
        self._tape.fill(generator)
        return self._views


def in_torch(graph: GraphModule) -> GraphModule:
    """`graph` with its draws in torch operations that give the same numbers, to run uncompiled.

    A graph without draws is returned as it is.
    """
    if not any(str(node.target) == _RANDINT for node in graph.graph.nodes):
        return graph
    graph = copy.deepcopy(graph)
    for node in graph.graph.nodes:
        if str(node.target) == _RANDINT:
            node.target = philox
    graph.recompile()
    return graph


def philox(low: int, high: int, size: Sequence[int], seed: Tensor) -> Tensor:
    """Integers in [low, high), as torch's compiler draws them from `seed`.

    Philox-4x32-10 (Salmon et al., 2011) with the seed as key and the index as counter; uses two
    of its four words.
    """
    place = torch.arange(math.prod(size), device=seed.device)
    c0, c1, c2, c3 = place, *[torch.zeros_like(place)] * 3
    k0, k1 = seed & _WORD, (seed >> 32) & _WORD
    if seed.device.type == "cpu":
        k1 = torch.zeros_like(k1)
    for _ in range(10):
        # Products of 64 bits; that their top bit is the sign changes neither of the words.
        p0, p1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        high0, high1 = (p0 >> 32) & _WORD, (p1 >> 32) & _WORD
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, p1 & _WORD, high0 ^ c3 ^ k1, p0 & _WORD
        k0, k1 = (k0 + 0x9E3779B9) & _WORD, (k1 + 0xBB67AE85) & _WORD
    span = high - low
    assert span & (span - 1) == 0, "the sign of the words would matter"
    return ((c0 | (c1 << 32)) & (span - 1)).add(low).view(*size)
