"""The config section of tracking: where metrics go besides the run directory."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, PositiveFloat, PositiveInt

from ebm_dist.core.section import Section


def _short(text: str, most: int = 128) -> str:
    if not 0 < len(text) <= most:
        shown = text if len(text) < 40 else f"{text[:30]}..."
        raise ValueError(
            f"expected 1 to {most} characters, got {len(text)} ({shown!r}); shorten it"
        )
    return text


def _addressable(name: str) -> str:
    """A part of a page's address, of which W&B refuses these characters."""
    if set(name) & set("/\\#?%:"):
        raise ValueError(
            f"expected a name without / \\ # ? % : in it, got {name!r}; drop them (a team's "
            "name is tracking.entity, the project's tracking.project)"
        )
    return _short(name)


Name = Annotated[str, AfterValidator(_short)]
Addressable = Annotated[str, AfterValidator(_addressable)]
Tag = Annotated[str, AfterValidator(lambda tag: _short(tag, 64))]


class TrackingConfig(Section):
    """Where metrics go besides `metrics.jsonl`, which is always written."""

    wandb: Literal["auto", "online", "offline", "off"] = "auto"
    """auto: online where a key is configured (WANDB_API_KEY, netrc, an identity token), else
    offline; WANDB_MODE decides where it is set. off: wandb is not imported."""

    project: Addressable | None = None
    """W&B project; left out, WANDB_PROJECT where it is set, else ebm_dist."""

    entity: Addressable | None = None
    """W&B team or user; left out, WANDB_ENTITY where it is set, else the key's own default."""

    group: Name | None = None
    """W&B group, for runs that belong together; left out, WANDB_RUN_GROUP where it is set."""

    tags: tuple[Tag, ...] = ()
    """W&B tags, of at most 64 characters each; left out, WANDB_TAGS where it is set."""

    log_every: PositiveInt = 10
    """Learner updates between two rows of metrics."""

    init_timeout: PositiveFloat = 20.0
    """Seconds one attempt to reach the W&B server may take. Training does not wait for it."""

    finish_timeout: PositiveFloat = 60.0
    """Seconds the end of a run waits for W&B; what is left then can be sent by `wandb sync`."""
