"""Reverse KL by a Donsker-Varadhan critic: mode-seeking, while likelihood is mode-covering."""

from __future__ import annotations

import math
from typing import Any, ClassVar, Literal, Self

import torch
from einops import rearrange
from pydantic import NonNegativeFloat, PositiveInt
from torch import Tensor, nn

from ebm_dist.core.types import Batch, EnergyFn, EventSpec, Negatives
from ebm_dist.objectives.objective import (
    FAMILY,
    Metrics,
    Objective,
    ObjectiveSection,
    energies_of,
)
from ebm_dist.objectives.weighting import Gather, Truncation, normalised_weights


@FAMILY.register
class ReverseKlSection(ObjectiveSection):
    """Minimise KL(model | data), estimated by a critic that is trained beside the energy."""

    name: Literal["reverse_kl"] = "reverse_kl"
    example: ClassVar[dict[str, Any]] = {"event_shape": (2,), "critic_widths": (8,)}
    far_modes: ClassVar[str] = (
        "seen as far as the chains cross between them; a model that cannot hold all of them "
        "drops some"
    )

    event_shape: tuple[PositiveInt, ...] | None = None
    """Shape of one x; taken from the data when left out."""

    critic_widths: tuple[PositiveInt, ...] = (128, 128)
    """Units of each hidden layer of the critic; () is a linear critic."""

    critic_l2: NonNegativeFloat = 0.0
    """Weight of mean c(x+)^2 + mean c(x-)^2 in the critic's loss. At 0 the critic can grow without
    bound on a few events that only the model visits."""

    energy_weight: NonNegativeFloat = 1.0
    """Weight of the energy's loss relative to the critic's; 0 trains the critic alone."""

    truncation: Truncation = None
    """Largest weight of a stale negative in units of the mean one, `inf` for no limit; sqrt(M)
    when left out."""

    @property
    def takes_negatives(self) -> bool:
        return True  # asked before the events are known, without which no critic can be built

    def bind(self, spec: EventSpec) -> Self:
        bound = super().bind(spec)
        if bound.event_shape is None:
            return bound.model_copy(update={"event_shape": spec.shape})
        if bound.event_shape != spec.shape:
            raise ValueError(
                f"objective.event_shape: {bound.event_shape}, but the data has events of shape "
                f"{spec.shape}; leave it out to take it from the data"
            )
        return bound

    def module(self) -> Objective:
        if self.event_shape is None:
            raise ValueError(
                "objective.event_shape: the critic does not know its events yet; give "
                "event_shape=(...), or bind the section to the data"
            )
        return ReverseKl(self, math.prod(self.event_shape))


class Critic(nn.Module):
    """c(x): (B, *event) -> (B,), a perceptron on the flattened event."""

    def __init__(self, size: int, widths: tuple[int, ...]) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for width in widths:
            layers += [nn.Linear(size, width), nn.SiLU()]
            size = width
        # The supremum does not depend on a constant in c, so a bias would drift.
        self.layers = nn.Sequential(*layers, nn.Linear(size, 1, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        dtype = next(self.parameters()).dtype
        out = rearrange(self.layers(x.flatten(1).to(dtype)), "b 1 -> b")
        return out if dtype == torch.float64 else out.float()


class ReverseKl(Objective):
    """KL(p | p_data) = sup over c of E_p[c(x-)] - log E_data[exp c(x+)].

    The critic maximises the estimate, the energy minimises it. No gradient passes through chains,
    so the energy's gradient is a score-function estimate: with p = exp(-E/T)/Z,

        d/dw E_p[c] = -Cov_p(c, dE/dw) / T

    and the second term does not depend on p. Donsker & Varadhan (1983); as a critic:
    Belghazi et al. (2018), arXiv:1801.04062, eq. 5 and 6.

    The value of the loss is the estimate, in nats; its gradient is that of both parts.

    Sees the weights of far modes only as far as chains cross between them.
    """

    needs_negatives = True

    def __init__(self, config: ReverseKlSection, size: int) -> None:
        super().__init__()
        self.config = config
        self.critic = Critic(size, config.critic_widths)

    def loss(
        self,
        energy: nn.Module | EnergyFn,
        batch: Batch,
        negatives: Negatives | None,
        generator: torch.Generator | None,
    ) -> tuple[Tensor, Metrics]:
        assert negatives is not None
        config, data = self.config, batch.x.detach()
        x = torch.cat([data, negatives.x.to(data.dtype)])
        values, critic = energies_of(energy, x), self.critic(x)
        energy_neg, critic_neg = values[len(data) :], critic[len(data) :]
        weight, metrics = self.negative_weight(
            negatives,
            energy_neg,
            temperature=config.fitted_temperature,
            truncation=config.truncation,
        )
        mean_neg = (weight * critic_neg).sum()
        kl, critic_loss = self.estimate(critic[: len(data)], mean_neg)
        if config.critic_l2 > 0:
            magnitude = critic.square()
            critic_loss = critic_loss + config.critic_l2 * (
                magnitude[: len(data)].mean() + magnitude[len(data) :].mean()
            )
        # Centred, since the gradient is a covariance: a constant in the critic has no effect.
        advantage = (critic_neg - _over_ranks(mean_neg, self.gather_ranks)).detach()
        energy_loss = -(weight * advantage * energy_neg).sum() / config.fitted_temperature
        gradients = config.energy_weight * energy_loss + critic_loss
        loss = gradients - gradients.detach() + kl
        metrics |= {
            "energy/positive": values[: len(data)].detach().mean(),
            "energy/negative": (weight * energy_neg).detach().sum(),
            "loss/critic": kl,
            "loss/total": loss.detach(),
        }
        metrics["energy/gap"] = metrics["energy/positive"] - metrics["energy/negative"]
        return loss, metrics

    def estimate(self, critic_data: Tensor, mean_neg: Tensor) -> tuple[Tensor, Tensor]:
        """The estimate in nats (detached), and a loss with minus the gradient of the estimate."""
        gather = self.gather_ranks
        total = critic_data.detach().logsumexp(0).reshape(1)
        count = len(critic_data)
        if gather is not None:
            parts = gather(total)
            total, count = parts.logsumexp(0), count * parts.shape[0]
        log_mean = total.squeeze() - math.log(count)
        kl = _over_ranks(mean_neg.detach(), gather) - log_mean
        # The gradient of log mean exp c is the mean of dc under softmax weights, those of
        # the global batch.
        softmax = normalised_weights(critic_data.detach(), gather)
        return kl, (softmax * critic_data).sum() - mean_neg


def _over_ranks(value: Tensor, gather: Gather | None) -> Tensor:
    """Mean of a 0-d tensor over the learner ranks, detached."""
    value = value.detach()
    return value if gather is None else gather(value.reshape(1)).mean()
