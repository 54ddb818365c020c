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
# You have fine-tuned a model: you know θ₀, the pretrained weights, and that training moves them to some θ. This notebook
# shows what jaxlin adds, in twenty lines of code and about a minute on two CPU cores, with nothing to download: a real
# encoder (all-MiniLM-L6-v2) comes with the package's environment, and the text is on every machine that has Python.
#
# The idea is one line of calculus. Around θ₀ a network's outputs are nearly linear in its *weights*:
#
# f(θ) ≈ f̄(θ) = f(θ₀) + J₀ (θ − θ₀), with J₀ the derivatives of the outputs with respect to the weights.
#
# f̄ is as nonlinear in the text as f is, but training it is ordinary least squares, about which everything is known.
# Whether that tells anything about your fine-tuning depends on how close f̄ stays to f. So: measure it.

# %% [markdown]
# ## 1. A model, a task, and what is tuned
#
# The task: from which area of Python's standard library does a docstring come? The packages of the validation examples
# do not occur in training.

# %%
import time

import numpy as np

import jaxlin as jl
from jaxlin import plots
from jaxlin.data.stdlib import load_stdlib_task
from jaxlin.data.task import subsample, tokenize
from jaxlin.experiments.figures.run import Picture

begin = time.monotonic()
task = load_stdlib_task()
model = jl.load_model(num_labels=task.num_labels)
train, _ = tokenize(subsample(task.train, 96, seed=0), model.tokenizer, max_length=32)
held_out, _ = tokenize(subsample(task.validation, 96, seed=0), model.tokenizer, max_length=32)

i = 0
print(f"{len(train)} training and {len(held_out)} validation examples, classes: {', '.join(task.label_names)}")
print(f"for example: {task.train.texts[i][0]!r}\nis of the class {task.label_names[task.train.labels[i]]!r}")

# %% [markdown]
# The new head does not start at random but as a *probe*: the ridge classifier on the frozen model's features, in closed
# form. Then LoRA on every query and value. What comes out is a `Tunable`: the function `tun.apply(θ, batch)` of the
# trainable weights θ alone, and their start `tun.theta0`. Everything else in jaxlin takes that.

# %%
y = np.eye(task.num_labels)[train["labels"]]
model = jl.probe_head(model, train, y)
tun = jl.lora(model, rank=8, targets=("query", "value"))

print(f"{tun.num_params:,} of the model's {jl.full(model).num_params:,} weights are trained")

# %% [markdown]
# ## 2. Its linearization
#
# `linearize` gives f̄ as a `Tunable` again: exact, by automatic differentiation, no approximation of the derivative. Take
# a step away from θ₀ and compare: ten times as short a step, a hundred times as small an error, because what is left
# out is quadratic.

# %%
import jax

lin = jl.linearize(tun)
rng = np.random.default_rng(0)
direction = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(leaf.dtype), tun.theta0)
f0 = jl.predict(tun, tun.theta0, held_out)

print("step     how far f moves   ‖f − f̄‖   in % of that")
for step in (0.1, 0.01, 0.001):
    theta = jax.tree.map(lambda leaf, along, step=step: leaf + step * along, tun.theta0, direction)
    f, f_bar = jl.predict(tun, theta, held_out), jl.predict(lin, theta, held_out)
    moved, gap = np.linalg.norm(f - f0), np.linalg.norm(f - f_bar)
    print(f"{step:<8} {moved:>15.4g} {gap:>9.2g} {100 * gap / moved:>13.2g}")

# %% [markdown]
# ## 3. The tangent kernel
#
# Least squares needs of J₀ only the inner products of its rows: the *neural tangent kernel* K = J₀J₀ᵀ. Its entry for two
# examples says how much a training step on the one moves the output on the other. One pass over the data gives it, layer
# by layer.
#
# Its eigenvalues μ₁ ≥ μ₂ ≥ … say how fast training goes in each direction of the outputs: along one with eigenvalue μ,
# gradient descent shrinks the error as exp(−μ t). A kernel whose eigenvalues span many orders of magnitude learns some
# things at once and others never.

