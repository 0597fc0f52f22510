"""Markov kernels and the loop that runs them; `make(name, **params)` builds a kernel."""

from __future__ import annotations

from typing import TYPE_CHECKING

# Imported so that their sections register.
from ebm_dist.samplers import module  # noqa: F401
from ebm_dist.samplers.adapt import adapt_step_size
from ebm_dist.samplers.chain import Chain, run_chain
from ebm_dist.samplers.compile.engine import Engine
from ebm_dist.samplers.continuous import (  # noqa: F401
    annealed_langevin,
    flow_langevin,
    hmc,
    mala,
    nuts,
    random_walk,
    sghmc,
)
from ebm_dist.samplers.continuous.langevin import Langevin
from ebm_dist.samplers.continuous.preconditioned_langevin import adapt_scales
from ebm_dist.samplers.discrete import discrete_langevin, gibbs, gibbs_with_gradients  # noqa: F401
from ebm_dist.samplers.frozen import frozen
from ebm_dist.samplers.kernel import FAMILY, Kernel, KernelSection, NonFiniteEnergy
from ebm_dist.samplers.tempering import (  # noqa: F401
    parallel_tempering,
    predictor_corrector,
    simulated_tempering,
    tempered_transitions,
)

make = FAMILY.make

if TYPE_CHECKING:
    SamplerConfig = KernelSection
else:
    SamplerConfig = FAMILY.union()

__all__ = [
    "FAMILY",
    "Chain",
    "Engine",
    "Kernel",
    "KernelSection",
    "Langevin",
    "NonFiniteEnergy",
    "SamplerConfig",
    "adapt_scales",
    "adapt_step_size",
    "frozen",
    "make",
    "run_chain",
]
