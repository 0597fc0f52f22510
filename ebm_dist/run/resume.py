"""Compares the config of a resumed run with its checkpoint: refuses or reports changes."""

from __future__ import annotations

import glob
import os
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from ebm_dist.checkpoint.files import CheckpointDir
from ebm_dist.config.run_config import RunConfig
from ebm_dist.config.sections import RunSection
from ebm_dist.core.errors import UserError
from ebm_dist.core.types import EventSpec
from ebm_dist.core.weights import FlatLayout
from ebm_dist.data.config import DataConfig
from ebm_dist.data.dataset import located
from ebm_dist.energies.module import ModuleEnergySection
from ebm_dist.export.reader import read_spec
from ebm_dist.learner.config import LearnerConfig, learning_rate
from ebm_dist.run.given import is_given

_PLACES = ("source", "shards", "test_source")
_READING = ("batch_size", "shuffle", "rank_split", "prefetch", "verify", "on_bad_sample")
_CACHE = ("cache", "cache_mib", "cache_dir")
"""The keys of `data` above change how samples are read; all others change their distribution."""

_BEGINNING = tuple(f"run.{key}" for key in RunSection.model_fields if key.startswith("init_"))
_AROUND = ("run.dir", "run.steps", *_BEGINNING, "runtime.", "tracking.", "checkpoint.", "callbacks")
"""Keys that do not affect the result of a resumed run."""

_SHOWN = 60


def check_resumable(config: RunConfig, spec: EventSpec, found: CheckpointDir) -> None:
    """Refuse to continue from a checkpoint of another model or with other data.

    Args:
        config: already bound to the data, whose events are `spec`.
    """
    elsewhere = "run_dir" if is_given(config) else "--run-dir"
    for key, (old, new) in changed_keys(config, found).items():
        if _is_fixed(key, old, config):
            raise UserError(
                f"{key}: the checkpoint at {found.path} has {_short(old)}, the config "
                f"{_short(new)}; restore it, or start anew with another {elsewhere}"
            )
    if isinstance(config.energy, ModuleEnergySection):  # code may change under one target
        here = FlatLayout.of(config.energy.build(seed=0)).size
        there = found.tensors("ema")["flat"].numel()
        if here != there:
            raise UserError(
                f"energy: the network has {here} weights, that of the checkpoint at {found.path} "
                f"{there}; restore it, or start anew with another {elsewhere}"
            )
    event = found.meta.get("event")
    if event is not None and read_spec(found.meta, found.path / "meta.json") != spec:
        raise UserError(
            f"data.source: the checkpoint at {found.path} is of events {event}, the data's are "
            f"{asdict(spec)}; restore the data, or start anew with another --run-dir"
        )
    path, began = config.run.init_from, found.meta["config"]["run"].get("init_from")
    # A path that no longer exists, or was relative to another directory, is ignored.
    if path is not None and path != began and (began is None or os.path.lexists(path)):
        raise UserError(
            f"run.init_from: {path} would not be read, since {found.path.parents[1]} holds a run; "
            "choose another run.name or --run-dir to begin a new run there, or leave run.init_from "
            "out to go on with that one"
        )
    carried = found.meta["config"]["buffer"].get("context") or {}
    for name in config.buffer.context.names:
        if not carried.get(name):
            raise UserError(
                f"buffer.context.{name}: the chains of the checkpoint at {found.path} carry no "
                f"{name}; leave it out, or start anew with another {elsewhere} (run.init_from "
                "begins with the weights)"
            )
    if config.buffer.jarzynski and not found.meta["config"]["buffer"].get("jarzynski", False):
        raise UserError(
            f"buffer.jarzynski: the chains of the checkpoint at {found.path} carry no Jarzynski "
            "weights; set it to false, or start anew with another --run-dir"
        )
    if found.step > config.run.steps:
        raise UserError(
            f"run.steps: the checkpoint at {found.path} is at update {found.step}, past "
            f"{config.run.steps}; raise run.steps, or start anew with another --run-dir"
        )


def changes(config: RunConfig, found: CheckpointDir) -> list[str]:
    """Lines that report the changes since the checkpoint.

    Raises:
        UserError: the run is finished, so a changed key would have no effect.
    """
    changed = changed_keys(config, found)
    if found.step == config.run.steps:
        for key, (old, new) in changed.items():
            if not key.startswith(_AROUND) and key.removeprefix("data.") not in _CACHE:
                raise UserError(
                    f"{key}: the run at {found.path.parents[1]} is finished, at update "
                    f"{found.step}, and {_short(new)} in place of {_short(old)} would train "
                    f"nothing; raise run.steps to train on with it, restore {_short(old)}, or "
                    "choose another --run-dir"
                )
    lines = []
    if changed:
        each = [f"{key} {_short(old)} -> {_short(new)}" for key, (old, new) in changed.items()]
        lines.append(f"changed since {found.path.name}: {', '.join(each)}")
    then = found.meta["config"]
    before = learning_rate(
        LearnerConfig.model_validate(then["learner"]), found.step, then["run"]["steps"]
    )
    after = learning_rate(config.learner, found.step, config.run.steps)
    if abs(after - before) > 0.01 * max(after, before):
        lines.append(f"the learning rate jumps from {before:.3g} to {after:.3g} here")
    return lines


def changed_keys(config: RunConfig, found: CheckpointDir) -> dict[str, tuple[Any, Any]]:
    """Key -> (value in the checkpoint, value now) for all keys that differ; names come first."""
    then = dict(found.meta["config"])
    # Relative paths of the checkpoint are resolved from the current directory.
    then["data"] = located(DataConfig.model_validate(then["data"])).model_dump(mode="json")
    old, new = _flat(then), _flat(config.model_dump(mode="json"))
    # A key that the checkpoint lacks is newer than it; its default is the old behaviour.
    differ = [key for key in new if key in old and old[key] != new[key]]
    return {key: (old[key], new[key]) for key in sorted(differ, key=_names_first)}


def _names_first(key: str) -> tuple[bool, str]:
    return not key.endswith(".name"), key


def _is_fixed(key: str, old: Any, config: RunConfig) -> bool:
    section, _, name = key.partition(".")
    if section == "objective":
        return name not in config.objective.adjustable
    if section == "data" and name in _PLACES and old is not None:
        # Data that has moved counts as the same; the events are compared as well.
        olds = [old] if isinstance(old, str) else old
        moved = not any(glob.has_magic(path) or "{" in path for path in olds) and all(
            os.path.isabs(path) and not os.path.lexists(path) for path in olds
        )
        return not moved and tuple(olds) != config.data.patterns
    if section == "data" and name == "target" and config.data.source == "given":
        return False  # an array may be given as a tensor: the fingerprint tells
    if section == "data":
        return name not in (*_PLACES, *_READING, *_CACHE)
    return section == "energy" or key == "learner.optimizer"


def _flat(value: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, item in value.items():
        if isinstance(item, Mapping) and item:
            flat |= _flat(item, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = item
    return flat


def _short(value: Any) -> str:
    text = "null" if value is None else str(value)
    return text if len(text) <= _SHOWN else text[: _SHOWN - 3] + "..."
