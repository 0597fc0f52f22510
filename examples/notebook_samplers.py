# %% [markdown]
# # Four samplers, one energy, and the exact answer
#
# A sampler moves points so that they come to be distributed as $p(x) \propto e^{-E(x)}$. Some are
# only nearly right, some are slow, some never find the second mode. On an energy whose answer is
# known in closed form, you can see which.

# %%
import matplotlib.pyplot as plt
import torch

from ebm_dist import diagnostics, energies, samplers
from ebm_dist.samplers import run_chain

num_chains, num_steps = 200, 1000

# %% [markdown]
# ## The energy
# Two round wells: 70% of the probability on the left, 30% on the right, both of standard
# deviation 0.5. Few chains cross the barrier between them.

# %%
weight, std = 0.7, 0.5
energy = energies.gaussian_mixture([[-2.0, 0.0], [2.0, 0.0]], std, weights=[weight, 1 - weight])

line = torch.linspace(-4, 4, 200)
along = torch.stack([line, torch.zeros(200)], 1)
figure, axes = plt.subplots(figsize=(5, 2.5))
axes.plot(line, energy(along))
axes.set_xlabel("x, with y = 0")
axes.set_ylabel("energy")
figure.tight_layout()

# %% [markdown]
# ## The samplers
# - **Langevin** goes downhill and adds noise. It never rejects a step, so long steps bend the
#   law.
# - **MALA** makes the same step, and then accepts or rejects it, which makes the law exact.
# - **HMC** throws each point with a random speed and follows its path for several steps.
# - **Parallel tempering** runs copies at higher temperatures, where the barrier is low, and lets
#   copies exchange places.
#
# The step size of MALA and HMC is found by `adapt_step_size`: the one at which a sensible share
# of the steps is accepted.

# %%
generator = torch.Generator().manual_seed(0)
start = torch.empty(num_chains, 2).normal_(generator=generator)  # between the wells


def tuned(kernel):
    return samplers.adapt_step_size(kernel, start, energy, 200, generator)


mala = tuned(samplers.make("mala", step_size=0.1))
kernels = {
    "langevin": samplers.make("langevin", step_size=0.1, temperature=1.0),
    "mala": mala,
    "hmc": tuned(samplers.make("hmc", step_size=0.1, num_leapfrog_steps=3)),
    "tempering": samplers.make(
        "parallel_tempering", kernel=mala, temperatures=[1.0, 2.0, 4.0, 8.0]
    ),
}
chains = {
    name: run_chain(kernel, start, energy, num_steps, generator, record_every=1)
    for name, kernel in kernels.items()
}

# %% [markdown]
# ## Against the closed form
# Two numbers have a known answer: the share of the left well, 70%, and the variance of $y$, 0.25,
# with which the barrier has nothing to do. Langevin's steps of size $h$ give another variance,
# known too: $s^2 / (1 - h / 2 s^2)$ in a well of variance $s^2$. The first fifth of the steps is
# left out.
#
# *Effective* is how many independent draws a chain gets from 1,000 gradients of the energy, for
# the mean of $y$ and for that of $x$. For $x$ it is tiny unless chains change wells.

# %%
gradients = {"langevin": 1, "mala": 1, "hmc": 3, "tempering": 4}
print("            step  accepted   left  var(y)   effective y       x")
for name, chain in chains.items():
    trace = chain.trace[num_steps // 5 :]
    x, y = trace.unbind(-1)
    step = getattr(kernels[name], "step_size", mala.step_size)
    accepted = chain.info.get("acceptance", chain.info.get("swap_acceptance"))
    accepted = "       -" if accepted is None else f"{accepted.mean():8.0%}"
    spent = gradients[name] * y.numel() / 1000
    worth = diagnostics.effective_sample_size(trace) / spent
    print(
        f"{name:10} {step:5.2f}  {accepted}  {(x < 0).float().mean():5.0%}  {y.var():6.3f}"
        f"   {worth[1]:11.1f}  {worth[0]:6.1f}"
    )
h = kernels["langevin"].step_size
print(f"{'exact':10} {'':5}  {'':8}  {weight:5.0%}  {std**2:6.3f}")
print(f"{'exact for langevin at this step':33}  {std**2 / (1 - h / 2 / std**2):5.3f}")

# %% [markdown]
# MALA and HMC have the right variance and the wrong share: about half of the chains fell into
# either well, and there they stay. Only tempering moves them; its *accepted* is that of the
# exchanges. Eight chains of each show it:

# %%
figure, panes = plt.subplots(1, 4, figsize=(12, 2.5), sharey=True)
for pane, (name, chain) in zip(panes, chains.items()):
    pane.plot(chain.trace[:, :8, 0], linewidth=0.5)
    pane.set_title(name)
    pane.set_xlabel("step")
panes[0].set_ylabel("x of eight chains")
figure.tight_layout()

# %% [markdown]
# `split_rhat` sees it too, without the closed form: it compares the chains with one another, and
# is near 1 only if they agree.

# %%
for name, chain in chains.items():
    rhat = diagnostics.split_rhat(chain.trace[num_steps // 5 :])
    print(f"{name:10} split R-hat of x {rhat[0]:5.2f}, of y {rhat[1]:.2f}")

# %% [markdown]
# ## The step size
# Short steps are accepted and lead nowhere; long ones are rejected. The most independent draws
# lie between, for MALA where some 57% of the steps are accepted, which is what `adapt_step_size`
# aims at.


# %%
def moved(name, step, **params):
    """A trace of chains, and what the sampler reports of itself."""
    kernel = samplers.make(name, step_size=step, **params)
    chain = run_chain(kernel, start, energy, num_steps // 2, generator, record_every=1)
    return chain.trace[num_steps // 10 :], chain.info


print("MALA's step  accepted  effective y of each 1,000 steps")
for step in (0.02, 0.1, 0.3, 0.6, 1.0):
    trace, info = moved("mala", step)
    worth = diagnostics.effective_sample_size(trace)[1] / len(trace) / num_chains * 1000
    print(f"{step:11.2f}  {info['acceptance'].mean():8.0%}  {worth:11.0f}")

# %% [markdown]
# Langevin cannot reject. It pays for long steps with a wrong variance, by just the amount that
# the closed form says:

# %%
steps = [0.05, 0.1, 0.2, 0.3, 0.35]
variances = [moved("langevin", step, temperature=1.0)[0][..., 1].var() for step in steps]

# %%
figure, axes = plt.subplots(figsize=(5, 2.5))
fine = torch.linspace(0, 0.36, 100)
axes.plot(fine, std**2 / (1 - fine / 2 / std**2), label="closed form")
axes.plot(steps, variances, "x", label="Langevin")
axes.axhline(std**2, linestyle=":", label="the energy's own")
axes.set_xlabel("step size")
axes.set_ylabel("variance of y")
axes.legend()
figure.tight_layout()

# %% [markdown]
# When you train, the same choice is `sampler:` in the config; [Choosing](../docs/choosing.md)
# says which to begin with. Any function from `(B, ...)` to `(B,)` is an energy here: put yours
# in.
