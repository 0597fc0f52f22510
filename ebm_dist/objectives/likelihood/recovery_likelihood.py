"""Diffusion recovery likelihood: the likelihood of a datum given a noisier version of it.

Its chains run inside the loss, or in the pool: each is then tied to its own pair of a datum and a
noisier version of it (`buffer.context`), and the learner reads both.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal, Self

import torch
from pydantic import (
    Field,
    PositiveFloat,
    PositiveInt,
    ValidationInfo,
    field_validator,
    model_validator,
)
from torch import Tensor, nn

from ebm_dist.core.events import per_chain, sum_event
from ebm_dist.core.types import Batch, EnergyFn, EventKind, LevelNoise, Negatives
from ebm_dist.energies.context import KEYS, trait
from ebm_dist.objectives.likelihood.recovery_law import (
    Conditioning,
    TiedEnergy,
    level_energies,
    pair_noise,
    recovery_loss,
)
from ebm_dist.objectives.matching.denoising import draw_levels
from ebm_dist.objectives.objective import (
    FAMILY,
    Metrics,
    Objective,
    ObjectiveSection,
    given,
    input_grad,
    normal_like,
    uniform,
)

_IN_LOSS = ("num_steps", "step_size", "adjusted")
"""Keys of chains inside the loss."""


@FAMILY.register
class RecoveryLikelihoodSection(ObjectiveSection):
    """Contrastive loss of p(x | x~), x~ = x + noise, a law so narrow that short chains mix."""

    name: Literal["recovery_likelihood"] = "recovery_likelihood"
    kinds: ClassVar[tuple[EventKind, ...]] = ("real", "image")
    example: ClassVar[dict[str, Any]] = {"noise_std": (0.2, 0.5), "num_steps": 3}
    # The normaliser of p(x | x~) differs between chains, so their weights cannot be compared.
    reweights: ClassVar[bool] = False
    far_modes: ClassVar[str] = (
        "not seen: chains start at the noisy datum and stay in its mode, and their errors there "
        "can even shift a weight"
    )

    noise_std: PositiveFloat | tuple[PositiveFloat, ...] = Field()
    """Standard deviation of the noise in data units; if several are given, one is drawn for each
    datum. No default: it depends on the data's scale."""

    conditioning: Conditioning = "none"
    """none: one energy, which recovers clean data from every level. level: a diffusion; the energy
    of the data diffused t times is E(x, t) of an energy with as many num_levels, or else
    -logits[:, t] of one with as many num_classes, and level t is recovered from level t + 1."""

    chains: Literal["loss", "pool"] = "loss"
    """loss: every update draws pairs from its batch and moves their chains inside the loss. pool:
    workers move them by the sampler of the run. Each chain starts at its own noisy pair, and the
    learner contrasts it with the less noisy one; the learner's own batch is not read. A chain of
    level t moves by sampler.step_size times v_t / v_0, in squared data units, with v = s^2, or
    s^2 (1 - s^2) under `level`."""

    num_steps: PositiveInt = 30
    """Langevin steps inside the loss, which start from the noisy event; `chains: loss` alone."""

    step_size: PositiveFloat = Field(default=0.1, lt=2.0)
    """h in units of 1/precision of p(x|x~), so that one value serves every level: the noise
    variance s^2, or s^2 (1 - s^2) under `level`, whose data have about unit variance; `chains:
    loss` alone."""

    adjusted: bool = False
    """Use a Metropolis accept step, which removes the bias of the step size; `chains: loss`
    alone."""

    loss_scale: Literal["none", "inverse_std"] = "inverse_std"
    """Weight of a level; inverse_std: the smallest noise_std over the level's own (Gao et al.)."""

    @field_validator("conditioning")
    @classmethod
    def _levels_keep_some_signal(cls, value: str, info: ValidationInfo) -> str:
        std = info.data.get("noise_std", ())
        if value == "level" and max(std if isinstance(std, tuple) else (std,), default=0) >= 1:
            raise ValueError(
                "level: a step keeps sqrt(1 - noise_std**2) of the signal; every noise_std must "
                "lie below 1"
            )
        return value

    @model_validator(mode="after")
    def _the_sampler_moves_the_pool(self) -> Self:
        fields = type(self).model_fields
        of_loss = [k for k in _IN_LOSS if getattr(self, k) != fields[k].default]
        if self.chains == "pool" and of_loss:
            raise ValueError(
                f"{of_loss[0]}: set, but with chains: pool the section sampler moves the chains; "
                "leave it out, and set sampler.name: mala or langevin, sampler.step_size and "
                "sampler.num_steps"
            )
        return self

    @property
    def levels(self) -> tuple[float, ...]:
        """The noise of every level."""
        return self.noise_std if isinstance(self.noise_std, tuple) else (self.noise_std,)

    @property
    def smallest(self) -> float | None:
        """The noise of the level of weight 1; None where all levels weigh alike."""
        return min(self.levels) if self.loss_scale == "inverse_std" else None

    @property
    def contexts(self) -> frozenset[str]:
        if self.chains == "pool":
            return frozenset({"level", "condition", "pair"})
        return frozenset({"level"} if self.conditioning == "level" else ())

    @property
    def pair_noise(self) -> tuple[LevelNoise, LevelNoise] | None:
        return None if self.chains == "loss" else pair_noise(self.levels, self.conditioning)

    def chain_energy(self, energy: nn.Module) -> nn.Module:
        by_level = self.conditioning == "level"
        for name in trait(energy, "needs_context") - ({"level"} if by_level else set()):
            raise ValueError(
                f"{KEYS[name]}: the energy needs the {name} of each event, which objective.name "
                f"{self.name} with objective.conditioning: {self.conditioning} does not give it; "
                "leave the key out" + (", or set conditioning: level" if name == "level" else "")
            )
        if (shape := getattr(energy, "event_shape", None)) is not None:
            with torch.no_grad():  # raises where the energy has another number of levels
                x, level = torch.zeros(1, *shape), torch.zeros(1, dtype=torch.int64)
                level_energies(energy, x, level, self.levels, self.conditioning)
        if self.chains == "loss":
            return energy
        return TiedEnergy(energy, self.levels, self.conditioning, self.fitted_temperature)

    def module(self) -> Objective:
        return RecoveryLikelihood(self) if self.chains == "loss" else PooledRecovery(self)


