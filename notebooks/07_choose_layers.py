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
# # Does it pay to choose the layers by the kernel?
#
# The *tangent kernel* of a pretrained model holds, for every pair of examples, the inner product of the gradients of
# their outputs with respect to what is tuned. It says what linearized fine-tuning learns, how fast, and where it ends;
# and the kernel of several layers is the sum of theirs. Its *condition number* κ is its largest eigenvalue over its
# smallest: the smaller, the more evenly everything is learnt. See the
# [tutorial](../docs/tutorial.md#the-tangent-kernel) and [theory 7](../docs/theory.md#7-layers).
#
# `jl.select_layers` ranks every set of layers and modules within a budget of parameters, before any training, from one
# pass over some labelled examples. The criterion asked about is the leave-one-out loss: how well the linearized model,
# trained on all examples but one, would predict that one. Here its choice is really fine-tuned, and so
# are the choice by the condition number κ, the last layers, random choices, and everything. All but the last keep to
# one budget of parameters, that of LoRA on query, key and value of two layers; the last layers and the random choices
# use it up, and the kernel's choice need not.
#
# All begin from the same head, a probe on the frozen features that stays as it is: whatever differs comes from the
# layers.

# %%
from jaxlin.experiments.figures.run import open_study

study = open_study("07")
study.about()

# %% [markdown]
# ## The verdict

# %%
study.found("verdict")

# %% [markdown]
# ## Paired differences
#
# Each circle is one seed: the chosen layers minus the other arm, on the same examples, from the same start. Left of
# zero is worse in the first column, better in the other two. An interval that holds zero leaves the sign open; how
# large a difference may be it says all the same.

# %%
study.show("differences")

# %%
study.found("differences")

# %% [markdown]
# ## Scores
#
# Accuracy throughout, so that tasks may be averaged; CoLA's own metric, Matthews correlation, is 0 for a constant
# answer.

# %%
study.found("scores")

# %% [markdown]
# ## What was chosen
#
# If the kernel had a firm opinion, the same layers would come up draw after draw.

# %%
study.show("chosen")

# %%
study.found("chosen")
