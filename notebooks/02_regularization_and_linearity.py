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
# # How close are full and linearized fine-tuning, and what does the pull do?
#
# Fine-tuning changes the weights of a pretrained model from θ₀ to θ. *Linearized* fine-tuning trains the first-order
# model f̄(θ) = f(θ₀) + J₀(θ − θ₀) in place of the network f, on the same data in the same order with the same optimizer.
# Where the two end close to each other, everything that is known of linear models and their kernels explains
# fine-tuning. How close they come is governed by how far the weights move, and that by a *pull* (λ/2)‖θ − θ₀‖² towards
# the pretrained weights. λ is given in units of μ₁, the largest eigenvalue of the tangent kernel: at λ = μ₁ the pull is
# as strong as the data are along the one direction that they determine best.

# %%
from jaxlin.experiments.figures.run import open_study

study = open_study("02")
study.about()

# %% [markdown]
# ## What was found

# %%
study.found("gap")

# %% [markdown]
# ## Everything against the pull
#
# A column a task, from top to bottom: how far the parameters move; how far the two end apart in parameters and in
# outputs, absolutely and relative to how far the outputs have moved; the divergence of predicted distributions; how
# often the two decide alike (and, in grey, how often fine-tuning decides as the start did); and the score.
#
# Dotted lines have the slopes −1 and −2 that theory gives as λ → ∞ for descent. The runs are Adam's, with a decaying
# rate and few steps, so that at small λ no such line is to be expected; and at the largest λ, ‖θ−θ̄‖ cannot fall below
# the size of Adam's own last steps, which do not shrink with the gradient. What is left of it there is in LoRA's A,
# which the linearized model does not move at all.

# %%
study.show("against_the_pull")

# %% [markdown]
# ## Scores
#
# A pull that makes the two agree is of use only if it leaves the score alone. The start is a ridge classifier on the
# frozen features, fitted on the same training examples, so that it is no easy thing to improve on.

# %%
study.found("scores")

# %% [markdown]
# ## Three ways to pull
#
# *Coupled*: λ(θ−θ₀) is added to the gradient, and Adam rescales both. *Selective*: only at steps where the data
# gradient would lead further away. *Decoupled*: taken off the weights after Adam's step, as weight decay is in AdamW,
# times the learning rate: with Adam's small rates that is far weaker a pull at the same λ.

# %%
study.show("pulls")

# %% [markdown]
# ## Of what LoRA itself adds
#
# LoRA's update BA is bilinear, and at B = 0 the linearized model does not move A at all. With A frozen (LoRA-FA)
# only the network's own nonlinearity is left: what its gap is smaller by is LoRA's part.

# %%
study.show("A_frozen")

# %%
study.found("pulls")

# %% [markdown]
# ## The bounds
#
# The bounds of [theory 4](../docs/theory.md#4-how-far-the-weights-move) and
# [theory 5](../docs/theory.md#5-how-good-the-linearization-is) are of full-batch descent with a constant step, so they
# are held against such runs, in float64. A marker would be hollow where a bound does not apply. H, how fast the
# Jacobian changes (notebook 04), is sampled, so that bounds 5 that hold are no proof.

# %%
study.show("bounds")

# %%
study.found("bounds")
