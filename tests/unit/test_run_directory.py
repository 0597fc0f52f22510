"""What a run directory may hold, what may change of a run in it, and what a full disk costs."""

from __future__ import annotations

import errno
import logging
import os
import shutil
from pathlib import Path

import pytest
import yaml
from rich.console import Console

import ebm_dist.run.train
from ebm_dist.checkpoint import files as checkpoint
from ebm_dist.cli import main
from ebm_dist.cluster.backend import PartDied
from ebm_dist.config.run_config import load
from ebm_dist.controller.clients import HubClient
from ebm_dist.controller.observers.hub import HubLink
from ebm_dist.core.errors import RunFailed, UserError
from ebm_dist.export.writer import export_run
from ebm_dist.report import pictures
from ebm_dist.report.html import render
from ebm_dist.run.run_dir import run_log

SMALL = {
    "run": {"name": "small", "steps": 2},
    "runtime": {"backend": "inline", "device": "cpu"},
    "data": {"source": "toy:two_moons", "batch_size": 16, "toy_samples": 64},
    "energy": {"name": "mlp", "widths": [8]},
    "objective": {"name": "contrastive"},
    "sampler": {"name": "langevin", "step_size": 0.01, "temperature": 1.0, "num_steps": 2},
    "buffer": {"capacity": 64, "num_shards": 2},
    "workers": {"num_chains": 8},
    "tracking": {"wandb": "off", "log_every": 1},
    "evaluation": {"every": None},
    "checkpoint": {"every": 1, "keep": 2},
}


def full(*args, **kwargs):
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """A run of two updates; it is finished."""
    root = tmp_path_factory.mktemp("finished")
    train(root / "run", root)
    return root / "run"


@pytest.fixture
def run_dir(finished: Path, tmp_path: Path) -> Path:
    shutil.copytree(finished, tmp_path / "run")
    return tmp_path / "run"


def train(run_dir: Path, cache: Path, *overrides: str, console: Console | None = None):
    config = load(SMALL, [*overrides, f"data.cache_dir={cache}"])
    return ebm_dist.run.train.train(config, run_dir=run_dir, console=console)


def content(directory: Path) -> dict[str, bytes]:
    return {str(p): p.read_bytes() for p in sorted(directory.rglob("*")) if p.is_file()}


# --- what may change ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ("learner.lr=0.5", "learner.lr"),
        ("sampler.step_size=0.5", "sampler.step_size"),
        ("data.source=toy:ring", "data.source"),
        ("data.noise_std=0.5", "data.noise_std"),
        ("energy.widths=[9]", "energy.widths"),
    ],
)
def test_a_finished_run_cannot_be_relabelled(change, key, run_dir, tmp_path):
    before = content(run_dir)
    with pytest.raises(UserError, match=rf"^{key}: .*--run-dir"):
        train(run_dir, tmp_path, change)
    assert content(run_dir) == before


@pytest.mark.parametrize(
    "change", ["data.source=toy:ring", "data.noise_std=0.1", "learner.optimizer=adamw"]
)
def test_a_run_does_not_go_on_with_other_data_or_another_optimiser(change, run_dir, tmp_path):
    with pytest.raises(UserError, match="restore it, or start anew"):
        train(run_dir, tmp_path, change, "run.steps=4")


def test_a_resumed_run_says_what_changed_and_what_that_does_to_the_rate(run_dir, tmp_path):
    console = Console(record=True, width=400)
    cosine = "learner.schedule=cosine"
    changed = ["objective.energy_l2=0.1", "buffer.capacity=640", "buffer.num_shards=4"]
    result = train(run_dir, tmp_path, "run.steps=4", cosine, *changed, console=console)
    assert result.step == 4
    text = (run_dir / "run.log").read_text(encoding="utf-8")
    for said in ("run.steps 2 -> 4", "objective.energy_l2 0.0 -> 0.1", "buffer.capacity 64 -> 640"):
        assert said in text
    assert "the learning rate jumps from 0.0001 to 2.5e-05" in text


