"""What a first quarter of an hour with a GPU is for: `make gpu-check`.

    python benchmarks/gpu_check.py [OUT_DIR] [--only PART ...]

Runs its parts in order of worth, each as a process of its own under its own time limit: one that
crashes or hangs is named with its cause, and the others still run. OUT_DIR/report.md grows with
each part, and OUT_DIR has the whole output of each. Where torch finds no GPU it says so in one line
and exits with 2; else with 1 if a part failed. It needs nothing but what is installed.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from common import commit, machine

HERE = Path(__file__).parent
ROOT = HERE.parent

PACKAGES = {
    "numpy": "everything",
    "einops": "everything",
    "pydantic": "everything",
    "yaml": "everything",
    "threadpoolctl": "every run",
    "safetensors": "every run",
    "webdataset": "every run",
    "PIL": "every run",
    "rich": "every run",
    "typer": "the command line",
    "deepspeed": "every run",
    "psutil": "DeepSpeed",
    "tqdm": "DeepSpeed",
    "ray": "the run on Ray",
    "pytest": "the GPU tests",
    "triton": "compiled blocks",
    "sklearn": "digits, in whose place pictures of bars are taken",
    "scipy": "audits",
    "matplotlib": "plots alone",
    "torchebm": "the comparison with it",
    "ebm": "the comparison with ebmkit",
}
"""What a GPU machine may lack, by the name that is imported, and who needs it."""


@dataclass(frozen=True, slots=True)
class Part:
    """One process; `limit_s` is when it is ended."""

    name: str
    command: tuple[str, ...]
    limit_s: float
    needs: tuple[str, ...] = ()


def python(*words: str) -> tuple[str, ...]:
    return (sys.executable, *words)


def train(config: str, run_dir: Path, *overrides: str) -> tuple[str, ...]:
    always = ("runtime.device=cuda", "tracking.wandb=off")
    words = ("-m", "ebm_dist", "train", config, "--run-dir", str(run_dir), *always, *overrides)
    return python(*words)


INLINE, ON_RAY = "runtime.backend=inline", "runtime.backend=ray"


def parts(scratch: Path) -> list[Part]:
    """In order of worth; their limits together are below ten minutes."""
    config, images = "configs/digits.yaml", scratch / "images"
    more = ["evaluation.every=null"]
    run = ("deepspeed", "safetensors", "webdataset", "PIL", "threadpoolctl")
    probe = str(HERE / "gpu_probe.py")
    tests = [str(p.relative_to(ROOT)) for p in sorted(ROOT.glob("tests/**/test_*.py"))]
    tests = [name for name in tests if "mark.gpu" in (ROOT / name).read_text()]
    before = []
    if not is_here("sklearn"):
        more.append(f"data.source={images}")
        before = [Part("pictures", python(probe, "images", str(images)), 30, ("PIL",))]
    free = train("configs/toy/score_matching.yaml", scratch / "free", ON_RAY, "run.steps=50")
    return [
        *before,
        Part("GPU tests", python("-m", "pytest", "-q", "-m", "gpu", *tests), 120, ("pytest",)),
        Part(
            "a run in one process",
            train(config, scratch / "inline", *more, INLINE, "run.steps=40"),
            50,
            run,
        ),
        Part(
            "a run on Ray, learner and two workers on the GPUs there are",
            train(config, scratch / "ray", *more, ON_RAY, "run.steps=100"),
            70,
            (*run, "ray"),
        ),
        Part("a run on Ray without chains", free, 40, (*run, "ray")),
        Part("ZeRO-2 in bf16", python(probe, "zero"), 40, ("deepspeed",)),
        Part("samplers", python(probe, "samplers", "--seconds", "70"), 100),
        Part(
            "the Fashion-MNIST recipe for two minutes",
            python(probe, "fashion", str(scratch / "fashion"), "--seconds", "110"),
            145,
            (*run, "ray"),
        ),
    ]


def is_here(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def missing() -> list[str]:
    """A line for each package that is not here."""
    return [f"no {name}: needed by {who}" for name, who in PACKAGES.items() if not is_here(name)]


def run(part: Part, log: Path) -> str:
    """Run `part`, its output in `log`; returns what went wrong in one line, or nothing."""
    absent = [name for name in part.needs if not is_here(name)]
    if absent:
        return f"not run: {', '.join(absent)} not installed"
    env = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
    with log.open("w") as out:
        # A session of its own: what a part started ends with it.
        process = subprocess.Popen(
            part.command, cwd=ROOT, env=env, stdout=out, stderr=out, start_new_session=True
        )
        try:
            code = process.wait(part.limit_s)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            _end(process)
    if code == 0:
        return ""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    last = lines[-1][:300] if lines else "it printed nothing"
    if code is None:
        return f"not done within {part.limit_s:g} s; its last line: {last}"
    how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
    return f"{how}: {last}"


def _end(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def check(every: Sequence[Part], out: Path, head: str) -> list[str]:
    """Run all, and write out/report.md as it goes; returns the names of those that failed."""
    out.mkdir(parents=True, exist_ok=True)
    report = out / "report.md"
    report.write_text(head)
    failed = []
    for number, part in enumerate(every):
        print(f"{part.name} ...", flush=True)
        log, began = out / f"{number}.log", time.monotonic()
        fault = run(part, log)
        if fault:
            failed.append(part.name)
        line = f"{'FAILED, ' + fault if fault else 'ok'} ({time.monotonic() - began:.0f} s)"
        print(f"  {line}", flush=True)
        with report.open("a") as file:
            file.write(f"\n## {part.name}: {line}\n\n`{' '.join(part.command)}`\n")
            if log.exists():
                tail = log.read_text(errors="replace").splitlines()[-40:]
                file.write("\n```\n" + "\n".join(tail) + "\n```\n")
    return failed


def head() -> str:
    what = machine()
    lines = [
        "# GPU check",
        "",
        f"{what['gpu']}, {what['cores']} cores of {what['cpu']}, torch {what['torch']}, Python "
        f"{sys.version.split()[0]}, commit {commit()}, {datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
        "",
        *(f"- {line}" for line in missing()),
    ]
    return "\n".join(lines) + "\n"


def gpu_is_missing() -> str | None:
    """Why nothing can be checked here, in one line; None where torch finds a GPU."""
    if not is_here("torch"):
        return f"no torch in {sys.executable}; set PYTHON to the python that has it"
    import torch

    if not torch.cuda.is_available():
        return (
            f"torch {torch.__version__} finds no GPU on this machine; run it on one that has a GPU"
        )
    return None


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("out", type=Path, nargs="?", default=Path("gpu-check"))
    parser.add_argument("--only", nargs="*", default=[], help="parts whose names begin so")
    options = parser.parse_args()
    if (why := gpu_is_missing()) is not None:
        print(f"gpu-check: {why}", file=sys.stderr)
        raise SystemExit(2)
    for line in missing():
        print(line, flush=True)
    with tempfile.TemporaryDirectory() as scratch:
        every = parts(Path(scratch))
        wanted = [p for p in every if any(p.name.startswith(word) for word in options.only)]
        failed = check(wanted or every, options.out, head())
    print(f"{options.out / 'report.md'}")
    if failed:
        raise SystemExit(f"failed: {'; '.join(failed)}")


if __name__ == "__main__":
    main()
