"""The torch optimiser that DeepSpeed shards."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ebm_dist.learner.config import LearnerConfig


def make_optimizer(config: LearnerConfig, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    """Torch's own Adam, AdamW or SGD.

    DeepSpeed compiles its optimisers at first use, which takes minutes on a CPU.
    """
    # "fused" makes one pass over the weights instead of ten.
    common: dict[str, Any] = {
        "lr": config.lr,
        "weight_decay": config.weight_decay,
        "fused": True,
    }
    if config.optimizer == "sgd":
        return torch.optim.SGD(parameters, momentum=config.momentum, **common)
    kind = torch.optim.AdamW if config.optimizer == "adamw" else torch.optim.Adam
    return kind(parameters, betas=config.betas, eps=config.eps, **common)
