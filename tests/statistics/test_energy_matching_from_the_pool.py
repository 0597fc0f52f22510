"""Energy matching's chains, moved a few steps a round by their clocks, have the law of one long
run inside the loss."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from ebm_dist import energies, objectives, samplers
from ebm_dist.actors.worker import Worker
from ebm_dist.buffer.config import BufferConfig, context_fields
from ebm_dist.buffer.shard import Shard
from ebm_dist.core.types import EventSpec, NegativeArrays, Negatives
from ebm_dist.core.weights import FlatLayout

SPEC = EventSpec((2,), "real")
NUM, BLOCKS = 3_000, 16
H, T, CUTOFF = 0.1, 0.5, 0.6
STEPS, ROUNDS, MIN_CLOCK = 5, 6, 20
AGES = range(MIN_CLOCK, STEPS * ROUNDS + 1, STEPS)


class Hollow(nn.Module):
    """E(x) = sum_i a_i sqrt(1 + (x_i - m_i)^2) + x_i^2 / 4: neither Gaussian nor symmetric."""

    def __init__(self) -> None:
        super().__init__()
        self.slope = nn.Parameter(torch.tensor([0.8, 2.0]))
        self.mean = nn.Parameter(torch.tensor([1.5, -1.0]))
        self.event_shape = SPEC.shape

    def forward(self, x: Tensor) -> Tensor:
        away = x - self.mean
        return (self.slope * (1 + away.square()).sqrt() + x.square() / 4).sum(1)


def in_the_loss(energy: nn.Module, generator: torch.Generator, noise: float) -> dict[int, Tensor]:
    """The authors' loop, `gibbs_sampling_time_sweep` for chains from noise: positions by age.

    Args:
        noise: factor of the noise, 1 for the right one.
    """
    x, kept = torch.empty(NUM, 2).normal_(generator=generator), {}
    for k in range(max(AGES)):
        t = k * H
        epsilon = 0.0 if t < CUTOFF - 1e-9 else min((t - CUTOFF) / (1 - CUTOFF), 1.0) * T
        leaf = x.requires_grad_(True)
        (grad,) = torch.autograd.grad(energy(leaf).sum(), leaf)
        xi = torch.empty(NUM, 2).normal_(generator=generator)
        x = x.detach() - H * grad + noise * (2 * H * max(epsilon, 0.0)) ** 0.5 * xi
        kept[k + 1] = x
    return {age: kept[age] for age in AGES}


def from_the_pool(energy: nn.Module, seed: int) -> Negatives:
    """Chains after rounds of a few steps, some of which have restarted on the way."""
    config = BufferConfig(capacity=NUM, reinit_prob=0.15, context={"clock": True})  # type: ignore[arg-type]
    fields = context_fields(config.context, SPEC)
    shard = Shard(config, SPEC, index=0, capacity=NUM, max_lease=NUM, seed=seed, fields=fields)
    sampler = samplers.FAMILY.section(
        "flow_langevin", step_size=H, temperature=T, time_cutoff=CUTOFF, num_steps=STEPS
    )
    worker = Worker(energies.given(energy), cast(Any, sampler), SPEC)
    weights = FlatLayout.of(energy).pack(energy).numpy()
    for round_ in range(ROUNDS):
        reply = shard.checkin(worker.run_round(shard.checkout(round_, NUM), weights, 0, STEPS))
        assert reply.accepted
        _, moved = shard.take(round_)
    assert isinstance(moved, NegativeArrays)
    context = {name: torch.from_numpy(value) for name, value in moved.context.items()}
    arrays = (moved.x, moved.energy, moved.version, moved.log_weight)
    return Negatives(*map(torch.from_numpy, arrays), context)


def compared(*noises: float) -> list[Tensor]:
    """Moments at every age and the gradient of the contrastive part, by block: from the pool, then
    inside the loss with its noise times each of `noises`."""
    energy, generator = Hollow(), torch.Generator().manual_seed(1)
    params: dict[str, Any] = {
        "flow_weight": 0.0, "contrastive_weight": 1.0, "contrastive_clamp": None,
        "temperature": T, "coupling": "independent", "trim_fraction": 0.1,
    }  # fmt: skip
    pooled = objectives.make("energy_matching", **params, min_clock=MIN_CLOCK)
    in_loss = objectives.make("energy_matching", **params)
    data = torch.empty(64, 2).normal_(generator=generator)

    def slope(loss: Tensor) -> Tensor:
        return torch.cat(torch.autograd.grad(loss, [energy.slope, energy.mean]))

    def moments(x: Tensor) -> Tensor:
        return torch.cat([x.mean(0), x.square().mean(0), x.pow(3).mean(0), x.prod(1).mean()[None]])

    found: list[list[Tensor]] = [[] for _ in range(1 + len(noises))]
    for block in range(BLOCKS):
        negatives = from_the_pool(energy, block)
        clock = negatives.context["clock"]
        assert set(clock.tolist()) == set(range(STEPS, STEPS * ROUNDS + 1, STEPS))
        of_age = {age: negatives.x[clock == age] for age in AGES}
        loss, metrics = pooled(energy, data, negatives, generator)
        num_arrived = sum(map(len, of_age.values()))
        torch.testing.assert_close(metrics["chain/arrived"], torch.tensor(num_arrived / NUM))
        found[0].append(torch.cat([slope(loss), *map(moments, of_age.values())]))
        for k, noise in enumerate(noises, start=1):
            chains = in_the_loss(energy, generator, noise)
            same_ages = [chains[age][: len(of_age[age])] for age in AGES]
            loss, _ = in_loss(energy, data, torch.cat(same_ages), generator)
            found[k].append(torch.cat([slope(loss), *map(moments, same_ages)]))
    return [torch.stack(rows).detach() for rows in found]


def test_chains_and_gradient_of_the_pool_are_those_of_one_long_run_inside_the_loss() -> None:
    """A noise wrong by a twentieth would show, and so would a clock that begins anew."""
    pooled, right, wrong = compared(1.0, 1.05)

    def off(in_loss: Tensor) -> float:
        """The largest difference from the pool, in standard errors."""
        error = ((in_loss.var(0) + pooled.var(0)) / BLOCKS).sqrt()
        return float(((pooled.mean(0) - in_loss.mean(0)).abs() / error).max())

    assert off(right) < 4
    assert off(wrong) > 5
