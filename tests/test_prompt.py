import dataclasses

import jax
import numpy as np
import pytest

import jaxlin as jl
from jaxlin.data.prompt import Template
from jaxlin.models.encoder import EncoderConfig, MaskedLm
from jaxlin.models.model import Model
from tests import cases

TEXTS = ["a dull film", "one two three four five", "yes"]


@pytest.fixture(scope="module")
def masked():
    """The tiny tokenizer with a masked LM of random weights."""
    tiny = cases.tiny_model()
    config = EncoderConfig(len(tiny.tokenizer), 16, 2, 2, 24, 128, 1)
    module = MaskedLm(config)
    ids = np.ones((1, 4), np.int32)
    params = jax.jit(module.init)(jax.random.key(0), {"input_ids": ids, "attention_mask": ids})["params"]
    params = jax.tree.map(lambda leaf: leaf + 0.1 * jax.random.normal(jax.random.key(leaf.size), leaf.shape), params)
    return Model(params, module, tiny.source)


def test_logits_of_label_words_in_the_blank(masked):
    model = jl.prompt_classifier(masked, "it is {mask}: {text}", ["good", "bad"])
    batch, tok = jl.prompt_batch(model, TEXTS), masked.tokenizer
    for row, mask, text in zip(batch["input_ids"], batch["attention_mask"], TEXTS, strict=True):
        assert row[mask == 1].tolist() == tok(f"it is [MASK]: {text}")["input_ids"]
    whole = cases.outputs(masked, batch)
    at = (batch["input_ids"] == tok.mask_token_id).argmax(axis=1)
    words = tok.convert_tokens_to_ids(["good", "bad"])
    expected = whole[np.arange(3), at][:, words]
    np.testing.assert_allclose(cases.outputs(model, batch), expected, atol=5e-6)
    assert np.ptp(expected) > 1e-2
    broken = {**batch, "input_ids": batch["input_ids"].copy()}
    broken["input_ids"][1, at[1]] = 7
    with pytest.raises(jl.InputError, match="example 1 holds 0 mask tokens; expected one"):
        model.apply(model.params, broken)


def test_what_is_too_long_loses_text_and_never_template(masked):
    model = jl.prompt_classifier(masked, "{text} is {mask}.", ["good", "bad"])
    tok = masked.tokenizer
    fixed = tok("is [MASK].")["input_ids"]
    for limit in range(len(fixed) + 1, 30):
        batch = jl.prompt_batch(model, TEXTS, limit)
        assert batch["input_ids"].shape[1] <= limit
        for row, mask, text in zip(batch["input_ids"], batch["attention_mask"], TEXTS, strict=True):
            live = row[mask == 1].tolist()
            own = tok(text, add_special_tokens=False)["input_ids"]
            assert live[-len(fixed) + 1 :] == fixed[1:]
            assert live[1 : -len(fixed) + 1] == own[: limit - len(fixed)]  # WordPiece: pieces stay what they were
    with pytest.raises(jl.InputError, match=f"max_seq_length={len(fixed)} leaves no room for text"):
        jl.prompt_batch(model, TEXTS, len(fixed))


def test_pairs_lose_the_end_of_the_longer_text(masked):
    model = jl.prompt_classifier(masked, "{text_b} is {mask}: {text_a}", ["good", "bad"])
    tok, pairs = masked.tokenizer, [("a dull film", "one {text_a} three four five"), ("yes", "no")]
    ids = [tok(text, add_special_tokens=False)["input_ids"] for pair in pairs for text in pair]
    fixed = len(tok("is [MASK]:")["input_ids"])
    for limit in range(fixed + 1, fixed + sum(map(len, ids[:2])) + 2):
        batch = jl.prompt_batch(model, pairs, limit)
        for row, mask, (a, b) in zip(batch["input_ids"], batch["attention_mask"], (ids[:2], ids[2:]), strict=True):
            kept = [list(a), list(b)]
            while sum(map(len, kept)) > limit - fixed:
                max(kept, key=len).pop()
            middle = tok("is [MASK]:", add_special_tokens=False)["input_ids"]
            assert row[mask == 1].tolist() == [tok.cls_token_id, *kept[1], *middle, *kept[0], tok.sep_token_id]


@pytest.mark.slow
@pytest.mark.parametrize("how", ["lora", "bias"])
def test_a_prompt_classifier_is_tuned_like_any_model(masked, how):
    model = jl.prompt_classifier(masked, "{text} is {mask}.", ["good", "bad"])
    tun = jl.lora(model, rank=2) if how == "lora" else jl.bias_only(model)
    cases.check(tun, jl.prompt_batch(model, TEXTS[:2]), model)