def test_a_card_says_what_the_checkpoint_was_trained_with(run_dir, tmp_path):
    edited = yaml.safe_load((run_dir / "config.yaml").read_text(encoding="utf-8"))
    edited["learner"]["lr"], edited["data"]["source"] = 0.5, "toy:ring"
    (run_dir / "config.yaml").write_text(yaml.safe_dump(edited), encoding="utf-8")
    card = (export_run(run_dir, tmp_path / "out") / "README.md").read_text(encoding="utf-8")
    assert "lr: 0.0001" in card
    assert "toy:two_moons" in card
    assert "toy:ring" not in card


def test_a_card_begins_with_front_matter_that_has_what_the_run_measured(run_dir, tmp_path):
    with (run_dir / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"step": 2, "likelihood/log_prob": -1.5}\n')
    card = (export_run(run_dir, tmp_path / "out") / "README.md").read_text(encoding="utf-8")
    _, head, text = card.split("---\n", 2)
    assert text.startswith("# small\n")
    found = yaml.safe_load(head)
    assert "license" not in found  # nobody has said one
    (model,) = found["model-index"]
    (result,) = model["results"]
    measured = {metric["type"]: metric["value"] for metric in result["metrics"]}
    assert measured == {"likelihood/log_prob": -1.5}
    assert main(["export", str(run_dir), str(tmp_path / "out"), "--license", "mit"]) == 0
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert yaml.safe_load(card.split("---\n")[1])["license"] == "mit"


# --- what a stranger put there ------------------------------------------------------------------


FILES = (".lock", "run.log", "metrics.jsonl", "histograms.jsonl")
DIRECTORIES = ("checkpoints", "samples", "wandb")


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        *(("link", name) for name in (*FILES, *DIRECTORIES)),
        *(("fifo", name) for name in FILES),
    ],
)
def test_a_run_writes_through_no_link_and_waits_for_no_fifo(kind, name, tmp_path):
    target, run_dir = tmp_path / "target", tmp_path / "run"
    run_dir.mkdir()
    if name in DIRECTORIES:
        (target / "step_00000000").mkdir(parents=True)
    else:
        target.write_text("years of work")
    if kind == "link":
        (run_dir / name).symlink_to(target)
    else:
        os.mkfifo(run_dir / name)
    before = content(tmp_path)
    with pytest.raises(UserError) as raised:
        train(run_dir, tmp_path)
    assert name in str(raised.value)
    after = content(tmp_path)
    assert {key: after[key] for key in before} == before
    assert not target.is_dir() or [p.name for p in target.iterdir()] == ["step_00000000"]


def test_a_report_shows_nothing_that_a_link_leads_to_and_waits_for_no_fifo(run_dir, tmp_path):
    (tmp_path / "secret").write_text("a secret of the reader")
    (run_dir / "config.yaml").unlink()
    (run_dir / "config.yaml").symlink_to(tmp_path / "secret")
    (run_dir / "samples").mkdir(exist_ok=True)
    os.mkfifo(run_dir / "samples" / "step_00000001.png")
    (run_dir / "metrics.jsonl").unlink()
    os.mkfifo(run_dir / "metrics.jsonl")
    assert "a secret" not in render(run_dir)


