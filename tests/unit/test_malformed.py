"""Malformed inputs through the command line: one clear line, its exit code, nothing left behind."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import pytest
import yaml

from ebm_dist.cli import main
from ebm_dist.files.safe_open import sha256

BASE = {
    "run": {"name": "small", "steps": 2},
    "runtime": {"backend": "inline", "device": "cpu"},
    "data": {"source": "toy:two_moons", "batch_size": 16, "toy_samples": 256},
    "energy": {"name": "mlp", "widths": [8]},
    "sampler": {"name": "langevin", "step_size": 0.01, "temperature": 1.0, "num_steps": 3},
    "objective": {"name": "contrastive", "energy_l2": 0.1},
    "buffer": {"capacity": 64, "num_shards": 2},
    "workers": {"num_chains": 8},
    "tracking": {"wandb": "off"},
    "evaluation": {"every": None},
}


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    out = tmp_path_factory.mktemp("shards") / "moons"
    assert main(["data", "prepare", "toy:two_moons", str(out)]) == 0
    return out


@pytest.fixture(scope="module")
def finished(tmp_path_factory, cache):
    """A finished run with two checkpoints and an export."""
    root = tmp_path_factory.mktemp("finished")
    (root / "c.yaml").write_text(yaml.safe_dump(BASE))
    args = ["train", str(root / "c.yaml"), f"data.cache_dir={cache}", "checkpoint.every=1"]
    assert main([*args, "--run-dir", str(root / "run")]) == 0
    return root / "run"


@pytest.fixture
def write(tmp_path, cache):
    """Writes the base config, changed; returns its path."""

    def write(text: str | None = None, **sections) -> Path:
        data = {key: {**value, **sections.pop(key, {})} for key, value in BASE.items()}
        data["data"]["cache_dir"] = str(cache)
        path = tmp_path / "c.yaml"
        path.write_text(yaml.safe_dump({**data, **sections}) if text is None else text)
        return path

    return write


def one_line(capsys, args: list[str], code: int = 2) -> str:
    """The single line on stderr of `ebm-dist ARGS`, which must end with `code`."""
    capsys.readouterr()
    came = main(args)
    captured = capsys.readouterr()
    assert came == code, captured.err
    assert "Traceback" not in captured.err + captured.out
    lines = captured.err.splitlines()
    assert len(lines) == 1, captured.err
    assert lines[0].startswith("error: ")
    return lines[0]


CONFIG = [
    # (overrides, where the line points, what it says)
    (["run.steps=0"], "run.steps", "greater than 0"),
    (["run.steps=-5"], "run.steps", "got -5"),
    (["run.steps=many"], "run.steps", "whole number"),
    (["run.steps=1.5"], "run.steps", "got 1.5"),
    (["run.steps=true"], "run.steps", "got true"),
    (["run.steps='100'"], "run.steps", "got '100'"),
    (["run.seed=-1"], "run.seed", "got -1"),
    (["run.seed=99999999999999999999999"], "run.seed", "less than"),
    (["run.name=../../etc"], "run.name", "match pattern"),
    (["run.name=''"], "run.name", "match pattern"),
    (["run=5"], "run", "section of keys"),
    (["run.steps=null"], "run.steps", "got null"),
    (["rnu.steps=5"], "rnu", "did you mean 'run'"),
    (["lr=1e-4"], "lr", "did you mean learner.lr"),
    (["runtime.backend=spark"], "runtime.backend", "'inline' or 'ray'"),
    (["runtime.device=tpu"], "runtime.device", "'cuda'"),
    (["data.batch_size=-16"], "data.batch_size", "got -16"),
    (["data.batch_size=15"], "data.batch_size", "multiple of workers.num_chains"),
    (["buffer.num_negatives=15"], "buffer.num_negatives", "multiple of workers.num_chains"),
    (["data.batchsize=16"], "data.batchsize", "did you mean 'batch_size'"),
    (["data.source=[digits]"], "data.source", "text"),
    (["data.source=toy:two_moon"], "data.source", "did you mean 'two_moons'"),
    (["data.source=/no/such/directory"], "/no/such/directory", ""),
    (["data.holdout=1.5"], "data.holdout", "less than 1"),
    (["energy.name=mpl"], "energy.name", "did you mean 'mlp'"),
    (["energy={widths: [8]}"], "energy.name", "missing"),
    (["energy.widths=[8, -8]"], "energy.widths.1", "got -8"),
    (["energy.widths=eight"], "energy.widths", "list"),
    (["energy.activation=swish"], "energy.activation", "'silu'"),
    (["energy={name: resnet}"], "energy.name", "image"),
    (["energy={name: quadratic, precision: 1.0}"], "energy.name", "no parameters to train"),
    (["energy.event_shape=[3]"], "energy.event_shape", "(2,)"),
    (["sampler.step_size=0"], "sampler.step_size", "got 0"),
    (["sampler.step_size=.nan"], "sampler.step_size", "got nan"),
    (["sampler.step_size=fast"], "sampler.step_size", "got 'fast'"),
    (["sampler.noise_std=0.1"], "sampler", "exactly one of temperature and noise_std"),
    (["sampler={name: langevin, temperature: 1.0}"], "sampler.step_size", "missing"),
    (["sampler.friction=1.0"], "sampler.friction", "unknown key"),
    (["sampler={name: gibbs}"], "sampler.name", "gibbs"),
    (["sampler.clamp=[1, -1]"], "sampler", "lower end comes first"),
    (["objective.name=contrastiv"], "objective.name", "did you mean 'contrastive'"),
    (["objective.energy_l2=-1"], "objective.energy_l2", "got -1"),
    (["objective={name: joint}"], "energy.num_classes", "joint"),
    (["buffer.capacity=4"], "buffer.capacity", "fill a lease"),
    (["energy.widths=[1000000000000]"], "energy", "needs more than"),
    (["buffer.capacity=1e15"], "buffer.capacity", "GiB"),
    (["data.batch_size=16e12", "buffer.capacity=64e12"], "data.batch_size", "GiB"),
    (["evaluation.num_samples=1e15"], "evaluation.num_samples", "GiB"),
    (["data.toy_samples=1e15"], "data.toy_samples", "less than or equal"),
    (["workers.num_workers=1e9"], "workers.num_workers", "less than or equal"),
    (["sampler.num_steps=1e12"], "sampler.num_steps", "less than or equal"),
    ([r'run.dir="a\0b"'], "run.dir", "NUL"),
    (["3=4"], "3", "unknown key"),
    (["a" + ".a" * 5000 + "=1"], "override", "deeper than"),
    (["run.name=!!bool maybe"], "override run.name", "no value of"),
    (["buffer.capacity=0"], "buffer.capacity", "got 0"),
    (["buffer.reinit_prob=1.5"], "buffer.reinit_prob", "less than or equal to 1"),
    (["buffer.init=zeros"], "buffer.init", "'noise'"),
    (["workers.num_workers=0"], "workers.num_workers", "got 0"),
    (["workers.num_chains=32"], "data.batch_size", "multiple of workers.num_chains"),
    (["learner.num_ranks=2"], "learner.num_ranks", "one process"),
    (["learner.zero_stage=4"], "learner.zero_stage", "got 4"),
    (["learner.precision=fp16"], "learner.precision", "'bf16'"),
    (["learner.betas=[0.9]"], "learner.betas.1", "missing"),
    (["learner.betas=[0.9, 1.5]"], "learner.betas.1", "less than 1"),
    (["learner.accumulation=3"], "data.batch_size", "multiple of"),
    (["learner.deepspeed={zero_optimization: {stage: 2}}"], "learner.deepspeed", "zero_stage"),
    (["learner.deepspeed={train_batch_size: 8}"], "learner.deepspeed", "data.batch_size"),
    (["learner.deepspeed={prescale_gradient: true}"], "learner.deepspeed", "did you mean"),
    (["flow.mode=asynch"], "flow.mode", "'sync'"),
    (["flow.max_lag=0"], "flow.max_lag", "got 0"),
    (["flow.stale=reweight", "objective.temperature=2.0"], "objective.temperature", "leave it out"),
    (["checkpoint.every=0"], "checkpoint.every", "got 0"),
    (["checkpoint.keep=0"], "checkpoint.keep", "got 0"),
    (["tracking.wandb=on"], "tracking.wandb", "'online'"),
    (["tracking.projct=x"], "tracking.projct", "did you mean 'project'"),
    (["evaluation.every=0"], "evaluation.every", "got 0"),
    (["run.steps"], "override", "KEY.SUB=VALUE"),
    (["=5"], "override", "KEY.SUB=VALUE"),
    (["run..steps=5"], "override", "KEY.SUB=VALUE"),
    (["run.steps=[1"], "override run.steps", "not valid YAML"),
    (["run.steps.more=1"], "override run.steps.more", "not a section"),
]


@pytest.mark.parametrize(("overrides", "where", "says"), CONFIG, ids=lambda v: str(v)[:50])
def test_a_wrong_value_is_one_line_that_names_its_key(
    write, capsys, tmp_path, overrides, where, says
):
    path = write()
    line = one_line(capsys, ["train", str(path), *overrides, "--run-dir", str(tmp_path / "run")])
    assert f"{where}: " in line or f"{where} " in line
    assert says in line
    assert not (tmp_path / "run").exists(), "a refused config left a run directory behind"


FILES = {
    "empty": ("", "found nothing"),
    "a list": ("- run\n- data\n", "found a list"),
    "a word": ("hello", "found a str"),
    "a key twice": ("run: {}\nrun: {}\n", "'run' comes twice"),
    "a key twice inside": ("run: {seed: 1, seed: 2}\n", "'seed' comes twice"),
    "not closed": ("run: {name: x\n", "not valid YAML"),
    "a tab": ("run:\n\tname: x\n", "not valid YAML"),
    "a python object": ("run: !!python/object/apply:os.system ['true']\n", "tag"),
    "an alias to nothing": ("run: *base\n", "not valid YAML"),
    "an alias to itself": ("run: &a {name: *a}\n", "recursive"),
    "two documents": ("run: {}\n---\nrun: {}\n", "not valid YAML"),
    "a number as key": ("1: {}\n", "must be text"),
    "a control character": ("run: {name: a\x00b}\n", "not valid YAML"),
    "nested to no end": ("run: " + "[" * 400 + "]" * 400 + "\n", "not"),
}


@pytest.mark.parametrize("fault", FILES)
def test_a_file_that_is_no_config_is_one_line(write, capsys, fault):
    text, says = FILES[fault]
    path = write(text)
    line = one_line(capsys, ["train", str(path)])
    assert says in line
    assert str(path) in line


@pytest.mark.parametrize("fault", ["missing", "directory", "binary", "huge"])
def test_a_path_that_is_no_text_file_is_one_line(write, capsys, tmp_path, fault):
    path = write()
    if fault == "missing":
        assert "did you mean" in one_line(capsys, ["train", str(path.with_name("b.yaml"))])
    elif fault == "directory":
        assert "is a directory" in one_line(capsys, ["train", str(tmp_path)])
    elif fault == "binary":
        path.write_bytes(bytes(range(128, 256)))
        assert "not UTF-8" in one_line(capsys, ["train", str(path)])
    else:
        path.write_text("#" * (1 << 21))
        assert "larger than" in one_line(capsys, ["train", str(path)])


def cut(path: Path, size: int) -> None:
    path.write_bytes(path.read_bytes()[:size])


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0x40
    path.write_bytes(data)


def first(folder: Path, pattern: str) -> Path:
    return sorted(folder.glob(pattern))[0]


def edit_json(path: Path, **changes) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def forge(checkpoint: Path, *, without: str | None = None, **meta) -> None:
    """Change a checkpoint as somebody would who also mends its checksums."""
    edit_json(checkpoint / "meta.json", **meta)
    sums = json.loads((checkpoint / "checksums.json").read_text())
    sums["meta.json"] = sha256(checkpoint / "meta.json")
    if without:
        (checkpoint / without).unlink()
        del sums[without]
    (checkpoint / "checksums.json").write_text(json.dumps(sums))


OUTSIDE = {"checkpoint": "..", "sha256": ""}

SHARDS = {
    "a shard is missing": lambda d: first(d, "train-*.tar").unlink(),
    "a shard is cut short": lambda d: cut(first(d, "train-*.tar"), 3000),
    "a shard is empty": lambda d: cut(first(d, "train-*.tar"), 0),
    "a bit of a shard flipped": lambda d: flip(first(d, "train-*.tar")),
    "a shard is another file": lambda d: first(d, "train-*.tar").write_bytes(b"\x80\x04" * 5000),
    "dataset.json is cut short": lambda d: cut(d / "dataset.json", 60),
    "dataset.json is a list": lambda d: (d / "dataset.json").write_text("[]"),
    "dataset.json of another version": lambda d: edit_json(d / "dataset.json", version=99),
    "nothing is left": lambda d: [path.unlink() for path in d.iterdir()],
}


@pytest.mark.parametrize("fault", SHARDS)
def test_damaged_shards_are_one_line(write, capsys, shards, tmp_path, fault):
    folder = tmp_path / "data"
    shutil.copytree(shards, folder)
    SHARDS[fault](folder)
    path = write(data={"source": str(folder)})
    line = one_line(capsys, ["train", str(path), "--run-dir", str(tmp_path / "run")])
    assert str(folder) in line or "dataset.json" in line or ".tar" in line
    assert not (tmp_path / "run").exists()


def test_a_pattern_that_matches_nothing_is_one_line(write, capsys, tmp_path):
    path = write(data={"source": None, "shards": str(tmp_path / "{00..07}.tar")})
    line = one_line(capsys, ["train", str(path), "--run-dir", str(tmp_path / "run")])
    assert "data.shards" in line or "00.tar" in line


CHECKPOINTS = {
    # name: (what is done to the run, further arguments, what the line says)
    "every checkpoint cut short": (
        lambda r: [cut(p, 100) for p in r.glob("checkpoints/*/learner.safetensors")],
        [],
        "no checkpoint is whole",
    ),
    "every meta.json missing": (
        lambda r: [p.unlink() for p in r.glob("checkpoints/*/meta.json")],
        [],
        "meta.json is missing",
    ),
    "checksums of another file": (
        lambda r: [p.write_text('{"../../x": ""}') for p in r.glob("checkpoints/*/checksums.json")],
        [],
        "outside the checkpoint",
    ),
    "no learner in any checkpoint": (
        lambda r: [forge(p, without="learner.safetensors") for p in r.glob("checkpoints/*")],
        [],
        "learner.safetensors is missing",
    ),
    "no step in any checkpoint": (
        lambda r: [forge(p, step="last") for p in r.glob("checkpoints/*")],
        [],
        "holds no step",
    ),
    "bases that are none": (
        lambda r: [forge(p, bases={"learner": 3}) for p in r.glob("checkpoints/*")],
        [],
        "unreadable",
    ),
    "a base outside": (
        lambda r: [forge(p, bases={"x": OUTSIDE}) for p in r.glob("checkpoints/*")],
        [],
        "outside the checkpoints",
    ),
    "a config of another program": (
        lambda r: [forge(p, config={"a": 1}) for p in r.glob("checkpoints/*")],
        [],
        "a run did not write this",
    ),
    "shards of another program": (
        lambda r: [forge(p, shards=[{"a": 1}, 2]) for p in r.glob("checkpoints/*")],
        ["run.steps=4"],
        "a run did not write this",
    ),
    "no checkpoint to resume": (
        lambda r: shutil.rmtree(r / "checkpoints"),
        ["--resume", "must"],
        "no checkpoint",
    ),
    "a run where none was wanted": (lambda r: None, ["--resume", "never"], "holds a run already"),
    "another energy": (lambda r: None, ["energy.widths=[9]"], "energy.widths"),
    "fewer steps than were made": (lambda r: None, ["run.steps=1"], "run.steps"),
}


@pytest.mark.parametrize("fault", CHECKPOINTS)
def test_a_run_that_cannot_go_on_is_one_line(write, capsys, finished, tmp_path, fault):
    damage, args, says = CHECKPOINTS[fault]
    shutil.copytree(finished, tmp_path / "run")
    damage(tmp_path / "run")
    line = one_line(capsys, ["train", str(write()), *args, "--run-dir", str(tmp_path / "run")])
    assert says in line


def test_one_damaged_checkpoint_is_passed_over_for_the_one_before(
    write, capsys, finished, tmp_path
):
    shutil.copytree(finished, tmp_path / "run")
    newest = sorted((tmp_path / "run" / "checkpoints").iterdir())[-1]
    flip(newest / "learner.safetensors")
    args = ["train", str(write()), "--resume", "must", "--run-dir", str(tmp_path / "run")]
    assert main(args) == 0
    out = capsys.readouterr().out
    assert "passed over a damaged checkpoint" in out
    assert "step_00000001" in out


RUN_DIRS = {
    "a file is in the way": lambda t: (t / "file").write_text("") or t / "file",
    "under a file": lambda t: (t / "file").write_text("") or t / "file" / "run",
    "under a device": lambda t: Path("/dev/null/run"),
    "where nobody can write": lambda t: Path("/proc/run"),
}


@pytest.mark.parametrize("fault", RUN_DIRS)
def test_a_run_directory_that_cannot_be_written_is_one_line(write, capsys, tmp_path, fault):
    directory = RUN_DIRS[fault](tmp_path)
    line = one_line(capsys, ["train", str(write()), "--run-dir", str(directory)])
    assert str(directory) in line
    assert "--run-dir" in line


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write into a read-only directory")
def test_a_read_only_run_directory_is_one_line(write, capsys, tmp_path):
    (tmp_path / "run").mkdir(mode=0o555)
    line = one_line(capsys, ["train", str(write()), "--run-dir", str(tmp_path / "run")])
    assert "cannot be written" in line


def test_a_run_directory_in_use_is_one_line(write, capsys, tmp_path):
    import fcntl

    (tmp_path / "run").mkdir()
    with (tmp_path / "run" / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        line = one_line(capsys, ["train", str(write()), "--run-dir", str(tmp_path / "run")])
    assert "another process" in line


def test_no_free_shared_memory_is_one_line_and_starts_no_ray(write, capsys, tmp_path, monkeypatch):
    usage = namedtuple("Usage", "total used free")
    monkeypatch.setattr(
        "ebm_dist.run.object_store.shutil.disk_usage", lambda path: usage(64, 64, 2**20)
    )
    path = write(runtime={"backend": "ray"})
    line = one_line(capsys, ["train", str(path), "--run-dir", str(tmp_path / "run")])
    assert "/dev/shm" in line
    assert "--shm-size" in line
    assert ray_processes() == []


EXPORTS = {
    "cut short": (lambda e: cut(e / "model.safetensors", 50), "cut short"),
    "of another version": (lambda e: edit_json(e / "config.json", format_version=7), "is 7"),
    "without weights": (lambda e: (e / "model.safetensors").unlink(), "missing"),
    "with a bad config": (lambda e: cut(e / "config.json", 90), "not valid JSON"),
    "a bit flipped": (lambda e: flip(e / "model.safetensors"), "checksum"),
}


@pytest.mark.parametrize("command", ["sample", "evaluate"])
@pytest.mark.parametrize("fault", EXPORTS)
def test_a_damaged_export_is_one_line(capsys, finished, tmp_path, command, fault):
    damage, says = EXPORTS[fault]
    shutil.copytree(finished / "export", tmp_path / "model")
    damage(tmp_path / "model")
    args = {
        "sample": ["--num", "1", "--steps", "1", "--out", str(tmp_path / "x.png")],
        "evaluate": ["--suite", "landscape"],
    }[command]
    assert says in one_line(capsys, [command, str(tmp_path / "model"), *args])


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["sample", "/no/such/export"], "no such file"),
        (["sample", "{run}/checkpoints"], "not an export"),
        (["sample", "{run}/metrics.jsonl"], "expected an export directory"),
        (["sample", "{run}", "--num", "0"], "--num"),
        (["sample", "{run}", "--num", "few"], "--num"),
        (["sample", "{run}", "--steps", "-1"], "--steps"),
        (["sample", "{run}", "--out", "x.jpg"], ".png or .npz"),
        (["sample", "{run}", "--num", "1", "--steps", "1", "--out", "/dev/null/x.png"], "--out"),
        (["sample", "{run}", "--device", "tpu"], "--device"),
        (["sample", "{run}", "--device", "cuda:99"], "--device"),
        (["sample", "{run}", "--start", "data"], "--start"),
        (["evaluate", "{run}"], "--suite"),
        (["evaluate", "{run}", "--suite", "beauty"], "--suite"),
        (["export", "/no/such/run", "/tmp/never"], "not a run directory"),
        (["export", "{run}/export", "/tmp/never"], "not a run directory"),
        (["export", "{run}", "{run}/checkpoints"], "not an export"),
        (["export", "{run}", "/dev/null/out"], "/dev/null/out"),
        (["export", "{run}"], "out_dir"),
        (["data", "prepare", "mnits", "/tmp/never"], "mnits"),
        (["data", "prepare", "cifar10", "/tmp/never", "--source", "/no/such"], "/no/such"),
        (["data", "prepare", "digits", "{run}"], "not empty"),
        (["data", "prepare", "digits", "/tmp/" + 300 * "n"], "too long"),
        (["sample", "/tmp/" + 300 * "n"], "too long"),
        (["config", "show", 300 * "n" + ".yaml"], "too long"),
        (["report", "/tmp/" + 300 * "n"], "too long"),
        (["config", "show", "/no/such.yaml"], "no such file"),
        (["train"], "config"),
        (["train", "a.yaml", "--resume", "maybe"], "--resume"),
        (["train", "a.yaml", "--run_dir", "x"], "--run-dir"),
        (["trian", "a.yaml"], "train"),
    ],
    ids=lambda value: " ".join(value)[:60] if isinstance(value, list) else "",
)
def test_a_wrong_command_line_is_one_line(capsys, finished, args, says):
    line = one_line(capsys, [arg.format(run=finished) for arg in args])
    assert says in line


def test_an_export_of_a_run_without_checkpoint_is_one_line(capsys, finished, tmp_path):
    shutil.copytree(finished, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    line = one_line(capsys, ["export", str(tmp_path / "run"), str(tmp_path / "out")])
    assert "no checkpoint yet" in line


@pytest.mark.parametrize(
    ("meta", "says"),
    [
        ({"event": {"shape": "wide"}}, "event.shape"),
        ({"event": {"shape": [3], "kind": "real", "num_classes": None}}, "chains of shape (2,)"),
        ({"event": {"shape": [2], "kind": ["real"]}}, "event.kind"),
        ({"event": [2]}, "event"),
    ],
)
def test_an_export_of_a_checkpoint_with_bad_events_is_one_line(
    capsys, finished, tmp_path, meta, says
):
    shutil.copytree(finished, tmp_path / "run")
    for checkpoint in (tmp_path / "run" / "checkpoints").iterdir():
        forge(checkpoint, **meta)
    line = one_line(capsys, ["export", str(tmp_path / "run"), str(tmp_path / "out")])
    assert says in line or "energy.event_shape" in line
    assert not (tmp_path / "out").exists()


def test_an_export_of_a_checkpoint_without_averaged_weights_is_one_line(capsys, finished, tmp_path):
    shutil.copytree(finished, tmp_path / "run")
    for checkpoint in (tmp_path / "run" / "checkpoints").iterdir():
        forge(checkpoint, without="ema.safetensors")
    line = one_line(capsys, ["export", str(tmp_path / "run"), str(tmp_path / "out")])
    assert "ema.safetensors" in line


def test_an_export_of_two_runs_mixed_up_is_one_line(capsys, finished, tmp_path):
    shutil.copytree(finished, tmp_path / "run")
    for path in (tmp_path / "run" / "checkpoints").iterdir():
        meta = json.loads((path / "meta.json").read_text())
        meta["config"]["energy"]["widths"] = [9]
        (path / "meta.json").write_text(json.dumps(meta))
        sums = json.loads((path / "checksums.json").read_text())
        sums["meta.json"] = sha256(path / "meta.json")
        (path / "checksums.json").write_text(json.dumps(sums))
    line = one_line(capsys, ["export", str(tmp_path / "run"), str(tmp_path / "out")])
    assert "mixes two runs" in line
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("address", "says"),
    [
        ("127.0.0.1:1", "127.0.0.1:1"),
        ("ray://127.0.0.1:1", "launch/submit.sh"),
        ("http://127.0.0.1:1", "launch/submit.sh"),
        ("127.0.0.1:99999", "HOST:PORT"),
        ("://", "HOST:PORT"),
        ("no-such-host.invalid:6379", "no-such-host.invalid"),
    ],
)
@pytest.mark.parametrize("by", ["config", "environment"])
def test_a_cluster_that_does_not_answer_is_one_line(
    write, capsys, tmp_path, monkeypatch, address, says, by
):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    runtime = {"backend": "ray"}
    if by == "config":
        runtime["address"] = address
    else:
        monkeypatch.setenv("RAY_ADDRESS", address)
    path = write(runtime=runtime)
    line = one_line(capsys, ["train", str(path), "--run-dir", str(tmp_path / "run")])
    assert says in line
    assert ("RAY_ADDRESS: " if by == "environment" else "runtime.address: ") in line
    assert not (tmp_path / "run").exists()
    assert ray_processes() == []


def ray_processes() -> list[str]:
    """Ray's processes below this one."""
    names = ("raylet", "gcs_server", "plasma")
    below = {os.getpid()}
    table = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                stat = (entry / "stat").read_text()
                command = (entry / "cmdline").read_text().replace("\0", " ")
            except OSError:
                continue
            table.append((int(entry.name), int(stat.rpartition(")")[2].split()[1]), command))
    for _ in range(len(table)):
        grown = below | {pid for pid, parent, _ in table if parent in below}
        if grown == below:
            break
        below = grown
    return [
        command for pid, _, command in table if pid in below and any(n in command for n in names)
    ]


