"""Curves of a run's metrics, a picture for each group of names."""

from __future__ import annotations

import io
import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ebm_dist.core.errors import one_line
from ebm_dist.metrics.names import FRAME, describe
from ebm_dist.report.grid import new_figure

Pairs = list[tuple[int, float]]

MAX_OTHER_PANELS = 60
"""Pictures of metrics that no panel knows; each takes a tenth of a second."""


@dataclass(frozen=True, slots=True)
class Panel:
    """Metrics that are read together. `log` where they span decades."""

    title: str
    names: tuple[str, ...]
    log: bool = False
    about: str = field(default="", compare=False)


PANELS: dict[str, tuple[Panel, ...]] = {
    "Energy": (
        Panel("Energies", ("energy/positive", "energy/negative", "energy/test", "energy/noise")),
        Panel("Energy gap", ("energy/gap",), about="data minus negatives"),
        Panel(
            "Loss",
            (
                "loss/total",
                "loss/contrastive",
                "loss/energy_l2",
                "loss/gradient_penalty",
                "loss/kl",
                "loss/classification",
            ),
        ),
    ),
    "Sampler and chains": (
        Panel("Gradient along the chains", ("sampler/grad_norm",), log=True),
        Panel("Acceptance", ("sampler/acceptance",)),
        Panel("Chains that stand still", ("chain/self_transition", "chain/stagnant")),
        Panel("Displacement in a round", ("sampler/displacement",)),
        Panel("Autocorrelation time, steps", ("chain/autocorrelation",)),
        Panel("Effective sample size", ("chain/ess",), log=True),
        Panel("Split R-hat", ("chain/rhat",)),
        Panel("Age of chains, rounds", ("chain/age_mean",)),
        Panel("Temperature", ("sampler/temperature",), log=True),
    ),
    "Flow": (
        Panel("Lag, updates", ("flow/lag_mean", "flow/lag_max")),
        Panel("Stale chains so far", ("flow/repaired", "flow/dropped")),
        Panel("Effective share of negatives", ("flow/ess_ratio",)),
        Panel("MCMC steps per update", ("flow/mcmc_steps_per_update",)),
        Panel("Share of time spent waiting", ("wait/learner", "wait/worker")),
        Panel(
            "Buffer, chains", ("buffer/free", "buffer/leased", "buffer/ready", "buffer/capacity")
        ),
        Panel("Leases lost so far", ("buffer/late_checkins", "buffer/expired_leases")),
    ),
    "Speed": (
        Panel("MCMC steps per second", ("throughput/mcmc_steps_per_s",)),
        Panel("Updates per second", ("throughput/updates_per_s",)),
        Panel("Restarts so far", ("fault/restarts",)),
    ),
    "Learner": (
        Panel("Gradient in the weights", ("learner/param_grad_norm",), log=True),
        Panel("Learning rate", ("learner/lr",)),
        Panel("Version of the weights", ("weights/version",)),
    ),
    "Quality": (
        Panel(
            "Fréchet distance",
            ("fidelity/distance", "fidelity/train", "fidelity/gaussian", "fidelity/noise"),
            log=True,
        ),
        Panel("Log-likelihood, nats", ("likelihood/log_prob", "likelihood/log_prob_test")),
        Panel("log Z", ("likelihood/log_z", "likelihood/log_z_exact")),
        Panel("Long chains", ("audit/spurious", "audit/law_distance")),
    ),
}
"""What the report and the dashboard draw, section by section."""


def collect(rows: Iterable[Mapping[str, Any]]) -> dict[str, Pairs]:
    """Each metric's (step, value) pairs in order of step.

    Where a step comes twice the later row holds: it is the newer attempt's. null, which
    stands for what was not finite, becomes NaN. Values that are no numbers are left out.
    """
    series: dict[str, dict[int, float]] = {}
    for row in rows:
        step = row.get("step")
        if not isinstance(step, int) or isinstance(step, bool):
            continue
        for name, value in row.items():
            if name in FRAME or isinstance(value, bool):
                continue
            if value is None:
                value = math.nan
            if isinstance(value, int | float):
                series.setdefault(name, {})[step] = float(value)
    return {name: sorted(pairs.items()) for name, pairs in series.items()}


def other_panels(series: Mapping[str, Pairs]) -> tuple[Panel, ...]:
    """Panels for metrics of `series` that no panel above shows, one for each prefix."""
    shown = {name for panels in PANELS.values() for panel in panels for name in panel.names}
    groups: dict[str, list[str]] = {}
    for name in sorted(series):
        if name not in shown:
            groups.setdefault(name.split("/", 1)[0], []).append(name)
    panels = (
        Panel(f"{prefix}: {', '.join(n.split('/', 1)[-1] for n in part)}"[:60], tuple(part))
        for prefix, names in groups.items()
        for part in (names[i : i + 5] for i in range(0, len(names), 5))
    )
    return tuple(itertools.islice(panels, MAX_OTHER_PANELS))


def draw_panel(panel: Panel, series: Mapping[str, Pairs], *, dpi: int = 90) -> bytes | None:
    """`panel` as PNG bytes; None where none of its metrics was logged."""
    names = [name for name in panel.names if series.get(name)]
    if not names:
        return None
    figure = new_figure((4.4, 2.7))
    axes = figure.add_subplot()
    drawn: list[float] = []
    for name in names:
        steps, values = thin(series[name])
        # Beyond this the ticks of an axis overflow.
        values = [value if abs(value) < 1e100 else math.nan for value in values]
        drawn += [value for value in values if math.isfinite(value)]
        few = len(values) < 30
        axes.plot(
            steps, values, label=one_line(name)[:80], linewidth=1.2, marker="." if few else None
        )
    # A panel of one point on a log axis, or of zeros, would come out empty.
    if panel.log and drawn and min(drawn) > 0:
        axes.set_yscale("log")
    # A dollar sign in a name would be the start of a formula.
    axes.set_title(one_line(panel.title), fontsize=10, loc="left", parse_math=False)
    axes.set_xlabel("update", fontsize=8)
    units = {metric.unit for name in names if (metric := describe(name)) is not None}
    if len(units) == 1 and units != {"1"}:
        axes.set_ylabel(units.pop(), fontsize=8)
    axes.tick_params(labelsize=8)
    axes.grid(alpha=0.25)
    if len(names) > 1:
        for text in axes.legend(fontsize=7, framealpha=0.6).get_texts():
            text.set_parse_math(False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi, metadata={"Software": None})
    return buffer.getvalue()


def thin(pairs: Sequence[tuple[int, float]], most: int = 1500) -> tuple[list[int], list[float]]:
    """At most `most` points of `pairs`, evenly taken, first and last among them."""
    if len(pairs) > most:
        last = len(pairs) - 1
        pairs = [pairs[round(index * last / (most - 1))] for index in range(most)]
    return [step for step, _ in pairs], [value for _, value in pairs]


def panel_names() -> set[str]:
    """Every metric that a panel shows."""
    return {name for panels in PANELS.values() for panel in panels for name in panel.names}
