"""The command line: each command calls a function of the package; failures become one line."""

from __future__ import annotations

import contextlib
import io
import os
import shlex
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Literal

import typer

from ebm_dist._version import __version__
from ebm_dist.commands.data import data_app
from ebm_dist.commands.failures import explain, say
from ebm_dist.commands.hub import push
from ebm_dist.commands.import_weights import import_weights
from ebm_dist.commands.options import (
    Argument,
    ConfigFile,
    ExportDir,
    License,
    Option,
    Overrides,
    Plugins,
    import_named,
    plain_overrides,
)
from ebm_dist.commands.pretrained import pretrained_app
from ebm_dist.core import installed
from ebm_dist.core.errors import RunFailed, UserError, one_line
from ebm_dist.core.signals import interrupting

# Everything else is imported inside the command that needs it: `--help` answers within a
# second, and sampling an export works where Ray and DeepSpeed are not installed.

app = typer.Typer(
    name="ebm-dist",
    help="Train, sample, evaluate and export energy-based models.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
dashboard_app = typer.Typer(help="The W&B workspace, written as code.", no_args_is_help=True)
config_app = typer.Typer(help="Show a config, or the schema of configs.", no_args_is_help=True)
app.add_typer(data_app, name="data")
app.add_typer(dashboard_app, name="dashboard")
app.add_typer(config_app, name="config")
app.add_typer(pretrained_app, name="pretrained")


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"ebm_dist {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option(
            "--version", help="Print the version and exit.", callback=_version, is_eager=True
        ),
    ] = False,
) -> None:
    """Options without a command."""


STOPPED = 75
"""Exit code of a training that a signal stopped: sysexits' EX_TEMPFAIL, "try again later"."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line on `argv` (sys.argv when None) and return its exit code.

    0 done or stopped by a callback, 2 the user's input is wrong, 1 the run failed, 75 a signal
    stopped the training after a checkpoint, 130 a signal stopped it before any checkpoint, or
    stopped another command. `EBM_DIST_DEBUG=1` raises exceptions with their traceback.
    """
    arguments = plain_overrides(sys.argv[1:] if argv is None else argv)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a locale may lack a character, such as ²
            stream.reconfigure(errors="backslashreplace")
    try:
        with interrupting():
            code = app(args=arguments, standalone_mode=False)
    except Exception as error:
        if os.environ.get("EBM_DIST_DEBUG") == "1":
            raise
        return explain(error)
    except KeyboardInterrupt:
        return say("interrupted", 130)
    return code if isinstance(code, int) else 0


@contextlib.contextmanager
def _failures_say_how_to_resume(run_dir: Path) -> Iterator[None]:
    try:
        yield
    except (ValueError, OSError, ModuleNotFoundError):
        raise
    except Exception as error:
        what = " ".join(str(error).split())
        if not isinstance(error, RunFailed):
            what = f"{type(error).__name__}: {what}"
        if (log := run_dir / "run.log").is_file():
            what += f"; log: {log}"
        if any(run_dir.glob("checkpoints/step_*")):
            config = run_dir / "config.yaml"
            command = shlex.join(["train", str(config), "--run-dir", str(run_dir)])
            what += f"; resume: {installed.command()} {command} --resume must"
        raise RunFailed(what) from error


@app.command(
    epilog="Example: ebm-dist train configs/digits.yaml learner.lr=2e-4 --run-dir runs/digits\n\n"
    "Exit codes: 0 done or stopped by a callback, 1 the run failed, 2 the input is wrong, 75 "
    "stopped by Ctrl-C, SIGTERM or SIGHUP after a checkpoint (the same command resumes), 130 "
    "stopped before any checkpoint."
)
def train(
    config: ConfigFile,
    overrides: Overrides = None,
    run_dir: Annotated[
        Path | None, Option(help="The run directory; run.dir/run.name when left out.")
    ] = None,
    resume: Annotated[
        Literal["auto", "never", "must"],
        typer.Option(
            help="auto: resume from the newest checkpoint, if any; never: start a new run; must: "
            "fail without a checkpoint."
        ),
    ] = "auto",
) -> None:
    """Train the energy that CONFIG describes."""
    from ebm_dist.config.run_config import load

    loaded = load(config, overrides or [], trusted=True)
    from ebm_dist.run.train import train as run

    directory = run_dir or Path(loaded.run.dir) / loaded.run.name
    with _failures_say_how_to_resume(directory):
        result = run(loaded, run_dir=directory, resume=resume)
    if not result.finished and result.stopped_by is None:
        raise typer.Exit(STOPPED)


