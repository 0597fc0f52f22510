"""What each sampler's law must be: claims that its own test and the mutation check share.

A claim takes a constructor, `make(**params) -> kernel`, and fails with an AssertionError
when the chains' law is not the closed form's. Tolerances are 4 standard errors of
independent chains; the number of chains is such that a noise scale wrong by 5% fails.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from scipy import integrate, optimize, special
from torch import Tensor, nn

from ebm_dist import energies
from ebm_dist.core.types import EnergyFn
from ebm_dist.energies.context import bind
from ebm_dist.samplers import Kernel, run_chain
from ebm_dist.samplers import make as make_kernel

Make = Callable[..., Kernel[Any]]
NUM_CHAINS = 20_000


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def same(came: float, expected: float, standard_error: float, what: str) -> None:
    """`came` lies within 4 standard errors of `expected`."""
    distance = abs(came - expected) / standard_error
    assert distance < 4, f"{what}: {came:.5f}, expected {expected:.5f}, {distance:.1f} SE away"


def same_mean(sample: Tensor, expected: float, what: str) -> None:
    """The mean of independent numbers."""
    sample = sample.double().flatten()
    same(sample.mean().item(), expected, sample.std().item() / len(sample) ** 0.5, what)


def same_gaussian_variance(sample: Tensor, expected: float, what: str) -> None:
    """The variance of independent Gaussian numbers of mean zero."""
    sample = sample.double().flatten()
    standard_error = expected * (2 / len(sample)) ** 0.5
    assert standard_error < 0.1 * expected / 8, "too few chains to see a noise scale 5% off"
    same(sample.square().mean().item(), expected, standard_error, what)
    same(sample.mean().item(), 0.0, (expected / len(sample)) ** 0.5, f"mean beside {what}")


def quadratic(alpha: float) -> Callable[[Tensor], Tensor]:
    return lambda x: 0.5 * alpha * x.square().flatten(1).sum(1)


# A skewed density: exp(-(x + e^-x)/T). With y = e^-x / T it is y ~ Gamma(1/T), so its mean,
# variance and tails are closed forms at every temperature.
def gumbel(x: Tensor) -> Tensor:
    return (x + (-x).exp()).flatten(1).sum(1)


def gumbel_sample(num: int, temperature: float, seed: int = 7) -> Tensor:
    y = torch._standard_gamma(torch.full((num, 1), 1 / temperature), generator=generator(seed))
    return -(temperature * y).log()


def same_gumbel(x: Tensor, temperature: float) -> None:
    """Mean, variance, right and left tail of independent chains (N, 1)."""
    x = x.double().flatten()
    shape = 1 / temperature
    mean = -math.log(temperature) - special.digamma(shape)
    variance = special.polygamma(1, shape)
    same_mean(x, mean, "mean of the skewed target")
    same_mean((x - mean).square(), float(variance), "variance of the skewed target")
    for edge in (-math.log(2.0), 1.5):
        tail = float(special.gammainc(shape, math.exp(-edge) / temperature))
        same_mean((x > edge).double(), tail, f"P(x > {edge:.2f}) of the skewed target")


# --- unadjusted Langevin ---------------------------------------------------------------

LANGEVIN_CASES = [(1.0, 1.0, 0.1), (1.0, 1.0, 1.0), (4.0, 0.5, 0.2), (0.5, 2.0, 0.8)]


def langevin_variance_shows_its_known_bias(make: Make, cases=LANGEVIN_CASES) -> None:
    """2T / (a (2 - a h)): against T/a a wrong noise scale could hide in the tolerance."""
    for alpha, temperature, h in cases:
        kernel = make(step_size=h, temperature=temperature)
        num_steps = max(4, math.ceil(-5 / math.log(max(abs(1 - alpha * h), 1e-3))))
        chain = run_chain(
            kernel, torch.zeros(NUM_CHAINS, 2), quadratic(alpha), num_steps, generator()
        )
        expected = 2 * temperature / (alpha * (2 - alpha * h))
        # What is left of the start at zero after these steps.
        expected *= 1 - (1 - alpha * h) ** (2 * num_steps)
        same_gaussian_variance(chain.position, expected, f"variance at a={alpha}, h={h}")


def grid_law(
    grad: Callable[[Tensor], Tensor], start: float, moves: list[tuple[float, float]]
) -> tuple[Tensor, Tensor]:
    """The exact law of Langevin moves (h, T) from `start`, on a grid: points, masses.

    The law of an unadjusted chain on a skewed target has no closed form; the transition
    density is a Gaussian, so quadrature gives it to rounding.
    """
    points = torch.linspace(-6, 16, 1401, dtype=torch.float64)
    width = (points[1] - points[0]).item()
    at = torch.tensor([start], dtype=torch.float64)
    mass = torch.ones(1, dtype=torch.float64)
    last: tuple[float, float] | None = None
    kernel = torch.empty(0)
    for k, (h, t) in enumerate(moves):
        if k < 2 or (h, t) != last:
            mean, std = at - h * grad(at), (2 * t * h) ** 0.5
            kernel = torch.exp(-0.5 * ((points - mean[:, None]) / std) ** 2)
            kernel *= width / (std * math.sqrt(2 * math.pi))
        mass, at, last = mass @ kernel, points, (h, t)
    assert abs(mass.sum().item() - 1) < 1e-6
    return points, mass


def same_grid_law(x: Tensor, points: Tensor, mass: Tensor) -> None:
    x = x.double().flatten()
    mean = (points * mass).sum().item()
    same_mean(x, mean, "mean of the skewed target")
    variance = ((points - mean).square() * mass).sum().item()
    same_mean((x - mean).square(), variance, "variance of the skewed target")
    third = ((points - mean) ** 3 * mass).sum().item()
    assert third > 0.05, "the target is meant to be skewed"
    same_mean((x - mean) ** 3, third, "third moment of the skewed target")


def langevin_follows_its_exact_law_on_a_skewed_target(make: Make) -> None:
    for temperature, h in ((1.0, 0.05), (0.5, 0.1)):
        kernel = make(step_size=h, temperature=temperature)
        chain = run_chain(kernel, torch.ones(NUM_CHAINS, 1), gumbel, 40, generator(1))
        law = grid_law(lambda x: 1 - (-x).exp(), 1.0, [(h, temperature)] * 40)
        same_grid_law(chain.position, *law)


def langevin_autocorrelation_and_ess(make: Make) -> None:
    """rho = 1 - a h at lag one, and ESS/N = a h / (2 - a h) from the variance of chain means."""
    for alpha, h in ((1.0, 0.1), (2.0, 0.25)):
        rho, num_steps = 1 - alpha * h, 200
        stationary = 2 / (alpha * (2 - alpha * h))
        x = torch.randn(NUM_CHAINS, 1, generator=generator(3)) * stationary**0.5
        kernel = make(step_size=h, temperature=1.0)
        trace = run_chain(kernel, x, quadratic(alpha), num_steps, generator(4), 1).trace
        assert trace is not None
        now, later = trace[-2].flatten(), trace[-1].flatten()
        product = now * later / stationary
        same_mean(product, rho, f"autocorrelation at ah={alpha * h}")
        lag = torch.arange(1, num_steps, dtype=torch.float64)
        pairs = ((num_steps - lag) * rho**lag).sum().item()
        of_mean = stationary * (num_steps + 2 * pairs) / num_steps**2
        same_gaussian_variance(trace.mean(0), of_mean, "variance of the chains' means")
        # The finite sum above tends to the table's closed form.
        ess_ratio = stationary / of_mean / num_steps
        closed = alpha * h / (2 - alpha * h)
        assert abs(ess_ratio / closed - 1) < 2 / (num_steps * alpha * h)


def langevin_keeps_the_contrastive_fixed_point(make: Make) -> None:
    """At a (2 - a h) = 2 any number of steps leaves unit data unit."""
    for h, steps in ((0.1, 1), (0.1, 7), (0.3, 3)):
        alpha = (1 - math.sqrt(1 - 2 * h)) / h
        x = torch.randn(NUM_CHAINS, 2, generator=generator(5))
        chain = run_chain(
            make(step_size=h, temperature=1.0), x, quadratic(alpha), steps, generator(6)
        )
        same_gaussian_variance(chain.position, 1.0, f"variance after {steps} steps from the data")
    assert abs((1 - math.sqrt(1 - 0.2)) / 0.1 - 1.05573) < 1e-5


def short_run_precision(h: float, num_steps: int, start_std: float) -> float:
    """The precision whose chains of that length from N(0, start_std^2) have unit variance."""

    def excess(alpha: float) -> float:
        kept = (1 - alpha * h) ** (2 * num_steps)
        return kept * start_std**2 + (1 - kept) * 2 / (alpha * (2 - alpha * h)) - 1

    return float(optimize.brentq(excess, 0.05, 1 / h))  # type: ignore[arg-type]


def langevin_short_run_generates_what_a_long_run_does_not(make: Make) -> None:
    """60 steps of .01 from N(0, 4) make unit variance; a long run has .58144. From a start
    narrower than the data the precision is too small, and a long run too wide."""
    assert abs(short_run_precision(0.01, 60, 2.0) - 1.73491) < 1e-5
    for h, num_steps, start_std in ((0.01, 60, 2.0), (0.05, 20, 1.6), (0.02, 30, 0.5)):
        alpha = short_run_precision(h, num_steps, start_std)
        kernel = make(step_size=h, temperature=1.0)
        x = start_std * torch.randn(NUM_CHAINS, 2, generator=generator(8))
        short = run_chain(kernel, x, quadratic(alpha), num_steps, generator(9))
        same_gaussian_variance(short.position, 1.0, "short-run variance")
        num_more = math.ceil(5 / (alpha * h))
        long = run_chain(kernel, short.position, quadratic(alpha), num_more, generator(10))
        limit = 2 / (alpha * (2 - alpha * h))
        assert abs(limit - 1) > 0.1
        kept = (1 - alpha * h) ** (2 * num_more)
        expected = kept + (1 - kept) * limit
        same_gaussian_variance(long.position, expected, "long-run variance")
        if h == 0.01:
            assert abs(limit - 0.58144) < 1e-5


def langevin_under_stale_weights(make: Make) -> None:
    """Precision 1 + k/1000, weights `lag` versions old: V' = (1 - h a)^2 V + 2 T h; and one that
    grows five times as fast, at half the temperature and twice the step."""
    table = [(0.05, 1.0, 1e-3, lag) for lag in (0, 50, 200)]
    at_the_end = {0: 0.527638, 50: 0.540527, 200: 0.583541}
    for h, t, growth, lag in (*table, (0.1, 0.5, 5e-3, 20), (0.1, 0.5, 5e-3, 100)):
        kernel, noise = make(step_size=h, temperature=t), generator(11)
        x = torch.randn(NUM_CHAINS // 5, 4, generator=generator(12))
        variance = 1.0
        for k in range(1000 if growth == 1e-3 else 300):
            alpha = 1 + max(k - lag, 0) * growth
            variance = (1 - h * alpha) ** 2 * variance + 2 * t * h
            energy = quadratic(alpha)
            x = kernel.step(kernel.init(x, energy), energy, noise)[0].position
        if growth == 1e-3:
            assert abs(variance - at_the_end[lag]) < 1e-6
        same_gaussian_variance(x, variance, f"variance at lag {lag}")


def annealed_langevin_follows_its_schedule(make: Make) -> None:
    """Variance and skewed law after each part of the cooling, by the exact recursion."""
    h, hot, cold, num = 0.1, 8.0, 0.5, 12
    kernel = make(step_size=h, temperature=cold, start_temperature=hot, num_annealing_steps=num)
    schedule = [hot * (cold / hot) ** min(1.0, k / (num - 1)) for k in range(60)]
    for num_steps in (6, 12, 60):
        chain = run_chain(
            kernel, torch.zeros(NUM_CHAINS, 2), quadratic(1.0), num_steps, generator()
        )
        variance = 0.0
        for t in schedule[:num_steps]:
            variance = (1 - h) ** 2 * variance + 2 * t * h
        same_gaussian_variance(chain.position, variance, f"variance after {num_steps} moves")
    skew = make(step_size=0.05, temperature=0.5, start_temperature=1.0, num_annealing_steps=8)
    chain = run_chain(skew, torch.ones(NUM_CHAINS, 1), gumbel, 30, generator(2))
    moves = [(0.05, 0.5 ** min(1.0, k / 7)) for k in range(30)]
    same_grid_law(chain.position, *grid_law(lambda x: 1 - (-x).exp(), 1.0, moves))


def flow_langevin_follows_its_schedule(make: Make) -> None:
    """On a parabola: V' = (1 - h)^2 V + 2 T(t) h. No noise before the cutoff, T from time 1 on."""
    h, cutoff, temperature = 0.1, 0.5, 0.7
    kernel = make(step_size=h, temperature=temperature, time_cutoff=cutoff)
    ramp = [min(max((k * h - cutoff) / (1 - cutoff), 0.0), 1.0) for k in range(40)]
    for num_steps in (5, 8, 10, 40):
        start = torch.ones(NUM_CHAINS, 2)
        chain = run_chain(kernel, start, quadratic(1.0), num_steps, generator())
        variance, mean = 0.0, (1 - h) ** num_steps
        for share in ramp[:num_steps]:
            variance = (1 - h) ** 2 * variance + 2 * temperature * share * h
        if variance == 0.0:
            torch.testing.assert_close(chain.position, mean * start)
        else:
            same_gaussian_variance(chain.position - mean, variance, f"after {num_steps} moves")


