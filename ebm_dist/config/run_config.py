"""The config of a run: one frozen object of sections, each defined by the module that uses it."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from pydantic import Field, model_validator

from ebm_dist import objectives
from ebm_dist.buffer.config import BufferConfig, context_fields
from ebm_dist.checkpoint.files import CheckpointConfig
from ebm_dist.config.checks import check
from ebm_dist.config.sections import (
    CallbackSection,
    FlowConfig,
    RunSection,
    RuntimeConfig,
    WorkersConfig,
)
from ebm_dist.config.text import apply_override, validate, without_empty
from ebm_dist.core.errors import UserError, one_line
from ebm_dist.core.paths import config_path
from ebm_dist.core.plugins import ModuleName, import_plugins
from ebm_dist.core.section import Section
from ebm_dist.core.types import ContextField, EventSpec
from ebm_dist.data.config import DataConfig
from ebm_dist.energies import EnergyConfig
from ebm_dist.energies.context import trait
from ebm_dist.evaluation.config import EvaluationConfig
from ebm_dist.files.safe_open import open_to_read
from ebm_dist.files.strict_yaml import read_yaml, write_yaml
from ebm_dist.learner.config import LearnerConfig
from ebm_dist.metrics.config import TrackingConfig
from ebm_dist.objectives import ObjectiveConfig
from ebm_dist.samplers import SamplerConfig

MAX_FILE_BYTES = 2**20


class RunConfig(Section):
    """The complete config of a run. `load` reads it from a file."""

    plugins: tuple[ModuleName, ...] = ()
    """Modules that `train` imports before it reads the rest; the sections that they register are
    then available. Training a config of another person runs the code that it names."""

    run: RunSection = RunSection()
    runtime: RuntimeConfig = RuntimeConfig()
    data: DataConfig = DataConfig()
    energy: EnergyConfig
    sampler: SamplerConfig
    objective: ObjectiveConfig = Field(default_factory=lambda: objectives.ContrastiveSection())
    buffer: BufferConfig = BufferConfig()
    workers: WorkersConfig = WorkersConfig()
    learner: LearnerConfig = LearnerConfig()
    flow: FlowConfig = FlowConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    tracking: TrackingConfig = TrackingConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    callbacks: tuple[CallbackSection, ...] = ()

    @property
    def num_negatives(self) -> int:
        """Number of negatives per update."""
        return self.buffer.num_negatives or self.data.batch_size

    def context_fields(self, spec: EventSpec) -> tuple[ContextField, ...]:
        """The contexts of each chain, for data of `spec`.

        Raises:
            ValueError: the data or the energy does not have one; the message names the key.
        """
        context, noise, levels = self.buffer.context, self.objective.pair_noise, None
        if context.level:
            levels = noise[0].std if noise else trait(self.energy.bind(spec).build(), "noise_stds")
        return context_fields(context, spec, levels, noise)

    @model_validator(mode="after")
    def _sections_agree(self) -> RunConfig:
        if problems := list(check(self)):
            raise ValueError("\n".join(map(one_line, problems)))
        return self


def load(
    source: str | Path | Mapping[str, Any],
    overrides: Iterable[str] = (),
    *,
    trusted: bool = False,
) -> RunConfig:
    """The config from `source`, a YAML file or a mapping, with `a.b=value` overrides applied.

    Keys that begin with `x-` are left out at the top level, and sections without keys anywhere.

    Args:
        trusted: import the modules of `plugins` first, as a training does. Otherwise nothing of
            a user's is imported, and sections that plugins register are known only if they are.

    Raises:
        UserError: one line for each fault: the key's path in the user's file, the expected value,
            the actual value, and what to change.
    """
    if isinstance(source, Mapping):
        prefix, data = "", dict(source)
    else:
        prefix, data = f"{source}: ", _read_file(Path(source))
    # Keys with x- hold YAML anchors for other sections.
    data = {key: value for key, value in data.items() if not str(key).startswith("x-")}
    for override in overrides:
        data = apply_override(data, override, RunConfig)
    try:
        if trusted:
            _import_plugins_of(data)
        return validate(RunConfig, without_empty(data, [RunConfig]))
    except UserError as error:
        raise UserError(*(f"{prefix}{line}" for line in error.args)) from None


def _import_plugins_of(data: dict[str, Any]) -> None:
    names, runtime = data.get("plugins") or (), data.get("runtime")
    if not isinstance(names, list | tuple) or not all(isinstance(name, str) for name in names):
        return  # the validation reports it
    directory = runtime.get("working_dir") if isinstance(runtime, Mapping) else None
    try:
        directory = config_path(directory) if isinstance(directory, str) else None
    except ValueError:
        return  # likewise
    import_plugins(names, directory=directory)


def dump(config: RunConfig) -> str:
    """`config` as complete YAML with every default; `load` of the result equals `config`."""
    return write_yaml(_names_first(config.model_dump(mode="json")))


def _names_first(value: Any) -> Any:
    """Move `name` to the front of every section, as people write them."""
    if isinstance(value, list):
        return [_names_first(item) for item in value]
    if not isinstance(value, dict):
        return value
    first = {"name": value["name"]} if "name" in value else {}
    return first | {key: _names_first(item) for key, item in value.items()}


def schema() -> dict[str, Any]:
    """The JSON schema of a config file, with which editors complete and check YAML."""
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        **RunConfig.model_json_schema(),
        "patternProperties": {"^x-": {}},
        "title": "ebm_dist run config",
    }


def _read_file(path: Path) -> dict[str, Any]:
    try:
        with open_to_read(path, follow=True) as file:
            text = file.read(MAX_FILE_BYTES + 1).decode()
        if len(text) > MAX_FILE_BYTES:
            raise UserError(f"{path}: larger than {MAX_FILE_BYTES >> 20} MiB, so not a config")
    except FileNotFoundError:
        raise UserError(f"{path}: no such file{_similar_file(path)}") from None
    except IsADirectoryError:
        raise UserError(f"{path}: is a directory, expected a YAML file") from None
    except UserError:
        raise
    except UnicodeDecodeError:
        raise UserError(f"{path}: not UTF-8 text, expected a YAML file") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    try:
        data = read_yaml(text)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    if not isinstance(data, dict):
        what = "nothing" if data is None else f"a {type(data).__name__}"
        raise UserError(f"{path}: expected sections such as `run:` and `data:`, found {what}")
    return data


def _similar_file(path: Path) -> str:
    folder = path.parent
    names = [item.name for item in folder.glob("*.y*ml")] if folder.is_dir() else []
    close = difflib.get_close_matches(path.name, names, n=1, cutoff=0.6)
    found = [folder / name for name in close] or [
        p for p in [Path(f"configs/{path}.yaml")] if p.exists()
    ]
    return f"; did you mean {found[0]}?" if found else ""
