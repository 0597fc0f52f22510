"""Frechet distance against closed forms, and the classifier behind it."""

import math

import pytest
import torch
from sklearn.datasets import load_digits

from ebm_dist.core.types import Batch, EventSpec
from ebm_dist.evaluation.fidelity import Fidelity, Moments, frechet_distance
from ebm_dist.report.tile import tile

SPEC = EventSpec((1, 8, 8), "image", 10)


def digits():
    data = load_digits()
    x = torch.tensor(data.images, dtype=torch.float32)[:, None] / 8 - 1
    label = torch.tensor(data.target)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    x, label = x[order], label[order]
    return Batch(x[:1300], label[:1300]), Batch(x[1300:], label[1300:])


@pytest.fixture(scope="module")
def fidelity():
    train, test = digits()
    return Fidelity.fit(train, test, SPEC, 0, num_epochs=20, num_reference=400)


def test_distance_of_two_diagonal_gaussians_is_the_closed_form():
    first = Moments(
        torch.tensor([0.0, 1.0]).double(), torch.diag(torch.tensor([1.0, 4.0])).double()
    )
    second = Moments(
        torch.tensor([3.0, 1.0]).double(), torch.diag(torch.tensor([9.0, 4.0])).double()
    )
    assert frechet_distance(first, second) == pytest.approx(9 + (3 - 1) ** 2, abs=1e-9)


def test_distance_of_commuting_rotated_covariances():
    angle = 0.7
    turn = torch.tensor(
        [[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]]
    ).double()
    zero = torch.zeros(2).double()
    first = Moments(zero, turn @ torch.diag(torch.tensor([1.0, 25.0])).double() @ turn.T)
    second = Moments(zero, turn @ torch.diag(torch.tensor([4.0, 9.0])).double() @ turn.T)
    assert frechet_distance(first, second) == pytest.approx(1 + 4, abs=1e-6)


def test_distance_agrees_with_the_general_matrix_root():
    from scipy.linalg import sqrtm

    generator = torch.Generator().manual_seed(0)
    a, b = (torch.empty(300, 6, dtype=torch.float64).normal_(generator=generator) for _ in range(2))
    b = b @ torch.empty(6, 6, dtype=torch.float64).normal_(generator=generator) + 0.3
    cov_a, cov_b = torch.cov(a.T), torch.cov(b.T)
    root = torch.tensor(sqrtm((cov_a @ cov_b).numpy()).real)
    expected = (a.mean(0) - b.mean(0)).square().sum()
    expected = expected + (cov_a + cov_b - 2 * root).trace()
    assert frechet_distance(a, b) == pytest.approx(float(expected), rel=1e-8)
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a), rel=1e-8)


def test_fewer_samples_than_features_give_a_finite_distance():
    generator = torch.Generator().manual_seed(0)
    few = torch.empty(5, 40).normal_(generator=generator)
    many = torch.empty(400, 40).normal_(generator=generator)
    assert frechet_distance(few, few) == pytest.approx(0, abs=1e-4)
    assert math.isfinite(frechet_distance(few, many))


def test_features_that_are_not_finite_are_refused():
    with pytest.raises(ValueError, match="not finite"):
        frechet_distance(torch.full((4, 2), math.nan), torch.zeros(4, 2))


def test_classifier_reads_digits(fidelity):
    assert fidelity.accuracy > 0.95


def test_references_are_ordered_real_gaussian_noise(fidelity):
    reference = fidelity.reference()
    assert 3 * reference["train"] < reference["gaussian"]
    assert 3 * reference["gaussian"] < reference["noise"]


def test_distance_grows_with_the_damage(fidelity):
    _, test = digits()
    generator = torch.Generator().manual_seed(1)
    noise = torch.empty_like(test.x).normal_(generator=generator)
    distances = [fidelity.distance(test.x + std * noise) for std in (0.0, 0.3, 0.6, 1.2)]
    assert distances[0] == pytest.approx(0, abs=1e-4)
    assert distances == sorted(distances)
    assert distances[-1] > fidelity.reference()["train"]


def test_a_collapsed_model_shows_in_the_class_shares(fidelity):
    train, _ = digits()
    assert train.label is not None
    threes = train.x[train.label == 3]
    found = fidelity.classes(threes, torch.full((len(threes),), 3))
    assert found["class_share_max"] == found["label_accuracy"] > 0.9
    assert found["class_share_min"] == 0
    assert fidelity.classes(threes, torch.full((len(threes),), 4))["label_accuracy"] < 0.1
    noise = torch.rand(200, *SPEC.shape, generator=torch.Generator().manual_seed(0)) * 2 - 1
    assert fidelity.classes(noise)["confident"] < found["confident"] > 0.9