def preconditioned_langevin_gives_each_coordinate_its_own_variance(make: Make) -> None:
    """2T / (a (2 - a p h)) on curvatures a of 1 to 10^4, which one step size cannot serve."""
    curvature, scales = torch.tensor([100.0, 1.0, 0.01]), (0.01, 1.4, 50.0)
    for h, temperature in ((0.4, 1.0), (0.8, 0.5)):
        kernel = make(step_size=h, scales=scales, temperature=temperature)
        chain = run_chain(
            kernel,
            torch.zeros(NUM_CHAINS, 3),
            lambda x: 0.5 * (curvature * x.square()).sum(1),
            30,
            generator(),
        )
        for i, (a, p) in enumerate(zip(curvature.tolist(), scales)):
            expected = 2 * temperature / (a * (2 - a * p * h)) * (1 - (1 - a * p * h) ** 60)
            same_gaussian_variance(chain.position[:, i], expected, f"variance at a={a}, h={h}")


def preconditioned_langevin_follows_its_exact_law_on_a_skewed_target(make: Make) -> None:
    """Each coordinate is Langevin at the step h p; quadrature gives that law."""
    h, scales = 0.1, (0.4, 1.2)
    for temperature in (1.0, 0.5):
        kernel = make(step_size=h, scales=scales, temperature=temperature)
        chain = run_chain(kernel, torch.ones(NUM_CHAINS, 2), gumbel, 40, generator(1))
        for i, p in enumerate(scales):
            law = grid_law(lambda x: 1 - (-x).exp(), 1.0, [(h * p, temperature)] * 40)
            same_grid_law(chain.position[:, i], *law)


