"""A new run that begins with the weights of another: `run.init_from`.

What is taken over is written as the checkpoint of update 0, and the run then goes on from it as a
run goes on from any checkpoint. So ZeRO stages, numbers of ranks and shards, and parts that die
before the first update have no code of their own here.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ebm_dist import energies
from ebm_dist.actors.shard import start_stream
from ebm_dist.buffer.chains import ShardChains
from ebm_dist.buffer.codec import Codec
from ebm_dist.buffer.config import shard_capacities
from ebm_dist.checkpoint import files as checkpoint
from ebm_dist.checkpoint.cut import Progress, write_cut
from ebm_dist.config.run_config import RunConfig
from ebm_dist.config.sections import RunSection
from ebm_dist.core.errors import UserError, one_line
from ebm_dist.core.seeds import derive_seed
from ebm_dist.core.types import EventSpec
from ebm_dist.core.weights import FlatLayout
from ebm_dist.energies.limits import limited
from ebm_dist.export.reader import (
    CHAINS,
    CONFIG,
    find_export,
    read_chains,
    read_spec,
    read_weights,
)
from ebm_dist.learner.partition import first_state
from ebm_dist.learner.step import LearningStep

_MAX_NAMED = 20
"""Weights that one line names."""

_ENERGY = ("param/energy.", "buffer/energy.")
"""How the keys of the energy's weights begin in the learner's state."""

Chains = dict[str, np.ndarray]
"""Rows of chains; `position` always, the other fields of a shard where they are known."""


@dataclass(frozen=True, slots=True)
class _Found:
    """What `run.init_from` names, as far as the config asks for it."""

    lineage: dict[str, Any]
    section: Mapping[str, Any]
    """Of the energy, as recorded."""
    state: dict[str, Tensor]
    """Keys as in the learner's state."""
    chains: Chains | None


@dataclass(frozen=True, slots=True)
class Beginning:
    """Update 0 of a run, to be written as its first checkpoint."""

    energy: nn.Module
    """With the weights that the run begins with."""
    lineage: dict[str, Any]
    """Where they come from: path, kind, run, step, weights and their sha256."""
    notices: list[str]
    _state: dict[str, Tensor] = field(repr=False)
    _chains: Chains | None = field(repr=False)

    def write(
        self, run_dir: Path, config: RunConfig, spec: EventSpec, meta: Mapping[str, Any]
    ) -> checkpoint.CheckpointDir:
        """Write the checkpoint of update 0 of the run in `run_dir`, and open it.

        Args:
            meta: what every checkpoint of the run says of it.
        """
        flat = FlatLayout.of(self.energy).pack(self.energy)
        average = {"flat": flat, "num_updates": torch.tensor(0)}
        ranks = [{"learner": self._state, "ema": average, "data": None}]
        # Whoever opens it counts one more time that the run went back, which has not happened yet.
        progress = Progress(epoch=-1)
        shards = _shards(config, spec, self._chains)
        keep = config.checkpoint.keep
        return checkpoint.open_checkpoint(
            write_cut(run_dir, progress, ranks, shards, {**meta, "tracking": None}, keep=keep)
        )


def located(section: RunSection) -> RunSection:
    """`section` with a relative `init_from` made absolute, as it is recorded."""
    if section.init_from is None:
        return section
    whole = os.path.join(os.getcwd(), section.init_from)
    return section.model_copy(update={"init_from": whole})


