"""Data of your own: any map-style dataset of events, or of (event, label)."""

import torch
from torch.utils.data import Dataset


class Spiral(Dataset):
    def __init__(self, num: int = 4096, turns: float = 2.0, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        radius = torch.rand(num, generator=generator).sqrt()
        angle = 2 * torch.pi * turns * radius
        x = torch.stack([radius * angle.cos(), radius * angle.sin()], 1)
        self.x = 2 * x + 0.05 * torch.randn(num, 2, generator=generator)

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> torch.Tensor:
        return self.x[index]
