"""What chains carry beside their positions has to fit objective, energy and data."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from ebm_dist.core.errors import UserError
from ebm_dist.core.types import EventSpec
from ebm_dist.energies.context import CONTEXT, KEYS, how_to_take, trait

if TYPE_CHECKING:
    from ebm_dist.config.run_config import RunConfig

_VALUES = {"label": "data or uniform", "level": "stratified", "condition": "data"}

_READER = {
    "label": "objective.name: contrastive",
    "condition": "objective.name: contrastive",
    "level": "objective.name: contrastive_levels",
    "pair": "objective: {name: recovery_likelihood, chains: pool}",
}
"""Objectives of the package that read each."""

_NOISY_PAIRS = {
    "init": "condition",
    "context.level": "stratified",
    "context.pair": "data",
    "context.condition": "noisy_pair",
}
"""Keys of `buffer` for chains that start at noisy pairs."""


def check_context(config: RunConfig) -> Iterator[str]:
    yield from _check_noisy_pairs(config)
    names = config.buffer.context.names
    if not names:
        return
    objective, key = config.objective, f"buffer.context.{names[0]}"
    if not objective.takes_negatives:
        yield (
            f"{key}: set, but objective.name {objective.name} trains without chains; "  # type: ignore[attr-defined]
            "leave it out"
        )
        return
    for name in names:
        # A clock is for whoever looks at the chains.
        if name != "clock" and name not in objective.contexts:
            yield (
                f"buffer.context.{name}: set, but objective.name {objective.name} does not read "  # type: ignore[attr-defined]
                f"it; leave it out, or set {_READER[name]}"
            )
    if config.buffer.jarzynski:
        yield (
            f"{key}: set, but Jarzynski weights are resampled among chains of one law; leave it "
            "out, or set buffer.jarzynski: false"
        )
    beyond = [name for name in names if name not in ("label", "clock")]
    if config.evaluation.audit_every is not None and beyond:
        yield (
            f"evaluation.audit_every: {config.evaluation.audit_every}, but an audit knows nothing "
            f"of a chain's {beyond[0]} (buffer.context.{beyond[0]}); leave one of them out"
        )


def _check_noisy_pairs(config: RunConfig) -> Iterator[str]:
    """An objective that adds noise to data needs chains with noisy pairs, which no other has."""
    objective, buffer = config.objective, config.buffer.model_dump()
    name = f"objective.name {objective.name}"  # type: ignore[attr-defined]
    found = {key: _at(buffer, key) for key in _NOISY_PAIRS}
    lacking = {key: value for key, value in _NOISY_PAIRS.items() if found[key] != value}
    if objective.pair_noise is None:
        for key in ("init", "context.condition"):
            if key not in lacking:
                yield (
                    f"buffer.{key}: {found[key]}, but {name} makes no noisy pairs of data; leave "
                    "it out, or set objective: {name: recovery_likelihood, chains: pool}"
                )
        return
    if lacking:
        key, expected = next(iter(lacking.items()))
        yield (
            f"buffer.{key}: expected {expected}, which the chains of {name} need, got "
            f"{'nothing' if found[key] is None else found[key]}; set "
            + " and ".join(f"buffer.{key}: {value}" for key, value in lacking.items())
        )
    if config.buffer.reinit_prob == 0:
        yield (
            f"buffer.reinit_prob: 0, but the chains of {name} get new pairs of data when they "
            "restart; set it to 1 for new pairs each round, or to 0.05"
        )
    if config.buffer.storage != "float32":
        yield (
            f"buffer.storage: {config.buffer.storage} holds numbers of [-1, 1], and the chains of "
            f"{name} start at noisy data, which leave them; set it to float32"
        )
    if getattr(config.sampler, "clamp", None) is not None:
        yield (
            f"sampler.clamp: set, but the chains of {name} start at noisy data, which lie outside; "
            "leave it out"
        )
    if config.sampler.adapt_steps:
        yield (
            f"sampler.adapt_steps: {config.sampler.adapt_steps}, but the warm-up has no pairs as "
            f"the chains of {name} have; set it to 0"
        )


def _at(section: dict[str, Any], key: str) -> Any:
    for name in key.split("."):
        section = section[name]
    return section


def check_energy_context(config: RunConfig, spec: EventSpec, energy: object) -> None:
    """Refuse chains that carry what the energy does not take, or lack what it needs."""
    names = set(config.buffer.context.names)
    try:
        config.context_fields(spec)
    except ValueError as error:
        raise UserError(str(error)) from None
    takes, needs = trait(energy, "context"), trait(energy, "needs_context")
    size = config.data.condition_size
    of_energy = f"energy.name {config.energy.name}"  # type: ignore[attr-defined]
    own = config.energy.name == "module"  # type: ignore[attr-defined]
    of_objective = f"objective.name {config.objective.name}"  # type: ignore[attr-defined]
    if size is not None and "condition" not in takes:
        how = "set energy.condition_shape: data where the energy has that key"
        how = how_to_take("condition", own=True) if own else how
        raise UserError(
            f"data.condition_size: {size}, but {of_energy} takes no condition; {how}, or leave the "
            "key out"
        )
    if config.sampler.adapt_steps and needs:
        raise UserError(
            f"sampler.adapt_steps: {config.sampler.adapt_steps}, but the warm-up has no "
            f"{min(needs)}, which {of_energy} needs; set it to 0"
        )
    for name in CONTEXT:
        if name in names - takes:
            raise UserError(
                f"buffer.context.{name}: set, but {of_energy} takes no {name}; "
                f"{how_to_take(name, own=own)}, or leave the key out"
            )
        if name in needs - config.objective.contexts:
            key = "energy.target" if own else KEYS[name]
            out = f"leave {name} out of its needs_context" if own else "leave the key out"
            raise UserError(
                f"{key}: the energy needs the {name} of each event, which {of_objective} "
                f"does not give it; {out}, or sample the energy in Python by "
                + ("energies.bind" if own else "its method given")
            )
        if name in needs - names and config.objective.takes_negatives:
            raise UserError(
                f"buffer.context.{name}: missing, but {of_energy} needs the {name} of each chain; "
                f"set it to {_VALUES[name]}"
            )
