"""Energies E(x): (B, *event) -> (B,), lower is likelier; `make(name, **params)` builds one."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ebm_dist.energies.family import FAMILY, AnalyticEnergy, BoundSection, Energy, EnergySection
from ebm_dist.energies.gaussian import Quadratic, quadratic
from ebm_dist.energies.mlp import MlpSection
from ebm_dist.energies.network import NetworkEnergy
from ebm_dist.energies.resnet import ResNetSection

make = FAMILY.make

if TYPE_CHECKING:
    EnergyConfig = EnergySection
else:
    EnergyConfig = FAMILY.union()

__all__ = [
    "FAMILY",
    "AnalyticEnergy",
    "BoundSection",
    "Energy",
    "EnergyConfig",
    "EnergySection",
    "MlpSection",
    "NetworkEnergy",
    "Quadratic",
    "ResNetSection",
    "make",
    "quadratic",
]
