"""What a run says at its end: where its outputs are, what its time went into, what to run next."""

from __future__ import annotations

import contextlib
import shlex
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.console import Console
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from ebm_dist.core import installed
from ebm_dist.metrics.hub import HubInfo
from ebm_dist.metrics.progress import clock, number

QUALITY = ("energy/gap", "fidelity/distance", "throughput/mcmc_steps_per_s")
"""Metrics of the last screen; MCMC steps are left out where there were none."""


class Laps:
    """What the time of a run went into: the seconds of each part, in order."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._since = time.monotonic()

    def end(self, name: str, *, of_which: tuple[str, float] | None = None) -> None:
        """End the part `name`; `of_which` names seconds in it that count as a part of their own."""
        now = time.monotonic()
        self.seconds[name], self._since = now - self._since, now
        if of_which is not None:
            self.seconds[name] -= of_which[1]
            self.seconds[of_which[0]] = of_which[1]

    def __str__(self) -> str:
        minutes, seconds = divmod(round(sum(self.seconds.values())), 60)
        total = f"{minutes} min {seconds} s" if minutes else f"{seconds} s"
        parts = ", ".join(f"{value:.0f} s {name}" for name, value in self.seconds.items())
        return f"{total}: {parts}"


def final_screen(
    *,
    run_dir: str | Path,
    steps: int,
    wall_time: float,
    samples: str | Path | None = None,
    wandb: HubInfo | None = None,
    export: str | Path | None = None,
    metrics: Mapping[str, float] | None = None,
    laps: Laps | None = None,
    interrupted: bool = False,
    stopped_by: str | None = None,
    from_python: bool = False,
    plugins: Sequence[str] = (),
    console: Console | None = None,
) -> None:
    """Print the paths of the run's outputs, and the commands to run next.

    Args:
        steps: the last learner update.
        wall_time: seconds of this attempt.
        samples: the newest sample grid.
        wandb: the result of `MetricHub.info()`.
        export: the export's directory.
        metrics: the last value of each metric, of which a few are shown.
        laps: what this attempt's time went into.
        interrupted: whether the run stopped early; the resume command then comes first.
        stopped_by: the callback that stopped it.
        from_python: whether objects were given in Python, which no command can find again.
        plugins: modules of the user that the export needs.
    """
    console = console if console is not None else Console()
    run_dir = Path(run_dir)
    rows = Table.grid(padding=(0, 2, 0, 0))
    rows.add_column(style="dim", no_wrap=True)
    rows.add_column(overflow="fold")
    rows.add_row("run", shown(run_dir))
    rows.add_row("samples", shown(samples) if samples else "none drawn")
    rows.add_row("metrics", shown(run_dir / "metrics.jsonl"))
    rows.add_row("W&B", Text(_wandb_line(wandb)))
    rows.add_row("export", shown(export) if export else "none yet")
    if laps:
        rows.add_row("time", str(laps))
    quality = {name: metrics[name] for name in QUALITY if metrics and name in metrics}
    if not quality.get("throughput/mcmc_steps_per_s", 1.0):
        del quality["throughput/mcmc_steps_per_s"]
    if quality:
        rows.add_row("", Text("   ".join(f"{k} {number(v)}" for k, v in quality.items())))
    state = "interrupted" if interrupted else "done"
    if stopped_by:
        state = f"stopped by callback {stopped_by}"
    console.print(
        Panel(
            rows,
            title=f"{state} at update {steps:,} after {clock(wall_time)}",
            title_align="left",
            border_style="yellow" if interrupted else "green",
        )
    )
    # Printed outside the panel and unwrapped, so that they can be copied; only the terminal itself
    # may wrap them.
    console.print("next", style="dim")
    commands = suggested_commands(
        run_dir,
        export,
        steps=steps,
        interrupted=interrupted,
        from_python=from_python,
        plugins=plugins,
    )
    if wandb and wandb["sync"]:
        commands.append(_near(wandb["sync"]))
    for command in commands:
        console.print(Text(command, style="green"), soft_wrap=True)


def suggested_commands(
    run_dir: Path,
    export: str | Path | None,
    *,
    steps: int,
    interrupted: bool = False,
    from_python: bool = False,
    plugins: Sequence[str] = (),
) -> list[str]:
    """Commands to run after a run of `steps` updates, ready to paste."""
    ebm_dist = installed.command()
    run = shlex.quote(shown(run_dir).plain)
    if from_python:
        return [f"{ebm_dist} report {run}"]
    config = shlex.quote(shown(run_dir / "config.yaml").plain)
    resume = f"{ebm_dist} train {config} --run-dir {run} --resume must"
    if not interrupted:
        resume += f" run.steps={2 * max(steps, 1)}"  # train for the same time again
    if export:
        model = shlex.quote(shown(export).plain)
        sample = f"{ebm_dist} sample {model} --num 64 --out more.png"
    else:
        sample = f"{ebm_dist} export {run} {shlex.quote(shown(run_dir / 'export').plain)}"
    sample += "".join(f" --plugin {name}" for name in plugins)
    commands = [sample, f"{ebm_dist} report {run}", resume]
    return [commands[-1], *commands[:-1]] if interrupted else commands


def shown(path: str | Path) -> Text:
    """`path` as a user would type it: relative if it is below the working directory."""
    path = Path(path)
    with contextlib.suppress(ValueError, OSError):
        path = path.resolve().relative_to(Path.cwd().resolve())
    return Text(str(path))


def _wandb_line(info: HubInfo | None) -> str:
    if info is None:
        return "off"
    line = info["url"] or info["notice"] or info["mode"]
    if info["sync"]:
        line = line.replace(
            f"; sync later with `{info['sync']}`", "; the last command below sends it"
        )
    return _near(line.removeprefix("W&B: "))  # its row is called so


def _near(text: str) -> str:
    return text.replace(f"{Path.cwd()}/", "")
