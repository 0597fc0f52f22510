"""The `tracking` section of the config: where metrics go, and how often they are logged."""

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
    """A name that W&B uses in the URL of a page, so it refuses some characters."""
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
    """Logging to Weights & Biases and TensorBoard. `metrics.jsonl` is always written."""

    sinks: tuple[Literal["wandb", "tensorboard"], ...] = ("wandb",)
    """Where metrics, images and histograms go besides the files of the run directory. tensorboard:
    event files in RUN/tensorboard; it needs the package tensorboard."""

    wandb: Literal["auto", "online", "offline", "off"] = "auto"
    """auto: WANDB_MODE if it is set; else online if a key is configured (WANDB_API_KEY, netrc, an
    identity token), else offline. off: wandb is not imported."""

    name: Name | None = None
    """Name of the W&B run; when left out, WANDB_NAME, else run.name."""

    project: Addressable | None = None
    """W&B project; when left out, WANDB_PROJECT, else ebm_dist."""

    entity: Addressable | None = None
    """W&B team or user; when left out, WANDB_ENTITY, else the default of the key."""

    group: Name | None = None
    """W&B group of related runs; when left out, WANDB_RUN_GROUP."""

    tags: tuple[Tag, ...] = ()
    """W&B tags of at most 64 characters each; when left out, WANDB_TAGS."""

    job_type: Name | None = None
    """W&B job type; when left out, WANDB_JOB_TYPE."""

    notes: str | None = None
    """Notes on the W&B run; when left out, WANDB_NOTES."""

    log_every: PositiveInt = 10
    """Learner updates between two rows of metrics."""

    artifacts: Literal["best", "final", "off"] = "best"
    """Models that W&B gets as artifacts. final: the export at the end of the run. best: before it
    also every checkpoint whose evaluation is the best so far, if one is written at that update. The
    data's description, not the data, is their input."""

    checkpoints: bool = False
    """Whether W&B also gets every checkpoint as an artifact, with chains and optimiser, so that
    another machine can start from it by `run.init_from`."""

    artifacts_mib: PositiveInt = 512
    """Most MiB of models that a run sends, and of checkpoints as many again; the final model is
    sent if it fits by itself."""

    init_timeout: PositiveFloat = 20.0
    """Timeout of one attempt to connect to W&B, in seconds. Training does not wait for it."""

    finish_timeout: PositiveFloat = 60.0
    """Seconds for which the end of a run waits for W&B, which is sent the last model then;
    `wandb sync` can send the rest later."""
