"""Adapts the sampler's step size before the first round, if the config asks for it."""

from __future__ import annotations

import torch
from torch import nn

from ebm_dist.checkpoint import files as checkpoint
from ebm_dist.config.run_config import RunConfig
from ebm_dist.core.seeds import derive_seed
from ebm_dist.core.types import EventSpec
from ebm_dist.samplers import adapt_step_size


def warmed_up(
    config: RunConfig,
    spec: EventSpec,
    found: checkpoint.CheckpointDir | None,
    energy: nn.Module | None = None,
) -> tuple[RunConfig, str | None]:
    """`config` with the step size after `sampler.adapt_steps` of warm-up, and a line to report.

    The warm-up moves chains from noise under the run's initial weights, and discards them. The step
    size then stays fixed: workers, export and model card use it, and a resumed run takes it from
    its checkpoint.

    Args:
        config: already bound to the data.
        found: the checkpoint from which the run resumes.
        energy: with the weights of a new run's start; built from the run's seed when left out.
    """
    sampler, seed = config.sampler, config.run.seed
    if sampler.adapt_steps == 0:
        return config, None
    kernel = sampler.build()
    name = kernel.tunable  # type: ignore[attr-defined]
    if found is not None:
        value = float(found.meta["config"]["sampler"].get(name, getattr(sampler, name)))
        said = f"sampler.{name}: {value:.4g}, as the run adapted it at its start"
    else:
        energy = (energy or config.energy.build(seed=derive_seed(seed, "energy"))).eval()
        generator = torch.Generator().manual_seed(derive_seed(seed, "warm_up"))
        x = spec.noise(config.workers.num_chains, generator, std=config.buffer.init_std)
        kernel = adapt_step_size(kernel, x, energy, sampler.adapt_steps, generator)
        value = float(getattr(kernel, name))
        said = (
            f"sampler.{name}: {getattr(sampler, name):g} became {value:.4g} in "
            f"{sampler.adapt_steps} steps of warm-up, and stays"
        )
    changed = sampler.model_copy(update={name: value})
    return config.model_copy(update={"sampler": changed}), said