@pytest.mark.parametrize("make", [os.mkfifo, lambda path: path.symlink_to("/dev/zero")])
def test_a_config_that_is_no_file_is_one_line(make, tmp_path, capsys):
    make(tmp_path / "c.yaml")
    assert main(["train", str(tmp_path / "c.yaml")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "expected a file" in error


# --- a full disk --------------------------------------------------------------------------------


def test_a_picture_that_the_disk_refuses_does_not_end_the_run(tmp_path, monkeypatch):
    monkeypatch.setattr(pictures, "save_grid", full)
    result = train(tmp_path / "run", tmp_path, "evaluation.every=1", "evaluation.likelihood=false")
    assert result.finished
    assert "step_00000001.png not written (No space" in (tmp_path / "run" / "run.log").read_text(
        encoding="utf-8"
    )


def test_an_export_that_the_disk_refuses_fails_after_the_training_and_can_be_had_again(
    tmp_path, monkeypatch
):
    monkeypatch.setattr("ebm_dist.export.writer.save_tensors", full)
    with pytest.raises(RunFailed, match="trained to the last update, but not exported"):
        train(tmp_path / "run", tmp_path)
    assert sorted(p.name for p in (tmp_path / "run").iterdir() if "export" in p.name) == []
    monkeypatch.undo()
    assert train(tmp_path / "run", tmp_path).export_dir is not None


def test_a_log_that_the_disk_refuses_says_later_how_much_it_lost(tmp_path, capsys):
    log = logging.getLogger("ebm_dist")
    with run_log(tmp_path):
        handler = log.handlers[-1]
        file, handler._file = handler._file, open("/dev/full", "wb", buffering=0)  # type: ignore[attr-defined]  # noqa: SIM115
        log.info("one")
        log.info("two")
        handler._file.close()  # type: ignore[attr-defined]
        handler._file = file  # type: ignore[attr-defined]
        log.info("three")
    text = (tmp_path / "run.log").read_text(encoding="utf-8")
    assert "(2 records before this one were lost)" in text
    assert "three" in text
    assert capsys.readouterr().err == ""


def test_a_hub_that_cannot_start_on_a_full_disk_does_not_end_the_run(caplog, monkeypatch):
    """The first hub dies, the second cannot start, the third takes what was sent meanwhile."""

    class Backend:
        num, logged = 0, []

        def spawn(self, run_id):
            self.num += 1
            return Handle(self, self.num)

        def wait(self, refs, timeout):
            return refs

        def get(self, ref, timeout):
            if isinstance(ref, Exception):
                raise ref
            return ref

        def kill(self, handle):
            pass

    class Handle:
        def __init__(self, backend, number):
            self.backend, self.number = backend, number

        def call(self, method, *args):
            if self.number == 1:
                return PartDied("killed")
            if self.number == 2:
                return UserError("run.dir: cannot write metrics (No space left on device)")
            self.backend.logged.append((method, *args))
            return {}

    backend = Backend()
    monkeypatch.setattr(logging.getLogger("ebm_dist.run"), "handlers", [caplog.handler])
    monkeypatch.setattr(logging.getLogger("ebm_dist.run"), "propagate", False)
    caplog.set_level("INFO", logger="ebm_dist.run")
    spawn = lambda resume_id: HubClient(backend.spawn(resume_id))  # type: ignore[arg-type]  # noqa: E731
    hub = HubLink(backend, spawn, resume_id=None)  # type: ignore[arg-type]
    for step in range(3):
        hub.send(HubClient.log, step, 0, {"energy/gap": 0.0})
    assert backend.num == 3
    assert [args[1] for args in backend.logged] == [0, 1, 2]
    assert len(caplog.messages) == 2


# --- signals ------------------------------------------------------------------------------------


def test_a_signal_before_the_first_checkpoint_is_130_and_after_it_75(
    finished, run_dir, tmp_path, monkeypatch, capsys
):
    def rays_own_handler(*args):
        raise SystemExit(15)

    monkeypatch.setattr(ebm_dist.run.train, "_backend", rays_own_handler)
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(SMALL), encoding="utf-8")
    command = ["train", str(tmp_path / "c.yaml"), f"data.cache_dir={finished.parent}", "--run-dir"]
    assert main([*command, str(tmp_path / "new")]) == 130
    assert checkpoint.newest_name(tmp_path / "new") is None
    assert main([*command, str(run_dir)]) == 75
    assert "goes on from step_00000002" in capsys.readouterr().out


def test_a_signal_during_an_export_leaves_no_part_of_it(finished, tmp_path, monkeypatch):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("ebm_dist.report.grid.save_grid", interrupted)
    with pytest.raises(KeyboardInterrupt):
        export_run(finished, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_run_where_the_file_system_has_no_locks_trains_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import fcntl

    real = fcntl.flock

    def flock(file, how):
        number = file if isinstance(file, int) else file.fileno()
        if os.readlink(f"/proc/self/fd/{number}").startswith(str(tmp_path / "r")):
            raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
        return real(file, how)

    monkeypatch.setattr(fcntl, "flock", flock)
    config = tmp_path / "c.yaml"
    config.write_text(yaml.safe_dump(SMALL))
    assert main(["train", str(config), "--run-dir", str(tmp_path / "r")]) == 0
    assert "the file system has no locks" in capsys.readouterr().out
