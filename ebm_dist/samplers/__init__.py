"""Markov kernels and the loop that runs them; `make(name, **params)` builds a kernel."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ebm_dist.samplers.chain import Chain, frozen, run_chain
from ebm_dist.samplers.kernel import (
    FAMILY,
    InPlaceKernel,
    Kernel,
    KernelSection,
    KernelState,
    NonFiniteEnergy,
)
from ebm_dist.samplers.langevin import Langevin, LangevinSection

make = FAMILY.make

if TYPE_CHECKING:
    SamplerConfig = KernelSection
else:
    SamplerConfig = FAMILY.union()

__all__ = [
    "FAMILY",
    "Chain",
    "InPlaceKernel",
    "Kernel",
    "KernelSection",
    "KernelState",
    "Langevin",
    "LangevinSection",
    "NonFiniteEnergy",
    "SamplerConfig",
    "frozen",
    "make",
    "run_chain",
]
