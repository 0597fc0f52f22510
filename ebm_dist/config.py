"""The run's config: one frozen object composed of the sections that each module owns."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, PositiveInt, model_validator

from ebm_dist import objectives
from ebm_dist.actors.placement import RuntimeConfig
from ebm_dist.actors.worker import WorkersConfig
from ebm_dist.buffer.codec import Codec
from ebm_dist.buffer.policy import BufferConfig, FlowConfig
from ebm_dist.checkpoint import CheckpointConfig
from ebm_dist.config_text import apply_override, read_yaml, validate, write_yaml
from ebm_dist.data.config import DataConfig
from ebm_dist.energies import EnergyConfig
from ebm_dist.errors import UserError
from ebm_dist.evaluation.config import EvaluationConfig
from ebm_dist.learner.config import LearnerConfig
from ebm_dist.metrics.config import TrackingConfig
from ebm_dist.objectives import ObjectiveConfig, jarzynski
from ebm_dist.samplers import SamplerConfig
from ebm_dist.section import Section
from ebm_dist.types import EventSpec

MAX_FILE_BYTES = 2**20


class RunSection(Section):
    """What the run is called, how long it is and where it is kept."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=100)] = "run"
    """Letters, digits, dot, dash and underscore: it names a directory and the W&B run."""

    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """Every stream of noise in the run is derived from it."""

    steps: PositiveInt = 1000
    """Learner updates in all, those before a resume included."""

    dir: Annotated[str, Field(min_length=1)] = "runs"
    """The run is kept in dir/name unless --run-dir says otherwise."""


class RunConfig(Section):
    """Everything that decides what a run computes; `load` is the only way in from a file."""

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

    @property
    def num_negatives(self) -> int:
        """Negatives of an update."""
        return self.buffer.num_negatives or self.data.batch_size

    @model_validator(mode="after")
    def _sections_agree(self) -> RunConfig:
        if problems := list(check(self)):
            raise ValueError("\n".join(problems))
        return self


def load(source: str | Path | Mapping[str, Any], overrides: Iterable[str] = ()) -> RunConfig:
    """The config at `source`, a YAML file or a mapping, with `a.b=value` overrides applied.

    Raises:
        UserError: one line for each fault: the key's path in the user's file, what was
            expected, what came, what to change.
    """
    if isinstance(source, Mapping):
        prefix, data = "", dict(source)
    else:
        prefix, data = f"{source}: ", _read_file(Path(source))
    for override in overrides:
        data = apply_override(data, override)
    try:
        return validate(RunConfig, data)
    except UserError as error:
        raise UserError("\n".join(prefix + line for line in str(error).splitlines())) from None


def dump(config: RunConfig) -> str:
    """`config` as YAML, complete, every default written out; `load` reads it back equal."""
    return write_yaml(_names_first(config.model_dump(mode="json")))


def _names_first(value: Any) -> Any:
    """Sections with `name` as their first key, as people write them."""
    if isinstance(value, list):
        return [_names_first(item) for item in value]
    if not isinstance(value, dict):
        return value
    first = {"name": value["name"]} if "name" in value else {}
    return first | {key: _names_first(item) for key, item in value.items()}


def schema() -> dict[str, Any]:
    """The JSON schema of a config file, for editors that complete and check YAML."""
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        **RunConfig.model_json_schema(),
        "title": "ebm_dist run config",
    }


def _read_file(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            raise UserError(f"{path}: larger than {MAX_FILE_BYTES >> 20} MiB, so not a config")
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"{path}: no such file{_similar_file(path)}") from None
    except IsADirectoryError:
        raise UserError(f"{path}: is a directory, expected a YAML file") from None
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
    names = [item.name for item in folder.iterdir()] if folder.is_dir() else []
    close = difflib.get_close_matches(path.name, names, n=1, cutoff=0.6)
    return f"; did you mean {folder / close[0]}?" if close else ""


