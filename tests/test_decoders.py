import csv
import json
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import jaxlin as jl
from jaxlin.data.task import TextSplit, tokenize
from jaxlin.models.decoder import last_live, positions_of
from jaxlin.models.rope import Rope
from jaxlin.sharding import DECODER_RULES
from jaxlin.tunable import leaf_paths
from tests import cases


def inputs(case):
    return {key: np.array(value) for key, value in case["inputs"].items()}


def text(n, longest):
    batch = cases.text_batch(n, longest=longest, ids=40)
    return {name: batch[name] for name in ("input_ids", "attention_mask")}


def folder_of(tmp_path, name, tensors=None, **config):
    """A golden decoder's checkpoint, with tensors or configuration changed."""
    folder = cases.write_checkpoint(tmp_path / "model", cases.DECODERS[name])
    if tensors is not None:
        content = load_file(folder / "model.safetensors")
        tensors(content)
        save_file(content, folder / "model.safetensors")
    old = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**old, **config}))
    return folder


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * ("full length" in name)) for name in cases.DECODERS]
)
def test_every_family_equals_pytorch(tmp_path, name):
    case, folder = cases.DECODERS[name], folder_of(tmp_path, name)
    batch, expected = inputs(case), np.array(case["logits"])
    close = {"atol": 3e-6 * np.abs(expected).max(), "rtol": 0}  # float32's rounding, on any machine
    if "LM" in name:
        model = jl.load_causal_lm(folder)
        live = batch["attention_mask"].astype(bool)
        found = cases.outputs(model, batch)
        np.testing.assert_allclose(found[live], expected[live], **close)
        assert np.isfinite(found).all()
        at = np.array([5, 3])
        some = cases.outputs(model, {**batch, "positions": at})
        np.testing.assert_allclose(some, expected[np.arange(2), at], **close)
    else:
        model = jl.load_model(folder, expected.shape[1])
        assert (model.module.head, model.source.head_is_new) == ("last", False)
        np.testing.assert_allclose(cases.outputs(model, batch), expected, **close)


@pytest.fixture(scope="module")
def stories(models_folder):
    return models_folder / "stories260K"


def test_the_real_tiny_llama_equals_pytorch(stories):
    golden, model = json.loads((cases.GOLDEN / "stories260k.json").read_text()), jl.load_causal_lm(stories)
    ids = np.array([model.tokenizer(golden["text"])["input_ids"]])
    assert ids[0].tolist() == golden["input_ids"]
    found = cases.outputs(model, {"input_ids": ids, "attention_mask": np.ones_like(ids)}).astype(np.float64)
    np.testing.assert_allclose(found[0, golden["positions"]], golden["logits"], atol=2e-5, rtol=0)
    logp = found - np.log(np.exp(found).sum(axis=-1, keepdims=True))
    loss = -np.take_along_axis(logp[0, :-1], ids[0, 1:, None], axis=1).mean()
    assert loss == pytest.approx(golden["loss"], abs=1e-5)
    assert loss == pytest.approx(0.90, abs=0.05)  # nats a token; uniform would be 6.24


@pytest.mark.parametrize("family", cases.DECODER_FAMILIES)
def test_padding_and_batch_do_not_change_an_example(family):
    model = cases.decoder(family, head="mean" if family in ("gpt2", "llama") else "last")
    batch = text(3, 12)
    whole = cases.outputs(model, batch)
    assert np.abs(whole - whole[0]).max() > 1e-2
    length = batch["attention_mask"][1].sum()
    assert length < 12
    alone = {name: value[1:2, :length] for name, value in batch.items()}
    left = {name: np.roll(value, 12 - length, axis=1) for name, value in batch.items()}
    filler = {**batch, "input_ids": np.where(batch["attention_mask"], batch["input_ids"], 39)}
    np.testing.assert_allclose(cases.outputs(model, alone)[0], whole[1], atol=5e-6)
    np.testing.assert_allclose(cases.outputs(model, left)[1], whole[1], atol=5e-6)
    np.testing.assert_allclose(cases.outputs(model, filler), whole, atol=5e-6)
    assert np.isfinite(cases.outputs(model, {**batch, "attention_mask": 0 * batch["attention_mask"]})).all()


