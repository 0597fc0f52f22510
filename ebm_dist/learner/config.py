"""The `learner` section of the config: ranks, optimiser, sharding and learning-rate schedule."""

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
    """One update of the weights, and its distribution over ranks."""

    num_ranks: PositiveInt = 1
    """Number of DeepSpeed ranks. Each takes an equal slice of the global batch and negatives."""

    lr: PositiveFloat = 1.0e-4
    """Peak learning rate, reached at the end of the warm-up."""

    optimizer: Literal["adam", "adamw", "sgd"] = "adam"
    """`adam` adds weight_decay to the gradient (L2), `adamw` decays the weights themselves."""

    betas: tuple[Fraction, Fraction] = (0.9, 0.999)
    """Adam's decay rates. IGEBM's recipe is (0.0, 0.999)."""

    eps: PositiveFloat = 1.0e-8
    """Added to the denominator of Adam's update."""

    momentum: Fraction = 0.0
    """Momentum of `sgd`; `adam` and `adamw` have betas instead."""

    weight_decay: NonNegativeFloat = 0.0
    """Strength of the decay that `optimizer` describes; `sgd` adds it to the gradient."""

    schedule: Literal["constant", "cosine"] = "constant"
    """The learning rate after the warm-up."""

    warmup_steps: NonNegativeInt = 0
    """Updates over which the learning rate rises linearly to `lr`."""

    final_lr_fraction: Annotated[float, Field(ge=0.0, le=1.0)] = 0.0
    """`cosine` ends at this fraction of `lr`."""

    grad_clip: PositiveFloat | None = None
    """Clips the global norm of the parameters' gradient to this; None does not clip."""

    zero_stage: Literal[0, 1, 2, 3] = 1
    """ZeRO stage, that is, what DeepSpeed shards: 0 nothing, 1 optimiser state, 2 also gradients,
    3 also weights. A single rank always runs stage 0."""

    precision: Literal["fp32", "bf16"] = "fp32"
    """bf16 runs the networks in bfloat16; weights, gradients and optimiser state stay float32."""

    wire: WireName = "float32"
    """Number format of the weights that workers receive. bfloat16 halves the network traffic, but
    chains then move under weights rounded to 8 significant bits. On one machine float32 is faster,
    since workers read it from shared memory without a copy."""

    ema_decay: Fraction = 0.999
    """Decay per update of the exponential moving average of the weights; 0 does not average."""

    accumulation: PositiveInt = 1
    """Micro-batches per update; must divide each rank's batch and its negatives."""

    recompute_activations: bool = False
    """Activation checkpointing, for transformers: stores only each block's input and runs the block
    again in the backward. Takes the memory of one block instead of all, and about a third more
    time."""

    num_threads: PositiveInt | None = None
    """CPU threads of each rank; None divides the cores among the processes."""

    timeout_s: PositiveFloat = 60.0
    """Seconds after which a collective fails if a rank has not joined it."""

    gap_limit: PositiveFloat | None = None
    """Largest magnitude of the energy gap (of the loss, for an objective without a gap); an update
    beyond it is refused like a non-finite one. None accepts every finite value."""

    on_nonfinite: Literal["stop", "rollback"] = "stop"
    """What to do about a loss, gradient or chain that is not finite, or a gap beyond gap_limit.
    `stop` ends the run with a diagnosis. `rollback` returns to the last checkpoint and continues
    with other noise, another data order and a smaller learning rate."""

    max_rollbacks: PositiveInt = 3
    """Number of rollbacks after which the next fault ends the run."""

    rollback_lr_factor: Annotated[float, Field(gt=0.0, le=1.0)] = 0.5
    """Factor on the learning rate at each rollback, for the rest of the run."""

    port: Annotated[int, Field(ge=1, le=65535)] | None = None
    """TCP port of the rendezvous on the node of rank 0, for a firewall between the nodes; a free
    one when left out. Collectives still use ephemeral ports."""

    deepspeed: dict[str, Any] = Field(default_factory=dict)
    """Further DeepSpeed options, merged with those that this section sets. Offloading is refused,
    since gradients are checked and clipped where the weights are."""

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
        # Compared by value, since the config that a run writes holds every default.
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

    It rises linearly over `warmup_steps` updates, the last of which has the full `lr`, then stays
    constant or follows half a cosine to `final_lr_fraction * lr` at the last update. It depends on
    the step alone, so a resumed run needs no scheduler state.
    """
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return config.lr
    span = max(total_steps - 1 - config.warmup_steps, 1)
    progress = min((step - config.warmup_steps) / span, 1.0)
    cosine = 0.5 * (1.0 + math.cos(math.pi * progress))
    return config.lr * (config.final_lr_fraction + (1.0 - config.final_lr_fraction) * cosine)