class Levels(nn.Module):
    """E(x, t) = |x|^2 / (2 v_t) + c_t, v_t = (1, 2.25, 6.25): N(0, I) with three noises."""

    context = needs_context = frozenset({"level"})
    noise_stds = (1e-6, 1.25**0.5, 5.25**0.5)
    offsets = (0.0, -0.4, 0.5)

    def forward(self, x: Tensor, level: Tensor) -> Tensor:
        variance = 1 + torch.tensor(self.noise_stds).square()[level]
        return x.square().sum(1) / (2 * variance) + torch.tensor(self.offsets)[level]


def chains_of_all_levels_have_their_joint_law(make: Make) -> None:
    """p(t) in proportion to v_t exp(-c_t/T) in two dimensions, and variance T v_t at each level."""
    energy, t, num = Levels(), 0.5, NUM_CHAINS // 2
    kernel = make(kernel=make_kernel("mala", step_size=0.5, temperature=t), data_std=1.0)
    start = bind(energy, level=torch.zeros(num, dtype=torch.int64))
    state = run_chain(kernel, torch.zeros(num, 2), start, 60, generator(3)).state
    assert state is not None
    variance = 1 + torch.tensor(energy.noise_stds).square()
    mass = variance * (-torch.tensor(energy.offsets) / t).exp()
    for k, share in enumerate((mass / mass.sum()).tolist()):
        at = state.level == k
        error = (share * (1 - share) / num) ** 0.5
        assert abs(float(at.float().mean()) - share) < 4 * error, f"occupancy of level {k}"
    same_gaussian_variance(state.position / variance[state.level, None].sqrt(), t, "variance")


