"""Objectives: (energy, batch, negatives, generator) -> (loss, metrics); `make` builds one."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ebm_dist.objectives.contrast.energy_discrepancy import (
    EnergyDiscrepancy,
    EnergyDiscrepancySection,
)
from ebm_dist.objectives.contrast.neighbours import (
    PseudoLikelihood,
    PseudoLikelihoodSection,
    RatioMatching,
    RatioMatchingSection,
)
from ebm_dist.objectives.contrast.noise_contrastive import NoiseContrastive, NoiseContrastiveSection
from ebm_dist.objectives.likelihood.contrastive import Contrastive, ContrastiveSection
from ebm_dist.objectives.likelihood.joint import Joint, JointSection
from ebm_dist.objectives.likelihood.recovery_likelihood import (
    RecoveryLikelihood,
    RecoveryLikelihoodSection,
)
from ebm_dist.objectives.likelihood.reverse_kl import ReverseKl, ReverseKlSection
from ebm_dist.objectives.matching.denoising import Denoising, DenoisingSection
from ebm_dist.objectives.matching.energy_matching import EnergyMatching, EnergyMatchingSection
from ebm_dist.objectives.matching.score_matching import ScoreMatching, ScoreMatchingSection
from ebm_dist.objectives.matching.sliced_score_matching import (
    SlicedScoreMatching,
    SlicedScoreMatchingSection,
)
from ebm_dist.objectives.objective import FAMILY, Objective, ObjectiveSection
from ebm_dist.objectives.weighting import ess_ratio, normalised_weights, staleness_log_weight

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
    "DenoisingSection",
    "EnergyDiscrepancy",
    "EnergyDiscrepancySection",
    "EnergyMatching",
    "EnergyMatchingSection",
    "Joint",
    "JointSection",
    "NoiseContrastive",
    "NoiseContrastiveSection",
    "Objective",
    "ObjectiveConfig",
    "ObjectiveSection",
    "PseudoLikelihood",
    "PseudoLikelihoodSection",
    "RatioMatching",
    "RatioMatchingSection",
    "RecoveryLikelihood",
    "RecoveryLikelihoodSection",
    "ReverseKl",
    "ReverseKlSection",
    "ScoreMatching",
    "ScoreMatchingSection",
    "SlicedScoreMatching",
    "SlicedScoreMatchingSection",
    "ess_ratio",
    "make",
    "normalised_weights",
    "staleness_log_weight",
]
