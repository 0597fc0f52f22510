"""What is wrong with a run, read off its metrics, and what to change about it.

An advice is alternatives with ` or ` between them. Those with a key that the run's config does not
have, so that setting it would be refused, are left out.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ebm_dist.evaluation.regime import GENERATOR, is_short_run_generator
from ebm_dist.metrics.names import describe
from ebm_dist.report.rules import RULES, Finding, Series, known, tail_of

STATES = ("bad", "warn", "note", "ok")
"""The worst first. A note says how to read the run, and asks for nothing."""

OF_A_SAMPLER = frozenset(
    {
        "chain/rhat",
        "chain/self_transition",
        "chain/stagnant",
        "chain/trace_rhat",
        "chain/trace_energy_rhat",
        "chain/alarms",
    }
)
"""Metrics that are alarming only where chains are to sample the model's law."""

LONG_ROUND = 20
"""Autocorrelation times of a round from which on its R-hat is judged. The mean of half a round then
has a tenth of the energy's variance, so chains that agree have an R-hat of about 1.05."""


def examine(series: Series, config: Mapping[str, Any] | None = None) -> list[Finding]:
    """Findings about the end of a run, the worst first; what was not logged is not judged.

    Args:
        config: the run's, complete, for its regime and for advice that fits it.
    """
    tails = {name: tail_of(pairs) for name, pairs in series.items()}
    generator = _is_generator(tails, config or {})
    alone = _in_one_process(config or {})
    findings: list[Finding] = []
    for metric, page, rule in RULES:
        finding = rule(series, tails)
        if finding is None or (metric == "wait/learner" and alone):
            continue
        if generator and metric in OF_A_SAMPLER and finding.state != "ok":
            finding = Finding("note", f"{finding.what.split(':')[0]}: {GENERATOR}")
            page = "docs/report.md#Two regimes"
        findings.append(replace(finding, metric=metric, page=page if finding.state != "ok" else ""))
    if config is not None:
        findings = [replace(found, advice=_fitting(found.advice, config)) for found in findings]
    return sorted(findings, key=lambda finding: STATES.index(finding.state))


def judged(
    series: Series, config: Mapping[str, Any] | None = None
) -> dict[str, tuple[float, float]]:
    """The healthy range of each metric of `series` that has one in this run's regime."""
    config = config or {}
    tails = {name: tail_of(pairs) for name, pairs in series.items()}
    generator, alone = _is_generator(tails, config), _in_one_process(config)
    limits = {
        name: metric.healthy
        for name in series
        if (metric := describe(name)) is not None
        and metric.healthy is not None
        and not (generator and name in OF_A_SAMPLER)
        and (name != "chain/rhat" or _agree_in_a_round(tails, config))
        and not (alone and metric.costs_time)
    }
    flow = config.get("flow")
    max_lag = flow.get("max_lag") if isinstance(flow, Mapping) else None
    if isinstance(max_lag, int) and "flow/lag_max" in series:
        limits["flow/lag_max"] = (-math.inf, float(max_lag))
    return limits


def _agree_in_a_round(tails: Mapping[str, float], config: Mapping[str, Any]) -> bool:
    """Whether healthy chains agree within a round: they have one law, and the time to visit it."""
    sampler, buffer = config.get("sampler"), config.get("buffer")
    num_steps = sampler.get("num_steps") if isinstance(sampler, Mapping) else None
    context = buffer.get("context") if isinstance(buffer, Mapping) else None
    if isinstance(context, Mapping) and any(context.values()):
        return False
    time = known(tails, "chain/autocorrelation")
    return time is not None and isinstance(num_steps, int) and num_steps >= LONG_ROUND * time


def _in_one_process(config: Mapping[str, Any]) -> bool:
    """Whether the learner has to wait: more workers do not help then."""
    runtime = config.get("runtime")
    return isinstance(runtime, Mapping) and runtime.get("backend") == "inline"


def _is_generator(tails: Mapping[str, float], config: Mapping[str, Any]) -> bool:
    """The run's regime, by its config and the temperature that it logged, as far as known."""

    def said(section: str, key: str) -> float:
        part = config.get(section)
        value = part.get(key) if isinstance(part, dict) else None
        return value if isinstance(value, float) else math.nan

    temperature = known(tails, "sampler/temperature")
    if temperature is None:
        temperature = said("sampler", "temperature")
    if math.isnan(temperature) and (step := said("sampler", "step_size")) > 0:
        std = said("sampler", "noise_std")
        temperature = std * std / (2 * step)
    return is_short_run_generator(temperature, said("buffer", "reinit_prob"))


_KEY = re.compile(r"\b(buffer|evaluation|flow|learner|objective|sampler|workers)\.(\w+)")
_RIVALS = {"temperature": "noise_std", "noise_std": "temperature"}
"""A sampler is given either of them."""


def _fitting(advice: str, config: Mapping[str, Any]) -> str:
    def fits(alternative: str) -> bool:
        for part, key in _KEY.findall(alternative):
            section = config.get(part)
            if not isinstance(section, dict):
                continue
            if key not in section:
                return False
            rival = section.get(_RIVALS.get(key, ""))
            if part == "sampler" and section[key] is None and rival is not None:
                return False
            if key == "reinit_prob" and section.get("jarzynski") is True:
                return False  # a chain that starts anew has no weight
        return True

    return " or ".join(filter(fits, advice.split(" or ")))
