"""Chains with Jarzynski weights in a shard: the law they start from, and resampling.

A chain that no kernel has moved yet is a draw from a known law q. It stands in its slot with
energy 0 and log-weight -log q(x); the first round then carries it to the weights of the day like
any other chain, A' = A + (0 - E(x)/T), and the mean of exp(A) estimates Z itself and not a ratio.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from ebm_dist.buffer.policy import BufferConfig
from ebm_dist.generators import seeded
from ebm_dist.objectives.jarzynski import resample
from ebm_dist.types import EventSpec


def start_noise(
    config: BufferConfig, spec: EventSpec, num: int, generator: torch.Generator
) -> Tensor:
    """`num` chains (num, *event) as `buffer.init: noise` starts them.

    Weighted chains of images start from N(0, init_std^2) and not from the cube [-1, 1]: a
    density that is zero where the model's is not can be carried to the model by no weight.
    """
    if config.jarzynski and spec.kind == "image":
        spec = EventSpec(spec.shape, "real")
    return spec.noise(num, generator, std=config.init_std)


def start_log_weight(config: BufferConfig, spec: EventSpec, x: np.ndarray) -> np.ndarray:
    """-log q(x), (num,) float32, of chains x (num, *event) that `start_noise` drew."""
    if spec.kind == "binary":
        return np.full(len(x), math.prod(spec.shape) * math.log(2), np.float32)
    if spec.kind == "categorical":
        num_sites, num_values = math.prod(spec.shape[:-1]), spec.shape[-1]
        return np.full(len(x), num_sites * math.log(num_values), np.float32)
    white = x.reshape(len(x), -1).astype(np.float64) / config.init_std
    constant = math.log(config.init_std) + 0.5 * math.log(2 * math.pi)
    return (0.5 * (white**2).sum(1) + white.shape[1] * constant).astype(np.float32)


def resampling(
    log_weight: np.ndarray, threshold: float, seed: int
) -> tuple[np.ndarray, np.ndarray] | None:
    """Which chain each one becomes and the new log-weights (M,); None while the ESS is enough.

    For chains of one version: across versions log-weights differ by what log Z has moved, and
    it would be the old chains that are replaced, not the unlikely ones.
    """
    generator = seeded(seed)
    old = torch.from_numpy(log_weight.astype(np.float64))
    index, new = resample(old, generator, min_ess_ratio=threshold)
    if new is old:
        return None
    return index.numpy(), new.numpy().astype(np.float32)
