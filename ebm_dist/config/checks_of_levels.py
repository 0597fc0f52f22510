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
    if joint and config.buffer.storage != "float32":
        yield (
            f"buffer.storage: {config.buffer.storage} holds numbers of [-1, 1], which chains at "
            "noisy levels leave; set it to float32"
        )
    if moves and getattr(sampler.kernel, "clamp", None) is not None:  # type: ignore[attr-defined]
        yield (
            "sampler.kernel.clamp: set, but chains at noisy levels leave these bounds; leave it out"
        )
