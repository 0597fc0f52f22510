"""Gallery figures about laws: toys and samplers, memories, temperature, divergences."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ebm_dist import diagnostics, energies, samplers
from ebm_dist.core.types import EventSpec
from ebm_dist.energies.closed_form.finite import states
from ebm_dist.evaluation.exact import exact_log_partition

if TYPE_CHECKING:
    from collections.abc import Callable

    from matplotlib.figure import Figure

    Plot = Callable[[Figure, torch.Generator], dict[str, float]]

# Each toy with the width of its narrowest direction, which sets every step size, and its frame.
TOYS: dict[str, tuple[dict[str, Any], float, float]] = {
    "ring": ({"radius": 2.0, "width": 0.2}, 0.2, 3.2),
    "gaussian_mixture": ({}, 0.5, 6.0),
    "checkerboard": ({}, 0.1, 2.6),
    "double_well": ({"depth": 3.0, "tilt": 0.4, "num_dims": 2}, 0.2, 1.9),
}


NUM_EVALUATIONS = 1600
"""Of the energy, for each chain of each kernel: a long trajectory pays for its steps."""


def kernels(width: float) -> dict[str, tuple[samplers.Kernel, int]]:
    """Every kernel of real events for a target of that narrowest width, and evaluations a step."""
    h = 0.25 * width**2
    mala = {"name": "mala", "step_size": 2 * h}
    ladder = tuple(1.5**k for k in range(7))
    return {
        "langevin": (samplers.make("langevin", step_size=0.2 * h, temperature=1.0), 1),
        "preconditioned_langevin": (
            # These toys are as wide one way as the other, where it is langevin by another step.
            samplers.make("preconditioned_langevin", step_size=0.05, scales=(width**2,)),
            1,
        ),
        "annealed_langevin": (
            samplers.make(
                "annealed_langevin",
                step_size=0.2 * h,
                start_temperature=8.0,
                num_annealing_steps=1000,
            ),
            1,
        ),
        "sghmc": (samplers.make("sghmc", step_size=0.15 * width, friction=1.0), 1),
        "random_walk": (samplers.make("random_walk", proposal_std=2 * width), 1),
        "mala": (samplers.make("mala", step_size=h), 1),
        "hmc": (samplers.make("hmc", step_size=0.5 * width, num_leapfrog_steps=8), 8),
        # At most: a trajectory that turns back ends sooner.
        "nuts": (samplers.make("nuts", step_size=0.5 * width, max_tree_depth=4), 15),
        "parallel_tempering": (
            samplers.make(
                "parallel_tempering", kernel=mala, temperatures=(1.0, 2.0, 4.0, 8.0, 16.0)
            ),
            5,
        ),
        "tempered_transitions": (
            samplers.make("tempered_transitions", kernel=mala, temperatures=ladder),
            2 * len(ladder) - 1,
        ),
    }


def toy(name: str) -> Plot:
    """The picture of one toy: its energy, its exact density and the samples of each kernel."""

    def plot(figure: Figure, generator: torch.Generator) -> dict[str, float]:
        params, width, frame = TOYS[name]
        num_chains = 1200
        energy = energies.make(name, **params)
        axis = torch.linspace(-frame, frame, 201, dtype=torch.float64)
        grid = torch.cartesian_prod(axis, axis)
        with torch.no_grad():
            height = energy(grid)
        law = (-height).softmax(dim=0)
        exact = float((law * height).sum())
        panels = figure.subplots(2, 6).flatten()
        low = float(height.min())
        levels = np.linspace(low, low + min(float(height.max()) - low, 12.0), 14)
        surface, density = (value.reshape(201, 201).T for value in (height, law))
        panels[0].contourf(axis, axis, surface, levels=levels, cmap="viridis_r", extend="max")
        panels[0].set_title("energy E(x)\n(yellow is low)", fontsize=9)
        extent = (-frame, frame, -frame, frame)
        panels[1].imshow(density, origin="lower", extent=extent, cmap="magma")
        panels[1].set_title(f"exact density\nmean E {exact:.2f}", fontsize=9)
        numbers = {"exact mean energy": exact}
        # Wide enough for every mode; far out on a wall MALA would reject each of its own moves.
        start = 0.35 * frame * torch.empty(num_chains, 2).normal_(generator=generator)
        for axes, (kind, (kernel, cost)) in zip(panels[2:], kernels(width).items()):
            num_steps = NUM_EVALUATIONS // cost
            chain = samplers.run_chain(kernel, start, energy, num_steps, generator)
            mean, error = _mean(chain.energy)
            numbers[f"{kind} mean energy"] = mean
            numbers[f"{kind} standard error"] = error
            axes.imshow(density, origin="lower", extent=extent, cmap="Greys", alpha=0.35)
            x, y = chain.position.T
            axes.scatter(x, y, s=1.5, linewidths=0, color="tab:blue")
            off = abs(mean - exact) > 4 * error
            title = f"{kind.replace('_', ' ')}\nmean E {mean:.2f} ± {error:.2f}"
            axes.set_title(title, fontsize=9, color="tab:red" if off else "black")
        for axes in panels:
            axes.set(xlim=(-frame, frame), ylim=(-frame, frame), xticks=[], yticks=[])
            axes.set_aspect("equal")
        return numbers

    return plot


def discrete_samplers(figure: Figure, generator: torch.Generator) -> dict[str, float]:
    """Magnetisation of a 4x4 Ising model in a field, by each discrete kernel and exactly."""
    energy = energies.Ising((4, 4), coupling=1.0, field=0.05)
    numbers: dict[str, float] = {}
    temperatures, num_chains = (2.5, 3.5, 5.0), 5000
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
        for name, params, num_steps, marker, aside in (
            ("gibbs", {}, 250, "o", -0.03),
            ("gibbs_with_gradients", {}, 2000, "s", 0.0),
            ("discrete_langevin", {"step_size": 0.3}, 800, "^", 0.03),
        ):
            kernel = samplers.make(name, temperature=t, **params)
            chain = samplers.run_chain(kernel, start, energy, num_steps, generator)
            count = chain.position.sum(dim=(1, 2)).long()
            share = torch.bincount(count, minlength=17).double() / num_chains
            axes.errorbar(
                values + aside,
                share,
                yerr=2 * (share * (1 - share) / num_chains).sqrt(),
                fmt=marker,
                markersize=3,
                elinewidth=0.8,
                label=name.replace("_", " "),
            )
            mean, error = _mean(count.double() / 8 - 1)
            numbers[f"T={t:g} {name} magnetisation"] = mean
            numbers[f"T={t:g} {name} standard error"] = error
        axes.set(title=f"T = {t:g}", xlabel="magnetisation (mean spin)")
    panels[0].set_ylabel("probability (bars: 2 s.e.)")
    panels[0].legend(fontsize=8, loc="upper center")
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
    axes.plot(line, theory, color="tab:red", label="unstable bits, erfc(1/sqrt(2a))/2")
    axes.plot(loads, one_bit, "o", color="tab:red", label="unstable bits, measured")
    axes.set(
        xlabel="load a = patterns / units", ylabel="share of bits that are unstable", ylim=(0, 0.04)
    )
    axes.yaxis.label.set_color("tab:red")
    axes.axvline(0.138, color="grey", linestyle=":", label="a = .138, the capacity")
    other = axes.twinx()
    other.plot(loads, overlap, "s-", color="tab:blue", label="overlap after retrieval")
    other.set(ylabel="overlap with the stored pattern", ylim=(0, 1.05))
    other.yaxis.label.set_color("tab:blue")
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
            axes.hist(
                chain.position[:, 0],
                bins=80,
                range=(-9, 8),
                density=True,
                alpha=0.5,
                label="chains",
            )
            axes.plot(line, density, color="black", linewidth=0.9, label="exact density")
            axes.set(title=f"T = {t:g}", xlabel="x", yticks=[])
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
        last.set(title=f"temperature {effect}s", xlabel="T", ylim=(0.45, 1.02))
        last.set_ylabel("mass of the wide well on the left")
        last.legend(fontsize=8)
        wells = "wells of one depth" if gap == 0 else f"left well deeper by {gap:g}"
        row[0].set_ylabel(wells, fontsize=11)
    panels[1, 0].legend(fontsize=8, loc="upper right")
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
    panels = figure.subplots(1, 2, sharey=True)
    for axes, (name, (mean_, std, value)) in zip(panels, fits.items()):
        axes.fill_between(line, log_p.exp(), color="lightgrey", label="data, two modes")
        fit = torch.exp(-0.5 * ((line - mean_) / std).square()) / (std * math.sqrt(2 * math.pi))
        axes.plot(line, fit, color="tab:red", label=f"N({abs(mean_):.2f}, {std:.2f}²)")
        kind = "covers both modes" if name == "forward" else "seeks one mode"
        axes.set(xlim=(-9, 9), ylim=(0, 0.45), xlabel="x")
        axes.set_title(f"{name} KL {kind}: KL = {value:.3f}")
        axes.legend(loc="upper left")
    panels[0].set_ylabel("density")
    for name, (mean_, std, value) in fits.items():
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