@app.command(epilog="Example: ebm-dist sample digits --label 3 --num 64 --out threes.png")
def sample(
    checkpoint: ExportDir,
    num: Annotated[int, typer.Option(min=1, help="Chains to draw.")] = 64,
    steps: Annotated[
        int | None,
        typer.Option(
            min=0, help="Sampler steps of each chain; the median age of the run's if left out."
        ),
    ] = None,
    out: Annotated[Path, Option(help="A picture (.png) or arrays x and energy (.npz).")] = Path(
        "samples.png"
    ),
    start: Annotated[
        Literal["noise", "chains"],
        typer.Option(help="Start from noise, or from the run's last chains."),
    ] = "noise",
    label: Annotated[
        int | None, typer.Option(min=0, help="The class to draw, of an energy that takes labels.")
    ] = None,
    level: Annotated[
        int | None, typer.Option(min=0, help="The noise level, of an energy over levels.")
    ] = None,
    condition: Annotated[
        Path | None,
        Option(
            help="The given parts (.npy) that the samples of a conditional energy take in turn; "
            "those of the run's last chains if left out."
        ),
    ] = None,
    temperature: Annotated[
        float | None, typer.Option(help="T > 0 of the law exp(-E/T); the run's if left out.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the starts and the noise.")] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    plugin: Plugins = [],  # noqa: B006
) -> None:
    """Draw samples from an exported model with its training sampler."""
    from ebm_dist.commands.progress import progress
    from ebm_dist.data.format.npy import open_npy
    from ebm_dist.export.reader import open_export
    from ebm_dist.export.sample import check_suffix, draw, save_samples, usual_steps

    check_suffix(out)
    export = open_export(checkpoint, plugins=import_named(plugin))
    steps = usual_steps(export, level) if steps is None else steps
    given = None if condition is None else open_npy(condition)
    with progress("sampling") as stages:
        drawn = draw(
            export,
            num,
            steps,
            label=label,
            level=level,
            condition=given,
            temperature=temperature,
            seed=seed,
            start=start,
            device=_device(device),
            on_step=lambda done, mean: stages.step(done, num * steps, f"mean energy {mean:.3f}"),
        )
    save_samples(out, drawn, export)
    print(f"{num} samples after {steps} steps from {start}: {out}")


@app.command(epilog="Example: ebm-dist evaluate runs/digits/export --suite ood --out ood.json")
def evaluate(
    checkpoint: ExportDir,
    suite: Annotated[
        Literal["density", "ood", "robustness", "fidelity", "landscape"],
        typer.Option(help="The measurements to run.", show_default=False),
    ],
    out: Annotated[
        Path | None,
        Option(help="Write the result here as JSON, with log p of each event; pictures beside it."),
    ] = None,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    data: Annotated[
        str | None, typer.Option(help="The model's data, if no longer at data.source.")
    ] = None,
    plugin: Plugins = [],  # noqa: B006
) -> None:
    """Evaluate an exported model on one suite."""
    import json

    from ebm_dist.commands.progress import progress
    from ebm_dist.export.reader import open_export
    from ebm_dist.export.suites import evaluate as run_suite
    from ebm_dist.files.durable import write_output

    export = open_export(checkpoint, plugins=import_named(plugin))
    with progress(suite) as stages:
        result = run_suite(
            export,
            suite,
            seed=seed,
            device=_device(device),
            data=data,
            out=out,
            say=stages.begin,
            on_step=stages.step,
        )
    width = max(map(len, result["metrics"]), default=0)
    for name, value in result["metrics"].items():
        print(f"{one_line(name):<{width}}  {value:.6g}")
    for note in result["notes"]:
        print(f"note: {one_line(note)}")
    if out is not None:
        write_output(out, json.dumps(result, indent=2) + "\n")


