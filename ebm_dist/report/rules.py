"""The rules by which the report judges a run, one verdict each.

An advice is alternatives with ` or ` between them. `health.examine` leaves out those that the run's
config would refuse.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from ebm_dist.metrics.names import CLASS_RATIO, METRICS, names_of_classes

Series = Mapping[str, Sequence[tuple[int, float]]]
"""Metric name to its (step, value) pairs in order of step; a value may be NaN."""

TAIL = 0.2
"""Share of a run, at its end, that the verdicts look at: its youth is not its state."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One verdict. `advice` says what to change, in the config's own words; empty if ok."""

    state: Literal["ok", "note", "warn", "bad"]
    what: str
    advice: str = ""
    metric: str = ""
    """The metric whose curve shows it."""
    page: str = ""
    """Where the docs explain it: file#heading."""


def tail_of(pairs: Sequence[tuple[int, float]]) -> float:
    """Median of the last finite values; NaN where there is none."""
    values = [value for _, value in pairs if math.isfinite(value)]
    last = sorted(values[-max(1, math.ceil(len(values) * TAIL)) :])
    return last[len(last) // 2] if last else math.nan


Rule = Callable[[Series, Mapping[str, float]], Finding | None]

_SHORTER = "lower sampler.step_size or lower sampler.proposal_std or lower sampler.kernel.step_size"


def _refused(tails: Mapping[str, float]) -> bool:
    """Whether steps are too long: neither more of them nor a higher temperature helps then."""
    limits = METRICS["sampler/acceptance"].healthy
    acceptance = known(tails, "sampler/acceptance")
    return limits is not None and acceptance is not None and acceptance < limits[0]


def known(tails: Mapping[str, float], name: str) -> float | None:
    """The value of `name` at the end of the run, if it is finite."""
    value = tails.get(name, math.nan)
    return value if math.isfinite(value) else None


def _finite(series: Series, tails: Mapping[str, float]) -> Finding | None:
    names = [name for name in ("loss/total", "energy/gap", "energy/positive") if series.get(name)]
    if not names:
        return None
    broken = {
        name: next((step for step, value in series[name] if not math.isfinite(value)), None)
        for name in names
    }
    steps = [step for step in broken.values() if step is not None]
    if not steps:
        return Finding("ok", "losses and energies are finite")
    return Finding(
        "bad",
        f"{', '.join(name for name in names if broken[name] is not None)} not finite from "
        f"update {min(steps)} on",
        "lower learner.lr or set learner.grad_clip or raise objective.energy_l2 or go on from a "
        "checkpoint before that update",
    )


def _runs_away(tails: Mapping[str, float]) -> bool:
    """Whether energies are large and those of data and negatives part; a drift moves both alike."""
    ends = [known(tails, f"energy/{name}") or 0.0 for name in ("positive", "negative")]
    size = max(map(abs, ends))
    return size > 1e3 and abs(ends[0] - ends[1]) > 0.1 * size


def _bounded(series: Series, tails: Mapping[str, float]) -> Finding | None:
    positive, negative = known(tails, "energy/positive"), known(tails, "energy/negative")
    if positive is None or negative is None:
        return None
    size = max(abs(positive), abs(negative))
    both = f"data {positive:.3g}, negatives {negative:.3g}"
    if size <= 1e3:
        return Finding("ok", f"energies are bounded ({both})")
    advice = "raise objective.energy_l2 or raise objective.gradient_penalty or lower learner.lr"
    if _runs_away(tails):
        return Finding("bad", f"energies grow and part ({both}): the model runs away", advice)
    advice += " or leave it: the additive constant of E drifts when nothing holds it"
    return Finding("bad", f"energies have grown to {size:.3g}", advice)


def _acceptance(series: Series, tails: Mapping[str, float]) -> Finding | None:
    value = known(tails, "sampler/acceptance")
    if value is None:
        return None
    said = f"sampler/acceptance {value:.3g}"
    if not _refused(tails):
        return Finding("ok", said)
    state = "bad" if value < 0.05 else "warn"
    return Finding(state, f"{said}: most moves are refused, the steps are too long", _SHORTER)


def _gap(series: Series, tails: Mapping[str, float]) -> Finding | None:
    gap = known(tails, "energy/gap")
    noise, test = known(tails, "energy/noise"), known(tails, "energy/test")
    if gap is None or _runs_away(tails):
        return None
    # The gap is in units of energy, which a model scales at will: judge it against noise.
    scale = abs(noise - test) if noise is not None and test is not None else None
    if scale is not None and scale > 0 and gap < -0.5 * scale:
        return Finding(
            "bad",
            f"energy gap {gap:.3g}: negatives are nearly as bad as noise; the sampler loses",
            f"{_SHORTER} or lower learner.lr"
            if _refused(tails)
            else "raise sampler.num_steps or raise sampler.step_size or lower learner.lr",
        )
    if scale is not None and gap > 0.5 * scale:
        return Finding(
            "warn",
            f"energy gap {gap:.3g}: negatives lie deeper than data; chains may sit in "
            "spurious minima",
            "raise buffer.reinit_prob or raise sampler.noise_std or raise sampler.temperature or "
            "watch the sample grid",
        )
    return Finding("ok", f"energy gap {gap:.3g}")


def _between(
    name: str,
    too_low: tuple[str, str] | None,
    too_high: tuple[str, str] | None,
    *,
    state: Literal["note", "warn", "bad"] = "warn",
) -> Rule:
    """Judges `name` by its healthy range; an end without words cannot be passed."""
    limits = METRICS[name].healthy
    assert limits is not None

    def rule(series: Series, tails: Mapping[str, float]) -> Finding | None:
        value = known(tails, name)
        if value is None:
            return None
        if too_low is not None and value < limits[0]:
            return Finding(state, f"{name} {value:.3g}: {too_low[0]}", too_low[1])
        if too_high is not None and value > limits[1]:
            return Finding(state, f"{name} {value:.3g}: {too_high[0]}", too_high[1])
        return Finding("ok", f"{name} {value:.3g}")

    return rule


_STAGNANT = _between(
    "chain/stagnant",
    None,
    (
        "many chains are stuck",
        "raise sampler.temperature or raise sampler.noise_std or raise sampler.num_steps or raise "
        "buffer.reinit_prob",
    ),
    state="bad",
)


def _stagnant(series: Series, tails: Mapping[str, float]) -> Finding | None:
    finding = _STAGNANT(series, tails)
    if finding is None or finding.state == "ok" or not _refused(tails):
        return finding
    advice = f"{_SHORTER} or raise buffer.reinit_prob"
    return replace(finding, what=f"{finding.what}, they refuse their moves", advice=advice)


def _waits(series: Series, tails: Mapping[str, float]) -> Finding | None:
    share = known(tails, "wait/learner")
    if share is None:
        return None
    if share <= 0.5:
        return Finding("ok", f"wait/learner {share:.3g}")
    return Finding(
        "note",
        f"wait/learner {share:.3g}: the learner mostly waits for negatives; more workers on more "
        "cores make the run faster, not better",
        "raise workers.num_workers or lower sampler.num_steps",
    )


def _lag(series: Series, tails: Mapping[str, float]) -> Finding | None:
    dropped, repaired = _last(series, "flow/dropped"), _last(series, "flow/repaired")
    lag = known(tails, "flow/lag_max")
    if lag is None:
        return None
    if dropped:
        return Finding(
            "warn",
            f"{dropped:,.0f} chains were dropped as stale (greatest lag {lag:.3g})",
            "raise flow.max_lag or lower sampler.num_steps so that a round ends sooner or lower "
            "workers.num_chains for the same or set flow.stale: repair, which keeps them",
        )
    kept = f", {repaired:,.0f} repaired" if repaired else ""
    return Finding("ok", f"lag at most {lag:.3g} updates{kept}")


def _leases(series: Series, tails: Mapping[str, float]) -> Finding | None:
    names = ("free", "leased", "ready", "capacity")
    parts = [_last(series, f"buffer/{name}") for name in names]
    if any(part is None for part in parts) or not parts[-1]:
        return None  # not logged, or a run without chains
    free, leased, ready, capacity = (part or 0.0 for part in parts)
    if free + leased + ready != capacity:
        return Finding(
            "bad",
            f"chains are not conserved: {free:,.0f} free + {leased:,.0f} leased + "
            f"{ready:,.0f} ready is not {capacity:,.0f}",
            "this is a defect of the shards: keep the run directory and report it",
        )
    expired = _last(series, "buffer/expired_leases") or 0
    late = _last(series, "buffer/late_checkins") or 0
    if expired or late:
        return Finding(
            "warn",
            f"{expired:,.0f} leases expired, {late:,.0f} check-ins came too late",
            "raise buffer.lease_timeout_s or lower workers.num_chains or look at fault/restarts: "
            "workers are lost or slow",
        )
    return Finding("ok", f"all {capacity:,.0f} chains are accounted for")


def _last(series: Series, name: str) -> float | None:
    """The last finite value: of a count so far, the count."""
    values = [value for _, value in series.get(name) or () if math.isfinite(value)]
    return values[-1] if values else None


def _restarts(series: Series, tails: Mapping[str, float]) -> Finding | None:
    count = _last(series, "fault/restarts")
    if count is None:
        return None
    if count:
        return Finding("warn", f"{count:,.0f} actors were restarted", "see the run's log for why")
    return Finding("ok", "no actor was restarted")


def _spurious(series: Series, tails: Mapping[str, float]) -> Finding | None:
    share = known(tails, "audit/spurious")
    if share is None:
        return None
    limits = METRICS["audit/spurious"].healthy
    if limits is not None and share <= limits[1]:
        return Finding("ok", f"audit/spurious {share:.3g}")
    advice = "raise sampler.num_steps or lower learner.lr"
    if _last(series, "buffer/capacity"):  # else the objective takes no negatives
        advice += " or raise buffer.reinit_prob or set evaluation.audit_feedback: true"
    return Finding("bad", f"audit/spurious {share:.3g}: long chains end in spurious minima", advice)


def _fidelity(series: Series, tails: Mapping[str, float]) -> Finding | None:
    distance, gaussian = known(tails, "fidelity/distance"), known(tails, "fidelity/gaussian")
    if distance is None or gaussian is None:
        return None
    if distance >= gaussian:
        return Finding(
            "warn",
            f"fidelity/distance {distance:.3g} is no better than one Gaussian ({gaussian:.3g})",
            "train longer, or see the sampler's findings above: chains that do not reach data "
            "teach nothing about it",
        )
    return Finding("ok", f"fidelity/distance {distance:.3g}, one Gaussian has {gaussian:.3g}")


def _classes(series: Series, tails: Mapping[str, float]) -> Finding | None:
    limits = METRICS[CLASS_RATIO].healthy
    ratios = {
        name.rpartition("_")[2]: value
        for name in names_of_classes(CLASS_RATIO, series)
        if (value := known(tails, name)) is not None
    }
    if limits is None or not ratios:
        return None
    missed = [number for number, value in ratios.items() if value < limits[0]]
    if not missed:
        return Finding("ok", f"samples are of all {len(ratios)} classes")
    some = ", ".join(missed[:10]) + (" ..." if len(missed) > 10 else "")
    advice = "train longer or lower learner.lr"
    if _last(series, "buffer/capacity"):  # else the objective takes no negatives
        advice = "raise buffer.reinit_prob or raise sampler.num_steps or " + advice
    return Finding(
        "warn",
        f"samples miss {len(missed)} of {len(ratios)} classes ({some}): each has less than a fifth "
        "of its share of the data",
        advice,
    )


RULES: tuple[tuple[str, str, Rule], ...] = (
    ("loss/total", "docs/failures.md#Non-finite numbers and exploding energies", _finite),
    ("energy/positive", "docs/report.md#Energies that grow", _bounded),
    # Above its consequences: the gap of chains that cannot move, and chains that are stuck.
    ("sampler/acceptance", "docs/report.md#Acceptance", _acceptance),
    ("energy/gap", "docs/report.md#Energy gap", _gap),
    (
        "chain/self_transition",
        "docs/report.md#Chains that stand still",
        _between(
            "chain/self_transition",
            None,
            ("chains stand still", "lower sampler.step_size or raise buffer.reinit_prob"),
            state="bad",
        ),
    ),
    ("chain/stagnant", "docs/report.md#Chains that stand still", _stagnant),
    ("flow/lag_max", "docs/flow.md#Negatives that are too old", _lag),
    (
        "flow/ess_ratio",
        "docs/flow.md#Negatives that are too old",
        _between(
            "flow/ess_ratio",
            ("few negatives carry the weight", "lower flow.max_lag or set flow.stale: repair"),
            None,
        ),
    ),
    ("wait/learner", "docs/flow.md#How many workers", _waits),
    ("buffer/free", "docs/failures.md#A worker", _leases),
    ("fault/restarts", "docs/failures.md#What happens when something dies", _restarts),
    ("fidelity/distance", "docs/report.md#Sample quality", _fidelity),
    (CLASS_RATIO, "docs/report.md#Classes that samples miss", _classes),
    ("audit/spurious", "docs/report.md#Spurious minima", _spurious),
)
