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
# # How well does the kernel alone predict?
#
# The tangent kernel K₀ of a pretrained model says how alike two examples are to fine-tuning: the inner product of the
# outputs' derivatives with respect to what is tuned. With it, *linearized* fine-tuning needs no training. Its end, with
# squared loss and a pull λ, is a ridge regression, from one pass of derivatives and one linear system. This notebook
# holds that regression against real fine-tuning (Adam on the network) and against a linear probe, on the same
# examples, and asks three things that a kernel promises: does its leave-one-out error say how it will do, are its
# predictive intervals right, and what does it take?
#
# Two starts are told apart. *Kernel alone* starts from outputs 0: all that it says comes from the kernel. *Kernel from
# the probe* starts where fine-tuning starts, at a ridge classifier on the frozen features, and is the limit of
# linearized fine-tuning.

# %%
from jaxlin.experiments.figures.run import open_study

study = open_study("08")
study.about()

# %% [markdown]
# ## What was found

# %%
study.found("in_all")

# %% [markdown]
# ## Scores
#
# A panel a task. Fine-tuning is LoRA on every query and value, and the head, with Adam; once without a pull and once
# with the λ that the kernel's leave-one-out error chose. No validation example has a part in choosing anything.

# %%
study.show("scores")

# %%
study.found("scores")

# %% [markdown]
# Differences on the same draws of training examples are far better known than scores:

# %%
study.found("differences")

# %% [markdown]
# ## Leave-one-out against validation
#
# For a kernel regression the error on each example left out follows from one matrix inverse, at any λ. It is of use if
# its curve (hollow, dashed) has its least value where the validation curve (filled) has. A start that was itself fitted
# on the training examples spoils it.

# %%
study.show("leave_one_out")

# %%
study.found("leave_one_out")

# %% [markdown]
# ## Calibration
#
# The regression is the mean of a Gaussian process, whose variance gives intervals for the targets. In (a) and (b) a
# line below the diagonal is of intervals that are too narrow, above it too wide. The targets are 0 and 1, not Gaussian,
# so that no interval can be right at every level. The others are of probabilities, eight bins of equally many examples
# each: below the diagonal a model is surer than it should be. (c) is of kernel *logistic* regression, (d) of the
# regression above, (e) of fine-tuning, (f) of the linear probe that it starts from.

# %%
study.show("calibration")

# %%
study.found("calibration")

# %% [markdown]
# ## Time
#
# The kernel's part is the derivatives of all training examples, their products, the eigenvectors, and leave-one-out at
# every λ. Fine-tuning's is its steps at one λ: choosing among several takes a run for each.

# %%
study.show("times")

# %%
study.found("times")
