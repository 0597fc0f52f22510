"""The learner's section: its schedule, and the options it passes to DeepSpeed or refuses."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from ebm_dist.cli import main
from ebm_dist.learner.config import LearnerConfig, learning_rate
from ebm_dist.learner.deepspeed_options import DECIDED, deepspeed_options
from ebm_dist.learner.deepspeed_values import (
    ActivationCheckpointing,
    CommsLogger,
    ZeroOptimization,
)


def test_warm_up_rises_linearly_and_ends_at_the_full_rate():
    config = LearnerConfig(lr=0.1, warmup_steps=4)
    rates = [learning_rate(config, step, 100) for step in range(6)]
    assert rates == pytest.approx([0.025, 0.05, 0.075, 0.1, 0.1, 0.1])


def test_constant_schedule_stays():
    config = LearnerConfig(lr=0.1)
    assert {learning_rate(config, step, 10) for step in range(10)} == {0.1}


def test_cosine_falls_from_the_full_rate_to_the_final_fraction():
    config = LearnerConfig(lr=0.1, warmup_steps=10, schedule="cosine", final_lr_fraction=0.2)
    rates = [learning_rate(config, step, 111) for step in range(10, 111)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[50] == pytest.approx(0.06)
    assert rates[-1] == pytest.approx(0.02)
    assert all(later < earlier for earlier, later in itertools.pairwise(rates))
    # A run that is continued past its end keeps the last rate.
    assert learning_rate(config, 500, 111) == pytest.approx(0.02)


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_schedules_of_very_short_runs_are_positive(steps: int):
    config = LearnerConfig(lr=0.1, warmup_steps=2, schedule="cosine", final_lr_fraction=0.1)
    assert all(learning_rate(config, step, steps) > 0 for step in range(steps))


def refusal(**fields: Any) -> str:
    with pytest.raises(ValidationError) as error:
        LearnerConfig(**fields)
    (fault,) = error.value.errors()
    assert "\n" not in fault["msg"]
    return f"{'.'.join(map(str, fault['loc']))}: {fault['msg']}"


@pytest.mark.parametrize("path", sorted(DECIDED))
def test_options_that_the_config_decides_are_refused_with_what_decides_them(path: str):
    first, _, rest = path.partition(".")
    text = refusal(deepspeed={first: {rest: 1} if rest else 1})
    assert text.startswith("deepspeed: ")
    assert path in text
    assert DECIDED[path] in text


@pytest.mark.parametrize("what", ["offload_optimizer", "offload_param"])
def test_deepspeeds_offloading_is_refused_in_one_line_with_the_reason(
    what: str, capsys: pytest.CaptureFixture[str]
):
    config = str(Path(__file__).parents[3] / "configs" / "digits.yaml")
    options = f"learner.deepspeed={{zero_optimization: {{{what}: {{device: cpu}}}}}}"
    assert main(["config", "show", config, options]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith(
        f"learner.deepspeed: zero_optimization.{what}: not free to set, unsupported: the gradient "
        "is checked and clipped where the weights are"
    )


def test_options_that_are_unsupported_are_explained_where_the_others_are():
    page = (Path(__file__).parents[3] / "docs" / "config.md").read_text(encoding="utf-8")
    section = page.split("## DeepSpeed's options")[1].split("\n## ")[0]
    unsupported = [path for path, reason in DECIDED.items() if reason.startswith("unsupported")]
    assert len(unsupported) == 2
    assert all(f"`{path}`" in section for path in unsupported)
    LearnerConfig(deepspeed=yaml.safe_load(section.split("`")[3]))  # the example is accepted


def test_unknown_options_are_refused_with_the_nearest_name():
    # DeepSpeed itself takes no notice of a key that it does not know.
    assert "did you mean 'prescale_gradients'" in refusal(deepspeed={"prescale_gradient": True})
    text = refusal(deepspeed={"zero_optimization": {"reduce_bucket": 1}})
    assert "zero_optimization.reduce_bucket" in text
    assert "did you mean 'reduce_bucket_size'" in text


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (
            {"zero_optimization": {"reduce_bucket_size": -5}},
            "zero_optimization.reduce_bucket_size: expected greater than 0, got -5",
        ),
        ({"wall_clock_breakdown": "maybe"}, "wall_clock_breakdown: expected true or false, got"),
        ({"dump_state": "no"}, "dump_state: expected true or false, got 'no'"),  # a true string
        ({"gradient_predivide_factor": 0}, "gradient_predivide_factor: expected greater than 0"),
        ({"communication_data_type": "int8"}, "communication_data_type: expected 'fp32', 'fp16'"),
        (
            {"flops_profiler": {"profile_step": "1"}},
            "flops_profiler.profile_step: expected a valid",
        ),
        ({"comms_logger": [1]}, "comms_logger: expected a mapping of options, got [1]"),
        (
            {"activation_checkpointing": {"partition_activationss": True}},
            "activation_checkpointing.partition_activationss: unknown DeepSpeed option; did you "
            "mean 'partition_activations'?",
        ),
    ],
)
def test_values_that_deepspeed_cannot_use_are_refused_before_it_is_imported(
    options: dict[str, Any], says: str
):
    assert says in refusal(deepspeed=options)


def test_the_options_passed_on_are_judged_as_deepspeed_judges_them():
    from deepspeed.comm.config import CommsLoggerConfig
    from deepspeed.runtime.activation_checkpointing.config import ACT_CHKPT_DEFAULT
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    def takes(build: Any, **options: Any) -> bool:
        try:
            build(**options)
        except (ValidationError, ValueError):
            return False
        return True

    values = (-5, -1, 0, 1, 5e8, 0.5, True, "yes", "maybe", "7", None, [], {})
    for ours, theirs in ((ZeroOptimization, DeepSpeedZeroConfig), (CommsLogger, CommsLoggerConfig)):
        for name in ours.model_fields:
            for value in values:
                expected = takes(theirs, **{name: value})
                assert takes(ours, **{name: value}) == expected, (name, value)
    assert set(ActivationCheckpointing.model_fields) == set(ACT_CHKPT_DEFAULT)


def test_stage_3_options_are_refused_where_they_do_nothing():
    options = {"zero_optimization": {"stage3_max_live_parameters": 10}}
    assert "learner.zero_stage 3" in refusal(zero_stage=1, deepspeed=options)
    assert LearnerConfig(zero_stage=3, deepspeed=options).deepspeed == options


@pytest.mark.parametrize(
    ("fields", "word"),
    [
        ({"optimizer": "adam", "momentum": 0.9}, "momentum"),
        ({"optimizer": "sgd", "betas": (0.0, 0.9)}, "betas"),
        ({"final_lr_fraction": 0.5}, "cosine"),
        ({"zero_stage": 4}, "zero_stage"),
        ({"precision": "fp16"}, "precision"),
        ({"betas": (0.9, 1.0)}, "betas"),
        ({"lr": 0.0}, "lr"),
        ({"num_ranks": 0}, "num_ranks"),
        ({"accumulation": 0}, "accumulation"),
        ({"timeout_s": 0}, "timeout_s"),
        ({"ema_decay": 1.0}, "ema_decay"),
        ({"deepspeed": {"zero_optimization": 3}}, "mapping"),
    ],
)
def test_settings_that_cannot_work_are_refused(fields: dict[str, Any], word: str):
    assert word in refusal(**fields)


def test_passed_options_reach_deepspeed_beside_the_decided_ones():
    config = LearnerConfig(
        zero_stage=3,
        accumulation=2,
        deepspeed={
            "prescale_gradients": True,
            "zero_optimization": {"overlap_comm": False, "reduce_bucket_size": 2048},
        },
    )
    options = deepspeed_options(config, zero_stage=3, world_size=4, num_parameters=100)
    assert options["prescale_gradients"] is True
    assert options["train_batch_size"] == 8
    zero = options["zero_optimization"]
    assert zero["stage"] == 3
    assert zero["overlap_comm"] is False
    assert zero["reduce_bucket_size"] == 2048
    assert zero["memory_efficient_linear"] is False


def test_buckets_are_no_larger_than_the_weights_need():
    options = deepspeed_options(LearnerConfig(), zero_stage=1, world_size=2, num_parameters=5000)
    assert 5000 <= options["zero_optimization"]["reduce_bucket_size"] <= 6144


@pytest.mark.parametrize("port", [0, -1, 65536, "x"])
def test_a_port_that_cannot_be_is_refused(port: Any):
    with pytest.raises(ValidationError, match="port"):
        LearnerConfig(port=port)