def read_beginning(config: RunConfig, spec: EventSpec) -> Beginning:
    """What the run of `config` begins with, from `run.init_from`.

    Args:
        config: bound to the data, whose events are `spec`.

    Raises:
        UserError: nothing to begin from is there, it is damaged, or it does not fit this run.
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
        found = _open_export(path, config, spec) if _is_export(path) else None
        if found is None:
            found = _open_checkpoint(path, config, spec, step.energy)
        left_out = _take_over(state, found.state, step, config.run)
    modules = {k.partition("/")[2]: v for k, v in state.items() if not k.startswith("optim/")}
    # Not strict: `step` is no weight, and a weight with two names is here once.
    step.load_state_dict(modules, strict=False)
    notices = [_said(found.lineage)]
    if left_out:
        notices.append(f"run.init_strict: false left out {_names(left_out)}")
    notices += _differences(found.section, config)
    if found.chains is not None:
        notices.append(_said_of_chains(len(found.chains["position"]), config))
    return Beginning(step.energy, found.lineage, notices, state, found.chains)


# --- reading -------------------------------------------------------------------------------------


@contextlib.contextmanager
def _named() -> Iterator[None]:
    """Errors within say which key of the config they come from."""
    try:
        yield
    except UserError as error:
        text = str(error)
        raise UserError(text if text.startswith("run.") else f"run.init_from: {text}") from None
    except OSError as error:
        raise UserError(f"run.init_from: {error.filename}: {error.strerror or error}") from None


def _is_export(path: Path) -> bool:
    """Whether `path` is an export or a file of one; an export within a run is the run's."""
    if path.is_file() or (path / CONFIG).is_file():
        return True
    inside = (path / "export" / CONFIG).is_file()
    return inside and not (path / "checkpoints").is_dir()


def _open_export(path: Path, config: RunConfig, spec: EventSpec) -> _Found:
    run = config.run
    for key, value, needs in (
        ("init_weights", run.init_weights == "last", "it holds the averaged weights alone"),
        ("init_optimizer", run.init_optimizer, "it holds no optimiser"),
    ):
        if value:
            raise UserError(
                f"run.{key}: {getattr(run, key)}, but {path} is an export, and {needs}; name the "
                f"run's directory in run.init_from, or leave run.{key} out"
            )
    path = find_export(path)
    content, tensors = read_weights(path)
    recorded = content.get("lineage")
    recorded = recorded if isinstance(recorded, dict) else {}
    name, step = recorded.get("run"), recorded.get("updates")
    lineage = {
        "path": str(path),
        "kind": "export",
        "run": name if isinstance(name, str) else None,
        "step": step if isinstance(step, int) else None,
        "weights": "ema",
        "sha256": content["weights"]["sha256"],
    }
    chains = None
    if run.init_chains:
        theirs = read_spec(content, path / CONFIG)
        _check_event(theirs, spec, path)
        if (x := read_chains(path, theirs)) is None:
            raise UserError(
                f"run.init_chains: true, but the export at {path} holds no {CHAINS}; name the "
                "run's directory in run.init_from, or set run.init_chains: false"
            )
        _check_jarzynski(config, False, path)
        chains = {"position": x.numpy()}
    state = {f"{_ENERGY[0]}{name}": tensor for name, tensor in tensors.items()}
    return _Found(lineage, _section_of(content), state, chains)


def _open_checkpoint(path: Path, config: RunConfig, spec: EventSpec, energy: nn.Module) -> _Found:
    found = _find_checkpoint(path)
    run = config.run
    with found.of_a_run():
        learner = found.tensors("learner")
        section = _section_of(found.meta["config"])
        state = {
            key: tensor
            for key, tensor in learner.items()
            if key.startswith(_ENERGY) or (run.init_optimizer and key != "step")
        }
        if run.init_weights == "ema":
            flat = found.tensors("ema")["flat"]
            names = {key.partition(".")[2]: key for key in state if key.startswith(_ENERGY)}
            layout = _layout(section, config, energy, learner)
            if flat.numel() != layout.size:
                raise ValueError(f"{flat.numel()} averaged weights, its energy has {layout.size}")
            state |= {names[name]: view for name, view in layout.views(flat).items()}
        lineage = {
            "path": str(path),
            "kind": "checkpoint",
            "run": str(found.meta["name"]),
            "step": found.step,
            "weights": run.init_weights,
            "sha256": checkpoint.checksum(
                found.path, "ema" if run.init_weights == "ema" else "learner"
            ),
        }
        chains = None
        if run.init_chains:
            _check_event(read_spec(found.meta, found.path / "meta.json"), spec, path)
            weighted = bool(found.meta["config"]["buffer"].get("jarzynski", False))
            _check_jarzynski(config, weighted, path)
            chains = _chains_of(found, spec)
    return _Found(lineage, section, state, chains)


