"""Gallery figures about laws: toys and samplers, memories, temperature, divergences."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ebm_dist import diagnostics, energies, samplers
from ebm_dist.evaluation.exact import exact_log_partition, states
from ebm_dist.types import EventSpec

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Each toy with the width of its narrowest direction, which sets every step size, and its frame.
TOYS: dict[str, tuple[dict[str, Any], float, float]] = {
    "ring": ({"radius": 2.0, "width": 0.2}, 0.2, 3.2),
    "gaussian_mixture": ({}, 0.5, 6.0),
    "checkerboard": ({}, 0.1, 2.6),
    "double_well": ({"depth": 3.0, "tilt": 0.4, "num_dims": 2}, 0.2, 1.9),
}


def kernels(width: float) -> dict[str, samplers.Kernel]:
    """Every kernel of real events, with steps for a target of that narrowest width."""
    h = 0.25 * width**2
    return {
        "langevin": samplers.make("langevin", step_size=0.2 * h, temperature=1.0),
        "annealed_langevin": samplers.make(
            "annealed_langevin", step_size=0.2 * h, start_temperature=8.0, num_annealing_steps=500
        ),
        "mala": samplers.make("mala", step_size=h, temperature=1.0),
        "sghmc": samplers.make("sghmc", step_size=0.15 * width, friction=1.0, temperature=1.0),
        "hmc": samplers.make("hmc", step_size=0.5 * width, num_leapfrog_steps=8, temperature=1.0),
        "random_walk": samplers.make("random_walk", proposal_std=2 * width, temperature=1.0),
        "parallel_tempering": samplers.make(
            "parallel_tempering",
            kernel={"name": "mala", "step_size": 2 * h},
            temperatures=(1.0, 2.0, 4.0, 8.0, 16.0),
        ),
    }


def toys_by_sampler(figure: Figure, generator: torch.Generator) -> dict[str, float]:
    """Energy, exact density, and the samples of each kernel, for each toy in the plane."""
    num_chains, num_steps = 1500, 700
    numbers: dict[str, float] = {}
    names = list(kernels(1.0))
    panels = figure.subplots(len(TOYS), 2 + len(names), squeeze=False)
    for row, (toy, (params, width, frame)) in zip(panels, TOYS.items()):
        energy = energies.make(toy, **params)
        axis = torch.linspace(-frame, frame, 201, dtype=torch.float64)
        grid = torch.cartesian_prod(axis, axis)
        with torch.no_grad():
            height = energy(grid)
        law = (-height).softmax(dim=0)
        exact = float((law * height).sum())
        square = (201, 201)
        low = float(height.min())
        surface = height.reshape(square).T
        levels = np.linspace(low, low + min(float(height.max()) - low, 12.0), 14)
        row[0].contourf(axis, axis, surface, levels=levels, cmap="viridis_r", extend="max")
        row[0].set_ylabel(toy)
        row[0].set_title("energy", fontsize=9)
        density = law.reshape(square).T
        extent = (-frame, frame, -frame, frame)
        row[1].imshow(density, origin="lower", extent=extent, cmap="magma")
        row[1].set_title(f"density, mean E {exact:.2f}", fontsize=9)
        # Wide enough for every mode; far out on a wall MALA would reject each of its own moves.
        start = 0.35 * frame * torch.empty(num_chains, 2).normal_(generator=generator)
        for axes, (name, kernel) in zip(row[2:], kernels(width).items()):
            chain = samplers.run_chain(kernel, start, energy, num_steps, generator)
            mean, error = _mean(chain.energy)
            numbers[f"{toy} {name} mean energy"] = mean
            numbers[f"{toy} {name} standard error"] = error
            axes.imshow(density, origin="lower", extent=extent, cmap="Greys", alpha=0.35)
            axes.scatter(chain.position[:, 0], chain.position[:, 1], s=1.5, linewidths=0)
            axes.set_title(f"{name}\nmean E {mean:.2f} ± {error:.2f}", fontsize=8)
            axes.set(xlim=(-frame, frame), ylim=(-frame, frame))
        numbers[f"{toy} exact mean energy"] = exact
        for axes in row:
            axes.set_aspect("equal")
            axes.set_xticks([])
            axes.set_yticks([])
    return numbers


def discrete_samplers(figure: Figure, generator: torch.Generator) -> dict[str, float]:
    """Magnetisation of a 4x4 Ising model in a field, by each discrete kernel and exactly."""
    energy = energies.Ising((4, 4), coupling=1.0, field=0.05)
    numbers: dict[str, float] = {}
    temperatures, num_chains = (2.5, 3.5, 5.0), 2000
    panels = figure.subplots(1, len(temperatures))
    values = np.arange(-16, 17, 2) / 16
    for axes, t in zip(panels, temperatures):
        law = torch.zeros(17, dtype=torch.float64)
        log_z = exact_log_partition(energy, method="enumerate", temperature=t)
        for x in states(EventSpec((4, 4), "binary")):
            mass = (-energy(x.double()) / t - log_z).exp()
            law.index_add_(0, x.sum(dim=(1, 2)).long(), mass)
        axes.bar(values, law, width=0.11, color="lightgrey", label="exact")
        exact = float((law * torch.from_numpy(values)).sum())
        numbers[f"T={t:g} exact magnetisation"] = exact
        start = (torch.rand(num_chains, 4, 4, generator=generator) < 0.5).float()
        # Single changes need a step a site where the others pass over all sites at once.
        for name, params, num_steps, marker in (
            ("gibbs", {}, 250, "o"),
            ("gibbs_with_gradients", {}, 2000, "s"),
            ("discrete_langevin", {"step_size": 0.3}, 800, "^"),
        ):
            kernel = samplers.make(name, temperature=t, **params)
            chain = samplers.run_chain(kernel, start, energy, num_steps, generator)
            count = chain.position.sum(dim=(1, 2)).long()
            share = torch.bincount(count, minlength=17).double() / num_chains
            axes.plot(values, share, marker, markersize=4, label=name)
            mean, error = _mean(count.double() / 8 - 1)
            numbers[f"T={t:g} {name} magnetisation"] = mean
            numbers[f"T={t:g} {name} standard error"] = error
        axes.set(title=f"T = {t:g}", xlabel="magnetisation", ylabel="probability")
    panels[0].legend(fontsize=8)
    return numbers


def hopfield(figure: Figure, generator: torch.Generator) -> dict[str, float]:
    """Retrieval of three glyphs, and one-bit errors and retrieval against the load."""
    glyphs = _glyphs()
    network = energies.Hopfield(glyphs, storage="pseudo_inverse")
    flips = torch.rand(glyphs.shape, generator=generator) < 0.2
    corrupted = torch.where(flips, 1 - glyphs, glyphs)
    retrieved = network.retrieve(corrupted, generator)
    grid = figure.add_gridspec(1, 2, width_ratios=(1, 1.3))
    left, right = figure.add_subfigure(grid[0]), figure.add_subfigure(grid[1])
    titles = ("stored", "20% flipped", "retrieved")
    panels = left.subplots(3, 3)
    for column, (title, patterns) in enumerate(zip(titles, (glyphs, corrupted, retrieved))):
        for row in range(3):
            panels[row, column].imshow(patterns[row].reshape(8, 8), cmap="Greys", vmin=0, vmax=1)
            panels[row, column].set_axis_off()
        panels[0, column].set_title(title, fontsize=9)

    num_units = 400
    loads, one_bit, overlap, trials = [], [], [], []
    for num_patterns in (9, 21, 33, 45, 56, 69, 85, 105):
        # The crosstalk comes from the other patterns and the other units.
        loads.append((num_patterns - 1) * (num_units - 1) / num_units**2)
        num_networks = max(2, round(150 / num_patterns))
        wrong, kept = [], []
        for _ in range(num_networks):
            bits = (torch.rand(num_patterns, num_units, generator=generator) < 0.5).float()
            memory = energies.Hopfield(bits)
            spins = 2 * bits - 1
            wrong.append((memory.local_field(bits) * spins < 0).float().mean(dim=1))
            some = bits[: max(1, 24 // num_networks)]
            end = 2 * memory.retrieve(some, generator, max_sweeps=20) - 1
            kept.append((end * (2 * some - 1)).mean(dim=1))
        one_bit.append(float(torch.cat(wrong).mean()))
        overlap.append(float(torch.cat(kept).mean()))
        trials.append(num_networks * num_patterns * num_units)
    line = np.linspace(0.015, 0.27, 200)
    theory = [0.5 * math.erfc(1 / math.sqrt(2 * a)) for a in line]
    axes = right.subplots()
    axes.plot(line, theory, color="tab:red", label="one-bit error, erfc(1/sqrt(2a))/2")
    axes.plot(loads, one_bit, "o", color="tab:red", label="one-bit error, measured")
    axes.set(xlabel="load a = patterns / units", ylabel="one-bit error", ylim=(0, 0.04))
    axes.axvline(0.138, color="grey", linestyle=":")
    other = axes.twinx()
    other.plot(loads, overlap, "s-", color="tab:blue", label="overlap after retrieval")
    other.set(ylabel="overlap with the stored pattern", ylim=(0, 1.05))
    handles = axes.get_legend_handles_labels()
    more = other.get_legend_handles_labels()
    axes.legend(handles[0] + more[0], handles[1] + more[1], loc="center left", fontsize=8)
    at = 4
    exact = 0.5 * math.erfc(1 / math.sqrt(2 * loads[at]))
    return {
        "glyph bits wrong after retrieval": float((retrieved != glyphs).float().mean()),
        "load": loads[at],
        "one-bit error at this load": one_bit[at],
        "exact at this load": exact,
        "standard error at this load": math.sqrt(exact / trials[at]),
        "overlap at load .08": overlap[2],
        "overlap at load .26": overlap[-1],
    }


def temperature(figure: Figure, generator: torch.Generator) -> dict[str, float]:
    """Two wells of curvature 1 and 4, of one depth and of two, at three temperatures."""
    temperatures, num_chains, distance = (0.5, 1.0, 2.0), 4000, 4.0
    panels = figure.subplots(2, len(temperatures) + 1, squeeze=False)
    line = torch.linspace(-9, 8, 2000, dtype=torch.float64)
    numbers: dict[str, float] = {}
    for row, gap in zip(panels, (0.0, 1.0)):
        energy = _wells(gap, 1.0, 4.0, distance)
        minima = torch.tensor([[-distance], [distance]])
        masses = diagnostics.basin_masses(energy, minima, temperatures)
        effect = diagnostics.temperature_effect(masses)
        shares = []
        for axes, t in zip(row, temperatures):
            # A ladder up to 16: at T = .5 no single chain crosses the barrier.
            kernel = samplers.make(
                "parallel_tempering",
                kernel={"name": "mala", "step_size": 0.2},
                temperatures=tuple(t * r for r in (1.0, 2.0, 4.0, 8.0, 16.0)),
            )
            x = distance * torch.empty(num_chains, 1).normal_(generator=generator)
            chain = samplers.run_chain(kernel, x, energy, 600, generator)
            shares.append(float(diagnostics.basin_occupancy(chain.position, minima)[0]))
            log_z = exact_log_partition(energy, EventSpec((1,), "real"), temperature=t)
            density = (-energy(line[:, None]) / t - log_z).exp()
            axes.hist(chain.position[:, 0], bins=80, range=(-9, 8), density=True, alpha=0.5)
            axes.plot(line, density, color="black", linewidth=0.9)
            axes.set(title=f"dE = {gap:g}, T = {t:g}", xlabel="x", yticks=[])
        index = temperatures.index(1.0)
        numbers |= {
            f"dE={gap:g} left share at T=1": shares[index],
            f"dE={gap:g} exact share at T=1": float(masses[index, 0]),
            f"dE={gap:g} standard error": 0.5 / math.sqrt(num_chains),
            f"dE={gap:g} ratio at T=.5": float(masses[0, 0] / masses[0, 1]),
            f"dE={gap:g} ratio at T=2": float(masses[2, 0] / masses[2, 1]),
        }
        last = row[-1]
        fine = np.linspace(0.3, 3, 60).tolist()
        curve = diagnostics.basin_masses(energy, minima, fine)[:, 0]
        last.plot(fine, curve, color="tab:red", label="exact")
        last.plot(temperatures, shares, "o", color="tab:blue", label="sampled")
        last.set(title=f"temperature {effect}s", xlabel="T", ylabel="left mass", ylim=(0.45, 1.02))
        last.legend(fontsize=8)
    return numbers


def covering_and_seeking(figure: Figure, generator: torch.Generator) -> dict[str, float]:
    """The best single Gaussian for N(+-3, 1)/2 by either divergence, found by descent."""
    del generator  # nothing here is random
    line = torch.linspace(-16, 16, 4001, dtype=torch.float64)
    width = line[1] - line[0]
    target = energies.gaussian_mixture(means=((-3.0,), (3.0,)), stds=1.0)
    with torch.no_grad():
        log_p = -target(line[:, None])
    fits: dict[str, tuple[float, float, float]] = {}
    for name in ("forward", "reverse"):
        mean = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
        log_std = torch.tensor(0.0, dtype=torch.float64, requires_grad=True)
        optimizer = torch.optim.LBFGS([mean, log_std], max_iter=200, line_search_fn="strong_wolfe")

        def divergence(name: str = name, mean: Tensor = mean, log_std: Tensor = log_std) -> Tensor:
            log_q = -0.5 * ((line - mean) / log_std.exp()).square() - log_std
            log_q = log_q - 0.5 * math.log(2 * math.pi)
            first, second = (log_p, log_q) if name == "forward" else (log_q, log_p)
            return (first.exp() * (first - second)).sum() * width

        def closure(optimizer=optimizer, divergence=divergence) -> float:
            optimizer.zero_grad()
            loss = divergence()
            loss.backward()
            return float(loss.detach())

        optimizer.step(closure)
        with torch.no_grad():
            fits[name] = (float(mean), float(log_std.exp()), float(divergence()))
    numbers = {}
    for axes, (name, (mean_, std, value)) in zip(figure.subplots(1, 2), fits.items()):
        axes.fill_between(line, log_p.exp(), color="lightgrey", label="data")
        fit = torch.exp(-0.5 * ((line - mean_) / std).square()) / (std * math.sqrt(2 * math.pi))
        axes.plot(line, fit, color="tab:red", label=f"N({mean_:.2f}, {std:.2f}²)")
        kind = "covers" if name == "forward" else "seeks"
        axes.set(xlim=(-9, 9), xlabel="x", title=f"{name} KL {kind}: {value:.5f}")
        axes.legend()
        numbers |= {f"{name} KL": value, f"{name} mean": mean_, f"{name} std": std}
    return numbers


def _wells(gap: float, k1: float, k2: float, distance: float):
    def energy(x: Tensor) -> Tensor:
        left = 0.5 * k1 * (x[:, 0] + distance).square()
        right = gap + 0.5 * k2 * (x[:, 0] - distance).square()
        return torch.minimum(left, right)

    return energy


def _glyphs() -> Tensor:
    """Three 8x8 letters, (3, 64) in {0, 1}."""
    rows = {
        "E": "7E 40 40 7C 40 40 7E 00",
        "B": "7C 42 42 7C 42 42 7C 00",
        "M": "41 63 55 49 41 41 41 00",
    }
    bits = [
        [int(bit) for row in text.split() for bit in f"{int(row, 16):08b}"]
        for text in rows.values()
    ]
    return torch.tensor(bits, dtype=torch.float32)


def _mean(value: Tensor) -> tuple[float, float]:
    return float(value.mean()), float(value.std()) / math.sqrt(len(value))