@pytest.mark.ray
@pytest.mark.parametrize("fault", ["shard", "address", "cuda"])
def test_a_start_on_ray_that_fails_leaves_no_ray_processes(write, shards, tmp_path, fault):
    folder = tmp_path / "data"
    shutil.copytree(shards, folder)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment.pop("RAY_ADDRESS", None)
    overrides, says = [], ""
    if fault == "shard":
        cut(first(folder, "train-*.tar"), 3000)
        says = "train-"
    elif fault == "address":
        environment["RAY_ADDRESS"] = "127.0.0.1:1"
        says = "127.0.0.1:1"
    else:
        overrides, says = ["runtime.device=cuda"], "runtime.device"
    path = write(data={"source": str(folder)}, runtime={"backend": "ray"})
    command = [sys.executable, "-m", "ebm_dist", "train", str(path), *overrides]
    done = subprocess.run(
        [*command, "--run-dir", str(tmp_path / "run")],
        capture_output=True,
        text=True,
        env=environment,
        timeout=240,
    )
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr + done.stdout
    (line,) = done.stderr.splitlines()
    assert says in line
    marker = str(tmp_path)
    left = [
        entry.name
        for entry in Path("/proc").iterdir()
        if entry.name.isdigit() and marker in _environment_of(entry)
    ]
    assert left == []


def _environment_of(process: Path) -> str:
    try:
        return (process / "environ").read_text()
    except OSError:
        return ""
