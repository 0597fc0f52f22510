"""What the report advises can be done: its keys are the config's, and take another value."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest
import yaml

from ebm_dist.config.run_config import RunConfig, dump, load
from ebm_dist.diagnostics import LADDER
from ebm_dist.report.health import examine
from ebm_dist.report.html import render

ROOT = Path(__file__).parents[3]
SICK = {
    "loss/total": math.nan,
    "energy/positive": 1e5,
    "energy/negative": 1e5,
    "energy/noise": 5.0,
    "energy/test": 0.0,
    "sampler/acceptance": 0.05,
    "chain/self_transition": 0.95,
    "chain/stagnant": 0.5,
    "flow/lag_max": 9.0,
    "flow/dropped": 7.0,
    "flow/ess_ratio": 0.1,
    "wait/learner": 0.9,
    "buffer/free": 1.0,
    "buffer/leased": 1.0,
    "buffer/ready": 1.0,
    "buffer/capacity": 3.0,
    "buffer/expired_leases": 3.0,
    "audit/spurious": 0.5,
    "fidelity/class_ratio_3": 0.1,
}
DONE = re.compile(r"(raise|lower|set) ((?:\w+)\.(\w+))(?:: (\w+))?")


def advices(config: RunConfig, *, chains: bool = True) -> list[str]:
    """All that a run of `config` may be advised; without chains it logs nothing of a buffer."""
    complete = yaml.safe_load(dump(config))
    found = []
    # Of chains that stand still the advice depends on whether they refuse their moves.
    for gap, acceptance in ((-3.0, 0.05), (-3.0, 0.5), (3.0, 0.5)):
        logged = SICK | {"energy/gap": gap, "sampler/acceptance": acceptance}
        series = {name: [(0, value)] for name, value in logged.items()}
        if not chains:
            series = {name: pairs for name, pairs in series.items() if "buffer/" not in name}
        found += [finding.advice for finding in examine(series, complete) if finding.advice]
    return found


def followed(config: RunConfig, verb: str, path: str, value: str) -> str:
    """The override that does what is advised."""
    section, key = path.split(".")
    now = getattr(getattr(config, section), key)
    if value or now is None:
        return f"{path}={value or 1}"
    if verb == "lower":
        return f"{path}={max(1, now // 2) if isinstance(now, int) else now / 2}"
    return f"{path}={2 * now or 0.1}" if key != "reinit_prob" else f"{path}={min(1.0, now + 0.1)}"


@pytest.mark.parametrize(
    ("name", "chains"),
    [
        ("digits", True),
        ("toy/contrastive_short_run", True),
        ("toy/score_matching", False),
        ("toy/pseudo_likelihood", False),
    ],
)
def test_every_advice_of_the_report_is_taken_by_the_config(name: str, chains: bool) -> None:
    path = ROOT / "configs" / f"{name}.yaml"
    audited = ["evaluation.audit_every=100"]  # else there is nothing to say of audits
    config = load(path, audited)
    alternatives = [
        part for advice in advices(config, chains=chains) for part in advice.split(" or ")
    ]
    assert len(alternatives) > 10
    done = [DONE.match(part) for part in alternatives]
    assert sum(match is not None for match in done) > 5
    for match in filter(None, done):
        load(path, [*audited, followed(config, match[1], match[2], match[4] or "")])


def test_an_advice_names_the_one_noise_that_the_sampler_was_given() -> None:
    digits = " ".join(advices(load(ROOT / "configs" / "digits.yaml")))
    assert "raise sampler.noise_std" in digits
    assert "sampler.temperature" not in digits


def test_the_ladder_that_the_alarm_proposes_is_a_sampler() -> None:
    proposed = yaml.safe_load(LADDER[LADDER.index("{") :])
    digits = yaml.safe_load((ROOT / "configs" / "digits.yaml").read_text())
    assert load(digits | {"sampler": proposed}).sampler.name == "parallel_tempering"


def test_the_report_fits_its_advice_to_the_config_beside_it(tmp_path: Path) -> None:
    rows = '{"step": 1, "epoch": 0, "chain/stagnant": 0.5}\n'
    (tmp_path / "metrics.jsonl").write_text(rows)
    assert "raise sampler.temperature" in render(tmp_path)
    (tmp_path / "config.yaml").write_text(dump(load(ROOT / "configs" / "digits.yaml")))
    assert "raise sampler.temperature" not in render(tmp_path)


def test_counts_are_told_as_they_stood_at_the_end() -> None:
    series = {
        "flow/lag_max": [(step, 2.0) for step in range(100)],
        "flow/repaired": [(step, 10.0 * step) for step in range(100)],
    }
    (said,) = [finding.what for finding in examine(series) if "repaired" in finding.what]
    assert said == "lag at most 2 updates, 990 repaired"
