# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Fine-tuning, linearized: a quick start
#
# You have fine-tuned a model: you know θ₀, the pretrained weights, and that training moves them to some θ. This
# notebook shows what jaxlin adds. All of it is in a dozen lines, below the imports; what each does is told after them.
# Nothing is to be downloaded: a real encoder (all-MiniLM-L6-v2) is installed with the project, and the text is on every
# machine that has Python. `cd notebooks && python render.py 01_quickstart.py` runs all of it again.
#
# The idea is one line of calculus. Around θ₀ a network's outputs are nearly linear in its *weights*:
#
# f(θ) ≈ f̄(θ) = f(θ₀) + J₀ (θ − θ₀), where J₀ are the derivatives of the outputs with respect to the weights.
#
# f̄ is as nonlinear in the text as f is, but to train it on the squared loss, as here, is ordinary least squares, about
# which everything is known.
# Whether that says anything about your fine-tuning depends on how close f̄ stays to f. So: measure it.

# %%
import os
import time

import jax
import numpy as np

import jaxlin as jl
from jaxlin import plots
from jaxlin.data.stdlib import load_stdlib_task
from jaxlin.data.task import subsample, tokenize
from jaxlin.experiments.figures.run import Picture
from jaxlin.training.losses import evaluate

begin = time.monotonic()

# %%
task = load_stdlib_task()
model = jl.load_model(num_labels=task.num_labels)
train, cut = tokenize(subsample(task.train, 64, seed=0), model.tokenizer, max_length=32)
held_out, _ = tokenize(subsample(task.validation, 64, seed=0), model.tokenizer, max_length=32)
y = np.eye(task.num_labels)[train["labels"]]
model = jl.probe_head(model, train, y)  # section 1
tun = jl.lora(model, rank=8, targets=("query", "value"))
lin = jl.linearize(tun)  # section 2
K = jl.ntk(tun, train, blocks="layer")  # section 3
fit = jl.kernel_regression(K, y, jl.predict(tun, tun.theta0, train), ridge=0.01 * jl.spectrum(K).eigenvalues[0])
config = jl.TrainConfig(optimizer="adam", learning_rate=1e-3, batch_size=16, max_steps=16)
result = jl.compare(tun, train, held_out, config, lam_rel=[0, 0.01, 1])  # section 5

# %% [markdown]
# What was found, and on what:

# %%
rows = {(row["arm"], row["lam_over_mu1"]): row for row in result.table}
for share in (0, 1):
    full = rows["full", share]
    print(
        f"{'with a pull of λ = μ₁' if share else 'without a pull'}: full and linearized fine-tuning end "
        f"{full['output_gap_relative_eval']:.2f} of the outputs' change apart, and decide alike on "
        f"{full['agreement_eval']:.0%} of the examples"
    )
print(f"({len(train)} training examples, {cut} of them cut at 32 tokens, {len(held_out)} validation examples, 1 seed)")
seconds, device = time.monotonic() - begin, jax.devices()[0].device_kind
print(f"{seconds:.0f} s on {os.cpu_count()} cores ({device}), JAX {jax.__version__}")

# %% [markdown]
# ## 1. A model, a task, and what is tuned
#
# The task: from which area of Python's standard library does a docstring come? Packages of the validation examples do
# not occur in training.

# %%
print(f"classes: {', '.join(task.label_names)}")
print(f"for example, {task.train.texts[0][0]!r} is of the class {task.label_names[task.train.labels[0]]!r}")

# %% [markdown]
# The new head starts not at random but as a *probe*: the ridge classifier on the frozen model's features, in closed
# form (`probe_head`). Then comes LoRA on every query and value. The result is a `Tunable`: the function
# `tun.apply(θ, batch)` of the trainable weights θ alone, and their start `tun.theta0`. Everything else in jaxlin takes
# that.

# %%
print(f"{tun.num_params:,} of {jl.full(model).num_params:,} weights (LoRA's added) are trained")

# %% [markdown]
# ## 2. Its linearization
#
# `linearize` gives f̄, as a `Tunable` again. It is exact: its derivatives are those of automatic differentiation. Below
# are steps of several lengths away from θ₀, in one random direction. What f̄ leaves out is quadratic, so that half as
# long a step should make a quarter of the error.

# %%
f0 = jl.predict(tun, tun.theta0, held_out)
rng = np.random.default_rng(0)
direction = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(leaf.dtype), tun.theta0)
print("  step   ‖f − f₀‖   ‖f − f̄‖   error ÷ the one before")
errors = []
for step in (0.04, 0.02, 0.01, 0.005):
    theta = jax.tree.map(lambda leaf, along, step=step: leaf + step * along, tun.theta0, direction)
    f, f_bar = jl.predict(tun, theta, held_out), jl.predict(lin, theta, held_out)
    errors.append(np.linalg.norm(f - f_bar))
    ratio = f"{errors[-1] / errors[-2]:.2f}" if len(errors) > 1 else ""
    print(f"{step:>6} {np.linalg.norm(f - f0):>10.3g} {errors[-1]:>9.2g}   {ratio}")

