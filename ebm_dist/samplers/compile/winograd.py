"""Computes inner convolutions of a compiled block by Winograd's algorithm, where that is cheaper.

A convolution with filters of r x r computes m x m pixels from n x n (n = m + r - 1) by n * n
products, where a direct one takes m * m * r * r (Lavin & Gray, 2016, arXiv:1509.09308). For 3 x 3
that is a quarter with m = 4, and four ninths with m = 2, which rounds less. torch has no such
algorithm on the CPU, and its direct convolutions already multiply at the processor's peak rate. A
convolution of stride s is one over s * s images side by side, with filters of ceil(r / s) on a
side, so Winograd's algorithm applies to it as well.

`winograd.cpp` keeps a few tiles at a time in the cache and calls the library for the products;
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
"""Interpolation points of Cook and Toom beside infinity, the same as in `toom.h`."""

_SQUARES = {
    torch.float32: {3: (4, 2), 2: (4, 3)},
    torch.bfloat16: {3: (2,), 2: (3,)},
}
"""Sides m of the squares of pixels, by r. Against a direct convolution float32 loses 2 bits with
the larger m and none with the smaller; bfloat16 would lose 3 of its 8 bits, and loses 1.3."""

_WORTHWHILE = 0.85
"""Winograd is used where it costs at most this share of a direct convolution."""


@dataclass(frozen=True, slots=True)
class _Costs:
    """Costs in units of one multiplication.

    Measured on two AVX-512 cores, for 8 to 256 channels of 3 x 3 to 28 x 28 pixels.
    """

    product: int = 0
    """Overhead of a matrix product, per tile."""
    move: int = 24
    """Transforming one number into a square, or out of it."""
    pixel: int = 1000
    """Overhead of a direct convolution, per pixel."""
    call: int = 8_000_000
    """Overhead of a direct convolution, per call."""
    lanes: tuple[int, ...] = (16,)
    """Channel counts that a direct convolution pads to: the smallest that holds all channels, or
    else a multiple of the largest."""


_COSTS = {
    torch.float32: _Costs(),
    torch.bfloat16: _Costs(product=700, call=16_000_000, lanes=(16, 32, 64)),
}

_LIBRARY = torch.library.Library("ebm_dist", "FRAGMENT")
_LIBRARY.define("winograd_weights(Tensor weight, int m, int stride, bool backwards) -> Tensor")
# Its implementation is in `winograd.cpp`; see `_load`.
_LIBRARY.define(
    "winograd(Tensor x, Tensor weights, Tensor? bias, int m, int r, int height, int width, "
    "int stride_in, int stride_out, int before_in, int before_out) -> Tensor"
)

HOISTABLE = (torch.ops.ebm_dist.winograd_weights.default,)
"""Operations on weights alone that are worth hoisting out of the steps."""


@dataclass(frozen=True, slots=True)
class Convolution:
    """A square convolution of one group, without dilation; for its forward and its gradient."""

    weight: Tensor  # (O, C, k, k)
    stride: int
    padding: int

    @property
    def r(self) -> int:
        """Side of the filters of each of the images side by side."""
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
    """The convolution of images `x` (B, C, H, W); None if Winograd is not implemented for it."""
    if x.ndim != 4 or transposed or groups != 1 or x.device.type != "cpu":
        return None
    if x.dtype not in _SQUARES or weight.dtype != x.dtype or not available(x.dtype):
        return None
    # Channels fill the lanes of a vector, so they must be adjacent in memory.
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
    # Whole rows of padding before the image are skipped: nobody needs their gradient.
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
    """The side m of the cheapest squares; None if a direct convolution is cheaper.

    Args:
        num_pixels: pixels of one image of the convolution's output.
        made: rows and columns that the squares cover.
    """
    out, into, kernel, _ = of.weight.shape
    dtype, images = of.weight.dtype, of.stride**2
    costs = _COSTS[dtype]
    read, written = (out, into) if backwards else (into, out)
    filled = next((n for n in costs.lanes if written <= n), _filled(written, costs.lanes[-1]))
    direct = num_pixels * (kernel**2 * read * filled + costs.pixel)
    # Channels of all images side by side.
    read, written = (out, images * into) if backwards else (images * into, out)
    products = read * _filled(written) + costs.move * (_filled(read) + _filled(written))

    def cost(m: int) -> int:
        down, across = (_numbers(pixels, m, of.r) for pixels in made)
        return down * across * (products + costs.product)

    best = min(_SQUARES[dtype][of.r], key=cost)
    limit = _WORTHWHILE * (num_images * direct + costs.call)
    return best if num_images * cost(best) <= limit else None


def _numbers(pixels: int, m: int, r: int) -> int:
    """Inputs for a row of `pixels`: m + r - 1 a tile of m pixels, one less where it has m - 1."""
    tiles = -(-pixels // m)
    return tiles * (m + r - 1) - min(tiles * m - pixels, tiles)


def _filled(channels: int, lanes: int = 16) -> int:
    return -(-channels // lanes) * lanes


@torch.library.impl(_LIBRARY, "winograd_weights", "CPU")
def _weights(weight: Tensor, m: int, stride: int, backwards: bool) -> Tensor:
    """Transform filters (O, C, k, k) to the matrices of `winograd`, (n * n, channels in, out)."""
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
    """The transform of the filters, rows and columns at once, (n * n, r * r)."""
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


def suits_processor(dtype: torch.dtype) -> bool:
    """Whether this processor multiplies `dtype` in vectors of 16.

    With AMX a direct bfloat16 convolution is faster than the transforms of Winograd's algorithm.
    """
    if not torch.cpu._is_avx512_supported() or not torch.backends.mkldnn.is_available():
        return False
    return dtype == torch.float32 or (
        torch.cpu._is_avx512_bf16_supported() and not torch.cpu._is_amx_tile_supported()
    )


@functools.cache
def available(dtype: torch.dtype) -> bool:
    """Whether the processor suits `dtype`, and there is a compiler.

    Raises:
        CompilerFailed: the compiler failed, or the compiled convolutions are wrong.
    """
    if not suits_processor(dtype) or compiler.missing() is not None:
        return False
    # Called while the steps are traced, and must not become part of the trace.
    with _disable_current_modes(), torch.no_grad():
        _load()
        # Only this dtype: the processor may lack instructions for others.
        for r, squares in _SQUARES[dtype].items():
            for m in squares:
                _try(m, r, dtype)
    return True


@functools.cache
def _load() -> None:
    compiler.load_source("".join(source.read_text(encoding="utf-8") for source in _SOURCES))


def _try(m: int, r: int, dtype: torch.dtype) -> None:
    """Compare with torch's convolution; `block` cannot, since its traced steps call this too."""
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
