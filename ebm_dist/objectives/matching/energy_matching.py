"""Energy matching: flow matching of -dE/dx from noise to the data, and contrast near the data."""

from __future__ import annotations

from dataclasses import fields
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat
from torch import Tensor, nn

from ebm_dist.core.events import per_chain
from ebm_dist.core.types import Batch, EnergyFn, EventKind, Negatives
from ebm_dist.objectives.matching.transport import pair
from ebm_dist.objectives.objective import (
    FAMILY,
    Metrics,
    Objective,
    ObjectiveSection,
    energies_of,
    energy_and_grad,
    given,
    normal_like,
    uniform,
)
from ebm_dist.objectives.weighting import Truncation


@FAMILY.register
class EnergyMatchingSection(ObjectiveSection):
    """Flow matching of -dE/dx from Gaussian noise to the data, and a contrastive part."""

    name: Literal["energy_matching"] = "energy_matching"
    kinds: ClassVar[tuple[EventKind, ...]] = ("real", "image")
    example: ClassVar[dict[str, Any]] = {}
    far_modes: ClassVar[str] = (
        "not seen by the flow part, whose -dE/dx is a velocity and not a score; by the "
        "contrastive part as far as its chains cross between them"
    )

    flow_weight: NonNegativeFloat = 1.0
    """Weight of the flow part."""

    time_cutoff: float = Field(default=1.0, gt=0.0, le=1.0)
    """tau*: the weight of the flow part is 1 before this time and falls linearly to 0 at time 1.
    The authors warm up at 1 and then train at 0.9."""

    coupling: Literal["ot", "independent"] = "ot"
    """How noise and data are paired: by optimal transport inside each rank's batch (ot), or
    independently."""

    noise_std: PositiveFloat = 1.0
    """Standard deviation of the noise that the flow starts from."""

    contrastive_weight: NonNegativeFloat = 1e-3
    """lambda_CD, weight of the contrastive part; 0 needs no negatives."""

    contrastive_clamp: PositiveFloat | None = 0.02
    """The weighted contrastive part is clamped to at least minus this, with no gradient below."""

    trim_fraction: float = Field(default=0.1, ge=0.0, lt=1.0)
    """Share of the negatives that is left out, those of highest energy."""

    warmup_steps: NonNegativeInt = 0
    """Number of first updates that train the flow part alone."""

    min_clock: NonNegativeInt = 0
    """Steps of its own life after which a chain counts as a negative: those that it takes to flow
    from noise to the data, 1 / step_size of `flow_langevin`. Needs buffer.context.clock."""

    truncation: Truncation = None
    """Largest weight of a stale negative in units of the mean one, `inf` for no limit; sqrt(M)
    when left out."""

    def reads_temperature(self, *, reweights: bool) -> bool:
        return reweights

    def module(self) -> Objective:
        return EnergyMatching(self)


