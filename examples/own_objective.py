"""An objective of your own: (energy, batch, negatives, generator) -> (loss, metrics)."""

from torch.nn.functional import softplus


def ranking(energy, batch, negatives, generator, margin: float = 1.0):
    """Each event of the data should lie below each chain by a margin."""
    data, chains = energy(batch.x), energy(negatives.x)
    loss = softplus(margin + data[:, None] - chains[None, :]).mean()
    return loss, {"energy/gap": (data.mean() - chains.mean()).detach()}
