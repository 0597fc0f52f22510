"""Optima and gradients of objectives on laws where both are known."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from ebm_dist import objectives, samplers
from ebm_dist.core.types import Negatives

F64 = torch.float64


class Parabola(nn.Module):
    """E(x) = alpha/2 |x - mean|^2."""

    def __init__(self, alpha: float, mean: float = 0.0) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.tensor(alpha, dtype=F64))
        self.mean = nn.Parameter(torch.tensor(mean, dtype=F64))

    def forward(self, x: Tensor) -> Tensor:
        return 0.5 * self.alpha * (x - self.mean).flatten(1).square().sum(1)


def normal_grid(num: int = 20_001, std: float = 1.0, mean: float = 0.0) -> Tensor:
    """Quantiles (num, 1) of a Gaussian, scaled so that mean and variance are exact."""
    p = (torch.arange(num, dtype=F64) + 0.5) / num
    z = torch.special.ndtri(p)
    return (mean + std * z / z.square().mean().sqrt())[:, None]


def slope(objective, alpha: float, data: Tensor, negatives=None, seed: int = 0) -> float:
    """d loss / d alpha of the parabola of precision alpha."""
    energy = Parabola(alpha)
    loss, _ = objective(energy, data, negatives, torch.Generator().manual_seed(seed))
    (grad,) = torch.autograd.grad(loss, energy.alpha)
    return grad.item()


def root(f: Callable[[float], float], low: float = 0.05, high: float = 20.0) -> float:
    """Where the increasing f crosses zero."""
    for _ in range(45):
        middle = 0.5 * (low + high)
        low, high = (middle, high) if f(middle) < 0 else (low, middle)
    return 0.5 * (low + high)


def line_root(f: Callable[[float], float]) -> float:
    """Where f crosses zero, for a loss quadratic in alpha, whose slope is a line."""
    at_one, at_two = f(1.0), f(2.0)
    return 1.0 - at_one / (at_two - at_one)


def mean_and_error(f: Callable[[int], float], num: int) -> tuple[float, float]:
    """Mean over seeds and its standard error."""
    values = torch.tensor([f(seed) for seed in range(num)], dtype=F64)
    return values.mean().item(), (values.std() / num**0.5).item()


def assert_within(estimate: tuple[float, float], expected: float, resolution: float) -> None:
    """Within 4 standard errors, which must resolve `resolution`."""
    mean, error = estimate
    assert 4 * error < resolution, f"standard error {error} cannot see {resolution}"
    assert abs(mean - expected) < 4 * error, f"{mean} +- {error}, expected {expected}"


# -- contrastive


@pytest.mark.parametrize("alpha", [0.5, 1.0, 2.5])
@pytest.mark.parametrize("temperature", [0.5, 1.0])
def test_contrastive_gradient_is_that_of_the_likelihood_times_temperature(alpha, temperature):
    # -T log p = E + T log Z, log Z = 1/2 log(2 pi T / alpha).
    data = normal_grid(std=1.3)
    negatives = normal_grid(std=(temperature / alpha) ** 0.5)
    came = slope(objectives.make("contrastive"), alpha, data, negatives)
    assert came == pytest.approx(0.5 * (1.3**2 - temperature / alpha), abs=1e-9)


def test_contrastive_optimum_is_the_maximum_likelihood_precision():
    objective, data = objectives.make("contrastive"), normal_grid(std=0.8)
    best = root(lambda a: slope(objective, a, data, normal_grid(std=a**-0.5)))
    assert best == pytest.approx(1 / 0.8**2, rel=1e-9)


@pytest.mark.parametrize("weight", [0.05, 0.1, 1.0])
@pytest.mark.parametrize("at", ["data", "gaussian", "negatives", "interpolation"])
def test_gradient_penalty_optimum_on_unit_data(at, weight):
    # 1/2 - 1/(2 alpha) + weight * alpha * E|x|^2 = 0 with the penalty's points held fixed.
    mean_square = {
        "data": lambda a: 1.0,
        "gaussian": lambda a: 1.0,
        "negatives": lambda a: 1 / a,
        "interpolation": lambda a: (1 + 1 / a) / 3,
    }[at]
    expected = root(lambda a: 0.5 - 0.5 / a + weight * a * mean_square(a))
    if at == "data":
        exact = (-0.5 + math.sqrt(0.25 + 2 * weight)) / (2 * weight)
        assert expected == pytest.approx(exact, abs=1e-9)
    objective = objectives.make("contrastive", gradient_penalty=weight, gradient_penalty_at=at)
    data = normal_grid(2001)

    def optimum(seed: int) -> float:
        # Paired at random: in the order of the quantiles interpolation would be comonotone.
        mixed = torch.randperm(2001, generator=torch.Generator().manual_seed(100 + seed))
        return root(lambda a: slope(objective, a, data, normal_grid(2001, a**-0.5)[mixed], seed))

    if at in ("data", "negatives"):
        assert optimum(0) == pytest.approx(expected, rel=1e-8)
    else:
        assert_within(mean_and_error(optimum, 40), expected, resolution=0.02 * expected)


def test_stale_negatives_reweighted_have_the_gradient_of_fresh_ones():
    # Chains of precision .8, read at 1.2: unweighted their gradient is off by .21.
    old, new = 0.8, 1.2
    objective = objectives.make("contrastive", truncation=1e9)
    objective.reweight = True

    def gradient(seed: int) -> float:
        g = torch.Generator().manual_seed(1000 + seed)
        x = torch.empty(5000, 1, dtype=F64).normal_(generator=g) / old**0.5
        negatives = Negatives(
            x, 0.5 * old * x.flatten().square(), torch.zeros(5000), torch.zeros(5000)
        )
        return slope(objective, new, normal_grid(2001), negatives)

    assert_within(mean_and_error(gradient, 40), 0.5 * (1 - 1 / new), resolution=0.02)


def chain_gradient(alpha: float, start_std: float, step_size: float, num_steps: int, seed: int):
    """Contrastive gradient with chains from N(0, start_std^2) under the project's own Langevin."""
    g = torch.Generator().manual_seed(seed)
    kernel = samplers.make("langevin", step_size=step_size, temperature=1.0)
    start = normal_grid(50_000, start_std)
    chain = samplers.run_chain(
        kernel, start, lambda x: 0.5 * alpha * x.square().sum(1), num_steps, g
    )
    return slope(objectives.make("contrastive"), alpha, normal_grid(), chain.position)


