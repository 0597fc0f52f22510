"""Noise that blocks draw themselves: its law, and that no two numbers of a run share it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from scipy import stats
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from ebm_dist import energies, samplers
from ebm_dist.samplers import Engine, run_chain
from ebm_dist.samplers.compile import compiler
from ebm_dist.samplers.compile import engine as engine_module
from ebm_dist.samplers.compile.block import build
from ebm_dist.samplers.compile.compiler import compile_graph
from ebm_dist.samplers.compile.fused_noise import SeededNoise, in_torch, philox
from ebm_dist.samplers.compile.recorded_noise import Draw, Tape

needs_compiler = pytest.mark.skipif(
    compiler.missing() is not None, reason=f"cannot compile: {compiler.missing()}"
)

SHAPE = (512, 64)
NORMAL = Draw("normal_", SHAPE, torch.float32, ())
UNIFORM = Draw("uniform_", SHAPE, torch.float32, ())
BITS = Draw("random_", (33,), torch.int64, (-(2**63), None))


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def written_out(graph: Any, inputs: list[Tensor]) -> Any:
    """Stands for the compiler."""
    graph = in_torch(graph)
    return lambda tensors: graph(*tensors)


def numbers(noise: SeededNoise, inputs: list[Tensor], compile_graph: Any = written_out) -> Any:
    graph = make_fx(lambda *flat: noise.numbers(flat), tracing_mode="fake")(*inputs)
    return compile_graph(graph, inputs)([t.clone() for t in inputs])


def test_philox_gives_the_published_words():
    # Random123's known answers: words 0 and 1 of the zero key and counter.
    word0, word1 = 0x6627E8D5, 0xE169C58D
    (whole,) = philox(0, 2**56, (1,), torch.tensor(0)).tolist()
    assert whole == word0 | (word1 & 0xFFFFFF) << 32


def test_numbers_have_the_law_that_was_asked_for():
    draws = [
        NORMAL,
        UNIFORM,
        Draw("normal_", SHAPE, torch.float32, (3.0, 0.5)),
        Draw("uniform_", SHAPE, torch.float32, (-1.0, 4.0)),
    ]
    noise = SeededNoise(draws, torch.device("cpu"))
    came = numbers(noise, noise.fill(generator(1)))
    laws = [stats.norm(), stats.uniform(), stats.norm(3, 0.5), stats.uniform(-1, 5)]
    for draw, sample, law in zip(draws, came, laws):
        assert tuple(sample.shape) == draw.shape
        assert sample.dtype == torch.float32
        flat = sample.flatten().double()
        assert stats.kstest(flat.numpy(), law.cdf).pvalue > 1e-3
        error = (((flat - law.mean()) ** 2).var() / len(flat)).sqrt().item()
        assert error < 0.1 * law.var() / 8, "too few to see a scale 5% off"
        assert abs((flat - law.mean()).square().mean().item() - law.var()) < 4 * error
    assert came[1].min() >= 0
    assert came[1].max() < 1


def test_no_two_places_steps_blocks_or_seeds_share_noise():
    noise = SeededNoise([NORMAL, NORMAL, UNIFORM], torch.device("cpu"))
    streams: list[Tensor] = []
    for seed in (0, 1, 12345):
        one = generator(seed)
        for _ in range(2):  # blocks of one round
            first, second, third = numbers(noise, noise.fill(one))
            streams += [first, second, (third - 0.5) * 12**0.5]
    flat = torch.stack([s.flatten() for s in streams]).double()
    # A perfect correlation with any other stream at the same place, or with itself a few
    # chains or coordinates on, would be noise that is used twice.
    num = flat.shape[1]
    off = flat @ flat.T / num - torch.eye(len(flat))
    assert off.abs().max() < 5 * (2 / num) ** 0.5
    for lag in (1, 2, 3, 4, 8, 16, 32, 64, 65, 128, 256, 512, 1024, num // 2):
        itself = (flat * flat.roll(lag, 1)).mean(1)
        assert itself.abs().max() < 5 / num**0.5
    assert len(flat.flatten().unique()) > 0.99 * flat.numel()


def test_a_seed_determines_the_noise_and_advances():
    noise = SeededNoise([NORMAL, BITS], torch.device("cpu"))

    def drawn(generator: torch.Generator) -> list[Tensor]:
        return [t.clone() for t in numbers(noise, noise.fill(generator))]

    one, again = generator(5), generator(5)
    first, second = drawn(one), drawn(one)
    for a, b, c in zip(first, second, drawn(again)):
        assert not torch.equal(a, b)
        assert torch.equal(a, c)


def test_raw_bits_and_doubles_stay_on_a_tape_filled_at_once():
    device = torch.device("cpu")
    doubles = Draw("normal_", (7,), torch.float64, ())
    noise = SeededNoise([BITS, NORMAL, BITS, doubles], device)
    came = numbers(noise, noise.fill(generator(1)))
    assert [tuple(t.shape) for t in came] == [(33,), SHAPE, (33,), (7,)]
    assert came[3].dtype == torch.float64
    assert not torch.equal(came[0], came[2])
    assert all(t.data_ptr() % 64 == 0 for t in noise.fill(generator(1))[1:])
    both = torch.cat([came[0], came[2]])
    assert (both < 0).sum() not in (0, len(both))  # all 64 of them


@pytest.mark.parametrize("name", ["langevin", "sghmc", "mala", "hmc", "random_walk"])
def test_chains_are_those_of_single_steps_on_the_same_noise(monkeypatch, name):
    # The noise of a fused block, played back to a block that reads it from a tape.
    energy = energies.make("mlp", event_shape=(3,), widths=(8,)).eval()
    kernel = samplers.make(name, **samplers.FAMILY.members[name].example)  # type: ignore[attr-defined]
    state = kernel.init(torch.randn(6, 3, generator=generator(1)), energy)
    fused = build(kernel, energy, state, 4, written_out, fused_noise=True)
    taped = build(kernel, energy, state, 4, written_out)
    weights = [p.detach() for p in energy.parameters()]
    assert isinstance(fused.noise, SeededNoise)
    played = numbers(fused.noise, fused.noise.fill(generator(2)))
    monkeypatch.setattr(Tape, "fill", lambda self, generator: played)
    # No tape is left in the fused block, whose own would be played to it as well.
    monkeypatch.setattr(fused.noise._rest, "fill", lambda generator: [])
    a, b = fused(state, weights, generator(2)), taped(state, weights, generator(2))
    torch.testing.assert_close(a[0].position, b[0].position)
    torch.testing.assert_close(a[1], b[1])


def test_an_engine_fuses_noise_where_it_is_told_to_and_a_seed_still_says_all(monkeypatch):
    monkeypatch.setattr(engine_module, "compile_graph", written_out)
    energy = energies.make("mlp", event_shape=(2,), widths=(16, 16)).eval()
    kernel = samplers.make("langevin", step_size=0.05, temperature=1.0)
    x = torch.randn(8, 2, generator=generator(1))
    said: list[str] = []
    engine = Engine("compiled", background=False, fused_noise=True, say=said.append)
    taped = Engine("compiled", background=False, say=said.append)

    def ends(engine: Engine, seed: int) -> Tensor:
        return run_chain(kernel, x, energy, 40, generator(seed), engine=engine).position

    assert torch.equal(ends(engine, 3), ends(engine, 3))
    assert (ends(engine, 3) - ends(engine, 4)).abs().min() > 0
    assert not torch.allclose(ends(engine, 3), ends(taped, 3))
    assert ["including the noise" in line for line in said] == [True, False]


def test_steps_without_noise_and_steps_with_raw_bits_alone_are_those_of_a_tape(monkeypatch):
    monkeypatch.setattr(engine_module, "compile_graph", written_out)
    cold = samplers.make("langevin", step_size=0.05, temperature=0.0)
    rbm = energies.rbm(6, 3, weight_std=0.5)
    assert rbm.event is not None
    cases = [
        (cold, energies.ring(1.0, 0.2), torch.randn(8, 2, generator=generator(1))),
        (samplers.make("gibbs"), rbm, rbm.event.noise(8, generator(1))),
    ]
    for kernel, energy, x in cases:
        said: list[str] = []
        engine = Engine("compiled", background=False, fused_noise=True, say=said.append)
        blocks = run_chain(kernel, x, energy, 10, generator(2), engine=engine)
        again = run_chain(kernel, x, energy, 10, generator(2), engine=engine)
        assert torch.equal(blocks.position, again.position)
        assert len(said) == 1
        assert "noise" not in said[0]


def test_a_compiler_with_other_noise_gets_it_from_a_tape(monkeypatch):
    # The graph as it is: its draws are then torch's own, of no seed.
    monkeypatch.setattr(
        engine_module, "compile_graph", lambda graph, inputs: lambda tensors: graph(*tensors)
    )
    energy = energies.make("mlp", event_shape=(2,), widths=(8,)).eval()
    kernel = samplers.make("langevin", step_size=0.05, temperature=1.0)
    x = torch.randn(8, 2, generator=generator(1))
    said: list[str] = []
    engine = Engine("compiled", background=False, fused_noise=True, say=said.append)
    blocks = run_chain(kernel, x, energy, 10, generator(2), engine=engine)
    eager = run_chain(kernel, x, energy, 10, generator(2))
    torch.testing.assert_close(blocks.position, eager.position, rtol=1e-4, atol=1e-5)
    assert len(said) == 1
    assert "drawn beforehand, since fused noise failed: the compiled steps differ" in said[0]


@needs_compiler
def test_the_compiler_draws_the_same_numbers():
    draws = [NORMAL, UNIFORM, Draw("normal_", (3, 5), torch.float32, ())]
    noise = SeededNoise(draws, torch.device("cpu"))
    inputs = noise.fill(generator(1))
    expected = numbers(noise, inputs)
    came = numbers(noise, inputs, compile_graph)
    assert torch.equal(came[1], expected[1])
    for a, b in zip(came, expected):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=2e-6)