def test_positions_and_last_token_by_hand():
    mask = jnp.array([[1, 1, 1, 0], [0, 0, 1, 1], [1, 0, 1, 0], [0, 0, 0, 0]])
    np.testing.assert_array_equal(positions_of(mask)[:3], [[0, 1, 2, 2], [0, 0, 0, 1], [0, 0, 1, 1]])
    np.testing.assert_array_equal(last_live(mask), [2, 3, 2, 0])


def test_the_future_is_not_read(tmp_path):
    model = jl.load_causal_lm(folder_of(tmp_path, "mistral: LM"))
    ids = np.arange(5, 17)[None]
    mask = np.ones_like(ids)
    before = cases.outputs(model, {"input_ids": ids, "attention_mask": mask})
    changed = ids.copy()
    changed[0, 6] = 30
    after = cases.outputs(model, {"input_ids": changed, "attention_mask": mask})
    np.testing.assert_array_equal(before[0, :6], after[0, :6])
    # Two layers with a window of 4 see 3 tokens back each.
    differs = np.abs(before - after)[0].max(axis=1) > 1e-7
    assert differs.tolist() == [False] * 6 + [True] * 6
    changed[0, 6], changed[0, 0] = ids[0, 6], 30
    after = cases.outputs(model, {"input_ids": changed, "attention_mask": mask})
    assert (np.abs(before - after)[0].max(axis=1) > 1e-7).tolist() == [True] * 7 + [False] * 5


@pytest.mark.parametrize("family", [pytest.param("gpt2", marks=pytest.mark.slow), "qwen3"])
def test_float64_reference_differs_from_float32_and_follows_the_parameters(family):
    batch, narrow = text(4, 10), cases.decoder(family)
    with jax.enable_x64(True):
        wide = cases.outputs(cases.decoder(family, dtype=jnp.float64), batch)
    coarse = cases.outputs(cases.decoder(family, dtype=jnp.bfloat16), batch)
    assert (wide.dtype, coarse.dtype) == (np.float64, jnp.bfloat16)
    gap = np.abs(cases.outputs(narrow, batch) - wide).max()
    assert 1e-9 < gap < 1e-5
    np.testing.assert_allclose(coarse.astype(np.float32), wide, atol=0.05 * np.abs(wide).max() + 0.05)


TUNED = {
    "gpt2": lambda model: jl.lora(model, rank=2, alpha=6, targets=("query", "mlp/up")),
    "llama": lambda model: jl.lora(model, rank=2, targets=("value", "mlp/gate"), train_head=False),
    "qwen3": jl.layer_norm_only,
}


@pytest.mark.parametrize("family", ["gpt2", *(pytest.param(k, marks=pytest.mark.slow) for k in ("llama", "qwen3"))])
def test_tuned_decoders_meet_the_dense_reference(family):
    model = cases.decoder(family, 2)
    cases.check(TUNED[family](model), text(3, 7), model)


@pytest.mark.slow
@pytest.mark.parametrize("family", cases.DECODER_FAMILIES)
def test_engines_meet_the_dense_reference(family):
    tun = jl.full(cases.decoder(family, 2))
    jac, _ = cases.reference_jacobian(tun, text(4, 9))
    for engine in ("jacobian", "factored"):
        kernel = jl.ntk(tun, text(4, 9), engine=engine, check_examples=0)
        assert cases.relative_error(kernel.matrix(), jac @ jac.T) < 1e-4, engine


