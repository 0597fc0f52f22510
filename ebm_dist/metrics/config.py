"""The config section of tracking: where metrics go besides the run directory."""

from __future__ import annotations

from typing import Literal

from pydantic import PositiveFloat, PositiveInt

from ebm_dist.section import Section


class TrackingConfig(Section):
    """Where metrics go besides `metrics.jsonl`, which is always written."""

    wandb: Literal["auto", "online", "offline", "off"] = "auto"
    """auto: online where a key is configured (WANDB_API_KEY, netrc, an identity token), else
    offline; WANDB_MODE decides where it is set. off: wandb is not imported."""

    project: str = "ebm_dist"
    """W&B project."""

    entity: str | None = None
    """W&B team or user; left out, the key's own default."""

    group: str | None = None
    """W&B group, for runs that belong together."""

    tags: tuple[str, ...] = ()
    """W&B tags."""

    log_every: PositiveInt = 10
    """Learner updates between two rows of metrics."""

    init_timeout: PositiveFloat = 20.0
    """Seconds one attempt to reach the W&B server may take. Training does not wait for it."""

    finish_timeout: PositiveFloat = 60.0
    """Seconds the end of a run waits for W&B; what is left then can be sent by `wandb sync`."""