@pytest.mark.slow
def test_a_prompt_classifier_is_trained_and_compared(masked):
    model = jl.prompt_classifier(masked, "{text} is {mask}.", ["good", "bad"])
    texts = ["a good film", "fine", "a bad film", "dull"]
    data = jl.Dataset.from_columns({**jl.prompt_batch(model, texts), "labels": np.array([0, 0, 1, 1])})
    config = jl.TrainConfig(learning_rate=3e-2, batch_size=4, max_steps=12)
    found = jl.compare(jl.lora(model, rank=2), data, data, config, lams=[0.0])
    losses = {row["arm"]: row["loss_train"] for row in found.table}
    assert losses["full"] < losses["start"]
    assert losses["linearized"] < losses["start"]


def test_layers_of_a_prompted_model_are_rematerialised_and_its_trunk_cached(masked):
    model = jl.prompt_classifier(masked, "{text} is {mask}.", ["good", "bad"])
    batch = jl.prompt_batch(model, TEXTS)
    again = jl.with_remat(model)
    assert again.module.module.config.remat
    expected = cases.outputs(model, batch)
    np.testing.assert_allclose(cases.outputs(again, batch), expected, atol=5e-6)
    fast, data = jl.cache_trunk(jl.lora(model, rank=2, layers=[1]), batch)
    np.testing.assert_allclose(cases.outputs(fast, data.columns), expected, atol=5e-6)


def test_label_words_are_one_token_each(masked):
    for template, words, message in (
        ("{text} is {mask}.", ["good", "terrible"], r"label word ' terrible' is 8 token\(s\), \['t', '##e'"),
        ("{text} is {mask}.", ["good", "good"], "expected at least two, of different tokens"),
        ("{text} is {mask}.", ["good"], "expected at least two"),
        ("{text} is {mask}.", ["good", "§"], r"\['\[UNK\]'\]; expected one known token"),
        ("{text} is", ["good", "bad"], r"has \{mask\} 0 times; expected once"),
        ("{text} {text} {mask}", ["good", "bad"], r"has \{text\} 2 times"),
        ("{text_a} is {mask}", ["good", "bad"], r"has \{text_b\} 0 times"),
        ("{text} {text_a} {text_b} {mask}", ["good", "bad"], r"has \{text\}; expected \{text\}, or \{text_a\} and"),
        ("{sentence} is {mask}", ["good", "bad"], r"has \{sentence\}; expected \{text\}"),
    ):
        with pytest.raises(jl.InputError, match=message):
            jl.prompt_classifier(masked, template, words)
    with pytest.raises(jl.InputError, match="module is a SequenceClassifier; expected one of load_causal_lm"):
        jl.prompt_classifier(cases.tiny_model(), "{text} is {mask}.", ["good", "bad"])
    with pytest.raises(jl.InputError, match="needs a model of prompt_classifier"):
        jl.prompt_batch(masked, TEXTS)
    model = jl.prompt_classifier(masked, "{text} is {mask}.", ["good", "bad"])
    with pytest.raises(jl.InputError, match=r"text 1 holds '\[MASK\]'"):
        jl.prompt_batch(model, ["fine", "a [MASK] film"])
    with pytest.raises(jl.InputError, match=r"an example has 2 text\(s\); expected \{text\} for one"):
        jl.prompt_batch(model, [("one", "two")])
    with pytest.raises(jl.InputError, match="got no text"):
        jl.prompt_batch(model, [])


def test_a_causal_lm_reads_what_stands_before_the_blank(models_folder):
    lm = jl.load_causal_lm(models_folder / "stories260K")
    model = jl.prompt_classifier(lm, "{text} One day, {mask} was very happy.", ["Lily", "Tim"])
    texts = ["There was a little girl named Lily. Lily had a ball.", "There was a boy named Tim. Tim had a dog."]
    batch, tok = jl.prompt_batch(model, texts), lm.tokenizer
    for row, mask, text in zip(batch["input_ids"], batch["attention_mask"], texts, strict=True):
        assert row[mask == 1].tolist() == tok(f"{text} One day,")["input_ids"]
    words = [tok(f"day, {word}")["input_ids"][-1] for word in ("Lily", "Tim")]
    ends = batch["attention_mask"].sum(axis=1) - 1
    expected = cases.outputs(lm, batch)[np.arange(2), ends][:, words]
    found = cases.outputs(model, batch)
    np.testing.assert_allclose(found, expected, atol=1e-4)
    # It has learnt that a story goes on about whom it began with.
    assert found[0, 0] > found[0, 1]
    assert found[1, 1] > found[1, 0]
    with pytest.raises(jl.InputError, match=r"' sad' is 2 token\(s\), \['▁sa', 'd'\]"):
        jl.prompt_classifier(lm, "{text} She was {mask}.", ["happy", "sad"])
    with pytest.raises(jl.InputError, match="reads only what stands before"):
        jl.prompt_classifier(lm, "It was {mask}: {text}", ["Lily", "Tim"])


def test_templates_are_compared_by_value():
    assert Template("{text} is {mask}") == dataclasses.replace(Template("{text} was {mask}"), text="{text} is {mask}")
    assert Template("{text} is {mask}.").filled("this") == "this is"
    assert Template("{text} is {mask}.", "<m>").filled("{mask}") == "{mask} is <m>."
