"""Checks whether a machine has what a run needs; each finding is ok or says what to do."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import platform
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ebm_dist.core.installed import NO_FCNTL, how_to_install

GIB = 2**30
MIN_PYTHON = (3, 11)
MIN_SHARED_MEMORY = 1 * GIB
"""Shared memory for the object store of a local Ray, which holds weights and negatives. Ray's
minimum is 75 MiB; below 1 GiB it uses slow disk files."""
MIN_DISK = 2 * GIB
RAY_PORTS = {6379: "Ray head", 8265: "Ray dashboard"}


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the report."""

    what: str
    ok: bool
    text: str
    todo: str = ""
    """What to do, in one sentence; empty if there is nothing to do."""


def examine(directory: str | Path = ".") -> Iterator[Finding]:
    """Run all checks, cheapest first; `directory` is the parent of future runs."""
    checks: list[Callable[[], Finding]] = [
        check_python,
        check_system,
        check_torch,
        check_accelerator,
        lambda: check_package("ray", "train"),
        check_ray_address,
        check_deepspeed,
        check_wandb,
        check_data,
        check_shared_memory,
        lambda: check_disk(directory),
        check_ports,
    ]
    for check in checks:
        try:
            yield check()
        except Exception as error:
            # This command is for machines in an unknown state, so a failing check is a finding.
            name = getattr(check, "__name__", "check").removeprefix("check_")
            yield Finding(name, False, f"could not be checked: {error}", "see the message")


def check_python() -> Finding:
    text = f"{platform.python_version()} ({sys.executable})"
    recent = sys.version_info[:2] >= MIN_PYTHON
    return Finding("python", recent, text, "" if recent else "install Python 3.11 or newer")


def check_system() -> Finding:
    whole = importlib.util.find_spec("fcntl") is not None
    return Finding("system", whole, platform.system(), "" if whole else NO_FCNTL)


def check_torch() -> Finding:
    import torch

    from ebm_dist.run.placement.plan import available_cores

    threads, cores = torch.get_num_threads(), available_cores()
    text = f"{torch.__version__}, {threads} threads, {cores} usable cores"
    if threads > 2 * cores:
        return Finding("torch", True, text, f"more threads than cores: set OMP_NUM_THREADS={cores}")
    return Finding("torch", True, text)


def check_accelerator() -> Finding:
    import torch

    if not torch.cuda.is_available():
        if torch.version.cuda and shutil.which("nvidia-smi"):
            return Finding(
                "accelerator",
                False,
                f"nvidia-smi is here, but torch (CUDA {torch.version.cuda}) sees no GPU",
                "check CUDA_VISIBLE_DEVICES and that the driver is new enough for this CUDA",
            )
        return Finding("accelerator", True, "none: learner and workers run on the CPU")
    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    free, total = torch.cuda.mem_get_info()
    text = f"{len(names)} x {names[0]}, {free / GIB:.0f} of {total / GIB:.0f} GiB free on the first"
    return Finding("accelerator", True, text)


def check_package(name: str, extra: str) -> Finding:
    version = package_version(name)
    if version is None:
        return Finding(
            name,
            False,
            "not installed; training needs it, loading and sampling an export does not",
            how_to_install(extra),
        )
    return Finding(name, True, version)


def check_ray_address() -> Finding:
    address = os.environ.get("RAY_ADDRESS", "")
    if address in ("", "local"):
        return Finding("ray address", True, "RAY_ADDRESS is not set: runs start a local Ray")
    from ebm_dist.cluster.access import check_agreement, require_token
    from ebm_dist.core.errors import UserError
    from ebm_dist.run.preflight import check_address

    todo = "start the cluster (ray start --head), correct RAY_ADDRESS, or unset it for a local Ray"
    try:
        require_token(address)
        check_address(address)
        check_agreement(address)
    except UserError as error:  # its text says what to do
        return Finding("ray address", False, str(error), "or unset RAY_ADDRESS for a local Ray")
    # In a separate process, since joining a cluster of another version can kill the process.
    script = (
        "import json, ray; ray.init(log_to_driver=False, logging_level=40); "
        "print(json.dumps({'nodes': sum(n['Alive'] for n in ray.nodes()), "
        "'resources': ray.cluster_resources()}))"
    )
    answer = run_script(script, timeout=60)
    if isinstance(answer, str):
        here = f"ray {package_version('ray')} and python {platform.python_version()}"
        todo = f"{todo}; every node needs this machine's {here}"
        return Finding("ray address", False, f"{address} refuses this machine: {answer}", todo)
    resources = answer["resources"]
    return Finding(
        "ray address",
        True,
        f"{address}: {answer['nodes']} nodes, {resources.get('CPU', 0):g} CPUs, "
        f"{resources.get('GPU', 0):g} GPUs",
    )


