"""Winograd's convolutions: a direct one's numbers, in both directions, and made of them once."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx

from ebm_dist.samplers import Engine, make, run_chain
from ebm_dist.samplers.compile import compiler, engine, winograd
from ebm_dist.samplers.compile.hoist import hoist
from ebm_dist.samplers.compile.rewrite import DECOMPOSITIONS
from ebm_dist.samplers.kernel import value_and_grad

CHANNELS_LAST = torch.channels_last

needs_lanes = pytest.mark.usefixtures("lanes")
needs_bf16 = pytest.mark.usefixtures("bf16_lanes")


@pytest.fixture
def lanes() -> None:
    if not winograd.available(torch.float32):
        pytest.skip("needs AVX-512 and a C++ compiler")


@pytest.fixture
def bf16_lanes() -> None:
    if not winograd.available(torch.bfloat16):
        pytest.skip("needs AVX-512 with bf16, no AMX, and a C++ compiler")


# kernel, stride, padding, height, width, channels in, channels out
LAYERS = [
    (3, 1, 1, 8, 8, 32, 48),
    (3, 1, 1, 7, 10, 24, 40),
    (3, 1, 0, 9, 6, 32, 32),
    (3, 1, 2, 7, 7, 40, 48),
    (3, 1, 1, 1, 2, 32, 32),
    (2, 1, 0, 9, 9, 16, 64),
    (2, 1, 1, 8, 5, 64, 16),
    (4, 2, 1, 16, 12, 24, 32),
    (4, 2, 0, 15, 13, 32, 32),
    (4, 2, 3, 13, 14, 32, 24),
    (4, 2, 2, 17, 8, 32, 32),
    (3, 2, 1, 9, 12, 32, 32),
    (6, 2, 2, 12, 13, 16, 24),
    (6, 3, 4, 14, 13, 16, 24),
]


@pytest.fixture(autouse=True)
def everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Wherever it is possible, fast or not."""
    monkeypatch.setattr(winograd, "_WORTHWHILE", float("inf"))


def layer(kernel: int, stride: int, padding: int, into: int, out: int) -> nn.Conv2d:
    torch.manual_seed(kernel + stride)
    conv = nn.Conv2d(into, out, kernel, stride, padding).requires_grad_(False)
    return conv.to(memory_format=CHANNELS_LAST)


def images(num: int, channels: int, height: int, width: int) -> Tensor:
    x = torch.randn(num, channels, height, width, generator=torch.Generator().manual_seed(1))
    return x.contiguous(memory_format=CHANNELS_LAST)


def traced(conv: nn.Conv2d, x: Tensor) -> tuple[Tensor, Tensor, Counter[str]]:
    """Output and gradient in `x` of a sum of cosines, as rewritten; and the calls."""

    def both(x: Tensor) -> list[Tensor]:
        x = x.detach().requires_grad_(True)
        with torch.enable_grad():
            y = conv(x)
            (grad,) = torch.autograd.grad(y.float().cos().sum(), [x])
        return [y.detach(), grad]

    graph = make_fx(both, DECOMPOSITIONS)(x)
    calls = Counter(str(node.target) for node in graph.graph.nodes)
    y, grad = graph(x)
    return y, grad, calls