@pytest.mark.parametrize("num_steps", [1, 5])
@pytest.mark.parametrize("step_size", [0.1, 0.4])
def test_cd_k_stands_still_where_the_discretised_law_is_the_datas(num_steps, step_size):
    # alpha (2 - alpha h) = 2, whatever k: .1 -> 1.05573.
    alpha = root(lambda a: a * (2 - a * step_size) - 2, 0.5, 1 / step_size)
    if step_size == 0.1:
        assert alpha == pytest.approx(1.05573, abs=1e-5)
    # The noise of one step has variance 2h; 5% more of it moves the gradient by .1 h.
    estimate = mean_and_error(lambda s: chain_gradient(alpha, 1.0, step_size, num_steps, s), 20)
    assert_within(estimate, 0.0, resolution=0.1 * step_size)


def test_short_run_training_stands_still_where_its_generator_has_unit_variance():
    # h = .01, K = 60, chains from N(0, 4): alpha = 1.73491, not 1.
    rho = lambda a: 1 - 0.01 * a  # noqa: E731
    variance = lambda a: (  # noqa: E731
        rho(a) ** 120 * 4 + (1 - rho(a) ** 120) * 2 / (a * (2 - 0.01 * a))
    )
    alpha = root(lambda a: 1 - variance(a), 0.5, 5.0)
    assert alpha == pytest.approx(1.73491, abs=1e-5)
    estimate = mean_and_error(lambda s: chain_gradient(alpha, 2.0, 0.01, 60, s), 10)
    assert_within(estimate, 0.0, resolution=0.01)


# -- score matching


@pytest.mark.parametrize("std", [0.7, 1.0, 2.0])
@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_score_matching_optimum_is_the_datas_precision(std, temperature):
    objective = objectives.make("score_matching", temperature=temperature)
    best = root(lambda a: slope(objective, a, normal_grid(2001, std)))
    assert best == pytest.approx(temperature / std**2, rel=1e-9)


def test_score_matching_finds_the_depth_of_a_double_well():
    # Data are quantiles of exp(-4 (x^2 - 1)^2): no Gaussian, so the Laplacian matters.
    x = torch.linspace(-2.5, 2.5, 400_001, dtype=F64)
    mass = torch.exp(-4 * (x**2 - 1) ** 2).cumsum(0)
    wanted = (torch.arange(20_000, dtype=F64) + 0.5) / 20_000 * mass[-1]
    data = x[torch.searchsorted(mass, wanted)][:, None]
    objective = objectives.make("score_matching")

    def gradient(depth: float) -> float:
        parameter = torch.tensor(depth, dtype=F64, requires_grad=True)
        loss, _ = objective(lambda x: parameter * (x.flatten() ** 2 - 1) ** 2, data)
        return torch.autograd.grad(loss, parameter)[0].item()

    assert root(gradient) == pytest.approx(4.0, rel=1e-3)


