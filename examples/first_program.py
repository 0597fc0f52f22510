"""A tensor and a network, and nothing else: learn a density from points, and draw from it."""

import torch
from torch import nn

import ebm_dist

torch.manual_seed(0)
side = torch.where(torch.rand(4000, 1) < 0.7, -1.5, 1.5)  # two clusters: 70% left, 30% right
points = torch.cat([side, torch.zeros(4000, 1)], 1) + 0.5 * torch.randn(4000, 2)
layers = nn.Linear(2, 64), nn.SiLU(), nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 1), nn.Flatten(0)

result = ebm_dist.train({"run": {"steps": 400}}, energy=nn.Sequential(*layers), data=points)
samples, energy = ebm_dist.sample(result.open_export(), 1000)
print(f"{(samples[:, 0] < 0).float().mean():.0%} of the samples lie left")
