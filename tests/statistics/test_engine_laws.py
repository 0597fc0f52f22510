"""The law of chains that the engine moved, against the closed forms of single steps.

In the default suite the traced graph is run as it is; the slow tests put torch's compiler in.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import samplers_claims as claims
import torch
from samplers_claims import METROPOLIS, NUM_CHAINS, generator, same_gaussian_variance
from torch import Tensor, nn

from ebm_dist import energies, samplers
from ebm_dist.samplers import Engine, run_chain
from ebm_dist.samplers.compile import compiler
from ebm_dist.samplers.compile import engine as engine_module
from ebm_dist.samplers.compile.fused_noise import SeededNoise, in_torch
from ebm_dist.samplers.compile.recorded_noise import Tape

needs_compiler = pytest.mark.skipif(
    compiler.missing() is not None, reason=f"cannot compile: {compiler.missing()}"
)

LAWS: dict[str, Callable[[], None]] = {
    "langevin on a quadratic": lambda: claims.langevin_variance_shows_its_known_bias(
        partial(samplers.make, "langevin"), cases=[(1.0, 1.0, 0.5), (4.0, 0.5, 0.2)]
    ),
    "langevin on a skewed target": lambda: claims.langevin_follows_its_exact_law_on_a_skewed_target(
        partial(samplers.make, "langevin")
    ),
    "mala on a Gaussian": lambda: claims.metropolis_samples_a_gaussian(
        partial(samplers.make, "mala"), METROPOLIS["mala"]
    ),
    "hmc on a skewed target": lambda: claims.metropolis_samples_a_skewed_target(
        partial(samplers.make, "hmc"), METROPOLIS["hmc"]
    ),
}


@pytest.fixture
def in_blocks(monkeypatch: pytest.MonkeyPatch) -> Engine:
    """Every claim's chains go through one engine that runs the traced graphs."""
    without_a_compiler(monkeypatch)
    return through_engine(monkeypatch)


@pytest.fixture
def in_fused_blocks(monkeypatch: pytest.MonkeyPatch) -> Engine:
    """The same with blocks that draw their noise themselves."""
    without_a_compiler(monkeypatch)
    return through_engine(monkeypatch, fused_noise=True)


def without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    def traced(graph: Any, inputs: list[Tensor]) -> Any:
        graph = in_torch(graph)
        return lambda tensors: graph(*tensors)

    monkeypatch.setattr(engine_module, "compile_graph", traced)


def through_engine(monkeypatch: pytest.MonkeyPatch, *, fused_noise: bool = False) -> Engine:
    engine = Engine("compiled", background=False, fused_noise=fused_noise, say=refuse_to_be_eager)
    monkeypatch.setattr(claims, "run_chain", partial(run_chain, engine=engine))
    return engine


def refuse_to_be_eager(line: str) -> None:
    assert "runs blocks" in line, line
    assert "beforehand" not in line, line


@pytest.mark.parametrize("law", LAWS)
def test_blocks_keep_the_closed_form(in_blocks, law):
    LAWS[law]()
    assert in_blocks.compile_s > 0


@pytest.mark.parametrize("law", LAWS)
def test_blocks_that_draw_their_noise_keep_the_closed_form(in_fused_blocks, law):
    LAWS[law]()
    assert in_fused_blocks.compile_s > 0


def test_blocks_that_draw_their_noise_keep_an_rbms_enumerated_law(in_fused_blocks):
    # At temperature 1 its bits come from a tape; at others its sites' noise is in the graph.
    claims.rbm_has_its_enumerated_law(partial(samplers.make, "gibbs"), claims.as_rbm)
    assert in_fused_blocks.compile_s > 0


@pytest.mark.parametrize("law", ["langevin on a quadratic", "mala on a Gaussian"])
def test_noise_five_percent_off_in_the_graph_is_noticed(in_fused_blocks, monkeypatch, law):
    drawn = SeededNoise.numbers

    def louder(self: SeededNoise, inputs: list[Tensor]) -> list[Tensor]:
        assert all(draw.method in ("normal_", "uniform_") for draw in self._draws)
        numbers = drawn(self, inputs)
        return [
            t * 1.05 if draw.method == "normal_" else t for t, draw in zip(numbers, self._draws)
        ]

    monkeypatch.setattr(SeededNoise, "numbers", louder)
    with pytest.raises(AssertionError, match="SE away"):
        LAWS[law]()


@pytest.mark.parametrize("law", ["langevin on a quadratic", "mala on a Gaussian"])
def test_noise_five_percent_off_in_the_tape_is_noticed(in_blocks, monkeypatch, law):
    filled = Tape.fill

    def louder(self: Tape, generator: torch.Generator) -> list[Tensor]:
        numbers = filled(self, generator)
        return [t.mul_(1.05) if t.min() < 0 else t for t in numbers]  # the normal ones

    monkeypatch.setattr(Tape, "fill", louder)
    with pytest.raises(AssertionError, match="SE away"):
        LAWS[law]()


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize("fused_noise", [False, True])
@pytest.mark.parametrize("law", LAWS)
def test_the_compiler_keeps_the_closed_form(monkeypatch, law, fused_noise):
    engine = through_engine(monkeypatch, fused_noise=fused_noise)
    LAWS[law]()
    assert engine.compile_s > 0


@pytest.mark.slow
@needs_compiler
def test_the_compiler_keeps_every_decision_of_discrete_kernels():
    cases = [
        ("gibbs", energies.rbm(20, 10, weight_std=0.5)),
        ("gibbs", energies.ising((6, 6), 0.3)),
        ("gibbs_with_gradients", energies.ising((6, 6), 0.3)),
        ("discrete_langevin", energies.ising((6, 6), 0.3)),
    ]
    for name, energy in cases:
        assert energy.event is not None
        x = energy.event.noise(64, generator(1))
        params = {"step_size": 0.5} if name == "discrete_langevin" else {}
        kernel = samplers.make(name, **params)
        engine = Engine("compiled", background=False, say=refuse_to_be_eager)
        blocks = run_chain(kernel, x, energy, 8, generator(2), engine=engine)
        assert torch.equal(blocks.position, run_chain(kernel, x, energy, 8, generator(2)).position)


class Bowl(nn.Module):
    """curvature/2 |x|^2 by a matrix product, which autocast takes in bf16."""

    def __init__(self, curvature: float) -> None:
        super().__init__()
        self.root = nn.Linear(2, 2, bias=False)
        with torch.no_grad():
            self.root.weight.copy_(curvature**0.5 * torch.eye(2))

    def forward(self, x: Tensor) -> Tensor:
        return 0.5 * self.root(x).square().sum(1)


@pytest.mark.parametrize("blocks", [False, True])
def test_bf16_chains_have_the_closed_forms_variance(in_blocks, blocks):
    h, curvature = 0.5, 1.0
    kernel = samplers.make("langevin", step_size=h, temperature=1.0)
    chain = run_chain(
        kernel,
        torch.zeros(NUM_CHAINS, 2),
        Bowl(curvature),
        12,
        generator(),
        precision="bf16",
        engine=in_blocks if blocks else None,
    )
    assert chain.position.dtype == torch.float32
    expected = 2 / (curvature * (2 - curvature * h))
    same_gaussian_variance(chain.position, expected, "variance in bf16")