@app.command(epilog="Example: ebm-dist export runs/digits digits-model")
def export(
    run_dir: Annotated[Path, Argument(help="A run directory.")],
    out_dir: Annotated[Path, Argument(help="The export to write.")],
    license_id: License = None,
    plugin: Plugins = [],  # noqa: B006
) -> None:
    """Write a run's newest checkpoint as safetensors, config, model card and sample grid."""
    from ebm_dist.export.writer import export_run

    print(export_run(run_dir, out_dir, license=license_id, plugins=import_named(plugin)))


app.command(epilog="Example: ebm-dist push runs/digits/export USER/digits --license mit")(push)
app.command("import-weights", epilog="Example: ebm-dist import-weights jem CIFAR10_MODEL.pt jem")(
    import_weights
)


@app.command(epilog="Example: ebm-dist report runs/digits --out digits.html")
def report(
    run_dir: Annotated[
        list[Path], Argument(help="A run directory; several are compared in one page.")
    ],
    out: Annotated[
        Path | None, Option(help="The page to write; RUN_DIR/report.html when left out.")
    ] = None,
    plugin: Plugins = [],  # noqa: B006
) -> None:
    """Write one HTML page about one or several runs: chain health, curves, samples, config."""
    from ebm_dist.report.html import write_report

    import_named(plugin)
    print(write_report(*run_dir, out=out))


@dashboard_app.command("write", epilog="Example: ebm-dist dashboard write --out dashboard.json")
def dashboard_write(
    out: Annotated[Path, Option(help="The file to write.")] = Path("dashboard.json"),
) -> None:
    """Write the W&B workspace as the JSON that `publish` sends."""
    from ebm_dist.report import dashboard

    print(dashboard.write(out))


@dashboard_app.command("publish", epilog="Example: ebm-dist dashboard publish --project ebm_dist")
def dashboard_publish(
    project: Annotated[
        str | None,
        typer.Option(help="The W&B project; WANDB_PROJECT or ebm_dist when left out."),
    ] = None,
    entity: Annotated[
        str | None,
        typer.Option(help="The W&B team or user; WANDB_ENTITY or the key's default when left out."),
    ] = None,
    file: Annotated[
        Path | None,
        Option(help="A file of `write`, perhaps edited; when left out, what it writes."),
    ] = None,
) -> None:
    """Save the workspace in a W&B project."""
    from ebm_dist.report import dashboard

    print(dashboard.publish(project, entity, file))


@app.command(epilog="Example: ebm-dist doctor")
def doctor(
    directory: Annotated[Path, Option(help="Parent directory of future runs.")] = Path("."),
) -> None:
    """Check whether this machine can run training; each line is ok or says what to do."""
    from ebm_dist.run.doctor import examine

    healthy = True
    for finding in examine(directory):
        healthy &= finding.ok
        text = one_line(finding.text)
        print(f"{'ok  ' if finding.ok else 'FAIL'} {finding.what}: {text}", flush=True)
        if finding.todo:
            print(f"     -> {finding.todo}", flush=True)
    raise typer.Exit(0 if healthy else 1)


@config_app.command("show", epilog="Example: ebm-dist config show configs/digits.yaml run.steps=10")
def config_show(
    config: ConfigFile,
    overrides: Overrides = None,
    plugin: Plugins = [],  # noqa: B006
) -> None:
    """Print the complete CONFIG, with every default."""
    from ebm_dist.config.run_config import dump, load

    import_named(plugin)
    print(dump(load(config, overrides or [])), end="")


@config_app.command("schema", epilog="Example: ebm-dist config schema > ebm_dist.schema.json")
def config_schema(plugin: Plugins = []) -> None:  # noqa: B006
    """Print the JSON schema of a config, for editors."""
    import json

    from ebm_dist.config.run_config import schema

    import_named(plugin)
    print(json.dumps(schema(), indent=2))


def _device(name: str) -> str:
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        if device.type not in ("cpu", "cuda"):
            raise RuntimeError
    except RuntimeError:
        raise UserError(f"--device: expected auto, cpu, cuda or cuda:N, got {name!r}") from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(
            f"--device: {name} is not here, torch sees {torch.cuda.device_count()} GPUs; use cpu"
        )
    return name
