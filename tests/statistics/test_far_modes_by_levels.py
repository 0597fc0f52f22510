"""Persistent chains of p(x, level) find the masses of eight far modes; others do not."""

from __future__ import annotations

import math
from typing import Any, cast

import torch
from torch import Tensor

from ebm_dist import energies, objectives, samplers
from ebm_dist.actors.worker import Worker
from ebm_dist.buffer.config import BufferConfig, ContextConfig, context_fields
from ebm_dist.buffer.shard import Shard
from ebm_dist.core.types import EventSpec, NegativeArrays, Negatives
from ebm_dist.core.weights import FlatLayout

SPEC, NUM = EventSpec((2,), "real"), 1000
ANGLE = torch.arange(8) * math.pi / 4
MEANS = 2 * torch.stack([ANGLE.cos(), ANGLE.sin()], 1)
TRUTH = torch.tensor([0.3, 0.05, 0.15, 0.05, 0.1, 0.05, 0.2, 0.1])
NOISES = (0.02, 0.35, 0.75, 1.5)
KERNEL = {"name": "mala", "step_size": 0.02, "temperature": 1.0}


def mixture(weights: Tensor, levels: bool, learnable: bool = False) -> Any:
    params: dict[str, Any] = {"noise_stds": NOISES} if levels else {}
    found = energies.make(
        "gaussian_mixture", means=tuple(map(tuple, MEANS.tolist())), stds=0.2,
        weights=tuple(weights.tolist()), learnable=learnable, **params,
    )  # fmt: skip
    if learnable:  # the masses alone are in question
        found.means.requires_grad_(False)
        found.log_stds.requires_grad_(False)
    return found


class Pool:
    """One shard and one worker, whose chains all begin near the first mode."""

    def __init__(self, energy: Any, levels: bool) -> None:
        context = ContextConfig(level="stratified" if levels else None)
        config = BufferConfig(capacity=NUM, init_std=0.2, reinit_prob=0.0, context=context)
        fields = context_fields(context, SPEC, NOISES)
        self.shard = Shard(
            config, SPEC, index=0, capacity=NUM, max_lease=NUM, seed=3, fields=fields
        )
        slots = self.shard._slots
        slots.position[:] += MEANS[0].numpy()
        tempered = {"name": "simulated_tempering", "kernel": KERNEL, "data_std": 0.2}
        params = dict(tempered if levels else KERNEL)
        sampler = samplers.FAMILY.section(params.pop("name"), **params)
        self.worker = Worker(energies.given(energy), cast(Any, sampler), SPEC)
        self.energy, self.round = energy, 0

    def negatives(self, num_steps: int) -> Negatives:
        """The chains after one more round, under the weights of the energy now."""
        weights = FlatLayout.of(self.energy).pack(self.energy).numpy()
        lease = self.shard.checkout(self.round, NUM)
        moved = self.worker.run_round(lease, weights, self.round, num_steps)
        assert self.shard.checkin(moved).accepted
        _, arrays = self.shard.take(self.round)
        self.round += 1
        assert isinstance(arrays, NegativeArrays)
        values = (arrays.x, arrays.energy, arrays.version, arrays.log_weight)
        context = {name: torch.from_numpy(value) for name, value in arrays.context.items()}
        return Negatives(*map(torch.from_numpy, values), context)


def shares(x: Tensor) -> Tensor:
    """The share of events (B, 2) nearest to each mode."""
    return torch.nn.functional.one_hot(torch.cdist(x, MEANS).argmin(1), 8).float().mean(0)


def off(found: Tensor, truth: Tensor, num: int) -> float:
    """The largest difference in standard errors of `num` independent draws."""
    return float(((found - truth).abs() / (truth * (1 - truth) / num).sqrt()).max())


def test_chains_of_all_levels_have_the_masses_of_eight_modes_and_equal_shares_of_the_levels() -> (
    None
):
    """Chains of one level stay in the mode where they began."""
    pool = Pool(mixture(TRUTH, levels=True), levels=True)
    kept = []
    for _ in range(12):
        now = pool.negatives(40)
        level = now.context["level"]
        if pool.round > 5:
            kept.append((now.x[level == 0], level))
    level = torch.cat([part for _, part in kept])
    occupied = torch.bincount(level, minlength=4) / len(level)
    # A round of 40 steps leads a chain through the levels several times; counted as a quarter of an
    # independent draw.
    assert off(occupied, torch.full((4,), 0.25), len(level) // 4) < 4, occupied
    clean = torch.cat([x for x, _ in kept])
    assert off(shares(clean), TRUTH, len(clean) // 4) < 4, shares(clean)
    alone = Pool(mixture(TRUTH, levels=False), levels=False)
    stuck = alone.negatives(200).x
    assert off(shares(stuck), TRUTH, len(stuck)) > 20


def test_training_with_chains_of_all_levels_finds_the_masses_and_with_one_level_does_not() -> None:
    start = torch.tensor([0.5, *[0.5 / 7] * 7])
    data = mixture(TRUTH, levels=False).sample(2000, torch.Generator().manual_seed(5))
    found = {}
    for levels in (True, False):
        energy = mixture(start, levels, learnable=True)
        name = "contrastive_levels" if levels else "contrastive"
        objective, pool = objectives.make(name), Pool(energy, levels)
        optimiser = torch.optim.SGD([energy.logits], lr=1.0)
        generator, averaged = torch.Generator().manual_seed(2), torch.zeros(8)
        for update in range(100):
            loss, _ = objective(energy, data, pool.negatives(10), generator)
            (energy.logits.grad,) = torch.autograd.grad(loss, [energy.logits])
            optimiser.step()
            if update >= 40:
                averaged += energy.logits.detach().softmax(0) / 60
        found[levels] = averaged
    empirical = shares(data)
    assert off(found[True], empirical, len(data)) < 4, found[True]
    assert off(found[False], empirical, len(data)) > 20, found[False]
