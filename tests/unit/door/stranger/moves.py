from types import SimpleNamespace as State

import torch


class Walk:
    def init(self, x, energy):
        return State(position=x, energy=energy(x))

    def step(self, old, energy, generator):
        noise = torch.empty_like(old.position).normal_(generator=generator)
        new = self.init(old.position + 0.4 * noise, energy)
        coin = torch.empty_like(old.energy).uniform_(generator=generator)
        x = torch.where((coin.log() < old.energy - new.energy)[:, None], new.position, old.position)
        return self.init(x, energy), None
