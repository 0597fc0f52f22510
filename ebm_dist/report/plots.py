"""Which metrics are read together, and a run's rows as series."""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ebm_dist.metrics.names import CLASS_RATIO, FRAME, OF_EACH_CLASS, names_of_classes

Pairs = list[tuple[int, float]]

MAX_OTHER_PANELS = 60
"""Figures of metrics that no panel knows: a page stays one that a browser can show."""


@dataclass(frozen=True, slots=True)
class Panel:
    """Metrics that are read together. `log` where they span decades."""

    title: str
    names: tuple[str, ...]
    log: bool = False
    about: str = ""
    """What a healthy run's curves look like."""


FAULTS = "Faults"
"""The section of counts that stay at 0 while nothing fails."""

PANELS: dict[str, tuple[Panel, ...]] = {
    "Energy": (
        Panel(
            "Energies",
            ("energy/positive", "energy/negative", "energy/test", "energy/noise"),
            about="Data, negatives and held-out data stay together, and noise lies above them. A "
            "common drift is harmless: the model leaves the constant free.",
        ),
        Panel(
            "Energy gap",
            ("energy/gap",),
            about="Data minus negatives. It wavers about 0. Far below 0 the sampler cannot follow "
            "the model; far above 0 chains lie in minima that no data is near.",
        ),
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
            about="A contrastive loss wavers about 0 and says little of quality; others fall.",
        ),
    ),
    "Sampler and chains": (
        Panel(
            "Gradient along the chains",
            ("sampler/grad_norm",),
            log=True,
            about="It settles. Growth without end precedes energies that run away.",
        ),
        Panel("Acceptance", ("sampler/acceptance",), about="Too low: the step is too long."),
        Panel(
            "Chains that stand still",
            ("chain/self_transition", "chain/stagnant"),
            about="At the temperature of a sampler, stuck chains falsify the negatives. A "
            "short-run generator's chains keep their mode and are started anew.",
        ),
        Panel(
            "Displacement in a round",
            ("sampler/displacement",),
            about="Above the noise alone (noise_std times the root of steps and size) chains "
            "travel; at 0 they stand.",
        ),
        Panel(
            "Autocorrelation time, steps",
            ("chain/autocorrelation",),
            about="Shorter than a round's steps: a round gives a new draw.",
        ),
        Panel("Effective sample size", ("chain/ess",), log=True, about="More is better."),
        Panel(
            "Split R-hat",
            ("chain/rhat",),
            about="Within a round. It comes to about 1 where a round is 20 autocorrelation times "
            "long or more; a shorter round and labels raise it, which is no fault.",
        ),
        Panel(
            "Split R-hat over rounds",
            ("chain/trace_rhat", "chain/trace_energy_rhat"),
            about="Chains that cross between modes come to about 1; a short-run generator's do "
            "not cross.",
        ),
        Panel(
            "Age of chains, rounds",
            ("chain/age_mean",),
            about="It rises to about 1 / buffer.reinit_prob and stays there.",
        ),
        Panel(
            "Temperature",
            ("sampler/temperature",),
            log=True,
            about="That of the model exp(-E/T)/Z. It is constant.",
        ),
    ),
    "Flow": (
        Panel(
            "Lag, updates",
            ("flow/lag_mean", "flow/lag_max"),
            about="How old the weights are that moved the negatives; at most flow.max_lag.",
        ),
        Panel(
            "Stale chains so far",
            ("flow/repaired", "flow/dropped"),
            about="Repairs cost time, drops cost chains. Both stay few beside the chains used.",
        ),
        Panel(
            "Effective share of negatives",
            ("flow/ess_ratio",),
            about="With weights for stale negatives: how many still count.",
        ),
        Panel(
            "MCMC steps per update",
            ("flow/mcmc_steps_per_update",),
            about="Constant, by flow.min_steps_per_update and max_steps_per_update.",
        ),
        Panel(
            "Share of time spent waiting",
            ("wait/learner", "wait/worker"),
            about="Whoever waits less is the bottleneck. It is speed, not health.",
        ),
        Panel(
            "Buffer, chains",
            ("buffer/free", "buffer/leased", "buffer/ready", "buffer/capacity"),
            about="Free, leased and ready add up to the capacity.",
        ),
    ),
    "Speed": (
        Panel("MCMC steps per second", ("throughput/mcmc_steps_per_s",), about="Steady."),
        Panel("Updates per second", ("throughput/updates_per_s",), about="Steady."),
    ),
    "Learner": (
        Panel(
            "Gradient in the weights",
            ("learner/param_grad_norm",),
            log=True,
            about="Before clipping. Single peaks are harmless; a rising level is not.",
        ),
        Panel("Learning rate", ("learner/lr",), about="As learner.schedule has it."),
        Panel(
            "Version of the weights", ("weights/version",), about="A straight line: one an update."
        ),
    ),
    "Quality": (
        Panel(
            "Fréchet distance",
            ("fidelity/distance", "fidelity/train", "fidelity/gaussian", "fidelity/noise"),
            log=True,
            about="Falls from noise past one fitted Gaussian towards that of training data.",
        ),
        Panel(
            "Confidence of the classifier",
            ("fidelity/confident", "fidelity/confident_real"),
            about="Rises to that of held-out images. Above it samples are more typical of their "
            "class than real ones; far below it they are of none.",
        ),
        Panel(
            "Classes of samples",
            (CLASS_RATIO,),
            about="1: as often as in the data. Below the line samples miss the class.",
        ),
        Panel(
            "Rarest and commonest class",
            ("fidelity/class_share_min", "fidelity/class_share_max"),
            about="Shares of samples. Both come near the classes' shares in the data.",
        ),
        Panel(
            "Label accuracy",
            ("fidelity/label_accuracy", "fidelity/accuracy"),
            about="Of chains that carry a label: rises to the accuracy on held-out images.",
        ),
        Panel(
            "Precision and recall",
            ("fidelity/precision", "fidelity/recall"),
            about="Precision: samples look real. Recall: they cover the data. Both rise.",
        ),
        Panel(
            "Nearest training image",
            ("fidelity/nearest_train",),
            about="Near 1 for new images, near 0 for copies of training images.",
        ),
        Panel(
            "Log-likelihood, nats",
            ("likelihood/log_prob", "likelihood/log_prob_test"),
            about="Rises. Held-out data stay close to training data, or the model overfits.",
        ),
        Panel("log Z", ("likelihood/log_z", "likelihood/log_z_exact"), about="Estimate and truth."),
        Panel(
            "Long chains",
            ("audit/spurious", "audit/law_distance"),
            about="Chains run far longer than in training: where the model's law differs from "
            "what training shows.",
        ),
    ),
    FAULTS: (
        Panel("Restarts so far", ("fault/restarts",), about="0 on machines that stay."),
        Panel(
            "Rollbacks so far",
            ("fault/rollbacks",),
            about="Returns to a checkpoint because of numbers that were not finite.",
        ),
        Panel(
            "Leases lost so far",
            ("buffer/late_checkins", "buffer/expired_leases"),
            about="0 unless workers are lost or slow.",
        ),
        Panel(
            "Lost with a node so far, chains",
            ("flow/lost",),
            about="Negatives that were on a node which went.",
        ),
        Panel(
            "Samples left out so far",
            ("fault/skipped_samples",),
            about="They could not be read; ebm-dist data check names them.",
        ),
        Panel(
            "Rows of metrics dropped so far",
            ("hub/dropped",),
            about="The disk is too slow for tracking.log_every.",
        ),
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


def names_in(panel: Panel, known: Collection[str]) -> list[str]:
    """The panel's metrics; in place of one that each class has, those of `known`."""
    found = []
    for name in panel.names:
        if name.endswith(OF_EACH_CLASS):
            found += names_of_classes(name, known)
        else:
            found.append(name)
    return found


def other_panels(series: Mapping[str, Pairs]) -> tuple[Panel, ...]:
    """Panels for metrics of `series` that no panel above shows, one for each prefix."""
    shown = {
        name for panels in PANELS.values() for panel in panels for name in names_in(panel, series)
    }
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


def thin(pairs: Sequence[tuple[int, float]], most: int = 1500) -> tuple[list[int], list[float]]:
    """At most `most` points of `pairs`, evenly taken, first and last among them."""
    if len(pairs) > most:
        last = len(pairs) - 1
        pairs = [pairs[round(index * last / (most - 1))] for index in range(most)]
    return [step for step, _ in pairs], [value for _, value in pairs]
