"""Every metric a run may log: its name, what it means and its unit.

The names are the same in `metrics.jsonl`, on W&B and on the dashboard. A name that is not
here is a typing error until somebody adds it: `check` says so in tests.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from ebm_dist.core.section import nearest


@dataclass(frozen=True, slots=True)
class Metric:
    """What a number says.

    `unit` is "1" for ratios and pure numbers. `promised` names are part of the public
    surface; the others may change.
    """

    meaning: str
    unit: str = "1"
    promised: bool = False


def _promised(meaning: str, unit: str = "1") -> Metric:
    return Metric(meaning, unit, promised=True)


METRICS: dict[str, Metric] = {
    # Energies. Unit "energy" is that of E(x), which a model is free to scale.
    "energy/positive": _promised("mean energy of data under the learner's weights", "energy"),
    "energy/negative": _promised("mean energy of negatives under the learner's weights", "energy"),
    "energy/gap": _promised(
        "mean energy of data minus that of negatives; near 0 for a good model and also for "
        "chains that never left the data",
        "energy",
    ),
    "energy/noise": Metric("mean energy of the noise that chains start from", "energy"),
    "energy/test": Metric("mean energy of held-out data", "energy"),
    "energy/grad_norm": Metric("mean norm of dE/dx where the gradient penalty looks", "energy/x"),
    # Losses.
    "loss/total": _promised(
        "what the learner minimises; low does not mean that far modes have the data's weights, "
        "which some objectives do not see (docs/objectives.md): likelihood/log_prob does"
    ),
    "loss/contrastive": Metric("the likelihood term: energy of data minus that of negatives"),
    "loss/energy_l2": Metric("penalty on the size of energies, weighted"),
    "loss/gradient_penalty": Metric("penalty on the norm of dE/dx, weighted"),
    "loss/kl": Metric("the KL term of improved contrastive divergence, weighted"),
    "loss/spectral": Metric("penalty on spectral norms of the weights, weighted"),
    "loss/classification": Metric("cross-entropy of the class logits", "nat"),
    "loss/critic": Metric("Donsker-Varadhan bound that the critic maximises", "nat"),
    "loss/flow": Metric("flow part of energy matching"),
    "objective/accuracy": Metric("share of labels or of data-against-noise calls that are right"),
    # Sampler.
    "sampler/temperature": _promised(
        "temperature T of exp(-E/T) that the chains move at; noise_std^2 / (2 step_size) where "
        "the noise was given",
        "energy",
    ),
    "sampler/curvature": Metric(
        "mean curvature a of E along the chains: trace of the Hessian over its rows", "energy/x^2"
    ),
    "sampler/effective_temperature": Metric(
        "temperature of chains without an accept step at that curvature, 2T / (2 - a h) under "
        "Langevin; clipping and clamping are not counted",
        "energy",
    ),
    "sampler/acceptance": _promised("share of proposed moves that were accepted"),
    "sampler/grad_norm": _promised("mean norm of dE/dx along the chains", "energy/x"),
    "sampler/displacement": Metric("mean distance that a chain moves in a round", "x"),
    "sampler/accepted": Metric("share of proposed moves that were taken, as it fell out"),
    "sampler/tree_depth": Metric("doublings of a NUTS trajectory: 2^depth - 1 leapfrog steps"),
    "sampler/diverged": Metric("share of NUTS trajectories that the integrator left"),
    "sampler/swap_acceptance": Metric("mean acceptance of swaps between temperatures"),
    "sampler/swap_lowest": Metric("the lowest of them: the weakest rung of the ladder"),
    "sampler/changed": Metric("share of sites that a sweep gave another value"),
    "sampler/move_temperature": Metric("temperature of an annealed chain's last move", "energy"),
    "sampler/kinetic": Metric("mean squared velocity of the chains; T at small steps", "energy"),
    # Chains.
    "chain/autocorrelation": _promised(
        "integrated autocorrelation time of the energy along a round, of a chain about its own "
        "mean: (1 + rho) / (1 - rho) for an AR(1) chain, 1 for independent draws; differences "
        "between chains do not count, see chain/rhat",
        "steps",
    ),
    "chain/ess": _promised(
        "effective sample size of a round's energies over all chains, of chains cut in half as "
        "arviz does: chains that differ in mean or drift lower it",
        "draws",
    ),
    "chain/rhat": _promised("split R-hat of energies over chains; above 1.1 they disagree"),
    "chain/self_transition": _promised("probability that a step leaves the chain where it was"),
    "chain/age_mean": _promised("rounds a chain has lived since it was initialised", "rounds"),
    "chain/stagnant": Metric("share of chains that the stagnation test calls stuck"),
    "chain/trace_autocorrelation": Metric(
        "rounds of the followed chains for one effective draw of positions, the worst coordinate; "
        "chains that differ in mean raise it",
        "rounds",
    ),
    "chain/trace_ess": Metric(
        "effective sample size of the followed chains over rounds, the worst coordinate", "draws"
    ),
    "chain/trace_rhat": Metric("split R-hat of positions over rounds, the worst coordinate"),
    "chain/trace_energy_rhat": Metric(
        "split R-hat of energies over rounds, less the mean of each round, with which weights move"
    ),
    "chain/alarms": Metric("stagnation alarms so far", "count"),
    "chain/reseeded": Metric("stuck chains that were started anew so far", "chains"),
    # Buffer. free + leased + ready == capacity.
    "buffer/free": _promised("chains that may be leased", "chains"),
    "buffer/leased": _promised("chains that a worker holds", "chains"),
    "buffer/ready": _promised("committed chains that wait for the learner", "chains"),
    "buffer/capacity": _promised("slots of all shards", "chains"),
    "buffer/late_checkins": _promised("check-ins refused so far: lease void", "count"),
    "buffer/expired_leases": _promised("leases whose deadline passed so far", "count"),
    # Flow between workers and learner.
    "flow/lag_mean": _promised("mean versions between negatives and learner", "updates"),
    "flow/lag_max": _promised("greatest lag of a consumed negative", "updates"),
    "flow/repaired": _promised("stale chains given more steps so far", "chains"),
    "flow/dropped": _promised("stale chains dropped so far", "chains"),
    "flow/lost": Metric("negatives lost so far with the node that held them", "chains"),
    "flow/ess_ratio": _promised("effective share of the negatives after their weights, in (0, 1]"),
    "flow/local_rounds": Metric("share of rounds so far that ran on the node of their shard"),
    "flow/rounds_by_rows": Metric("share of rounds so far whose chains stayed in its memory"),
    "flow/mcmc_steps_per_update": _promised("chain steps taken for one learner update", "steps"),
    "weights/version": _promised("step of the newest published weights", "updates"),
    # Speed.
    "throughput/updates_per_s": _promised("learner updates", "1/s"),
    "throughput/mcmc_steps_per_s": _promised("chain steps (chains x steps) of all workers", "1/s"),
    "wait/learner": _promised("share of time that the learner waits for negatives"),
    "wait/worker": _promised("share of time that workers wait for leases or credits"),
    # Likelihood.
    "likelihood/log_z": _promised("estimated log partition function", "nat"),
    "likelihood/log_z_std_error": Metric("standard error of that estimate", "nat"),
    "likelihood/log_z_lower": Metric("annealed from the base law up: a bound in mean", "nat"),
    "likelihood/log_z_upper": Metric("annealed from the model down: a bound in mean", "nat"),
    "likelihood/log_z_exact": Metric("log partition function by enumeration", "nat"),
    "likelihood/log_prob": _promised("mean log-likelihood of data under that estimate", "nat"),
    "likelihood/log_prob_exact": Metric("mean log-likelihood of data, exact", "nat"),
    "likelihood/log_prob_test": Metric("mean log-likelihood of held-out data", "nat"),
    "likelihood/ess_ratio": Metric("effective share of the chains after Jarzynski weights"),
    "likelihood/resampled": Metric("times the chains were resampled so far", "count"),
    # Learner.
    "learner/param_grad_norm": _promised("norm of the loss gradient in the weights, unclipped"),
    "learner/lr": Metric("learning rate in use"),
    # Sample quality during the run.
    "fidelity/distance": Metric(
        "Frechet distance of features between samples and held-out data; features of a small "
        "classifier trained on the same data"
    ),
    "fidelity/noise": Metric("the same distance for the chains' initial noise"),
    "fidelity/gaussian": Metric("the same distance for draws of one Gaussian fitted to data"),
    "fidelity/train": Metric("the same distance for training data: what perfect samples reach"),
    "fidelity/accuracy": Metric("test accuracy of the classifier that gives the features"),
    # Auditor: very long chains off the training path.
    "audit/energy": Metric("mean energy at the end of the long chains", "energy"),
    "audit/energy_gap": Metric("mean energy of data minus that of the long chains", "energy"),
    "audit/spurious": Metric("share of long chains in a minimum deeper than data and far from it"),
    "audit/law_distance": Metric("distance between long-run and short-run law of the energy"),
    "audit/variance": Metric("variance over the long chains, mean over coordinates", "x^2"),
    "audit/variance_short": Metric("the same when they had run as long as training's", "x^2"),
    "audit/steps": Metric("steps that the long chains have taken", "steps"),
    "audit/fed_back": Metric("spurious minima handed back as negatives so far", "chains"),
    # Faults.
    "fault/restarts": _promised("actors restarted so far", "count"),
    "fault/rollbacks": Metric("times the run went back from numbers that were not finite", "count"),
    "workers/alive": Metric("workers that hold weights and take rounds", "workers"),
    # The hub itself.
    "hub/dropped": Metric("metric rows dropped so far because the queue was full", "rows"),
}

HISTOGRAMS: dict[str, Metric] = {
    "histogram/energy_negative": Metric("energies of negatives", "energy"),
    "histogram/age": Metric("age of chains", "rounds"),
}
"""Names for `MetricHub.histogram`."""

IMAGES: dict[str, Metric] = {
    "samples/chains": Metric("chains of the buffer as they stand"),
}
"""Names for `MetricHub.images`."""

FRAME = ("step", "epoch")
"""What every row holds besides metrics: the learner's update and the attempt's epoch."""


def describe(name: str) -> Metric | None:
    """What `name` means, or None where nobody has named it."""
    return METRICS.get(name)


def unknown(names: Iterable[str]) -> list[str]:
    """Those of `names` that are not metrics, sorted; `step` and `epoch` are known."""
    return sorted(name for name in names if name not in FRAME and describe(name) is None)


def check(values: Mapping[str, object] | Iterable[str]) -> None:
    """Raise ValueError where a name in `values` is not a metric's. For tests."""
    faults = [f"{name!r}{nearest(name, METRICS)}" for name in unknown(values)]
    if faults:
        raise ValueError(f"not in metrics/names.py: {', '.join(faults)}")