@pytest.mark.parametrize("family", ["gpt2", pytest.param("llama", marks=pytest.mark.slow)])
def test_decoders_survive_jit_vmap_jvp_vjp(family):
    """The pattern that XLA's CPU compiler (jaxlib <= 0.10.2) gets wrong for jax.nn.gelu's tanh form."""
    tun = jl.lora(cases.decoder(family), rank=2, targets=("mlp/up", "mlp/down"))
    batch = {name: jnp.asarray(value) for name, value in text(2, 6).items()}

    def products(apply, theta):
        outputs, pullback = jax.vjp(lambda p: apply(p, batch), theta)
        columns = jnp.eye(outputs.size, dtype=outputs.dtype).reshape(-1, *outputs.shape)
        return jax.vmap(lambda ct: jax.jvp(lambda p: apply(p, batch), (theta,), (pullback(ct)[0],))[1])(columns)

    theta = cases.moved(tun)
    jac, _ = cases.reference_jacobian(tun, batch, theta)
    assert cases.relative_error(jax.jit(products)(tun.apply, theta).reshape(len(jac), -1), jac @ jac.T) < 1e-5


def test_blocks_and_layers_are_found_by_the_usual_names():
    model = cases.decoder("gpt2")
    tun = jl.lora(model, rank=2, targets=("query", "key", "value", "attention/output", "mlp/up"), layers=[1])
    assert {path.split("/")[1] for path in tun.blocks if path.startswith("decoder")} == {"layer_1"}
    assert set(tun.grouped("layer")) == {"classifier", "layer_1/lora_A", "layer_1/lora_B"}
    assert jl.select(cases.decoder("llama"), "layer_0/mlp/gate").num_params == 16 * 24


def test_rematerialised_layers_are_the_same_function():
    model = cases.decoder("qwen2")
    again = jl.with_remat(model)

    def gradient(model):
        return jax.grad(lambda p: (model.apply(p, {k: jnp.asarray(v) for k, v in text(3, 7).items()}) ** 2).sum())

    plain, remat = (jax.jit(gradient(m))(model.params) for m in (model, again))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5 * np.abs(b).max() + 1e-7), remat, plain)


@pytest.mark.slow
def test_the_trunk_of_a_decoder_is_cached():
    tun = jl.lora(cases.decoder("llama"), rank=2, layers=[1])
    batch = text(4, 9)
    fast, data = jl.cache_trunk(tun, batch)
    assert fast.apply.cut.path.startswith("decoder/layer_")
    np.testing.assert_allclose(cases.outputs(fast, data.columns), cases.outputs(tun, batch), atol=1e-5)


@pytest.mark.parametrize("name", ["gpt2: LM", "qwen2: LM", "llama: LM"])
def test_sharding_rules_know_every_matrix(tmp_path, name):
    model = jl.load_causal_lm(folder_of(tmp_path, name))
    matrices = [path for path in leaf_paths(model.params) if path.endswith(("kernel", "embedding"))]
    for path in matrices:
        spec = next(spec for pattern, spec in DECODER_RULES if re.search(pattern, path))
        assert len(spec) == 2, path
    tun = jl.shard(
        jl.lora(model, rank=2), jl.make_mesh({"data": 1, "model": 1}, devices=jax.devices()[:1]), DECODER_RULES
    )
    batch = {**inputs(cases.DECODERS[name]), "positions": np.array([2, 3])}
    np.testing.assert_allclose(cases.outputs(tun, batch), cases.outputs(model, batch), atol=1e-5)


def test_llama3_scaling_by_hand():
    rope = Rope(10000.0, "llama3", 8.0, 1.0, 4.0, 8192)
    plain = 10000.0 ** (-np.arange(0, 128, 2) / 128)
    for found, base in zip(rope.frequencies(128), plain, strict=True):
        wavelength = 2 * np.pi / base
        if wavelength < 8192 / 4:
            expected = base
        elif wavelength > 8192:
            expected = base / 8
        else:
            smooth = (8192 / wavelength - 1) / 3
            expected = (1 - smooth) * base / 8 + smooth * base
        assert found == pytest.approx(expected, rel=1e-12)
    np.testing.assert_allclose(Rope(100.0, "linear", 2.5).frequencies(4), [1 / 2.5, 0.1 / 2.5], rtol=1e-12)


