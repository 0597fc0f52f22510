"""Builds the DeepSpeed config from ours, and checks the options in `learner.deepspeed`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ebm_dist.learner.deepspeed_values import ZeroOptimization, check_values

if TYPE_CHECKING:
    from ebm_dist.learner.config import LearnerConfig

_PRECISION = "learner.precision decides it"
_OPTIMIZER = "learner.optimizer, lr, betas and weight_decay decide it"
_BATCH = "data.batch_size, learner.num_ranks and learner.accumulation decide it"
_MONITOR = "the metric hub is the only writer; set tracking instead"
_MANIFEST = "the run keeps its own checkpoints; set checkpoint instead"

DECIDED: Mapping[str, str] = {
    "train_batch_size": _BATCH,
    "train_micro_batch_size_per_gpu": _BATCH,
    "gradient_accumulation_steps": _BATCH,
    "managed_gradient_accumulation": _BATCH,
    "optimizer": _OPTIMIZER,
    "scheduler": "learner.schedule and learner.warmup_steps decide it",
    "gradient_clipping": "learner.grad_clip decides it",
    "zero_allow_untested_optimizer": _OPTIMIZER,
    "zero_force_ds_cpu_optimizer": _OPTIMIZER,
    "fp16": _PRECISION,
    "bf16": _PRECISION,
    "amp": _PRECISION,
    "data_types": _PRECISION,
    "torch_autocast": _PRECISION,
    "check_overflow": "a loss that is not finite always stops the update",
    "gradient_allreduce_op": "ranks hold equal slices, so gradients are averaged",
    "steps_per_print": "the terminal shows the run's own progress",
    "checkpoint": _MANIFEST,
    "elasticity": "learner.num_ranks decides it",
    "tensorboard": _MONITOR,
    "wandb": _MONITOR,
    "csv_monitor": _MONITOR,
    "comet": _MONITOR,
    "zero_optimization.stage": "learner.zero_stage decides it",
    "zero_optimization.memory_efficient_linear": (
        "it is false always: DeepSpeed's own linear layer has no second derivative"
    ),
    "zero_optimization.compute_grad_norm": "learner.grad_clip decides it",
    "zero_optimization.offload_optimizer": (
        "unsupported: the gradient is checked and clipped where the weights are"
    ),
    "zero_optimization.offload_param": (
        "unsupported: the gradient is checked and clipped where the weights are"
    ),
    "zero_optimization.elastic_checkpoint": _MANIFEST,
    "zero_optimization.load_from_fp32_weights": _MANIFEST,
}
"""Options that `learner.deepspeed` may not set, with the reason for each."""

ZERO_STAGE_3 = frozenset(
    name for name in ZeroOptimization.model_fields if name.startswith(("stage3_", "sub_group_"))
)
"""Options that DeepSpeed reads at stage 3 only; at other stages it ignores them silently."""


def check_options(options: Mapping[str, Any], *, zero_stage: int | None = None) -> None:
    """Refuse options that our config sets, that the stage ignores, or that DeepSpeed cannot use.

    DeepSpeed silently ignores unknown keys, so a misspelt one would have no effect.

    Raises:
        ValueError: one line that names the key under `learner.deepspeed`.
    """
    for key, value in options.items():
        _refuse_decided(key)
        if key == "zero_optimization" and isinstance(value, Mapping):
            _check_zero(value, zero_stage)
    check_values(options)


def _check_zero(options: Mapping[str, Any], zero_stage: int | None) -> None:
    for key in options:
        path = f"zero_optimization.{key}"
        _refuse_decided(path)
        if key in ZERO_STAGE_3 and zero_stage is not None and zero_stage != 3:
            raise ValueError(
                f"{path}: only learner.zero_stage 3 reads it, got stage {zero_stage}; "
                "drop the key or change the stage"
            )


def _refuse_decided(path: str) -> None:
    if path in DECIDED:
        raise ValueError(f"{path}: not free to set, {DECIDED[path]}")


def deepspeed_options(
    config: LearnerConfig, *, zero_stage: int, world_size: int, num_parameters: int
) -> dict[str, Any]:
    """The config dictionary for `deepspeed.initialize`.

    The batch sizes in it count micro-batches, not events: DeepSpeed checks that they are
    consistent, and does not use them otherwise here.
    """
    # DeepSpeed allocates full buckets: its default of 5e8 numbers takes 2 GB even for a net of
    # 1e5. The size is a multiple of 1024 for its alignment.
    bucket = min(-(-(num_parameters + 2 * world_size) // 1024) * 1024, 500_000_000)
    zero: dict[str, Any] = {
        "reduce_bucket_size": bucket,
        "allgather_bucket_size": bucket,
        **config.deepspeed.get("zero_optimization", {}),
        "stage": zero_stage,
        # It has no second derivative, which gradient penalties need.
        "memory_efficient_linear": False,
    }
    if zero_stage in (1, 2):
        # Our engine computes the norm itself; stage 3 cannot switch DeepSpeed's off.
        zero["compute_grad_norm"] = False
    return {
        **{k: v for k, v in config.deepspeed.items() if k != "zero_optimization"},
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": config.accumulation,
        "train_batch_size": world_size * config.accumulation,
        # Our engine clips, by the norm that it computes for its finite check.
        "gradient_clipping": 0.0,
        "steps_per_print": None,
        "zero_allow_untested_optimizer": config.optimizer == "sgd",
        "timers": {"throughput": {"enabled": False}},
        "zero_optimization": zero,
    }