# %%
K = jl.ntk(tun, train, blocks="layer")
spectrum = jl.spectrum(K)
mu = spectrum.eigenvalues

print(f"K has {len(mu)} eigenvalues: {len(train)} examples times {task.num_labels} outputs")
print(
    f"half of their sum is in the first {np.argmax(np.cumsum(mu) >= mu.sum() / 2) + 1}; the numerical rank is {spectrum.rank}"
)
print("\nshare of each part of the model in the trace of K:")
trace = {name: np.trace(block.matrix()) for name, block in K.blocks.items()}
for name, value in trace.items():
    print(f"  {name:<22} {value / sum(trace.values()):.1%}")

# %%
Picture(plots.spectrum(spectrum, f"Spectrum of K₀: {len(train)} examples, LoRA and head"))

# %% [markdown]
# ## 4. Predictions without training
#
# Where linearized fine-tuning ends follows from K alone. λ is the strength of a pull (λ/2)‖θ − θ₀‖² towards the
# pretrained weights; its natural unit is μ₁. `leave_one_out` gives, for every training example, the prediction of the
# model trained on all others, from the same matrix.

# %%
K_test = jl.ntk(tun, held_out, train)
fit = jl.kernel_regression(K, y, jl.predict(tun, tun.theta0, train), ridge=0.01 * mu[0])


def accuracy(outputs, labels):
    return np.mean(outputs.argmax(axis=1) == labels)


print(f"start (probe):     validation accuracy {accuracy(f0, held_out['labels']):.3f}")
print(f"kernel regression: validation accuracy {accuracy(fit.test(K_test, f0), held_out['labels']):.3f}")

# %% [markdown]
# ## 5. Does your fine-tuning behave like that?
#
# `compare` trains both models, the network and its linearization, with the same optimizer (Adam here, as you would) on
# the same batches in the same order, for each λ, and says how far apart they end. A relative gap of 0 is: fine-tuning
# *is* its linearization. A gap of 1 is as large as all that fine-tuning did to the outputs.

# %%
config = jl.TrainConfig(optimizer="adam", learning_rate=1e-3, batch_size=16, max_steps=24)
result = jl.compare(tun, train, held_out, config, lam_rel=[0, 0.01, 0.1, 1])

print("λ/μ₁    ‖θ−θ₀‖   relative gap   same decision   accuracy: full   linearized")
rows = {(row["arm"], row["lam_over_mu1"]): row for row in result.table}
for share in (0, 0.01, 0.1, 1):
    full, linear = (rows[arm, share] for arm in ("full", "linearized"))
    print(
        f"{share:<6g} {full['distance']:>8.3f} {full['output_gap_relative_eval']:>14.3f} {full['agreement_eval']:>15.3f}"
        f" {full['accuracy_eval']:>16.3f} {linear['accuracy_eval']:>12.3f}"
    )
gaps = [rows["full", share]["output_gap_relative_eval"] for share in (0, 1)]
print(f"\nfrom λ = 0 to λ = μ₁ the relative gap {'falls' if gaps[1] < gaps[0] else 'does not fall'}")
print(f"this notebook took {time.monotonic() - begin:.0f} s on {jax.devices()[0].device_kind}")

# %%
history = {key: run.history for key, run in result.results.items()}
Picture(
    plots.comparison(
        result.table,
        history,
        f"Full against linearized: {len(train)} training, {len(held_out)} validation examples, 1 seed",
    )
)

# %% [markdown]
# ## Where to go from here
#
# - `jaxlin compare` does section 5 for a model and data of your own, from the command line.
# - The notebooks beside this one ask the questions one by one, on GLUE, with several seeds: 02 how close the two are and
#   what the pull does, 03 along training, 04 how fast derivatives change, 05 and 06 what the spectrum says, 07 which
#   layers to tune, 08 how well the kernel alone predicts.
