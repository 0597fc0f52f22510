"""A new run that begins with the weights of another: `run.init_from`.

The initial state is written as the checkpoint of update 0, and the run then resumes from it as from
any checkpoint. So this module needs no code for ZeRO stages, numbers of ranks and shards, or parts
that die before the first update.
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
from ebm_dist.buffer.chains import CONTEXT, ShardChains
from ebm_dist.buffer.codec import Codec
from ebm_dist.buffer.config import shard_capacities
from ebm_dist.checkpoint import files as checkpoint
from ebm_dist.checkpoint.cut import Progress, write_cut
from ebm_dist.config.run_config import RunConfig
from ebm_dist.config.sections import RunSection
from ebm_dist.core.errors import UserError, one_line
from ebm_dist.core.seeds import derive_seed
from ebm_dist.core.types import EventSpec, RankState, ShardState
from ebm_dist.core.weights import FlatLayout
from ebm_dist.energies.limits import limited
from ebm_dist.export.pretrained import named
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
"""Largest number of weights that one line names."""

_ENERGY = ("param/energy.", "buffer/energy.")
"""Prefixes of the energy's weights in the learner's state."""

Chains = dict[str, np.ndarray]
"""Fields of chains by name: always `position`, and a shard's other fields if they are known."""


@dataclass(frozen=True, slots=True)
class _Found:
    """The content of `run.init_from` that the config requests."""

    lineage: dict[str, Any]
    section: Mapping[str, Any]
    """The recorded `energy` section."""
    state: dict[str, Tensor]
    """Weights, with the keys of the learner's state."""
    chains: Chains | None


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
        shards = _shards(config, spec, self._chains)
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
        found = _open_export(path, config, spec) if _is_export(path) else None
        if found is None:
            found = _open_checkpoint(path, config, spec, step.energy)
        left_out = _take_over(state, found.state, step, config.run)
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


# --- reading -------------------------------------------------------------------------------------


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


def _is_export(path: Path) -> bool:
    """Whether `path` is an export or a file of one. A run directory with an export counts as a
    run."""
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
        if (stored := read_chains(path, theirs)) is None:
            raise UserError(
                f"run.init_chains: true, but the export at {path} holds no {CHAINS}; name the "
                "run's directory in run.init_from, or set run.init_chains: false"
            )
        _check_jarzynski(config, False, path)
        chains = {"position": Codec.of(config.buffer.storage, spec).converted(stored.x.numpy())}
        chains |= {CONTEXT + name: value.numpy() for name, value in stored.context.items()}
        _check_context(config, spec, chains, path)
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
            chains = _chains_of(found, Codec.of(config.buffer.storage, spec), spec)
            _check_context(config, spec, chains, path)
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
        why = str(error).rpartition("; ")[0]  # drops the advice, which concerns a resume
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
    """Copy the tensors of `came` that fit into `state`; returns a phrase for each other one.

    Raises:
        UserError: a tensor does not fit and `run.init_strict` is true, none fits, or one is not
            finite.
    """
    came = dict(came)
    for name in step.energy.state_dict():  # an export does not distinguish buffers from parameters
        parameter, buffer = (f"{kind}{name}" for kind in _ENERGY)
        if parameter in came and parameter not in state:
            tensor = came.pop(parameter)
            if buffer in state:  # otherwise it is the second name of a weight
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
        # Some moments are zero, so Adam's bias correction must restart as well.
        state["optim/step"] = torch.zeros_like(state["optim/step"])
    return faults


def _shown(key: str) -> str:
    return key.removeprefix("param/").removeprefix("buffer/")


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


# --- chains --------------------------------------------------------------------------------------


def _chains_of(found: checkpoint.CheckpointDir, codec: Codec, spec: EventSpec) -> Chains:
    """Every chain of a checkpoint, as this run stores them."""
    parts = [found.arrays(name) for name in found.names if name.startswith("shard_")]
    if not parts:
        raise UserError(
            f"run.init_chains: true, but the checkpoint at {found.path} holds no chains; set it "
            "to false"
        )
    names = ["position", "energy", "version", "age", "log_weight"]
    names += [name for name in parts[0] if name.startswith(CONTEXT)]
    chains = {name: np.concatenate([part[name] for part in parts]) for name in names}
    if chains["position"].shape[1:] != spec.shape or len({len(v) for v in chains.values()}) > 1:
        raise ValueError(f"its chains have shape {chains['position'].shape}")
    chains["position"] = codec.converted(chains["position"])
    if not np.isfinite(codec.to_numpy(chains["position"])).all():
        raise ValueError("its chains are not finite")
    # Versions count this run's weights: 0 for chains that another run has moved, -1 for unmoved
    # ones.
    return {**chains, "version": np.minimum(chains["version"], 0)}


def _check_context(config: RunConfig, spec: EventSpec, chains: Chains, path: Path) -> None:
    """Refuse chains without what those of this run carry: nobody knows it of them."""
    for carried in config.context_fields(spec):
        found = chains.get(CONTEXT + carried.name)
        if found is None or found.shape[1:] != carried.shape:
            raise UserError(
                f"run.init_chains: true, but the chains of {path} carry no {carried.name} as "
                f"buffer.context.{carried.name} asks; set run.init_chains: false, or leave "
                f"buffer.context.{carried.name} out"
            )
        if carried.size is not None and len(found) and found.max() >= carried.size:
            raise UserError(
                f"run.init_chains: true, but the chains of {path} carry a {carried.name} of "
                f"{found.max()}, here they are 0 to {carried.size - 1}; set run.init_chains: false"
            )


def _shards(config: RunConfig, spec: EventSpec, chains: Chains | None) -> list[ShardState]:
    """Snapshots of the shards at update 0."""
    buffer, seed = config.buffer, config.run.seed
    if not config.objective.takes_negatives:
        return []
    capacities = shard_capacities(buffer.capacity, buffer.num_shards)
    fields = config.context_fields(spec)
    num = len(chains["position"]) if chains is not None else 0
    # Evenly spaced chains if there are more than fit.
    rows = np.linspace(0, num - 1, min(num, buffer.capacity)).round().astype(np.int64)
    shares = np.split(rows, np.cumsum(shard_capacities(len(rows), buffer.num_shards))[:-1])
    shards = []
    for index, (capacity, share) in enumerate(zip(capacities, shares)):
        with contextlib.ExitStack() as stack:
            data = None
            if buffer.starts_from_data:
                data = start_stream(config.data, index, buffer.num_shards, seed)
                stack.callback(data.close)
            shard = ShardChains(
                buffer,
                spec,
                index=index,
                capacity=capacity,
                max_lease=1,
                seed=seed,
                data=data,
                fields=fields,
            )
            snapshot = shard.snapshot()
        for name, array in (chains or {}).items():
            if name in snapshot.arrays:  # else a context that chains of this run do not carry
                snapshot.arrays[name][: len(share)] = array[share]
        shards.append(snapshot)
    return shards


# --- notices -------------------------------------------------------------------------------------


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
