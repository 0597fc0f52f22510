"""The state of a new run at update 0, from the weights of another run.

It is written as the checkpoint of update 0, and the run then resumes from it as from any
checkpoint. So this needs no code for ZeRO stages, numbers of ranks and shards, or parts that die
before the first update.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor, nn

from ebm_dist.checkpoint import files as checkpoint
from ebm_dist.checkpoint.cut import Progress, write_cut
from ebm_dist.config.run_config import RunConfig
from ebm_dist.config.sections import RunSection
from ebm_dist.core.errors import UserError, one_line
from ebm_dist.core.seeds import derive_seed
from ebm_dist.core.types import EventSpec, RankState
from ebm_dist.core.weights import FlatLayout
from ebm_dist.export.pretrained import named
from ebm_dist.learner.partition import first_state
from ebm_dist.learner.step import LearningStep
from ebm_dist.run.init_from.chains import Chains, first_shards
from ebm_dist.run.init_from.source import open_source
from ebm_dist.run.init_from.weights import take_over

_MAX_NAMED = 20
"""Largest number of weights that one line names."""


@dataclass(frozen=True, slots=True)
class Beginning:
    """The state of a run at update 0, to be written as its first checkpoint."""

    energy: nn.Module
    """The energy with its initial weights."""
    lineage: dict[str, Any]
    """The origin of the weights: path, kind, run, step, weights and their sha256."""
    notices: list[str]
    _state: dict[str, Tensor] = field(repr=False)
    _chains: Chains | None = field(repr=False)

    def write(
        self, run_dir: Path, config: RunConfig, spec: EventSpec, meta: Mapping[str, Any]
    ) -> checkpoint.CheckpointDir:
        """Write the checkpoint of update 0 of the run in `run_dir`, and open it.

        Args:
            meta: the fields that every checkpoint of the run holds.
        """
        flat = FlatLayout.of(self.energy).pack(self.energy)
        average = {"flat": flat.numpy(), "num_updates": np.array(0)}
        learner = {name: tensor.numpy() for name, tensor in self._state.items()}
        ranks = [RankState(learner, average, data=None)]
        # Resuming from this checkpoint adds 1 to the epoch, which must then be 0.
        progress = Progress(epoch=-1)
        shards = first_shards(config, spec, self._chains)
        keep = config.checkpoint.keep
        return checkpoint.open_checkpoint(
            write_cut(run_dir, progress, ranks, shards, {**meta, "tracking": None}, keep=keep)
        )


def located(section: RunSection) -> RunSection:
    """`section` with an absolute `init_from`, as the run records it."""
    if section.init_from is None:
        return section
    whole = os.path.join(os.getcwd(), named(section.init_from))
    return section.model_copy(update={"init_from": whole})


def read_beginning(config: RunConfig, spec: EventSpec) -> Beginning:
    """The initial state of the run, from `run.init_from`.

    Args:
        config: already bound to the data, whose events are `spec`.

    Raises:
        UserError: `run.init_from` is missing or damaged, or does not fit this run.
    """
    assert config.run.init_from is not None
    path, seed = Path(config.run.init_from), config.run.seed
    objective = config.objective.build(seed=derive_seed(seed, "objective"))
    if config.run.init_chains and not objective.needs_negatives:
        raise UserError(
            "run.init_chains: true, but this run's objective needs no chains; set it to false"
        )
    step = LearningStep(config.energy.build(seed=derive_seed(seed, "energy")), objective)
    state = first_state(config.learner, step)
    with _named():
        found = open_source(path, config, spec, step.energy)
        left_out = take_over(state, found.state, step, config.run)
    modules = {k.partition("/")[2]: v for k, v in state.items() if not k.startswith("optim/")}
    # Not strict, because `step` is not a weight, and a weight with two names occurs once.
    step.load_state_dict(modules, strict=False)
    notices = [_said(found.lineage)]
    if left_out:
        notices.append(f"run.init_strict: false left out {_names(left_out)}")
    notices += _differences(found.section, config)
    if found.chains is not None:
        notices.append(_said_of_chains(len(found.chains["position"]), config))
    return Beginning(step.energy, found.lineage, notices, state, found.chains)


@contextlib.contextmanager
def _named() -> Iterator[None]:
    """Put the key `run.init_from` in front of errors within the block."""
    try:
        yield
    except UserError as error:
        text = str(error)
        raise UserError(text if text.startswith("run.") else f"run.init_from: {text}") from None
    except OSError as error:
        raise UserError(f"run.init_from: {error.filename}: {error.strerror or error}") from None


def _names(faults: list[str]) -> str:
    more = len(faults) - _MAX_NAMED
    return ", ".join(faults[:_MAX_NAMED]) + (f" and {more} more" if more > 0 else "")


def _differences(theirs: Mapping[str, Any], config: RunConfig) -> list[str]:
    """A line on the energy's keys that differ, since weights may fit a different function."""
    ours = config.energy.model_dump(mode="json")
    keys = [key for key in ours if key in theirs and theirs[key] != ours[key]]
    if not keys:
        return []
    each = ", ".join(f"energy.{key} {theirs[key]!s:.40} -> {ours[key]!s:.40}" for key in keys)
    return [one_line(f"the energy is not the one that the weights were made for: {each}")]


def _said(lineage: Mapping[str, Any]) -> str:
    kind = {"ema": "averaged", "last": "last"}[lineage["weights"]]
    return one_line(
        f"begins with the {kind} weights of {lineage['path']}: run {lineage['run']}, update "
        f"{lineage['step']}, sha256 {lineage['sha256']!s:.12}"
    )


def _said_of_chains(num: int, config: RunConfig) -> str:
    capacity = config.buffer.capacity
    if num > capacity:
        return f"the buffer begins with {capacity} of the {num} chains there: buffer.capacity"
    rest = capacity - num
    more = f"; the other {rest} start as buffer.init: {config.buffer.init} says" if rest else ""
    return f"the buffer begins with the {num} chains there{more}"
