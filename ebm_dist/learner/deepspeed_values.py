"""Types and ranges of the options that `learner.deepspeed` passes on.

DeepSpeed has pydantic models of its own for two of these sections. They are not used, because
importing DeepSpeed fixes the accelerator of the process before the config has been read. A test
compares the two. The options that our config decides are absent; see `deepspeed_options.py`.
"""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from pydantic import ValidationError as Invalid

from ebm_dist.core.section import Section, nearest


class _Exact(Section):
    """Strict types, because DeepSpeed does not convert these values: `"no"` would be true."""

    model_config = ConfigDict(strict=True)


class ActivationCheckpointing(_Exact):
    partition_activations: bool = False
    number_checkpoints: PositiveInt | None = None
    contiguous_memory_optimization: bool = False
    cpu_checkpointing: bool = False
    profile: bool = False
    synchronize_checkpoint_boundary: bool = False


class FlopsProfiler(_Exact):
    enabled: bool = False
    recompute_fwd_factor: NonNegativeFloat = 0.0
    profile_step: PositiveInt = 1
    module_depth: Annotated[int, Field(ge=-1)] = -1
    top_modules: PositiveInt = 1
    detailed: bool = True
    output_file: str | None = None


class CommsLogger(Section):
    enabled: bool = False
    prof_all: bool = True
    prof_ops: list[Any] = Field(default_factory=list)
    verbose: bool = False
    debug: bool = False


class ZeroOptimization(Section):
    allgather_bucket_size: NonNegativeInt = 0
    allgather_partitions: bool = True
    contiguous_gradients: bool = True
    overlap_comm: bool | None = None
    reduce_bucket_size: PositiveInt = 1
    reduce_scatter: bool = True
    round_robin_gradients: bool = False
    use_multi_rank_bucket_allreduce: bool = True
    # For stage 3.
    stage3_allgather_sequential: bool = False
    stage3_max_live_parameters: NonNegativeInt = 0
    stage3_max_reuse_distance: NonNegativeInt = 0
    stage3_model_persistence_threshold: NonNegativeInt = 0
    stage3_module_granularity_threshold: int = 0
    stage3_param_persistence_threshold: NonNegativeInt = 0
    stage3_prefetch_bucket_size: NonNegativeInt = 0
    stage3_use_all_reduce_for_fetch_params: bool = False
    sub_group_size: NonNegativeInt = 0


class PassedOn(_Exact):
    activation_checkpointing: ActivationCheckpointing = ActivationCheckpointing()
    comms_logger: Annotated[CommsLogger, Field(strict=False)] = CommsLogger()
    communication_data_type: Literal["fp32", "fp16", "bf16"] | None = None
    disable_allgather: bool = False
    dump_state: bool = False
    flops_profiler: FlopsProfiler = FlopsProfiler()
    gradient_predivide_factor: PositiveFloat = 1.0
    memory_breakdown: bool = False
    prescale_gradients: bool = False
    wall_clock_breakdown: bool = False
    zero_optimization: Annotated[ZeroOptimization, Field(strict=False)] = ZeroOptimization()


def check_values(options: Mapping[str, Any]) -> None:
    """Refuse names that DeepSpeed does not know, at any depth, and values that it cannot use.

    Raises:
        ValueError: one line that names the key under `learner.deepspeed`.
    """
    try:
        PassedOn.model_validate(dict(options))
    except Invalid as error:
        fault = error.errors()[0]
        path = ".".join(map(str, fault["loc"]))
        if fault["type"] == "extra_forbidden":
            known = PassedOn if len(fault["loc"]) == 1 else _section(str(fault["loc"][0]))
            close = nearest(str(fault["loc"][-1]), known.model_fields)
            raise ValueError(f"{path}: unknown DeepSpeed option{close}") from None
        what = fault["msg"].replace("Input should be ", "expected ")
        what = what.replace("a valid boolean", "true or false")
        if fault["type"] in ("model_type", "model_attributes_type"):
            what = "expected a mapping of options"
        raise ValueError(f"{path}: {what}, got {reprlib.repr(fault['input'])}") from None


def _section(key: str) -> type[Section]:
    return type(PassedOn.model_fields[key].default)
