def contrast(energy, batch, negatives, generator, l2=0.1):
    data, chains = energy(batch.x), energy(negatives.x)
    loss = data.mean() - chains.mean() + l2 * (data.square().mean() + chains.square().mean())
    return loss, {"energy/gap": data.mean() - chains.mean(), "data": data.mean()}
