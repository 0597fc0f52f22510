"""A healthy run, three sick ones, and pictures of their reports: `python sick_runs.py OUT_DIR`.

Each run takes seconds. A test trains the same configs and reads the verdicts, so that no picture
shows a verdict that the report no longer gives.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from rich.console import Console

import ebm_dist
from ebm_dist.report.html import write_report

Config = dict[str, dict[str, Any]]

HEALTHY: Config = {
    "run": {"seed": 0, "steps": 60},
    "runtime": {"backend": "inline"},
    "data": {"source": "toy:gaussian", "toy_samples": 4096, "batch_size": 64, "prefetch": 0},
    "energy": {"name": "quadratic", "precision": [1.5, 1.5], "learnable": True},
    "sampler": {"name": "mala", "step_size": 0.8, "temperature": 1.0, "num_steps": 4},
    "objective": {"name": "contrastive"},
    "buffer": {"capacity": 64, "reinit_prob": 0.0, "init_std": 3.0},
    "workers": {"num_chains": 64},
    "flow": {"mode": "sync"},
    "learner": {"lr": 0.02, "ema_decay": 0.9},
    "evaluation": {"every": 20, "num_test": 256, "likelihood": False},
    "checkpoint": {"every": 60, "keep": 1},
    "tracking": {"wandb": "off", "log_every": 2},
}
"""Every chain moves in every round, so that traces are full after 20 updates."""

# Between modes the barrier is .765^2 / (2 * .04) = 7.3 T: no local move crosses it in this time.
_MODES = [[2, 0], [1.414, 1.414], [0, 2], [-1.414, 1.414], [-2, 0]]
_MODES += [[-1.414, -1.414], [0, -2], [1.414, -1.414]]

CHANGES: dict[str, Config] = {
    "healthy": {},
    "stagnated": {
        "data": {"source": "toy:8gaussians"},
        "energy": {"name": "gaussian_mixture", "means": _MODES, "stds": 0.2, "learnable": True},
        "sampler": {"step_size": 0.02},
    },
    # Stable below 2 / precision, which is 1.3 at the start.
    "step": {"sampler": {"step_size": 50.0}},
    "exploding": {"energy": {"name": "mlp", "widths": [32, 32]}, "learner": {"lr": 0.1}},
}
"""What each run changes about the healthy one."""


ON_A_PHONE = "stagnated"
"""The run that is also shown as on a phone at night."""

GAP = 15
"""Empty pixels between rows of figures; a heading is nearer to what is below it."""


def train(name: str, run_dir: Path) -> None:
    config = {section: dict(keys) for section, keys in HEALTHY.items()}
    for section, keys in CHANGES[name].items():
        # Another energy has other keys.
        config[section] = keys if "name" in keys else config[section] | keys
    ebm_dist.train(config, run_dir=run_dir, console=Console(file=io.StringIO()))


def photograph(
    page: Path, out: Path, *, chromium: str, height: int, width: int = 900, dark: bool = False
) -> None:
    """The top of `page`: the verdicts and the first curves, at most `height` pixels.

    It ends below a whole row of figures.
    """
    with tempfile.TemporaryDirectory() as profile:
        subprocess.run(
            [
                chromium,
                "--headless",
                "--no-sandbox",
                "--disable-gpu",
                "--hide-scrollbars",
                # Without it a busy machine's picture may lack a tile.
                "--run-all-compositor-stages-before-draw",
                f"--user-data-dir={profile}",
                f"--window-size={width},{height}",
                f"--blink-settings=preferredColorScheme={0 if dark else 1}",
                f"--screenshot={out}",
                page.resolve().as_uri(),
            ],
            check=True,
            capture_output=True,
            timeout=300,
        )
    end_below_a_row(out)


def end_below_a_row(picture: Path) -> None:
    """Cut `picture` at its last gap between rows of figures."""
    image = Image.open(picture).convert("RGB")
    pixels = np.asarray(image)
    filled = np.flatnonzero((pixels != pixels[0, 0]).any(axis=(1, 2)))
    ends = filled[np.flatnonzero(np.diff([*filled, len(pixels)]) > GAP)]
    image.crop((0, 0, image.width, int(ends[-1]) + GAP)).save(picture)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out_dir", type=Path)
    parser.add_argument("--only", nargs="*", default=list(CHANGES), choices=list(CHANGES))
    parser.add_argument("--chromium", default="chromium", help="the browser's command")
    parser.add_argument("--height", type=int, default=1700, help="most pixels of a page to show")
    options = parser.parse_args(arguments)
    if shutil.which(options.chromium) is None:
        parser.error(f"--chromium: no command {options.chromium}; install Chromium, or name yours")
    out_dir = options.out_dir.resolve()
    out_dir.mkdir(parents=True, exist_ok=True)
    # A page names its run's directory: relative, it says nothing of this machine.
    with tempfile.TemporaryDirectory() as scratch, contextlib.chdir(scratch):
        for name in options.only:
            train(name, Path(name))
            # The page is shown without its samples, so that curves follow the verdicts.
            shutil.rmtree(Path(name) / "samples")
            page, out = write_report(Path(name)), out_dir / f"report_{name}.png"
            photograph(page, out, chromium=options.chromium, height=options.height)
            print(out.name)
            if name == ON_A_PHONE:
                out = out_dir / "report_phone.png"
                photograph(
                    page,
                    out,
                    chromium=options.chromium,
                    height=options.height,
                    width=390,
                    dark=True,
                )
                print(out.name)
    return 0


if __name__ == "__main__":
    sys.exit(main())
