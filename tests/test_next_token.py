import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxlin as jl
from jaxlin.models.next_token import root
from jaxlin.ntk.jacobian import to_float64
from jaxlin.training.losses import to_mean
from tests import cases

TEXTS = ["a good film", "the film is bad in a way", "no"]


@pytest.fixture(scope="module")
def lm(tmp_path_factory):
    """A tiny Llama with the tiny tokenizer."""
    return jl.load_causal_lm(cases.write_language_model(tmp_path_factory.mktemp("lm"), cases.DECODERS["llama: LM"]))


def tuned(model):
    return jl.lora(model, rank=2, targets=("value", "mlp/gate"), layers=[1])


def outputs(model, batch):
    """Compiled: quicker than one operation at a time."""
    return np.asarray(jax.jit(lambda m, b: m.apply(m.params, b))(model, batch))


def dense(tun, batch, theta):
    """Outputs `[N, C]` and their Jacobian `[N, C, P]`, float64."""
    jac, _ = cases.reference_jacobian(tun, batch, theta)
    with jax.enable_x64(True):
        apply, theta = to_float64((tun.apply, theta))
        found = np.asarray(jax.jit(lambda f, p, b: f(p, b))(apply, theta, batch))
    return found, jac.reshape(*found.shape, -1)


def sgd(n, **options):
    rate = to_mean(0.02, n, "learning_rate")
    return jl.TrainConfig(
        optimizer="sgd", learning_rate=rate, lr_scheduler_type="constant", batch_size=n, max_steps=4, **options
    )


def test_examples_are_what_stands_before_each_chosen_token(lm):
    ids = [lm.tokenizer(text)["input_ids"] for text in TEXTS]
    a, good = lm.tokenizer.convert_tokens_to_ids(["a", "good"])
    batch = jl.next_token_batch(jl.next_token_logits(lm, [good, a]), TEXTS)
    expected = [(row[:t], [good, a].index(row[t])) for row in ids for t in range(1, len(row)) if row[t] in (good, a)]
    assert len(expected) == len(batch["labels"]) == 2
    for row, mask, label, (context, answer) in zip(*batch.values(), expected, strict=True):
        assert (row[mask == 1].tolist(), int(label)) == (context, answer)
    whole = jl.next_token_batch(jl.next_token_logits(lm), TEXTS, max_length=5)
    assert whole["labels"].tolist() == [token for row in ids for token in row[1:5]]
    texts = jl.next_token_batch(jl.next_token_loss(lm), TEXTS, max_length=5)
    assert [row[mask == 1].tolist() for row, mask in zip(texts["input_ids"], texts["attention_mask"], strict=True)] == [
        row[:5] for row in ids
    ]
    assert texts["labels"].dtype == np.float32


def test_outputs_are_those_of_the_language_model(lm):
    ids = [lm.tokenizer(text)["input_ids"] for text in TEXTS]
    model = jl.next_token_logits(lm, [9, 4, 30])
    batch = {"input_ids": np.array([ids[0] + [0]]), "attention_mask": np.array([[1] * len(ids[0]) + [0]])}
    expected = outputs(lm, batch)[:, len(ids[0]) - 1, [9, 4, 30]]
    np.testing.assert_allclose(outputs(model, batch), expected, atol=1e-5)
    model = jl.next_token_loss(lm)
    texts = jl.next_token_batch(model, TEXTS)
    logits = outputs(lm, texts).astype(np.float64)
    logp = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    losses = [-sum(logp[i, t, row[t + 1]] for t in range(len(row) - 1)) for i, row in enumerate(ids)]
    np.testing.assert_allclose(outputs(model, texts), np.sqrt(2 * np.array(losses))[:, None], rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["loss", "logits"])
def test_they_are_tuned_like_any_model(lm, kind):
    model = jl.next_token_loss(lm) if kind == "loss" else jl.next_token_logits(lm, [9, 4, 30])
    batch = jl.next_token_batch(jl.next_token_loss(lm), TEXTS)
    cases.check(tuned(model), {name: batch[name] for name in ("input_ids", "attention_mask")}, model)


def test_the_kernel_of_the_loss_is_that_of_all_logits_weighted(lm):
    model = jl.next_token_loss(lm)
    batch = jl.next_token_batch(model, TEXTS)
    tun, tokens = tuned(model), tuned(jl.next_token_logits(lm))
    theta = cases.moved(tun)
    contexts = jl.next_token_batch(jl.next_token_logits(lm), TEXTS)
    logits, jac = dense(tokens, contexts, theta)
    p = np.exp(logits - logits.max(axis=1, keepdims=True))
    p /= p.sum(axis=1, keepdims=True)
    answers = np.eye(p.shape[1])[contexts["labels"]]
    losses, slopes = -np.log((p * answers).sum(axis=1)), np.einsum("nv,nvp->np", p - answers, jac)
    text = np.repeat(np.arange(len(TEXTS)), batch["attention_mask"].sum(axis=1) - 1) == np.arange(len(TEXTS))[:, None]
    weighted = (text @ slopes) / np.sqrt(2 * (text @ losses))[:, None]
    expected = weighted @ weighted.T
    assert cases.relative_error(jl.ntk(tun, batch, theta=theta, check_examples=0).matrix(), expected) < 1e-4


