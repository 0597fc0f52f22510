"""Products by oneDNN: which of them, the same numbers, and through torch's compiler."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.fx.experimental.proxy_tensor import make_fx

from ebm_dist import samplers
from ebm_dist.samplers import Engine, run_chain
from ebm_dist.samplers.compile import block, compiler
from ebm_dist.samplers.compile import onednn as products
from ebm_dist.samplers.kernel import value_and_grad

pytestmark = pytest.mark.skipif(
    not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN"
)


def perceptron(width: int) -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Linear(2, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU()]
    return nn.Sequential(*layers, nn.Linear(width, 1), nn.Flatten(0)).requires_grad_(False)


def traced(energy: nn.Module, x: Tensor) -> tuple[torch.fx.GraphModule, list[Tensor]]:
    """Energy and gradient as a graph of the chains and the weights, and those."""
    named = dict(energy.named_parameters())

    def evaluate(x: Tensor, *weights: Tensor) -> tuple[Tensor, Tensor]:
        parameters = dict(zip(named, weights))
        return value_and_grad(lambda x: functional_call(energy, parameters, (x,)), x)

    inputs = [x, *(p.detach() for p in named.values())]
    return make_fx(evaluate, tracing_mode="fake")(*inputs), inputs


def calls(graph: torch.fx.GraphModule) -> Counter[str]:
    return Counter(str(node.target) for node in graph.graph.nodes)


def test_large_products_go_to_onednn_and_give_the_same_energies_and_gradients():
    energy, x = perceptron(64), torch.randn(4096, 2)
    graph, inputs = traced(energy, x)
    before = calls(graph)
    products.products_by_onednn(graph)
    after = calls(graph)
    # Forward and backward of the 64x64 layer, and the gradient in x; not what x goes in by.
    assert after["ebm_dist.linear.default"] == 3
    moved = before["aten.mm.default"] + before["aten.addmm.default"] - 3
    assert after["aten.mm.default"] + after["aten.addmm.default"] == moved
    for came, expected in zip(graph(*inputs), value_and_grad(energy, x), strict=True):
        torch.testing.assert_close(came, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_small_products_and_those_in_double_precision_stay_mkls(dtype: torch.dtype):
    energy = perceptron(64).to(dtype)
    x = torch.randn(64 if dtype == torch.float32 else 4096, 2, dtype=dtype)
    graph, _ = traced(energy, x)
    products.products_by_onednn(graph)
    assert calls(graph)["ebm_dist.linear.default"] == 0


def test_mkl_is_left_alone_on_its_makers_processors(monkeypatch: pytest.MonkeyPatch):
    for vendor, expected in (("GenuineIntel", False), ("AuthenticAMD", True)):
        monkeypatch.setattr(Path, "read_text", lambda self, v=vendor: f"vendor_id\t: {v}\n")
        products.mkl_holds_back.cache_clear()
        assert products.mkl_holds_back() is (expected and torch.backends.mkl.is_available())
    products.mkl_holds_back.cache_clear()


@pytest.mark.skipif(compiler.missing() is not None, reason="there is no C++ compiler")
def test_blocks_compiled_with_onednns_products_keep_the_chains_to_rounding(
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr(block, "mkl_holds_back", lambda: True)
    energy, x = perceptron(64), torch.randn(1024, 2, generator=torch.Generator().manual_seed(1))
    kernel = samplers.make("langevin", step_size=0.01, temperature=1.0)
    said: list[str] = []
    engine = Engine("compiled", background=False, say=said.append)

    def chains(engine: Engine | None) -> samplers.Chain:
        return run_chain(kernel, x, energy, 3, torch.Generator().manual_seed(2), engine=engine)

    torch.testing.assert_close(chains(engine).position, chains(None).position, rtol=1e-4, atol=1e-5)
    assert "runs blocks" in said[0]