def test_older_configurations_and_buffers_load(tmp_path):
    """`rope_theta` and `rope_scaling` as transformers 4 wrote them; causal masks and frequencies saved as tensors."""
    name = "llama: LM, linear scaling, biases, tied"

    def buffer(tensors):
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(2, np.float32)
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]

    old = {"rope_parameters": None, "rope_theta": 100.0, "rope_scaling": {"type": "linear", "factor": 2.5}}
    model = jl.load_causal_lm(folder_of(tmp_path, name, buffer, **old))
    case = cases.DECODERS[name]
    live = np.array(case["inputs"]["attention_mask"]).astype(bool)
    found = cases.outputs(model, inputs(case))
    np.testing.assert_allclose(found[live], np.array(case["logits"])[live], atol=1e-5, rtol=0)

    def bare(tensors):  # the first GPT-2: no prefix, its mask as a buffer
        for key in list(tensors):
            tensors[key.removeprefix("transformer.")] = tensors.pop(key)
        tensors["h.0.attn.bias"] = np.ones((1, 1, 20, 20), np.float32)
        tensors["h.0.attn.masked_bias"] = np.array(-1e4, np.float32)

    whole = jl.load_causal_lm(folder_of(tmp_path / "a", "gpt2: LM"))
    jax.tree.map(
        np.testing.assert_array_equal,
        whole.params,
        jl.load_causal_lm(folder_of(tmp_path / "b", "gpt2: LM", bare)).params,
    )


def test_a_language_model_becomes_a_classifier(tmp_path):
    """Untied: its head is left out, and is not taken for the word embedding."""
    folder = folder_of(tmp_path, "llama: LM")
    model, lm = jl.load_model(folder, 3, head_init="zero"), jl.load_causal_lm(folder)
    assert (model.module.head, model.source.head_is_new) == ("last", True)
    assert not model.params["classifier"]["kernel"].any()
    np.testing.assert_array_equal(
        model.params["embeddings"]["word"]["embedding"], lm.params["embeddings"]["word"]["embedding"]
    )
    batch = inputs(cases.DECODERS["llama: LM"])
    last = jax.jit(model.features)(model.params, batch)
    ends = batch["attention_mask"].sum(axis=1) - 1
    np.testing.assert_allclose(
        last @ lm.params["lm_head"]["kernel"], cases.outputs(lm, {**batch, "positions": ends}), atol=1e-5
    )


def test_a_head_of_another_size_or_reading(tmp_path):
    folder = folder_of(tmp_path, "gpt2: uneven, C = 2")
    with pytest.raises(jl.InputError, match="head has 2 outputs, the task 3; new_head=True"):
        jl.load_model(folder, 3)
    assert jl.load_model(folder, 3, new_head=True).source.head_is_new
    assert jl.load_model(folder, 2, head="mean").source.head_is_new
    assert set(jl.load_model(folder, 2, head="last").params["classifier"]) == {"kernel"}  # as transformers' `score`
    assert set(jl.load_model(folder, 2, new_head=True).params["classifier"]) == {"kernel"}
    with pytest.raises(
        jl.InputError, match="head='pooler' is unknown for a gpt2 model; expected one of auto, last, mean"
    ):
        jl.load_model(folder, 2, head="pooler")
    with pytest.raises(jl.InputError, match="head='last' is unknown for a bert model"):
        jl.load_model(cases.TINY_BERT, 3, head="last")


def test_the_loader_of_the_other_kind_is_named(tmp_path):
    with pytest.raises(jl.InputError, match="is of gpt2, a decoder: load_causal_lm loads"):
        jl.load_masked_lm(folder_of(tmp_path, "gpt2: LM"))
    with pytest.raises(jl.InputError, match="is of bert, an encoder: load_masked_lm loads"):
        jl.load_causal_lm(cases.TINY_BERT)
    with pytest.raises(jl.InputError, match=r"lacks .* lm_head \(lm_head/kernel\)"):
        jl.load_causal_lm(folder_of(tmp_path / "classifier", "llama: uneven, C = 2"))


