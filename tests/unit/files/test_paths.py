"""Paths that no shell reads: `~` is the home directory, and a variable is refused."""

from __future__ import annotations

import os

import pytest

from ebm_dist.data.config import DataConfig
from ebm_dist.data.dataset import located
from ebm_dist.paths import expand_argument, user_path


@pytest.fixture(autouse=True)
def home(monkeypatch):
    monkeypatch.setenv("HOME", "/home/ada")


def test_a_leading_tilde_is_the_home_directory():
    assert user_path("~/runs") == "/home/ada/runs"
    assert user_path("./~/runs") == "./~/runs"
    assert expand_argument("--run-dir=~/r") == "--run-dir=/home/ada/r"
    assert expand_argument("~/x") == "/home/ada/x"
    for same in ("run.dir=~/r", "--resume=auto", "a~", "--", "-h"):
        assert expand_argument(same) == same


@pytest.mark.parametrize("path", ["${HOME}/runs", "$HOME/runs", "/data/$USER", "~nobody-here/x"])
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
