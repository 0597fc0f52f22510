"""The weights of a new run, copied from another run's where names and shapes fit."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ebm_dist import energies
from ebm_dist.config.run_config import RunConfig
from ebm_dist.config.sections import RunSection
from ebm_dist.core.errors import UserError
from ebm_dist.core.weights import FlatLayout
from ebm_dist.energies.limits import limited
from ebm_dist.learner.step import LearningStep

ENERGY = ("param/energy.", "buffer/energy.")
"""Prefixes of the energy's weights in the learner's state."""


def take_over(
    state: dict[str, Tensor], came: Mapping[str, Tensor], step: LearningStep, run: RunSection
) -> list[str]:
    """Copy the tensors of `came` that fit into `state`; returns a phrase for each other one.

    Raises:
        UserError: a tensor does not fit and `run.init_strict` is true, none fits, or one is not
            finite.
    """
    came = dict(came)
    for name in step.energy.state_dict():  # an export does not distinguish buffers from parameters
        parameter, buffer = (f"{kind}{name}" for kind in ENERGY)
        if parameter in came and parameter not in state:
            tensor = came.pop(parameter)
            if buffer in state:  # otherwise it is the second name of a weight
                came[buffer] = tensor
    wanted = [k for k in state if k.startswith(ENERGY) or (run.init_optimizer and k != "step")]
    faults = [f"{_shown(key)} is missing there" for key in wanted if key not in came]
    faults += [f"{_shown(key)} is unknown here" for key in came if key not in wanted]
    num_taken = 0
    for key in wanted:
        if key not in came:
            continue
        theirs, ours = came[key], state[key]
        if theirs.shape != ours.shape:
            faults.append(
                f"{_shown(key)} has shape {tuple(theirs.shape)} there and {tuple(ours.shape)} here"
            )
        elif theirs.dtype not in (torch.float32, ours.dtype):
            faults.append(f"{_shown(key)} is {theirs.dtype} there and {ours.dtype} here")
        elif not torch.isfinite(theirs).all():
            raise UserError(f"{run.init_from}: {_shown(key)} is not finite; name another")
        else:
            state[key] = theirs.to(ours.dtype, copy=True)
            num_taken += key.startswith(ENERGY)
    if faults and run.init_strict:
        more = f" and {len(faults) - 1} more" if len(faults) > 1 else ""
        raise UserError(
            f"{run.init_from} does not fit this run: {faults[0]}{more}; make energy, objective and "
            "learner.optimizer as they were there, or set run.init_strict: false to take what fits"
        )
    if num_taken == 0:
        raise UserError(f"no weight of {run.init_from} fits this run: {faults[0]}; name another")
    if any(fault.startswith("optim/") for fault in faults):
        # Some moments are zero, so Adam's bias correction must restart as well.
        state["optim/step"] = torch.zeros_like(state["optim/step"])
    return faults


def _shown(key: str) -> str:
    return key.removeprefix("param/").removeprefix("buffer/")


def averaged(
    flat: Tensor,
    learner: dict[str, Tensor],
    section: Mapping[str, Any],
    config: RunConfig,
    energy: nn.Module,
) -> dict[str, Tensor]:
    """The averaged weights of a checkpoint, with the keys of the learner's state.

    Args:
        flat: the averaged weights (N,).
        learner: the learner's state in the same checkpoint.
        section: the `energy` section of the checkpoint.
        energy: the energy of the new run.
    """
    names = {key.partition(".")[2]: key for key in learner if key.startswith(ENERGY)}
    layout = _layout(section, config, energy, learner)
    if flat.numel() != layout.size:
        raise ValueError(f"{flat.numel()} averaged weights, its energy has {layout.size}")
    return {names[name]: view for name, view in layout.views(flat).items()}


def _layout(
    section: Mapping[str, Any], config: RunConfig, energy: nn.Module, learner: dict[str, Tensor]
) -> FlatLayout:
    """The layout of the averaged weights of a checkpoint."""
    if section == config.energy.model_dump(mode="json"):
        return FlatLayout.of(energy)
    if foreign := _targets(section) - _targets(config.energy.model_dump(mode="json")):
        # The order of its weights is unknown without importing the module.
        raise UserError(
            f"{config.run.init_from}: its averaged weights are of {min(foreign):.80}, which this "
            "run does not name; have it train the same module, or set run.init_weights: last"
        )
    numbers = sum(tensor.numel() for tensor in learner.values())
    try:
        with limited(max_parts=2**12 + 32 * len(learner), max_numbers=2**27 + 4 * numbers):
            built = energies.FAMILY.section(**section).build()  # type: ignore[attr-defined]
    except RuntimeError as error:
        raise ValueError(error) from None
    return FlatLayout.of(built)


def _targets(section: Any) -> set[str]:
    """What a section and those within it would import."""
    if isinstance(section, list):
        return set().union(*map(_targets, section))
    if not isinstance(section, dict):
        return set()
    own = {str(section["target"])} if "target" in section else set()
    return own.union(*map(_targets, section.values()))
