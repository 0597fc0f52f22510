"""A package of a user, unknown to the project: an energy, a sampler, an objective and a plugin."""

from __future__ import annotations

from pathlib import Path
from typing import Any

NETS = """
import torch
from torch import nn


class Net(nn.Module):
    def __init__(self, width=8):
        super().__init__()
        layers = [nn.Linear(2, width), nn.SiLU(), nn.Linear(width, 1)]
        self.layers = nn.Sequential(*layers)

    def forward(self, x):
        return self.layers(x).squeeze(-1) + x.square().sum(1) / 8


class Column(Net):
    def forward(self, x):
        return super().forward(x)[:, None]


class Pooled(Net):
    def forward(self, x):
        return super().forward(x).mean()


class Normed(Net):
    def __init__(self):
        super().__init__()
        self.layers.insert(1, nn.BatchNorm1d(2))


class Scaled(Net):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(1.0))


class Double(Net):
    def __init__(self):
        super().__init__()
        self.double()


class Bowl:
    def __init__(self, depth=1.0):
        self.depth = depth

    def __call__(self, x):
        return self.depth * x.square().sum(1)


def make(width=8):
    return Net(width)


def nothing():
    return 3
"""

MOVES = '''
from dataclasses import dataclass

import torch


@dataclass
class State:
    position: torch.Tensor
    energy: torch.Tensor


@dataclass
class Info:
    length: torch.Tensor


class Walk:
    """Metropolis steps of a fixed size."""

    def __init__(self, std=0.5):
        self.std = std

    def init(self, x, energy):
        with torch.no_grad():
            return State(x, energy(x))

    def step(self, state, energy, generator):
        noise = torch.empty_like(state.position).normal_(generator=generator)
        new = self.init(state.position + self.std * noise, energy)
        coin = torch.rand(len(noise), generator=generator)
        taken = coin.log() < state.energy - new.energy
        position = torch.where(taken[:, None], new.position, state.position)
        moved = self.std * noise.norm(dim=1) * taken
        return State(position, torch.where(taken, new.energy, state.energy)), Info(moved)


class Exact(Walk):
    leaves_invariant = True


class Stuck:
    def init(self, x, energy):
        return x


class Careless(Walk):
    def init(self, x, energy):
        x = x.detach().requires_grad_(True)
        return State(x, energy(x))
'''

LOSSES = '''
import torch


def contrast(energy, batch, negatives, generator, l2=0.1):
    data, model = energy(batch.x), energy(negatives.x)
    loss = data.mean() - model.mean() + l2 * (data.square().mean() + model.square().mean())
    margin = (model > data.mean()).float().mean()
    return loss, {"energy/gap": data.mean() - model.mean(), "margin": margin}


class Slopes:
    """Sliced score matching without chains."""

    needs_negatives = False

    def __call__(self, energy, batch, negatives, generator):
        assert negatives is None
        x = batch.x.clone().requires_grad_(True)
        (grad,) = torch.autograd.grad(energy(x).sum(), x, create_graph=True)
        v = torch.empty_like(x).normal_(generator=generator)
        (hv,) = torch.autograd.grad((grad * v).sum(), x, create_graph=True)
        return (grad.square().sum(1) / 2 - (hv * v).sum(1)).mean(), {}


def bare(energy, batch, negatives, generator):
    return energy(batch.x).mean()


def each(energy, batch, negatives, generator):
    return energy(batch.x), {}


class Weighted(torch.nn.Module):
    def __init__(self, shape):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(tuple(shape)))

    def forward(self, energy, batch, negatives, generator):
        return self.scale.sum() * (energy(batch.x).mean() - energy(negatives.x).mean()), {}
'''

PLUGIN = '''
from typing import Literal

from ebm_dist import energies, samplers
from ebm_dist.energies import BoundSection
from own_pkg.moves import Walk
from own_pkg.nets import Net


@energies.FAMILY.register
class TallSection(BoundSection):
    """A network of a plugin."""

    name: Literal["tall"] = "tall"

    height: int = 8
    """Units of its layer."""

    def module(self):
        return Net(self.height)
'''


def write(folder: Path) -> Path:
    """The package `own_pkg` in `folder`."""
    package = folder / "own_pkg"
    package.mkdir()
    files = {"__init__": "", "nets": NETS, "moves": MOVES, "losses": LOSSES, "ebm": PLUGIN}
    for name, text in files.items():
        (package / f"{name}.py").write_text(text)
    return package


ENERGY = {"name": "module", "target": "own_pkg.nets:Net", "params": {"width": 6}}
SAMPLER = {"name": "module", "target": "own_pkg.moves:Walk", "params": {"std": 0.4}, "num_steps": 5}
OBJECTIVE = {"name": "module", "target": "own_pkg.losses:contrast", "params": {"l2": 0.2}}


def config(**sections: Any) -> dict[str, Any]:
    """A run of four updates, with what the package has, in this process."""
    return {
        "run": {"name": "own", "seed": 1, "steps": 4},
        "runtime": {"backend": "inline"},
        "data": {"source": "toy:two_moons", "batch_size": 32, "toy_samples": 256, "prefetch": 0},
        "energy": ENERGY,
        "sampler": SAMPLER,
        "objective": OBJECTIVE,
        "buffer": {"capacity": 64, "num_shards": 1},
        "workers": {"num_workers": 1, "num_chains": 32},
        "learner": {"lr": 0.01},
        "flow": {"mode": "sync"},
        "checkpoint": {"every": 2},
        "tracking": {"wandb": "off", "log_every": 1},
        **sections,
    }
