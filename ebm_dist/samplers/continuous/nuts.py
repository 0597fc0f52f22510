"""The No-U-Turn sampler: Hamiltonian trajectories that stop where they turn back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, PositiveFloat
from torch import Tensor

from ebm_dist.core.events import per_chain, sum_event
from ebm_dist.core.types import EnergyFn
from ebm_dist.samplers.continuous.gradient import GradientState, StartsWithGradient
from ebm_dist.samplers.kernel import FAMILY, KernelSection, normal, select, value_and_grad

_MAX_ENERGY_ERROR = 1000.0
"""The integrator has diverged if H rises by more than this, in units of T (Stan's limit)."""


@dataclass(frozen=True, slots=True)
class NutsInfo:
    """Reported for each trajectory."""

    acceptance: Tensor  # (B,), mean over its leaves of min(1, exp(-(H - H_0) / T))
    accepted: Tensor  # (B,), 1 where the position changed
    tree_depth: Tensor  # (B,), doublings: a trajectory has 2^depth - 1 leapfrog steps
    diverged: Tensor  # (B,), 1 where the integrator diverged


@dataclass(frozen=True, slots=True)
class _End:
    """A point of the trajectory in phase space."""

    position: Tensor  # (B, *event)
    momentum: Tensor  # (B, *event)
    grad: Tensor  # (B, *event), dE/dx at position


@dataclass(frozen=True, slots=True)
class _Tree:
    """A subtree of the trajectory, and the point drawn from it."""

    end: _End  # its outer end
    drawn: GradientState  # a leaf, with probability proportional to exp(-H / T)
    log_weight: Tensor  # (B,), log of the sum of exp(-(H - H_0) / T) over its leaves
    momentum_sum: Tensor  # (B, *event), over its leaves
    sound: Tensor  # (B,) bool: no part of it turned back or diverged
    diverged: Tensor  # (B,) bool
    acceptance_sum: Tensor  # (B,), over the leaves that were visited
    num_leaves: Tensor  # (B,), the number of those


@dataclass(frozen=True, slots=True)
class Nuts(StartsWithGradient):
    """Doubles a leapfrog trajectory, forwards or backwards in time, until it turns back.

    The next position is drawn from the whole trajectory in proportion to exp(-H/T), with
    H(x, p) = E(x) + |p|^2 / 2 and p ~ N(0, T I). exp(-E/T) stays exactly invariant, and no number
    of leapfrog steps has to be chosen. Hoffman & Gelman (2014), arXiv:1111.4246. The draws within
    a tree and between trees, and the U-turn criterion, are those of Betancourt (2017),
    arXiv:1701.02434, sections A.3 and A.4.2. The tree is built leaf by leaf with a logarithmic
    number of stored momenta (Phan et al. 2019, arXiv:1912.11554).

    The chains of a batch double together, and a chain that has turned back waits for the others.
    So a step costs as much as the longest trajectory of the batch.
    """

    step_size: float
    """e, in data units over momentum; a quadratic of curvature a is stable below 2/sqrt(a)."""
    max_tree_depth: int = 10
    """At most 2^depth - 1 leapfrog steps a trajectory."""
    temperature: float = 1.0

    tunable: ClassVar[str] = "step_size"
    reversible: ClassVar[bool] = True
    leaves_invariant: ClassVar[bool] = True
    target_acceptance: ClassVar[float] = 0.8

    def step(
        self, state: GradientState, energy: EnergyFn, generator: torch.Generator
    ) -> tuple[GradientState, NutsInfo]:
        momentum = normal(state.position, generator).mul_(self.temperature**0.5)
        # Enough for the longest trajectory, (3, max_tree_depth, B): with draws on demand the
        # length of one chain's trajectory would shift the noise of the others.
        shape = (3, self.max_tree_depth, len(state.energy))
        noise = torch.empty(shape, dtype=torch.float64, device=state.energy.device)
        noise.uniform_(generator=generator)
        start_h = state.energy + 0.5 * sum_event(momentum.square())
        ends = [_End(state.position, momentum, state.grad)] * 2  # backward end, forward end
        drawn, log_weight, momentum_sum = state, torch.zeros_like(state.energy), momentum
        growing = torch.ones_like(state.energy, dtype=torch.bool)
        diverged = torch.zeros_like(growing)
        depths, acceptance, leaves = (torch.zeros_like(state.energy) for _ in range(3))
        for depth in range(self.max_tree_depth):
            direction, merge, within = noise[:, depth]
            forwards = direction < 0.5
            tip = _where(forwards, ends[1], ends[0])
            tree = self._extend(tip, forwards, growing, depth, start_h, within, drawn, energy)
            depths = depths + growing
            acceptance = acceptance + tree.acceptance_sum
            leaves = leaves + tree.num_leaves
            diverged |= tree.diverged
            ends[0] = _where(growing & ~forwards, tree.end, ends[0])
            ends[1] = _where(growing & forwards, tree.end, ends[1])
            # Biased towards the new half, which lies further away (Betancourt, A.3.2).
            growing = growing & tree.sound
            taken = growing & (merge.log() < tree.log_weight - log_weight)
            drawn = select(taken, tree.drawn, drawn)
            log_weight = torch.logaddexp(log_weight, tree.log_weight)
            momentum_sum = momentum_sum + tree.momentum_sum
            growing &= ~_turned(ends[0].momentum, ends[1].momentum, momentum_sum)
            if not bool(growing.any()):
                break
        moved = (drawn.position != state.position).flatten(1).any(1)
        to = state.energy.dtype
        info = NutsInfo(acceptance / leaves, moved.to(to), depths, diverged.to(to))
        return drawn, info

    def _extend(
        self,
        tip: _End,
        forwards: Tensor,
        growing: Tensor,
        depth: int,
        start_h: Tensor,
        uniform: Tensor,
        drawn: GradientState,
        energy: EnergyFn,
    ) -> _Tree:
        """The 2^depth leaves beyond `tip`, for the chains that are still `growing`."""
        e = torch.where(forwards, self.step_size, -self.step_size).to(tip.position.dtype)
        e = per_chain(e, tip.position)
        position, momentum, grad = tip.position, tip.momentum, tip.grad
        log_weight = torch.full_like(start_h, -torch.inf)
        momentum_sum = torch.zeros_like(momentum)
        acceptance, leaves = torch.zeros_like(start_h), torch.zeros_like(start_h)
        sound, diverged = growing, torch.zeros_like(growing)
        marks: dict[int, tuple[Tensor, Tensor]] = {}
        for leaf in range(2**depth):
            momentum = momentum - 0.5 * e * grad
            position = position + e * momentum
            value, grad = value_and_grad(energy, position)
            momentum = momentum - 0.5 * e * grad
            error = (value + 0.5 * sum_event(momentum.square()) - start_h) / self.temperature
            error = torch.nan_to_num(error, nan=torch.inf, posinf=torch.inf)
            left = error > _MAX_ENERGY_ERROR
            diverged = diverged | (sound & left)
            leaves = leaves + sound
            acceptance = acceptance + sound * (-error).clamp(max=0.0).exp()
            sound = sound & ~left
            log_weight = torch.logaddexp(log_weight, -error)
            # One uniform number serves all leaves: rescaled after a decision it is uniform again,
            # given the decision. In float64, since every decision uses up some of its bits.
            share = (-error - log_weight).exp().nan_to_num(0.0)
            new = uniform < share
            uniform = torch.where(new, uniform / share, (uniform - share) / (1 - share))
            drawn = select(new & sound, GradientState(position, value, grad), drawn)
            momentum_sum = momentum_sum + momentum
            sound = sound & ~self._turns_within(leaf, momentum, momentum_sum, marks)
            # A chain that has stopped returns to the tip, so that it cannot run off to infinity.
            stay = per_chain(sound, position)
            position = torch.where(stay, position, tip.position)
            momentum = torch.where(stay, momentum, tip.momentum)
            grad = torch.where(stay, grad, tip.grad)
            if not bool(sound.any()):
                break
        end = _End(position, momentum, grad)
        return _Tree(end, drawn, log_weight, momentum_sum, sound, diverged, acceptance, leaves)

    @staticmethod
    def _turns_within(
        leaf: int, momentum: Tensor, momentum_sum: Tensor, marks: dict[int, tuple[Tensor, Tensor]]
    ) -> Tensor:
        """Whether a balanced subtree that ends at `leaf` turned back, (B,).

        An even leaf opens subtrees: its momentum is stored at the number of set bits of
        leaf >> 1. An odd leaf closes as many subtrees as its binary form has trailing ones.
        """
        place = (leaf >> 1).bit_count()
        if leaf % 2 == 0:
            marks[place] = (momentum, momentum_sum)
            return torch.zeros(len(momentum), dtype=torch.bool, device=momentum.device)
        num_closed = ((leaf + 1) & -(leaf + 1)).bit_length() - 1
        turned = torch.zeros(len(momentum), dtype=torch.bool, device=momentum.device)
        for k in range(place, place - num_closed, -1):
            first, sum_there = marks[k]
            turned |= _turned(first, momentum, momentum_sum - sum_there + first)
        return turned


def _turned(first: Tensor, last: Tensor, momentum_sum: Tensor) -> Tensor:
    """Whether a longer trajectory would bring its two ends closer together, (B,).

    The sum of the momenta stands for the distance between the ends. The momenta at the ends count
    half, as in the trapezoidal rule.
    """
    along = momentum_sum - 0.5 * (first + last)
    return (sum_event(first * along) <= 0) | (sum_event(last * along) <= 0)


def _where(mask: Tensor, a: _End, b: _End) -> _End:
    wide = per_chain(mask, a.position)
    return _End(
        torch.where(wide, a.position, b.position),
        torch.where(wide, a.momentum, b.momentum),
        torch.where(wide, a.grad, b.grad),
    )


@FAMILY.register
class NutsSection(KernelSection):
    """The No-U-Turn sampler: HMC that chooses the length of each trajectory itself."""

    name: Literal["nuts"] = "nuts"
    example: ClassVar[dict[str, Any]] = {"step_size": 0.3, "max_tree_depth": 4}

    step_size: PositiveFloat
    """Size of a leapfrog step. Aim at an acceptance near .8."""

    max_tree_depth: int = Field(default=10, ge=1, le=16)
    """A step computes at most 2^depth - 1 gradients; all chains wait for the longest trajectory."""

    temperature: PositiveFloat = 1.0
    """T of the law exp(-E/T)."""

    def build(self) -> Nuts:
        return Nuts(
            step_size=self.step_size,
            max_tree_depth=self.max_tree_depth,
            temperature=self.temperature,
        )
