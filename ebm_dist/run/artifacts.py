"""Logs what a run uses and makes as W&B artifacts: a description of its data, models, checkpoints.

A folder in `RUN/artifacts` never changes, since W&B may read it much later: an offline run refers
to it until `wandb sync`. Its name has a digest of its content, so equal content is sent once. No
method raises, since tracking must not end a run.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import wraps
from pathlib import Path
from typing import Any, Literal

import torch

from ebm_dist._version import __version__
from ebm_dist.checkpoint import files as checkpoint
from ebm_dist.cluster.backend import Backend
from ebm_dist.config.run_config import RunConfig
from ebm_dist.controller.clients import HubClient
from ebm_dist.controller.observers.hub import HubLink
from ebm_dist.core.errors import one_line
from ebm_dist.core.types import EventSpec
from ebm_dist.data.config import DataConfig
from ebm_dist.data.dataset import open_dataset
from ebm_dist.data.storage.shards import Shards
from ebm_dist.export import model_card
from ebm_dist.export.writer import export_run
from ebm_dist.files.durable import link_or_copy, new_directory, replace_text
from ebm_dist.files.safe_open import make_directory
from ebm_dist.metrics.config import TrackingConfig

log = logging.getLogger("ebm_dist.run")

SCORES = (
    ("fidelity/distance", 1.0),
    ("likelihood/log_prob_test", -1.0),
    ("likelihood/log_prob", -1.0),
)
"""Metrics by which an evaluation ranks models, the first that it has; the smallest value times the
factor is the best."""

MAX_SHARDS_NAMED = 1000
"""Most shards that the description of the data lists; the digest is of all."""

Kind = Literal["model", "checkpoint"]

_BEST: dict[Kind, str] = {"model": "best.json", "checkpoint": "best_checkpoint.json"}
"""Where the folder with the best evaluation so far, and its score, are kept."""

_WEIGHTS = "ema.safetensors"
_MIB = 2**20


def _harmless(method: Callable[..., None]) -> Callable[..., None]:
    @wraps(method)
    def logged(self: Artifacts, *args: Any) -> None:
        if self.wanted:
            try:
                method(self, *args)
            except Exception as error:
                why = one_line(str(error) or type(error).__name__)
                log.info(f"W&B: an artifact was left out ({why}); the run goes on")

    return logged


class Artifacts:
    """The artifacts of one run, also over its resumes."""

    def __init__(self, config: RunConfig, spec: EventSpec, run_dir: Path, hub: HubLink) -> None:
        self._config = config
        self._spec = spec
        self._run_dir = run_dir
        self._hub = hub
        self._folder = run_dir.absolute() / "artifacts"
        self._evaluated: dict[int, Mapping[str, float]] = {}
        self._is_full: set[Kind] = set()

    @property
    def wanted(self) -> bool:
        """Whether there is a W&B run for the artifacts."""
        tracking = self._config.tracking
        return self._hub.known["mode"] != "off" and (
            tracking.artifacts != "off" or tracking.checkpoints
        )

    @_harmless
    def log_data(self, step: int) -> None:
        """Log the description of the data as the run's input. The data itself is not sent."""
        about = describe_data(self._config.data, self._spec)
        name = re.sub(r"[^A-Za-z0-9_.]+", "-", about["source"]).strip("-")[-80:]
        folder = self._folder / f"data-{name}-{about['digest'][:8]}"
        if not folder.is_dir():
            make_directory(self._folder)
            with new_directory(folder, replace=False) as part:
                text = json.dumps(about, indent=1, allow_nan=False) + "\n"
                (part / "description.json").write_text(text, encoding="utf-8")
        shown = {key: value for key, value in about.items() if key != "shards"}
        self._hub.send(HubClient.artifact, step, "dataset", str(folder), ["latest"], shown)

    @_harmless
    def on_checkpoint(self, path: Path) -> None:
        step = int(path.name.rpartition("_")[2])
        every = self._config.evaluation.every
        if step in self._evaluated or every is None or step % every:
            self._log_checkpoint(step)
            self._log_if_best(step)

    @_harmless
    def on_evaluation(self, step: int, metrics: Mapping[str, float]) -> None:
        self._evaluated = {step: metrics, **self._evaluated}
        self._evaluated = dict(list(self._evaluated.items())[:4])  # a checkpoint is written soon
        if self._checkpoint(step).is_dir():
            self._log_checkpoint(step)
            self._log_if_best(step)

    @_harmless
    def finish(self, export_dir: Path) -> None:
        """Log the export of the finished run."""
        step = self._config.run.steps
        if step not in self._evaluated:
            self._log_checkpoint(step)
        if self._config.tracking.artifacts == "off":
            return
        size = _size(export_dir)
        if size > self._config.tracking.artifacts_mib * _MIB:
            log.info(
                f"W&B: the model has {size / _MIB:.0f} MiB and is not sent; raise "
                "tracking.artifacts_mib to send it"
            )
            return
        folder = self._folder_of(step)
        if not folder.is_dir():
            make_directory(self._folder)
            with new_directory(folder, replace=False) as part:
                for file in export_dir.iterdir():
                    link_or_copy(file, part / file.name)
        self._send("model", step, folder, is_final=True)

    @_harmless
    def _log_checkpoint(self, step: int) -> None:
        path = self._checkpoint(step)
        if not self._config.tracking.checkpoints or not path.is_dir():
            return
        folder = self._folder / f"checkpoint-{path.name}-{checkpoint.checksum(path, 'learner')[:8]}"
        if not folder.is_dir():
            if not self._has_room("checkpoint", _size(path)):
                return
            make_directory(self._folder)
            with new_directory(folder, replace=False) as part:
                checkpoint.write_whole(checkpoint.open_checkpoint(path), part)
        self._send("checkpoint", step, folder, is_final=False)

    def _log_if_best(self, step: int) -> None:
        if self._config.tracking.artifacts != "best" or step == self._config.run.steps:
            return  # `finish` logs the model of the last update
        folder = self._folder_of(step)
        if not self._is_best("model", step, folder):
            return
        if not folder.is_dir():
            if not self._has_room("model", (self._checkpoint(step) / _WEIGHTS).stat().st_size):
                return
            make_directory(self._folder)
            found = checkpoint.open_checkpoint(self._checkpoint(step))
            energy = self._config.energy
            export_run(self._run_dir, folder, plugins=None, energy=energy, found=found)
        self._send("model", step, folder, is_final=False)

    def _has_room(self, kind: Kind, size: int) -> bool:
        """Whether another folder of `size` bytes may be sent."""
        pattern = "step_*" if kind == "model" else "checkpoint-*"
        sent = sum(_size(path) for path in self._folder.glob(pattern))
        if sent + size <= self._config.tracking.artifacts_mib * _MIB:
            return True
        if kind not in self._is_full:
            last = "; of later ones only the last is" if kind == "model" else ", and no later ones"
            log.info(
                f"W&B: {sent / _MIB:.0f} MiB of {kind}s are sent{last}. Raise "
                "tracking.artifacts_mib for more"
            )
            self._is_full.add(kind)
        return False

    def _send(self, kind: Kind, step: int, folder: Path, *, is_final: bool) -> None:
        score, aliases = _score(self._evaluated.get(step, {})), ["latest"]
        if self._is_best(kind, step, folder) or (is_final and self._best(kind) is None):
            aliases.append("best")
            entry = {"folder": folder.name, **(score or {})}
            replace_text(self._folder / _BEST[kind], json.dumps(entry) + "\n")
        about = {
            "run": self._config.run.name,
            "update": step,
            "ebm_dist": __version__,
            **({score["metric"]: score["value"]} if score else {}),
        }
        self._hub.send(HubClient.artifact, step, kind, str(folder), aliases, about)

    def _is_best(self, kind: Kind, step: int, folder: Path) -> bool:
        """Whether none so far is better than that of `step`, which goes to `folder`."""
        best, score = self._best(kind), _score(self._evaluated.get(step, {}))
        if best is not None and best["folder"] == folder.name:
            return True
        if score is None:
            return False
        # An evaluation of another kind has begun a new ranking.
        return best is None or best.get("metric") != score["metric"] or score["rank"] < best["rank"]

    def _best(self, kind: Kind) -> dict[str, Any] | None:
        try:
            return json.loads((self._folder / _BEST[kind]).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None

    def _checkpoint(self, step: int) -> Path:
        return self._run_dir / "checkpoints" / checkpoint.name_of(step)

    def _folder_of(self, step: int) -> Path:
        path = self._checkpoint(step)
        return self._folder / f"{path.name}-{checkpoint.checksum(path, 'ema')[:8]}"


def provenance(config: TrackingConfig, backend: Backend) -> dict[str, Any]:
    """For W&B's config: the versions of the code, and CPUs, GPUs and memory of every node."""
    if config.wandb == "off" or "wandb" not in config.sinks:
        return {}
    commit = model_card.git_commit(Path(__file__).parent)
    code = {"ebm_dist": __version__, "git_commit": commit, "torch": torch.__version__}
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    here = {"CPU": os.cpu_count(), "GPU": torch.cuda.device_count(), "memory": memory}
    # Ray's other resources name addresses.
    nodes = [
        {
            "id": node.id[:8],
            **{key: value for key, value in node.total.items() if key in here},
            "accelerators": [key.partition(":")[2] for key in node.total if "accelerator" in key],
        }
        for node in backend.nodes()
    ]
    return {"code": code, "nodes": nodes or [{"id": "local", **here}]}


def describe_data(config: DataConfig, spec: EventSpec) -> dict[str, Any]:
    """Source, events, counts, shards with their checksums, and a digest of all these."""
    storage = open_dataset(config)
    shards = storage.all() if isinstance(storage, Shards) else []
    about = {
        "source": config.location if config.is_own_dataset else Path(config.location).name,
        "event": asdict(spec),
        "train": storage.num_samples("train"),
        "test": storage.num_samples("test") if storage.has("test") else 0,
        "holdout": config.holdout,
    }
    identity = [config.fingerprint] if config.fingerprint else storage.identity()
    text = json.dumps([about, identity], sort_keys=True)
    named = [
        {"name": shard.path.name, "samples": shard.num_samples, "sha256": shard.sha256}
        for shard in shards[:MAX_SHARDS_NAMED]
    ]
    digest = hashlib.sha256(text.encode()).hexdigest()
    return {**about, "digest": digest, "num_shards": len(shards), "shards": named}


def _score(metrics: Mapping[str, float]) -> dict[str, Any] | None:
    """The metric that ranks a model, its value, and a rank that is smaller for better models."""
    for name, factor in SCORES:
        if math.isfinite(value := metrics.get(name, math.nan)):
            return {"metric": name, "value": value, "rank": factor * value}
    return None


def _size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.iterdir())
