"""The sections that belong to no one part: the run, where it runs, its workers, and its order."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from ebm_dist.core.section import Section, UserPath


class RunSection(Section):
    """What the run is called, how long it is and where it is kept."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=100)] = "run"
    """Letters, digits, dot, dash and underscore: it names a directory and the W&B run."""

    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """Every stream of noise in the run is derived from it."""

    steps: PositiveInt = 1000
    """Learner updates in all, those before a resume included."""

    dir: Annotated[UserPath, Field(min_length=1)] = "runs"
    """The run is kept in dir/name unless --run-dir says otherwise."""


class RuntimeConfig(Section):
    """Where the graph runs."""

    backend: Literal["inline", "ray"] = "ray"
    """inline: every part in this process, no Ray. ray: actors on a Ray cluster."""

    address: str = "local"
    """local: start a Ray on this machine; auto: the running cluster of this machine;
    HOST:PORT: that cluster. RAY_ADDRESS wins where set."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto takes CUDA where there is a GPU at the start; cuda waits for the cluster's, as long as
    start_timeout_s."""

    start_timeout_s: PositiveFloat = 300.0
    """Seconds without another actor coming up after which a run that starts gives up, and what a
    worker that joins later may take. Eight processes that import torch from one network disk have
    taken more than 120."""

    cpus_per_worker: PositiveFloat = 1.0
    """Ray CPUs that a worker claims on a cluster; on a local Ray nothing is claimed."""

    object_store_mb: PositiveInt | None = None
    """Size of a local Ray's object store in MiB; sized from the config when left out."""


class WorkersConfig(Section):
    """The pool that moves the chains."""

    num_workers: PositiveInt = Field(default=1, le=100_000)
    """Worker actors; where an elastic pool begins."""

    min_workers: PositiveInt | None = None
    """The pool shrinks to this while workers have nothing to do; num_workers when left out."""

    max_workers: PositiveInt | None = None
    """The pool grows to this while the learner waits for negatives and Ray has room for another
    worker; num_workers when left out. One process (runtime.backend inline) has num_workers."""

    num_chains: PositiveInt = 64
    """Chains a worker moves in one round; the negatives of an update are a multiple of it."""

    num_threads: PositiveInt | None = None
    """Torch threads of a worker; the cores shared out when left out. Pin it alike on every
    machine where deterministic runs are to agree bit for bit."""

    @property
    def bounds(self) -> tuple[int, int]:
        """Fewest and most workers."""
        return self.min_workers or self.num_workers, self.max_workers or self.num_workers

    @model_validator(mode="after")
    def _ordered(self) -> WorkersConfig:
        low, high = self.bounds
        if not low <= self.num_workers <= high:
            raise ValueError(
                f"expected min_workers <= num_workers <= max_workers, got {low}, "
                f"{self.num_workers} and {high}; set num_workers to where the pool is to begin"
            )
        return self


class FlowConfig(Section):
    """The order in which sampling and learning take turns."""

    mode: Literal["sync", "async"] = "async"
    """sync: every update uses chains moved under its own weights, bit for bit the same however
    many workers there are. async: workers run ahead, within max_lag."""

    max_lag: PositiveInt = 8
    """Largest version(learner) - version(negatives) at consumption, in updates."""

    stale: Literal["repair", "reweight", "drop"] = "repair"
    """What happens to negatives past max_lag: a few more steps under today's weights, truncated
    self-normalised importance weights, or nothing but a count."""

    repair_steps: PositiveInt | None = None
    """MCMC steps of a repair; a quarter of sampler.num_steps when left out."""

    min_steps_per_update: PositiveFloat | None = None
    """The learner waits until the workers have taken this many MCMC steps (chains x steps) for each
    update, as flow/mcmc_steps_per_update counts them. What its negatives do not take goes to
    chains that stay in the buffer. Negatives of an update * sampler.num_steps when left out."""

    max_steps_per_update: PositiveFloat | None = None
    """Workers take no more MCMC steps than this for each update, on the average of the run. Where
    repairs and drops would, the learner waits for late rounds instead. No limit when left out."""

    stall_timeout_s: PositiveFloat = 300.0
    """Seconds without progress after which the run stops and names what it waited for."""

    @model_validator(mode="after")
    def _ordered(self) -> FlowConfig:
        low, high = self.min_steps_per_update, self.max_steps_per_update
        if low is not None and high is not None and low > high:
            raise ValueError(
                f"expected min_steps_per_update <= max_steps_per_update, got {low:g} > {high:g}"
            )
        return self