def test_score_matching_sums_the_laplacian_over_dimensions():
    # Stationary at the inverse covariance of correlated 2-D data, an asymmetric target.
    line = normal_grid(60).flatten()
    white = torch.cartesian_prod(line, line)
    factor = torch.tensor([[1.0, 0.0], [0.8, 0.6]], dtype=F64)
    precision = torch.linalg.inv(factor @ factor.T).requires_grad_(True)
    loss, _ = objectives.make("score_matching")(
        lambda x: 0.5 * (x @ precision * x).sum(1), white @ factor.T
    )
    (grad,) = torch.autograd.grad(loss, precision)
    assert grad.abs().max().item() < 1e-9
    assert loss.item() == pytest.approx(-0.5 * precision.trace().item())


@pytest.mark.parametrize("projection", ["rademacher", "gaussian"])
@pytest.mark.parametrize("variance_reduced", [True, False])
def test_sliced_score_matching_is_the_explicit_one_in_mean(projection, variance_reduced):
    g = torch.Generator().manual_seed(0)
    data = torch.randn(50, 3, generator=g, dtype=F64)
    mixing = torch.randn(3, 8, generator=g, dtype=F64)

    def energy(x: Tensor) -> Tensor:
        return torch.nn.functional.softplus(2 * x @ mixing).sum(1) + 0.5 * x.square().sum(1)

    explicit = objectives.make("score_matching")(energy, data)[0].item()
    sliced = objectives.make(
        "sliced_score_matching",
        projection=projection,
        variance_reduced=variance_reduced,
        num_projections=20,
    )
    estimate = mean_and_error(
        lambda s: sliced(energy, data, None, torch.Generator().manual_seed(s))[0].item(), 100
    )
    assert_within(estimate, explicit, resolution=0.05 * abs(explicit))


def test_sliced_score_matching_optimum_is_the_datas_precision():
    objective = objectives.make("sliced_score_matching")
    assert root(lambda a: slope(objective, a, normal_grid(2001, 0.5))) == pytest.approx(4.0)


@pytest.mark.parametrize(
    ("noise", "conditioning", "expected"),
    [
        # 1 / (sigma^2 + s^2) for data of variance sigma^2 = 1.
        (0.5, "none", 0.8),
        (1.0, "none", 0.5),
        # Levels weigh by s^2: sum s^2 / sum s^2 (1 + s^2).
        ((0.5, 1.0, 2.0), "none", 5.25 / (0.25 * 1.25 + 1 * 2 + 4 * 5)),
        # E/s: sum s / sum (1 + s^2).
        ((0.5, 1.0, 2.0), "scale", 3.5 / (1.25 + 2 + 5)),
        (0.5, "scale", 0.5 / 1.25),
    ],
)
def test_denoising_optimum_is_the_precision_of_blurred_data(noise, conditioning, expected):
    objective = objectives.make(
        "denoising_score_matching", noise_std=noise, conditioning=conditioning
    )
    data = normal_grid(4001)
    estimate = mean_and_error(lambda s: line_root(lambda a: slope(objective, a, data, seed=s)), 40)
    assert_within(estimate, expected, resolution=0.03 * expected)


class Levels(nn.Module):
    """E(x, level) = alpha[level]/2 |x|^2."""

    context = needs_context = frozenset({"level"})
    noise_stds = (0.5, 1.0, 2.0)
    data_std = 1.0

    def __init__(self, alpha: float) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.full((3,), alpha, dtype=F64))

    def forward(self, x: Tensor, level: Tensor) -> Tensor:
        return 0.5 * self.alpha[level] * x.flatten(1).square().sum(1)


@pytest.mark.parametrize("params", [{}, {"level_weight": "edm", "log_noise": (0.0, 1.0)}])
def test_denoising_given_its_level_fits_the_blurred_law_of_each(params):
    objective = objectives.make("denoising_score_matching", conditioning="level", **params)
    data = normal_grid(4001)

    def optima(seed: int) -> Tensor:
        def slopes(alpha: float) -> Tensor:
            energy = Levels(alpha)
            loss, _ = objective(energy, data, None, torch.Generator().manual_seed(seed))
            return torch.autograd.grad(loss, energy.alpha)[0]

        at_one, at_two = slopes(1.0), slopes(2.0)
        return 1.0 - at_one / (at_two - at_one)

    found = torch.stack([optima(seed) for seed in range(40)])
    for level, std in enumerate(Levels.noise_stds):
        expected = 1 / (1 + std**2)
        column = found[:, level]
        estimate = column.mean().item(), (column.std() / 40**0.5).item()
        assert_within(estimate, expected, resolution=0.05 * expected)


