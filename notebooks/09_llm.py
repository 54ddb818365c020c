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
# # A language model, a prompt, and two words
#
# A decoder that has learnt to predict the next word can classify without a new head: put the text into a *template*
# ("… It was"), and compare the logits of two *label words*. Nothing is drawn at random, and the task looks like
# pretraining. Malladi et al. (2023) found that kernels describe such fine-tuning best. Is that so here?
#
# The model is small and real: `stories260K`, of the Llama family, trained on children's stories, with a vocabulary of
# 512 pieces. It knows no adjective of displeasure as one piece, so that its label words are the best of few. What it
# learns of film reviews is little; how it learns is what is looked at.

# %%
from jaxlin.experiments.figures.run import open_study

study = open_study("09")
study.about()

# %% [markdown]
# ## What was found

# %%
study.found("gap")

# %% [markdown]
# ## Full against linearized, with a prompt and with new heads
#
# The same decoder, texts and steps. *Probe* is a head fitted to the frozen features before fine-tuning begins, *random*
# one as it is usually drawn. On the left, how far the outputs of full and linearized fine-tuning end apart, in units of
# how far fine-tuning moved them.

# %%
study.show("against_the_pull")

# %% [markdown]
# ## The kernels
#
# Above, the eigenvalues of the tangent kernel at the start; below, which layers it comes from (shares of its trace, on
# a log axis). A new head has a kernel of its own, and where it is large, fine-tuning is mostly that of the head. With
# a prompt there is no head to tune.

# %%
study.show("kernels")

# %% [markdown]
# ## Choosing layers through the prompt
#
# `jl.select_layers` ranks sets of layers and of query, key and value by the leave-one-out error of their kernels on a
# few of the training examples, before anything is trained. Here is what fine-tuning then gives, beside the last layers,
# random ones that use the whole budget of parameters, which the choice need not, and all.

# %%
study.show("choices")

# %%
study.found("choices")

# %% [markdown]
# ## The same on the command line
#
# ```
# PROMPT='--model_name_or_path FOLDER --label_words little happy'
# jaxlin compare $PROMPT --template "{text} It was {mask}" --task_name sst2 --loss cross_entropy
# jaxlin ntk     $PROMPT --template "{text} It was {mask}" --task_name sst2
# jaxlin select  $PROMPT --template "{text} It was {mask}" --task_name sst2
# ```
