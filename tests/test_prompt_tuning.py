"""Prompt tuning against the model itself, with the vectors as rows of its vocabulary."""

import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

import jaxlin as jl
from tests import cases

COUNT = 3


def small_batch(model):
    padding = getattr(model.module.config, "padding_id", None) or 0
    batch = cases.text_batch(4, longest=8, ids=model.module.config.vocab_size - 2 * COUNT, padding_id=padding)
    types = model.module.config.type_vocab_size > 1
    return {**batch, "token_type_ids": batch["token_type_ids"] * types}


def with_words(model, tun, theta, batch):
    """Logits of the model with the vectors in rows of its word embedding that no text uses, in front of the texts."""
    used = set(np.unique(batch["input_ids"]).tolist()) | {0, 1}
    rows = [i for i in range(model.module.config.vocab_size) if i not in used][:COUNT]
    params = flatten_dict(model.params, sep="/")
    table = f"{tun.apply.table}/embedding"
    params[table] = params[table].at[np.array(rows)].set(theta["prompt"])
    params |= flatten_dict({k: v for k, v in theta.items() if k != "prompt"}, sep="/")
    front = {"input_ids": np.tile(rows, (len(batch["input_ids"]), 1)), "attention_mask": 1, "token_type_ids": 0}
    long = {
        name: np.concatenate([np.broadcast_to(front[name], (len(values), COUNT)), values], axis=1).astype(np.int32)
        for name, values in batch.items()
        if name in front
    }
    return model.apply(unflatten_dict(params, sep="/"), long)


@pytest.mark.parametrize(
    "family", ["gpt2", "llama", *(pytest.param(family, marks=pytest.mark.slow) for family in ("bert", "roberta"))]
)
def test_vectors_are_words(family):
    model = cases.decoder(family) if family in cases.DECODER_FAMILIES else cases.encoder(family)
    batch = small_batch(model)
    tun = jl.prompt_tuning(model, COUNT, rng=1)
    words = flatten_dict(model.params, sep="/")[f"{tun.apply.table}/embedding"]
    assert all((row == words).all(axis=1).any() for row in tun.theta0["prompt"])
    for at in (tun.theta0, cases.moved(tun)):
        expected = with_words(model, tun, at, batch)
        np.testing.assert_allclose(cases.outputs(tun, batch, at), expected, rtol=1e-5, atol=1e-6)
    assert np.ptp(np.asarray(expected), axis=0).max() > 1e-3


@pytest.mark.slow
def test_it_is_tuned_and_linearized_like_any_tunable():
    model = cases.encoder("bert")
    cases.check(jl.prompt_tuning(model, COUNT), small_batch(model), None)


def test_the_start_may_be_a_text():
    model = cases.tiny_model()
    tun = jl.prompt_tuning(model, 5, init_text="is it good ?")
    ids = model.tokenizer("is it good ?", add_special_tokens=False)["input_ids"]
    words = flatten_dict(model.params, sep="/")[f"{tun.apply.table}/embedding"]
    np.testing.assert_array_equal(tun.theta0["prompt"], words[np.resize(ids, 5)])


def test_bad_input():
    model = cases.encoder("bert")
    longest = model.module.config.max_length
    for count in (0, longest):
        with pytest.raises(jl.InputError, match=f"num_virtual_tokens={count}; expected at least 1, and fewer than"):
            jl.prompt_tuning(model, count)
    batch = small_batch(model)
    tun = jl.prompt_tuning(model, longest - batch["input_ids"].shape[1] + 1)
    with pytest.raises(jl.InputError, match=f"the model has {longest} positions"):
        jl.predict(tun, tun.theta0, batch)


def test_the_loss_of_every_token_is_refused(tmp_path):
    lm = jl.load_causal_lm(cases.write_language_model(tmp_path, cases.DECODERS["gpt2: LM"]))
    with pytest.raises(jl.InputError, match="would have the vectors' places predicted"):
        jl.prompt_tuning(jl.next_token_loss(lm))