class Blurred(nn.Module):
    """E(x, t) of N(0, d^2 + s_t^2) at a temperature T, in two dimensions; d = 1/2."""

    context = needs_context = frozenset({"level"})
    noise_stds = (0.1, 0.4, 1.0, 2.5)

    def __init__(self, temperature: float) -> None:
        super().__init__()
        self.variance = 0.25 + torch.tensor(self.noise_stds).square()
        self.temperature = temperature

    def forward(self, x: Tensor, level: Tensor) -> Tensor:
        return self.temperature * x.square().sum(1) / (2 * self.variance[level])


def descent_has_its_discretised_variance(make: Make) -> None:
    """Every move is linear in x with noise of its own, so each level's variance follows."""
    for t, c, n in ((1.0, 0.3, 1), (0.5, 0.6, 2)):
        energy, kernel = Blurred(t), make(step_size=c, num_corrections=n, temperature=t)
        stds, top = energy.noise_stds, len(energy.noise_stds) - 1
        given = bind(energy, level=torch.full((NUM_CHAINS,), top))
        g, v = generator(4), stds[-1] ** 2
        state = kernel.init(stds[-1] * torch.randn(NUM_CHAINS, 2, generator=g), given)
        for level in (3, 2, 1, 0, 0):
            s2, a = stds[level] ** 2, 1 / (0.25 + stds[level] ** 2)
            next2 = stds[max(level - 1, 0)] ** 2
            v = (1 - (s2 - next2) * a) ** 2 * v + next2 * (1 - next2 / s2)
            for _ in range(n):
                v = (1 - c * next2 / (0.25 + next2)) ** 2 * v + c * (2 - c) * next2
            state, _ = kernel.step(state, given, g)
            assert (state.level == max(level - 1, 0)).all()
            same_gaussian_variance(state.position, v, f"variance after level {level}")


def corrections_keep_the_noise_of_a_level(make: Make) -> None:
    """Data of one point, E(x, t) = T x^2 / (2 s_t^2): steps of any size leave its law as it is."""
    energy, kernel = Blurred(1.0), make(step_size=0.7, num_corrections=3)
    energy.variance = torch.tensor(energy.noise_stds).square()
    given = bind(energy, level=torch.full((NUM_CHAINS,), 3))
    start = energy.noise_stds[-1] * torch.randn(NUM_CHAINS, 2, generator=generator(5))
    chain = run_chain(kernel, start, given, 6, generator(6))
    same_gaussian_variance(chain.position, energy.noise_stds[0] ** 2, "variance at level 0")


# --- underdamped Langevin --------------------------------------------------------------

SGHMC_CASES = [(1.0, 1.0, 0.1, 1.0), (4.0, 2.0, 0.1, 0.5), (1.0, 1.5, 0.4, 2.0)]


def sghmc_has_its_discretised_covariance(make: Make, cases=SGHMC_CASES) -> None:
    for alpha, gamma, h, t in cases:
        kernel = make(step_size=h, friction=gamma, temperature=t)
        num_steps = math.ceil(10 / (gamma * h)) + 20
        chain = run_chain(
            kernel, torch.zeros(NUM_CHAINS, 2), quadratic(alpha), num_steps, generator()
        )
        x, v = chain.position, chain.state.velocity  # type: ignore[attr-defined]
        of_x = (t / alpha) / (1 - alpha * h**2 / (2 * (2 - gamma * h)))
        of_v = 2 * t / (2 - gamma * h - alpha * h**2 / 2)
        same_gaussian_variance(x, of_x, "Var x")
        same_gaussian_variance(v, of_v, "Var v")
        same_mean(x.double() * v.double(), h * of_v / 2, "Cov(x, v)")


