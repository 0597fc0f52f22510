"""`precision: bf16` keeps the law of fp32, in standard errors; bf16 positions would not.

This is what lets the option exist: whoever changes what is cast has to pass here. The two
precisions get different noise, since equal noise would make them differ by less than their law
allows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import pytest
import torch
from samplers_claims import generator, same
from torch import Tensor, nn

from ebm_dist import energies, samplers
from ebm_dist.samplers import Engine, run_chain
from ebm_dist.samplers.compile import compiler, winograd
from ebm_dist.samplers.compile import engine as engine_module
from ebm_dist.samplers.compile.fused_noise import in_torch

needs_compiler = pytest.mark.skipif(
    compiler.missing() is not None, reason=f"cannot compile: {compiler.missing()}"
)


def written_out(graph: Any, inputs: list[Tensor]) -> Any:
    """Stands for the compiler."""
    graph = in_torch(graph)
    return lambda tensors: graph(*tensors)


class Wells(nn.Module):
    """A random perceptron in a wide bowl: several wells, a law that no formula gives."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = energies.make("mlp", event_shape=(2,), widths=(32, 32))
        with torch.no_grad():
            for p in self.inner.parameters():
                p.copy_(torch.randn(p.shape, generator=generator(p.numel())) * p.shape[-1] ** -0.5)
            self.inner.head.weight.mul_(8)  # type: ignore[union-attr]

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) + 0.25 * x.square().sum(1)


def network() -> nn.Module:
    energy = energies.make("resnet", event_shape=(1, 8, 8), width=16, multipliers=(1, 2)).eval()
    with torch.no_grad():
        energy.head.weight.mul_(60)  # type: ignore[union-attr]
    return energy


@dataclass(frozen=True)
class Case:
    """Chains whose law after `num_steps` steps is looked at."""

    make: Callable[[], nn.Module]
    kernel: Any
    start: Tensor
    num_steps: int


CASES = {
    # To its stationary law, with moves that are large beside a bf16 number's last bit.
    "wells": Case(
        Wells,
        samplers.make("langevin", step_size=0.05, temperature=1.0),
        torch.randn(4000, 2, generator=generator(1)),
        60,
    ),
    # As images are sampled: noise of .002, where neighbouring bf16 numbers are .002 to .008
    # apart, and a drift that takes the chains elsewhere.
    "images": Case(
        network,
        samplers.make("langevin", step_size=1e-4, noise_std=0.002),
        0.5 + 0.5 * torch.rand(400, 1, 8, 8, generator=generator(1)),
        30,
    ),
}


def summary(energy: nn.Module, start: Tensor, end: Tensor) -> dict[str, Tensor]:
    """Numbers (B,) of each chain, whose means the law fixes."""
    flat, moved = end.flatten(1), (end - start).flatten(1)
    return {
        "energy": energy(end).detach(),
        "first coordinate": flat[:, 0],
        "square": flat.square().mean(1),
        "displacement": moved.mean(1),
        "squared displacement": moved.square().mean(1),
        "share above the start": (moved > 0).float().mean(1),
    }


def same_law(case: Case, kernel: Any, **options: Any) -> None:
    energy = case.make().eval().requires_grad_(False)
    full = run_chain(case.kernel, case.start, energy, case.num_steps, generator(2))
    half = run_chain(
        kernel, case.start, energy, case.num_steps, generator(3), precision="bf16", **options
    )
    assert half.position.dtype == torch.float32
    assert not torch.equal(full.energy, half.energy)
    expected = summary(energy, case.start, full.position)
    came = summary(energy, case.start, half.position)
    for what, a in expected.items():
        b = came[what]
        error = ((a.var() + b.var()) / len(a)).sqrt().item()
        same(b.mean().item(), a.mean().item(), error, f"{what} in bf16")
    # Not a law that chains have which stay where they are, or follow their noise alone.
    change = expected["energy"] - energy(case.start)
    assert change.mean().abs() > 20 * change.std() / len(change) ** 0.5


def blocks(**options: Any) -> Engine:
    def say(line: str) -> None:
        assert "runs blocks" in line or "channels-last" in line, line

    return Engine("compiled", background=False, say=say, **options)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("how", ["eager", "auto", "blocks", "fused blocks"])
def test_bf16_chains_have_the_law_of_fp32(monkeypatch, name, how):
    monkeypatch.setattr(engine_module, "compile_graph", written_out)
    engine = {
        "eager": lambda: None,
        "auto": partial(Engine, "auto"),
        "blocks": blocks,
        "fused blocks": partial(blocks, fused_noise=True),
    }[how]()
    same_law(CASES[name], CASES[name].kernel, engine=engine)


def test_bf16_chains_of_winograds_convolutions_have_the_law_of_fp32(monkeypatch):
    if not winograd.available(torch.bfloat16):
        pytest.skip("needs AVX-512 with bf16, no AMX, and a C++ compiler")
    graphs = []

    def keep(graph: Any, inputs: list[Tensor]) -> Any:
        graphs.append(graph.code)
        return written_out(graph, inputs)

    monkeypatch.setattr(engine_module, "compile_graph", keep)
    monkeypatch.setattr(winograd, "_WORTHWHILE", float("inf"))
    same_law(CASES["images"], CASES["images"].kernel, engine=blocks())
    # Of each residual block both, forwards and back.
    assert any(code.count("ebm_dist.winograd.default") >= 8 for code in graphs)


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("fused_noise", [False, True])
def test_compiled_bf16_chains_have_the_law_of_fp32(name, fused_noise):
    engine = blocks(fused_noise=fused_noise)
    same_law(CASES[name], CASES[name].kernel, engine=engine)
    assert engine.compile_s > 0


@dataclass(frozen=True)
class InBf16:
    """A kernel whose chains are kept in bf16 between its steps."""

    kernel: Any
    temperature: float = 1.0

    def init(self, x: Tensor, energy: Any) -> Any:
        return self.kernel.init(x.bfloat16(), energy)

    def step(self, state: Any, energy: Any, generator: torch.Generator) -> Any:
        moved, info = self.kernel.step(state, energy, generator)
        return replace(moved, position=moved.position.bfloat16().float()), info


def test_bf16_positions_would_be_noticed():
    case = CASES["images"]
    with pytest.raises(AssertionError, match="SE away"):
        same_law(case, InBf16(case.kernel))
