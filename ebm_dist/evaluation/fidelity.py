"""Sample quality: Frechet distance in the features of a small classifier of the same data.

The published measure uses Inception features, which do not fit 8x8 digits and need a download.
Here the classifier is trained on the run's own data. So the distance is comparable within one data
set only; compare it with `Fidelity.reference`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ebm_dist.core.seeds import derive_seed
from ebm_dist.core.types import Batch, EventSpec

NEIGHBOURS = 3
"""k of the neighbourhoods of precision and recall, as published; and number of training images that
are shown beside a sample."""
NUM_SHOWN = 16
"""Number of samples that are shown beside their nearest training images."""
PER_ROW = 2 * (1 + NEIGHBOURS)
"""Images in a row of that picture: two samples, each with its neighbours at its right."""
MIN_EXPECTED = 10
"""Samples of a class below which its share is left out: with 10 to expect, chance gives fewer than
two, the fifth that is taken for a missed class, once in 2,000 times."""


@dataclass(frozen=True, slots=True)
class Moments:
    """Mean (D,) and covariance (D, D) of features, float64."""

    mean: Tensor
    covariance: Tensor

    @staticmethod
    def of(features: Tensor) -> Moments:
        """The moments of features (N, D), N >= 2."""
        if features.ndim != 2 or features.shape[0] < 2:
            raise ValueError(
                f"frechet_distance: features must be (N, D) with N >= 2, got "
                f"{tuple(features.shape)}"
            )
        features = features.detach().cpu().double()
        if not bool(torch.isfinite(features).all()):
            raise ValueError("frechet_distance: features are not finite; look at the samples")
        return Moments(
            features.mean(dim=0), torch.cov(features.T).reshape((features.shape[1],) * 2)
        )


def frechet_distance(first: Tensor | Moments, second: Tensor | Moments) -> float:
    """Squared 2-Wasserstein distance between the Gaussians with these moments; >= 0.

        |m1 - m2|^2 + tr(C1) + tr(C2) - 2 tr((C1^(1/2) C2 C1^(1/2))^(1/2))

    Dowson & Landau (1982); as a measure of samples, Heusel et al. (2017), arXiv:1706.08500.
    The product under the root is symmetric, so its eigenvalues are real; `sqrtm(C1 @ C2)` becomes
    complex if a covariance is singular, as with fewer samples than features.

    Args:
        first: features (N, D), or their moments.
        second: the same of the other set; both come from one network.

    Raises:
        ValueError: features are not (N, D) with N >= 2, differ in D, or are not finite.
    """
    a = first if isinstance(first, Moments) else Moments.of(first)
    b = second if isinstance(second, Moments) else Moments.of(second)
    if a.mean.shape != b.mean.shape:
        raise ValueError(
            f"frechet_distance: {a.mean.numel()} features against {b.mean.numel()}; both must "
            f"come from one network"
        )
    root = _matrix_sqrt(a.covariance)
    product = root @ b.covariance @ root
    cross = torch.linalg.eigvalsh((product + product.T) / 2).clamp_min(0).sqrt().sum()
    distance = (a.mean - b.mean).square().sum()
    distance = distance + a.covariance.trace() + b.covariance.trace() - 2 * cross
    return max(float(distance), 0.0)


class FeatureNet(nn.Module):
    """A small convolutional classifier of images (C, H, W); `features` is its last hidden layer."""

    def __init__(self, channels: int, num_classes: int, width: int = 32, num_features: int = 64):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(channels, width // 2, 3, padding=1),
            nn.SiLU(),
            nn.Conv2d(width // 2, width, 3, stride=2, padding=1),
            nn.SiLU(),
            nn.Conv2d(width, 2 * width, 3, stride=2, padding=1),
            nn.SiLU(),
            # A fixed 2x2 grid keeps coarse positions, and gives all image sizes equal features.
            nn.AdaptiveAvgPool2d(2),
            nn.Flatten(),
            nn.Linear(8 * width, num_features),
            nn.SiLU(),
        )
        self.head = nn.Linear(num_features, num_classes)
        self.register_buffer("scale", torch.ones(()))
        self.scale: Tensor

    def features(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, num_features), with mean variance 1 on the held-out data."""
        return self.body(x) / self.scale

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> logits (B, num_classes)."""
        return self.head(self.body(x))


def of_logits(logits: Tensor, label: Tensor | None = None) -> dict[str, float]:
    """What a classifier makes of N images by its logits (N, K), as fractions of them, by name.

    `confident`: called some class with probability .9 or more; `class_share_min` and
    `class_share_max`: the rarest and the commonest class; `label_accuracy`: called what was
    asked for, where `label` (N,) says what that was.
    """
    guess = logits.argmax(1)
    share = _shares(guess, logits.shape[1])
    found = {
        "confident": float((logits.softmax(1).amax(1) >= 0.9).float().mean()),
        "class_share_min": float(share.min()),
        "class_share_max": float(share.max()),
    }
    if label is not None:
        found |= {"label_accuracy": float((guess == label).float().mean())}
    return found


class Fidelity:
    """A trained feature network, the features of real images, and reference distances."""

    def __init__(
        self,
        net: FeatureNet,
        held_out: Tensor,
        train: Tensor,
        images: Tensor,
        shares: Tensor,
        reference: dict[str, float],
        accuracy: float,
        spec: EventSpec,
        num: int,
    ) -> None:
        self.net = net.eval().requires_grad_(False)
        self._held_out = held_out  # (N, D)
        # (N, D), of the training images: first the `num` that were kept from the classifier.
        self._train = train
        self._images = images.half()  # (N, C, H, W); exact to 1/30 of a grey level
        self._moments = Moments.of(held_out)
        # (K,), of the held-out images by the classifier: what it mistakes, it mistakes in both.
        self._shares = shares
        self.accuracy = accuracy
        """Accuracy of the classifier on the held-out data, in [0, 1]."""
        self.spec = spec
        self.num = num
        """Number of images for each reference. The distance is biased upwards for few images, so
        compare distances of equal numbers only."""
        self._reference = dict(reference)

    @staticmethod
    def fit(
        train: Batch,
        test: Batch,
        spec: EventSpec,
        seed: int = 0,
        *,
        num_epochs: int | None = None,
        num_reference: int = 500,
        on_step: Callable[[int, int], None] = lambda done, total: None,
    ) -> Fidelity:
        """Train the classifier; the same seed, data and thread count give the same features.

        Args:
            train: labelled images for the classifier; more than about 10,000 do not help.
            test: held-out images, with which samples are compared.
            num_epochs: epochs of the classifier; by default enough for about 600 updates.
            num_reference: number of images for each reference; at most a quarter of `train`, since
                these images are kept from the classifier.
            on_step: called with the number of the classifier's updates that are done and of all.

        Raises:
            ValueError: the data are no labelled images, or too few.
        """
        check_data(train, test, spec)
        assert train.label is not None
        num_classes = spec.num_classes or int(train.label.max()) + 1
        # Features of images that the classifier was trained on are more extreme than of others. So
        # the best possible distance is measured on real images that it has not seen.
        num = max(2, min(num_reference, train.x.shape[0] // 4))
        seen = Batch(train.x[num:], train.label[num:])
        unseen = train.x[:num]
        net = _train(seen, spec, num_classes, seed, num_epochs, on_step)
        # The same scale for all data sets: the total variance of real images is num_features.
        net.scale.fill_(Moments.of(_features(net, test.x)).covariance.diagonal().mean().sqrt())
        held_out = _features(net, test.x)
        moments = Moments.of(held_out)
        reference = {
            name: frechet_distance(_features(net, x), moments)
            for name, x in _references(train.x, spec, seed, num).items()
        }
        of_unseen = _features(net, unseen)
        reference["train"] = frechet_distance(of_unseen, moments)
        logits = _logits(net, test.x)
        guess = logits.argmax(dim=1)
        reference["confident_real"] = of_logits(logits)["confident"]
        accuracy = float("nan")
        if test.label is not None:
            accuracy = float((guess == test.label).float().mean())
        of_train = torch.cat([of_unseen, _features(net, seen.x)])
        shares = _shares(guess, num_classes)
        return Fidelity(net, held_out, of_train, train.x, shares, reference, accuracy, spec, num)

    def distance(self, x: Tensor) -> float:
        """Frechet distance of images (N, C, H, W) to the held-out ones; N should be `num`."""
        if tuple(x.shape[1:]) != self.spec.shape:
            raise ValueError(
                f"Fidelity.distance: images are {tuple(x.shape[1:])}, the classifier was trained "
                f"on {self.spec.shape}"
            )
        return frechet_distance(_features(self.net, x), self._moments)

    def measure(self, x: Tensor, label: Tensor | None = None) -> dict[str, float]:
        """All that is measured of images (N, C, H, W) in [-1, 1], by name: `distance`, `classes`
        and `coverage`."""
        return {"distance": self.distance(x), **self.classes(x, label), **self.coverage(x)}

    def coverage(self, x: Tensor) -> dict[str, float]:
        """What images (N, C, H, W) cover of the real ones, in features, by name.

        `precision` is the share of them that lie as near to a held-out image as its third nearest
        held-out neighbour does, `recall` the share of held-out images that lie so near to one of
        them (Kynkaanniemi et al. 2019, arXiv:1904.06991); of equally many images of both kinds.
        `nearest_train` is their median distance to the nearest training image, over that of
        held-out images: near 1 for new images, near 0 for copies.
        """
        mine = _features(self.net, x)
        num = min(len(mine), len(self._held_out))
        fake, real = mine[:num], self._held_out[:num]
        between = torch.cdist(fake, real)
        seen = self._train[self.num :]
        to_train, usual = (
            torch.cdist(features, seen).amin(1).median() for features in (mine, self._held_out)
        )
        return {
            "precision": float((between <= _radius(real)).any(1).float().mean()),
            "recall": float((between <= _radius(fake)[:, None]).any(0).float().mean()),
            "nearest_train": float(to_train / usual),
        }

    def neighbours(self, x: Tensor) -> Tensor:
        """The first `NUM_SHOWN` of images (N, C, H, W), each followed by the training images that
        are nearest to it in features, `NEIGHBOURS` of them; drawn `PER_ROW` in a row."""
        x = x[:NUM_SHOWN].float().cpu()
        # By differences: a matrix product would round the distance 0 of a copy.
        exact = "donot_use_mm_for_euclid_dist"
        distance = torch.cdist(_features(self.net, x), self._train, compute_mode=exact)
        nearest = self._images[distance.topk(NEIGHBOURS, largest=False).indices]
        return torch.cat([x[:, None], nearest.float()], 1).flatten(0, 1)

    def classes(self, x: Tensor, label: Tensor | None = None) -> dict[str, float]:
        """What the classifier makes of images (N, C, H, W), by name: see `of_logits`, and
        `class_ratio_K`, the share of class K over that of held-out images, or of `label` (N,) where
        there is one. A class of which fewer than `MIN_EXPECTED` images are to be expected has none.
        """
        logits = _logits(self.net, x)
        expected = self._shares if label is None else _shares(label, len(self._shares))
        ratio = _shares(logits.argmax(1), len(self._shares)) / expected
        usual = (expected * len(x) >= MIN_EXPECTED).nonzero().flatten().tolist()
        return of_logits(logits, label) | {f"class_ratio_{k}": float(ratio[k]) for k in usual}

    def reference(self) -> dict[str, float]:
        """Distances of `noise` (the chains' start), `gaussian` (a Gaussian fitted to the pixels)
        and `train` (real images kept from the classifier: the best possible value); and
        `confident_real`, the share of held-out images that the classifier calls confidently."""
        return dict(self._reference)


def _train(
    train: Batch,
    spec: EventSpec,
    num_classes: int,
    seed: int,
    num_epochs: int | None,
    on_step: Callable[[int, int], None],
) -> FeatureNet:
    assert train.label is not None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(seed, "fidelity", "init") % 2**32)
        net = FeatureNet(spec.shape[0], num_classes)
    generator = torch.Generator().manual_seed(derive_seed(seed, "fidelity", "order"))
    num, batch_size = train.x.shape[0], min(128, train.x.shape[0])
    steps_per_epoch = max(1, num // batch_size)
    if num_epochs is None:
        num_epochs = max(3, round(600 / steps_per_epoch))
    num_steps = num_epochs * steps_per_epoch
    optimizer = torch.optim.Adam(net.parameters(), lr=3e-3)
    for epoch in range(num_epochs):
        order = torch.randperm(num, generator=generator)
        for index in range(steps_per_epoch):
            chosen = order[index * batch_size : (index + 1) * batch_size]
            done = epoch * steps_per_epoch + index
            for group in optimizer.param_groups:
                group["lr"] = 3e-3 * (1 - done / num_steps)
            x = train.x[chosen].float()
            # A little noise keeps the features from depending on exact pixel values.
            x = x + 0.05 * torch.empty_like(x).normal_(generator=generator)
            with torch.enable_grad():
                loss = F.cross_entropy(net(x), train.label[chosen])
                gradients = torch.autograd.grad(loss, list(net.parameters()))
            for parameter, gradient in zip(net.parameters(), gradients):
                parameter.grad = gradient
            optimizer.step()
            on_step(done + 1, num_steps)
    for parameter in net.parameters():
        parameter.grad = None
    return net.eval()


def _references(x: Tensor, spec: EventSpec, seed: int, num: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(derive_seed(seed, "fidelity", "reference"))
    flat = x.flatten(1).double()
    factor = _matrix_sqrt(torch.cov(flat.T))
    white = torch.empty(num, flat.shape[1], dtype=torch.float64).normal_(generator=generator)
    gaussian = (flat.mean(dim=0) + white @ factor).clamp(-1, 1).float().reshape(num, *spec.shape)
    return {"noise": spec.noise(num, generator), "gaussian": gaussian}


def _features(net: FeatureNet, x: Tensor) -> Tensor:
    with torch.no_grad():
        return torch.cat([net.features(part.float().cpu()) for part in x.split(500)])


def _logits(net: FeatureNet, x: Tensor) -> Tensor:
    with torch.no_grad():
        return torch.cat([net(part.float().cpu()) for part in x.split(500)])


def _shares(label: Tensor, num_classes: int) -> Tensor:
    """(K,): each class's share of labels (N,)."""
    return torch.bincount(label, minlength=num_classes).float() / len(label)


def _radius(features: Tensor) -> Tensor:
    """(N,): the distance of each of N features to its `NEIGHBOURS`-th nearest."""
    k = min(NEIGHBOURS + 1, len(features))  # each is its own nearest
    return torch.cdist(features, features).kthvalue(k, dim=1).values


def _matrix_sqrt(covariance: Tensor) -> Tensor:
    """The symmetric root of a positive semi-definite matrix; clips eigenvalues at zero."""
    values, vectors = torch.linalg.eigh((covariance + covariance.T) / 2)
    return (vectors * values.clamp_min(0).sqrt()) @ vectors.T


def check_data(train: Batch, test: Batch, spec: EventSpec) -> None:
    """Raise ValueError for data that the classifier cannot be trained on."""
    if spec.kind != "image" or len(spec.shape) != 3:
        raise ValueError(
            f"needs images (C, H, W), the data has {spec.kind} events of shape {spec.shape}"
        )
    if train.label is None:
        raise ValueError("needs labels to train its classifier, the data has none")
    for name, batch in (("train", train), ("test", test)):
        if tuple(batch.x.shape[1:]) != spec.shape or batch.x.shape[0] < 4:
            raise ValueError(
                f"needs at least 4 images of shape {spec.shape} in each split, the {name} split is "
                f"{tuple(batch.x.shape)}"
            )
