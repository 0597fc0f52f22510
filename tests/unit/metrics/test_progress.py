"""The live view shows what a person asks for, and never harms the run or the terminal."""

from __future__ import annotations

import io
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from rich.console import Console

from ebm_dist.metrics import last_screen, progress
from ebm_dist.metrics.hub import unknown_hub
from ebm_dist.metrics.last_screen import Laps, final_screen
from ebm_dist.metrics.progress import TerminalView, clock, number

METRICS = {
    "energy/gap": -0.0123,
    "throughput/mcmc_steps_per_s": 41_234.0,
    "flow/lag_mean": 2.25,
    "flow/lag_max": 5.0,
    "wait/learner": 0.31,
}


class Clock:
    """A monotonic clock that a test moves."""

    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now

    def strftime(self, form: str) -> str:
        return "12:00:00"


@pytest.fixture
def moved(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock_ = Clock()
    monkeypatch.setattr(progress, "time", clock_)
    return clock_


def terminal(width: int = 100) -> Console:
    return Console(file=io.StringIO(), force_terminal=True, width=width, record=True)


def written(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_the_view_shows_update_gap_rate_lag_waiting_and_time_left(moved: Clock) -> None:
    console = terminal()
    view = TerminalView(3000, "digits", console)
    for step in range(1000, 1110, 10):
        view.update(step, METRICS, "learner waits for negatives")
        moved.now += 2.0
    moved.now -= 2.0
    console.print(view.render())
    text = console.export_text()
    for part in (
        "update 1,100 of 3,000",
        "time left 6:20",  # 1900 updates at 10 in 2 s
        "energy gap -0.0123",
        "MCMC steps/s 41,234",
        "lag 2.25 (max 5)",
        "waits learner waits for negatives",
    ):
        assert part in text, text


def test_the_view_of_a_run_without_chains_shows_no_steps_of_them(moved: Clock) -> None:
    console = terminal()
    view = TerminalView(100, "digits", console)
    view.update(1, METRICS | {"throughput/mcmc_steps_per_s": 0.0}, "")
    console.print(view.render())
    assert "MCMC" not in console.export_text()


def test_the_view_says_so_as_long_as_workers_compile_their_steps(moved: Clock) -> None:
    view = TerminalView(100, "digits", terminal())
    for num, shown in ((2, "compiling on 2 workers"), (1, "compiling on 1 worker,"), (0, "")):
        view.update(1, METRICS, "", num)
        assert shown in view.line()
        assert ("compiling" in view.line()) == bool(shown)
    console = terminal()
    view.update(2, METRICS, "", 2)
    console.print(view.render())
    assert "compiling on 2 workers" in console.export_text()


def test_a_view_without_updates_says_so(moved: Clock) -> None:
    view = TerminalView(100, "digits", terminal())
    view.update(1, METRICS)
    assert "no update" not in view.line()
    moved.now += 45
    assert "no update for 0:45" in view.line()


def test_time_left_is_reckoned_from_the_last_minute(moved: Clock) -> None:
    view = TerminalView(1000, "digits", terminal())
    for step in range(10):  # a slow start: 30 s an update
        view.update(step)
        moved.now += 30
    for step in range(10, 200):  # then 1 s an update
        view.update(step)
        moved.now += 1
    left = view.seconds_left()
    assert left is not None
    assert abs(left - 800) < 5


def test_a_run_that_goes_back_to_a_checkpoint_has_no_negative_time_left(moved: Clock) -> None:
    view = TerminalView(1000, "digits", terminal())
    for step in (100, 200, 50, 60):
        moved.now += 1
        view.update(step)
    assert view.seconds_left() == pytest.approx(94.0)


def test_without_a_terminal_there_is_a_plain_line_every_ten_seconds(moved: Clock) -> None:
    console = Console(file=io.StringIO(), width=40)
    with TerminalView(1000, "digits", console) as view:
        for step in range(0, 250, 10):
            view.update(step, METRICS, "learner computes")
            moved.now += 1.0
        view.say("checkpoint written")
        view.say("passed over \x1b[2J\x07")
    lines = written(console).splitlines()
    updates = [line for line in lines if line.startswith("digits: update ")]
    assert len(updates) == 4  # at 0, 10 and 20 s, and the last one
    assert "checkpoint written" in lines
    assert "left 1:30" in updates[1]  # 900 updates at 10 a second
    assert "\x1b" not in written(console)


def test_in_a_notebook_one_panel_redraws_itself_and_events_stay(
    moved: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown, updated, said = [], [], []
    handle = SimpleNamespace(update=updated.append)

    def display(what, **options):
        (shown if options.get("display_id") else said).append(what)
        return handle

    module = SimpleNamespace(display=display)
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(display=module))
    monkeypatch.setitem(sys.modules, "IPython.display", module)
    with TerminalView(100, "blobs", Console(force_jupyter=True, width=90)) as view:
        view.say("sampler left out: mala")
        for step in range(0, 101, 10):
            view.update(step, METRICS)
            moved.now += 0.2
    assert len(said) == len(shown) == 1
    assert 3 < len(updated) < 8  # about twice a second, and at the end
    assert "update 100 of 100" in updated[-1]._repr_mimebundle_((), ())["text/plain"]


def test_in_one_process_nothing_is_said_to_wait(moved: Clock) -> None:
    view = TerminalView(100, "blobs", terminal(), is_pool=False)
    view.update(1, METRICS, "learner waits for negatives (100%)")
    assert "wait" not in view.line()
    moved.now += 45
    assert "no update for 0:45" in view.line()


def test_an_exception_gives_the_terminal_back(moved: Clock) -> None:
    console = terminal()

    def train() -> None:
        with TerminalView(10, "digits", console) as view:
            view.update(1, METRICS)
            assert "\x1b[?25l" in written(console)  # cursor hidden
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train()
    assert written(console).rindex("\x1b[?25h") > written(console).rindex("\x1b[?25l")


def test_bad_values_and_a_broken_console_do_not_raise(moved: Clock) -> None:
    class Broken(io.StringIO):
        def write(self, text: str) -> int:
            raise OSError("terminal gone")

    for force in (True, False):
        with TerminalView(10, "digits", Console(file=Broken(), force_terminal=force)) as view:
            view.update(1, {"energy/gap": float("nan"), "flow/lag_mean": float("inf")})
            view.update("no number", {})  # type: ignore[arg-type]
            view.say("still there")


def test_numbers_and_clocks_are_short() -> None:
    assert [number(v) for v in (0.0, -0.012345, 41234.4, 3e9, 12.0)] == [
        "0",
        "-0.0123",
        "41,234",
        "3,000,000,000",
        "12",
    ]
    assert [clock(v) for v in (None, 5, 65, 3723)] == ["--:--", "0:05", "1:05", "1:02:03"]


def test_the_last_screen_says_where_everything_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(last_screen.installed, "command", lambda: ".venv/bin/ebm-dist")
    console = terminal(80)
    run = tmp_path / "runs" / "my digits"
    final_screen(
        run_dir=run,
        steps=3000,
        wall_time=251.0,
        samples=run / "samples" / "step_00003000.png",
        wandb={
            **unknown_hub(None),
            "mode": "offline",
            "notice": f"W&B: offline; sync later with `.venv/bin/wandb sync '{run}/wandb'/x`",
            "sync": f".venv/bin/wandb sync '{run}/wandb'/x",
        },
        export=run / "export",
        console=console,
    )
    written = console.export_text()
    # Each in one line of its own, however narrow the terminal, for somebody to copy.
    for command in (
        ".venv/bin/ebm-dist sample 'runs/my digits/export' --num 64 --out more.png",
        ".venv/bin/ebm-dist report 'runs/my digits'",
        ".venv/bin/ebm-dist train 'runs/my digits/config.yaml' --run-dir 'runs/my digits' "
        "--resume must run.steps=6000",
        ".venv/bin/wandb sync 'runs/my digits/wandb'/x",
    ):
        assert command in [line.rstrip() for line in written.splitlines()], written
    text = re.sub(r"\s*│\s*|[╭╮╰╯─]", " ", written)
    for part in (
        "done at update 3,000 after 4:11",
        "runs/my digits/samples/step_00003000.png",
        "runs/my digits/metrics.jsonl",
        " offline; the last command below sends it",
    ):
        assert part in text, text
    assert "W&B: " not in text


def test_the_last_screen_says_what_the_time_went_into(
    moved: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(last_screen, "time", moved)
    laps = Laps()
    for seconds, name, of_which in (
        (12.2, "to start", None),
        (183.0, "updates", ("evaluations", 18.0)),
        (5.0, "export", None),
    ):
        moved.now += seconds
        laps.end(name, of_which=of_which)
    console = terminal()
    final_screen(run_dir="runs/digits", steps=3, wall_time=183.0, laps=laps, console=console)
    line = "3 min 20 s: 12 s to start, 165 s updates, 18 s evaluations, 5 s export"
    assert line in console.export_text()


def test_an_interrupted_run_is_told_first_how_to_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(last_screen.installed, "command", lambda: "ebm-dist")
    commands = last_screen.suggested_commands(Path("runs/digits"), None, steps=7, interrupted=True)
    assert (
        commands[0] == "ebm-dist train runs/digits/config.yaml --run-dir runs/digits --resume must"
    )
    assert commands[1].startswith("ebm-dist export runs/digits ")