def _find_checkpoint(path: Path) -> checkpoint.CheckpointDir:
    """`path` itself, or the newest valid checkpoint of the run at `path`."""
    if not path.exists():
        raise UserError(
            f"{path}: no such directory; expected an export, a run directory or a checkpoint"
        )
    if (path / "checksums.json").exists():
        try:
            return checkpoint.open_checkpoint(path)
        except UserError as error:
            raise UserError(f"{path.parent}: {error}; name another checkpoint") from None
    if not (path / "checkpoints").is_dir():
        raise UserError(
            f"{path}: is neither an export ({CONFIG}), a run directory (checkpoints/) nor a "
            "checkpoint (checksums.json); name one of these"
        )
    try:
        found = checkpoint.latest(path)
    except UserError as error:
        why = str(error).rpartition("; ")[0]  # without its advice, which is for a resume
        raise UserError(f"{why}; name an export of this run, or another run") from None
    if found is None:
        raise UserError(
            f"{path}: this run has no checkpoint yet; wait for its first, or name another"
        )
    return found


def _section_of(content: Mapping[str, Any]) -> Mapping[str, Any]:
    """The energy's section, as an export or a checkpoint recorded it."""
    section = content.get("energy")
    return section if isinstance(section, dict) else {}


def _layout(
    section: Mapping[str, Any], config: RunConfig, energy: nn.Module, learner: dict[str, Tensor]
) -> FlatLayout:
    """Where each weight lies in the averaged weights of a checkpoint."""
    if section == config.energy.model_dump(mode="json"):
        return FlatLayout.of(energy)
    if section.get("target") != getattr(config.energy, "target", None):
        # Only the order of its weights is missing, and to learn it the module had to be imported.
        raise UserError(
            f"its averaged weights are of {section.get('target')!r:.80}, which this run does not "
            "name; set energy.target to it, or run.init_weights: last"
        )
    numbers = sum(tensor.numel() for tensor in learner.values())
    try:
        with limited(max_parts=2**12 + 32 * len(learner), max_numbers=2**27 + 4 * numbers):
            built = energies.FAMILY.section(**section).build()  # type: ignore[attr-defined]
    except RuntimeError as error:
        raise ValueError(error) from None
    return FlatLayout.of(built)


def _check_event(theirs: EventSpec, ours: EventSpec, path: Path) -> None:
    if (theirs.kind, theirs.shape) != (ours.kind, ours.shape):
        raise UserError(
            f"run.init_chains: the chains of {path} are {theirs.kind} events of shape "
            f"{theirs.shape}, this run's data are {ours.kind} of {ours.shape}; set it to false"
        )


def _check_jarzynski(config: RunConfig, weighted: bool, path: Path) -> None:
    if config.buffer.jarzynski and not weighted:
        raise UserError(
            f"run.init_chains: the chains of {path} carry no Jarzynski weights, which "
            "buffer.jarzynski needs; set one of the two to false"
        )


# --- weights -------------------------------------------------------------------------------------


