"""Checks across config sections, and of the config against the data; one line per problem."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING

from ebm_dist.buffer.codec import Codec
from ebm_dist.config.checks_of_clock import check_clock, check_flow
from ebm_dist.config.checks_of_context import check_context, check_energy_context
from ebm_dist.config.checks_of_levels import check_levels
from ebm_dist.core.errors import UserError
from ebm_dist.core.plugins import modules_of
from ebm_dist.core.types import MAX_EVENT_NUMBERS, EventSpec
from ebm_dist.energies import EnergySection
from ebm_dist.energies.limits import MAX_PARTS, limited, numbers_in_memory
from ebm_dist.jarzynski import weights as jarzynski
from ebm_dist.samplers.traits import names_with

if TYPE_CHECKING:
    from ebm_dist.config.run_config import RunConfig


def check(config: RunConfig) -> Iterator[str]:
    """Conflicts between sections that are valid on their own, one line for each.

    Covers what the config file alone determines; `check_event` needs the data as well.
    """
    yield from _check_batch(config)
    yield from _check_buffer(config)
    yield from _check_step_budget(config)
    yield from _check_temperature(config)
    yield from _check_weights(config)
    yield from _check_jarzynski(config)
    yield from check_context(config)
    yield from check_clock(config)
    yield from check_levels(config)
    yield from _check_recompute(config)
    yield from _check_wire(config)
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
    if config.objective.takes_negatives and negatives % chains:
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
    # All negatives of an update are ready at once: whole leases, spread evenly over the shards.
    leases = -(-batch // chains)
    needed = -(-leases // shards) * chains
    if each < needed:
        yield (
            f"buffer.capacity: expected at least {needed * shards}, so that {shards} shards can "
            f"hold one update's {batch} negatives at once, got {capacity}; raise it, or lower "
            + ("data.batch_size" if config.buffer.num_negatives is None else "buffer.num_negatives")
        )


def _check_step_budget(config: RunConfig) -> Iterator[str]:
    """Bounds on MCMC steps per update that no schedule can meet."""
    low, high = config.flow.min_steps_per_update, config.flow.max_steps_per_update
    if low is None and high is None:
        return
    if not config.objective.takes_negatives:
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
    # Extra rounds need chains that are neither leased nor ready. In sync mode they run besides the
    # whole update's; in async mode one free lease per shard suffices.
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
    """Objective and sampler must have the same T, that of the model exp(-E/T)/Z."""
    objective, temperature = config.objective, config.sampler.law_temperature
    reweights = config.flow.mode == "async" and (
        config.flow.stale == "reweight" or config.buffer.jarzynski
    )
    if temperature == 0 and objective.reads_temperature(reweights=reweights):
        key = "noise_std" if getattr(config.sampler, "noise_std", None) == 0 else "temperature"
        yield (
            f"sampler.{key}: expected a number above 0, since objective.name "
            f"{objective.name} fits exp(-E/T)/Z at the sampler's T, got 0; raise it"  # type: ignore[attr-defined]
        )
        return
    stated = objective.temperature
    if stated is not None and not math.isclose(stated, temperature, rel_tol=1e-3):
        yield (
            f"objective.temperature: expected the model's, which is the sampler's T = "
            f"{temperature:g}, got {stated:g}; leave it out (objective.temperature=null), or "
            "change the sampler's"
        )


def _check_weights(config: RunConfig) -> Iterator[str]:
    """Weighted negatives are for an objective that reads the weights."""
    if config.objective.reweights or not config.objective.takes_negatives:
        return
    name = config.objective.name  # type: ignore[attr-defined]
    if config.flow.mode == "async" and config.flow.stale == "reweight":
        yield (
            f"flow.stale: reweight, but objective.name {name} may not weight its negatives; set "
            "flow.stale: repair"
        )
    if config.buffer.jarzynski:
        yield (
            f"buffer.jarzynski: true, but objective.name {name} may not weight its negatives; set "
            "it to false"
        )


def _check_wire(config: RunConfig) -> Iterator[str]:
    reweights = config.flow.stale == "reweight" and config.flow.mode == "async"
    if reweights and config.learner.wire != "float32":
        yield (
            f"learner.wire: {config.learner.wire}, but flow.stale: reweight compares the energies "
            "of workers with the learner's own; set learner.wire: float32, or flow.stale: repair"
        )


def _check_warm_up(config: RunConfig) -> Iterator[str]:
    sampler = config.sampler
    if sampler.adapt_steps and not hasattr(sampler.build(), "target_acceptance"):
        yield (
            f"sampler.adapt_steps: {sampler.adapt_steps}, but {sampler.name} has no acceptance "  # type: ignore[attr-defined]
            f"to aim at; set it to 0, or use {names_with('target_acceptance')}"
        )


def _check_recompute(config: RunConfig) -> Iterator[str]:
    if config.learner.recompute_activations and not any(
        part.recomputes_activations for part in config.energy.parts()
    ):
        yield (
            "learner.recompute_activations: true, but energy.name "
            f"{config.energy.name} has no transformer blocks; set it to false"  # type: ignore[attr-defined]
        )


def _check_audit(config: RunConfig) -> Iterator[str]:
    audit = config.evaluation
    if audit.audit_every is None:
        if audit.audit_feedback:
            yield (
                "evaluation.audit_feedback: true, but no audit runs; set evaluation.audit_every: "
                "1000, or evaluation.audit_feedback: false"
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
    if audit.audit_feedback and not config.objective.takes_negatives:
        yield (
            f"evaluation.audit_feedback: true, but objective.name {config.objective.name} takes no "  # type: ignore[attr-defined]
            "negatives; set it to false"
        )


def _check_jarzynski(config: RunConfig) -> Iterator[str]:
    if not config.buffer.jarzynski:
        return
    try:
        # To ask a sampler of the user imports it: `check_event` does, once a run begins.
        if not any(modules_of([config.sampler.model_dump()])):
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
    if not config.objective.takes_negatives:
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
    if config.learner.wire != "float32":
        yield (
            f"learner.wire: {config.learner.wire}, but the learner compares its own energies with "
            "those that Jarzynski weights began with; set learner.wire: float32, or "
            "buffer.jarzynski: false"
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
    """Refuse sections that do not fit the events of the data.

    Raises:
        UserError: the energy, sampler or objective does not support these events; the objective
            needs labels that the data lacks or logits that the energy lacks; or the model has
            nothing to train, or no activations to recompute.
    """
    _check_storage(config, spec)
    _check_sizes(config, spec)
    check_flow(config, spec)
    if config.buffer.jarzynski:
        jarzynski.check_sampler(config.sampler)
    try:
        with limited(max_parts=MAX_PARTS, max_numbers=numbers_in_memory()):
            energy = config.energy.bind(spec)
            config.sampler.bind(spec)
            objective = config.objective.bind(spec).build()
            module = energy.build()
            chain_energy = config.objective.chain_energy(module)
    except ValueError as error:
        raise UserError(" ".join(str(error).split())) from None
    check_energy_context(config, spec, chain_energy)
    if config.learner.recompute_activations and not any(
        hasattr(part, "recompute") for part in module.modules()
    ):  # only a network of the user gets here
        raise UserError(
            "learner.recompute_activations: true, but no module of the energy has an attribute "
            "`recompute`; set it to false, or give it to the modules that can recompute"
        )
    if objective.needs_labels and spec.num_classes is None:
        raise UserError(
            f"objective.name: {config.objective.name} reads labels, and {config.data.location} "  # type: ignore[attr-defined]
            "names no classes; set data.num_classes if it has labels, else use labelled data, or "
            "objective.name: contrastive"
        )
    reads_logits = objective.needs_labels and not hasattr(config.objective, "target")
    if reads_logits and getattr(energy, "num_classes", None) is None:
        raise UserError(
            f"energy.num_classes: missing, but objective.name {config.objective.name} reads class "  # type: ignore[attr-defined]
            f"logits; set energy.num_classes: {spec.num_classes}"
        )
    trained = any(p.requires_grad for m in (module, objective) for p in m.parameters())
    if not trained or next(module.parameters(), None) is None:
        raise UserError(_nothing_to_train(energy))


def _nothing_to_train(energy: EnergySection) -> str:
    if (target := getattr(energy, "target", None)) is not None:
        return (
            f"energy.target: {target} has no parameters to train; make it an nn.Module with an "
            "nn.Parameter that requires a gradient"
        )
    return (
        f"energy.name: {energy.name} has no parameters to train; choose a network such as mlp, or "  # type: ignore[attr-defined]
        "set learnable: true where the energy has it"
    )


def _check_sizes(config: RunConfig, spec: EventSpec) -> None:
    """Refuse numbers of events that do not fit into memory, before anything starts."""
    numbers = math.prod(spec.shape)
    if numbers > MAX_EVENT_NUMBERS:
        raise UserError(
            f"{config.data.location}: events of shape {spec.shape} have {numbers} numbers, at most "
            f"{MAX_EVENT_NUMBERS} are sampled; prepare smaller ones (ebm-dist data prepare "
            "imagefolder OUT --source DIR --resize 64)"
        )
    stored = Codec.of(config.buffer.storage, spec).dtype.itemsize
    counts = {
        "data.batch_size": (config.data.batch_size, 4),
        "buffer.num_negatives": (config.num_negatives, 4),
        "workers.num_chains": (config.workers.num_chains, 4),
        "evaluation.num_samples": (config.evaluation.num_samples, 4),
        "evaluation.num_grid": (config.evaluation.num_grid, 4),
        "evaluation.num_ais_chains": (config.evaluation.num_ais_chains, 4),
        "evaluation.audit_chains": (config.evaluation.audit_chains, 4),
    }
    # On a cluster the shards lie on other machines, so only the driver's own memory is checked.
    local = config.runtime.address == "local" and not os.environ.get("RAY_ADDRESS")
    if config.runtime.backend == "inline" or local:
        counts["buffer.capacity"] = (config.buffer.capacity, stored)
    room = 4 * numbers_in_memory()
    for key, (count, width) in counts.items():
        if (needed := count * numbers * width) > room:
            raise UserError(
                f"{key}: {count} events of shape {spec.shape} are {needed >> 30} GiB, this machine "
                f"has {room >> 30}; lower {key} to {room // (4 * numbers * width)} or less"
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