def sghmc_samples_a_skewed_target(make: Make) -> None:
    """At a step whose bias, of order h^2, is far below the standard errors."""
    for t in (1.0, 0.5):
        kernel = make(step_size=0.05, friction=2.0, temperature=t)
        x = gumbel_sample(NUM_CHAINS, t)
        chain = run_chain(kernel, x, gumbel, 240, generator(1))
        same_gumbel(chain.position, t)


# --- Metropolis kernels ----------------------------------------------------------------

METROPOLIS = {
    "mala": {"step_size": 0.6},
    "hmc": {"step_size": 0.6, "num_leapfrog_steps": 2},
    "random_walk": {"proposal_std": 1.5},
}


# It goes from one side of a well to the other in one step, so few of them are enough.
NUTS = {"step_size": 0.6, "max_tree_depth": 4}


def metropolis_samples_a_gaussian(make: Make, params: dict[str, Any], num_steps: int = 80) -> None:
    """Exactly T/a at a step size where the unadjusted chain would be far off."""
    for alpha, t in ((1.0, 1.0), (0.5, 2.0), (2.0, 0.5)):
        kernel = make(**params, temperature=t)
        x = torch.ones(NUM_CHAINS, 1)
        chain = run_chain(kernel, x, quadratic(alpha), num_steps, generator())
        same_gaussian_variance(chain.position, t / alpha, f"variance at a={alpha}, T={t}")


def metropolis_samples_a_skewed_target(
    make: Make, params: dict[str, Any], num_steps: int = 150
) -> None:
    for t in (1.0, 0.5, 2.0):
        kernel = make(**params, temperature=t)
        chain = run_chain(kernel, torch.zeros(NUM_CHAINS, 1), gumbel, num_steps, generator(1))
        same_gumbel(chain.position, t)


def double_well_moment(depth: float, temperature: float) -> float:
    def weight(x: float) -> float:
        return math.exp(-depth * (x * x - 1) ** 2 / temperature)

    mass = integrate.quad(weight, -4, 4)[0]
    return integrate.quad(lambda x: x * x * weight(x), -4, 4)[0] / mass


def metropolis_samples_a_double_well(
    make: Make, params: dict[str, Any], num_steps: int = 150
) -> None:
    """E[x^2] by quadrature; .917671 at a = 4."""
    assert abs(double_well_moment(4.0, 1.0) - 0.917671) < 1e-6
    for depth, t in ((4.0, 1.0), (1.0, 0.5), (2.0, 2.0)):

        def energy(x: Tensor, depth: float = depth) -> Tensor:
            return depth * (x.square() - 1).square().flatten(1).sum(1)

        scaled = {**params, "temperature": t}
        for key in ("step_size", "proposal_std"):
            if key in scaled:
                scaled[key] = scaled[key] * 0.3
        x = torch.ones(NUM_CHAINS, 1)
        chain = run_chain(make(**scaled), x, energy, num_steps, generator(2))
        same_mean(chain.position.square(), double_well_moment(depth, t), f"E[x^2] at a={depth}")


def random_walk_accepts_as_often_as_it_must(make: Make) -> None:
    """(2/pi) atan(2/s) on N(0, 1); at temperature T the walk sees s / sqrt(T)."""
    assert abs(2 / math.pi * math.atan(2) - 0.70483) < 1e-5
    for s, t in ((1.0, 1.0), (0.4, 1.0), (2.4, 1.0), (1.0, 4.0)):
        x = t**0.5 * torch.randn(NUM_CHAINS, 1, generator=generator(3))
        kernel = make(proposal_std=s, temperature=t)
        chain = run_chain(kernel, x, quadratic(1.0), 8, generator(4))
        expected = 2 / math.pi * math.atan(2 * t**0.5 / s)
        for name in ("acceptance", "accepted"):
            # Chains are independent, so the means over their steps are too.
            standard_error = chain.info[name].std().item() / NUM_CHAINS**0.5
            # A proposal 5% wider accepts .5% to 2% less: the error must be far below.
            assert standard_error < 0.0025
            same(
                chain.info[name].double().mean().item(), expected, standard_error, f"{name}, s={s}"
            )


def random_walk_proposes_its_own_width(make: Make) -> None:
    """On a flat energy every step is taken, so the spread is K s^2."""
    for s in (0.5, 3.0):
        chain = run_chain(
            make(proposal_std=s), torch.zeros(NUM_CHAINS, 2), lambda x: 0 * x.sum(1), 5, generator()
        )
        same_gaussian_variance(chain.position, 5 * s**2, "spread of five free steps")


