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
# The paper says: over choices of which layers, and which of query, key and value, get LoRA, the condition number κ of
# the tangent kernel *before* training predicts training loss and accuracy *after* it: the smaller κ, the better. That
# would make choosing layers cheap. Here the claim is tested, not assumed: many choices, several tasks and draws,
# and one pair of quantities named as the primary one before the runs that are kept.

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
# If the claim held, the points above would rise to the right, and those below would fall. The colour is the number of
# modules that a choice tunes.

# %%
study.show("scatter")

# %% [markdown]
# ## Every predictor
#
# Other numbers of the same kernel, each with its rank correlation. Hollow squares: with the kernel's trace and the
# number of parameters held constant, that is, among choices as if they were of one size. That is the question for
# whoever chooses: that more parameters fit better is known without a kernel. The right panel has another way to train:
# plain descent with a rate that is set by the kernel, for which theory does say that κ matters.

# %%
study.show("correlations")

# %%
study.found("table")

# %% [markdown]
# ## The larger check
#
# The same question with more examples and whole validation sets, fewer choices, and the paper's way to train alone.

# %%
study.found("large_verdict")

# %%
study.show("large_scatter")

# %%
study.found("agreement")

# %%
study.found("large_table")