def _take_over(
    state: dict[str, Tensor], came: Mapping[str, Tensor], step: LearningStep, run: RunSection
) -> list[str]:
    """Put what fits of `came` into `state`; returns what does not, a phrase each.

    Raises:
        UserError: something does not fit and `run.init_strict`, nothing fits, or it is not finite.
    """
    came = dict(came)
    for name in step.energy.state_dict():  # an export does not tell buffers from parameters
        parameter, buffer = (f"{kind}{name}" for kind in _ENERGY)
        if parameter in came and parameter not in state:
            tensor = came.pop(parameter)
            if buffer in state:  # else it is the second name of a weight
                came[buffer] = tensor
    wanted = [k for k in state if k.startswith(_ENERGY) or (run.init_optimizer and k != "step")]
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
            num_taken += key.startswith(_ENERGY)
    if faults and run.init_strict:
        more = f" and {len(faults) - 1} more" if len(faults) > 1 else ""
        raise UserError(
            f"{run.init_from} does not fit this run: {faults[0]}{more}; make energy, objective and "
            "learner.optimizer as they were there, or set run.init_strict: false to take what fits"
        )
    if num_taken == 0:
        raise UserError(f"no weight of {run.init_from} fits this run: {faults[0]}; name another")
    if any(fault.startswith("optim/") for fault in faults):
        # A count of many updates would have Adam take moments that begin at zero for settled ones.
        state["optim/step"] = torch.zeros_like(state["optim/step"])
    return faults


def _shown(key: str) -> str:
    return key.removeprefix("param/").removeprefix("buffer/")


def _names(faults: list[str]) -> str:
    more = len(faults) - _MAX_NAMED
    return ", ".join(faults[:_MAX_NAMED]) + (f" and {more} more" if more > 0 else "")


def _differences(theirs: Mapping[str, Any], config: RunConfig) -> list[str]:
    """One line on keys of the energy that differ: weights can fit another function."""
    ours = config.energy.model_dump(mode="json")
    keys = [key for key in ours if key in theirs and theirs[key] != ours[key]]
    if not keys:
        return []
    each = ", ".join(f"energy.{key} {theirs[key]!s:.40} -> {ours[key]!s:.40}" for key in keys)
    return [one_line(f"the energy is not the one that the weights were made for: {each}")]


# --- chains --------------------------------------------------------------------------------------


def _chains_of(found: checkpoint.CheckpointDir, spec: EventSpec) -> Chains:
    """Every chain of a checkpoint."""
    parts = [found.arrays(name) for name in found.names if name.startswith("shard_")]
    if not parts:
        raise UserError(
            f"run.init_chains: true, but the checkpoint at {found.path} holds no chains; set it "
            "to false"
        )
    names = ("position", "energy", "version", "age", "log_weight")
    chains = {name: np.concatenate([part[name] for part in parts]) for name in names}
    if chains["position"].shape[1:] != spec.shape or len({len(v) for v in chains.values()}) > 1:
        raise ValueError(f"its chains have shape {chains['position'].shape}")
    # Versions count this run's weights: 0 for what another run's moved, -1 for a chain that has
    # not moved yet.
    return {**chains, "version": np.minimum(chains["version"], 0)}


def _shards(
    config: RunConfig, spec: EventSpec, chains: Chains | None
) -> list[dict[str, dict[str, Any]]]:
    """What the shards hold at update 0, as they would describe it to a checkpoint."""
    buffer, seed = config.buffer, config.run.seed
    if not config.objective.build().needs_negatives:
        return []
    capacities = shard_capacities(buffer.capacity, buffer.num_shards)
    num = len(chains["position"]) if chains is not None else 0
    # Even steps over all of them where there is no room for all.
    rows = np.linspace(0, num - 1, min(num, buffer.capacity)).round().astype(np.int64)
    shares = np.split(rows, np.cumsum(shard_capacities(len(rows), buffer.num_shards))[:-1])
    shards = []
    for index, (capacity, share) in enumerate(zip(capacities, shares)):
        with contextlib.ExitStack() as stack:
            data = None
            if buffer.init == "data":
                data = start_stream(config.data, index, buffer.num_shards, seed)
                stack.callback(data.close)
            shard = ShardChains(
                buffer, spec, index=index, capacity=capacity, max_lease=1, seed=seed, data=data
            )
            snapshot = shard.snapshot()
        for name, array in (chains or {}).items():
            theirs = array[share]
            if name == "position":
                theirs = Codec.of(buffer.storage, spec).converted(theirs)
            snapshot["arrays"][name][: len(share)] = theirs
        shards.append(snapshot)
    return shards


# --- what is said --------------------------------------------------------------------------------


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
