"""Objectives: (energy, batch, negatives, generator) -> (loss, metrics); `make` builds one."""

from __future__ import annotations

from typing import TYPE_CHECKING

# Imported so that their sections register.
from ebm_dist.objectives import module  # noqa: F401
from ebm_dist.objectives.contrast import (  # noqa: F401
    energy_discrepancy,
    neighbours,
    noise_contrastive,
)
from ebm_dist.objectives.likelihood import (  # noqa: F401
    contrastive_levels,
    joint,
    recovery_likelihood,
    reverse_kl,
)
from ebm_dist.objectives.likelihood.contrastive import ContrastiveSection
from ebm_dist.objectives.matching import (  # noqa: F401
    denoising,
    energy_matching,
    score_matching,
    sliced_score_matching,
)
from ebm_dist.objectives.objective import FAMILY, Objective, ObjectiveSection
from ebm_dist.objectives.weighting import ess_ratio

make = FAMILY.make

if TYPE_CHECKING:
    ObjectiveConfig = ObjectiveSection
else:
    ObjectiveConfig = FAMILY.union()

__all__ = [
    "FAMILY",
    "ContrastiveSection",
    "Objective",
    "ObjectiveConfig",
    "ObjectiveSection",
    "ess_ratio",
    "make",
]
