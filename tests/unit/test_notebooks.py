"""The notebooks of `examples/` run whole, with shorter runs, and print what their text says."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import matplotlib
import pytest
import torch

import ebm_dist
from ebm_dist.core.errors import UserError

ROOT = Path(__file__).parents[2]
NOTEBOOKS = sorted((ROOT / "examples").glob("notebook_*.py"))
SHORTER = {
    "notebook_first_hour": ("num_updates = 400", "num_updates = 10"),
    "notebook_pretrained": ("num_steps = None", "num_steps = 10"),
    "notebook_samplers": ("num_chains, num_steps = 200, 1000", "num_chains, num_steps = 50, 100"),
}


@pytest.fixture
def lines(request, tmp_path, monkeypatch, capsys) -> list[str]:
    """What the notebook prints."""
    (notebook,) = [path for path in NOTEBOOKS if path.stem == request.param]
    text, (whole, short) = notebook.read_text(), SHORTER[notebook.stem]
    assert text.count(whole) == 1
    (tmp_path / notebook.name).write_text(text.replace(whole, short))
    monkeypatch.chdir(tmp_path)
    before = matplotlib.get_backend()
    matplotlib.use("agg")
    try:
        runpy.run_path(notebook.name, run_name="__main__")
    finally:
        matplotlib.pyplot.close("all")
        matplotlib.use(before)
    return capsys.readouterr().out.splitlines()


def numbers(line: str) -> list[float]:
    return [float(number) for number in re.findall(r"\d+\.?\d*", line)]


@pytest.mark.parametrize("lines", ["notebook_first_hour"], indirect=True)
def test_the_first_hour_trains_measures_and_loads_what_it_kept(lines):
    assert any(line.startswith("sampler left out: mala") for line in lines)
    (data,) = [line for line in lines if line.startswith("data  ")]
    assert numbers(data) == pytest.approx([60, 30, 10], abs=3)
    (log_p,) = [line for line in lines if line.startswith("log p")]
    ours, _, best = numbers(log_p)
    assert ours > best  # both below 0: after ten updates it is not yet as good
    assert lines[-1] == "same energies: True"


@pytest.mark.parametrize("lines", ["notebook_pretrained"], indirect=True)
def test_the_trained_models_do_what_the_notebook_says_of_them(lines):
    of = {line[:14].strip(): numbers(line[14:]) for line in lines if line[14:].strip()}
    names = ebm_dist.list_pretrained()
    assert lines[: len(names)] == names
    assert of["noise"][0] == of["shuffled"][0] == 100
    assert of["on their head"][0] > 65
    (accuracy,) = [line for line in lines if line.startswith("accuracy")]
    assert numbers(accuracy)[0] > 90
    assert "energy from the outputs: True" in lines


@pytest.mark.parametrize("lines", ["notebook_samplers"], indirect=True)
def test_the_samplers_notebook_shows_the_bias_and_the_barrier(lines):
    rows = {line[:10].strip(): numbers(line[10:]) for line in lines[1:6]}
    assert rows["exact"] == [70, 0.25]
    left = {name: row[-4] for name, row in rows.items() if name != "exact"}
    variance = {name: row[-3] for name, row in rows.items() if name != "exact"}
    assert max(left["mala"], left["hmc"]) < min(65, left["tempering"])
    for name, expected in {"langevin": 0.3125, "mala": 0.25, "hmc": 0.25}.items():
        assert variance[name] == pytest.approx(expected, abs=0.04)


def test_each_notebook_is_run_here_and_named_where_a_reader_looks():
    assert {path.stem for path in NOTEBOOKS} == SHORTER.keys()
    for page in ("README.md", "docs/tutorial.md", "docs/index.md", "docs/extending.md"):
        assert "notebook_" in (ROOT / page).read_text(), page


def test_a_picture_has_a_tile_for_each_image_and_data_of_no_such_source_is_one_line():
    x, labels = ebm_dist.load_data("toy:ring", "test", toy_samples=40)
    assert x.shape == (10, 2)
    assert labels is None
    picture = ebm_dist.picture(torch.zeros(20, 1, 8, 8), num_columns=10)
    assert picture.width > 4 * picture.height
    with pytest.raises(UserError, match="did you mean 'digits'"):
        ebm_dist.load_data("digts")
    with pytest.raises(UserError, match=r"^data.holdot: unknown key; did you mean 'holdout'\?$"):
        ebm_dist.load_data("digits", holdot=0.1)