def mala_proposes_its_own_width(make: Make) -> None:
    """On a flat energy every step is taken, so the spread is 2 T h K."""
    for h, t in ((0.5, 1.0), (0.2, 3.0)):
        kernel = make(step_size=h, temperature=t)
        chain = run_chain(
            kernel, torch.zeros(NUM_CHAINS, 2), lambda x: 0 * x.sum(1), 5, generator()
        )
        same_gaussian_variance(chain.position, 10 * t * h, "spread of five free steps")


# --- parallel tempering ----------------------------------------------------------------


def tempering_swaps_as_often_as_it_must(make: Make) -> None:
    """On a quadratic in two dimensions energies are exponential: rate 2 T_r / (T_r + T_s)."""
    for temperatures in ((1.0, 2.0), (0.5, 1.0, 4.0), (1.0, 4.0)):
        kernel = make(temperatures=temperatures)
        x = torch.randn(4000, 2, generator=generator(5)) * temperatures[0] ** 0.5
        warm = run_chain(kernel, x, quadratic(1.0), 40, generator(6)).state
        state, noise, num = warm, generator(7), 40
        before = (warm.num_swaps.clone(), warm.num_attempts)  # type: ignore[attr-defined]
        for _ in range(num):
            state, _ = kernel.step(state, quadratic(1.0), noise)
        for r, (cold, hot) in enumerate(pairwise(temperatures)):
            attempts = state.num_attempts[r] - before[1][r]
            rate = (state.num_swaps[r] - before[0][r]) / attempts
            same_mean(rate, 2 * cold / (cold + hot), f"swap rate of {cold} and {hot}")


def wells(x: Tensor, gap: float, k1: float, k2: float, half: float = 4.0) -> Tensor:
    x = x.flatten(1).sum(1)
    return torch.minimum(0.5 * k1 * (x + half) ** 2, gap + 0.5 * k2 * (x - half) ** 2)


def tempering_finds_the_masses_of_two_wells(make: Make) -> None:
    """exp(gap/T) sqrt(k2/k1), from chains that all start in the well of less mass."""
    for gap, k1, k2, t in ((1.0, 1.0, 4.0, 1.0), (0.0, 1.0, 4.0, 0.5), (1.0, 1.0, 4.0, 2.0)):
        ratio = math.exp(gap / t) * math.sqrt(k2 / k1)
        kernel = make(temperatures=(t, 2.5 * t, 6 * t, 14 * t))

        def energy(x: Tensor, gap: float = gap, k1: float = k1, k2: float = k2) -> Tensor:
            return wells(x, gap, k1, k2)

        chain = run_chain(kernel, torch.full((4000, 1), 4.0), energy, 250, generator(8))
        where = torch.linspace(-20, 20, 400_001, dtype=torch.float64)
        weight = (-energy(where[:, None]) / t).exp()
        left = energy(where[:, None]) == 0.5 * k1 * (where + 4) ** 2
        mass = (weight[left].sum() / weight.sum()).item()
        # The closed form, to the little that the wells overlap.
        assert abs(mass / (1 - mass) / ratio - 1) < 0.02
        x = chain.position.double()
        in_left = energy(x) == 0.5 * k1 * (x.flatten() + 4) ** 2
        same_mean(in_left.double(), mass, f"mass of the left well at T={t}, gap={gap}")
        mean = (where * weight).sum().item() / weight.sum().item()
        same_mean(x, mean, "mean over both wells")


def transitions_find_the_masses_of_two_wells(make: Make) -> None:
    """As `tempering_finds_the_masses_of_two_wells`; its ladder is finer, and every rung of it
    enters the ratio, so that a wrong one shows in the mass."""
    for gap, k1, k2, t in ((1.0, 1.0, 4.0, 1.0), (0.0, 1.0, 4.0, 0.5), (1.0, 1.0, 4.0, 2.0)):
        kernel = make(temperatures=tuple(t * 1.6**i for i in range(7)))

        def energy(x: Tensor, gap: float = gap, k1: float = k1, k2: float = k2) -> Tensor:
            return wells(x, gap, k1, k2)

        chain = run_chain(kernel, torch.full((4000, 1), 4.0), energy, 100, generator(8))
        assert chain.info["acceptance"].mean() > 0.05
        where = torch.linspace(-20, 20, 400_001, dtype=torch.float64)
        weight = (-energy(where[:, None]) / t).exp()
        left = energy(where[:, None]) == 0.5 * k1 * (where + 4) ** 2
        x = chain.position.double()
        in_left = energy(x) == 0.5 * k1 * (x.flatten() + 4) ** 2
        mass = (weight[left].sum() / weight.sum()).item()
        same_mean(in_left.double(), mass, f"mass of the left well at T={t}, gap={gap}")
        mean = (where * weight).sum().item() / weight.sum().item()
        same_mean(x, mean, "mean over both wells")


def transitions_sample_a_skewed_target(make: Make) -> None:
    """From the law itself, by a ladder so coarse that a third and more is refused."""
    for t in (0.5, 1.0):
        kernel = make(temperatures=(t, 3 * t, 9 * t))
        chain = run_chain(kernel, gumbel_sample(NUM_CHAINS, t), gumbel, 20, generator(1))
        assert 0.05 < chain.info["acceptance"].mean() < 0.7
        same_gumbel(chain.position, t)


