"""Markov kernels and the loop that runs them; `make(name, **params)` builds a kernel."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ebm_dist.samplers.adapt import adapt_step_size
from ebm_dist.samplers.chain import Chain, run_chain
from ebm_dist.samplers.compile.engine import Engine
from ebm_dist.samplers.continuous.annealed_langevin import AnnealedLangevin
from ebm_dist.samplers.continuous.hmc import Hmc
from ebm_dist.samplers.continuous.langevin import Langevin, LangevinSection
from ebm_dist.samplers.continuous.mala import Mala
from ebm_dist.samplers.continuous.nuts import Nuts
from ebm_dist.samplers.continuous.preconditioned_langevin import (
    PreconditionedLangevin,
    adapt_scales,
)
from ebm_dist.samplers.continuous.random_walk import RandomWalk
from ebm_dist.samplers.continuous.sghmc import Sghmc
from ebm_dist.samplers.discrete.discrete_langevin import DiscreteLangevin
from ebm_dist.samplers.discrete.gibbs import Gibbs
from ebm_dist.samplers.discrete.gibbs_with_gradients import (
    GibbsWithGradients,
)
from ebm_dist.samplers.frozen import frozen
from ebm_dist.samplers.kernel import (
    FAMILY,
    DepartingKernel,
    InPlaceKernel,
    Kernel,
    KernelSection,
    NonFiniteEnergy,
)
from ebm_dist.samplers.module import ModuleKernelSection
from ebm_dist.samplers.tempering.parallel_tempering import (
    ParallelTempering,
)
from ebm_dist.samplers.tempering.tempered_transitions import (
    TemperedTransitions,
)

make = FAMILY.make

if TYPE_CHECKING:
    SamplerConfig = KernelSection
else:
    SamplerConfig = FAMILY.union()

__all__ = [
    "FAMILY",
    "AnnealedLangevin",
    "Chain",
    "DepartingKernel",
    "DiscreteLangevin",
    "Engine",
    "Gibbs",
    "GibbsWithGradients",
    "Hmc",
    "InPlaceKernel",
    "Kernel",
    "KernelSection",
    "Langevin",
    "LangevinSection",
    "Mala",
    "ModuleKernelSection",
    "NonFiniteEnergy",
    "Nuts",
    "ParallelTempering",
    "PreconditionedLangevin",
    "RandomWalk",
    "SamplerConfig",
    "Sghmc",
    "TemperedTransitions",
    "adapt_scales",
    "adapt_step_size",
    "frozen",
    "make",
    "run_chain",
]
