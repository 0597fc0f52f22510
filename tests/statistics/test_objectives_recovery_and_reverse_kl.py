"""Recovery likelihood and reverse KL: objectives with chains or a critic of their own."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import optimize, stats
from torch import Tensor, nn

from ebm_dist import objectives
from ebm_dist.core.types import Negatives

F64 = torch.float64


def normal_grid(num: int, std: float = 1.0, mean: float = 0.0) -> Tensor:
    """Quantiles (num, 1) of a Gaussian, scaled so that mean and variance are exact."""
    z = torch.special.ndtri((torch.arange(num, dtype=F64) + 0.5) / num)
    return (mean + std * z / z.square().mean().sqrt())[:, None]


class Parabolas(nn.Module):
    """E_t(x) = alpha_t/2 |x|^2 with logits -E_t, one for each level."""

    def __init__(self, alphas: list[float]) -> None:
        super().__init__()
        self.alphas = nn.Parameter(torch.tensor(alphas, dtype=F64))

    def logits(self, x: Tensor) -> Tensor:
        return -0.5 * self.alphas * x.flatten(1).square().sum(1, keepdim=True)

    def forward(self, x: Tensor) -> Tensor:
        return -self.logits(x)[:, 0]


def recovered_variance(
    alpha: float, clean: float, std: float, step_size: float, num_steps: int
) -> float:
    """Variance after K unadjusted steps on p(x | x~) from x~, for x of variance `clean`.

    The chain is linear: y' = (1 - h (alpha + 1/s^2)) y + h x~/s^2 + sqrt(2h) xi.
    """
    h, stiffness = step_size, alpha + 1 / std**2
    rate = 1 - h * stiffness
    gain = rate**num_steps + (1 - rate**num_steps) / (std**2 * stiffness)
    noise = 2 * h * (1 - rate ** (2 * num_steps)) / (1 - rate**2)
    return gain**2 * (clean + std**2) + noise


def gradients(objective, energy: nn.Module, data: Tensor, num: int) -> tuple[Tensor, Tensor]:
    """Mean gradient in `energy.alphas` over seeds, and its standard error."""
    rows = []
    for seed in range(num):
        loss, _ = objective(energy, data, None, torch.Generator().manual_seed(seed))
        rows.append(torch.autograd.grad(loss, energy.alphas)[0])
    stacked = torch.stack(rows)
    return stacked.mean(0), stacked.std(0) / num**0.5


@pytest.mark.parametrize("alpha", [0.7, 1.0, 1.6])
@pytest.mark.parametrize(("std", "step_size", "num_steps"), [(0.5, 0.2, 30), (1.0, 0.1, 5)])
def test_recovery_gradient_is_that_of_the_linear_chain(alpha, std, step_size, num_steps):
    objective = objectives.make(
        "recovery_likelihood", noise_std=std, step_size=step_size, num_steps=num_steps
    )
    mean, error = gradients(objective, Parabolas([alpha]), normal_grid(20_001), 20)
    expected = 0.5 * (1 - recovered_variance(alpha, 1.0, std, step_size * std**2, num_steps))
    assert abs(mean.item() - expected) < 4 * error.item()
    # 5% more noise in the chain would be seen: it moves half the variance by 5% of the noise.
    h, rate = step_size * std**2, 1 - step_size * (std**2 * alpha + 1)
    louder = 0.05 * 2 * h * (1 - rate ** (2 * num_steps)) / (1 - rate**2)
    assert 4 * error.item() < louder


def test_adjusted_recovery_stands_still_at_the_datas_precision():
    # Data of variance .49: alpha = 1/.49, at a step whose unadjusted bias would be seen.
    alpha, std = 1 / 0.49, 0.8
    params = {"noise_std": std, "step_size": 0.6, "num_steps": 40}
    data = normal_grid(20_001, 0.7)
    exact = objectives.make("recovery_likelihood", adjusted=True, **params)
    mean, error = gradients(exact, Parabolas([alpha]), data, 10)
    assert abs(mean.item()) < 4 * error.item()
    biased = 0.5 * (0.49 - recovered_variance(alpha, 0.49, std, 0.6 * std**2, 40))
    assert abs(biased) > 20 * error.item()
    _, metrics = exact(Parabolas([alpha]), data, None, torch.Generator().manual_seed(0))
    assert 0.2 < metrics["sampler/acceptance"].item() < 0.99


def test_every_level_recovers_the_same_clean_data():
    # Levels weigh by smallest std over their own.
    stds, step_size, num_steps = (0.4, 0.8), 0.2, 20
    objective = objectives.make(
        "recovery_likelihood", noise_std=stds, step_size=step_size, num_steps=num_steps
    )
    mean, error = gradients(objective, Parabolas([1.3]), normal_grid(20_001), 20)
    parts = [0.5 * (1 - recovered_variance(1.3, 1.0, s, step_size * s**2, num_steps)) for s in stds]
    expected = 0.5 * (parts[0] + parts[1] * stds[0] / stds[1])
    assert abs(mean.item() - expected) < 4 * error.item()
    assert 4 * error.item() < 0.02
    assert abs(expected - 0.5 * sum(parts)) > 4 * error.item()


def test_level_energies_are_those_of_the_diffused_data():
    # Level t is sqrt(1 - s_t^2) x_t, of variance (1 - s_t^2) (kept_t^2 v + 1 - kept_t^2).
    stds, v, num_steps, step_size = (0.3, 0.6), 0.25, 20, 0.2
    objective = objectives.make(
        "recovery_likelihood",
        noise_std=stds,
        conditioning="level",
        loss_scale="none",
        step_size=step_size,
        num_steps=num_steps,
    )
    kept = (1.0, 1 - 0.3**2)
    clean = [(1 - s**2) * (k * v + 1 - k) for s, k in zip(stds, kept)]
    alphas = [2.0, 1.5]
    mean, error = gradients(objective, Parabolas(alphas), normal_grid(20_001, v**0.5), 20)
    for t in range(2):
        s = stds[t]
        h = step_size * s**2 * (1 - s**2)
        expected = 0.25 * (clean[t] - recovered_variance(alphas[t], clean[t], s, h, num_steps))
        assert abs(mean[t].item() - expected) < 4 * error[t].item()
        assert 4 * error[t].item() < 0.05 * clean[t]


def test_diffusion_run_backwards_gives_the_law_of_the_data():
    stds, v = (0.3, 0.6, 0.8, 0.9, 0.95), 0.25
    kept, alphas = 1.0, []
    for s in stds:
        alphas.append(1 / ((1 - s**2) * (kept * v + 1 - kept)))
        kept *= 1 - s**2
    assert kept < 0.01
    objective = objectives.make(
        "recovery_likelihood",
        noise_std=stds,
        conditioning="level",
        adjusted=True,
        num_steps=60,
        step_size=0.5,
    )
    num = 20_000
    g = torch.Generator().manual_seed(0)
    # The last level starts from what the diffusion ends in, N(0, 1) but for kept (v - 1).
    start = torch.empty(num, 1, dtype=F64).normal_(generator=g) * (1 + kept * (v - 1)) ** 0.5
    x = objective.sample(Parabolas(alphas), start, g)
    assert abs(x.var().item() - v) < 4 * v * (2 / num) ** 0.5
    assert abs(x.mean().item()) < 4 * (v / num) ** 0.5


# -- reverse KL


@pytest.mark.parametrize("m", [0.5, 1.0, 1.5])
def test_linear_critic_reaches_the_donsker_varadhan_supremum(m):
    # N(m, 1) against N(0, 1): sup = m^2/2 at c = m x.
    objective = objectives.make(
        "reverse_kl", event_shape=(1,), critic_widths=(), energy_weight=0.0
    ).double()
    weight = next(objective.critic.parameters())
    data, model = normal_grid(20_001), normal_grid(20_001, mean=m)
    energy = Parabolas([1.0])

    def at(w: float) -> tuple[float, float]:
        weight.data.fill_(w)
        loss, metrics = objective(energy, data, model)
        assert loss.item() == pytest.approx(metrics["loss/critic"].item())
        return loss.item(), torch.autograd.grad(loss, weight)[0].item()

    low, high = 0.0, 4.0
    for _ in range(40):
        middle = 0.5 * (low + high)
        low, high = (middle, high) if at(middle)[1] < 0 else (low, middle)
    # The grid lacks the tails that mean exp feels: 20,001 quantiles end at 4.06.
    assert low == pytest.approx(m, rel=5e-3)
    assert at(low)[0] == pytest.approx(m**2 / 2, rel=5e-3)
    assert at(m)[0] == pytest.approx(m**2 / 2, rel=5e-3)


@pytest.mark.parametrize("temperature", [1.0, 0.5])
@pytest.mark.parametrize("w", [0.7, -1.2])
def test_energy_follows_the_critic_by_the_covariance(temperature, w):
    # Model N(mu, T/alpha), critic w x: d/d mu E[c] = w and d/d alpha E[c] = 0.
    objective = objectives.make(
        "reverse_kl", event_shape=(1,), critic_widths=(), temperature=temperature
    ).double()
    next(objective.critic.parameters()).data.fill_(w)
    alpha, mu = (torch.tensor(v, dtype=F64, requires_grad=True) for v in (1.7, 0.4))
    model = normal_grid(20_001, (temperature / 1.7) ** 0.5, 0.4)
    loss, _ = objective(lambda x: 0.5 * alpha * (x.flatten() - mu) ** 2, normal_grid(2001), model)
    along_mu, along_alpha = torch.autograd.grad(loss, [mu, alpha])
    assert along_mu.item() == pytest.approx(w, rel=1e-9)
    assert along_alpha.item() == pytest.approx(0.0, abs=1e-9)


def test_weighted_negatives_stand_for_the_law_that_their_weights_describe():
    # Chains of N(0, 1) with weights e^{x/2} are N(1/2, 1): the estimate is that of fresh ones.
    objective = objectives.make("reverse_kl", event_shape=(1,), critic_widths=()).double()
    next(objective.critic.parameters()).data.fill_(0.5)
    x = normal_grid(20_001)
    weighted = Negatives(x, torch.zeros(20_001), torch.zeros(20_001), 0.5 * x.flatten())
    loss, _ = objective(Parabolas([1.0]), x, weighted)
    assert loss.item() == pytest.approx(0.125, rel=5e-3)


class Gaussian(nn.Module):
    """E(x) = (x - mu)^2 / (2 e^{2 s}): the family that is fitted to two bumps."""

    def __init__(self, mean: float, log_std: float) -> None:
        super().__init__()
        self.mean = nn.Parameter(torch.tensor(mean))
        self.log_std = nn.Parameter(torch.tensor(log_std))

    def forward(self, x: Tensor) -> Tensor:
        return 0.5 * ((x.flatten() - self.mean) / self.log_std.exp()).square()

    def sample(self, num: int, g: torch.Generator) -> Tensor:
        noise = torch.empty(num, 1).normal_(generator=g)
        return (self.mean + self.log_std.exp() * noise).detach()


def two_bumps(num: int, apart: float, g: torch.Generator) -> Tensor:
    """1/2 N(-apart, 1) + 1/2 N(apart, 1)."""
    side = 2.0 * torch.randint(0, 2, (num, 1), generator=g) - 1.0
    return apart * side + torch.empty(num, 1).normal_(generator=g)


def best_reverse_kl(apart: float) -> tuple[float, float, float]:
    """Mean, standard deviation and divergence of the best Gaussian near the right bump."""
    x = np.linspace(-30, 30, 20_001)

    def divergence(unknowns) -> float:
        mean, std = unknowns
        log_q = stats.norm.logpdf(x, mean, std)
        log_p = np.logaddexp(stats.norm.logpdf(x, -apart), stats.norm.logpdf(x, apart))
        return float(np.sum(np.exp(log_q) * (log_q - log_p + math.log(2))) * (x[1] - x[0]))

    best = optimize.minimize(divergence, (apart, 1.0), method="Nelder-Mead", tol=1e-9)
    return float(best.x[0]), float(best.x[1]), float(best.fun)


def fit(
    objective, energy: Gaussian, apart: float, num_updates: int, lr: float
) -> tuple[float, float, float]:
    """Mean, standard deviation and loss, averaged over the last quarter of the updates."""
    g = torch.Generator().manual_seed(0)
    parameters = [*energy.parameters(), *objective.parameters()]
    optimiser = torch.optim.Adam(parameters, lr=lr)
    schedule = torch.optim.lr_scheduler.LinearLR(optimiser, 1.0, 0.05, num_updates)
    seen = []
    for _ in range(num_updates):
        loss, _ = objective(energy, two_bumps(2048, apart, g), energy.sample(2048, g), g)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
        seen.append((energy.mean.item(), energy.log_std.exp().item(), loss.item()))
    tail = torch.tensor(seen[-num_updates // 4 :]).mean(0)
    return tail[0].item(), tail[1].item(), tail[2].item()


class LogRatio(nn.Module):
    """The best critic: log q - log p of one Gaussian q and two bumps p."""

    def __init__(self, mean: float, std: float, apart: float) -> None:
        super().__init__()
        self.mean, self.std, self.apart = mean, std, apart

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten()
        log_q = -0.5 * ((x - self.mean) / self.std).square() - math.log(self.std)
        bumps = torch.stack([-0.5 * (x - m).square() for m in (-self.apart, self.apart)])
        return log_q - bumps.logsumexp(0) + math.log(2)


@pytest.mark.parametrize("apart", [2.5, 3.0, 4.0])
def test_reverse_kl_stands_still_at_its_optimum_under_the_best_critic(apart):
    mean, std, kl = best_reverse_kl(apart)
    if apart == 3.0:
        assert (mean, std) == pytest.approx((2.98, 1.02), abs=0.01)
        assert kl == pytest.approx(0.68879, abs=1e-4)
    objective = objectives.make("reverse_kl", event_shape=(1,))
    data = torch.cat([normal_grid(20_001, mean=m) for m in (-apart, apart)])
    at: list[float] = []

    def slopes(mean: float, std: float) -> Tensor:
        objective.critic = LogRatio(mean, std, apart)
        energy = Gaussian(mean, math.log(std)).double()
        loss, metrics = objective(energy, data, normal_grid(20_001, std, mean))
        at.append(metrics["loss/critic"].item())
        return torch.stack(torch.autograd.grad(loss, [*energy.parameters()]))

    assert slopes(mean, std).abs().max().item() < 2e-3
    assert at[0] == pytest.approx(kl, abs=5e-3)
    # A minimum: off it, descent leads back.
    for off in (-0.15, 0.15):
        assert slopes(mean + off, std)[0].item() * off > 0
        assert slopes(mean, std * (1 + off))[1].item() * off > 0


def test_reverse_kl_seeks_a_mode():
    mean, std, kl = best_reverse_kl(3.0)
    objective = objectives.make("reverse_kl", event_shape=(1,), critic_widths=(64, 64))
    # A wide start ends in another minimum, near (0, 2.8).
    came = fit(objective, Gaussian(2.0, 0.0), 3.0, 1000, lr=5e-3)
    assert came[0] == pytest.approx(mean, abs=0.05)
    assert came[1] == pytest.approx(std, abs=0.05)
    assert came[2] == pytest.approx(kl, abs=0.04)


@pytest.mark.parametrize("apart", [1.0, 3.0])
def test_contrastive_covers_both_modes(apart):
    fitted = fit(objectives.make("contrastive"), Gaussian(2.0, 0.0), apart, 1000, lr=2e-2)
    assert fitted[0] == pytest.approx(0.0, abs=0.1)
    assert fitted[1] == pytest.approx(math.sqrt(1 + apart**2), abs=0.1)
