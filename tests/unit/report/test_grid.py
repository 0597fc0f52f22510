"""Any kind of event becomes one PNG, and the same samples the same bytes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ebm_dist.core.types import EventSpec
from ebm_dist.report.grid import save_grid
from ebm_dist.report.tile import tile

SPECS = {
    "grey": EventSpec((1, 8, 8), "image"),
    "colour": EventSpec((3, 16, 16), "image"),
    "scalar": EventSpec((), "real"),
    "line": EventSpec((1,), "real"),
    "plane": EventSpec((2,), "real"),
    "vector": EventSpec((7,), "real"),
    "field": EventSpec((6, 6), "real"),
    "spins": EventSpec((5, 5), "binary"),
    "bits": EventSpec((9,), "binary"),
    "potts": EventSpec((4, 4, 3), "categorical"),
    "text": EventSpec((12, 30), "categorical"),
}


@pytest.mark.parametrize("name", SPECS)
def test_the_same_samples_give_the_same_picture_and_others_another(
    name: str, tmp_path: Path
) -> None:
    spec = SPECS[name]
    generator = torch.Generator().manual_seed(0)
    x, y = spec.noise(40, generator), spec.noise(40, generator)
    before = x.clone()
    state = torch.random.get_rng_state()
    paths = [save_grid(x, tmp_path / f"sub/{i}.png", spec) for i in range(2)]
    other = save_grid(y, tmp_path / "other.png", spec)
    assert paths[0].read_bytes() == paths[1].read_bytes()
    assert paths[0].read_bytes() != other.read_bytes()
    assert torch.equal(x, before)
    assert torch.equal(torch.random.get_rng_state(), state)
    with Image.open(paths[0]) as picture:
        assert picture.format == "PNG"
        assert min(picture.size) >= 100
    assert sorted(path.name for path in (tmp_path / "sub").iterdir()) == ["0.png", "1.png"]


def test_a_condition_is_drawn_at_the_left_of_its_sample(tmp_path: Path) -> None:
    whole = torch.rand(5, 1, 4, 6) * 2 - 1
    spec = EventSpec((1, 4, 2), "image")
    parts = save_grid(whole[..., 4:], tmp_path / "a.png", spec, condition=whole[..., :4])
    joined = save_grid(whole, tmp_path / "b.png", EventSpec((1, 4, 6), "image"))
    assert parts.read_bytes() == joined.read_bytes()


def test_images_keep_their_grey_values_and_order(tmp_path: Path) -> None:
    x = torch.stack([torch.full((1, 4, 4), v) for v in (-1.0, 1.0, 0.0, -1.0, 1.0, 0.0)])
    path = save_grid(x, tmp_path / "g.png", EventSpec((1, 4, 4), "image"), num_columns=3)
    with Image.open(path) as picture:
        pixels = np.asarray(picture)
    # 3 columns of 4 pixels and 4 gaps of 1, every pixel `factor` wide.
    factor = pixels.shape[1] // 16
    centres = (
        [(1 + 2 + 5 * row) * factor for row in range(2)],
        [(1 + 2 + 5 * column) * factor for column in range(3)],
    )
    grey = [[int(pixels[r, c, 0]) for c in centres[1]] for r in centres[0]]
    assert grey == [[0, 255, 128], [0, 255, 128]]


def test_chains_that_are_not_finite_are_drawn_and_not_an_error(tmp_path: Path) -> None:
    for name in ("grey", "plane", "line", "field"):
        x = SPECS[name].noise(10, torch.Generator().manual_seed(0))
        x[3] = float("nan")
        assert save_grid(x, tmp_path / f"{name}.png", SPECS[name]).is_file()
        assert save_grid(x[3:4], tmp_path / f"{name}-all.png", SPECS[name]).is_file()


def test_samples_that_do_not_fit_the_spec_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"x must have shape \(N, 1, 8, 8\) .* got \(3, 2\)"):
        save_grid(torch.zeros(3, 2), tmp_path / "x.png", SPECS["grey"])
    with pytest.raises(ValueError, match="N >= 1"):
        save_grid(torch.zeros(0, 2), tmp_path / "x.png", SPECS["plane"])


def test_tiles_keep_range_order_and_show_what_is_broken() -> None:
    images = np.stack([np.full((1, 2, 2), value) for value in (-1.0, 0.0, 1.0, np.nan)])
    picture = tile(images, num_columns=2)
    assert picture.shape == (7, 7, 3)
    assert picture[1, 1].tolist() == [0, 0, 0]
    assert picture[1, 4].tolist() == [128, 128, 128]
    assert picture[4, 1].tolist() == [255, 255, 255]
    assert picture[4, 4].tolist() == [255, 0, 255]
    with pytest.raises(ValueError, match=r"\(N, C, H, W\)"):
        tile(np.zeros((2, 2)))