def tempering_keeps_the_momentum_at_its_temperature(make: Make) -> None:
    """Copies that carry a velocity swap it scaled, so that Var v stays each one's own."""
    temperatures, h, gamma = (1.0, 4.0), 0.1, 1.0
    kernel = make(temperatures=temperatures, friction=gamma, step_size=h)
    state = run_chain(kernel, torch.zeros(NUM_CHAINS, 1), quadratic(1.0), 160, generator(9)).state
    for t, replica in zip(temperatures, state.replicas):  # type: ignore[attr-defined]
        of_v = 2 * t / (2 - gamma * h - h**2 / 2)
        # Exchanges accept on E alone, which the discretised law matches to order h^2.
        assert abs(replica.velocity.square().mean().item() / of_v - 1) < 0.04
        assert abs(replica.position.square().mean().item() / t - 1) < 0.04


# --- discrete events -------------------------------------------------------------------


class Spins:
    """An Ising lattice as a plain callable, enumerable; `gibbs_blocks` where asked for."""

    def __init__(self, side: int, coupling: float = 1.0, field: float = 0.0) -> None:
        self.side, self.coupling, self.field = side, coupling, field
        index = torch.arange(2 ** (side * side))
        bits = index[:, None] >> torch.arange(side * side) & 1
        self.states = bits.reshape(-1, side, side).float()

    def __call__(self, x: Tensor) -> Tensor:
        s = 2 * x - 1
        bonds = s * (s.roll(1, -1) + s.roll(1, -2))
        return -(self.coupling * bonds + self.field * s).flatten(1).sum(1)

    def law(self, temperature: float) -> tuple[Tensor, float]:
        """Probabilities of `states`, and log Z."""
        log_weight = -self(self.states).double() / temperature
        return log_weight.softmax(0), log_weight.logsumexp(0).item()


class ColouredSpins(Spins):
    """The same lattice, saying which sites it can move at once."""

    @property
    def gibbs_blocks(self) -> tuple[Tensor, ...]:
        row = torch.arange(self.side)
        even = (row[:, None] + row) % 2 == 0
        return even, ~even


ISING_TEMPERATURES = (2.0, 2.5, 4.0)


def ising_has_its_moments(
    make: Make, num_steps: int, *, lattice: type[Spins] = Spins, num_chains: int = 2000
) -> None:
    """Energy and magnetisation by enumeration, at three temperatures and in a field."""
    for field, temperatures in ((0.0, ISING_TEMPERATURES), (0.2, (3.0,))):
        energy = lattice(4, field=field)
        for t in temperatures:
            probability, _ = energy.law(t)
            x = torch.randint(0, 2, (num_chains, 4, 4), generator=generator(1)).float()
            chain = run_chain(make(temperature=t), x, energy, num_steps, generator(2))
            what = f"T={t}, field={field}"
            for name, of in (("|m|", torch.abs), ("m", lambda m: m), ("m^3", lambda m: m**3)):
                exact = (probability * of(magnetisation(energy.states))).sum().item()
                same_mean(of(magnetisation(chain.position)), exact, f"{name} at {what}")
            exact = (probability * energy(energy.states)).sum().item()
            same_mean(chain.energy, exact, f"energy at {what}")


def magnetisation(x: Tensor) -> Tensor:
    return (2 * x - 1).double().flatten(1).mean(1)


def ising_has_its_log_partition(make: Make, moves: int, num_chains: int = 1500) -> None:
    """Annealed importance sampling from fair coins: exact for any kernel that leaves each
    law of the ladder invariant, whether or not it has converged. 14.561093 at 1/T = .4."""
    energy = Spins(4)
    assert abs(energy.law(2.5)[1] - 14.561093) < 1e-5
    for t in ISING_TEMPERATURES:
        betas = torch.linspace(0, 1 / t, 25).tolist()
        x = torch.randint(0, 2, (num_chains, 4, 4), generator=generator(3)).float()
        log_weight = torch.zeros(num_chains, dtype=torch.float64)
        noise = generator(4)
        for before, beta in pairwise(betas):
            log_weight -= (beta - before) * energy(x).double()
            x = run_chain(make(temperature=1 / beta), x, energy, moves, noise).position
        weight = (log_weight - log_weight.max()).exp()
        log_mean = weight.mean().log().item() + log_weight.max().item()
        log_z = log_mean + 16 * math.log(2)
        standard_error = (weight.std() / weight.mean()).item() / num_chains**0.5
        assert standard_error < 0.05
        same(log_z, energy.law(t)[1], standard_error, f"log Z at T={t}")


