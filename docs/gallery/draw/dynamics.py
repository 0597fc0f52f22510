"""Gallery figures about chains in time: bias, momentum, mixing, short and long runs."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from ebm_dist import diagnostics, energies, samplers

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def discretisation_bias(figure: Figure, generator: torch.Generator) -> dict[str, float]:
    """Variance of Langevin and MALA on x^2/2 against the step size."""
    steps, num_chains = np.array([0.05, 0.2, 0.4, 0.7, 1.0, 1.3, 1.6]), 10_000
    energy = energies.quadratic(precision=[1.0])
    found: dict[str, list[float]] = {"langevin": [], "mala": []}
    for name, values in found.items():
        for h in steps:
            kernel = samplers.make(name, step_size=float(h), temperature=1.0)
            x = _normal(num_chains, 1, generator)
            num_steps = max(60, int(4 / h))
            values.append(_variance(samplers.run_chain(kernel, x, energy, num_steps, generator)))
    line = np.linspace(0, 1.7, 200)
    axes = figure.add_subplot()
    axes.plot(line, 2 / (2 - line), color="tab:red", label="T_eff / a = 2T / (a(2 − ah))")
    axes.axhline(1, color="black", linewidth=0.8, label="the target's, T/a")
    error = 4 * math.sqrt(2 / num_chains)
    for name, marker in (("langevin", "o"), ("mala", "s")):
        value = np.array(found[name])
        axes.errorbar(
            steps, value, yerr=error * value, fmt=marker, label=f"{name}, measured (4 s.e.)"
        )
    axes.set(xlabel="step size h (curvature a = 1, T = 1)", ylabel="variance", ylim=(0.5, 7))
    axes.legend()
    return {
        "langevin variance at h = 1": found["langevin"][4],
        "exact at h = 1": 2.0,
        "mala variance at h = 1": found["mala"][4],
        "relative standard error": error / 4,
    }


def flat_valley(figure: Figure, generator: torch.Generator) -> dict[str, float]:
    """Mean position along a valley of curvature .01, by Langevin and by SGHMC."""
    alpha, h, gamma, start, num_steps, num_chains = 0.01, 0.1, 0.19, 60.0, 1000, 2000
    energy = energies.quadratic(precision=[alpha, 1.0])
    x = torch.tensor([start, 0.0]).expand(num_chains, 2).clone()
    kernels = {
        "langevin": samplers.make("langevin", step_size=h, temperature=1.0),
        "sghmc": samplers.make("sghmc", step_size=h, friction=gamma, temperature=1.0),
    }
    matrix = np.array([[1 - h * h * alpha, h * (1 - gamma * h)], [-h * alpha, 1 - gamma * h]])
    rate = {"langevin": 1 - alpha * h, "sghmc": max(abs(np.linalg.eigvals(matrix)))}
    state, exact = np.array([start, 0.0]), {"langevin": [start], "sghmc": [start]}
    for _ in range(num_steps):
        state = matrix @ state
        exact["sghmc"].append(float(state[0]))
        exact["langevin"].append(exact["langevin"][-1] * rate["langevin"])
    plane, curve = figure.subplots(1, 2)
    axis_x, axis_y = torch.linspace(-40, 70, 120), torch.linspace(-5, 5, 60)
    grid = torch.cartesian_prod(axis_x, axis_y)
    height = energy(grid).reshape(120, 60).T
    plane.contour(axis_x, axis_y, height, levels=12, colors="grey", linewidths=0.6)
    numbers = {}
    for name, colour in (("langevin", "tab:orange"), ("sghmc", "tab:blue")):
        chain = samplers.run_chain(kernels[name], x, energy, num_steps, generator, record_every=10)
        assert chain.trace is not None
        path = torch.cat([x[:1, :].unsqueeze(0), chain.trace[:, :1]])[:, 0]
        plane.plot(path[:, 0], path[:, 1], color=colour, linewidth=0.8, label=name)
        mean = chain.trace[:, :, 0].mean(dim=1)
        at = np.arange(10, num_steps + 1, 10)
        curve.plot(at, mean, color=colour, label=f"{name}, mean of {num_chains} chains")
        curve.plot(exact[name], color=colour, linestyle=":", label=f"exact, rate {rate[name]:.5f}")
        last = chain.trace[-1, :, 0]
        numbers[f"{name} mean after {num_steps}"] = float(last.mean())
        numbers[f"{name} exact mean"] = exact[name][-1]
        numbers[f"{name} standard error"] = float(last.std()) / math.sqrt(num_chains)
        numbers[f"{name} contraction"] = float(rate[name])
    plane.set(xlabel="along the valley", ylabel="across", title="one chain of each, 1000 steps")
    plane.legend()
    curve.axhline(0, color="black", linewidth=0.8)
    curve.set(xlabel="step", ylabel="mean along the valley", title="from 60 towards 0")
    curve.legend(fontsize=8)
    return numbers


def regularisation_tradeoff(figure: Figure, generator: torch.Generator) -> dict[str, float]:
    """Curvature at the optimum of the penalised likelihood, and the mixing time it leaves."""
    weights, h, num_chains = np.array([0.01, 0.1, 0.3, 1.0, 3.0, 10.0]), 0.1, 600
    # The optimum of likelihood + w/2 E||grad E||^2 for unit data: w a^2 + a/2 - 1/2 = 0.
    alphas = (-0.5 + np.sqrt(0.25 + 2 * weights)) / (2 * weights)
    measured = []
    for alpha in alphas:
        energy = energies.quadratic(precision=[float(alpha)])
        kernel = samplers.make("langevin", step_size=h, temperature=1.0)
        x = math.sqrt(2 / (alpha * (2 - alpha * h))) * _normal(num_chains, 1, generator)
        chain = samplers.run_chain(kernel, x, energy, 3000, generator, record_every=1)
        assert chain.trace is not None
        measured.append(float(diagnostics.autocorrelation_time(chain.trace[:, :, 0])))
    exact = (2 - alphas * h) / (alphas * h)
    line = np.geomspace(0.005, 15, 200)
    left, right = figure.subplots(1, 2)
    left.semilogx(line, (-0.5 + np.sqrt(0.25 + 2 * line)) / (2 * line), color="tab:red")
    left.semilogx(weights, alphas, "o", color="tab:red", label="weights drawn on the right")
    left.legend(loc="lower left")
    left.set(
        xlabel="weight of the gradient penalty",
        ylabel="curvature a (gradient's Lipschitz constant)",
        title="smoother energy ...",
    )
    curve = (-0.5 + np.sqrt(0.25 + 2 * line)) / (2 * line) * h
    right.loglog(line, (2 - curve) / curve, color="tab:blue", label="exact, (2 − ah)/(ah)")
    right.loglog(weights, measured, "o", color="tab:blue", label="measured")
    right.set(
        xlabel="weight of the gradient penalty",
        ylabel="autocorrelation time, steps of h = .1",
        title="... slower chains",
    )
    right.set_yticks([20, 30, 40, 60, 100], labels=["20", "30", "40", "60", "100"])
    right.minorticks_off()
    right.legend()
    return {
        "curvature at weight .1": float(alphas[1]),
        "measured time at weight .1": measured[1],
        "exact time at weight .1": float(exact[1]),
        "measured time at weight 10": measured[-1],
        "exact time at weight 10": float(exact[-1]),
    }


def short_and_long_run(figure: Figure, generator: torch.Generator) -> dict[str, float]:
    """The short-run generator: data-like at its own length, another law beyond it."""
    alpha, h, short, long, num_chains = 1.73491, 0.01, 60, 600, 20_000
    energy = energies.quadratic(precision=[alpha])
    kernel = samplers.make("langevin", step_size=h, temperature=1.0)
    x = 2.0 * _normal(num_chains, 1, generator)
    chain = samplers.run_chain(kernel, x, energy, long, generator, record_every=short // 2)
    assert chain.trace is not None
    at = np.arange(short // 2, long + 1, short // 2)
    variance = chain.trace[:, :, 0].var(dim=1).numpy()
    limit, rho = 2 / (alpha * (2 - alpha * h)), 1 - alpha * h
    steps = np.arange(0, long + 1)
    exact = rho ** (2 * steps) * 4 + (1 - rho ** (2 * steps)) * limit
    left, right = figure.subplots(1, 2)
    bins = np.linspace(-4, 4, 81)
    line = np.linspace(-4, 4, 300)
    for index, name, colour in ((1, "60 steps", "tab:blue"), (-1, "600 steps", "tab:orange")):
        value = chain.trace[index, :, 0].numpy()
        left.hist(
            value, bins=bins, density=True, alpha=0.5, color=colour, label=f"chains after {name}"
        )
    left.plot(line, np.exp(-(line**2) / 2) / math.sqrt(2 * math.pi), "k", label="data, N(0, 1)")
    left.set(xlabel="x", ylabel="density")
    left.legend(fontsize=8)
    right.plot(steps, exact, color="tab:red", label="exact")
    right.plot(at, variance, "o", color="tab:red", markersize=4, label="measured")
    right.axhline(1, color="black", linewidth=0.8, label="data")
    right.axvline(short, color="grey", linestyle=":", label="length of training's chains")
    right.set(xlabel="step", ylabel="variance over chains", ylim=(0, 4))
    right.legend()
    return {
        "variance after 60": float(variance[1]),
        "variance after 600": float(variance[-1]),
        "exact after 600": float(exact[-1]),
        "exact in the limit": limit,
        "relative standard error": math.sqrt(2 / num_chains),
    }


def _normal(num: int, dim: int, generator: torch.Generator) -> Tensor:
    return torch.empty(num, dim).normal_(generator=generator)


def _variance(chain: samplers.Chain) -> float:
    return float(chain.position.var())
