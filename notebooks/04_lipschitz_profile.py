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
# # How fast do Jacobian and kernel change away from the pretrained weights?
#
# Linearization at θ₀ is good as long as the Jacobian J(θ) stays what it was at θ₀. How fast it changes is measured by
# the ratio ‖J(θ) − J₀‖/‖θ − θ₀‖: a *Lipschitz constant* H, with which the bounds of
# [theory 5](../docs/theory.md#5-how-good-the-linearization-is) say how far full and linearized fine-tuning can be
# apart. The paper's Algorithm 1 samples it: models in random directions at a radius r, the mean of their ratios (L_avg)
# and the largest (L_upper). Here this is done on real tasks for three quantities: the Jacobian of all examples stacked
# (which alone is H), the Jacobian of single examples, and the kernel of pairs. Real fine-tuning then says which radius
# matters, and the same ratios are taken along its way.

# %%
from jaxlin.experiments.figures.run import open_study

study = open_study("04")
study.about()

# %%
study.found("in_short")

# %% [markdown]
# ## The profiles
#
# A column a task. The olive lines are random directions; the others run through points of real fine-tuning, one line a
# seed; the shaded strips are the largest distance that these runs reach. (Their pull is in units of μ₁, the largest
# eigenvalue of the tangent kernel, estimated on part of the training examples.) A ratio that does not depend on the
# radius is a horizontal line.
#
# L_upper is the largest of a sample, of few directions: the true supremum is at least as large. A
# bound that uses such an H is an estimate, and no proof. L_avg is a mean over the directions, and bounds nothing. The
# first point of the runs, after one step from θ₀, is the same with and without a pull: the diamond lies in the circle.

# %%
study.show("profile")

# %%
study.found("profile")

# %% [markdown]
# ## How far training goes
#
# A random direction has no reason to be one in which the Jacobian changes most, and training takes quite special ones.
# The fifth column says how much faster (or slower) the Jacobian changes along its way than in random directions at the
# same distance. The last two translate both into the change of the Jacobian relative to its norm at θ₀: what happens,
# and what random directions would have let one expect.

# %%
study.found("reach")
