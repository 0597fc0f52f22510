"""What people write in configs and on command lines, and what becomes of it."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from ebm_dist.cli import main
from ebm_dist.commands.options import plain_overrides
from ebm_dist.config.run_config import RunConfig, schema
from ebm_dist.config.text import apply_override

SMALL = {
    "data": {"source": "toy:two_moons"},
    "energy": {"name": "mlp", "widths": [8, 16]},
    "sampler": {"name": "langevin", "step_size": 0.01, "temperature": 1.0},
}


def shown(capsys: pytest.CaptureFixture[str], path: Path, *overrides: str) -> dict:
    assert main(["config", "show", str(path), *overrides]) == 0, capsys.readouterr().err
    return yaml.safe_load(capsys.readouterr().out)


@pytest.fixture
def small(tmp_path: Path) -> Path:
    path = tmp_path / "c.yaml"
    path.write_text(yaml.safe_dump(SMALL))
    return path


# -- on the command line


def test_overrides_as_sweep_agents_write_them_are_overrides(small: Path, capsys):
    read = shown(capsys, small, "--learner.lr=1e-3", "--sampler.step_size=0.5", "run.name=a--b")
    assert (read["learner"]["lr"], read["sampler"]["step_size"]) == (1e-3, 0.5)


def test_only_an_option_with_a_dot_is_an_override(small: Path, capsys):
    words = ["train", "--run-dir=a.b=c", "--resume", "--learner.lr", "a=--b.c=1"]
    assert plain_overrides(words) == words
    assert main(["config", "show", str(small), "--learner-lr=1"]) == 2
    assert "No such option: --learner-lr" in capsys.readouterr().err


def test_a_number_in_the_path_of_an_override_is_an_element_of_a_list(small: Path, capsys):
    read = shown(capsys, small, "energy.widths.1=32", "learner.betas.0=0.5")
    assert read["energy"]["widths"] == [8, 32]
    assert read["learner"]["betas"] == [0.5, 0.999]  # the file leaves it out: its default


def test_a_key_within_an_element_of_a_list_is_set_and_text_stays_text():
    data = {"callbacks": [{"target": "a:b"}, {"target": "c:d"}], "plugins": ["one"]}
    changed = apply_override(data, "callbacks.1.params.steps=5", RunConfig)
    assert changed["callbacks"] == [{"target": "a:b"}, {"target": "c:d", "params": {"steps": 5}}]
    assert apply_override(data, "callbacks.0.target=007", RunConfig)["callbacks"][0] == {
        "target": "007"
    }
    assert apply_override(data, "plugins.0=1e5", RunConfig)["plugins"] == ["1e5"]
    assert data["callbacks"][1] == {"target": "c:d"}


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("energy.widths.2=1", "override energy.widths.2: expected the number of an element"),
        ("energy.widths.-1=1", "in place of '-1', from 0, of a list of 2"),
        ("energy.widths.first=1", "in place of 'first'"),
        ("energy.widths.0.a=1", "'0' is the value 8, not a section"),
        ("learner.lr.0=1", "learner.lr: expected a number"),
    ],
)
def test_an_element_that_is_not_there_is_one_line(small: Path, override: str, says: str, capsys):
    assert main(["config", "show", str(small), override]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert says in line


# -- in the file


def test_keys_that_begin_with_x_hold_anchors_and_are_no_section(tmp_path: Path, capsys):
    text = """
x-common: &common {name: langevin, step_size: 0.5, num_steps: 7}
sampler: {<<: *common, temperature: 1.0}
energy: {name: mlp}
"""
    (tmp_path / "c.yaml").write_text(text)
    assert shown(capsys, tmp_path / "c.yaml")["sampler"]["num_steps"] == 7
    assert "^x-" in schema()["patternProperties"]
    (tmp_path / "c.yaml").write_text(text + "y-common: {}\nlearner: {x-lr: 1}\n")
    assert main(["config", "show", str(tmp_path / "c.yaml")]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(": ")[2:4] for line in lines] == [
        ["learner.x-lr", "unknown key; did you mean 'lr'?"],
        ["y-common", lines[1].split(": ")[3]],
    ]


def test_a_section_without_keys_has_its_defaults(small: Path, capsys):
    whole = shown(capsys, small)
    text = small.read_text() + "learner:\n  # lr: 1\nbuffer:\ncallbacks:\n"
    small.write_text(text)
    assert shown(capsys, small) == whole
    small.write_text(text.replace("learner:\n", "learner:\n  deepspeed:\n"))
    assert shown(capsys, small, "flow=null") == whole


def test_a_section_that_a_run_needs_is_missing_where_it_is_empty(tmp_path: Path, capsys):
    (tmp_path / "c.yaml").write_text("sampler:\nenergy: {name: mlp}\nlearner: {lr: null}\nrnu:\n")
    assert main(["config", "show", str(tmp_path / "c.yaml")]) == 2
    lines = [line.split("c.yaml: ")[1] for line in capsys.readouterr().err.splitlines()]
    assert [line.split(":")[0] for line in lines] == ["sampler", "learner.lr", "rnu"]
    assert lines[0].startswith("sampler: missing; add it")
    assert lines[1] == "learner.lr: expected a number, got null"


# -- variables in paths


def test_a_variable_in_a_path_is_filled_in_and_nowhere_else(small: Path, capsys, monkeypatch):
    monkeypatch.setenv("SCRATCH", "/big disk")
    monkeypatch.setenv("HOME", "/home/ada")
    overrides = ["run.dir=${SCRATCH}/${HOME}/runs", "tracking.project=${SCRATCH}"]
    read = shown(capsys, small, *overrides, "data.source=null", "data.shards=${SCRATCH}/{0..3}.tar")
    assert read["run"]["dir"] == "/big disk//home/ada/runs"
    assert read["data"]["shards"] == "/big disk/{0..3}.tar"
    assert read["tracking"]["project"] == "${SCRATCH}"


@pytest.mark.parametrize(
    ("path", "says"),
    [
        ("${NOWHERE}/x", "the variable NOWHERE is not set; set it, or write the path itself"),
        ("${NOTHING}/x", "the variable NOTHING is empty"),
        ("$SCRATCH/x", "write a variable as ${NAME}"),
        ("${NESTED}/x", "write a variable as ${NAME}"),
        ("${WANDB_API_KEY}", "WANDB_API_KEY sounds like a secret"),
        ("${ODD}", "ODD holds no printable text"),
    ],
)
def test_a_variable_that_cannot_be_filled_in_is_one_line(
    small: Path, path: str, says: str, capsys, monkeypatch
):
    monkeypatch.delenv("NOWHERE", raising=False)
    for name, value in {
        "NOTHING": "",
        "NESTED": "$HOME",
        "WANDB_API_KEY": "hush",
        "ODD": "a\nb\udcff",
    }.items():
        monkeypatch.setenv(name, value)
    assert main(["config", "show", str(small), f"run.dir={path}"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"run.dir: expected a path, got '{path}'" in line
    assert says in line
    assert "hush" not in line
