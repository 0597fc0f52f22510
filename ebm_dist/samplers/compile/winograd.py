"""Inner convolutions of a compiled block by Winograd's algorithm, where it multiplies less.

A convolution with filters of r x r makes m x m pixels from n x n (n = m + r - 1) by n * n products
where a direct one takes m * m * r * r of them (Lavin & Gray, 2016, arXiv:1509.09308): for 3 x 3 a
quarter with m = 4, four ninths with m = 2, which rounds less. torch has none on the CPU, and its
direct ones run at what the processor can multiply. A stride s is s * s images beside each other,
each with filters of ceil(r / s) on a side: Winograd's as well.

`winograd.cpp` moves a few tiles through the cache and leaves the products to the library;
`toom.h` has the transforms.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from ebm_dist.samplers.compile import compiler

_SOURCES = [Path(__file__).with_name(name) for name in ("toom.h", "winograd.cpp")]

_POINTS = (0, 1, -1, 2, -2)
"""Of Cook and Toom, as in the source; and infinity."""

_SQUARES = {
    torch.float32: {3: (4, 2), 2: (4, 3)},
    torch.bfloat16: {3: (2,), 2: (3,)},
}
"""Sides m of the squares of pixels, by r. float32 loses 2 bits to the larger ones and none to the
smaller, beside a direct convolution; bfloat16 would lose 3 of its 8 and loses 1.3."""

_WORTHWHILE = 0.85
"""Share of what a direct convolution costs that Winograd's may."""


@dataclass(frozen=True, slots=True)
class _Costs:
    """In multiplications: two AVX-512 cores, 8 to 256 channels of 3 x 3 to 28 x 28 pixels."""

    product: int = 0
    """Of a matrix product, a tile, beside its multiplications."""
    move: int = 24
    """To bring a number into a square, or out of it."""
    pixel: int = 1000
    """Of a direct convolution, each pixel."""
    call: int = 8_000_000
    """Of a direct convolution, each call."""
    lanes: tuple[int, ...] = (16,)
    """Channels that a direct convolution computes at the price of one: the least that hold all
    of them, the last one several times."""


_COSTS = {
    torch.float32: _Costs(),
    torch.bfloat16: _Costs(product=700, call=16_000_000, lanes=(16, 32, 64)),
}

_LIBRARY = torch.library.Library("ebm_dist", "FRAGMENT")
_LIBRARY.define("winograd_weights(Tensor weight, int m, int stride, bool backwards) -> Tensor")
# What computes it comes with the source; see `_load`.
_LIBRARY.define(
    "winograd(Tensor x, Tensor weights, Tensor? bias, int m, int r, int height, int width, "
    "int stride_in, int stride_out, int before_in, int before_out) -> Tensor"
)

ONCE_A_ROUND = (torch.ops.ebm_dist.winograd_weights.default,)
"""What a step computes of weights alone and is worth keeping."""


