"""Config sections that no single part owns: `run`, `runtime`, `workers` and `flow`."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from ebm_dist.core.plugins import Target
from ebm_dist.core.section import Section, UserPath


class RunSection(Section):
    """Name, length and directory of the run."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=100)] = "run"
    """Name of the run's directory and of the W&B run: letters, digits, dot, dash, underscore."""

    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """Seed of the run; every stream of noise derives its own from it."""

    steps: PositiveInt = 1000
    """Total number of learner updates, including those before a resume."""

    dir: Annotated[UserPath, Field(min_length=1)] = "runs"
    """Parent of the run directory dir/name; --run-dir overrides both."""

    init_from: UserPath | None = None
    """Path from which a new run takes its initial weights: an export, a run directory (its newest
    valid checkpoint) or a checkpoint directory. A resumed run uses its own checkpoints and does not
    read it."""

    init_weights: Literal["ema", "last"] = "ema"
    """The weights to take from a checkpoint: the moving average, or those of the last update. An
    export holds the average only."""

    init_chains: bool = False
    """Also take the chains of init_from, for any capacity and number of shards. If they are fewer
    than buffer.capacity, the others start as buffer.init says."""

    init_optimizer: bool = False
    """Also take the optimiser's state and the objective's own parameters. Requires a checkpoint, as
    an export holds neither."""

    init_strict: bool = True
    """Refuse weights whose names or shapes differ from this run's. false takes those that fit, and
    the log names the others."""

    @model_validator(mode="after")
    def _init_from_something(self) -> RunSection:
        for key in ("init_chains", "init_optimizer"):
            if getattr(self, key) and self.init_from is None:
                raise ValueError(
                    f"{key}: true takes effect with init_from alone; set run.init_from to an "
                    f"export, a run or a checkpoint, or leave {key} out"
                )
        return self


class RuntimeConfig(Section):
    """Processes, machines and devices of the run."""

    backend: Literal["inline", "ray"] = "ray"
    """inline: every part runs in this process, without Ray. ray: actors on a Ray cluster."""

    address: str = "local"
    """local: start Ray on this machine; auto: join the cluster that runs on this machine;
    HOST:PORT: join that cluster. The environment variable RAY_ADDRESS overrides it."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: CUDA if the cluster has a GPU at the start, else CPU. cuda: wait for a GPU, up to
    start_timeout_s."""

    start_timeout_s: PositiveFloat = 300.0
    """A starting run gives up when no further actor has started for this many seconds. A worker
    that joins later has the same time. Eight processes that imported torch from one network disk
    took more than 120 s."""

    cpus_per_worker: PositiveFloat = 1.0
    """Ray CPUs that a worker requests on a cluster; a local Ray has no requests."""

    working_dir: UserPath | None = None
    """A directory that Ray ships to every node, and where actors then run: for packages of your own
    that are not installed there. Modules in it can be imported; keep data and runs out of it."""

    object_store_mb: PositiveInt | None = None
    """Size of a local Ray's object store in MiB; computed from the config when left out."""


class WorkersConfig(Section):
    """The pool of workers that move the chains."""

    num_workers: PositiveInt = Field(default=1, le=100_000)
    """Number of worker actors; the initial number if the pool is elastic."""

    min_workers: PositiveInt | None = None
    """The pool shrinks to this number while workers are idle; num_workers when left out."""

    max_workers: PositiveInt | None = None
    """The pool grows to this number while the learner waits for negatives and Ray has resources
    for another worker; num_workers when left out. runtime.backend inline ignores both bounds."""

    num_chains: PositiveInt = 64
    """Chains that a worker moves in one round; divides the negatives of an update."""

    num_threads: PositiveInt | None = None
    """Torch threads of a worker; the cores are divided among the processes when left out. For runs
    that agree bit for bit, set the same number on every machine."""

    @property
    def bounds(self) -> tuple[int, int]:
        """The smallest and the largest number of workers."""
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
    """How sampling and learning are coordinated."""

    mode: Literal["sync", "async"] = "async"
    """sync: every update uses chains moved under its own weights; the result is the same bit for
    bit for any number of workers. async: workers sample while the learner updates, and negatives
    lag by at most max_lag."""

    max_lag: PositiveInt = 8
    """Largest version(learner) - version(negatives) when an update uses them, in updates."""

    stale: Literal["repair", "reweight", "drop"] = "repair"
    """How to treat negatives beyond max_lag. repair: move them a few more steps under the current
    weights. reweight: use truncated self-normalised importance weights. drop: discard and count
    them."""

    repair_steps: PositiveInt | None = None
    """MCMC steps of a repair; a quarter of sampler.num_steps when left out."""

    min_steps_per_update: PositiveFloat | None = None
    """MCMC steps (chains x steps) that workers take at least per update, as
    flow/mcmc_steps_per_update counts them; the learner waits for them. Steps beyond those of the
    update's negatives move chains that stay in the buffer. When left out: negatives of an update *
    sampler.num_steps."""

    max_steps_per_update: PositiveFloat | None = None
    """MCMC steps that workers take at most per update, on average over the run. Where repairs and
    drops would exceed it, the learner waits for late rounds instead. No limit when left out."""

    stall_timeout_s: PositiveFloat = 300.0
    """Seconds without progress after which the run stops and reports what it waited for."""

    @model_validator(mode="after")
    def _ordered(self) -> FlowConfig:
        low, high = self.min_steps_per_update, self.max_steps_per_update
        if low is not None and high is not None and low > high:
            raise ValueError(
                f"expected min_steps_per_update <= max_steps_per_update, got {low:g} > {high:g}"
            )
        return self


class CallbackSection(Section):
    """A user's object whose hooks the driver calls during the run."""

    target: Target
    """`my_pkg.hooks:Stop`, a class or function that makes the object, which has some of
    on_update(step, metrics), on_evaluation(step, metrics), on_checkpoint(path), on_end(result)."""

    params: dict[str, Any] = Field(default_factory=dict)
    """Keyword arguments of the target."""
