"""A sampler of your own: `init` and `step` of a state with `position` and `energy`."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class State:
    position: Tensor  # (B, *event)
    energy: Tensor  # (B,)


@dataclass(frozen=True)
class Info:
    acceptance: Tensor  # (B,), logged as sampler/acceptance


class Leaps:
    """Metropolis moves of all lengths: short ones within a mode, long ones between modes."""

    def __init__(self, longest: float = 4.0) -> None:
        self.longest = longest

    def init(self, x, energy):
        return State(x, energy(x))

    def step(self, state, energy, generator):
        # All noise comes from the generator, so that a round can be repeated bit for bit.
        noise = torch.empty_like(state.position).normal_(generator=generator)
        length, u = torch.empty(2, len(noise), 1).uniform_(generator=generator)
        proposed = self.init(state.position + self.longest * length**3 * noise, energy)
        accept = u < (state.energy - proposed.energy).exp()[:, None]
        position = torch.where(accept, proposed.position, state.position)
        energies = torch.where(accept[:, 0], proposed.energy, state.energy)
        return State(position, energies), Info(accept[:, 0].float())