def check_deepspeed() -> Finding:
    found = check_package("deepspeed", "train")
    if not found.ok:
        return found
    # In a separate process, since importing deepspeed takes seconds, prints, and sets up logging.
    script = (
        "import json, deepspeed; from deepspeed.ops import __compatible_ops__ as ops; "
        "print(json.dumps(sorted(k for k, v in ops.items() if v)))"
    )
    answer = run_script(script, timeout=120)
    if isinstance(answer, str):
        return Finding(
            "deepspeed", False, f"{found.text} does not import: {answer}", "reinstall deepspeed"
        )
    compiler = shutil.which(os.environ.get("CXX", "c++")) or shutil.which("g++")
    ops = ", ".join(answer) if answer else "none"
    text = f"{found.text}; ops that can be built here: {ops}"
    if not compiler:
        text += "; no C++ compiler, so torch's optimizers are used"
    return Finding("deepspeed", True, text)


def check_wandb() -> Finding:
    version = package_version("wandb")
    if version is None:
        return Finding(
            "wandb",
            True,
            "not installed: metrics go to metrics.jsonl only",
            f"{how_to_install('train')} to have W&B pages",
        )
    from ebm_dist.metrics.credentials import find_key

    if where := find_key():
        return Finding("wandb", True, f"{version}, a key is configured ({where}): runs log online")
    return Finding(
        "wandb",
        True,
        f"{version}, no key: runs log offline",
        "run `wandb login` or set WANDB_API_KEY to log online",
    )


def check_data() -> Finding:
    if importlib.util.find_spec("sklearn") is None:
        return Finding(
            "data",
            False,
            "scikit-learn (which ships the digits) is missing",
            "pip install scikit-learn",
        )
    debian = Path("/usr/share/datasets/fashion-mnist")
    fashion = "fashion-mnist" if debian.is_dir() else ""
    text = ", ".join(filter(None, ["digits", "toy:*", fashion])) + " can be prepared here"
    todo = "" if fashion else "for Fashion-MNIST: apt-get install dataset-fashion-mnist"
    return Finding("data", True, text, todo)


def check_shared_memory(path: str = "/dev/shm") -> Finding:
    if not os.path.isdir(path):
        return Finding("shared memory", True, f"no {path} on this system: Ray uses disk files")
    free = shutil.disk_usage(path).free
    return Finding(
        "shared memory",
        free >= MIN_SHARED_MEMORY,
        f"{free / GIB:.1f} GiB free in {path}",
        "" if free >= MIN_SHARED_MEMORY else "free it, or give the container --shm-size=2g",
    )


def check_disk(directory: str | Path) -> Finding:
    here = Path(directory).resolve()
    while not here.exists():
        here = here.parent
    free = shutil.disk_usage(here).free
    text = f"{free / GIB:.1f} GiB free under {here}"
    try:
        with tempfile.TemporaryFile(dir=here):
            pass
    except OSError as error:
        return Finding("disk", False, f"{here} cannot be written: {error.strerror}", "set run.dir")
    todo = "" if free >= MIN_DISK else f"free {MIN_DISK / GIB:.0f} GiB, or set run.dir elsewhere"
    return Finding("disk", free >= MIN_DISK, text, todo)


def check_ports() -> Finding:
    try:
        with (
            socket.create_server(("127.0.0.1", 0)) as server,
            socket.create_connection(server.getsockname()[:2], timeout=3),
        ):
            pass
    except OSError as error:
        return Finding(
            "ports",
            False,
            f"a loopback connection fails: {error}",
            "allow TCP on 127.0.0.1: learner ranks and Ray talk through it",
        )
    taken = [f"{port} ({what})" for port, what in RAY_PORTS.items() if not _can_bind(port)]
    if taken:
        return Finding(
            "ports",
            True,
            f"loopback works; in use: {', '.join(taken)}",
            "nothing for a local run; `ray start --head` needs other ports, or that Ray stopped",
        )
    return Finding("ports", True, f"loopback works; {', '.join(map(str, RAY_PORTS))} are free")


def _can_bind(port: int) -> bool:
    try:
        with socket.create_server(("127.0.0.1", port)):
            return True
    except OSError:
        return False


def package_version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def run_script(script: str, timeout: float) -> Any:
    """The JSON value on the last line of the script's output, or a line of text on failure."""
    try:
        done = subprocess.run(
            [sys.executable, "-c", script], capture_output=True, text=True, timeout=timeout
        )
    except subprocess.TimeoutExpired:
        return f"no answer within {timeout:.0f} s"
    lines = [line for line in done.stdout.splitlines() if line.strip()]
    if done.returncode == 0 and lines:
        return json.loads(lines[-1])
    errors = [line for line in done.stderr.splitlines() if line.strip()]
    return errors[-1][:300] if errors else f"exit code {done.returncode}"
