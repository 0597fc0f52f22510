"""Objectives: (energy, batch, negatives, generator) -> (loss, metrics); `make` builds one."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ebm_dist.objectives.contrastive import Contrastive, ContrastiveSection, staleness_log_weight
from ebm_dist.objectives.objective import FAMILY, Objective, ObjectiveSection

make = FAMILY.make

if TYPE_CHECKING:
    ObjectiveConfig = ObjectiveSection
else:
    ObjectiveConfig = FAMILY.union()

__all__ = [
    "FAMILY",
    "Contrastive",
    "ContrastiveSection",
    "Objective",
    "ObjectiveConfig",
    "ObjectiveSection",
    "make",
    "staleness_log_weight",
]
