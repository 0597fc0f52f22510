"""Noise that a compiled block draws inside its own graph, from seeds that are inputs of it.

For GPUs. There a tape is a pass of its own over memory, and a launch for every draw of the block;
this noise is computed where it is used. It has the law that a kernel asked for, and other numbers
than the same generator gives to single steps.

A number is Philox-4x32-10 of a draw's seed and the number's place in the draw, and of nothing
else. That is why torch's `inductor_randint` is at the bottom of it and not its `inductor_random`,
whose numbers depend on how the kernel that draws them is tiled (torch 2.13 for CUDA), so that
nothing could be compared with them. `in_torch` writes the same integers out in torch's
own operations: what the compiler made is checked against that to rounding.

Every draw of every block has 64 bits of seed, from the generator of the round. On the CPU the
compiler keeps 32 of them, enough for tests and one more reason to have the tape there.
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
"""Of the integer behind a number: 32 bits for the radius of a normal number, 24 for its angle. A
power of two, so that the compiler's division is a mask, and below the sign of 64 bits."""

_WORD = 2**32 - 1

_RANDINT = "prims.inductor_randint.default"


class SeededNoise:
    """The noise of `draws` as inputs of a graph: one seed for each that the graph draws itself.

    Those are normal and uniform numbers in float32. The rest stays on a tape, filled by one call
    for each kind: raw bits, since whoever asks for them looks at them as other integers, before
    which the compiler would write them to memory anyway; and float64, for which Philox as the
    compiler has it is too coarse.
    """

    def __init__(self, draws: Sequence[Draw], device: torch.device) -> None:
        self._draws = draws
        self.num_fused = sum(map(_is_fused, draws))
        """Draws that the graph makes itself."""
        seeds = torch.empty(self.num_fused, dtype=torch.int64, device=device)
        self._seeds = [seeds][: self.num_fused]
        self._rest = _Gathered([d for d in draws if not _is_fused(d)], device)

    def fill(self, generator: torch.Generator) -> list[Tensor]:
        """New inputs; `generator` is advanced, so the next call's are others."""
        for seeds in self._seeds:
            seeds.random_(-(2**63), None, generator=generator)
        return [*self._seeds, *self._rest.fill(generator)]

    def numbers(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """The numbers of each draw, from `inputs` as `fill` gives them; for tracing."""
        # It registers the two operations below.
        import torch._inductor.inductor_prims

        seeds, rest = inputs[: len(self._seeds)], iter(inputs[len(self._seeds) :])
        out: list[Tensor] = []
        num_seeds = 0
        for draw in self._draws:
            if not _is_fused(draw):
                out.append(next(rest))
                continue
            # Looked up by the one and not sliced: the steps' kernels are then alike but for
            # an argument, and compiled once.
            seed = torch.ops.prims.inductor_lookup_seed.default(*seeds, num_seeds)
            size = list(draw.shape)
            whole = torch.ops.prims.inductor_randint.default(0, _RANGE, size, seed)
            out.append(_normal(draw, whole) if draw.method == "normal_" else _uniform(draw, whole))
            num_seeds += 1
        return out


def _is_fused(draw: Draw) -> bool:
    return draw.method in ("normal_", "uniform_") and draw.dtype == torch.float32


def _normal(draw: Draw, whole: Tensor) -> Tensor:
    """Box and Muller's: a radius in (0, 6.66], and an angle."""
    mean, std = (*draw.arguments, *(0.0, 1.0)[len(draw.arguments) :])
    radius = (((whole & _WORD).float() + 1) * 2.0**-32).log().mul(-2).sqrt()
    number = radius * ((whole >> 32).float() * (2 * math.pi * 2.0**-24)).cos()
    return number if (mean, std) == (0, 1) else number * std + mean


def _uniform(draw: Draw, whole: Tensor) -> Tensor:
    """Of 24 bits, as torch's own: never 1, which a float of 32 bits would be rounded to."""
    low, high = (*draw.arguments, *(0.0, 1.0)[len(draw.arguments) :])
    number = (whole >> 32).float() * 2.0**-24
    return number if (low, high) == (0, 1) else number * (high - low) + low


class _Gathered:
    """A tape whose draws of one kind lie side by side and are drawn by one call."""

    _APART = 64
    """Numbers: each draw begins on a cache line, as compiled code was promised."""

    def __init__(self, draws: Sequence[Draw], device: torch.device) -> None:
        kinds: dict[Any, int] = {}
        at: list[tuple[Any, int]] = []
        for draw in draws:
            kind = (draw.method, draw.dtype, draw.arguments)
            at.append((kind, kinds.get(kind, 0)))
            kinds[kind] = at[-1][1] + -(-math.prod(draw.shape) // self._APART) * self._APART
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
    """`graph` with the draws written out, to be run without a compiler; the same numbers.

    Without them, the graph itself.
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
    """Whole numbers in [low, high), as torch's compiler draws them from `seed`.

    Philox-4x32-10 (Salmon et al., 2011) with the seed as key and the place as counter, two of
    its four words.
    """
    place = torch.arange(math.prod(size), device=seed.device)
    c0, c1, c2, c3 = place, *[torch.zeros_like(place)] * 3
    k0, k1 = seed & _WORD, (seed >> 32) & _WORD
    if seed.device.type == "cpu":
        k1 = torch.zeros_like(k1)
    for _ in range(10):
        # Products of 64 bits; that the sign's bit belongs to them makes no difference to words.
        p0, p1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        high0, high1 = (p0 >> 32) & _WORD, (p1 >> 32) & _WORD
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, p1 & _WORD, high0 ^ c3 ^ k1, p0 & _WORD
        k0, k1 = (k0 + 0x9E3779B9) & _WORD, (k1 + 0xBB67AE85) & _WORD
    span = high - low
    assert span & (span - 1) == 0, "the sign of the words would matter"
    return ((c0 | (c1 << 32)) & (span - 1)).add(low).view(*size)
