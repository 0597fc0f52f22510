# %% [markdown]
# # Trained models: draw, score, detect, classify
#
# Five small models come with the package. Nothing here is trained or downloaded. A name such as
# `digits` stands wherever the path of an export could stand.

# %%
import matplotlib.pyplot as plt
import torch

import ebm_dist
from ebm_dist import evaluation

num_steps = None  # as many steps as the chains of the training lived; fewer give rougher samples
print(*ebm_dist.list_pretrained(), sep="\n")

# %% [markdown]
# ## Draw by label
# One column for each digit. Every sample began as noise and was moved by the sampler that trained
# the model.

# %%
labels = torch.arange(10).repeat(6)
digits, drawn = ebm_dist.sample("digits", 60, label=labels, num_steps=num_steps)
ebm_dist.picture(digits, num_columns=10)

# %% [markdown]
# Garments, by a model that learnt one energy for each level of noise. A sample goes down from the
# highest level to the cleanest. The columns: T-shirt, trousers, pullover, dress, coat, sandal,
# shirt, sneaker, bag, boot.

# %%
garments, _ = ebm_dist.sample("fashion-mnist-classes", 20, label=labels[:20], num_steps=num_steps)
ebm_dist.picture(garments, num_columns=10)

# %% [markdown]
# ## The energy of each image
# `load_energy` gives the network itself, an ordinary module. Here are real digits that no
# training saw: in the upper row the ten of lowest energy, which the model finds most ordinary;
# below, the ten of highest.

# %%
energy = ebm_dist.load_energy("digits")
real, real_labels = ebm_dist.load_data("digits", "test")
energies = energy(real)
order = energies.argsort()
print(f"energies from {energies.min():.3f} to {energies.max():.3f}")
ebm_dist.picture(real[torch.cat([order[:10], order[-10:]])], num_columns=10)

# %% [markdown]
# ## Energies with a label
# The model also gives the energy of an image *as a 3*, or as any other digit. One is tempted to
# call the digit by the label of lowest energy:


# %%
def with_each_label(x):
    return torch.stack([energy.given(label=torch.full((len(x),), k))(x) for k in range(10)], 1)


guess = with_each_label(real).argmin(1)
print(f"right: {(guess == real_labels).float().mean():.0%}")

# %% [markdown]
# That is guessing. Each label has a density of its own, and so a $Z$ of its own: energies of one
# label can be compared with one another, not with those of another label. The energies of the
# samples that you drew show where each label's scale lies. Measured from there, the energies tell
# digits apart, although nothing taught the model to classify:

# %%
usual = torch.stack([drawn[labels == k].mean() for k in range(10)])
guess = (with_each_label(real) - usual).argmin(1)
print(f"right: {(guess == real_labels).float().mean():.0%}")

# %% [markdown]
# ## What does not belong
# Strange images should have a higher energy than real ones. The number is the probability that a
# strange image lies above a real digit; 50% is guessing. Noise is easy, and so are digits with
# their pixels shuffled. Digits on their head are hard, since 0, 1 and 8 are themselves and 6 and
# 9 are each other.

# %%
generator = torch.Generator().manual_seed(0)
strange = {
    "noise": torch.rand(real.shape, generator=generator) * 2 - 1,
    "shuffled": real.flatten(1)[:, torch.randperm(64, generator=generator)].view_as(real),
    "on their head": real.flip(2, 3),
}
for name, x in strange.items():
    print(f"{name:14} {evaluation.ood_auroc(energy, real, x):.0%}")

# %%
figure, axes = plt.subplots(figsize=(6, 3))
axes.hist(energies.numpy(), bins=30, alpha=0.6, density=True, label="real")
for name, x in strange.items():
    axes.hist(energy(x).numpy(), bins=30, alpha=0.6, density=True, label=name)
axes.set_xlabel("energy")
axes.legend()
figure.tight_layout()

# %% [markdown]
# ## A classifier that is also a density
# `digits-joint` was trained to do both: its ten outputs classify, and together they are the
# energy, $E(x) = -\log \sum_k e^{f_k(x)}$.

# %%
joint = ebm_dist.load_energy("digits-joint")
logits = joint.logits(real)
print(f"accuracy: {(logits.argmax(1) == real_labels).float().mean():.1%}")
print("energy from the outputs:", torch.allclose(joint(real), -logits.logsumexp(1), atol=1e-4))

# %% [markdown]
# A classifier's lack of confidence is often used to find strange images. The energy of the same
# network does it better: noise can look very much like *one* class.

# %%
print(f"{'':14} energy  confidence")
for name, x in strange.items():
    by = [evaluation.ood_auroc(joint, real, x, score=score) for score in ("energy", "max_prob")]
    print(f"{name:14} {by[0]:6.0%}  {by[1]:10.0%}")

# %% [markdown]
# The same on the command line: `ebm-dist sample digits --num 64 --label 3`, `ebm-dist evaluate
# digits --suite ood`, `ebm-dist score digits FILES`. Your own density is in
# `notebook_first_hour.py`.
