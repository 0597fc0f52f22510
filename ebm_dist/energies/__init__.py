"""Energies E(x): (B, *event) -> (B,), lower is likelier; `make(name, **params)` builds one."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ebm_dist.energies.closed_form.associative import Hopfield, hopfield, modern_hopfield, store
from ebm_dist.energies.closed_form.boltzmann import Rbm, rbm
from ebm_dist.energies.closed_form.finite import FiniteEnergy
from ebm_dist.energies.closed_form.gaussian import quadratic
from ebm_dist.energies.closed_form.lattice import LatticePhi4, lattice_phi4
from ebm_dist.energies.closed_form.mixture import gaussian_mixture
from ebm_dist.energies.closed_form.planar import checkerboard, double_well, ring
from ebm_dist.energies.closed_form.spin import Ising, ising, potts
from ebm_dist.energies.composition import Conditional, Mixture, Sum, Tempered
from ebm_dist.energies.context import ContextTraits, bind
from ebm_dist.energies.family import FAMILY, AnalyticEnergy, BoundSection, Energy, EnergySection
from ebm_dist.energies.module import given

# Imported so that their sections register.
from ebm_dist.energies.networks import igebm, mlp, resnet, unet, vit  # noqa: F401
from ebm_dist.energies.networks.image_energy import ImageEnergy
from ebm_dist.energies.networks.network import NetworkEnergy
from ebm_dist.energies.networks.transformer_lm import LanguageModel
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
    "Conditional",
    "ContextTraits",
    "Energy",
    "EnergyConfig",
    "EnergySection",
    "FiniteEnergy",
    "Hopfield",
    "ImageEnergy",
    "Ising",
    "LanguageModel",
    "LatticePhi4",
    "Mixture",
    "NetworkEnergy",
    "Rbm",
    "Sum",
    "Tempered",
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
