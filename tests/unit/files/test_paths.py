"""Paths that no shell reads: `~` is the home directory, and a variable is refused."""

from __future__ import annotations

import os

import pytest

from ebm_dist.cli import main
from ebm_dist.core.paths import user_path
from ebm_dist.data.config import DataConfig
from ebm_dist.data.dataset import located


@pytest.fixture(autouse=True)
def home(monkeypatch):
    monkeypatch.setenv("HOME", "/home/ada")


def test_a_leading_tilde_is_the_home_directory():
    assert user_path("~/runs") == "/home/ada/runs"
    assert user_path("./~/runs") == "./~/runs"


@pytest.mark.parametrize(
    "path", ["${HOME}/runs", "$HOME/runs", "/data/$USER", "~nobody-here/x", ""]
)
def test_a_variable_or_an_unknown_user_is_refused_with_what_to_write(path):
    with pytest.raises(ValueError, match=r"expected a path.*write"):
        user_path(path)


def test_relative_data_is_made_absolute_for_parts_that_work_elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    where = os.getcwd()
    config = located(DataConfig(source="shards", test_source="more/{0..3}.tar", cache_dir="c"))
    assert (config.source, config.test_source, config.cache_dir) == (
        f"{where}/shards",
        f"{where}/more/{{0..3}}.tar",
        f"{where}/c",
    )
    for same in ("digits", "toy:two_moons", "/data/shards", "{/a,/b}/x.tar"):
        assert located(DataConfig(source=same)).source == same


@pytest.mark.parametrize("path", ["${HOME}/x.json", "~nobody-here.json", ""])
@pytest.mark.parametrize(
    "words",
    [
        ["dashboard", "write", "--out"],
        ["dashboard", "publish", "--file"],
        ["export", "runs/r"],
        ["report", "runs/r", "--out"],
        ["evaluate", "runs/r", "--suite", "ood", "--out"],
        ["sample", "runs/r", "--num", "1", "--steps", "1", "--out"],
        ["data", "prepare", "digits"],
        ["data", "prepare", "imagefolder", "out", "--source"],
        ["train", "c.yaml", "--run-dir"],
        ["doctor", "--directory"],
    ],
    ids=lambda words: words[0],
)
def test_every_command_refuses_such_a_path_in_one_line(words, path, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main([*words, path]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "expected a path" in line
    assert os.listdir() == []


def test_a_tilde_behind_an_option_is_the_home_directory(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert main(["dashboard", "write", "--out=~/deep/d.json"]) == 0
    assert os.listdir(tmp_path) == ["deep"]