def check(config: RunConfig) -> Iterator[str]:
    """What sections that are each right get wrong together, one line for each problem.

    Only what the file alone decides; `check_event` does the rest once the data is known.
    """
    yield from _check_batch(config)
    yield from _check_buffer(config)
    yield from _check_band(config)
    yield from _check_temperature(config)
    yield from _check_jarzynski(config)
    yield from _check_recompute(config)
    yield from _check_warm_up(config)
    yield from _check_audit(config)
    if config.runtime.backend == "inline" and config.learner.num_ranks > 1:
        yield (
            f"learner.num_ranks: expected 1 with runtime.backend inline, which is one process, got "
            f"{config.learner.num_ranks}; set runtime.backend: ray"
        )


def _check_batch(config: RunConfig) -> Iterator[str]:
    batch, ranks = config.data.batch_size, config.learner.num_ranks
    accumulation, chains = config.learner.accumulation, config.workers.num_chains
    if batch % (ranks * accumulation):
        yield (
            f"data.batch_size: expected a multiple of learner.num_ranks * learner.accumulation = "
            f"{ranks} * {accumulation}, got {batch}; "
            f"{_nearest_multiple(batch, ranks * accumulation)}"
        )
    negatives = config.num_negatives
    key = "data.batch_size" if config.buffer.num_negatives is None else "buffer.num_negatives"
    if negatives != batch and negatives % (ranks * accumulation):
        yield (
            f"buffer.num_negatives: expected a multiple of learner.num_ranks * "
            f"learner.accumulation = {ranks} * {accumulation}, got {negatives}; "
            f"{_nearest_multiple(negatives, ranks * accumulation)}"
        )
    if negatives % chains:
        yield (
            f"{key}: expected a multiple of workers.num_chains = {chains}, since an "
            f"update takes whole rounds, got {negatives}; set workers.num_chains to "
            f"{math.gcd(negatives, chains)} or {key} to {_round_up(negatives, chains)}"
        )


