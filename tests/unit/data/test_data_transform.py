"""Augmentation: each one does what its key says, and nothing else."""

from __future__ import annotations

import pytest
import torch

from ebm_dist.core.errors import UserError
from ebm_dist.core.types import EventSpec
from ebm_dist.data.config import DataConfig
from ebm_dist.data.format.decode import Layout
from ebm_dist.data.stream.transform import Transform, event_spec

IMAGES = Layout(EventSpec((1, 8, 8), "image", 10), 256, labelled=True)
VECTORS = Layout(EventSpec((2,), "real"), None, labelled=False)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def pixels(num: int, layout: Layout = IMAGES) -> torch.Tensor:
    size = (num, *layout.spec.shape)
    return torch.randint(0, 256, size, generator=generator(9), dtype=torch.uint8)


def test_bytes_scale_to_minus_one_and_one():
    x = torch.tensor([0, 255, 51], dtype=torch.uint8).reshape(3, 1, 1, 1)
    layout = Layout(EventSpec((1, 1, 1), "image"), 256, labelled=False)
    y = Transform(DataConfig(), layout)(x, generator())
    assert torch.allclose(y.flatten(), torch.tensor([-1.0, 1.0, -0.6]), atol=1e-6)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"flatten": True},
        {"binarize": "threshold"},
        {"binarize": "bernoulli"},
        {"flip": True},
        {"crop_padding": 1},
        {"dequantize": True},
        {"noise_std": 0.1},
    ],
)
def test_it_says_whether_it_draws(changes: dict[str, object]):
    transform = Transform(DataConfig.model_validate(changes), IMAGES)
    source = generator()
    before = source.get_state()
    transform(pixels(4), source)
    assert transform.draws != torch.equal(source.get_state(), before)


def test_flip_mirrors_half_of_the_images_whole():
    x = pixels(4000)
    plain = Transform(DataConfig(), IMAGES)(x, generator())
    y = Transform(DataConfig(flip=True), IMAGES)(x, generator())
    kept = (y == plain).flatten(1).all(1)
    mirrored = (y == plain.flip(-1)).flatten(1).all(1)
    assert bool((kept | mirrored).all())
    assert abs(float(mirrored.float().mean()) - 0.5) < 4 * (0.25 / 4000) ** 0.5


def test_crop_takes_every_window_of_the_reflected_image_equally_often():
    num, padding = 20_000, 2
    x = pixels(1).expand(num, -1, -1, -1)
    y = Transform(DataConfig(crop_padding=padding), IMAGES)(x, generator())
    padded = torch.nn.functional.pad(x[:1].float() / 127.5 - 1, (padding,) * 4, mode="reflect")
    found = torch.zeros(num)
    for top in range(2 * padding + 1):
        for left in range(2 * padding + 1):
            window = padded[:, :, top : top + 8, left : left + 8]
            hits = (y == window).flatten(1).all(1).float()
            share = float(hits.mean())
            assert abs(share - 1 / 25) < 4 * (1 / 25 * 24 / 25 / num) ** 0.5
            found += hits
    assert bool((found == 1).all())


def test_data_noise_has_its_standard_deviation_and_is_not_clamped():
    x = pixels(500)
    plain = Transform(DataConfig(), IMAGES)(x, generator())
    noise = Transform(DataConfig(noise_std=0.03), IMAGES)(x, generator()) - plain
    num = noise.numel()
    assert abs(float(noise.mean())) < 4 * 0.03 / num**0.5
    assert abs(float(noise.std()) - 0.03) < 4 * 0.03 / (2 * num) ** 0.5
    assert float((plain + noise).max()) > 1


@pytest.mark.parametrize("levels", [256, 17])
def test_dequantised_values_fill_the_bins_of_their_levels_evenly(levels: int):
    layout = Layout(EventSpec((1, 8, 8), "image", 10), levels, labelled=True)
    level = torch.randint(0, levels, (3000, 1, 8, 8), generator=generator(4))
    stored = torch.round(level * (255 / (levels - 1))).to(torch.uint8)
    y = Transform(DataConfig(dequantize=True), layout)(stored, generator())
    place = (y + 1) / 2 * levels - level
    assert float(place.min()) > -1e-4
    assert float(place.max()) < 1 + 1e-4
    num = place.numel()
    assert abs(float(place.mean()) - 0.5) < 4 * (1 / 12 / num) ** 0.5
    # Var of (u - 1/2)^2 for uniform u is 1/180.
    assert abs(float(place.var()) - 1 / 12) < 4 * (1 / 180 / num) ** 0.5


