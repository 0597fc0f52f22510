"""The `learner` section: how many ranks, which optimiser, how it is sharded, and its schedule."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

from pydantic import (
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    field_validator,
    model_validator,
)

from ebm_dist.core.section import Section
from ebm_dist.core.weights import WireName
from ebm_dist.learner.deepspeed_options import check_options

Fraction = Annotated[float, Field(ge=0.0, lt=1.0)]


class LearnerConfig(Section):
    """What one update of the weights is, and how it is spread over ranks."""

    num_ranks: PositiveInt = 1
    """DeepSpeed ranks. Each takes an equal slice of the global batch and of its negatives."""

    lr: PositiveFloat = 1.0e-4
    """Peak learning rate, reached at the end of the warm-up."""

    optimizer: Literal["adam", "adamw", "sgd"] = "adam"
    """`adam` adds weight_decay to the gradient (L2), `adamw` decays the weights themselves."""

    betas: tuple[Fraction, Fraction] = (0.9, 0.999)
    """Adam's decay rates. IGEBM's recipe is (0.0, 0.999)."""

    eps: PositiveFloat = 1.0e-8
    """Added to Adam's denominator."""

    momentum: Fraction = 0.0
    """Momentum of `sgd`; `adam` and `adamw` have betas instead."""

    weight_decay: NonNegativeFloat = 0.0

    schedule: Literal["constant", "cosine"] = "constant"
    """What the learning rate does after the warm-up."""

    warmup_steps: NonNegativeInt = 0
    """Updates over which the learning rate rises linearly to `lr`."""

    final_lr_fraction: Annotated[float, Field(ge=0.0, le=1.0)] = 0.0
    """`cosine` ends at this fraction of `lr`."""

    grad_clip: PositiveFloat | None = None
    """Largest global norm of the parameters' gradient; None does not clip."""

    zero_stage: Literal[0, 1, 2, 3] = 1
    """What DeepSpeed shards: 0 nothing, 1 optimiser state, 2 also gradients, 3 also weights. A
    single rank has nobody to shard with and runs as 0."""

    precision: Literal["fp32", "bf16"] = "fp32"
    """bf16 computes the networks in bfloat16; weights, gradients and optimiser stay float32."""

    wire: WireName = "float32"
    """What weights travel to workers as. bfloat16 halves the bytes between machines, for chains
    that move under weights rounded to 8 bits; on one machine float32 is faster, as it is read where
    it lies."""

    ema_decay: Fraction = 0.999
    """Decay an update of the averaged weights; 0 makes the average the weights themselves."""

    accumulation: PositiveInt = 1
    """Micro-batches an update. They must divide each rank's batch and its negatives."""

    recompute_activations: bool = False
    """Transformers: keep each block's input alone for the backward and run the block again there.
    Memory of one block in place of all, for about a third more time."""

    num_threads: PositiveInt | None = None
    """CPU threads of each rank; None shares the cores out."""

    timeout_s: PositiveFloat = 60.0
    """Seconds after which a collective that a rank does not join is an error."""

    gap_limit: PositiveFloat | None = None
    """Largest size of the energy gap (of the loss, for an objective that has no gap); an update
    past it is refused like one that is not finite. None refuses no finite one."""

    on_nonfinite: Literal["stop", "rollback"] = "stop"
    """What follows a loss, gradient or chain that is not finite, or a gap past gap_limit: the run
    ends with a diagnosis, or goes back to its last checkpoint, with new noise, data in another
    order and a smaller learning rate."""

    max_rollbacks: PositiveInt = 3
    """Times that `rollback` goes back before it ends the run."""

    rollback_lr_factor: Annotated[float, Field(gt=0.0, le=1.0)] = 0.5
    """What each going back multiplies the learning rate by, for the rest of the run."""

    port: Annotated[int, Field(ge=1, le=65535)] | None = None
    """TCP port on the node of rank 0 where the ranks meet, for a firewall between the nodes; a free
    one when left out. Their collectives then use ephemeral ports."""

    deepspeed: dict[str, Any] = Field(default_factory=dict)
    """Further DeepSpeed options, merged into those that this section decides."""

    @field_validator("deepspeed")
    @classmethod
    def _known_options(cls, options: dict[str, Any]) -> dict[str, Any]:
        check_options(options)
        return options

    @model_validator(mode="after")
    def _fits_together(self) -> LearnerConfig:
        if self.momentum and self.optimizer != "sgd":
            raise ValueError(
                f"momentum is for optimizer 'sgd', got momentum={self.momentum} with "
                f"{self.optimizer!r}; set betas instead"
            )
        # By value: a complete config, as a run writes it, has every default in it.
        betas = type(self).model_fields["betas"].default
        if self.optimizer == "sgd" and self.betas != betas:
            raise ValueError(
                "betas are for 'adam' and 'adamw', got them with optimizer 'sgd'; "
                "set momentum instead"
            )
        if self.final_lr_fraction and self.schedule == "constant":
            raise ValueError(
                f"final_lr_fraction is for schedule 'cosine', got {self.final_lr_fraction} with "
                "'constant'; set schedule: cosine or drop the key"
            )
        check_options(self.deepspeed, zero_stage=self.zero_stage)
        return self


def learning_rate(config: LearnerConfig, step: int, total_steps: int) -> float:
    """The learning rate of update `step` (counted from 0) in a run of `total_steps`.

    Rises linearly over `warmup_steps` updates, the last of which has the full `lr`, then stays
    or falls along half a cosine to `final_lr_fraction * lr` at the last update. A function of
    the step alone, so that a resumed run needs no scheduler state.
    """
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return config.lr
    span = max(total_steps - 1 - config.warmup_steps, 1)
    progress = min((step - config.warmup_steps) / span, 1.0)
    cosine = 0.5 * (1.0 + math.cos(math.pi * progress))
    return config.lr * (config.final_lr_fraction + (1.0 - config.final_lr_fraction) * cosine)