@dataclass(frozen=True, slots=True)
class Convolution:
    """What both its directions have in common: square, of one group, without dilation."""

    weight: Tensor  # (O, C, k, k)
    stride: int
    padding: int

    @property
    def r(self) -> int:
        """Taps on a side in each of the images beside each other."""
        return -(-self.weight.shape[2] // self.stride)


def convolution_of(
    x: Tensor,
    weight: Tensor,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    transposed: bool,
    groups: int,
) -> Convolution | None:
    """The convolution of images `x` (B, C, H, W), if Winograd's algorithm knows such ones."""
    if x.ndim != 4 or transposed or groups != 1 or x.device.type != "cpu":
        return None
    if x.dtype not in _SQUARES or weight.dtype != x.dtype or not available(x.dtype):
        return None
    # Without channels beside each other there would be nothing to fill the lanes with.
    if not x.is_contiguous(memory_format=torch.channels_last):
        return None
    sides = (weight.shape[2:], stride, padding, dilation)
    if any(len(set(side)) != 1 for side in sides) or dilation[0] != 1:
        return None
    if weight.shape[0] % 8 or weight.shape[1] % 8:
        return None
    of = Convolution(weight, stride[0], padding[0])
    return of if of.padding < weight.shape[2] and of.r in _SQUARES[x.dtype] else None


def forward(of: Convolution, x: Tensor, bias: Tensor | None) -> Tensor | None:
    """The convolution of `x` (B, C, H, W), or None where a direct one is as fast."""
    kernel = of.weight.shape[2]
    height, width = ((d + 2 * of.padding - kernel) // of.stride + 1 for d in x.shape[2:])
    m = _square(of, x.shape[0], height * width, (height, width), backwards=False)
    if m is None:
        return None
    weights = torch.ops.ebm_dist.winograd_weights(of.weight, m, of.stride, False)
    return torch.ops.ebm_dist.winograd(
        x, weights, bias, m, of.r, height, width, of.stride, 1, of.padding, 0
    )


def gradient(of: Convolution, grad: Tensor, x: Tensor) -> Tensor | None:
    """The gradient in `x` (B, C, H, W) from that in the output, or None as in `forward`."""
    height, width = x.shape[2:]
    # Rows of pixels that the padding has before the image are not asked for, if whole ones.
    skipped, before = divmod(of.padding, of.stride)
    made = -(-(height + before) // of.stride), -(-(width + before) // of.stride)
    m = _square(of, x.shape[0], grad.shape[2] * grad.shape[3], made, backwards=True)
    if m is None:
        return None
    weights = torch.ops.ebm_dist.winograd_weights(of.weight, m, of.stride, True)
    return torch.ops.ebm_dist.winograd(
        grad, weights, None, m, of.r, height, width, 1, of.stride, of.r - 1 - skipped, before
    )


def _square(
    of: Convolution, num_images: int, num_pixels: int, made: tuple[int, int], *, backwards: bool
) -> int | None:
    """The side of the cheapest squares, if they are cheaper than a direct convolution.

    Args:
        num_pixels: of the convolution's output, one image.
        made: rows and columns that are made of squares.
    """
    out, into, kernel, _ = of.weight.shape
    dtype, images = of.weight.dtype, of.stride**2
    costs = _COSTS[dtype]
    read, written = (out, into) if backwards else (into, out)
    filled = next((n for n in costs.lanes if written <= n), _filled(written, costs.lanes[-1]))
    direct = num_pixels * (kernel**2 * read * filled + costs.pixel)
    # All images of a stride beside each other.
    read, written = (out, images * into) if backwards else (images * into, out)
    products = read * _filled(written) + costs.move * (_filled(read) + _filled(written))

    def cost(m: int) -> int:
        down, across = (_numbers(pixels, m, of.r) for pixels in made)
        return down * across * (products + costs.product)

    best = min(_SQUARES[dtype][of.r], key=cost)
    limit = _WORTHWHILE * (num_images * direct + costs.call)
    return best if num_images * cost(best) <= limit else None


def _numbers(pixels: int, m: int, r: int) -> int:
    """What `pixels` in a row are made of: those of tiles of m, the last of them m - 1."""
    tiles = -(-pixels // m)
    return tiles * (m + r - 1) - min(tiles * m - pixels, tiles)


def _filled(channels: int, lanes: int = 16) -> int:
    return -(-channels // lanes) * lanes


@torch.library.impl(_LIBRARY, "winograd_weights", "CPU")
def _weights(weight: Tensor, m: int, stride: int, backwards: bool) -> Tensor:
    """Filters (O, C, k, k) as the n * n matrices of `winograd`, (n * n, channels in, out)."""
    out, into, kernel, _ = weight.shape
    r = -(-kernel // stride)
    more = r * stride - kernel
    taps = torch.nn.functional.pad(weight.float(), (0, more, 0, more))
    taps = taps.view(out, into, r, stride, r, stride)
    if backwards:
        taps = taps.permute(2, 4, 0, 3, 5, 1).flip(0, 1)
        wide = (out, stride * stride * into)
    else:
        taps = taps.permute(2, 4, 3, 5, 1, 0)
        wide = (stride * stride * into, out)
    matrices = (_of_taps(m, r) @ taps.reshape(r * r, -1)).view(-1, *wide)
    if weight.dtype == torch.float32:
        return matrices
    # Products in bfloat16 read two rows at a time.
    pairs = matrices.to(weight.dtype).unflatten(1, (-1, 2)).transpose(2, 3)
    return pairs.contiguous().view(matrices.shape)


@torch.library.register_fake("ebm_dist::winograd_weights", lib=_LIBRARY)
def _(weight: Tensor, m: int, stride: int, backwards: bool) -> Tensor:
    out, into, kernel, _ = weight.shape
    n = m + -(-kernel // stride) - 1
    wide = (stride**2 * into, out)
    return weight.new_empty((n * n, *(wide[::-1] if backwards else wide)))


@functools.cache
def _of_taps(m: int, r: int) -> Tensor:
    """(n * n, r * r): what the filters are multiplied by, in both directions at once."""
    points = [Fraction(p) for p in _POINTS[: m + r - 2]]
    rows = []
    for p in points:
        scale = Fraction(1)
        for other in points:
            scale *= p - other if other != p else 1
        rows.append([float(p**j / scale) for j in range(r)])
    rows.append([0.0] * (r - 1) + [1.0])
    one = torch.tensor(rows, dtype=torch.float64)
    return torch.kron(one, one).float()


@torch.library.register_fake("ebm_dist::winograd", lib=_LIBRARY)
def _(
    x: Tensor,
    weights: Tensor,
    bias: Tensor | None,
    m: int,
    r: int,
    height: int,
    width: int,
    stride_in: int,
    stride_out: int,
    before_in: int,
    before_out: int,
) -> Tensor:
    size = (x.shape[0], weights.shape[2] // stride_out**2, height, width)
    return x.new_empty(size).contiguous(memory_format=torch.channels_last)


@functools.cache
def available(dtype: torch.dtype) -> bool:
    """Whether this processor multiplies `dtype` in vectors of 16, and there is a compiler.

    With tiles (AMX) a direct bfloat16 convolution is faster than the moves of Winograd's.

    Raises:
        CompilerFailed: the compiler failed, or made something else of the source.
    """
    if not torch.cpu._is_avx512_supported() or not torch.backends.mkldnn.is_available():
        return False
    if dtype == torch.bfloat16 and (
        not torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    ):
        return False
    if compiler.missing() is not None:
        return False
    # A tracer asks, and would trace this too.
    with _disable_current_modes(), torch.no_grad():
        _load()
        # Of no other type: the processor may not have it.
        for r, squares in _SQUARES[dtype].items():
            for m in squares:
                _try(m, r, dtype)
    return True


@functools.cache
def _load() -> None:
    compiler.load_source("".join(source.read_text(encoding="utf-8") for source in _SOURCES))


def _try(m: int, r: int, dtype: torch.dtype) -> None:
    """Blocks are compared with their trace, and this is in both."""
    generator = torch.Generator().manual_seed(m)
    x = torch.randn(2, 8, 9, 9, generator=generator)
    weight = torch.randn(8, 8, r, r, generator=generator)
    expected = torch.conv2d(x, weight, padding=1)
    weights = _weights(weight.to(dtype), m, 1, False)
    try:
        came = torch.ops.ebm_dist.winograd(
            x.to(dtype), weights, None, m, r, *expected.shape[2:], 1, 1, 1, 0
        )
    except RuntimeError as error:
        line = str(error).splitlines()[0][:200]
        raise compiler.CompilerFailed(f"compiled convolutions fail here: {line}") from error
    off = (came.float() - expected).norm() / expected.norm()
    if not off < (1e-5 if dtype == torch.float32 else 0.02):
        raise compiler.CompilerFailed(
            f"compiled convolutions are off by {off:.2g}; see {_SOURCES[-1]}"
        )