class Coupled:
    """Four sites of three values with random fields and couplings: no symmetry at all.

    Not linear in a site's code (the square), so that a gradient only proposes.
    """

    num_sites, num_values = 4, 3

    def __init__(self) -> None:
        noise = generator(13)
        size = self.num_sites * self.num_values
        self.pair = 0.5 * torch.randn(size, size, generator=noise)
        self.field = 0.7 * torch.randn(size, generator=noise)
        index = torch.arange(self.num_values**self.num_sites)
        value = index[:, None] // self.num_values ** torch.arange(self.num_sites)
        value = value % self.num_values
        self.states = torch.nn.functional.one_hot(value, self.num_values).float()

    def __call__(self, x: Tensor) -> Tensor:
        flat = x.flatten(1)
        return (flat @ self.pair).square().sum(1) * 0.3 + flat @ self.field

    def index(self, x: Tensor) -> Tensor:
        place = self.num_values ** torch.arange(self.num_sites)
        return (x.argmax(-1) * place).sum(-1)


class CoupledBits(Coupled):
    """Seven bits, as lopsided."""

    num_sites = 7

    def __init__(self) -> None:
        noise = generator(14)
        self.pair = 0.6 * torch.randn(7, 7, generator=noise)
        self.field = 0.8 * torch.randn(7, generator=noise)
        self.states = (torch.arange(128)[:, None] >> torch.arange(7) & 1).float()

    def index(self, x: Tensor) -> Tensor:
        return (x.long() * 2 ** torch.arange(7)).sum(-1)


def discrete_law_is_the_enumerated_one(
    make: Make, num_steps: int, target: type[Coupled], num_chains: int = 5000
) -> None:
    """Every state's frequency at once, by chi-square, at three temperatures."""
    energy = target()
    for t in (1.0, 0.6, 2.0):
        probability = (-energy(energy.states).double() / t).softmax(0)
        start = energy.states[torch.zeros(num_chains, dtype=torch.long)]
        chain = run_chain(make(temperature=t), start, energy, num_steps, generator(15))
        count = torch.bincount(energy.index(chain.position), minlength=len(probability)).double()
        same_chi_square(count, probability, f"{target.__name__} at T={t}")


class Machine:
    """A small RBM: its free energy, and the two conditionals of the joint law."""

    def __init__(self, num_visible: int, num_hidden: int, seed: int) -> None:
        noise = generator(seed)
        self.weight = torch.randn(num_hidden, num_visible, generator=noise)
        self.visible_bias = torch.randn(num_visible, generator=noise) * 0.5
        self.hidden_bias = torch.randn(num_hidden, generator=noise) * 0.5
        self.states = (torch.arange(2**num_visible)[:, None] >> torch.arange(num_visible)) & 1
        self.states = self.states.float()
        self.num_draws = 0

    def __call__(self, x: Tensor) -> Tensor:
        hidden = x @ self.weight.T + self.hidden_bias
        return -(x @ self.visible_bias) - torch.nn.functional.softplus(hidden).sum(1)

    def sample_hidden(self, v: Tensor, generator: torch.Generator) -> Tensor:
        self.num_draws += 1
        return self._flip((v @ self.weight.T + self.hidden_bias).sigmoid(), generator)

    def sample_visible(self, h: Tensor, generator: torch.Generator) -> Tensor:
        return self._flip((h @ self.weight + self.visible_bias).sigmoid(), generator)

    @staticmethod
    def _flip(p: Tensor, generator: torch.Generator) -> Tensor:
        return (torch.rand(p.shape, generator=generator) < p).float()


def as_rbm(machine: Machine) -> EnergyFn:
    """The project's own energy with these weights, whose sweeps share a product."""
    energy = energies.rbm(machine.weight.shape[1], machine.weight.shape[0])
    with torch.no_grad():
        for name in ("weight", "visible_bias", "hidden_bias"):
            getattr(energy, name).copy_(getattr(machine, name))
    return energy


def rbm_has_its_enumerated_law(
    make: Make, of: Callable[[Machine], EnergyFn] = lambda machine: machine
) -> None:
    """More and fewer hidden units than visible ones, at temperatures below and above 1."""
    for num_visible, num_hidden in ((6, 3), (5, 8)):
        machine = Machine(num_visible, num_hidden, seed=num_hidden)
        energy = of(machine)
        for t in (1.0, 0.7, 2.0):
            probability = (-machine(machine.states).double() / t).softmax(0)
            x = torch.zeros(5000, num_visible)
            end = run_chain(make(temperature=t), x, energy, 25, generator(1)).position
            index = (end.long() * 2 ** torch.arange(num_visible)).sum(-1)
            count = torch.bincount(index, minlength=2**num_visible).double()
            same_chi_square(count, probability, f"the RBM at T={t}")


def same_chi_square(count: Tensor, probability: Tensor, what: str) -> None:
    """Counts of independent draws; states too rare for a count are taken together."""
    num = count.sum()
    common = probability * num >= 10
    rest = torch.stack([count[~common].sum(), (probability[~common] * num).sum()])
    came, expected = count[common], probability[common] * num
    if rest[1] >= 10:
        came = torch.cat([came, rest[:1]])
        expected = torch.cat([expected, rest[1:]])
    statistic = ((came - expected).square() / expected).sum().item()
    freedom = len(came) - 1
    same(statistic, freedom, (2 * freedom) ** 0.5, f"chi-square of {what}")
