"""Chains that move between levels have to carry one, under an objective of all levels together."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ebm_dist.config.run_config import RunConfig


def check_levels(config: RunConfig) -> Iterator[str]:
    sampler, objective = config.sampler, config.objective
    name, of = f"sampler.name: {sampler.name}", f"objective.name {objective.name}"  # type: ignore[attr-defined]
    joint = objective.name == "contrastive_levels"  # type: ignore[attr-defined]
    moves = sampler.name == "simulated_tempering"  # type: ignore[attr-defined]
    if joint and not config.buffer.context.level:
        yield (
            f"buffer.context.level: missing, but {of} fits events and levels together; set it to "
            "stratified"
        )
    if moves and objective.takes_negatives and not joint:
        yield (
            f"{name} moves chains between levels, but {of} does not fit p(x, level); set "
            "objective.name: contrastive_levels, or sampler.name: mala"
        )
    if sampler.name == "predictor_corrector":  # type: ignore[attr-defined]
        yield from _check_descent(config)
    if joint and config.buffer.storage != "float32":
        yield (
            f"buffer.storage: {config.buffer.storage} holds numbers of [-1, 1], which chains at "
            "noisy levels leave; set it to float32"
        )
    if moves and getattr(sampler.kernel, "clamp", None) is not None:  # type: ignore[attr-defined]
        yield (
            "sampler.kernel.clamp: set, but chains at noisy levels leave these bounds; leave it out"
        )


def _check_descent(config: RunConfig) -> Iterator[str]:
    """Chains that go down all levels in one round, one step each."""
    objective, steps = config.objective, config.sampler.num_steps
    if objective.takes_negatives:
        yield (
            "sampler.name: predictor_corrector draws from an energy that was trained without "
            f"chains, but objective.name {objective.name} takes them as negatives; set "  # type: ignore[attr-defined]
            "objective.name: denoising_score_matching, or sampler.name: mala"
        )
        return
    if config.energy.name == "module":  # type: ignore[attr-defined]
        return  # what it takes is known once it is built
    stds = getattr(config.energy, "noise_stds", None) or ()
    num_levels = getattr(config.energy, "num_levels", None) or len(stds)
    if not num_levels:
        yield (
            "energy.num_levels: missing, but sampler.name predictor_corrector goes down the levels "
            "of the energy; set it and energy.noise_stds, or sampler.name: mala"
        )
    elif steps < num_levels - 1:
        yield (
            f"sampler.num_steps: {steps}, but a chain goes down one of the {num_levels} levels of "
            f"the energy in each; set it to {num_levels - 1}"
        )