# %% [markdown]
# ## 3. The tangent kernel
#
# Of J₀, least squares needs only the inner products of its rows: the *neural tangent kernel* K = J₀J₀ᵀ. Its entry for
# two examples says how much a training step on the one moves the output on the other. One pass over the data gives it,
# and with it the kernel of every layer, which add up to it.
#
# Its eigenvalues μ₁ ≥ μ₂ ≥ … say how fast training goes along each direction of the outputs: where the eigenvalue is μ,
# gradient descent shrinks the error as exp(−μt). A kernel whose eigenvalues span many orders of magnitude learns some
# things at once and others hardly ever.

# %%
spectrum = jl.spectrum(K)
mu = spectrum.eigenvalues

trace = {name: np.trace(block.matrix()) for name, block in K.blocks.items()}
half = np.searchsorted(np.cumsum(mu), mu.sum() / 2) + 1
print(f"K has {len(mu)} eigenvalues, {len(train)} examples times {task.num_labels} outputs, of rank {spectrum.rank};")
print(f"μ₁ = {mu[0]:.3g}, and half of their sum is in the first {half}\n")
print("part of the model   share of the trace of K")
for name, value in trace.items():
    print(f"{name:<19} {value / sum(trace.values()):8.3%}" + ("   (B = 0 at the start)" if not value else ""))

# %% [markdown]
# LoRA's update is a product BA, and B starts at 0: so at first A moves nothing, and has no part in the kernel. The
# trace says how large a part is, not what it is good for: of the head, whose derivatives are the features themselves,
# much is a component that all examples share.

# %%
title = f"Spectrum of K₀: {len(train)} training examples, {len(mu)} eigenvalues, 1 seed"
Picture(plots.spectrum(spectrum, title), vector=True)

# %% [markdown]
# ## 4. Predictions without training
#
# Where linearized fine-tuning ends follows from K alone. λ is the strength of a pull (λ/2)‖θ − θ₀‖² towards the
# pretrained weights; its natural unit is μ₁, and here it is a hundredth of that. There are no steps here, no learning
# rate, and no seed.

# %%
K_held_out = jl.ntk(tun, held_out, train)
predicted = fit.test(K_held_out, f0)

for name, outputs in (("start (probe)", f0), ("kernel regression", predicted)):
    print(f"{name:<18} validation accuracy {evaluate(outputs, held_out['labels'], 'squared')['accuracy']:.3f}")

# %% [markdown]
# ## 5. Does your fine-tuning behave like that?
#
# `compare` trains the network and its linearization, with the same optimizer (Adam, as you would) on the same batches
# in the same order, for each λ, and says how far apart they end. At a relative gap of 0 fine-tuning *is* its
# linearization; at 1 the two differ by as much as fine-tuning did to the outputs at all.

# %%
print("λ/μ₁     ‖θ−θ₀‖   relative gap   same decision   accuracy: full   linearized")
for (arm, share), full in rows.items():
    if arm == "full":
        columns = ("distance", "output_gap_relative_eval", "agreement_eval", "accuracy_eval")
        distance, gap, same, accuracy = (full[column] for column in columns)
        other = rows["linearized", share]["accuracy_eval"]
        print(f"{share:<6g} {distance:>8.3f} {gap:>14.3f} {same:>15.3f} {accuracy:>16.3f} {other:>12.3f}")
gaps = [row["output_gap_relative_eval"] for (arm, _), row in rows.items() if arm == "full"]
print(f"\nwith the strongest pull the gap is {gaps[-1] / gaps[0]:.2g} times that without")
(start,) = (row["loss_eval"] for row in result.table if row["arm"] == "start")
below = [f"{share:g}" for (arm, share), row in rows.items() if arm == "full" and row["loss_eval"] < start]
print(
    f"the evaluation loss of full fine-tuning is below the start's {start:.3f} at λ/μ₁ = {', '.join(below) or 'none'}"
)

# %%
history = {key: run.history for key, run in result.results.items()}
title = f"Full against linearized: {len(train)} training and {len(held_out)} validation examples, 1 seed"
Picture(plots.comparison(result.table, history, title), vector=True)

# %% [markdown]
# ## Where to go from here
#
# - `jaxlin compare` does section 5 for a model and data of your own, from the command line.
# - The notebooks beside this one ask the questions one by one, on more data and with several seeds: 02 how close the
#   two are and what the pull does, 03 along training, 04 how fast the derivatives change, 05 and 06 what the spectrum
#   says, 07 which layers to tune, 08 how well the kernel alone predicts.
