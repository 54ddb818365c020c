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
# # Does the condition number predict fine-tuning?
#
# Take the gradients of a model's outputs with respect to what is tuned, at the pretrained weights θ₀, and their inner
# products for every pair of examples: that table is the *tangent kernel* K₀. (κ below is of LoRA's factors alone; the
# new head is trained too.) Were fine-tuning linear in the weights,
# the error along an eigenvector of K₀ would shrink as fast as its eigenvalue μ is large. The *condition number* κ is
# the largest eigenvalue over the smallest: how much faster training is in the direction that it learns first than in
# the one that it learns last. The [tutorial](../docs/tutorial.md#the-tangent-kernel) introduces both by example.
#
# The paper says: over choices of which layers, and which of query, key and value, get LoRA, the condition number κ of
# the tangent kernel *before* training predicts training loss and accuracy *after* it. We read it as theory has it: the
# smaller κ, the better. That would make choosing layers cheap. Here the claim is tested, not assumed: many choices,
# several tasks and draws (of GLUE; of the paper's data IMDb and Yelp were not run), and one pair of quantities named as
# the primary one, after a short trial and before any grid of runs. (Smaller grids came before this one.) With as many
# correlations as follow, some of those that were not named will leave out 0 by chance.
#
# Every choice is trained in two ways: the paper's, by Adam at a fixed rate on cross-entropy, where the claim is made;
# and by *descent at c/(μ₁+λ)*: plain descent on squared loss under a pull λ, whose rate is set for each choice by its
# own largest eigenvalue μ₁, c being the same for all. There theory says that κ sets the speed, as long as training
# stays near θ₀; the verdict tells whether it did.

# %%
from jaxlin.experiments.figures.run import open_study

study = open_study("06")
study.about()

# %% [markdown]
# ## The verdict

# %%
study.found("verdict")

# %% [markdown]
# ## A point a choice
#
# Intervals, here and below, resample choices and draws; the tasks are fixed, so that they are of these tasks.
#
# If the claim held, the points above would rise to the right, and those below would fall. The colour is the number of
# modules that a choice tunes.

# %%
study.show("scatter")

# %% [markdown]
# ## Every predictor
#
# Other numbers of the same kernel ([theory 6](../docs/theory.md#6-what-the-spectrum-says)), each with its rank
# correlation. r₀ is the error at the start, outputs minus targets; λ is a small share of the largest eigenvalue.
#
# - *κ with λ*: (μ_max + λ)/(μ_min + λ), the condition number under a pull λ towards θ₀.
# - *μ_max*, *μ_min*, *trace*: the largest eigenvalue, the smallest, and the sum of all.
# - *Effective dimension*: the sum of μ/(μ + λ), the number of directions that the data determine more than the pull.
# - *Alignment with r₀*: the cosine between K₀ and r₀r₀ᵀ, as if both were vectors; large where the error is along what
#   is learnt first.
# - *Share of r₀ in the top tenth*: how much of ‖r₀‖² lies along the eigenvectors of the largest tenth of eigenvalues.
# - *Leave-one-out loss*: that of kernel regression on each example, fitted on all others.
# - *Log marginal likelihood*: of the targets under the Gaussian process that has K₀ as its covariance.
#
# Hollow squares: with the kernel's trace and the number of parameters held constant, that is, among choices as if they
# were of one size. That is the question for whoever chooses: that more parameters fit better is known without a kernel.

# %%
study.show("correlations")

# %%
study.found("table")

# %% [markdown]
# The same of the kernel of all that is tuned, the new head too:

# %%
study.found("whole_table")

# %% [markdown]
# What the correlations are of, task by task: the rank of every choice by each of the other predictors, and by final
# training cross-entropy (ρ is the correlation of the two; a run that diverged would count as the worst, and not be
# drawn),

# %%
study.show("others_loss")

# %% [markdown]
# and by the validation metric.

# %%
study.show("others_metric")
