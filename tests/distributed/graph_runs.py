"""Small whole runs for the tests of the graph: a config, a run, and what is left of it."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from safetensors.torch import load_file

from ebm_dist.checkpoint import files as checkpoint
from ebm_dist.cluster.shared_memory import ROOT
from ebm_dist.config.run_config import load
from ebm_dist.run.train import RunResult, _short_hash, train

TINY: dict[str, Any] = {
    "run": {"name": "tiny", "seed": 3, "steps": 12},
    "runtime": {"backend": "inline", "start_timeout_s": 400},
    "data": {"source": "digits", "batch_size": 32, "prefetch": 0, "rank_split": "sample"},
    "energy": {"name": "mlp"},
    "sampler": {"name": "langevin", "step_size": 1.0, "noise_std": 0.01, "num_steps": 4},
    "buffer": {"capacity": 96, "num_shards": 2, "reinit_prob": 0.2},
    # Threads change the order of sums, and with it the last bits.
    "workers": {"num_workers": 1, "num_chains": 8, "num_threads": 1},
    "learner": {"num_threads": 1, "ema_decay": 0.9},
    "flow": {"mode": "sync"},
    "checkpoint": {"every": 4},
    "tracking": {"wandb": "off", "log_every": 1},
    "evaluation": {"every": None},
}

NUM_LEVELS = 3
TEMPERED = (
    f"energy={{name: mlp, num_levels: {NUM_LEVELS}, noise_stds: [0.1, 0.8]}}",
    "sampler={name: simulated_tempering, kernel: {name: mala, step_size: 0.05}, data_std: 0.3, "
    "num_steps: 4}",
    "objective={name: contrastive_levels}",
    "buffer.context={level: stratified, clock: true}",
)
"""Overrides of `TINY`: each chain carries a level, which rounds move, and the steps of its life."""


def run(run_dir: Path, *overrides: str, **options: Any) -> RunResult:
    """Train the tiny config, with `key.sub=value` overrides, in `run_dir`."""
    with (run_dir.parent / f"{run_dir.name}.txt").open("a") as file:
        console = Console(file=file, width=200)
        return train(load(TINY, overrides), run_dir=run_dir, console=console, **options)


def weights(run_dir: Path) -> dict[str, torch.Tensor]:
    """The exported weights."""
    return load_file(run_dir / "export" / "model.safetensors")


def assert_bitwise_equal(a: Path, b: Path) -> None:
    left, right = weights(a), weights(b)
    assert left.keys() == right.keys()
    different = [name for name in left if not torch.equal(left[name], right[name])]
    assert not different, f"{a.name} and {b.name} differ in {different}"


def start(run_dir: Path, *overrides: str) -> subprocess.Popen[bytes]:
    """The same as a process of its own, which can be killed."""
    config = run_dir.parent / "tiny.yaml"
    if not config.exists():
        from ebm_dist.config.run_config import dump

        config.write_text(dump(load(TINY)))
    code = "import sys; from ebm_dist.cli import main; sys.exit(main())"
    command = [sys.executable, "-c", code, "train", str(config), *overrides]
    log = (run_dir.parent / f"{run_dir.name}.out").open("ab")
    return subprocess.Popen(
        [*command, "--run-dir", str(run_dir)],
        stdout=log,
        stderr=log,
        stdin=subprocess.DEVNULL,
        start_new_session=True,
    )


def wait_for(condition: Any, timeout: float, what: str) -> Any:
    """The first true value of `condition()`."""
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        if value := condition():
            return value
        time.sleep(0.01)
    raise AssertionError(f"waited {timeout:.0f} s for {what}")


def newest_step(run_dir: Path) -> int:
    """Of its checkpoints; -1 if there is none."""
    return max((int(p.name[5:]) for p in run_dir.glob("checkpoints/step_*")), default=-1)


def pids(run_dir: Path) -> dict[str, int]:
    """Process of each part by its name, the latest where it was replaced."""
    text = (run_dir / "run.log").read_text() if (run_dir / "run.log").exists() else ""
    found = re.findall(r"(\S+) runs as process (\d+)", text)
    return {name: int(pid) for name, pid in found}


def rows(run_dir: Path, name: str = "metrics.jsonl") -> list[dict[str, Any]]:
    """The lines of metrics.jsonl that are whole."""
    path = run_dir / name
    lines = path.read_text().splitlines() if path.exists() else []
    out = []
    for line in lines:
        with contextlib.suppress(ValueError):
            out.append(json.loads(line))
    return out


def mapped(run_dir: Path) -> list[Path]:
    """The directories that attempts at the run have in this machine's shared memory."""
    return sorted(ROOT.glob(f"ebm_dist-*-{_short_hash(str(run_dir.absolute()))}-*"))


def children(pid: int) -> set[int]:
    """Every process that descends from `pid`."""
    parents: dict[int, int] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            text = path.read_text()
            parents[int(path.parent.name)] = int(text[text.rindex(")") + 2 :].split()[1])
    found, new = set(), {pid}
    while new:
        found |= new
        new = {child for child, parent in parents.items() if parent in new} - found
    return found - {pid}


def chains(run_dir: Path) -> dict[str, np.ndarray]:
    """The chains of its newest checkpoint, over all shards, in the order of their identities."""
    found = checkpoint.latest(run_dir)
    assert found is not None
    return chains_of(found)


def chains_of(found: checkpoint.CheckpointDir) -> dict[str, np.ndarray]:
    """The chains of a checkpoint in the same order."""
    parts = [found.arrays(name) for name in found.names if name.startswith("shard_")]
    whole = {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}
    order = np.argsort(whole["chain_id"])
    return {key: values[order] for key, values in whole.items()}


class Running:
    """A run in a process of its own, whose parts can be killed."""

    def __init__(self, run_dir: Path, *overrides: str) -> None:
        self.dir = run_dir
        self.process: subprocess.Popen[bytes] = start(run_dir, *overrides)
        self.family: set[int] = set()

    @property
    def step(self) -> int:
        return max((row["step"] for row in rows(self.dir)), default=0)

    @property
    def log(self) -> str:
        path = self.dir / "run.log"
        return path.read_text() if path.exists() else ""

    def wait(self, condition, what: str, timeout: float = 240.0) -> None:
        def check() -> bool:
            if self.process.poll() is not None and not condition():
                out = (self.dir.parent / f"{self.dir.name}.out").read_text()
                raise AssertionError(f"ended while waiting for {what}:\n{out}\n{self.log}")
            return bool(condition())

        try:
            wait_for(check, timeout, what)
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.log}") from None

    def kill(self, part: str) -> tuple[float, float]:
        """SIGKILL `part`; returns the seconds until it was noticed and until it was replaced."""
        self.family |= children(self.process.pid)
        self.wait(lambda: part in pids(self.dir), part)
        pid, said = pids(self.dir)[part], self.log.count(" died ")
        os.kill(pid, signal.SIGKILL)
        began = time.monotonic()
        self.wait(
            lambda: self.log.count(" died ") > said or "going back" in self.log[-2000:],
            f"the death of {part}",
        )
        noticed = time.monotonic() - began
        self.wait(lambda: pids(self.dir)[part] != pid, f"another {part}")
        return noticed, time.monotonic() - began

    def end(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            self.process.kill()
        self.process.wait()
