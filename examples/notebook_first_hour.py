# %% [markdown]
# # The first hour: learn the density of your own points
#
# An energy-based model gives every point $x$ one number, its energy $E(x)$. Low energy means
# likely: $p(x) = e^{-E(x)} / Z$. Here you learn $E$ from a tensor of points, look at it, draw
# from it, measure it, and save it.
#
# Open this file in Jupyter (with jupytext) or in VS Code; each `# %%` begins a cell. As a plain
# program it runs too, without the pictures.

# %%
import matplotlib.pyplot as plt
import torch
from torch import nn

import ebm_dist
from ebm_dist import evaluation

torch.manual_seed(0)
num_updates = 400  # less than half a minute of training

# %% [markdown]
# ## The data
# Three clusters that hold 60%, 30% and 10% of the points. The small one is what models like to
# miss. Put a tensor of yours, `(N, 2)`, in place of `points`, and skip the lines that know the
# truth.

# %%
truth = ebm_dist.energies.gaussian_mixture(
    means=[[-1.5, 0.0], [1.5, 1.0], [1.0, -1.5]], stds=[0.5, 0.4, 0.3], weights=[0.6, 0.3, 0.1]
)
points = truth.sample(5000, torch.Generator().manual_seed(1))
points, held_out = points[:4000], points[4000:]

figure, axes = plt.subplots(figsize=(4, 4))
axes.scatter(*points.T, s=2)
axes.set_title("4,000 points")
figure.tight_layout()

# %% [markdown]
# ## The network
# Any module from a batch of points `(B, 2)` to a batch of energies `(B,)`. Leave out batch norm:
# the energy of a point must not depend on its neighbours in the batch.


# %%
class Net(nn.Module):
    def __init__(self, width=64):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(2, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, 1)
        )

    def forward(self, x):
        return self.layers(x).squeeze(1)


# %% [markdown]
# ## Training
# The energy falls where the data is and rises where the model's own samples are, until the two
# agree. The samples come from Markov chains that run beside the training. The first line says
# which sampler was chosen for your data.

# %%
config = {
    "run": {"name": "first-hour", "steps": num_updates},
    "learner": {"lr": 0.01},  # small networks bear more than the default of 0.002
    "tracking": {"wandb": "off"},
}
result = ebm_dist.train(config, energy=Net, data=points)

# %% [markdown]
# Run the cell again, and it says that the run is finished: `runs/first-hour` belongs to one run.
# A larger `steps` trains on from there, another `name` begins anew.
#
# The *energy gap*, the mean energy of the data minus that of the samples, should hover about
# zero. If it runs away to one side, samples and data have parted. `ebm-dist report
# runs/first-hour` draws its course, with a verdict.

# %%
print(f"energy gap at the end: {result.metrics['energy/gap']:+.2f}")

# %% [markdown]
# ## The landscape, and samples from it
# The samples begin as noise and walk downhill with noise of their own. They should lie in the
# yellow valleys, and as densely as the points above.

# %%
model = result.open_export()
samples, energies = ebm_dist.sample(model, 1000)

line = torch.linspace(-3.5, 3.5, 120)
grid = torch.cartesian_prod(line, line)
landscape = model.energy(grid).view(120, 120).T

figure, (left, right) = plt.subplots(1, 2, figsize=(8, 4), sharex=True, sharey=True)
left.contourf(line, line, (landscape - landscape.min()).clamp(max=8), levels=20, cmap="viridis_r")
left.set_title("energy (yellow is low)")
right.scatter(*points[:1000].T, s=3, label="data")
right.scatter(*samples.T, s=3, label="samples")
right.legend()
figure.tight_layout()

# %% [markdown]
# ## Is it right?
# First the simplest question: does each cluster get its share?


# %%
def shares(x):
    return torch.cdist(x, truth.means).argmin(1).bincount(minlength=3) / len(x)


for name, x in {"data": points, "samples": samples}.items():
    print(f"{name:8}", " ".join(f"{share:5.0%}" for share in shares(x)))

# %% [markdown]
# Then the likelihood of points that the training never saw. It needs $\log Z$, which no network
# gives. `log_partition` estimates it from below and from above: trust it if the two agree.

# %%
generator = torch.Generator().manual_seed(2)
log_z = evaluation.log_partition(model.energy, model.spec, generator=generator)
print(f"log Z: {log_z.forward:.2f} from below, {log_z.reverse:.2f} from above")

ours, error = evaluation.log_likelihood(model.energy, held_out, log_z.combined)
best, _ = evaluation.log_likelihood(truth, held_out, 0.0)
print(f"log p of held-out points: {ours:.2f} ± {error:.2f}; the true density has {best:.2f}")

# %% [markdown]
# ## Keep it
# The run has written an export: weights as safetensors, a config, a card. Whoever has `Net` can
# load it, on a machine without the training packages too.

# %%
print(*sorted(path.name for path in result.export_dir.iterdir()), sep="\n")
energy = ebm_dist.load_energy(result.export_dir, energy=Net)
print("same energies:", torch.equal(energy(samples), model.energy(samples)))

# %% [markdown]
# Next: the same with images in [Ten minutes](../docs/tutorial.md), models that are trained
# already in `notebook_pretrained.py`, and how samplers differ in `notebook_samplers.py`.
