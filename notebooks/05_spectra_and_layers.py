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
# # What does the kernel of each layer look like, and what do more layers change?
#
# Fine-tuning moves the outputs of a network along its gradients. Take the gradient of every output with respect to what
# is tuned, and the products of these gradients for every pair of examples: that table is the *tangent kernel* K₀. Its
# large eigenvalues are patterns of outputs that training learns fast, its small ones what it learns slowly or never;
# the largest over the smallest is the condition number κ. Tune more layers, and their kernels simply add up, so that
# one pass over some examples tells the eigenvalues of *every* choice of layers, before any training.
#
# Here LoRA may sit on the query, key and value of each layer. The kernels are of the differences between logits, which
# are all that a decision depends on. A text that is drawn twice counts once, and another is drawn: with two
# equal rows every kernel is singular, whatever is tuned.

# %%
from jaxlin.experiments.figures.run import open_study

study = open_study("05")
study.about()

# %%
study.found("in_short")

# %% [markdown]
# ## Where the kernel lies
#
# Eigenvalues μᵢ from the largest, i = 1, to the smallest. Above a line a layer, below a line a module of all layers.
# Black is everything that LoRA tunes; dotted is the classification head, the last linear map, were it tuned as well:
# its kernel is that of the frozen features, which has no more eigenvalues above zero than there are features, so that
# its line ends there.

# %%
study.show("spectra")

# %%
study.found("layers")

# %% [markdown]
# ## κ by choice
#
# Above, κ of one layer at a time; below, κ as layers are added, from the top (as most people do) or from the bottom.

# %%
study.show("kappa_by_choice")

# %%
study.found("choice")

# %% [markdown]
# ## Between bounds
#
# What a further layer can do to the eigenvalues is bounded by what its own kernel is
# ([theory 7](../docs/theory.md#7-layers)):
#
# - (a) every eigenvalue rises by at least the layer's smallest and at most its largest (Weyl);
# - (b) the same, with all of the layer's eigenvalues in place of these two;
# - (c) it rises by a factor between the smallest and the largest that the layer adds in any direction, relative to
#   what is there;
# - (d) so κ, the largest over the smallest, lies between two numbers that follow from (a).
#
# Black dots are eigenvalues after a layer is added, as multiples of those before; light blue is what (a) to (c) allow.
# The bottom row is κ with its bounds.

# %%
study.show("bounds")

# %%
study.found("bounds")

# %% [markdown]
# ## How much of it is chance?
#
# LoRA starts from random numbers, and the gradients come through the classification head. A new head is random too; a
# *probe* is fitted to the frozen features. Whoever chooses layers by κ should know how much of it is the draw.

# %%
study.show("draws")

# %%
study.found("draws")
