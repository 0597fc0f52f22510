"""Which objectives see how the data's mass is shared among modes that are far apart.

The toy `unequal_modes` has 80% and 20% in two modes, 12 standard deviations apart. The energy is
that mixture with its share alone left to learn, from 50/50: all else is right from the start.
"""

from __future__ import annotations

import inspect
from pathlib import Path

import numpy as np
import pytest
import torch

from ebm_dist import energies, objectives, samplers
from ebm_dist.data.sources.toys import toy

DOCS = Path(__file__).parents[2] / "docs" / "objectives.md"


def data(num: int = 500) -> torch.Tensor:
    """Draws of the toy with exactly 20% on the right, so that the right answer is exactly .2."""
    x, _ = toy("unequal_modes").draw(4 * num, np.random.default_rng(0))
    left, right = x[x[:, 0] < 0][: num * 4 // 5], x[x[:, 0] > 0][: num // 5]
    return torch.from_numpy(np.concatenate([left, right])).float()


def learnt_share(objective: objectives.Objective, kernel=None, num_updates: int = 100) -> float:
    """Mass of the right mode, mean over the last half of the updates."""
    generator = torch.Generator().manual_seed(0)
    energy = energies.make("gaussian_mixture", means=[[-3.0], [3.0]], stds=0.5, learnable=True)
    x, shares = data(), []
    chains = torch.where(torch.arange(400)[:, None] < 200, -3.0, 3.0)
    for _ in range(num_updates):
        if kernel is not None:
            chains = samplers.run_chain(kernel, chains, energy, 3, generator).position
        loss, _ = objective(energy, x, chains if kernel is not None else None, generator)
        (slope,) = torch.autograd.grad(loss, [energy.logits])
        with torch.no_grad():
            energy.logits -= slope
        shares.append(energy.logits.detach().softmax(0)[1].item())
    return sum(shares[num_updates // 2 :]) / (num_updates - num_updates // 2)


MALA = {"name": "mala", "step_size": 0.3}


@pytest.mark.parametrize(
    ("name", "params", "kernel"),
    [
        ("noise_contrastive", {"noise": "gaussian", "noise_std": 3.5, "noise_ratio": 2}, None),
        ("energy_discrepancy", {"noise_std": 3.0, "flips": False}, None),
        (
            "contrastive",
            {},
            {"name": "parallel_tempering", "kernel": MALA, "temperatures": [1.0, 3.0, 9.0, 27.0]},
        ),
    ],
)
def test_objectives_that_see_far_modes_learn_their_weights(name, params, kernel):
    share = learnt_share(
        objectives.make(name, **params), samplers.make(**kernel) if kernel else None
    )
    # 400 chains know a share of .2 to .02, and the mean over updates to less.
    assert abs(share - 0.2) < 2 * (0.2 * 0.8 / 400) ** 0.5


@pytest.mark.parametrize(
    ("name", "params"),
    [
        ("score_matching", {}),
        ("sliced_score_matching", {}),
        ("denoising_score_matching", {"noise_std": 0.3}),
        ("energy_discrepancy", {"noise_std": 0.3, "flips": False}),
    ],
)
def test_objectives_that_do_not_see_them_leave_the_weights_where_they_began(name, params):
    assert learnt_share(objectives.make(name, **params)) == pytest.approx(0.5, abs=1e-3)


def test_persistent_chains_that_do_not_cross_lose_a_mode():
    # The gap between data and chains stays .2 to .5 whatever the energy: the weight runs away.
    share = learnt_share(objectives.make("contrastive"), samplers.make(**MALA))
    assert share < 0.01


def test_pseudo_likelihood_does_not_see_the_weights_of_opposite_states():
    # All bits on or all off, 80/20 in the data, where the energy says 5 to 2.
    spins = torch.tensor([0.0] * 8 + [1.0] * 2)[:, None].expand(10, 16).contiguous()
    weights = torch.tensor([0.5, 0.2]).requires_grad_()

    def energy(x):
        on = x.mean(dim=1)
        log_weight = (1 - on) * weights[0].log() + on * weights[1].log()
        return 200 * on * (1 - on) - log_weight

    loss, _ = objectives.make("pseudo_likelihood", one_hot=False)(energy, spins)
    (slope,) = torch.autograd.grad(loss, [weights])
    assert slope.abs().max() < 1e-3


@pytest.mark.parametrize("name", sorted(objectives.FAMILY.members.keys() - {"module"}))
def test_every_objective_says_what_it_sees_in_its_docstring_and_in_the_docs(name):
    section = objectives.FAMILY.members[name]
    assert section.far_modes.startswith(("seen", "not seen"))
    classes = type(section(name=name, **section.example).build()).__mro__
    assert any("far modes" in (inspect.getdoc(kind) or "") for kind in classes)
    (row,) = [line for line in DOCS.read_text().splitlines() if line.startswith(f"| `{name}` |")]
    assert section.far_modes in row
