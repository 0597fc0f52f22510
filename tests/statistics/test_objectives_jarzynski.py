"""The Jarzynski correction on energies that move: exact where uncorrected chains lag behind."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from ebm_dist import samplers
from ebm_dist.core.errors import UserError
from ebm_dist.jarzynski import weights as jarzynski
from ebm_dist.jarzynski.kernel import GAIN, weighted
from ebm_dist.objectives.weighting import ess_ratio


@dataclass(frozen=True)
class Gaussian:
    """E(x) = a/2 (x - m)^2 + c on the line: every moment and log Z known."""

    a: float
    m: float = 0.0
    c: float = 0.0

    def __call__(self, x: Tensor) -> Tensor:
        return 0.5 * self.a * (x.flatten() - self.m) ** 2 + self.c

    def grad(self, x: Tensor) -> Tensor:
        return self.a * (x - self.m)

    def log_z(self, temperature: float = 1.0) -> float:
        return 0.5 * math.log(2 * math.pi * temperature / self.a) - self.c / temperature

    def sample(self, num: int, g: torch.Generator, temperature: float = 1.0) -> Tensor:
        return self.m + (temperature / self.a) ** 0.5 * torch.randn(
            num, 1, generator=g, dtype=torch.float64
        )


def path(num_versions: int) -> list[Gaussian]:
    """The precision trebles, the mean travels by 1 and the constant drifts, all at once."""
    return [
        Gaussian(1 + 2 * k / num_versions, k / num_versions, 0.3 * k / num_versions)
        for k in range(num_versions + 1)
    ]


def moved_under(
    kernel: samplers.Kernel,
    x: Tensor,
    log_weight: Tensor,
    energy: Gaussian,
    num_steps: int,
    g: torch.Generator,
) -> tuple[Tensor, Tensor, Tensor]:
    """Positions, energies and log-weights after `num_steps` steps, computed as a worker does."""
    chain = samplers.run_chain(weighted(kernel), x, energy, num_steps, g)
    if GAIN in chain.info:
        log_weight = log_weight + num_steps * chain.info[GAIN].double()
    return chain.position, chain.energy, log_weight


def assert_follows(
    x: Tensor, log_weight: Tensor, energy: Gaussian, start: Gaussian, temperature: float = 1.0
) -> None:
    """Weighted moments and log Z within 4 standard errors, by the weighted sample itself."""
    assert_log_z = jarzynski.log_z_ratio(log_weight).item()
    error = jarzynski.log_z_standard_error(log_weight).item()
    expected = energy.log_z(temperature) - start.log_z(temperature)
    assert 4 * error < 0.1
    assert abs(assert_log_z - expected) < 4 * error
    w = torch.softmax(log_weight, 0)
    for values, moment in (
        (x.flatten(), energy.m),
        ((x.flatten() - energy.m) ** 2, temperature / energy.a),
    ):
        mean = (w * values).sum().item()
        spread = ((w * (values - mean)) ** 2).sum().sqrt().item()
        assert abs(mean - moment) < 4 * spread
        assert 4 * spread < 0.1


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_weighted_langevin_chains_follow_a_moving_law_that_they_lag_behind(temperature):
    energies, g, h = path(60), torch.Generator().manual_seed(0), 0.05
    x = energies[0].sample(20_000, g, temperature)
    log_weight = torch.zeros(len(x), dtype=torch.float64)
    for k in range(60):
        old, new = energies[k], energies[k + 1]
        noise = torch.randn(x.shape, generator=g, dtype=torch.float64)
        moved = x - h * old.grad(x) + (2 * temperature * h) ** 0.5 * noise
        log_weight = jarzynski.ula_step(
            log_weight,
            x,
            old(x),
            old.grad(x),
            moved,
            new(moved),
            new.grad(moved),
            step_size=h,
            temperature=temperature,
        )
        x = moved
        if k in (20, 40, 59):
            assert_follows(x, log_weight, new, energies[0], temperature)
    # Unweighted, the chains have the mean of versions ago: the weights are what is right.
    lag = abs(x.mean().item() - energies[-1].m)
    assert lag > 20 * (temperature / 3 / len(x)) ** 0.5


@pytest.mark.parametrize("fault", ["noise", "step", "temperature"])
def test_a_wrong_step_is_seen_in_log_z(fault):
    # The same path with noise 5% too loud, weights of another step, or T forgotten.
    energies, g, h, t = path(60), torch.Generator().manual_seed(0), 0.05, 0.5
    x = energies[0].sample(20_000, g, t)
    log_weight = torch.zeros(len(x), dtype=torch.float64)
    loud = 1.05 if fault == "noise" else 1.0
    for old, new in pairwise(energies):
        noise = torch.randn(x.shape, generator=g, dtype=torch.float64)
        moved = x - h * old.grad(x) + loud * (2 * t * h) ** 0.5 * noise
        log_weight = jarzynski.ula_step(
            log_weight,
            x,
            old(x),
            old.grad(x),
            moved,
            new(moved),
            new.grad(moved),
            step_size=2 * h if fault == "step" else h,
            temperature=1.0 if fault == "temperature" else t,
        )
        x = moved
    with pytest.raises(AssertionError):
        assert_follows(x, log_weight, energies[-1], energies[0], t)


@pytest.mark.parametrize("name", ["langevin", "mala"])
@pytest.mark.parametrize("lag", [1, 10])
def test_chains_that_skip_versions_are_weighted_by_what_they_missed(name, lag):
    # A chain is leased every `lag` versions only; the weights that moved meanwhile are one step.
    energies, g = path(100), torch.Generator().manual_seed(1)
    kernel = samplers.make(name, step_size=0.1, temperature=1.0)
    x = energies[0].sample(20_000, g)
    log_weight, recorded = torch.zeros(len(x), dtype=torch.float64), energies[0](x)
    for version in range(lag, 101, lag):
        now = energies[version]
        log_weight = jarzynski.weights_moved(log_weight, recorded, now(x))
        x, recorded, log_weight = moved_under(kernel, x, log_weight, now, 3, g)
        assert torch.equal(recorded, now(x))
    assert_follows(x, log_weight, energies[-1], energies[0])


def test_weighted_chains_are_those_of_run_chain():
    kernel, energy = samplers.make("langevin", step_size=0.1, temperature=0.7), Gaussian(2.0)
    x = torch.linspace(-1, 1, 9)[:, None]
    chain = samplers.run_chain(kernel, x, energy, 5, torch.Generator().manual_seed(3))
    position, value, _ = moved_under(
        kernel, x, torch.zeros(9), energy, 5, torch.Generator().manual_seed(3)
    )
    assert torch.equal(position, chain.position)
    assert torch.equal(value, chain.energy)


def test_standing_weights_correct_the_discretisation_of_langevin():
    # h = .5: the chains' variance goes to 1.333, the weighted one stays 1, log Z stays 0.
    energy, g = Gaussian(1.0), torch.Generator().manual_seed(2)
    kernel = samplers.make("langevin", step_size=0.5, temperature=1.0)
    x = energy.sample(50_000, g)
    x, _, log_weight = moved_under(
        kernel, x, torch.zeros(len(x), dtype=torch.float64), energy, 4, g
    )
    assert x.var().item() > 1.2
    assert_follows(x, log_weight, energy, energy)


def test_resampling_keeps_log_z_and_the_weighted_law():
    # Resampled after every degeneration, log Z goes on as if the weights had been kept.
    energies, g = path(30), torch.Generator().manual_seed(4)
    kernel = samplers.make("langevin", step_size=0.05, temperature=1.0)
    x = energies[0].sample(20_000, g)
    log_weight, resampled = torch.zeros(len(x), dtype=torch.float64), 0
    for k in range(1, 31):
        log_weight = jarzynski.weights_moved(log_weight, energies[k - 1](x), energies[k](x))
        before = jarzynski.log_z_ratio(log_weight).item()
        index, log_weight = jarzynski.resample(log_weight, g, min_ess_ratio=0.8)
        assert jarzynski.log_z_ratio(log_weight).item() == pytest.approx(before, abs=1e-9)
        assert ess_ratio(log_weight).item() >= 0.8
        resampled += not torch.equal(index, torch.arange(len(x)))
        x, _, log_weight = moved_under(kernel, x[index], log_weight, energies[k], 1, g)
    assert resampled >= 2
    expected = energies[-1].log_z() - energies[0].log_z()
    # Each stretch of ESS ratio .8 adds a relative variance of .25 / N.
    error = (0.25 * (resampled + 1) / len(x)) ** 0.5
    assert abs(jarzynski.log_z_ratio(log_weight).item() - expected) < 4 * error
    w = torch.softmax(log_weight, 0)
    mean = (w * x.flatten()).sum().item()
    assert abs(mean - 1.0) < 4 * (2 / 3 / (0.8 * len(x))) ** 0.5


def test_systematic_resampling_copies_each_chain_its_share_rounded():
    g = torch.Generator().manual_seed(0)
    log_weight = torch.randn(50, generator=g)
    share = 50 * torch.softmax(log_weight.double(), 0)
    counts = torch.zeros(50)
    for _ in range(2000):
        count = jarzynski.systematic_resample(log_weight, g).bincount(minlength=50)
        assert (count >= share.floor()).all()
        assert (count <= share.ceil()).all()
        counts += count
    error = (share.frac() * (1 - share.frac()) / 2000).sqrt()
    assert ((counts / 2000 - share).abs() < 4.5 * error + 1e-6).all()


def test_samplers_without_a_density_are_refused_by_the_key_to_change():
    section = samplers.FAMILY.section
    langevin = {"step_size": 0.1, "temperature": 1.0}
    jarzynski.check_sampler(section("langevin", **langevin))
    jarzynski.check_sampler(section("mala", **langevin))
    cases = [
        (section("langevin", grad_clip=0.01, **langevin), r"sampler\.grad_clip: 0\.01"),
        (section("langevin", clamp=(-1, 1), **langevin), r"sampler\.clamp"),
        (section("langevin", step_size=0.1, temperature=0.0), r"sampler\.temperature: 0"),
        (section("sghmc", friction=1.0, **langevin), r"sampler\.name: sghmc"),
    ]
    for config, message in cases:
        with pytest.raises(UserError, match=message):
            jarzynski.check_sampler(config)
    with pytest.raises(UserError, match=r"buffer\.reinit_prob: 0\.05"):
        jarzynski.check_buffer(0.05)
    jarzynski.check_buffer(0.0)