def test_both_train_the_same_language_model(lm):
    """The same summed loss: the squared one of its root, and the cross-entropy of every token by itself."""
    texts, tokens = jl.next_token_loss(lm), jl.next_token_logits(lm)
    thetas = []
    for model, loss in ((texts, "squared"), (tokens, "cross_entropy")):
        batch = jl.next_token_batch(model, TEXTS)
        n = len(batch["labels"])
        found = jl.train(tuned(model), batch, config=sgd(n, loss=loss))
        losses = np.array([row["loss"] for row in found.history]) * n
        thetas.append((losses, np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(found.theta)])))
    np.testing.assert_allclose(thetas[0][0], thetas[1][0], rtol=1e-5)
    assert thetas[0][0][-1] < thetas[0][0][0] - 0.1
    start = np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tuned(lm).theta0)])
    assert cases.relative_error(thetas[0][1] - start, thetas[1][1] - start) < 1e-3


@pytest.mark.slow
def test_linearized_language_modelling_is_that_of_dense_algebra(lm):
    model = jl.next_token_logits(lm)
    batch = jl.next_token_batch(model, TEXTS[:2])
    tun, n = tuned(model), len(batch["labels"])
    found = jl.train(jl.linearize(tun), batch, config=sgd(n, loss="cross_entropy"))
    f0, jac = dense(tun, batch, tun.theta0)
    jac = jac.reshape(f0.size, -1)
    delta, wanted = np.zeros(jac.shape[1]), np.eye(f0.shape[1])[batch["labels"]]
    for row in found.history:
        p = np.exp(f0 + (jac @ delta).reshape(f0.shape))
        p /= p.sum(axis=1, keepdims=True)
        assert row["loss"] == pytest.approx(-np.log(p[np.arange(n), batch["labels"]]).mean(), rel=1e-5)
        delta -= 0.02 * jac.T @ (p - wanted).reshape(-1)
    moved = jax.tree.map(np.subtract, found.theta, tun.theta0)
    step = np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(moved)])
    assert cases.relative_error(step, delta) < 1e-3


@pytest.mark.slow
def test_a_loss_is_compared_with_its_linearization(lm):
    model = jl.next_token_loss(lm)
    data = jl.Dataset.from_columns(jl.next_token_batch(model, TEXTS))
    found = jl.compare(tuned(model), data, data, sgd(3), lams=[0.0], lam_rel=None)
    losses = {row["arm"]: row["loss_train"] for row in found.table}
    assert max(losses["full"], losses["linearized"]) < losses["start"] - 0.1
    assert losses["kernel_regression"] == pytest.approx(0, abs=1e-3)  # 3 outputs, more parameters


def test_the_root_at_nothing_has_no_slope():
    losses = jnp.array([0.0, 1e-30, 2.0])
    np.testing.assert_allclose(root(losses), [0, 2**0.5 * 1e-15, 2])
    slope = jax.jvp(lambda x: root(x**2), (jnp.array([0.0, 3.0]),), (jnp.ones(2),))[1]
    np.testing.assert_allclose(slope, [0, 2**0.5], rtol=1e-6)


def test_bad_input_is_named(lm):
    for tokens in ([], [3, 3], [-1], [10**6]):
        with pytest.raises(jl.InputError, match=r"expected at least one id, each once, of the vocabulary \(0 to 11"):
            jl.next_token_logits(lm, tokens)
    for make in (jl.next_token_logits, jl.next_token_loss):
        with pytest.raises(jl.InputError, match="SequenceClassifier; expected one of load_causal_lm"):
            make(cases.tiny_model())
    model = jl.next_token_loss(lm)
    with pytest.raises(jl.InputError, match="needs a model of next_token_logits or next_token_loss"):
        jl.next_token_batch(lm, TEXTS)
    with pytest.raises(jl.InputError, match="got no text"):
        jl.next_token_batch(model, [])
    with pytest.raises(jl.InputError, match=r"text 1 has 1 token\(s\) of at most 64; expected at least two"):
        jl.next_token_batch(model, ["a film", "a"])
    with pytest.raises(jl.InputError, match="no token of the texts, but the first"):
        jl.next_token_batch(jl.next_token_logits(lm, [0]), TEXTS)
    alone = {"input_ids": np.full((1, 3), 7), "attention_mask": np.array([[1, 0, 1]])}
    with pytest.raises(jl.InputError, match="example 0 has no token that follows another"):
        model.apply(model.params, alone)


def test_a_real_language_model_on_stories(models_folder):
    model = jl.next_token_loss(jl.load_causal_lm(models_folder / "stories260K"))
    golden = json.loads((cases.GOLDEN / "stories260k.json").read_text())
    batch = jl.next_token_batch(model, [golden["text"]])
    loss = outputs(model, batch)[0, 0] ** 2 / 2
    assert loss / (len(golden["input_ids"]) - 1) == pytest.approx(golden["loss"], abs=1e-5)
