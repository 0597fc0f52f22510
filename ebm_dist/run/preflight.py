"""Checks before the start that find faults which would otherwise appear minutes later in actors."""

from __future__ import annotations

import importlib.util
import logging
import socket

from ebm_dist.actors.evaluator import wants_fidelity
from ebm_dist.cluster.access import (
    check_agreement,
    chosen_address,
    instead,
    refuse_second_ray,
    require_token,
    resolved,
    split_address,
)
from ebm_dist.cluster.ray_temp import private_temp_dir
from ebm_dist.config.run_config import RunConfig
from ebm_dist.core.errors import UserError, one_line
from ebm_dist.core.installed import how_to_install, require
from ebm_dist.data import describe, load_split
from ebm_dist.data.config import DataConfig
from ebm_dist.data.dataset import open_dataset
from ebm_dist.evaluation.fidelity import check_data
from ebm_dist.metrics.config import TrackingConfig
from ebm_dist.metrics.credentials import with_environment
from ebm_dist.samplers.compile.compiler import missing

CONNECT_TIMEOUT_S = 5.0

log = logging.getLogger("ebm_dist")


def preflight(config: RunConfig) -> None:
    """Refuse a run with faults in its data shards, Ray cluster, compiler or W&B names.

    Raises:
        UserError: a data shard is missing, truncated or altered; there is no test split to
            evaluate on; no Ray cluster answers at the address, or it needs a token, or other
            settings name another cluster; or sync mode needs a compiler that is missing.
    """
    require("deepspeed", *(["ray"] if config.runtime.backend == "ray" else []))
    check_samples(config.data)
    check_evaluation(config)
    check_compiler(config)
    check_tracking(config.tracking)
    if config.runtime.backend == "ray":
        refuse_second_ray()
        require_token(config.runtime.address)
        check_address(config.runtime.address)
        check_agreement(config.runtime.address)


def check_tracking(config: TrackingConfig) -> None:
    """Check the names for W&B and that TensorBoard's package is there."""
    if config.wandb != "off" and "wandb" in config.sinks:
        with_environment(config)
    if "tensorboard" in config.sinks and importlib.util.find_spec("tensorboard") is None:
        raise UserError(
            "tracking.sinks: tensorboard needs the package tensorboard, which is not installed; "
            f"{how_to_install('tensorboard')}, or leave it out of tracking.sinks"
        )


def check_samples(config: DataConfig) -> None:
    """Check every shard's presence and size, and the checksums or samples of a small data set."""
    for line in open_dataset(config).survey():
        log.warning("data: %s", one_line(line))


def check_evaluation(config: RunConfig) -> None:
    """Check that there is a test split, and that the data suits the classifier of `fidelity`."""
    if (every := config.evaluation.every) is None:
        return
    if not open_dataset(config.data).has("test"):
        raise UserError(
            f"evaluation.every: is {every}, but {config.data.location} has no test split to "
            "measure on; set data.holdout=0.1 to keep a tenth of the samples for it, name "
            f"{config.data.how_to_hold_out}, or set evaluation.every=null"
        )
    test, spec = load_split(config.data, "test", 4), describe(config.data)
    if wants_fidelity(config.evaluation, spec):
        try:
            check_data(load_split(config.data, "train", 4), test, spec)
        except ValueError as error:
            raise UserError(
                f"evaluation.fidelity: {error}; set evaluation.fidelity: false"
            ) from None


def check_compiler(config: RunConfig) -> None:
    """Check the compiler of this machine; workers elsewhere check theirs, with the same message."""
    if config.sampler.engine != "compiled" or config.flow.mode != "sync":
        return  # without a compiler, rounds fall back to single steps
    if (why := missing()) is not None:
        raise UserError(
            "sampler.engine: compiled, with flow.mode: sync, needs a compiler on every machine, "
            f"but {why}; or set sampler.engine: eager"
        )


def check_address(configured: str) -> None:
    """Check that a server answers at Ray's address, since Ray itself would retry for minutes.

    For a local Ray, check that its socket directory can be created.
    """
    address, key = chosen_address(configured)
    if address == "local":
        private_temp_dir()
        return
    if (address := resolved(address)) == "auto":
        raise UserError(
            f"{key}: auto, but this user has started no Ray on this machine; start one with "
            f"`ray start --head`, set {key}=HOST:PORT, or {instead(key)}"
        )
    host, port = split_address(address, key)
    try:
        socket.create_connection((host, port), timeout=CONNECT_TIMEOUT_S).close()
    except OSError as error:
        raise UserError(
            f"{key}: no Ray cluster answers at {address} ({error.strerror or error}); start one "
            f"with `ray start --head`, correct {key}, or {instead(key)}"
        ) from None
