"""AUROC against its closed forms, and every score on an energy that decides it."""

import pytest
import torch
from scipy import stats
from sklearn.metrics import roc_auc_score

from ebm_dist.evaluation.ood import (
    auroc,
    ood_auroc,
    ood_report,
    ood_score,
    share,
    threshold_for,
)


def normal(num, dim, std=1.0, seed=0):
    return std * torch.empty(num, dim).normal_(generator=torch.Generator().manual_seed(seed))


def half_square(x):
    return x.square().sum(dim=1) / 2


class Classifier(torch.nn.Module):
    """Two classes with logits +-3 x_0."""

    num_classes = 2

    def logits(self, x):
        return torch.stack([3 * x[:, 0], -3 * x[:, 0]], dim=1)

    def forward(self, x):
        return -self.logits(x).logsumexp(dim=1)


@pytest.mark.parametrize(("dim", "variance"), [(2, 4.0), (2, 1.5), (5, 2.0), (10, 0.5)])
def test_auroc_of_wider_gaussians_is_the_f_distribution(dim, variance):
    familiar, foreign = normal(20_000, dim), normal(20_000, dim, variance**0.5, seed=1)
    value, error = auroc(half_square(familiar), half_square(foreign))
    expected = stats.f(dim, dim).cdf(variance)
    if (dim, variance) == (2, 4.0):
        assert expected == pytest.approx(0.8)
    assert abs(value - expected) < 4 * error
    assert error < 0.004
    assert ood_auroc(half_square, familiar, foreign, score="energy") == value


def test_auroc_equals_sklearn_with_ties():
    generator = torch.Generator().manual_seed(0)
    a = torch.randint(0, 6, (40,), generator=generator)
    b = torch.randint(2, 8, (30,), generator=generator)
    label = torch.cat([torch.zeros(40), torch.ones(30)])
    expected = roc_auc_score(label.numpy(), torch.cat([a, b]).numpy())
    assert auroc(a, b)[0] == pytest.approx(expected, abs=1e-12)


def test_auroc_error_is_that_of_repetition():
    values, errors = zip(
        *(
            auroc(normal(60, 1, seed=s)[:, 0], normal(40, 1, seed=1000 + s)[:, 0] + 0.8)
            for s in range(300)
        )
    )
    spread = float(torch.tensor(values).std())
    assert sum(errors) / 300 == pytest.approx(spread, rel=4 / 600**0.5)


def test_grad_norm_score_is_the_gradient():
    x = normal(7, 3)
    got = ood_score(half_square, x, score="grad_norm", batch_size=3)
    assert torch.allclose(got, x.double().norm(dim=1), atol=1e-6)


def test_typicality_finds_events_that_are_too_likely():
    # In 100 dimensions the origin is likelier than every draw, and no draw is near it.
    familiar, foreign = normal(200, 100), normal(200, 100, 0.5, seed=1)
    reference = normal(500, 100, seed=2)
    assert ood_auroc(half_square, familiar, foreign, score="energy") < 0.01
    found = ood_auroc(half_square, familiar, foreign, score="typicality", x_reference=reference)
    assert found > 0.99


def test_max_prob_reads_the_logits():
    sure, unsure = torch.tensor([[2.0], [-2.0]]), torch.tensor([[0.01], [0.0]])
    assert ood_auroc(Classifier(), sure, unsure, score="max_prob") == 1.0


def test_report_names_every_score():
    x = normal(20, 1)
    report = ood_report(Classifier(), x, {"far": x + 9}, x_reference=x)
    assert {key for key in report if key.startswith("auroc/")} == {
        f"auroc/{score}/far" for score in ("energy", "grad_norm", "typicality", "max_prob")
    }


def test_a_threshold_keeps_at_least_what_it_was_calibrated_to_on_average():
    """Of n scores the kept share of new ones is Beta(rank, n + 1 - rank), for any law."""
    num, kept, trials = 30, 0.9, 2000
    scores = normal(trials, num).square()
    limits = torch.tensor([threshold_for(row, kept) for row in scores])
    shares = 2 * torch.special.ndtr(limits.sqrt()) - 1
    rank = 28  # ceil(31 * .9)
    law = stats.beta(rank, num + 1 - rank)
    assert law.mean() >= kept
    assert abs(shares.mean().item() - law.mean()) < 4 * law.std() / trials**0.5
    assert threshold_for(scores[0, :8], kept) == float("inf")


def test_a_share_has_wilsons_interval():
    value, low, high = share(torch.arange(20) < 19)
    assert value == 0.95
    p, n, z = 0.95, 20, stats.norm.ppf(0.975)
    centre, half = p + z**2 / (2 * n), z * (p * (1 - p) / n + z**2 / (4 * n**2)) ** 0.5
    assert (low, high) == pytest.approx(
        ((centre - half) / (1 + z**2 / n), (centre + half) / (1 + z**2 / n))
    )


def test_a_report_calibrates_on_one_half_and_measures_on_the_other():
    x = normal(2000, 2)
    report = ood_report(half_square, x, {"far": x + 9})
    even, odd = half_square(x[::2]).double(), half_square(x[1::2]).double()
    assert report["threshold/energy"] == threshold_for(even, 0.95)
    below = (odd <= report["threshold/energy"]).double().mean().item()
    assert report["kept/energy"] == pytest.approx(below)
    assert report["kept_low/energy"] < below < report["kept_high/energy"]
    assert report["detected/energy/far"] == 1.0
    assert report["detected_low/energy/far"] < 1.0


@pytest.mark.parametrize(
    ("score", "message"),
    [
        ("likelihood", "expected one of energy"),
        ("typicality", "needs x_reference"),
        ("max_prob", "needs an energy with class logits"),
    ],
)
def test_scores_that_do_not_apply_are_refused(score, message):
    with pytest.raises(ValueError, match=message):
        ood_score(half_square, torch.zeros(2, 1), score=score)


def test_scores_that_are_not_numbers_are_refused():
    with pytest.raises(ValueError, match="NaN"):
        auroc(torch.tensor([0.0, torch.nan]), torch.zeros(2))
