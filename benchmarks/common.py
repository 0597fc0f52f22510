"""What every benchmark shares: where it ran, how arms are interleaved, and how a result is kept."""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

PEERS = ("torchebm", "ebmkit", "torchrl")

_LOAD = os.getloadavg()[0]  # at import, when nothing of the benchmark has run yet


def machine() -> dict[str, Any]:
    """The hardware and software that figures depend on."""
    import torch

    model = platform.processor()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
        model = names[0].split(":", 1)[1].strip() if names else model
    return {
        "cpu": model,
        "cores": len(os.sched_getaffinity(0)),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "allocator": _allocator(),
        "peers": {name: version for name in PEERS if (version := _version(name)) is not None},
        "load_before": round(_LOAD, 2),
    }


_memory_is_kept = False


def keep_memory() -> None:
    """Let this process keep what it frees, as those of a run do."""
    from ebm_dist.cluster.process import tune_process

    global _memory_is_kept
    tune_process(None)
    _memory_is_kept = True


def _allocator() -> str:
    name = os.environ.get("LD_PRELOAD")
    if name:
        return f"LD_PRELOAD={name}"
    return "libc, " + ("freed memory kept" if _memory_is_kept else "default thresholds")


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def commit() -> str:
    """The commit that was measured, with a mark where the tree differs from it."""
    where = Path(__file__).parent

    def git(*arguments: str) -> str:
        try:
            done = subprocess.run(["git", *arguments], cwd=where, capture_output=True, text=True)
        except OSError:  # a copy of the tree, on a machine without git
            return ""
        return done.stdout.strip()

    return (git("rev-parse", "--short", "HEAD") or "unknown") + (
        "+" if git("status", "--porcelain", "-uno") else ""
    )


def interleaved(
    arms: Mapping[str, Callable[[], float]], repetitions: int
) -> dict[str, list[float]]:
    """What each arm returned, `repetitions` times, in turn: a drifting machine meets all alike."""
    results: dict[str, list[float]] = {name: [] for name in arms}
    for repetition in range(repetitions):
        # Who comes first alternates, or the first would always meet the coldest machine.
        names = list(arms) if repetition % 2 == 0 else list(reversed(arms))
        for name in names:
            results[name].append(arms[name]())
    return results


def fastest_device() -> str:
    """Where a benchmark without a choice of its own runs: a GPU where torch finds one."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def wait() -> None:
    """Until a GPU, if this process uses one, has done what it was told to."""
    import torch

    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def seconds(function: Callable[[], Any], number: int) -> float:
    """Seconds a call, over `number` calls."""
    wait()
    start = time.perf_counter()
    for _ in range(number):
        function()
    wait()
    return (time.perf_counter() - start) / number


def medians(results: Mapping[str, list[float]]) -> dict[str, float]:
    return {name: statistics.median(values) for name, values in results.items()}


def spread(values: list[float]) -> float:
    """Half the range over the median: how far repetitions disagree."""
    return (max(values) - min(values)) / 2 / statistics.median(values)


def keep(name: str, rows: list[dict[str, Any]], out: Path | None, **more: Any) -> None:
    """Write the result as JSON where `make bench` collects it."""
    if out is None:
        return
    record = {
        "benchmark": name,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        "machine": machine(),
        **more,
        "rows": rows,
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(record, indent=2) + "\n")