class EnergyMatching(Objective):
    """flow_weight * mean w(t) |-dE/dx(x_t) - (x1 - x0)|^2 + max(lambda * gap, -clamp).

    x_t = (1-t) x0 + t x1, x0 noise, x1 data, t uniform; gap is mean E(x+) - trimmed mean E(x-).
    |.|^2 is the mean over the event's numbers, as the authors' value of lambda assumes. Balcerak
    et al. (2025), arXiv:2504.10612, algorithms 1 and 2.

    Their chains live for 150 to 200 steps inside the loss of one update. Here workers move them, a
    few steps a round, and each carries its clock; those of min_clock steps or more are negatives.

    The flow part does not see the weights of far modes, the contrastive one does if chains cross.
    """

    needs_generator = True

    def __init__(self, config: EnergyMatchingSection) -> None:
        super().__init__()
        self.config = config
        self.needs_negatives = config.contrastive_weight > 0

    def loss(
        self,
        energy: nn.Module | EnergyFn,
        batch: Batch,
        negatives: Negatives | None,
        generator: torch.Generator | None,
    ) -> tuple[Tensor, Metrics]:
        config, data = self.config, batch.x.detach()
        flow = self.flow(energy, data, given(generator))
        loss = config.flow_weight * flow
        metrics: Metrics = {"loss/flow": flow.detach()}
        if negatives is not None and config.contrastive_weight > 0 and not self.warming_up:
            some: Tensor | float = 1.0
            if config.min_clock > 0:
                negatives, share = self.arrived(negatives)
                # Without negatives nothing would hold the energies of data up.
                some, metrics["chain/arrived"] = (share > 0).float(), share
            values = energies_of(energy, torch.cat([data, negatives.x.to(data.dtype)]))
            energy_pos, energy_neg = values[: len(data)], values[len(data) :]
            weight, extra = self.negative_weight(
                negatives,
                energy_neg,
                temperature=config.fitted_temperature,
                truncation=config.truncation,
            )
            mean_neg = trimmed(weight, energy_neg, config.trim_fraction).sum()
            gap = some * (energy_pos.mean() - mean_neg)
            contrastive = config.contrastive_weight * gap
            if config.contrastive_clamp is not None:
                contrastive = contrastive.clamp_min(-config.contrastive_clamp)
            loss = loss + contrastive
            metrics |= extra
            metrics |= {
                "energy/positive": energy_pos.detach().mean(),
                "energy/negative": mean_neg.detach(),
                "energy/gap": gap.detach(),
            }
        metrics["loss/total"] = loss.detach()
        return loss, metrics

    def arrived(self, negatives: Negatives) -> tuple[Negatives, Tensor]:
        """The negatives of min_clock steps or more, and their share over all ranks, 0-d.

        Waits for the device, which saves the energies of the others.
        """
        if (clock := negatives.context.get("clock")) is None:
            raise ValueError(
                "negatives.context: no clock, which objective.min_clock reads; set "
                "buffer.context.clock: true, or objective.min_clock: 0"
            )
        old = clock >= self.config.min_clock
        share = old.float().mean()
        if self.gather_ranks is not None:
            share = self.gather_ranks(share.reshape(1)).mean()
        return chosen(negatives, old), share

    @property
    def warming_up(self) -> bool:
        """Whether the next update trains the flow part alone."""
        if self.config.warmup_steps == 0:
            return False
        if self.step is None:
            raise ValueError(
                "objective.warmup_steps: set, but nobody announces updates; call "
                "objective.begin_update(step) before each one"
            )
        return self.step < self.config.warmup_steps

    def flow(
        self, energy: nn.Module | EnergyFn, data: Tensor, generator: torch.Generator
    ) -> Tensor:
        """The flow part, 0-d."""
        start = self.config.noise_std * normal_like(data, generator)
        if self.config.coupling == "ot":
            start = pair(start, data)
        time = uniform(data.shape[:1], data, generator)
        wide = per_chain(time, data)
        _, _, grad = energy_and_grad(energy, (1 - wide) * start + wide * data)
        with torch.enable_grad():
            error = (-grad - (data - start)).square().flatten(1).mean(1)
            return (flow_weight(time, self.config.time_cutoff) * error).mean()


def chosen(negatives: Negatives, rows: Tensor) -> Negatives:
    """The negatives with a True in `rows` (M,)."""
    parts = {f.name: getattr(negatives, f.name) for f in fields(negatives) if f.name != "context"}
    context = {name: value[rows] for name, value in negatives.context.items()}
    return Negatives(**{name: value[rows] for name, value in parts.items()}, context=context)


def flow_weight(time: Tensor, cutoff: float) -> Tensor:
    """1 before the cutoff, then linear to 0 at time 1, for times (B,) in [0, 1)."""
    if cutoff >= 1:
        return torch.ones_like(time)
    return ((1 - time) / (1 - cutoff)).clamp(max=1.0)


def trimmed(weight: Tensor, energy: Tensor, fraction: float) -> Tensor:
    """weight * energy (M,) without the `fraction` of highest energy; the others get its weight.

    Otherwise negatives that one step moved far away would dominate the mean.
    """
    num_kept = energy.shape[0] - int(fraction * energy.shape[0])
    if num_kept == energy.shape[0]:
        return weight * energy
    index = energy.detach().argsort()[:num_kept]
    kept = weight[index]
    return kept * (weight.sum() / kept.sum()) * energy[index]