class RecoveryLikelihood(Objective):
    """mean[ w (E(x) - E(x-)) ], x- a short chain from p(x | x~), w the weight of the level.

    The gradient of w times -T log p(x | x~), for

        p(x | x~) = exp(-E(x)/T - |x~ - x|^2 / (2 s^2)) / Z(x~),    x~ = x + s xi

    Under `level` the diffusion keeps the variance: x~ = sqrt(1 - s^2) x_t + s xi, and the
    energy is one of y = sqrt(1 - s^2) x_t. Gao et al. (2021), arXiv:2012.08125, eq. 4, 9
    and 16.

    Does not see the weights of far modes: a chain stays in the mode that its datum came from.
    """

    needs_generator = True

    def __init__(self, config: RecoveryLikelihoodSection) -> None:
        super().__init__()
        self.config = config
        self.noise_stds = config.levels

    def loss(
        self,
        energy: nn.Module | EnergyFn,
        batch: Batch,
        negatives: Negatives | None,
        generator: torch.Generator | None,
    ) -> tuple[Tensor, Metrics]:
        generator = given(generator)
        level, std = draw_levels(self.noise_stds, batch.x, generator)
        clean = self.diffuse(batch.x, level, generator)
        noisy = clean + per_chain(std, clean) * normal_like(clean, generator)
        recovered, accepted = self.recover(energy, noisy, level, std, generator)
        values = self.level_energies(
            energy, torch.cat([clean, recovered]), torch.cat([level, level])
        )
        energy_pos, energy_neg = values.chunk(2)
        loss, metrics = recovery_loss(energy_pos, energy_neg, std, self.config.smallest)
        if self.config.adjusted:
            metrics["sampler/acceptance"] = accepted
        return loss, metrics

    def diffuse(self, x: Tensor, level: Tensor, generator: torch.Generator) -> Tensor:
        """The events to recover: the data, or sqrt(1 - s^2) x_t under `level`."""
        if self.config.conditioning == "none":
            return x.detach()
        stds = torch.tensor(self.noise_stds, dtype=x.dtype)
        keep = (1 - stds.square()).sqrt()
        # Signal left after t steps, for t = 0 .. number of levels - 1.
        kept = torch.cat([torch.ones(1, dtype=x.dtype), keep.cumprod(0)[:-1]]).to(x.device)[level]
        blur = (1 - kept.square()).clamp_min(0).sqrt()
        diffused = per_chain(kept, x) * x + per_chain(blur, x) * normal_like(x, generator)
        return (per_chain(keep.to(x.device)[level], x) * diffused).detach()

    def level_energies(self, energy: nn.Module | EnergyFn, x: Tensor, level: Tensor) -> Tensor:
        """E_t(x) (B,) at the level t of each event."""
        return level_energies(energy, x, level, self.noise_stds, self.config.conditioning)

    def recover(
        self,
        energy: nn.Module | EnergyFn,
        noisy: Tensor,
        level: Tensor,
        std: Tensor,
        generator: torch.Generator,
    ) -> tuple[Tensor, Tensor]:
        """Chains from p(x | noisy), started there: positions (B, *event), mean acceptance 0-d."""
        variance = std.square()
        step = self.config.step_size * variance
        if self.config.conditioning == "level":
            step = step * (1 - variance)
        wide_step, wide_variance = per_chain(step, noisy), per_chain(variance, noisy)

        def potential(x: Tensor) -> tuple[Tensor, Tensor]:
            with torch.enable_grad():
                leaf = x.detach().requires_grad_(True)
                values = self.level_energies(energy, leaf, level)
                grad = input_grad(values, leaf, create_graph=False)
            away = x - noisy
            temperature = self.config.fitted_temperature
            value = values.detach() / temperature + 0.5 * sum_event(away.square()) / variance
            return value, grad / temperature + away / wide_variance

        x = noisy.detach()
        value, grad = potential(x)
        accepted = torch.zeros_like(std)
        for _ in range(self.config.num_steps):
            noise = normal_like(x, generator)
            proposal = x - wide_step * grad + (2 * wide_step).sqrt() * noise
            new_value, new_grad = potential(proposal)
            if not self.config.adjusted:
                x, value, grad = proposal, new_value, new_grad
                continue
            back = x - proposal + wide_step * new_grad
            log_ratio = (
                value
                - new_value
                - sum_event(back.square()) / (4 * step)
                + 0.5 * sum_event(noise.square())
            )
            accept = uniform(step.shape, step, generator).log() < log_ratio
            wide = per_chain(accept, x)
            x, grad = torch.where(wide, proposal, x), torch.where(wide, new_grad, grad)
            value = torch.where(accept, new_value, value)
            accepted += accept
        return x, accepted.mean() / self.config.num_steps

    def sample(
        self, energy: nn.Module | EnergyFn, noise: Tensor, generator: torch.Generator
    ) -> Tensor:
        """Events (B, *event) from standard normal noise, recovered level by level.

        Under `level` this runs the diffusion backwards. The last level starts from N(0, I), so
        the noise of all levels together must erase the data: the product of sqrt(1 - s^2) must
        be near 0.

        Raises:
            ValueError: the objective is not conditioned on levels; sample exp(-E/T) itself.
        """
        if self.config.conditioning != "level":
            raise ValueError(
                "objective.conditioning: none has one energy of clean data; sample it with "
                "ebm_dist.samplers.run_chain"
            )
        x = noise.detach()
        for t in reversed(range(len(self.noise_stds))):
            level = torch.full(x.shape[:1], t, dtype=torch.int64, device=x.device)
            std = x.new_full(x.shape[:1], self.noise_stds[t])
            x, _ = self.recover(energy, x, level, std, generator)
            x = x / (1 - self.noise_stds[t] ** 2) ** 0.5
        return x