def _check_buffer(config: RunConfig) -> Iterator[str]:
    capacity, shards = config.buffer.capacity, config.buffer.num_shards
    chains, batch = config.workers.num_chains, config.num_negatives
    each = capacity // shards
    if each < chains:
        yield (
            f"buffer.capacity: expected at least buffer.num_shards * workers.num_chains = "
            f"{shards} * {chains}, so that a shard can fill a lease, got {capacity}; "
            f"set it to {shards * chains} or more, or lower workers.num_chains"
        )
        return
    # An update's negatives are ready all together, in whole leases, spread over the shards.
    leases = -(-batch // chains)
    needed = -(-leases // shards) * chains
    if each < needed:
        yield (
            f"buffer.capacity: expected at least {needed * shards}, so that {shards} shards can "
            f"hold one update's {batch} negatives at once, got {capacity}; raise it, or lower "
            + ("data.batch_size" if config.buffer.num_negatives is None else "buffer.num_negatives")
        )


def _check_band(config: RunConfig) -> Iterator[str]:
    """Bounds on MCMC steps per update that no schedule could keep."""
    low, high = config.flow.min_steps_per_update, config.flow.max_steps_per_update
    if low is None and high is None:
        return
    if not config.objective.build().needs_negatives:
        key = "max_steps_per_update" if low is None else "min_steps_per_update"
        yield (
            f"flow.{key}: set, but objective.name {config.objective.name} takes no negatives; "  # type: ignore[attr-defined]
            "leave it out"
        )
        return
    batch, chains = config.num_negatives, config.workers.num_chains
    steps = config.sampler.num_steps
    needed = batch * steps
    if high is not None and high < needed:
        yield (
            f"flow.max_steps_per_update: expected at least {batch} negatives * sampler.num_steps = "
            f"{batch} * {steps} = {needed}, which an update cannot do without, got {high:g}; "
            "raise it, or lower sampler.num_steps"
        )
    if low is None or low <= needed:
        return
    # Spare rounds need chains that are neither leased nor ready: in sync mode beside those of the
    # whole update, in async mode one lease of every shard.
    spare = math.ceil((low - needed) / (chains * steps)) if config.flow.mode == "sync" else 0
    shards = config.buffer.num_shards
    leases = -(-(batch // chains + spare) // shards) + (config.flow.mode == "async")
    if config.buffer.capacity // shards < leases * chains:
        yield (
            f"buffer.capacity: expected at least {leases * chains * shards}, so that there are "
            f"chains for the spare rounds that flow.min_steps_per_update asks for, got "
            f"{config.buffer.capacity}; raise it, or lower flow.min_steps_per_update to {needed}"
        )


def _check_temperature(config: RunConfig) -> Iterator[str]:
    stated = getattr(config.objective, "temperature", None)
    reads = []
    if config.flow.stale == "reweight" and config.flow.mode == "async":
        reads.append("flow.stale: reweight")
    if config.buffer.jarzynski and config.flow.mode == "async":
        reads.append("buffer.jarzynski with flow.mode: async")
    if getattr(config.objective, "kl_weight", 0.0) > 0:
        reads.append("objective.kl_weight")
    if stated is None or not reads:
        return
    temperature = config.sampler.build().temperature
    if not math.isclose(stated, temperature, rel_tol=1e-3):
        yield (
            f"objective.temperature: expected the sampler's temperature {temperature:g} "
            f"({' and '.join(reads)} reads it), got {stated:g}; set objective.temperature: "
            f"{temperature:g}"
        )


def _check_warm_up(config: RunConfig) -> Iterator[str]:
    sampler = config.sampler
    if sampler.adapt_steps and not hasattr(sampler.build(), "target_acceptance"):
        yield (
            f"sampler.adapt_steps: {sampler.adapt_steps}, but {sampler.name} has no acceptance "  # type: ignore[attr-defined]
            "to aim at; set it to 0, or use mala, hmc, nuts, random_walk or discrete_langevin"
        )


def _check_recompute(config: RunConfig) -> Iterator[str]:
    if config.learner.recompute_activations and not _names(config.energy.model_dump()) & {
        "vit",
        "transformer_lm",
    }:
        yield (
            "learner.recompute_activations: true, but energy.name "
            f"{config.energy.name} has no transformer blocks; set it to false"  # type: ignore[attr-defined]
        )


def _names(section: object) -> set[str]:
    """Every `name` in a section and those nested in it: a composed energy names its parts."""
    if isinstance(section, Mapping):
        own = {section["name"]} if isinstance(section.get("name"), str) else set()
        return own.union(*(_names(value) for value in section.values()))
    if isinstance(section, list | tuple):
        return set().union(*(_names(value) for value in section))
    return set()


def _check_audit(config: RunConfig) -> Iterator[str]:
    audit = config.evaluation
    if audit.audit_every is None:
        if audit.audit_feedback:
            yield (
                "evaluation.audit_feedback: true, but no audit runs; set evaluation.audit_every, "
                "or audit_feedback: false"
            )
        return
    if audit.audit_steps <= config.sampler.num_steps:
        yield (
            f"evaluation.audit_steps: expected more than sampler.num_steps = "
            f"{config.sampler.num_steps}, ten times as many or more, got {audit.audit_steps}"
        )
    if audit.audit_chains < 2:
        yield (
            f"evaluation.audit_chains: expected 2 or more, 50 for its tests to see anything, got "
            f"{audit.audit_chains}"
        )
    if audit.audit_feedback and not config.objective.build().needs_negatives:
        yield (
            f"evaluation.audit_feedback: true, but objective.name {config.objective.name} takes no "  # type: ignore[attr-defined]
            "negatives; set it to false"
        )


def _check_jarzynski(config: RunConfig) -> Iterator[str]:
    if not config.buffer.jarzynski:
        return
    try:
        jarzynski.check_sampler(config.sampler)
        jarzynski.check_buffer(config.buffer.reinit_prob)
    except UserError as error:
        yield str(error)
    for key in ("reseed_stuck", "audit_feedback"):
        if getattr(config.evaluation, key):
            yield (
                f"evaluation.{key}: true, but the chains it adds have no Jarzynski weight; set it "
                "to false, or buffer.jarzynski: false"
            )
    if config.buffer.init != "noise":
        yield (
            f"buffer.init: {config.buffer.init}, but the Jarzynski correction needs chains that "
            "start from a known density; set buffer.init: noise, or buffer.jarzynski: false"
        )
    if not config.objective.build().needs_negatives:
        yield (
            f"buffer.jarzynski: true, but objective.name {config.objective.name} trains without "  # type: ignore[attr-defined]
            "chains; set it to false"
        )
    if config.buffer.storage != "float32":
        yield (
            f"buffer.storage: {config.buffer.storage}, but rounding moves chains by a law that "
            "Jarzynski weights do not know; set buffer.storage: float32, or buffer.jarzynski: false"
        )
    if config.sampler.precision != "fp32":
        yield (
            f"sampler.precision: {config.sampler.precision}, but Jarzynski weights add up energies "
            "over the whole run; set sampler.precision: fp32, or buffer.jarzynski: false"
        )
    if config.learner.accumulation > 1:
        yield (
            f"learner.accumulation: {config.learner.accumulation}, but Jarzynski weights are "
            "normalised over all negatives of an update at once; set it to 1, or "
            "buffer.jarzynski: false"
        )


def _round_up(number: int, step: int) -> int:
    return -(-number // step) * step


def _nearest_multiple(number: int, step: int) -> str:
    down = number // step * step
    return f"try {down} or {down + step}" if down else f"try {step}"


def check_event(config: RunConfig, spec: EventSpec) -> None:
    """Refuse sections that cannot work with the data's events.

    Raises:
        UserError: the energy, sampler or objective is not for such events, the objective reads
            labels that the data does not have or logits that the energy does not have, or
            nothing can be trained.
    """
    try:
        energy = config.energy.bind(spec)
        config.sampler.bind(spec)
        objective = config.objective.bind(spec).build()
        module = energy.build()
    except ValueError as error:
        raise UserError(" ".join(str(error).split())) from None
    _check_storage(config, spec)
    if objective.needs_labels and spec.num_classes is None:
        raise UserError(
            f"objective.name: {config.objective.name} reads labels, which {config.data.location} "  # type: ignore[attr-defined]
            "does not have; use labelled data, or objective.name: contrastive"
        )
    if objective.needs_labels and getattr(energy, "num_classes", None) is None:
        raise UserError(
            f"energy.num_classes: missing, but objective.name {config.objective.name} reads class "  # type: ignore[attr-defined]
            f"logits; set energy.num_classes: {spec.num_classes}"
        )
    if not any(p.requires_grad for m in (module, objective) for p in m.parameters()):
        raise UserError(
            f"energy.name: {energy.name} has no parameters to train; choose a network such as "  # type: ignore[attr-defined]
            "mlp, or set learnable: true where the energy has it"
        )


def _check_storage(config: RunConfig, spec: EventSpec) -> None:
    try:
        Codec.of(config.buffer.storage, spec)
    except ValueError as error:
        raise UserError(str(error)) from None
    if config.buffer.storage != "uint8" or spec.kind != "image":
        return
    low, high = getattr(config.sampler, "clamp", None) or (-math.inf, math.inf)
    if low < -1 or high > 1:
        raise UserError(
            "buffer.storage: uint8 holds images of [-1, 1], but sampler.clamp does not keep chains "
            "there; set sampler.clamp: [-1, 1], or buffer.storage: bfloat16"
        )
