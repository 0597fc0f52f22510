"""What chains carry beside their positions has to fit objective, energy and data."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from ebm_dist.core.errors import UserError
from ebm_dist.core.types import EventSpec
from ebm_dist.energies.context import CONTEXT, KEYS, trait

if TYPE_CHECKING:
    from ebm_dist.config.run_config import RunConfig

_VALUES = {"label": "data or uniform", "level": "stratified", "condition": "data"}


def check_context(config: RunConfig) -> Iterator[str]:
    names = config.buffer.context.names
    if not names:
        return
    objective, key = config.objective, f"buffer.context.{names[0]}"
    if not objective.takes_negatives:
        yield (
            f"{key}: set, but objective.name {objective.name} trains without chains; "  # type: ignore[attr-defined]
            "leave it out"
        )
    for name in names:
        # A clock is for whoever looks at the chains.
        if name != "clock" and name not in objective.contexts:
            yield (
                f"buffer.context.{name}: set, but objective.name {objective.name} does not read "  # type: ignore[attr-defined]
                "it; leave it out, or set objective.name: contrastive"
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


def check_energy_context(config: RunConfig, spec: EventSpec, energy: object) -> None:
    """Refuse chains that carry what the energy does not take, or lack what it needs."""
    names = set(config.buffer.context.names)
    try:
        config.context_fields(spec)
    except ValueError as error:
        raise UserError(str(error)) from None
    takes, needs = trait(energy, "context"), trait(energy, "needs_context")
    of_energy = f"energy.name {config.energy.name}"  # type: ignore[attr-defined]
    of_objective = f"objective.name {config.objective.name}"  # type: ignore[attr-defined]
    for name in CONTEXT:
        if name in names - takes:
            raise UserError(
                f"buffer.context.{name}: set, but {of_energy} takes no {name}; set {KEYS[name]} "
                "where the energy has such keys, or leave it out"
            )
        if name in needs - config.objective.contexts:
            raise UserError(
                f"{KEYS[name]}: the energy needs the {name} of each event, which {of_objective} "
                "does not give it; leave the key out, or sample the energy in Python by its "
                "method given"
            )
        if name in needs - names and config.objective.takes_negatives:
            raise UserError(
                f"buffer.context.{name}: missing, but {of_energy} needs the {name} of each chain; "
                f"set it to {_VALUES[name]}"
            )
