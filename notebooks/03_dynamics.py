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
# # Fine-tuning step by step, and a formula that gives the linearized half of it
#
# The linearized model f̄(θ) = f(θ₀) + J₀(θ − θ₀) is linear in its parameters. Under squared loss its training therefore
# has a *closed form*: from the tangent kernel K₀ = J₀J₀ᵀ and the outputs of the pretrained model, its outputs after any
# number of steps follow from one eigendecomposition, without training anything. Here the network is fine-tuned in full,
# its linearization is trained likewise, and the closed form is computed, on the same examples and with the same
# full-batch descent with momentum (*heavy ball*, in the figures), for a weak, a medium and a strong pull λ towards the
# pretrained weights.

# %%
from jaxlin.experiments.figures.run import open_study

study = open_study("03")
study.about()

# %% [markdown]
# ## Is the closed form exact?

# %%
study.found("closed_form")

# %% [markdown]
# ## The curves
#
# A column a pull (in units of μ₁, the largest eigenvalue of K₀), from top to bottom: loss on training and on validation
# examples, and the scores. The dotted black line is the closed form; the broad light one under it is the linearized
# model as trained. What the blue line does beside them is what linearization misses. Waves are those of momentum.

# %%
study.show("curves")

# %%
study.found("ends")

# %% [markdown]
# ## The kernel along the way
#
# The closed form holds with the kernel of the start. In full fine-tuning the kernel changes as the weights move: the
# first panel says by how much. The second compares network and first-order model at the *same* weights; the third at
# the weights to which each came by itself, which is the gap that counts.

# %%
study.show("drift")

# %%
study.found("drift")

# %% [markdown]
# ## Linearizing late
#
# One need not linearize at the pretrained weights. Here full fine-tuning goes on for k steps, the model is linearized
# where it has come to, and training goes on linearly from there, with momentum and pull as they were. The
# gap is then of fewer linear steps, and smaller for that alone; if the kernel changes mostly at first, a few steps in
# full buy more of it than their share.

# %%
study.show("late")

# %%
study.found("late")
