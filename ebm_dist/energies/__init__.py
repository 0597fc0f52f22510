"""Energies E(x): (B, *event) -> (B,), lower is likelier; `make(name, **params)` builds one."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ebm_dist.energies.closed_form.associative import (
    Hopfield,
    ModernHopfield,
    hopfield,
    modern_hopfield,
    store,
)
from ebm_dist.energies.closed_form.boltzmann import Rbm, rbm
from ebm_dist.energies.closed_form.finite import FiniteEnergy
from ebm_dist.energies.closed_form.gaussian import Quadratic, quadratic
from ebm_dist.energies.closed_form.lattice import LatticePhi4, lattice_phi4
from ebm_dist.energies.closed_form.mixture import GaussianMixture, gaussian_mixture
from ebm_dist.energies.closed_form.planar import (
    Checkerboard,
    DoubleWell,
    Ring,
    checkerboard,
    double_well,
    ring,
)
from ebm_dist.energies.closed_form.spin import Ising, Potts, ising, potts
from ebm_dist.energies.composition import Conditional, Mixture, Sum, Tempered
from ebm_dist.energies.context import ContextTraits, Given, bind
from ebm_dist.energies.family import FAMILY, AnalyticEnergy, BoundSection, Energy, EnergySection
from ebm_dist.energies.module import ModuleEnergySection, given
from ebm_dist.energies.networks.image_energy import ImageEnergy
from ebm_dist.energies.networks.mlp import MlpSection
from ebm_dist.energies.networks.network import ConditionedSection, NetworkEnergy, NetworkSection
from ebm_dist.energies.networks.resnet import ResNetSection
from ebm_dist.energies.networks.transformer_lm import LanguageModel, TransformerLmSection
from ebm_dist.energies.networks.unet import UnetSection
from ebm_dist.energies.networks.vit import VitSection
from ebm_dist.energies.networks.wide_resnet import WideResNetSection

make = FAMILY.make

if TYPE_CHECKING:
    EnergyConfig = EnergySection
else:
    EnergyConfig = FAMILY.union()

__all__ = [
    "FAMILY",
    "AnalyticEnergy",
    "BoundSection",
    "Checkerboard",
    "Conditional",
    "ConditionedSection",
    "ContextTraits",
    "DoubleWell",
    "Energy",
    "EnergyConfig",
    "EnergySection",
    "FiniteEnergy",
    "GaussianMixture",
    "Given",
    "Hopfield",
    "ImageEnergy",
    "Ising",
    "LanguageModel",
    "LatticePhi4",
    "Mixture",
    "MlpSection",
    "ModernHopfield",
    "ModuleEnergySection",
    "NetworkEnergy",
    "NetworkSection",
    "Potts",
    "Quadratic",
    "Rbm",
    "ResNetSection",
    "Ring",
    "Sum",
    "Tempered",
    "TransformerLmSection",
    "UnetSection",
    "VitSection",
    "WideResNetSection",
    "bind",
    "checkerboard",
    "double_well",
    "gaussian_mixture",
    "given",
    "hopfield",
    "ising",
    "lattice_phi4",
    "make",
    "modern_hopfield",
    "potts",
    "quadratic",
    "rbm",
    "ring",
    "store",
]
