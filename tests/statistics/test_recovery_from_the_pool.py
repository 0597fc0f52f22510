"""Recovery likelihood with its chains in the pool has the law of its chains inside the loss."""

from __future__ import annotations

from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

from ebm_dist import energies, objectives, samplers
from ebm_dist.actors.worker import Worker
from ebm_dist.buffer.config import BufferConfig, context_fields
from ebm_dist.buffer.shard import Shard
from ebm_dist.core.types import Batch, EventSpec, NegativeArrays, Negatives
from ebm_dist.core.weights import FlatLayout
from ebm_dist.objectives.likelihood.recovery_likelihood import RecoveryLikelihood

SPEC = EventSpec((2,), "real")
NUM, BLOCKS = 5_000, 20
T, STEP, K = 0.5, 0.3, 12
STDS = {"none": (0.6, 1.2), "level": (0.6, 0.9)}


class Parabolas(nn.Module):
    """E_t(x) = alpha_t/2 |x - m_t|^2: one energy under `none`, E(x, t) under `level`."""

    def __init__(self, by: str) -> None:
        super().__init__()
        num = 2 if by == "level" else 1
        self.alpha = nn.Parameter(torch.tensor([0.4, 0.8])[:num])
        self.mean = nn.Parameter(torch.tensor([[0.5, -1.0], [1.5, 0.0]])[:num])
        self.event_shape = SPEC.shape
        if by == "level":
            self.context = self.needs_context = frozenset({"level"})
            self.noise_stds = (0.1, 0.2)

    def forward(self, x: Tensor, level: Tensor | None = None) -> Tensor:
        level = torch.zeros(len(x), dtype=torch.int64) if level is None else level
        return 0.5 * self.alpha[level] * (x - self.mean[level]).square().sum(1)


class Plane:
    """Data: Gaussian, with other variances along the axes, and off the origin."""

    def __init__(self) -> None:
        self.generator = torch.Generator().manual_seed(7)

    def next_batch(self, num: int) -> Batch:
        noise = torch.empty(num, 2).normal_(generator=self.generator)
        return Batch(torch.tensor([1.0, 0.5]) + torch.tensor([1.0, 0.5]) * noise)

    def state(self) -> dict[str, Any]:
        return {}

    def load_state(self, state: dict[str, Any]) -> None:
        del state


def section(by: str, **params: Any) -> Any:
    return objectives.FAMILY.section(
        "recovery_likelihood", noise_std=STDS[by], conditioning=by, temperature=T, **params
    )


def variance_of_law(by: str, t: int) -> float:
    """v_t, in units of which a step is measured."""
    s = STDS[by][t]
    return s**2 * (1 - s**2) if by == "level" else s**2


def from_the_pool(by: str, energy: nn.Module) -> list[Negatives]:
    """Rounds of a worker, each with new pairs."""
    objective = section(by, chains="pool")
    config = BufferConfig(
        capacity=NUM,
        init="condition",
        reinit_prob=1.0,
        context={"level": "stratified", "pair": "data", "condition": "noisy_pair"},  # type: ignore[arg-type]
    )
    noise = objective.pair_noise
    assert noise is not None
    fields = context_fields(config.context, SPEC, noise[0].std, noise)
    shard = Shard(
        config, SPEC, index=0, capacity=NUM, max_lease=NUM, seed=3, data=Plane(), fields=fields
    )
    # A step of the sampler is one of E/T, times T.
    sampler = samplers.FAMILY.section(
        "langevin", step_size=STEP * variance_of_law(by, 0) / T, temperature=T, num_steps=K
    )
    worker = Worker(energies.given(energy), cast(Any, sampler), SPEC, objective=objective)
    weights = FlatLayout.of(energy).pack(energy).numpy()
    out = []
    for round_ in range(BLOCKS):
        reply = shard.checkin(worker.run_round(shard.checkout(round_, NUM), weights, round_, K))
        assert reply.accepted
        _, moved = shard.take(round_)
        assert isinstance(moved, NegativeArrays)
        context = {name: torch.from_numpy(value) for name, value in moved.context.items()}
        arrays = (moved.x, moved.energy, moved.version, moved.log_weight)
        out.append(Negatives(*map(torch.from_numpy, arrays), context))
    return out


def moments(level: Tensor, pair: Tensor, noisy: Tensor, x: Tensor) -> Tensor:
    """Of chains x (M, 2), of their pairs and of both together, at each level."""
    both = torch.cat([x, pair, noisy], 1)
    parts = []
    for t in range(2):
        at = both[level == t]
        parts += [at.mean(0), (at[:, :, None] * at[:, None, :]).mean(0).flatten()]
    return torch.cat(parts)


def blocks_of_both(by: str) -> dict[str, tuple[Tensor, Tensor]]:
    """Moments and gradients of every block, inside the loss and from the pool."""
    energy = Parabolas(by)
    in_loss = section(by, num_steps=K, step_size=STEP).build()
    assert isinstance(in_loss, RecoveryLikelihood)
    pooled = section(by, chains="pool").build()
    data, generator = Plane(), torch.Generator().manual_seed(1)
    found: dict[str, tuple[list[Tensor], list[Tensor]]] = {"moments": ([], []), "slope": ([], [])}

    def slope(loss: Tensor) -> Tensor:
        grads = torch.autograd.grad(loss, [energy.alpha, energy.mean])
        return torch.cat([grad.flatten() for grad in grads])

    for negatives in from_the_pool(by, energy):
        batch = data.next_batch(NUM)
        found["slope"][0].append(slope(in_loss(energy, batch, None, generator)[0]))
        found["slope"][1].append(slope(pooled(energy, batch, negatives)[0]))
        level = torch.arange(NUM) % 2
        std = torch.tensor(STDS[by])[level]
        clean = in_loss.diffuse(batch.x, level, generator)
        noisy = clean + std[:, None] * torch.empty(NUM, 2).normal_(generator=generator)
        x, _ = in_loss.recover(energy, noisy, level, std, generator)
        found["moments"][0].append(moments(level, clean, noisy, x))
        c = negatives.context
        found["moments"][1].append(moments(c["level"], c["pair"], c["condition"], negatives.x))
    return {key: (torch.stack(a), torch.stack(b)) for key, (a, b) in found.items()}


@pytest.mark.parametrize("by", ["none", "level"])
def test_negatives_and_gradient_of_the_pool_are_those_of_chains_inside_the_loss(by: str) -> None:
    for name, (in_loss, pooled) in blocks_of_both(by).items():
        error = ((in_loss.var(0) + pooled.var(0)) / BLOCKS).sqrt()
        off = (pooled.mean(0) - in_loss.mean(0)).abs() / error
        assert off.max() < 4, (name, off)