BAD_CONFIGS = {
    "yarn": (
        "llama",
        {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0}},
        "'yarn' is not supp",
    ),
    "factor": ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4}}, "(lacks|Missing).*factor"),
    "activation": ("mistral", {"hidden_act": "mish"}, "activation 'mish' is not supported"),
    "groups": ("qwen2", {"num_key_value_heads": 3}, "4 is no multiple of num_key_value_heads=3"),
    "scale": ("gpt2", {"scale_attn_weights": False}, "scale_attn_weights=False is not supported"),
    "odd": ("qwen3", {"head_dim": 5}, "head_dim`?=5"),
    "layers": ("qwen2", {"layer_types": ["full_attention", "linear_attention"]}, "layer_types="),
    "size": ("gpt2", {"n_inner": 10}, r"mlp/up/bias shape \(64,\); the configuration says \(10,\)"),
}


@pytest.mark.parametrize("case", BAD_CONFIGS)
def test_unsupported_configuration_is_named(tmp_path, case):
    family, config, message = BAD_CONFIGS[case]
    with pytest.raises(jl.InputError, match=message):
        jl.load_model(folder_of(tmp_path, f"{family}: uneven, C = 2", **config))


def test_bad_tensors_are_named(tmp_path):
    def cut(tensors):
        tensors["transformer.h.0.attn.c_attn.weight"] = np.ones((16, 47), np.float32)

    with pytest.raises(jl.InputError, match=r"c_attn.weight' has shape \(16, 47\); expected 3 equal parts"):
        jl.load_model(folder_of(tmp_path / "a", "gpt2: uneven, C = 2", cut))
    with pytest.raises(jl.InputError, match=r"unexpected tensor 'model.layers.0.extra.weight'"):
        jl.load_model(
            folder_of(
                tmp_path / "b",
                "llama: uneven, C = 2",
                lambda t: t.update({"model.layers.0.extra.weight": np.ones(3, np.float32)}),
            )
        )
    with pytest.raises(jl.InputError, match=r"lacks 1 tensor.*layers.1.self_attn.q_norm"):
        jl.load_model(folder_of(tmp_path / "c", "qwen3: LM", lambda t: t.pop("model.layers.1.self_attn.q_norm.weight")))


def test_limits_of_inputs(tmp_path):
    model = jl.load_causal_lm(folder_of(tmp_path, "llama: LM"))
    ids = np.full((1, 21), 7)
    with pytest.raises(jl.InputError, match="21 tokens long; the model has 20 positions"):
        model.apply(model.params, {"input_ids": ids, "attention_mask": np.ones_like(ids)})
    short = {"input_ids": ids[:, :4], "attention_mask": np.ones((1, 4), int)}
    with pytest.raises(jl.InputError, match=r"token_type_ids holds 1"):
        model.apply(model.params, {**short, "token_type_ids": np.ones((1, 4), int)})
    with pytest.raises(jl.InputError, match="positions holds 4, outside the tokens"):
        model.apply(model.params, {**short, "positions": np.array([4])})


def test_bfloat16_shards(tmp_path):
    folder = folder_of(tmp_path, "qwen2: uneven, C = 2")
    tensors = {name: value.astype(jnp.bfloat16) for name, value in load_file(folder / "model.safetensors").items()}
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    where = {name: f"model-{i % 2 + 1:05d}-of-00002.safetensors" for i, name in enumerate(names)}
    for shard in set(where.values()):
        save_file({name: tensors[name] for name in names if where[name] == shard}, folder / shard)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    half, full = jl.load_model(folder), jl.load_model(folder, dtype=jnp.float32)
    assert {leaf.dtype for leaf in jax.tree.leaves(half.params)} == {jnp.dtype(jnp.bfloat16)}
    case = cases.DECODERS["qwen2: uneven, C = 2"]
    np.testing.assert_allclose(cases.outputs(full, inputs(case)), case["logits"], atol=0.05)


