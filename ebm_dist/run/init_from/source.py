"""Reads an export or a checkpoint as the source of a new run's weights and chains."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ebm_dist.buffer.chains import CONTEXT
from ebm_dist.buffer.codec import Codec
from ebm_dist.checkpoint import files as checkpoint
from ebm_dist.config.run_config import RunConfig
from ebm_dist.core.errors import UserError
from ebm_dist.core.types import EventSpec
from ebm_dist.export.layout import CHAINS, CONFIG
from ebm_dist.export.pretrained import list_pretrained
from ebm_dist.export.reader import (
    find_export,
    read_chains,
    read_spec,
    read_weights,
)
from ebm_dist.run.init_from.chains import (
    Chains,
    chains_of,
    check_context,
    check_event,
    check_jarzynski,
)
from ebm_dist.run.init_from.weights import ENERGY, averaged


@dataclass(frozen=True, slots=True)
class Source:
    """The content of `run.init_from` that the config requests."""

    lineage: dict[str, Any]
    section: Mapping[str, Any]
    """The recorded `energy` section."""
    state: dict[str, Tensor]
    """Weights, with the keys of the learner's state."""
    chains: Chains | None


def open_source(path: Path, config: RunConfig, spec: EventSpec, energy: nn.Module) -> Source:
    """The content of the export, the run or the checkpoint at `path`.

    Args:
        energy: the energy of the new run.

    Raises:
        UserError: it is missing or damaged, or its chains do not fit the new run.
    """
    if _is_export(path):
        return _open_export(path, config, spec)
    return _open_checkpoint(path, config, spec, energy)


def _is_export(path: Path) -> bool:
    """Whether `path` is an export or a file of one. A run directory with an export counts as a
    run."""
    if path.is_file() or (path / CONFIG).is_file():
        return True
    inside = (path / "export" / CONFIG).is_file()
    return inside and not (path / "checkpoints").is_dir()


def _open_export(path: Path, config: RunConfig, spec: EventSpec) -> Source:
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
        check_event(theirs, spec, path)
        if (stored := read_chains(path, theirs)) is None:
            raise UserError(
                f"run.init_chains: true, but the export at {path} holds no {CHAINS}; name the "
                "run's directory in run.init_from, or set run.init_chains: false"
            )
        check_jarzynski(config, False, path)
        chains = {"position": Codec.of(config.buffer.storage, spec).converted(stored.x.numpy())}
        chains |= {CONTEXT + name: value.numpy() for name, value in stored.context.items()}
        check_context(config, spec, chains, path)
    state = {f"{ENERGY[0]}{name}": tensor for name, tensor in tensors.items()}
    return Source(lineage, _section_of(content), state, chains)


def _open_checkpoint(path: Path, config: RunConfig, spec: EventSpec, energy: nn.Module) -> Source:
    found = _find_checkpoint(path)
    run = config.run
    with found.of_a_run():
        learner = found.tensors("learner")
        section = _section_of(found.meta["config"])
        state = {
            key: tensor
            for key, tensor in learner.items()
            if key.startswith(ENERGY) or (run.init_optimizer and key != "step")
        }
        if run.init_weights == "ema":
            flat = found.tensors("ema")["flat"]
            state |= averaged(flat, learner, section, config, energy)
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
            check_event(read_spec(found.meta, found.path / "meta.json"), spec, path)
            weighted = bool(found.meta["config"]["buffer"].get("jarzynski", False))
            check_jarzynski(config, weighted, path)
            chains = chains_of(found, Codec.of(config.buffer.storage, spec), spec)
            check_context(config, spec, chains, path)
    return Source(lineage, section, state, chains)


def _find_checkpoint(path: Path) -> checkpoint.CheckpointDir:
    """`path` itself, or the newest valid checkpoint of the run at `path`."""
    if not path.exists():
        raise UserError(
            f"{path}: no such directory; expected an export, a run directory, a checkpoint, or a "
            f"pretrained model: {', '.join(list_pretrained())}"
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
