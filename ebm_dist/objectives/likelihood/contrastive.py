"""Contrastive maximum likelihood: data against negatives.

The buffer decides where the chains of the negatives start: at data (CD-k), where they ended
(persistent, PCD), or at noise (short-run).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from pydantic import (
    Field,
    NonNegativeFloat,
    PositiveFloat,
    ValidationInfo,
    field_validator,
)
from torch import Tensor, nn

from ebm_dist.core.types import Batch, EnergyFn, Negatives
from ebm_dist.objectives.likelihood.kl_term import kl_term
from ebm_dist.objectives.likelihood.penalties import (
    PenaltyPoints,
    gradient_norm,
    penalty_points,
    spectral_norms,
)
from ebm_dist.objectives.likelihood.weighted_gap import weighted_gap
from ebm_dist.objectives.objective import (
    FAMILY,
    Metrics,
    Objective,
    ObjectiveSection,
    energies_of,
    input_grad,
    joined_context,
)
from ebm_dist.objectives.weighting import Truncation

Context = dict[str, Tensor]

Evaluate = Callable[[nn.Module | EnergyFn, Tensor, Context], Tensor]
"""Energies (B,) of events (B, *event) with their context."""


def energies_given(energy: nn.Module | EnergyFn, x: Tensor, context: Context) -> Tensor:
    """E(x | context) as (B,), at least float32."""
    return energies_of(partial(energy, **context), x)


class ContrastiveFields(ObjectiveSection):
    """The config fields of every objective with a contrastive part."""

    @property
    def contexts(self) -> frozenset[str]:
        return frozenset({"label", "condition"})

    adjustable: ClassVar[frozenset[str]] = frozenset(
        {
            "energy_l2",
            "gradient_penalty",
            "gradient_penalty_at",
            "gradient_penalty_std",
            "spectral_penalty",
            "temperature",  # the sampler's, which a smaller step size may change
            "truncation",
            "kl_weight",
            "kl_step_size",
            "repel_weight",
        }
    )

    energy_l2: NonNegativeFloat = 0.0
    """Weight of mean E(x+)^2 + mean E(x-)^2, which bounds the free additive constant of E."""

    gradient_penalty: NonNegativeFloat = 0.0
    """lambda of the penalty lambda/2 * E|dE/dx|^2."""

    gradient_penalty_at: PenaltyPoints = "data"
    """Points of the gradient penalty: data | gaussian | negatives | interpolation."""

    gradient_penalty_std: PositiveFloat = 1.0
    """Standard deviation of the points of `gradient_penalty_at: gaussian`."""

    spectral_penalty: NonNegativeFloat = 0.0
    """Weight of the sum of the largest singular values of the energy's weight matrices (VAEBM:
    0.2). Not for ZeRO stage 3, which partitions the matrices."""

    truncation: Truncation = None
    """Largest weight of a stale negative in units of the mean one, `inf` for no limit; sqrt(M)
    when left out."""

    kl_weight: NonNegativeFloat = 0.0
    """Weight of the KL term that contrastive divergence drops (Du et al. 2021)."""

    kl_step_size: PositiveFloat | None = Field(default=None, validate_default=True)
    """Step size of the differentiable Langevin step of the KL term, usually that of the sampler.
    Required with `kl_weight`."""

    repel_weight: NonNegativeFloat = 0.3
    """Weight, inside the KL term, of its nearest-neighbour entropy."""

    @field_validator("kl_step_size")
    @classmethod
    def _required_with_kl_weight(cls, value: float | None, info: ValidationInfo) -> float | None:
        if value is None and info.data.get("kl_weight", 0) > 0:
            raise ValueError("required when kl_weight > 0; give the sampler's step_size")
        return value

    def reads_temperature(self, *, reweights: bool) -> bool:
        return reweights or self.kl_weight > 0


@FAMILY.register
class ContrastiveSection(ContrastiveFields):
    """mean E(x+) - weighted mean E(x-): the maximum-likelihood gradient."""

    name: Literal["contrastive"] = "contrastive"
    example: ClassVar[dict[str, Any]] = {"energy_l2": 0.1}
    far_modes: ClassVar[str] = (
        "seen as far as the chains cross between them: with sampler.name parallel_tempering, "
        "not with chains that stay in the mode where they began (from data, or persistent "
        "behind a barrier)"
    )

    def module(self) -> Objective:
        return Contrastive(self)


class Contrastive(Objective):
    """Surrogate whose gradient is that of -T * log-likelihood for p = exp(-E/T)/Z.

        mean E(x+) - sum_i w_i E(x-_i) + energy_l2 * (mean E(x+)^2 + mean E(x-)^2)
            + gradient_penalty/2 * E|dE/dx|^2 + kl_weight * KL term

    w is proportional to exp(negatives.log_weight), times the staleness weights where `reweight`
    is set, and sums to 1. Du & Mordatch (2019), arXiv:1903.08689; CD: Hinton (2002); PCD:
    Tieleman (2008).

    Negatives that carry a label or a condition are contrasted as E(x | label, condition), against
    data with their own: class-conditional PCD, and structured prediction.

    Sees the weights of far modes only as far as chains cross between them (`parallel_tempering`).
    """

    needs_negatives = True

    def __init__(self, config: ContrastiveFields) -> None:
        super().__init__()
        self.config = config
        self.needs_generator = config.kl_weight > 0 or (
            config.gradient_penalty > 0
            and config.gradient_penalty_at in ("gaussian", "interpolation")
        )

    def loss(
        self,
        energy: nn.Module | EnergyFn,
        batch: Batch,
        negatives: Negatives | None,
        generator: torch.Generator | None,
    ) -> tuple[Tensor, Metrics]:
        assert negatives is not None
        return self.contrast(energy, batch, negatives, generator)

    def contrast(
        self,
        energy: nn.Module | EnergyFn,
        batch: Batch,
        negatives: Negatives,
        generator: torch.Generator | None,
        evaluate: Evaluate = energies_given,
    ) -> tuple[Tensor, Metrics]:
        """Loss and metrics for data (B, *event) against negatives (M, *event), each given its own
        context where the negatives have one.

        `evaluate(energy, x, context)` runs once on all events together: three passes through a
        small network cost nearly three times as much, and spectral norm would update three times.
        """
        config, data = self.config, batch.x
        num_pos, num_neg = data.shape[0], negatives.x.shape[0]
        parts = [data.detach(), negatives.x.to(data.dtype)]
        penalised, weighted = slice(0, num_pos), False
        if config.gradient_penalty > 0:
            if config.gradient_penalty_at == "negatives":
                penalised, weighted = slice(num_pos, num_pos + num_neg), True
            elif config.gradient_penalty_at != "data":
                at, std = config.gradient_penalty_at, config.gradient_penalty_std
                parts.append(penalty_points(at, parts[0], parts[1], generator, std=std))
                penalised = slice(num_pos + num_neg, None)
        x = torch.cat(parts)
        with torch.set_grad_enabled(torch.is_grad_enabled() or config.gradient_penalty > 0):
            if config.gradient_penalty > 0:
                x.requires_grad_(True)
            context = joined_context(batch, negatives, len(x) - num_pos - num_neg)
            values = evaluate(energy, x, context)
            energy_pos, energy_neg = values[:num_pos], values[num_pos : num_pos + num_neg]

            loss, weight, metrics = weighted_gap(
                self,
                negatives,
                energy_pos,
                energy_neg,
                temperature=config.fitted_temperature,
                truncation=config.truncation,
                l2=config.energy_l2,
            )
            if config.gradient_penalty > 0:
                grad = input_grad(values[penalised], x)[penalised]
                slope = gradient_norm(grad, weight if weighted else None)
                penalty = 0.5 * config.gradient_penalty * slope
                loss = loss + penalty
                metrics["loss/gradient_penalty"] = penalty.detach()
                metrics["energy/grad_norm"] = grad.detach().flatten(1).norm(dim=1).mean()
        if config.kl_weight > 0:
            assert config.kl_step_size is not None
            term = kl_term(
                partial(energy, **joined_context(None, negatives)),
                negatives.x.to(data.dtype),
                step_size=config.kl_step_size,
                temperature=config.fitted_temperature,
                repel_weight=config.repel_weight,
                generator=generator,
                weight=weight,
            )
            loss = loss + config.kl_weight * term
            metrics["loss/kl"] = config.kl_weight * term.detach()
        if config.spectral_penalty > 0:
            spectral = config.spectral_penalty * spectral_norms(energy)
            loss = loss + spectral
            metrics["loss/spectral"] = spectral.detach()
        return loss, metrics | {"loss/total": loss.detach()}