def test_probe_reads_the_last_state():
    model = cases.decoder("llama")
    batch = cases.text_batch(8, longest=9, ids=40)
    y = np.eye(3)[batch["labels"]]
    probed = jl.probe_head(model, {k: batch[k] for k in ("input_ids", "attention_mask")}, y, ridge=0.5)
    features = np.asarray(jax.jit(model.features)(model.params, text(8, 9)), np.float64)
    w = np.linalg.solve(features.T @ features + 0.5 * np.eye(16), features.T @ y)  # its head has no bias
    np.testing.assert_allclose(cases.outputs(probed, text(8, 9)), features @ w, atol=1e-5)


def test_text_ends_fill_rows_where_a_tokenizer_knows_no_padding(stories):
    tokenizer = jl.load_model(stories).tokenizer
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id) == (None, 2)
    split = TextSplit((("Once upon a time",), ("Lily",)), np.array([0, 1]))
    data, truncated = tokenize(split, tokenizer, 16)
    assert truncated == 0
    assert data["attention_mask"].sum(axis=1).tolist() == [len(tokenizer(text)["input_ids"]) for (text,) in split.texts]
    assert set(data["input_ids"][data["attention_mask"] == 0]) == {2}


@pytest.mark.slow
def test_a_large_checkpoint_is_never_held_twice(tmp_path):
    """As the process's own memory is seen while 220 MB are read; the file's pages, mapped, are not its own."""
    case = cases.DECODERS["llama: LM"]
    wide = {16: 1024, 24: 2048, 40: 512, 8: 512}
    config = {**case["config"], "hidden_size": 1024, "intermediate_size": 2048, "vocab_size": 512, "head_dim": 256}
    config["num_hidden_layers"] = 6
    shapes = {name: [wide[size] for size in shape] for name, shape in case["shapes"].items()}
    for i in range(2, 6):
        shapes |= {name.replace(".0.", f".{i}."): shape for name, shape in shapes.items() if ".0." in name}
    folder = cases.write_checkpoint(tmp_path, {**case, "config": config, "shapes": shapes})
    script = (
        "import re, sys, threading, time, jaxlin as jl\n"
        "own = lambda: int(re.search(r'RssAnon:\\s+(\\d+)', open('/proc/self/status').read())[1]) / 1e3\n"
        "small = jl.load_causal_lm(sys.argv[1])\n"
        "del small\n"
        "before, seen, on = own(), [], True\n"
        "def watch():\n"
        "    while on: seen.append(own()); time.sleep(0.002)\n"
        "thread = threading.Thread(target=watch); thread.start()\n"
        "model = jl.load_causal_lm(sys.argv[2]); on = False; thread.join()\n"
        "print(max(seen) - before)"
    )
    small = cases.write_checkpoint(tmp_path / "small", case)
    command = [sys.executable, "-c", script, str(small), str(folder)]
    megabytes = float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    # Beside the model a few tensors of 8 MB, as read and turned; two copies would be twice the file.
    assert megabytes < 1.5 * (folder / "model.safetensors").stat().st_size / 1e6


@pytest.mark.slow
def test_the_command_compares_a_decoder(run, setting_arguments, stories):
    arguments = {**setting_arguments, "model_name_or_path": stories, "head": "last", "lora_layers": 4}
    options = {"max_steps": 3, "per_device_train_batch_size": 8, "lam_rel": 0.1}
    code, out, err = run(*cases.flags({**arguments, **options}))
    assert code == 0, err
    assert "stories260K with head 'last'" in out + err
    rows = list(csv.DictReader((setting_arguments["output_dir"] / "table.csv").open()))
    assert {row["arm"] for row in rows} >= {"full", "linearized", "linear_probe"}