class PooledRecovery(Objective):
    """The same loss on chains of the pool, each with its level, its pair x and its noisy pair x~.

        mean[ w (E(x) - E(x-)) ],    x- the chain, moved from x~ under `TiedEnergy`

    The batch is not read. Gao et al. (2021), arXiv:2012.08125, algorithm 1.
    """

    needs_negatives = True

    def __init__(self, config: RecoveryLikelihoodSection) -> None:
        super().__init__()
        self.config = config

    def loss(
        self,
        energy: nn.Module | EnergyFn,
        batch: Batch,
        negatives: Negatives | None,
        generator: torch.Generator | None,
    ) -> tuple[Tensor, Metrics]:
        assert negatives is not None
        if missing := {"level", "pair"} - negatives.context.keys():
            raise ValueError(
                f"negatives.context: no {' and no '.join(sorted(missing))}, which chains of "
                "recovery_likelihood carry; set buffer.context: {level: stratified, pair: data, "
                "condition: noisy_pair}"
            )
        levels, x = self.config.levels, torch.cat([negatives.context["pair"], negatives.x])
        level = negatives.context["level"]
        both = torch.cat([level, level])
        values = level_energies(energy, x, both, levels, self.config.conditioning)
        std = torch.tensor(levels, dtype=x.dtype).to(x.device)[level]
        energy_pos, energy_neg = values.chunk(2)
        return recovery_loss(energy_pos, energy_neg, std, self.config.smallest)
