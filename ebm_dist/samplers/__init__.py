"""Markov kernels and the loop that runs them; `make(name, **params)` builds a kernel."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ebm_dist.samplers.adapt import adapt_step_size
from ebm_dist.samplers.chain import Chain, run_chain
from ebm_dist.samplers.compile.engine import Engine
from ebm_dist.samplers.continuous.annealed_langevin import AnnealedLangevin, AnnealedLangevinSection
from ebm_dist.samplers.continuous.hmc import Hmc, HmcSection
from ebm_dist.samplers.continuous.langevin import Langevin, LangevinSection
from ebm_dist.samplers.continuous.mala import Mala, MalaSection
from ebm_dist.samplers.continuous.nuts import Nuts, NutsSection
from ebm_dist.samplers.continuous.preconditioned_langevin import (
    PreconditionedLangevin,
    PreconditionedLangevinSection,
    adapt_scales,
)
from ebm_dist.samplers.continuous.random_walk import RandomWalk, RandomWalkSection
from ebm_dist.samplers.continuous.sghmc import Sghmc, SghmcSection
from ebm_dist.samplers.discrete.discrete_langevin import DiscreteLangevin, DiscreteLangevinSection
from ebm_dist.samplers.discrete.gibbs import Gibbs, GibbsSection, LatentConditionals, LinearBlocks
from ebm_dist.samplers.discrete.gibbs_with_gradients import (
    GibbsWithGradients,
    GibbsWithGradientsSection,
)
from ebm_dist.samplers.frozen import frozen
from ebm_dist.samplers.kernel import (
    FAMILY,
    DepartingKernel,
    InPlaceKernel,
    Kernel,
    KernelSection,
    KernelState,
    NonFiniteEnergy,
)
from ebm_dist.samplers.tempering.parallel_tempering import (
    ParallelTempering,
    ParallelTemperingSection,
)
from ebm_dist.samplers.tempering.tempered_transitions import (
    TemperedTransitions,
    TemperedTransitionsSection,
)

make = FAMILY.make

if TYPE_CHECKING:
    SamplerConfig = KernelSection
else:
    SamplerConfig = FAMILY.union()

__all__ = [
    "FAMILY",
    "AnnealedLangevin",
    "AnnealedLangevinSection",
    "Chain",
    "DepartingKernel",
    "DiscreteLangevin",
    "DiscreteLangevinSection",
    "Engine",
    "Gibbs",
    "GibbsSection",
    "GibbsWithGradients",
    "GibbsWithGradientsSection",
    "Hmc",
    "HmcSection",
    "InPlaceKernel",
    "Kernel",
    "KernelSection",
    "KernelState",
    "Langevin",
    "LangevinSection",
    "LatentConditionals",
    "LinearBlocks",
    "Mala",
    "MalaSection",
    "NonFiniteEnergy",
    "Nuts",
    "NutsSection",
    "ParallelTempering",
    "ParallelTemperingSection",
    "PreconditionedLangevin",
    "PreconditionedLangevinSection",
    "RandomWalk",
    "RandomWalkSection",
    "SamplerConfig",
    "Sghmc",
    "SghmcSection",
    "TemperedTransitions",
    "TemperedTransitionsSection",
    "adapt_scales",
    "adapt_step_size",
    "frozen",
    "make",
    "run_chain",
]
