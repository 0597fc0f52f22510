"""A classifier of Fashion-MNIST that no run ever saw: which class a sample is, and how sure.

    python benchmarks/judge.py data/fashion-mnist FILE [EXPORT ...] [--num 500]

Trains the network once and keeps its weights in FILE; then says of each export how many of its
samples are called the class that was asked (where the energy takes labels), how many of them
with .9 confidence or more, and the shares of the classes; first the same of held-out images. The
feature network of a run's own evaluations is right on 86% of held-out images: too few to tell the
errors of samples from its own. This one is a small residual network with batch norm, trained on
images that are shifted and mirrored.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ebm_dist.core.types import Batch
from ebm_dist.evaluation.fidelity import of_logits

NUM_EPOCHS, BATCH_SIZE, PEAK_LR = 5, 128, 0.4


def block(channels_in: int, channels: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(channels_in, channels, 3, padding=1, bias=False),
        nn.BatchNorm2d(channels),
        nn.ReLU(),
    )


class Residual(nn.Module):
    """x + two blocks of x, (B, C, H, W) -> the same shape."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.body = nn.Sequential(block(channels, channels), block(channels, channels))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)


def network(num_classes: int = 10, width: int = 32) -> nn.Sequential:
    """Logits (B, num_classes) of images (B, 1, 28, 28) in [-1, 1]."""
    return nn.Sequential(
        block(1, width),
        nn.MaxPool2d(2),
        block(width, width),
        Residual(width),
        nn.MaxPool2d(2),
        block(width, 2 * width),
        Residual(2 * width),
        nn.AdaptiveMaxPool2d(1),
        nn.Flatten(),
        nn.Linear(2 * width, num_classes),
    )


def varied(x: Tensor, generator: torch.Generator) -> Tensor:
    """Images (B, C, H, W), half of them mirrored, all shifted by up to two pixels."""
    mirrored = torch.rand(len(x), generator=generator) < 0.5
    x = torch.where(mirrored[:, None, None, None], x.flip(3), x)
    down, right = torch.randint(5, (2, len(x)), generator=generator)
    padded = F.pad(x, (2, 2, 2, 2), value=-1.0)
    size = torch.arange(x.shape[-1])
    rows, columns = down[:, None] + size, right[:, None] + size
    return padded[torch.arange(len(x))[:, None, None], 0, rows[:, :, None], columns[:, None]][
        :, None
    ]


def fit(train: Batch, seed: int = 0) -> nn.Sequential:
    """The network, trained by momentum with one cycle of the learning rate."""
    assert train.label is not None
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    net = network()
    net.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]  # faster here
    optimizer = torch.optim.SGD(
        net.parameters(), lr=0.0, momentum=0.9, weight_decay=5e-4, nesterov=True
    )
    per_epoch = len(train.x) // BATCH_SIZE
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, PEAK_LR, total_steps=NUM_EPOCHS * per_epoch, pct_start=0.25
    )
    for epoch in range(NUM_EPOCHS):
        order = torch.randperm(len(train.x), generator=generator)
        for chosen in order.split(BATCH_SIZE)[:per_epoch]:
            loss = F.cross_entropy(
                net(varied(train.x[chosen].float(), generator)), train.label[chosen]
            )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        print(f"epoch {epoch + 1} of {NUM_EPOCHS}: loss {loss.item():.3f}", flush=True)
    return net.eval()


def logits_of(net: nn.Module, x: Tensor) -> Tensor:
    """(N, num_classes) of images (N, C, H, W)."""
    with torch.no_grad():
        return torch.cat([net(part.float()) for part in x.split(500)])


def kept(file: Path, train: Batch) -> nn.Sequential:
    """The network whose weights `file` has; trained and written there if it is not."""
    if not file.exists():
        save_file(
            {name: value.contiguous() for name, value in fit(train).state_dict().items()}, file
        )
    net = network()
    net.load_state_dict(load_file(file))
    return net.eval()


def main() -> None:
    import ebm_dist
    from ebm_dist.config.run_config import load
    from ebm_dist.data import describe, load_split
    from ebm_dist.energies.context import trait

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", help="shards of Fashion-MNIST")
    parser.add_argument("file", type=Path, help="keeps the weights, as safetensors")
    parser.add_argument("exports", nargs="*")
    parser.add_argument("--num", type=int, default=500, help="samples of each export")
    parser.add_argument("--seed", type=int, default=0, help="of the samples")
    options = parser.parse_args()
    root = Path(__file__).resolve().parents[1]
    data = load(root / "configs/fashion_mnist.yaml", [f"data.source={options.data}"]).data
    train, test = load_split(data, "train"), load_split(data, "test")
    net = kept(options.file, train)
    print("held-out images:", of_logits(logits_of(net, test.x), test.label))
    num_classes = describe(data).num_classes or 10
    for export in options.exports:
        takes_labels = "label" in trait(ebm_dist.load_energy(export), "context")
        asked = torch.arange(options.num) % num_classes if takes_labels else None
        x = ebm_dist.sample(export, options.num, label=asked, seed=options.seed)[0].clamp(-1, 1)
        print(f"{export}:", of_logits(logits_of(net, x), asked))


if __name__ == "__main__":
    main()
