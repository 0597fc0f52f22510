"""On a GPU: captured, uncaptured and single steps make the same chains, and no round waits."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from ebm_dist import energies
from ebm_dist.samplers import FAMILY, Engine, chain, kernel, run_chain

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

CONTINUOUS = ["langevin", "sghmc", "mala", "hmc", "random_walk"]


def make(name: str, **params: Any) -> Any:
    return FAMILY.make(name, **{**FAMILY.members[name].example, **params})  # type: ignore[attr-defined]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator("cuda").manual_seed(seed)


def mlp() -> energies.Energy:
    return energies.make("mlp", event_shape=(2,), widths=(16, 16)).eval().cuda()


def images() -> tuple[energies.Energy, Tensor]:
    energy = energies.make("resnet", event_shape=(1, 8, 8), width=16, multipliers=(1, 2)).eval()
    return energy.cuda(), torch.rand(32, 1, 8, 8, generator=generator(1), device="cuda") * 2 - 1


def must_run(line: str) -> None:
    """What an engine may say: not that it stays eager, launches kernel by kernel or taped noise."""
    assert "runs blocks" in line or "channels-last" in line, line
    assert "beforehand" not in line, line


def engine(**options: Any) -> Engine:
    return Engine("compiled", background=False, say=must_run, **options)


def same_bits(a: Any, b: Any) -> None:
    assert torch.equal(a.position, b.position)
    assert torch.equal(a.energies, b.energies)
    assert all(torch.equal(a.info[name], b.info[name]) for name in a.info)


@pytest.mark.parametrize("name", CONTINUOUS)
def test_blocks_captured_or_not_make_the_chains_of_single_steps(name):
    energy, mover = mlp(), make(name)
    x = torch.randn(64, 2, generator=generator(1), device="cuda")
    captured = engine(fused_noise=False)
    launched = engine(fused_noise=False, captured=False)
    for seed in range(3):
        for p in energy.parameters():  # new weights, at new addresses
            p.data = p.data * 1.1
        noise = [generator(seed) for _ in range(3)]
        eager = run_chain(mover, x, energy, 40, noise[0])
        one = run_chain(mover, x, energy, 40, noise[1], engine=launched)
        two = run_chain(mover, x, energy, 40, noise[2], engine=captured)
        same_bits(one, two)
        torch.testing.assert_close(eager.position, one.position, rtol=1e-3, atol=1e-4)
        assert torch.equal(noise[0].get_state(), noise[2].get_state())


@pytest.mark.parametrize("name", CONTINUOUS)
def test_blocks_that_draw_their_noise_are_the_same_captured_or_not(name):
    energy, mover = mlp(), make(name)
    x = torch.randn(64, 2, generator=generator(1), device="cuda")
    said: list[str] = []
    captured = Engine("compiled", background=False, say=said.append)
    launched = engine(captured=False)
    ends = []
    for seed in (2, 3, 2):
        two = run_chain(mover, x, energy, 40, generator(seed), engine=captured)
        same_bits(run_chain(mover, x, energy, 40, generator(seed), engine=launched), two)
        ends.append(two.position)
    assert len(said) == 1
    assert "including the noise" in said[0]
    assert torch.equal(ends[0], ends[2])
    assert not torch.equal(ends[0], ends[1])


def test_the_noise_of_blocks_has_the_closed_forms_variance():
    h, num_chains = 0.2, 100_000
    energy = energies.quadratic([[1.0, 0.0], [0.0, 1.0]]).cuda()
    mover = make("langevin", step_size=h, temperature=1.0)
    x = torch.zeros(num_chains, 2, device="cuda")
    end = run_chain(mover, x, energy, 60, generator(), engine=engine()).position.double()
    expected = 1 / (1 - h / 2)
    standard_error = expected * (2 / end.numel()) ** 0.5
    assert abs(end.square().mean().item() - expected) < 4 * standard_error
    neighbours = (end[1:, 0] * end[:-1, 0]).mean().item() / expected
    assert abs(neighbours) < 4 / num_chains**0.5
    assert len(end.flatten().unique()) > 0.9 * end.numel()


@torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_images_are_captured_channels_last(precision):
    energy, x = images()
    mover = make("langevin", step_size=0.01, clamp=(-1.0, 1.0))
    captured, launched = engine(fused_noise=False), engine(fused_noise=False, captured=False)
    options: dict[str, Any] = {"precision": precision}
    for seed in range(2):
        one = run_chain(mover, x, energy, 10, generator(seed), engine=launched, **options)
        two = run_chain(mover, x, energy, 10, generator(seed), engine=captured, **options)
        same_bits(one, two)
        eager = run_chain(mover, x, energy, 10, generator(seed), **options)
        off = (eager.position - two.position).abs().mean()
        assert off < (0.02 if precision == "bf16" else 1e-3)


def test_discrete_blocks_decide_as_single_steps_do():
    cases = [
        ("gibbs", energies.rbm(20, 10, weight_std=0.5)),
        ("gibbs", energies.ising((6, 6), 0.3)),
        ("gibbs_with_gradients", energies.ising((6, 6), 0.3)),
    ]
    for name, energy in cases:
        assert energy.event is not None
        x = energy.event.noise(64, torch.Generator().manual_seed(1)).cuda()
        energy, mover = energy.cuda(), make(name)
        blocks = run_chain(mover, x, energy, 8, generator(2), engine=engine(fused_noise=False))
        single = run_chain(mover, x, energy, 8, generator(2))
        agree = (blocks.position == single.position).flatten(1).all(1).float().mean()
        assert agree > 0.95  # a number between two roundings of one probability: one in thousands


@contextlib.contextmanager
def mode(name: str) -> Iterator[None]:
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode(name)
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


@pytest.mark.parametrize("how", ["eager", "captured"])
@pytest.mark.parametrize("name", CONTINUOUS)
def test_a_round_waits_only_where_its_energies_are_checked(monkeypatch, name, how):
    check, waits = kernel.require_finite, []

    def allowed(energy: Tensor, where: str) -> None:
        waits.append(where)
        with mode("default"):
            check(energy, where)

    for module in (kernel, chain):
        monkeypatch.setattr(module, "require_finite", allowed)
    energy, mover = mlp(), make(name)
    x = torch.randn(64, 2, generator=generator(1), device="cuda")
    runs = engine() if how == "captured" else None
    run_chain(mover, x, energy, 40, generator(0), engine=runs)  # compiles and records
    waits.clear()
    noise = generator(1)
    with mode("error"):
        run_chain(mover, x, energy, 40, noise, engine=runs)
    assert len(waits) == 2