def test_each_class_is_counted_against_its_share_of_the_data_or_of_the_labels(fidelity):
    train, test = digits()
    assert train.label is not None
    assert fidelity.classes(test.x) == pytest.approx(
        fidelity.classes(test.x) | {f"class_ratio_{k}": 1.0 for k in range(10)}
    )
    assert fidelity.classes(test.x)["confident"] == fidelity.reference()["confident_real"]
    without = train.x[(train.label != 3) & (train.label != 7)]
    found = fidelity.classes(without)
    assert found["class_ratio_3"] < 0.2 > found["class_ratio_7"]
    assert all(found[f"class_ratio_{k}"] > 0.8 for k in range(10) if k not in (3, 7))
    # What was asked for is there, and of the others none was asked for.
    threes = train.x[train.label == 3]
    found = fidelity.classes(threes, torch.full((len(threes),), 3))
    assert {name for name in found if "ratio" in name} == {"class_ratio_3"}
    assert found["class_ratio_3"] > 0.9
    # Of 60 samples too few are of any class to tell.
    assert not any("ratio" in name for name in fidelity.classes(test.x[:60]))


def test_same_seed_gives_the_same_features_and_leaves_the_global_generator():
    train, test = digits()
    small = Batch(train.x[:200], train.label[:200] if train.label is not None else None)
    before = torch.random.get_rng_state()
    fits = [Fidelity.fit(small, test, SPEC, seed, num_epochs=1) for seed in (0, 0, 1)]
    assert torch.equal(before, torch.random.get_rng_state())
    distances = [fit.distance(train.x[200:400]) for fit in fits]
    assert distances[0] == distances[1] != distances[2]


def test_every_reference_is_of_as_many_images(fidelity):
    # 1,300 training images can spare 325 from the classifier, fewer than the 400 asked for.
    train, _ = digits()
    assert fidelity.num == 325
    floor = fidelity.distance(train.x[: fidelity.num])
    assert floor == pytest.approx(fidelity.reference()["train"])


def test_training_images_as_samples_are_their_own_nearest_neighbours(fidelity):
    train, test = digits()
    # The first half was kept from the classifier: the model has seen them all the same.
    copies = train.x[[*range(8), *range(1000, 1008)]]
    shown = fidelity.neighbours(torch.cat([copies, copies])).reshape(16, 4, 1, 8, 8)
    torch.testing.assert_close(shown[:, 0], copies, rtol=0, atol=0)
    torch.testing.assert_close(shown[:, 1], copies, rtol=0, atol=1e-3)
    known = train.x.flatten(1)
    for image in fidelity.neighbours(test.x[:3]).reshape(3, 4, 64)[:, 1:].flatten(0, 1):
        assert (known - image).abs().amax(1).min() < 1e-3
    column = tile(shown.flatten(0, 1).numpy(), num_columns=4)
    assert (column[:, 1:9] == column[:, 10:18]).all(), "pixel for pixel, when drawn"


def test_what_samples_cover_of_the_real_images_shows_in_precision_recall_and_copies(fidelity):
    """Held-out images themselves, one class, noise, and training images."""
    train, test = digits()
    assert train.label is not None
    real = fidelity.coverage(test.x)
    assert real["precision"] == real["recall"] == 1
    assert real["nearest_train"] == pytest.approx(1)
    unseen = fidelity.coverage(train.x[: fidelity.num])
    assert 0.6 < unseen["precision"] < 1
    assert 0.6 < unseen["recall"] < 1
    assert 0.7 < unseen["nearest_train"] < 1.3
    threes = fidelity.coverage(train.x[: fidelity.num][train.label[: fidelity.num] == 3])
    assert threes["precision"] > 0.6
    assert threes["recall"] < 0.3
    noise = torch.rand(200, *SPEC.shape, generator=torch.Generator().manual_seed(0)) * 2 - 1
    assert fidelity.coverage(noise)["precision"] < 0.1
    assert fidelity.coverage(train.x[fidelity.num :][:200])["nearest_train"] < 0.01


@pytest.mark.parametrize(
    ("spec", "label", "message"),
    [
        (EventSpec((2,), "real"), torch.zeros(4).long(), "needs images"),
        (SPEC, None, "needs labels"),
        (EventSpec((1, 9, 9), "image"), torch.zeros(4).long(), "needs at least 4 images"),
    ],
)
def test_data_without_images_or_labels_is_refused(spec, label, message):
    batch = Batch(torch.zeros(4, 1, 8, 8), label)
    with pytest.raises(ValueError, match=message):
        Fidelity.fit(batch, batch, spec, 0)
