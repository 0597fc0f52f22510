"""Objectives: (energy, batch, negatives, generator) -> (loss, metrics); `make` builds one."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ebm_dist.objectives.contrast.energy_discrepancy import (
    EnergyDiscrepancy,
)
from ebm_dist.objectives.contrast.neighbours import (
    PseudoLikelihood,
    RatioMatching,
)
from ebm_dist.objectives.contrast.noise_contrastive import NoiseContrastive
from ebm_dist.objectives.likelihood.contrastive import Contrastive, ContrastiveSection
from ebm_dist.objectives.likelihood.joint import Joint
from ebm_dist.objectives.likelihood.recovery_likelihood import (
    RecoveryLikelihood,
)
from ebm_dist.objectives.likelihood.reverse_kl import ReverseKl
from ebm_dist.objectives.matching.denoising import Denoising
from ebm_dist.objectives.matching.energy_matching import EnergyMatching
from ebm_dist.objectives.matching.score_matching import ScoreMatching
from ebm_dist.objectives.matching.sliced_score_matching import (
    SlicedScoreMatching,
)
from ebm_dist.objectives.module import ModuleObjectiveSection
from ebm_dist.objectives.objective import FAMILY, Objective, ObjectiveSection
from ebm_dist.objectives.weighting import ess_ratio, staleness_log_weight

make = FAMILY.make

if TYPE_CHECKING:
    ObjectiveConfig = ObjectiveSection
else:
    ObjectiveConfig = FAMILY.union()

__all__ = [
    "FAMILY",
    "Contrastive",
    "ContrastiveSection",
    "Denoising",
    "EnergyDiscrepancy",
    "EnergyMatching",
    "Joint",
    "ModuleObjectiveSection",
    "NoiseContrastive",
    "Objective",
    "ObjectiveConfig",
    "ObjectiveSection",
    "PseudoLikelihood",
    "RatioMatching",
    "RecoveryLikelihood",
    "ReverseKl",
    "ScoreMatching",
    "SlicedScoreMatching",
    "ess_ratio",
    "make",
    "staleness_log_weight",
]