def exact(conv: nn.Conv2d, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """In float64, with the gradient at the output that came."""
    x, weight = x.double().requires_grad_(True), conv.weight.double()
    bias = None if conv.bias is None else conv.bias.double()
    expected = torch.conv2d(x, weight, bias, conv.stride, conv.padding)
    (grad,) = torch.autograd.grad(expected, [x], -y.float().sin().double())
    return expected.detach(), grad


def off(came: Tensor, expected: Tensor) -> float:
    return float((came.double() - expected).norm() / expected.norm())


@needs_lanes
@pytest.mark.parametrize("squares", [(4, 4), (2, 3)])
@pytest.mark.parametrize("shape", LAYERS)
def test_both_directions_are_a_direct_convolutions_to_float32s_rounding(
    monkeypatch, shape, squares
):
    for_three, for_two = squares
    monkeypatch.setitem(winograd._SQUARES, torch.float32, {3: (for_three,), 2: (for_two,)})
    kernel, stride, padding, height, width, into, out = shape
    conv, x = layer(kernel, stride, padding, into, out), images(3, into, height, width)
    y, grad, calls = traced(conv, x)
    assert calls["ebm_dist.winograd.default"] == 2
    expected = exact(conv, x, y)
    for came, right in zip((y, grad), expected, strict=True):
        assert off(came, right) < (4e-6 if for_three == 4 else 1e-6)
        assert came.is_contiguous(memory_format=CHANNELS_LAST)


@needs_bf16
@pytest.mark.parametrize("shape", LAYERS)
def test_bfloat16_loses_less_than_a_bit_and_a_half_beside_a_direct_convolution(shape):
    kernel, stride, padding, height, width, into, out = shape
    conv = layer(kernel, stride, padding, into, out).bfloat16()
    x = images(3, into, height, width).bfloat16()
    y, grad, calls = traced(conv, x)
    assert calls["ebm_dist.winograd.default"] == 2
    assert y.dtype == grad.dtype == torch.bfloat16
    # A direct one rounds what comes out, by up to 2**-9 of each number: .0017 on average.
    for came, right in zip((y, grad), exact(conv, x, y), strict=True):
        assert off(came, right) < 2.8 * 0.0017


@needs_lanes
def test_an_image_has_the_same_output_in_any_company_and_with_any_number_of_threads():
    conv, x = layer(3, 1, 1, 32, 48), images(9, 32, 9, 7)
    threads = torch.get_num_threads()
    try:
        for num in (1, 2):
            torch.set_num_threads(num)
            whole = traced(conv, x)[:2]
            alone = traced(conv, x[4:5])[:2]
            for a, b in zip(whole, alone, strict=True):
                assert torch.equal(a[4:5], b)
    finally:
        torch.set_num_threads(threads)


@needs_lanes
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_not_finite_stays_with_its_image_and_is_not_hidden(dtype):
    if not winograd.available(dtype):
        pytest.skip("needs AVX-512 with bf16")
    conv, x = layer(3, 1, 1, 32, 48).to(dtype), images(3, 32, 8, 8).to(dtype)
    clean = traced(conv, x)[0]
    for bad in (float("nan"), float("inf")):
        x[1, 5, 3, 3] = bad
        y = traced(conv, x)[0]
        assert torch.equal(y[::2], clean[::2])
        assert not y[1, :, 3, 3].isfinite().any()


@needs_lanes
def test_other_convolutions_stay_the_librarys():
    x = images(2, 16, 9, 9)
    for conv in (
        nn.Conv2d(16, 16, 3, padding=1, groups=2),
        nn.Conv2d(16, 16, 3, padding=2, dilation=2),
        nn.Conv2d(16, 12, 3, padding=1),
        nn.Conv2d(16, 16, 1),
        nn.Conv2d(16, 16, 5, padding=2),
        nn.Conv2d(16, 16, (3, 2), padding=1),
        nn.Conv2d(16, 16, 3, padding=(1, 0)),
        nn.ConvTranspose2d(16, 16, 3),
    ):
        calls = traced(conv.requires_grad_(False).to(memory_format=CHANNELS_LAST), x)[2]  # type: ignore[arg-type]
        assert calls["ebm_dist.winograd.default"] == 0
    row_major = x.contiguous()
    assert traced(layer(3, 1, 1, 16, 16), row_major)[2]["ebm_dist.winograd.default"] == 0
    assert traced(layer(3, 1, 1, 16, 16).double(), x.double())[2]["ebm_dist.winograd.default"] == 0


@pytest.mark.parametrize(
    ("pixels", "m", "r", "numbers"),
    [(7, 3, 2, 4 + 3 + 3), (7, 4, 3, 6 + 5), (8, 4, 3, 6 + 6), (5, 4, 3, 5 + 5), (1, 2, 3, 3)],
)
def test_pixels_that_do_not_divide_are_made_of_tiles_a_pixel_smaller(pixels, m, r, numbers):
    assert winograd._numbers(pixels, m, r) == numbers


@needs_lanes
def test_it_is_taken_where_it_multiplies_less_and_not_for_a_few_channels(monkeypatch):
    monkeypatch.undo()
    for channels, expected in ((8, 0), (64, 2)):
        conv, x = layer(3, 1, 1, channels, channels), images(64, channels, 28, 28)
        assert traced(conv, x)[2]["ebm_dist.winograd.default"] == expected


@needs_lanes
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weights": torch.zeros(16, 8, 8)}, "weights of"),
        ({"weights": torch.zeros(36, 16, 8)}, "weights of"),
        ({"weights": torch.zeros(36, 8, 8).bfloat16()}, "one type"),
        ({"weights": torch.zeros(36, 8, 8).transpose(1, 2)}, "in a row"),
        ({"x": torch.zeros(2, 8, 9)}, "rank"),
        ({"x": torch.zeros(2, 4, 9, 9), "weights": torch.zeros(36, 4, 8)}, "in eights"),
        ({"x": torch.zeros(2, 8, 9, 9).double()}, "one type"),
        ({"bias": torch.zeros(7)}, "one type"),
        ({"m": 5, "weights": torch.zeros(49, 8, 8)}, "no squares"),
    ],
)
def test_what_it_cannot_compute_is_refused(change: dict[str, Any], message: str):
    given: dict[str, Any] = {
        "x": torch.zeros(2, 8, 9, 9),
        "weights": torch.zeros(36, 8, 8),
        "bias": None,
        "m": 4,
        **change,
    }
    with pytest.raises(RuntimeError, match=message):
        torch.ops.ebm_dist.winograd(*given.values(), 3, 9, 9, 1, 1, 1, 0)


