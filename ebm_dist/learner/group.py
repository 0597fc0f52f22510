"""The process group of the learner ranks, and DeepSpeed as it is imported into it."""

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
    """`device` as tensors on it name it: CUDA's with an index, without which nothing can be set."""
    device = torch.device(device)
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return device


class Group:
    """This process's place among the ranks, from `join` to `leave`."""

    def __init__(self, rank: int, world_size: int, device: torch.device) -> None:
        self.rank = rank
        self.world_size = world_size
        self.device = device
        self._joined = False
        self._environment = {name: os.environ.get(name) for name in _RANK_VARIABLES}
        self._excepthook = sys.excepthook
        self.deepspeed = quiet_deepspeed(device)

    def join(self, master_addr: str, master_port: int, timeout_s: float) -> None:
        """Make the group, with a timeout: a lost rank must be an error, not a hang.

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
        # A single rank needs nobody's port.
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
        # DeepSpeed reads them wherever it is asked for a rank.
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
        """Undo `join`, so that another group can be made in this process."""
        if not self._joined:
            return
        self._joined = False
        comm = self.deepspeed.comm
        if comm.is_initialized():
            comm.destroy_process_group()
        else:
            dist.destroy_process_group()
        # DeepSpeed would hold the dead group and refuse to make another.
        comm.comm.cdb = None
        # Torch's would begin every later traceback of this process with a rank.
        sys.excepthook = self._excepthook
        for name, value in self._environment.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def quiet_deepspeed(device: torch.device) -> Any:
    """Import DeepSpeed without its banner, and without its compiled collective on CPU.

    Raises:
        RunFailed: this process has used it on another kind of device.
    """
    # Outright: a value that the environment has for another program would win over runtime.device.
    os.environ["DS_ACCELERATOR"] = device.type
    # DeepSpeed's calls of torch's older names are not the user's to change.
    warnings.filterwarnings(
        "ignore", category=FutureWarning, message="`?torch.distributed.* is deprecated"
    )
    logger = logging.getLogger("DeepSpeed")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import deepspeed
        import deepspeed.ops
    logger.setLevel(logging.ERROR)
    accelerator = deepspeed.accelerator.get_accelerator()  # looks at the environment once a process
    assert accelerator is not None
    if (used := accelerator.device_name()) != device.type:
        raise RunFailed(
            f"this process has used DeepSpeed on {used} already, the learner is to run on "
            f"{device.type}; start it in a process of its own"
        )
    # A shared-memory collective would be compiled at first use, for 30 to 60 s; gloo does the same
    # work. DeepSpeed reads this dict for it, and by itself runs a compiler to fill the dict.
    known = deepspeed.ops.__dict__.setdefault("__compatible_ops__", defaultdict(bool))
    known["deepspeed_shm_comm"] = False
    return deepspeed
