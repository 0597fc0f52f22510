"""The learner: batch + negatives -> objective -> one DeepSpeed step -> weights to publish.

`LearnerEngine` is imported from `ebm_dist.learner.engine`, not from here, so that reading a config
does not load DeepSpeed.
"""

from __future__ import annotations

from ebm_dist.learner.config import LearnerConfig, learning_rate
from ebm_dist.learner.ema import Ema

__all__ = ["Ema", "LearnerConfig", "learning_rate"]