def test_threshold_cuts_at_mid_grey():
    x = torch.tensor([0, 127, 128, 255], dtype=torch.uint8).reshape(4, 1, 1, 1)
    layout = Layout(EventSpec((1, 1, 1), "image"), 256, labelled=False)
    y = Transform(DataConfig(binarize="threshold"), layout)(x, generator())
    assert y.flatten().tolist() == [0.0, 0.0, 1.0, 1.0]


def test_bernoulli_coins_have_the_intensity_as_their_chance():
    x = pixels(1).expand(20_000, -1, -1, -1)
    y = Transform(DataConfig(binarize="bernoulli"), IMAGES)(x, generator())
    assert set(y.unique().tolist()) == {0.0, 1.0}
    chance = x[0].float() / 255
    error = (chance * (1 - chance) / 20_000).sqrt()
    assert bool(((y.mean(0) - chance).abs() <= 4.5 * error + 1e-12).all())


def test_flattened_images_are_vectors_and_bits_stay_binary():
    assert event_spec(DataConfig(flatten=True), IMAGES) == EventSpec((64,), "real", 10)
    binary = DataConfig(flatten=True, binarize="threshold")
    assert event_spec(binary, IMAGES) == EventSpec((64,), "binary", 10)
    assert Transform(binary, IMAGES)(pixels(3), generator()).shape == (3, 64)


def test_evaluation_is_never_augmented():
    config = DataConfig(flip=True, crop_padding=2, dequantize=True, noise_std=0.1)
    y = Transform(config, IMAGES)(pixels(20), generator(), augment=False)
    assert torch.equal(y, Transform(DataConfig(), IMAGES)(pixels(20), generator()))


@pytest.mark.parametrize("layout", [IMAGES, VECTORS])
def test_stored_samples_are_not_written_into(layout: Layout):
    x = pixels(8) if layout is IMAGES else torch.randn(8, 2, generator=generator())
    before = x.clone()
    y = Transform(DataConfig(noise_std=0.1), layout)(x, generator())
    y += 1
    assert torch.equal(x, before)


def test_global_random_state_is_left_alone():
    state = torch.get_rng_state()
    config = DataConfig(flip=True, crop_padding=2, dequantize=True, noise_std=0.1)
    Transform(config, IMAGES)(pixels(20), generator())
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("changes", "layout", "key"),
    [
        ({"flip": True}, VECTORS, "data.flip"),
        ({"crop_padding": 1}, VECTORS, "data.crop_padding"),
        ({"crop_padding": 8}, IMAGES, "data.crop_padding"),
        ({"dequantize": True}, VECTORS, "data.dequantize"),
        (
            {"dequantize": True},
            Layout(EventSpec((1, 8, 8), "image"), None, labelled=False),
            "data.dequantize",
        ),
        ({"binarize": "threshold"}, VECTORS, "data.binarize"),
        (
            {"noise_std": 0.1},
            Layout(EventSpec((4, 4), "binary"), None, labelled=False),
            "data.noise_std",
        ),
        (
            {"flatten": True},
            Layout(EventSpec((8, 4), "categorical"), None, labelled=False),
            "data.flatten",
        ),
    ],
)
def test_keys_that_do_not_go_with_the_data_are_refused(
    changes: dict[str, object], layout: Layout, key: str
):
    with pytest.raises(UserError, match=f"^{key}: ") as error:
        event_spec(DataConfig.model_validate(changes), layout)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"source": "digits", "shards": "a.tar"}, "give one of the two"),
        ({"binarize": "bernoulli", "noise_std": 0.1}, "set dequantize: false and noise_std: 0"),
        ({"binarize": "threshold", "dequantize": True}, "set dequantize: false"),
        ({"test_source": "a.tar", "holdout": 0.1}, "give one of the two"),
        ({"holdout": 1.0}, "less than 1"),
        ({"batch_size": 0}, "greater than 0"),
        ({"noise_std": float("nan")}, "finite"),
        ({"cach": "auto"}, "cach"),
    ],
)
def test_settings_that_cannot_work_together_are_refused(values: dict[str, object], message: str):
    with pytest.raises(ValueError, match=message):
        DataConfig.model_validate(values)
