"""The process group of the learner ranks, and the import of DeepSpeed."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections import defaultdict
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from ebm_dist.core.errors import RunFailed

_RANK_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


def numbered(device: torch.device | str) -> torch.device:
    """`device` with its index, for CUDA: `torch.cuda.set_device` refuses a device without one."""
    device = torch.device(device)
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return device


class Group:
    """Membership of this process in the group of ranks, from `join` to `leave`."""

    def __init__(self, rank: int, world_size: int, device: torch.device) -> None:
        self.rank = rank
        self.world_size = world_size
        self.device = device
        self._joined = False
        self._environment = {name: os.environ.get(name) for name in _RANK_VARIABLES}
        self._excepthook = sys.excepthook
        self.deepspeed = quiet_deepspeed(device)

    def join(self, master_addr: str, master_port: int, timeout_s: float) -> None:
        """Join the group. Collectives get a timeout, so that a lost rank is an error, not a hang.

        Raises:
            RunFailed: the ranks did not find each other within `timeout_s`.
        """
        if dist.is_initialized():
            raise RunFailed(
                "this process is in a torch.distributed group already; close the other engine "
                "first, or run the learner in a process of its own"
            )
        backend = "nccl" if self.device.type == "cuda" else "gloo"
        timeout = timedelta(seconds=timeout_s)
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        # A single rank needs no port.
        where: dict[str, Any] = (
            {"store": dist.HashStore()}
            if self.world_size == 1
            else {"init_method": f"tcp://{master_addr}:{master_port}"}
        )
        try:
            dist.init_process_group(
                backend, rank=self.rank, world_size=self.world_size, timeout=timeout, **where
            )
        except (RuntimeError, ValueError) as error:
            raise RunFailed(
                f"learner rank {self.rank} of {self.world_size} could not join "
                f"{master_addr}:{master_port} within {timeout_s:g} s: {error}; check "
                "that the port is free, that every rank runs, and GLOO_SOCKET_IFNAME"
            ) from error
        self._joined = True
        # DeepSpeed reads the rank from these variables.
        os.environ.update(
            RANK=str(self.rank),
            WORLD_SIZE=str(self.world_size),
            LOCAL_RANK=str(self.device.index or 0),
            MASTER_ADDR=master_addr,
            MASTER_PORT=str(master_port),
        )
        self.deepspeed.init_distributed(
            dist_backend=backend, auto_mpi_discovery=False, verbose=False, timeout=timeout
        )

    def leave(self) -> None:
        """Undo `join`, so that this process can join another group."""
        if not self._joined:
            return
        self._joined = False
        comm = self.deepspeed.comm
        if comm.is_initialized():
            comm.destroy_process_group()
        else:
            dist.destroy_process_group()
        # Otherwise DeepSpeed keeps the old group and refuses to make another.
        comm.comm.cdb = None
        # Torch installs a hook that prefixes every later traceback of this process with a rank.
        sys.excepthook = self._excepthook
        for name, value in self._environment.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def quiet_deepspeed(device: torch.device) -> Any:
    """Import DeepSpeed without its banner, and without its compiled collective on CPU.

    Raises:
        RunFailed: this process has used DeepSpeed on another kind of device.
    """
    # Overwritten, because a value meant for another program would override runtime.device.
    os.environ["DS_ACCELERATOR"] = device.type
    # DeepSpeed calls deprecated torch functions; users cannot change that.
    warnings.filterwarnings(
        "ignore", category=FutureWarning, message="`?torch.distributed.* is deprecated"
    )
    logger = logging.getLogger("DeepSpeed")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import deepspeed
        import deepspeed.ops
    logger.setLevel(logging.ERROR)
    accelerator = deepspeed.accelerator.get_accelerator()  # reads the environment once a process
    assert accelerator is not None
    if (used := accelerator.device_name()) != device.type:
        raise RunFailed(
            f"this process has used DeepSpeed on {used} already, the learner is to run on "
            f"{device.type}; start it in a process of its own"
        )
    # Avoids compiling a shared-memory collective at first use, which takes 30 to 60 s; gloo does
    # the same work. Without this entry DeepSpeed runs a compiler to find the answer.
    known = deepspeed.ops.__dict__.setdefault("__compatible_ops__", defaultdict(bool))
    known["deepspeed_shm_comm"] = False
    return deepspeed