class Net(nn.Module):
    """Two convolutions that Winograd's takes, behind one that it does not."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1),
            nn.SiLU(),
            nn.Conv2d(16, 24, 3, padding=1),
            nn.SiLU(),
            nn.Conv2d(24, 16, 4, stride=2, padding=1),
            nn.SiLU(),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x).flatten(1).sum(1)


@needs_lanes
def test_a_block_follows_single_steps_makes_its_weights_once_a_round_and_notices_new_ones(
    monkeypatch,
):
    graphs: list[Any] = []

    def keep(graph: Any, inputs: list[Tensor]) -> Any:
        graphs.append(graph)
        return lambda tensors: graph(*tensors)

    monkeypatch.setattr(engine, "compile_graph", keep)
    energy, kernel = (
        Net().eval().requires_grad_(False),
        make("langevin", step_size=0.01, temperature=0.01),
    )
    x = torch.rand(5, 1, 8, 8, generator=torch.Generator().manual_seed(3))
    blocks = Engine("compiled", background=False)
    ends = []
    for scale in (1.0, 1.2):
        with torch.no_grad():
            for p in energy.parameters():
                p.mul_(scale)
        came, expected = (
            run_chain(kernel, x, energy, 8, torch.Generator().manual_seed(4), engine=e)
            for e in (blocks, None)
        )
        torch.testing.assert_close(came.position, expected.position, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(came.energies, expected.energies, rtol=1e-4, atol=1e-4)
        ends.append(came.position)
    assert not torch.allclose(*ends, atol=1e-3)
    (steps,) = [g for g in graphs if "winograd.default" in g.code and "noise" not in g.code][1:]
    assert steps.code.count("ebm_dist.winograd.default(") % 4 == 0
    assert "winograd_weights.default(" not in steps.code


def test_what_depends_on_weights_alone_is_taken_out_once_and_the_rest_stays():
    def steps(x: Tensor, w: Tensor, v: Tensor, noise: Tensor) -> list[Tensor]:
        for _ in range(3):
            x = x + (2 * w).cos() + v.cos() + noise
        return [x, x.cos()]

    inputs = [torch.randn(4) for _ in range(4)]
    expected = steps(*inputs)
    graph = make_fx(steps)(*inputs)
    prepare = hoist(graph, slice(1, 3), (torch.ops.aten.cos.default,))
    assert prepare is not None
    assert Counter(str(n.target) for n in prepare.graph.nodes)["aten.cos.default"] == 2
    assert Counter(str(n.target) for n in graph.graph.nodes)["aten.cos.default"] == 1
    x, w, v, noise = inputs
    for came, right in zip(graph(x, w, v, *prepare(w, v), noise), expected, strict=True):
        torch.testing.assert_close(came, right)
    assert hoist(make_fx(steps)(*inputs), slice(1, 3), (torch.ops.aten.sin.default,)) is None


def test_without_a_compiler_convolutions_are_the_librarys(monkeypatch):
    monkeypatch.setattr(compiler, "missing", lambda: "there is no C++ compiler")
    winograd.available.cache_clear()
    try:
        assert traced(layer(3, 1, 1, 32, 32), images(2, 32, 8, 8))[2]["aten.convolution.default"]
    finally:
        winograd.available.cache_clear()


@needs_lanes
def test_a_compiler_that_makes_other_convolutions_is_noticed(monkeypatch):
    wrong = torch.kron(*[torch.ones(6, 3)] * 2)
    monkeypatch.setattr(winograd, "_of_taps", lambda m, r: wrong)
    with pytest.raises(compiler.CompilerFailed, match="are off by"):
        winograd._try(4, 3, torch.float32)


def test_the_energys_gradient_needs_no_winograd_where_nothing_convolves():
    energy = nn.Sequential(nn.Linear(2, 8), nn.SiLU(), nn.Linear(8, 1), nn.Flatten(0))
    graph = make_fx(lambda x: value_and_grad(energy.requires_grad_(False), x), DECOMPOSITIONS)(
        torch.randn(5, 2)
    )
    assert "winograd" not in graph.code


@needs_lanes
def test_a_processor_without_bfloat16_has_the_float32_ones(monkeypatch):
    tried = []
    monkeypatch.setattr(winograd, "_try", lambda m, r, dtype: tried.append(dtype))
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    winograd.available.cache_clear()
    try:
        assert winograd.available(torch.float32)
        assert not winograd.available(torch.bfloat16)
        assert set(tried) == {torch.float32}
    finally:
        winograd.available.cache_clear()
