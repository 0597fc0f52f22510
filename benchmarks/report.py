"""Run every benchmark and write one dated report: `make bench`.

    python benchmarks/report.py OUT_DIR [--peer-python PYTHON] [--quick] [--only NAME ...]

Writes OUT_DIR/NAME.json by benchmark and OUT_DIR/report.md, whose tables name hardware, commit and
command. A benchmark that fails is named in the report with its last line, and the others still run.
Where torch finds a GPU, whole runs and the learner's parts are measured on it, and the samplers on
both.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from common import fastest_device

HERE = Path(__file__).parent
ROOT = HERE.parent

# By name: the script and its options, and whether it imports the peers.
BENCHMARKS: dict[str, tuple[str, bool]] = {
    "samplers": ("samplers.py", True),
    "samplers_gpu": ("samplers.py --device cuda", True),
    "buffers": ("buffers.py", True),
    "end_to_end": ("end_to_end.py", False),
    "learner": ("learner.py", False),
    "transfers": ("transfers.py", False),
    "pool": ("pool.py", False),
    "control_plane": ("control_plane.py", False),
    "control_plane_ray": ("control_plane.py --ray --workers 64 256 --shards 2", False),
    "features": ("features.py", False),
}


def run(name: str, out: Path, peer_python: str | None, *, quick: bool) -> tuple[str, str]:
    """Run one; returns the command as a reader would type it, and what went wrong, if anything."""
    words, needs_peers = BENCHMARKS[name]
    script, *arguments = words.split() + (["--quick"] if quick else [])
    python = peer_python if needs_peers and peer_python else sys.executable
    command = [python, str(HERE / script), *arguments, "--out", str(out / f"{name}.json")]
    typed = " ".join(["python", f"benchmarks/{script}", *arguments])
    print(f"\n{typed}", flush=True)
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=env, stderr=subprocess.PIPE, text=True)
    if done.returncode == 0:
        return typed, ""
    print(done.stderr, file=sys.stderr)
    last = done.stderr.strip().splitlines()[-1:] or [f"exit code {done.returncode}"]
    return typed, last[0]


def as_markdown(record: dict[str, Any], command: str) -> str:
    """A record's rows as tables; rows with other keys begin another one."""
    machine = record["machine"]
    on_gpu = record.get("device") == "cuda"
    hardware = machine["gpu"] if on_gpu else f"{machine['cores']} cores of {machine['cpu']}"
    peers = "".join(f", {name} {version}" for name, version in machine["peers"].items())
    lines = [
        f"## {record['benchmark']}" + (", on a GPU" if on_gpu else ""),
        "",
        f"`{command}`, commit {record['commit']}, {record['date']}; {hardware}, torch "
        f"{machine['torch']}{peers}, {machine['threads']} threads, allocator: "
        f"{machine['allocator']}, "
        f"load before: {machine['load_before']}",
    ]
    header: list[str] | None = None
    for row in record["rows"]:
        if list(row) != header:
            header = list(row)
            lines += ["", "| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
        lines.append("| " + " | ".join(_cell(value) for value in row.values()) + " |")
    return "\n".join(lines) + "\n"


def _cell(value: Any) -> str:
    if isinstance(value, float):
        # Three figures are all that a benchmark holds, but thousands are no power of ten.
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return "" if value is None else str(value)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--peer-python", help="an interpreter that has the peers")
    parser.add_argument("--quick", action="store_true", help="fewer repetitions")
    here = [name for name in BENCHMARKS if name != "samplers_gpu" or fastest_device() == "cuda"]
    parser.add_argument("--only", nargs="*", choices=[*BENCHMARKS], default=here)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    parts = ["# Benchmarks\n"]
    failed = []
    for name in options.only:
        typed, fault = run(name, options.out, options.peer_python, quick=options.quick)
        path = options.out / f"{name}.json"
        if fault or not path.exists():
            failed.append(name)
            parts.append(f"## {name}\n\n`{typed}` failed: {fault}\n")
        else:
            parts.append(as_markdown(json.loads(path.read_text()), typed))
        # Kept as it grows: a report that was interrupted holds what was measured.
        (options.out / "report.md").write_text("\n".join(parts))
    minutes = (time.monotonic() - began) / 60
    print(f"\n{options.out / 'report.md'} after {minutes:.0f} min")
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
