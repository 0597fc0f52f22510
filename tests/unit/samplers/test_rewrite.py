"""The rewriting of traced steps: fewer sigmoids and products, and the same numbers."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx

from ebm_dist.samplers.compile.rewrite import DECOMPOSITIONS, share_sigmoids
from ebm_dist.samplers.kernel import value_and_grad


class Squares(nn.Module):
    """Puts one pre-activation to two uses, and overwrites what a SiLU made of another."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(3, 8), nn.Linear(8, 8), nn.Linear(8, 1)

    def forward(self, x: Tensor) -> Tensor:
        before = self.first(x)
        h = nn.functional.silu(before)
        h = self.second(h) + nn.functional.silu(before) + 0.5 * before.sigmoid()
        return self.head(nn.functional.silu(h).add_(1)).squeeze(1)


@pytest.mark.parametrize("seed", [0, 1])
def test_rewritten_gradients_are_those_of_the_energy(seed):
    torch.manual_seed(seed)
    energy = Squares().double().requires_grad_(False)
    x = torch.randn(11, 3).double()
    graph = make_fx(lambda x: value_and_grad(energy, x), DECOMPOSITIONS)(x)
    share_sigmoids(graph)
    y = 3 * torch.randn(11, 3).double()
    for came, expected in zip(graph(y), value_and_grad(energy, y), strict=True):
        torch.testing.assert_close(came, expected, rtol=1e-12, atol=1e-12)


def test_a_layer_takes_one_sigmoid_and_the_head_no_product_backwards():
    energy = nn.Sequential(
        nn.Linear(2, 8), nn.SiLU(), nn.Linear(8, 8), nn.SiLU(), nn.Linear(8, 1), nn.Flatten(0)
    ).requires_grad_(False)
    graph = make_fx(lambda x: value_and_grad(energy, x), DECOMPOSITIONS)(torch.randn(5, 2))
    share_sigmoids(graph)
    calls = Counter(str(node.target) for node in graph.graph.nodes)
    assert calls["aten.sigmoid.default"] == 2
    assert calls["aten.silu.default"] == calls["aten.silu_backward.default"] == 0
    assert calls["aten.addmm.default"] == 3
    assert calls["aten.mm.default"] == 2


@pytest.mark.parametrize("channels", [1, 2, 3])
@pytest.mark.parametrize(
    ("kernel", "stride", "padding"),
    [
        (3, 1, 1),
        (3, 1, 0),
        (5, 1, 2),
        (4, 2, 1),
        (2, 2, 0),
        (3, 2, 1),
        (5, 2, 4),
        (3, 3, 2),
        (1, 1, 0),
        (4, 4, 0),
        (2, 3, 0),
        ((3, 4), (1, 2), (1, 0)),
    ],
)
def test_the_last_step_into_an_image_is_one_convolution_and_the_same_gradient(
    channels, kernel, stride, padding
):
    torch.manual_seed(0)
    stem = nn.Conv2d(channels, 5, kernel, stride, padding).double().requires_grad_(False)

    def energy(x: Tensor) -> Tensor:
        return nn.functional.silu(stem(x)).flatten(1).sum(1)

    for size in ((9, 8), (12, 11)):
        x = torch.randn(2, channels, *size).double()
        for layout in (torch.contiguous_format, torch.channels_last):
            y = x.contiguous(memory_format=layout)
            graph = make_fx(lambda x: value_and_grad(energy, x), DECOMPOSITIONS)(y)
            calls = Counter(str(node.target) for node in graph.graph.nodes)
            assert calls["aten.convolution_backward.default"] == 0
            assert calls["aten.convolution.default"] == 2
            for came, expected in zip(graph(y), value_and_grad(energy, y), strict=True):
                torch.testing.assert_close(came, expected, rtol=1e-12, atol=1e-12)
                assert came.stride() == expected.stride()


def test_inner_convolutions_stay_the_librarys():
    convolutions = (nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 4, 4, 2, 1))
    energy = nn.Sequential(*convolutions, nn.Flatten(), nn.Linear(64, 1), nn.Flatten(0))
    energy.requires_grad_(False)
    graph = make_fx(lambda x: value_and_grad(energy, x), DECOMPOSITIONS)(torch.randn(2, 3, 8, 8))
    calls = Counter(str(node.target) for node in graph.graph.nodes)
    assert calls["aten.convolution_backward.default"] == 1


def test_a_silu_whose_gradient_nobody_takes_stays_as_it_is():
    graph = make_fx(lambda x: nn.functional.silu(x), DECOMPOSITIONS)(torch.randn(5, 2))
    share_sigmoids(graph)
    assert [str(n.target) for n in graph.graph.nodes if n.op == "call_function"] == [
        "aten.silu.default"
    ]
