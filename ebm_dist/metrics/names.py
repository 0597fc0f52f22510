"""Every metric that a run may log: its name, meaning and unit.

The names are the same in `metrics.jsonl`, on W&B and on the dashboard. Tests call `unknown`, to
refuse names that are not listed here.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from ebm_dist.core.plugins import USER_METRICS


@dataclass(frozen=True, slots=True)
class Metric:
    """Meaning and unit of a metric.

    `unit` is "1" for ratios and other dimensionless numbers. `promised` names are part of the
    public interface; the others may change. `healthy` is the range of a healthy run, with an
    infinite end where that side has no limit; None if there is no such range. With `costs_time` a
    run outside that range is slower, not worse.
    """

    meaning: str
    unit: str = "1"
    promised: bool = False
    healthy: tuple[float, float] | None = None
    costs_time: bool = False


NONE = (0.0, 0.0)
"""The healthy range of what does not happen in a healthy run."""


OF_EACH_CLASS = "_K"
"""Ends the entry of a metric that each class has, under its number K."""

CLASS_RATIO = "fidelity/class_ratio" + OF_EACH_CLASS


def _promised(
    meaning: str,
    unit: str = "1",
    healthy: tuple[float, float] | None = None,
    *,
    costs_time: bool = False,
) -> Metric:
    return Metric(meaning, unit, promised=True, healthy=healthy, costs_time=costs_time)


METRICS: dict[str, Metric] = {
    # Energies. The unit "energy" is that of E(x), whose scale depends on the model.
    "energy/positive": _promised("mean energy of data under the learner's weights", "energy"),
    "energy/negative": _promised("mean energy of negatives under the learner's weights", "energy"),
    "energy/gap": _promised(
        "mean energy of data minus that of negatives; near 0 for a good model and also for "
        "chains that never left the data",
        "energy",
    ),
    "energy/noise": Metric("mean energy of the noise from which chains start", "energy"),
    "energy/test": Metric("mean energy of held-out data", "energy"),
    "energy/grad_norm": Metric("mean norm of dE/dx at the gradient penalty's points", "energy/x"),
    # Losses.
    "loss/total": _promised(
        "loss that the learner minimises; some objectives do not see the weights of far modes "
        "(docs/objectives.md), so check them by likelihood/log_prob"
    ),
    "loss/contrastive": Metric("the likelihood term: energy of data minus that of negatives"),
    "loss/energy_l2": Metric("penalty on the magnitude of energies, times its coefficient"),
    "loss/gradient_penalty": Metric("penalty on the norm of dE/dx, times its coefficient"),
    "loss/kl": Metric("KL term of improved contrastive divergence, times its coefficient"),
    "loss/spectral": Metric("penalty on spectral norms of the weights, times its coefficient"),
    "loss/classification": Metric("cross-entropy of the class logits", "nat"),
    "loss/critic": Metric("Donsker-Varadhan bound that the critic maximises", "nat"),
    "loss/flow": Metric("flow part of energy matching"),
    "objective/accuracy": Metric("accuracy in classifying labels, or data against noise"),
    # Sampler.
    "sampler/temperature": _promised(
        "temperature T of the chains, which sample exp(-E/T); noise_std^2 / (2 step_size) if the "
        "config gives noise_std",
        "energy",
    ),
    "sampler/curvature": Metric(
        "mean curvature a of E along the chains: trace of the Hessian / dimension", "energy/x^2"
    ),
    "sampler/effective_temperature": Metric(
        "temperature that chains without an accept step have at that curvature, 2T / (2 - a h) for "
        "Langevin; ignores clipping and clamping",
        "energy",
    ),
    "sampler/acceptance": _promised(
        "mean acceptance probability of proposed moves", healthy=(0.2, math.inf)
    ),
    "sampler/grad_norm": _promised("mean norm of dE/dx along the chains", "energy/x"),
    "sampler/displacement": Metric("mean distance that a chain moves in a round", "x"),
    "sampler/accepted": Metric("fraction of proposed moves that were accepted"),
    "sampler/tree_depth": Metric("doublings of a NUTS trajectory: 2^depth - 1 leapfrog steps"),
    "sampler/diverged": Metric(
        "fraction of NUTS trajectories on which the integrator diverged", healthy=NONE
    ),
    "sampler/swap_acceptance": Metric("mean acceptance of swaps between temperatures"),
    "sampler/swap_lowest": Metric("lowest acceptance of a swap between neighbouring temperatures"),
    "sampler/level_acceptance": Metric("mean acceptance of moves between levels"),
    "sampler/changed": Metric("fraction of sites whose value a sweep changed"),
    "sampler/move_temperature": Metric("temperature of an annealed chain's last move", "energy"),
    "sampler/kinetic": Metric("mean squared velocity of the chains; T at small steps", "energy"),
    # Chains.
    "chain/autocorrelation": _promised(
        "integrated autocorrelation time of the energy within a round, each chain about its own "
        "mean: (1 + rho) / (1 - rho) for an AR(1) chain, 1 for independent draws; for differences "
        "between chains see chain/rhat",
        "steps",
    ),
    "chain/ess": _promised(
        "effective sample size of a round's energies over all chains, with split chains as in "
        "arviz: chains that differ in mean or drift lower it",
        "draws",
    ),
    "chain/rhat": _promised(
        "split R-hat of a round's energies over chains; near 1 where a round is many "
        "autocorrelation times long",
        healthy=(-math.inf, 1.1),
    ),
    "chain/self_transition": _promised(
        "probability that a step does not move the chain", healthy=(-math.inf, 0.8)
    ),
    "chain/age_mean": _promised("mean number of rounds since a chain was started", "rounds"),
    "chain/arrived": Metric("share of the negatives that are objective.min_clock steps old"),
    "chain/level_occupancy": Metric(
        "chains at the emptiest level, in units of an equal share of the negatives"
    ),
    "chain/stagnant": Metric(
        "fraction of chains that are stuck by the stagnation test", healthy=(-math.inf, 0.2)
    ),
    "chain/trace_autocorrelation": Metric(
        "rounds of the traced chains per effective draw of positions, in the worst coordinate; "
        "chains that differ in mean raise it",
        "rounds",
    ),
    "chain/trace_ess": Metric(
        "effective sample size of the traced chains over rounds, in the worst coordinate", "draws"
    ),
    "chain/trace_rhat": Metric(
        "split R-hat of positions over rounds, in the worst coordinate", healthy=(-math.inf, 1.2)
    ),
    "chain/trace_energy_rhat": Metric(
        "split R-hat of energies over rounds, less the mean of each round, as the weights change",
        healthy=(-math.inf, 1.2),
    ),
    "chain/alarms": Metric("stagnation alarms so far", "count", healthy=NONE),
    "chain/reseeded": Metric("stuck chains restarted so far", "chains"),
    # Buffer. free + leased + ready == capacity.
    "buffer/free": _promised("chains that may be leased", "chains"),
    "buffer/leased": _promised("chains that a worker holds", "chains"),
    "buffer/ready": _promised("committed chains, ready for the learner", "chains"),
    "buffer/capacity": _promised("slots of all shards", "chains"),
    "buffer/late_checkins": _promised(
        "checkins refused so far because the lease was void", "count", healthy=NONE
    ),
    "buffer/expired_leases": _promised("leases expired so far", "count", healthy=NONE),
    # Flow between workers and learner.
    "flow/lag_mean": _promised("mean lag of negatives behind the learner's weights", "updates"),
    "flow/lag_max": _promised("greatest lag of a consumed negative", "updates"),
    "flow/repaired": _promised("stale chains moved further before use so far", "chains"),
    "flow/dropped": _promised("stale chains dropped so far", "chains", healthy=NONE),
    "flow/lost": Metric(
        "negatives lost so far with the node that held them", "chains", healthy=NONE
    ),
    "flow/ess_ratio": _promised(
        "effective fraction of the negatives after weighting, in (0, 1]", healthy=(0.3, math.inf)
    ),
    "flow/local_rounds": Metric("fraction of rounds so far that ran on the node of their shard"),
    "flow/rounds_by_rows": Metric("fraction of rounds so far on chains in shared memory"),
    "flow/mcmc_steps_per_update": _promised("chain steps per learner update", "steps"),
    "weights/version": _promised("version of the newest published weights", "updates"),
    # Speed.
    "throughput/updates_per_s": _promised("learner updates", "1/s"),
    "throughput/mcmc_steps_per_s": _promised("chain steps (chains x steps) of all workers", "1/s"),
    "wait/learner": _promised(
        "fraction of time that the learner waits for negatives",
        healthy=(-math.inf, 0.5),
        costs_time=True,
    ),
    "wait/worker": _promised(
        "fraction of time that workers are idle", healthy=(-math.inf, 0.5), costs_time=True
    ),
    # Likelihood.
    "likelihood/log_z": _promised("estimated log partition function", "nat"),
    "likelihood/log_z_std_error": Metric("standard error of that estimate", "nat"),
    "likelihood/log_z_lower": Metric(
        "log Z by annealing from the base distribution; a lower bound on average", "nat"
    ),
    "likelihood/log_z_upper": Metric(
        "log Z by annealing from the model; an upper bound on average", "nat"
    ),
    "likelihood/log_z_exact": Metric("log partition function by enumeration", "nat"),
    "likelihood/log_prob": _promised("mean log-likelihood of data under that estimate", "nat"),
    "likelihood/log_prob_exact": Metric("mean log-likelihood of data, exact", "nat"),
    "likelihood/log_prob_test": Metric("mean log-likelihood of held-out data", "nat"),
    "likelihood/ess_ratio": Metric("effective fraction of the chains under Jarzynski weights"),
    "likelihood/resampled": Metric("times the chains were resampled so far", "count"),
    # Learner.
    "learner/param_grad_norm": _promised("norm of the weights' gradient before clipping"),
    "learner/lr": Metric("learning rate in use"),
    # Sample quality during the run.
    "fidelity/distance": Metric(
        "Frechet distance of features between samples and held-out data; features of a small "
        "classifier trained on the same data"
    ),
    "fidelity/noise": Metric("fidelity/distance of the chains' initial noise"),
    "fidelity/gaussian": Metric("fidelity/distance of draws of one Gaussian fitted to the data"),
    "fidelity/train": Metric("fidelity/distance of training data, as of perfect samples"),
    "fidelity/confident": Metric(
        "share of samples that the feature classifier calls some class with probability .9 or more"
    ),
    "fidelity/confident_real": Metric("fidelity/confident of held-out images"),
    CLASS_RATIO: Metric(
        "share of samples that are of class K over that of held-out images, or of the labels that "
        "were asked for; left out where fewer than 10 samples would be of the class",
        healthy=(0.2, math.inf),
    ),
    "fidelity/class_share_min": Metric("share of samples of the rarest class"),
    "fidelity/class_share_max": Metric("share of samples of the commonest class"),
    "fidelity/label_accuracy": Metric("share of samples that are of the class asked for"),
    "fidelity/precision": Metric(
        "share of samples that lie among held-out images, in features; near that of real ones"
    ),
    "fidelity/recall": Metric("share of held-out images that lie among samples, in features"),
    "fidelity/nearest_train": Metric(
        "median distance of samples to the nearest training image, in features, over that of "
        "held-out images; near 0 where training images are copied"
    ),
    "fidelity/accuracy": Metric(
        "test accuracy of the feature classifier, which judges the samples; not that of the model"
    ),
    "classifier/accuracy": Metric(
        "test accuracy of the model's own class logits, of a run whose objective reads labels"
    ),
    # Auditor: very long chains off the training path.
    "audit/energy": Metric("mean energy at the end of the long chains", "energy"),
    "audit/energy_gap": Metric("mean energy of data minus that of the long chains", "energy"),
    "audit/spurious": Metric(
        "fraction of long chains with lower energy than data, far from it",
        healthy=(-math.inf, 0.05),
    ),
    "audit/law_distance": Metric(
        "largest Kolmogorov-Smirnov distance between long and short chains: energy, radius or "
        "projections"
    ),
    "audit/variance": Metric("variance over the long chains, mean over coordinates", "x^2"),
    "audit/variance_short": Metric("the same after as many steps as training takes", "x^2"),
    "audit/steps": Metric("steps taken by the long chains", "steps"),
    "audit/fed_back": Metric("spurious minima used as negatives so far", "chains"),
    # Faults.
    "fault/restarts": _promised("actors restarted so far", "count", healthy=NONE),
    "fault/rollbacks": Metric(
        "rollbacks so far because of non-finite numbers", "count", healthy=NONE
    ),
    "fault/skipped_samples": Metric(
        "samples left out so far because they could not be read (data.on_bad_sample: skip)",
        "count",
        healthy=NONE,
    ),
    "workers/alive": Metric("workers that hold weights and take rounds", "workers"),
    # The hub itself.
    "hub/dropped": Metric(
        "metric rows dropped so far because the queue was full", "rows", healthy=NONE
    ),
}

HISTOGRAMS: dict[str, Metric] = {
    "histogram/energy_negative": Metric("energies of negatives", "energy"),
    "histogram/age": Metric("age of chains", "rounds"),
}
"""Names for `MetricHub.histogram`."""

IMAGES: dict[str, Metric] = {
    "samples/chains": Metric("current chains of the buffer"),
    "samples/oldest": Metric("chains of the buffer that were started first"),
    "samples/newest": Metric("chains of the buffer that were started last"),
    "samples/lowest_energy": Metric("chains of the buffer with the lowest energies"),
    "samples/neighbours": Metric(
        "chains of the buffer, each with the 3 training images at its right that are nearest to it "
        "in features; copies of them show that training data are memorised"
    ),
}
"""Names for `MetricHub.images`."""

_NUMBER = re.compile(r"_[0-9]+\Z")
_USERS = Metric("reported by an objective or a sampler of the user")

FRAME = ("step", "epoch")
"""Fields of every row besides metrics: the learner's update and the epoch of the attempt."""


def describe(name: str) -> Metric | None:
    """The entry of `name`, or None if it is not a metric."""
    if name.startswith(USER_METRICS):
        return _USERS
    return METRICS.get(family(name))


def family(name: str) -> str:
    """The entry of METRICS that covers `name`: of a metric that each class has, the one with K."""
    entry = _NUMBER.sub(OF_EACH_CLASS, name)
    return entry if entry in METRICS else name


def names_of_classes(entry: str, known: Iterable[str]) -> list[str]:
    """Those of `known` that `entry` covers, in order of their classes."""
    return sorted((name for name in known if family(name) == entry), key=lambda n: (len(n), n))


def explained(values: Mapping[str, float]) -> list[list[str | float]]:
    """Name, value, unit and meaning of each finite metric."""
    return [
        [name, float(value), metric.unit, metric.meaning]
        for name, value in values.items()
        if (metric := describe(name)) is not None and math.isfinite(value)
    ]


def unknown(names: Iterable[str]) -> list[str]:
    """Those of `names` that are not metrics, sorted; `step` and `epoch` are known."""
    return sorted(name for name in names if name not in FRAME and describe(name) is None)