def test_levels_are_drawn_by_the_log_of_their_noise_and_weighted_as_in_edm():
    energy, data = Levels(0.0), normal_grid(20_000)
    loss = {
        weight: objectives.make(
            "denoising_score_matching",
            conditioning="level",
            level_weight=weight,
            log_noise=(math.log(2.0), 0.01),
        )(energy, data, None, torch.Generator().manual_seed(0))[0].item()
        for weight in ("equal", "edm")
    }
    # At alpha = 0 the residual is the noise, and every level drawn is the last, s = 2: 1 + s^2.
    assert loss["equal"] == pytest.approx(0.5, rel=0.05)
    assert loss["edm"] == pytest.approx(5 * loss["equal"])


def test_denoising_at_a_temperature_fits_the_scaled_energy():
    objective = objectives.make("denoising_score_matching", noise_std=0.5, temperature=0.3)
    data = normal_grid(4001)
    estimate = mean_and_error(lambda s: line_root(lambda a: slope(objective, a, data, seed=s)), 40)
    assert_within(estimate, 0.3 * 0.8, resolution=0.03 * 0.24)


# -- noise-contrastive


@pytest.mark.parametrize(
    ("params", "std"),
    [
        ({"noise": "gaussian", "noise_std": 1.5}, 1.0),
        ({"noise": "gaussian", "noise_std": 2.0, "noise_mean": 0.5, "noise_ratio": 4}, 0.8),
        ({"noise": "uniform", "low": -6.0, "high": 6.0}, 1.0),
    ],
)
def test_noise_contrastive_optimum_is_precision_and_log_z(params, std):
    data = normal_grid(4001, std)

    def fit(seed: int) -> tuple[float, float]:
        objective, energy = objectives.make("noise_contrastive", **params).double(), Parabola(1.0)
        unknowns = [energy.alpha, objective.log_z]
        optimiser = torch.optim.LBFGS(unknowns, max_iter=60, line_search_fn="strong_wolfe")

        def closure() -> Tensor:
            optimiser.zero_grad()
            loss, _ = objective(energy, data, None, torch.Generator().manual_seed(seed))
            loss.backward()
            return loss

        optimiser.step(closure)
        return energy.alpha.item(), objective.log_z.item()

    fits = [fit(seed) for seed in range(24)]
    alpha = mean_and_error(lambda s: fits[s][0], 24)
    log_z = mean_and_error(lambda s: fits[s][1], 24)
    assert_within(alpha, 1 / std**2, resolution=0.08 / std**2)
    assert_within(log_z, 0.5 * math.log(2 * math.pi * std**2), resolution=0.05)


@pytest.mark.parametrize("ratio", [1, 3])
def test_noise_contrastive_recovers_the_log_odds_of_bits(ratio):
    # p(x) ~ exp(1.2 x1 - .5 x2): log Z = log(1 + e^1.2) + log(1 + e^-.5), by the exact counts.
    bias = torch.tensor([1.2, -0.5], dtype=F64)
    states = torch.tensor([[0.0, 0.0], [0.0, 1.0], [1.0, 0.0], [1.0, 1.0]], dtype=F64)
    counts = (40_000 * torch.softmax(states @ bias, 0)).round().long()
    data = states.repeat_interleave(counts, 0)
    objective = objectives.make("noise_contrastive", noise="coins", noise_ratio=ratio).double()
    objective.log_z.data.fill_(float((bias.exp() + 1).log().sum()))

    def gradient(seed: int) -> Tensor:
        learnt = bias.clone().requires_grad_(True)
        loss, _ = objective(lambda x: -x @ learnt, data, None, torch.Generator().manual_seed(seed))
        grads = torch.autograd.grad(loss, [learnt, objective.log_z])
        return torch.cat([g.flatten() for g in grads])

    grads = torch.stack([gradient(s) for s in range(30)])
    error = grads.std(0) / 30**0.5
    # Off by .05 in any of the three the gradient would be .005 or more.
    assert (4 * error < 0.005).all()
    assert (grads.mean(0).abs() < 4 * error + 2e-5).all()


# -- energy discrepancy


