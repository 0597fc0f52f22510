"""A chaos soak: a seeded schedule kills a random part of a training run every few seconds.

    python tests/distributed/chaos.py --seconds 600

The run is a real one, asynchronous and on Ray, in a process of its own. A part is a worker, a
shard, a learner rank or the metric hub; it is killed with SIGKILL whatever it is doing. The
training goes on in legs of some hundred updates, each of which has to be finished, so that the
soak lasts as long as it is asked to however fast the machine is.

No more than `MAX_DOWN` parts are down at once: a machine that is killed faster than it can start
processes shows nothing but that. A part that starts is hit like any other, and so are learners that
come back; of each start of the run, the first as well, `MAX_START_KILLS` parts at the most.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import re
import signal
import sys
import tempfile
import time
import uuid
from collections import Counter
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from statistics import median
from typing import Any

from chaos_contexts import Contexts
from graph_runs import TINY, chains_of, mapped, newest_step, pids, rows, start
from rich.console import Console
from rich.table import Table

from ebm_dist.checkpoint import files as checkpoint
from ebm_dist.core.errors import UserError

MAX_LAG = 4
OVERRIDES = (
    "runtime.backend=ray",
    "workers.num_workers=3",
    "buffer.num_shards=3",
    "learner.num_ranks=2",
    "learner.timeout_s=30",
    "flow.mode=async",
    f"flow.max_lag={MAX_LAG}",
    "checkpoint.every=20",
)
CAPACITY = TINY["buffer"]["capacity"]
MARK = "EBM_DIST_SOAK"
PEACE_S = 5.0
"""Between the last kill and the end of the last leg, at the least."""

MAX_DOWN = 4
MAX_START_KILLS = 4


@dataclass
class Kill:
    part: str
    at: float
    """Seconds since the epoch."""
    back_s: float | None = None
    """Until its successor was up; None if it was not, because the leg was over."""

    @property
    def role(self) -> str:
        return self.part.split("-")[0]


@dataclass
class Report:
    """What a soak saw. `faults` is empty, or the soak has failed."""

    seconds: float = 0.0
    updates: int = 0
    legs: int = 0
    restarts: int = 0
    kills: list[Kill] = field(default_factory=list)
    start_kills: int = 0
    """Of those, before the first row of a start of the run."""
    observations: int = 0
    identity_checks: int = 0
    lag_max: int = 0
    versions: int = 0
    going_back: int = 0
    checkpoints: int = 0
    leftovers: int = 0
    faults: list[str] = field(default_factory=list)

    def table(self) -> Table:
        table = Table(title=f"chaos soak: {len(self.kills)} kills in {self.seconds:.0f} s")
        table.add_column("what")
        table.add_column("seen")
        by_role = Counter(kill.role for kill in self.kills)
        table.add_row("killed", ", ".join(f"{role} {n}" for role, n in sorted(by_role.items())))
        table.add_row("of those while the run started", str(self.start_kills))
        for role in sorted(by_role):
            times = [k.back_s for k in self.kills if k.role == role and k.back_s is not None]
            if times:
                said = f"median {median(times):.1f} s, longest {max(times):.1f} s"
                table.add_row(f"another {role} was up after", said)
        table.add_row("updates finished, in legs", f"{self.updates} in {self.legs}")
        table.add_row("times the learners went back", str(self.going_back))
        table.add_row("free + leased + ready == capacity", f"at {self.observations} observations")
        table.add_row(
            f"all {CAPACITY} chains there, none twice", f"in {self.identity_checks} checkpoints"
        )
        table.add_row("versions monotone", f"over {self.versions} rows")
        table.add_row("largest lag at consumption", f"{self.lag_max}, bound {MAX_LAG}")
        table.add_row("processes and shared memory left", str(self.leftovers or "none"))
        table.add_row("faults", str(len(self.faults) or "none"))
        load = ", ".join(f"{value:.0f}" for value in os.getloadavg())
        table.add_row("load average, cores", f"{load}; {len(os.sched_getaffinity(0))}")
        return table


def soak(
    run_dir: Path,
    *,
    seconds: float,
    period_s: float,
    seed: int,
    leg: int = 400,
    min_kills: int = 0,
    contexts: Contexts | None = None,
) -> Report:
    """Train in `run_dir` and kill a random part every `period_s` seconds on average.

    Args:
        seconds: from the first update on; then the last leg is finished in peace.
        leg: updates of a leg.
        min_kills: go on until there were so many, for at most four times as long.
        contexts: what the chains carry, and what is checked of it in every checkpoint that is read.
    """
    rng, report = random.Random(seed), Report()
    mark = uuid.uuid4().hex
    os.environ[MARK] = mark
    try:
        _soak(run_dir, seconds, period_s, leg, min_kills, rng, mark, report, contexts)
    finally:
        del os.environ[MARK]
        _end(mark)
    return report


def _soak(
    run_dir: Path,
    seconds: float,
    period_s: float,
    leg: int,
    min_kills: int,
    rng: random.Random,
    mark: str,
    report: Report,
    contexts: Contexts | None,
) -> None:
    options = OVERRIDES if contexts is None else (*OVERRIDES, *contexts.overrides)
    goal, began = leg, 0.0
    next_kill, checked = 0.0, -1
    before, num_start_kills = _newest_epoch(run_dir), 0
    process = start(run_dir, *options, f"run.steps={goal}")
    report.legs = 1
    patience = time.time() + 300
    while True:
        time.sleep(0.1)
        now = time.time()
        if not next_kill and _starting(_marked(mark)):
            next_kill = now + rng.uniform(0.0, period_s)
        if not began and rows(run_dir):
            began, patience = now, now + 4 * seconds + 400
        enough = len(report.kills) >= min_kills or now > began + 4 * seconds
        over = bool(began) and now > began + seconds and enough
        if now > patience:
            report.faults.append(f"no end after {now - began:.0f} s\n{_tail(run_dir)}")
            process.kill()
            break
        if process.poll() is not None:
            if process.returncode:
                report.faults.append(f"exit code {process.returncode}\n{_tail(run_dir)}")
                break
            report.updates = goal
            # A hub that is killed takes the rows along that it had not written yet; were they the
            # last of all, no later leg would show that the log goes on.
            if over and now > max((kill.at for kill in report.kills), default=0.0) + PEACE_S:
                break
            goal += leg
            before, num_start_kills = _newest_epoch(run_dir), 0
            process = start(run_dir, *options, f"run.steps={goal}", "--resume", "must")
            report.legs += 1
        if (step := newest_step(run_dir)) != checked:
            checked = step
            _check_chains(run_dir, report, contexts)
        if next_kill and not over and now >= next_kill:
            starts = _newest_epoch(run_dir) == before
            part = None
            if not starts or num_start_kills < MAX_START_KILLS:
                part = _kill_one(run_dir, rng, mark)
            num_start_kills += starts and part is not None
            report.start_kills += starts and part is not None
            next_kill = now + (period_s * rng.uniform(0.5, 1.5) if part else 0.5)
            if part is not None:
                report.kills.append(Kill(part, now))
    report.seconds = time.time() - began if began else 0.0
    process.wait()
    _check_rows(run_dir, report)
    _check_chains(run_dir, report, contexts)
    _note_successors(run_dir, report)
    _check_leftovers(mark, run_dir, report)


def _newest_epoch(run_dir: Path) -> int:
    """Of the rows logged so far; each start of the run begins another epoch."""
    return max((int(row["epoch"]) for row in _all_rows(run_dir)), default=-1)


def _kill_one(run_dir: Path, rng: random.Random, mark: str) -> str | None:
    """SIGKILL a part that lives; its name, None if too many are down as it is."""
    ours, known = _marked(mark), pids(run_dir)
    known |= _starting(ours)
    alive = sorted(name for name, pid in known.items() if pid in ours)
    if len(known) - len(alive) >= MAX_DOWN:
        return None
    if not alive:
        return None
    part = rng.choice(alive)
    with contextlib.suppress(ProcessLookupError):
        os.kill(known[part], signal.SIGKILL)
        return part
    return None


def _starting(ours: set[int]) -> dict[str, int]:
    """The processes that are in the constructor of a part, which Ray names in their titles."""
    found: dict[str, int] = {}
    for pid in ours:
        with contextlib.suppress(OSError):
            title = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace")
            if named := re.match(r"ray::([a-z]+(-\d+)?)[.\d]*:\w+\.__init__", title):
                found[named[1]] = pid
    return found


def _marked(mark: str) -> set[int]:
    """Processes that were started by this soak, whoever their parents are now."""
    wanted, found = f"{MARK}={mark}".encode(), set()
    for path in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):
            if wanted in path.read_bytes() and int(path.parent.name) != os.getpid():
                found.add(int(path.parent.name))
    return found


def _check_chains(run_dir: Path, report: Report, contexts: Contexts | None) -> None:
    try:
        found = checkpoint.latest(run_dir)
        chains = None if found is None else chains_of(found)
    except (UserError, OSError):  # pruned or replaced while it was read
        return
    if found is None or chains is None:
        return
    ids = chains["chain_id"].tolist()
    report.identity_checks += 1
    if ids != list(range(CAPACITY)):
        lost, twice = set(range(CAPACITY)) - set(ids), [i for i, n in Counter(ids).items() if n > 1]
        report.faults.append(f"{found.path.name}: chains {sorted(lost)} lost, {twice} twice")
    elif contexts is not None:
        report.faults += [f"{found.path.name}: {fault}" for fault in contexts.faults(chains)]


def _check_rows(run_dir: Path, report: Report) -> None:
    everything = [row for row in _all_rows(run_dir) if "buffer/capacity" in row]
    report.observations = report.versions = len(everything)
    for row in everything:
        total = row["buffer/free"] + row["buffer/leased"] + row["buffer/ready"]
        if not total == row["buffer/capacity"] == CAPACITY:
            report.faults.append(f"update {row['step']}: free + leased + ready is {total}")
        if not 0 <= row["flow/lag_max"] <= MAX_LAG:
            report.faults.append(f"update {row['step']}: lag {row['flow/lag_max']}")
        report.lag_max = max(report.lag_max, int(row["flow/lag_max"]))
    order = sorted(everything, key=lambda row: (row["epoch"], row["step"]))
    versions = [row["weights/version"] for row in order]
    if versions != sorted(versions):
        report.faults.append("versions went back")
    steps = {row["step"] for row in everything}
    if everything and max(steps) < report.updates:
        report.faults.append(f"the last update logged is {max(steps)} of {report.updates}")
    if not (run_dir / "export" / "model.safetensors").exists():
        report.faults.append("the run left no export")


def _all_rows(run_dir: Path) -> list[dict[str, Any]]:
    out = rows(run_dir)
    superseded = run_dir / "metrics.superseded.jsonl"
    if superseded.exists():
        out += rows(run_dir, superseded.name)
    return out


def _note_successors(run_dir: Path, report: Report) -> None:
    text = (run_dir / "run.log").read_text()
    report.going_back = text.count("going back")
    report.checkpoints = len(re.findall(r"checkpoint step_\d+", text))
    ups = [
        (datetime.strptime(stamp, "%Y-%m-%d %H:%M:%S,%f").timestamp(), name)
        for stamp, name in re.findall(r"(?m)^(\S+ \S+) \w+ (\S+) runs as process \d+", text)
    ]
    for kill in report.kills:
        after = [at - kill.at for at, name in ups if name == kill.part and at > kill.at]
        kill.back_s = min(after, default=None)


def _check_leftovers(mark: str, run_dir: Path, report: Report) -> None:
    deadline = time.time() + 15
    while (left := _marked(mark)) and time.time() < deadline:
        time.sleep(0.5)
    report.leftovers += len(left)
    if left:
        report.faults.append(f"{len(left)} processes left behind: {sorted(left)}")
    for path in mapped(run_dir):
        report.leftovers += 1
        report.faults.append(f"shared memory left behind: {path}")


def _end(mark: str) -> None:
    """After a failure: nothing of the soak may go on."""
    for pid in _marked(mark):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def _tail(run_dir: Path) -> str:
    out = run_dir.parent / f"{run_dir.name}.out"
    log = run_dir / "run.log"
    text = log.read_text()[-1500:] if log.exists() else ""
    return text + (out.read_text()[-1500:] if out.exists() else "")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--seconds", type=float, default=600.0)
    parser.add_argument("--period", type=float, default=5.0, help="mean seconds between kills")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--min-kills", type=int, default=100)
    parser.add_argument("--run-dir", type=Path, default=None)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="ebm_dist-chaos-") as scratch:
        run_dir = arguments.run_dir or Path(scratch) / "soak"
        report = soak(
            run_dir,
            seconds=arguments.seconds,
            period_s=arguments.period,
            seed=arguments.seed,
            min_kills=arguments.min_kills,
        )
    if len(report.kills) < arguments.min_kills:
        report.faults.append(f"{len(report.kills)} kills, {arguments.min_kills} were asked for")
    Console().print(report.table())
    for fault in report.faults:
        print(fault)
    return 1 if report.faults else 0


if __name__ == "__main__":
    sys.exit(main())