def gaussian_discrepancy_slope(alpha: float, variance: float, t: float) -> float:
    """d/d alpha of E[U(x)] - E[U_t(x_t)] for U = alpha x^2/2, U_t its soft minimum over noise."""
    a = 1 + alpha * t
    return 0.5 * variance - 0.5 * t / a - 0.5 * (variance + t) / a**2


@pytest.mark.parametrize("alpha", [0.6, 1.0, 1.7])
def test_energy_discrepancy_gradient_is_the_closed_one_and_zero_at_the_law(alpha):
    objective = objectives.make(
        "energy_discrepancy", noise_std=0.7, num_samples=512, stabiliser=0.0, flips=False
    )
    data = normal_grid(1001)
    expected = gaussian_discrepancy_slope(alpha, 1.0, 0.49)
    assert (abs(expected) < 1e-12) == (alpha == 1.0)
    mean, error = mean_and_error(lambda s: slope(objective, alpha, data, seed=s), 20)
    # The log of a mean over M points is biased by O(1/M).
    assert abs(mean - expected) < 4 * error + 2 / 512
    assert 4 * error < 0.02


def test_energy_discrepancy_is_stationary_at_the_log_odds_of_a_bit():
    odds = torch.tensor(0.9, dtype=F64)
    num_on = round(2000 * torch.sigmoid(odds).item())
    data = (torch.arange(2000) < num_on).to(F64)[:, None]
    objective = objectives.make(
        "energy_discrepancy", flip_prob=0.3, num_samples=256, stabiliser=0.0, flips=True
    )

    def gradient(bias: float, seed: int) -> float:
        learnt = torch.tensor(bias, dtype=F64, requires_grad=True)
        loss, _ = objective(
            lambda x: -learnt * x.flatten(), data, None, torch.Generator().manual_seed(seed)
        )
        return torch.autograd.grad(loss, learnt)[0].item()

    at_law = mean_and_error(lambda s: gradient(odds.item(), s), 20)
    off = mean_and_error(lambda s: gradient(odds.item() + 0.3, s), 20)
    assert abs(at_law[0]) < 4 * at_law[1] + 1 / 256
    assert off[0] > 3 * (4 * off[1] + 1 / 256)


# -- energy matching


@pytest.mark.parametrize("std", [0.5, 2.0])
def test_flow_of_independent_pairs_has_the_closed_optimum(std):
    # v = -alpha x_t: alpha = -E[x_t (x1 - x0)] / E[x_t^2] = (1/2 - s^2/2) / ((1 + s^2)/3).
    objective = objectives.make("energy_matching", coupling="independent", contrastive_weight=0.0)
    data = normal_grid(4001, std)
    expected = 1.5 * (1 - std**2) / (1 + std**2)
    estimate = mean_and_error(lambda s: line_root(lambda a: slope(objective, a, data, seed=s)), 40)
    assert_within(estimate, expected, resolution=0.05 * abs(expected))


def test_flow_of_optimally_paired_events_has_the_closed_optimum():
    # In the limit x1 = s x0, m = 1 + t (s-1): alpha = (1-s) E[m] / E[m^2].
    std, num = 0.5, 8001
    objective = objectives.make("energy_matching", coupling="ot", contrastive_weight=0.0)
    expected = (1 - std) * (1 + std) / 2 / ((1 + std + std**2) / 3)
    # A finite batch is paired with its own order statistics, 1 - O(log log N / N) correlated.
    data = normal_grid(num, std)
    estimate = mean_and_error(lambda s: line_root(lambda a: slope(objective, a, data, seed=s)), 20)
    assert abs(estimate[0] - expected) < 4 * estimate[1] + 0.003 * expected
    assert 4 * estimate[1] < 0.03 * expected
    # Independent pairs would give .9: the pairing is seen.
    assert abs(1.5 * (1 - std**2) / (1 + std**2) - expected) > 0.2


def test_contrastive_part_of_energy_matching_adds_its_own_slope():
    params = {"coupling": "independent", "trim_fraction": 0.0, "contrastive_clamp": None}
    data, negatives = normal_grid(2001, 0.7), normal_grid(2001, 1.2)
    alone = objectives.make("energy_matching", contrastive_weight=0.0, **params)
    both = objectives.make("energy_matching", contrastive_weight=0.3, **params)
    difference = slope(both, 1.1, data, negatives) - slope(alone, 1.1, data, negatives)
    assert difference == pytest.approx(0.3 * 0.5 * (0.7**2 - 1.2**2), abs=1e-9)
