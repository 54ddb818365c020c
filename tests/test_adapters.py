import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors.numpy import load_file, save_file

import jaxlin as jl
from tests import cases
from tests.golden.adapter_cases import FROM_JAXLIN, FROM_PEFT, digest
from tests.golden.weights import weights

GOLDEN = json.loads(file.read_text()) if (file := cases.GOLDEN / "adapters.json").exists() else None
MODELS = {
    case["config"]["model_type"]: case
    for case in (*cases.ENCODERS.values(), *cases.DECODERS.values())
    if case["name"] == "uneven, C = 2"
}


def base(folder, family, **options):
    return jl.load_model(cases.write_checkpoint(Path(folder) / "base" / family, MODELS[family]), 2, **options)


def tuned_on(tun):
    """Parameters as training might leave them, the same everywhere."""
    flat = flatten_dict(tun.theta0, sep="/")
    values = weights({path: leaf.shape for path, leaf in flat.items()})
    return unflatten_dict({path: jnp.asarray(values[path], leaf.dtype) for path, leaf in flat.items()}, sep="/")


def inputs(family):
    return {name: np.array(value) for name, value in MODELS[family]["inputs"].items()}


@jax.jit
def _outputs(tun, theta, batch):
    return tun.apply(theta, batch)


def outputs(tun, theta, family):
    return np.asarray(_outputs(tun, theta, inputs(family)))


def write_from_jaxlin(folder, family):
    model = base(folder, family)
    tun = jl.lora(model, **FROM_JAXLIN[family])
    jl.save_adapter(tun, tuned_on(tun), Path(folder) / "from_jaxlin" / family, model)
    return model, tun


def write_merged(folder, family):
    model = base(folder, family)
    tun = jl.lora(model, **FROM_JAXLIN[family])
    jl.save_model(model, Path(folder) / "merged" / family, jl.merge(tun, tuned_on(tun)), label_names=("no", "yes"))
    return model, tun


def write_headless(folder, family):
    model = base(folder, family, head="mean")
    tun = jl.lora(model, rank=2)
    jl.save_model(model, Path(folder) / "headless" / family, jl.merge(tun, tuned_on(tun)))
    jl.save_adapter(tun, tuned_on(tun), Path(folder) / "headless_adapter" / family, model)
    return model, tun


def write_all(folder):
    """Writes what peft and transformers read; see `golden/make_adapters.py`."""
    for family in FROM_JAXLIN:
        write_from_jaxlin(folder, family)
        write_merged(folder, family)
    for family in ("roberta", "gpt2"):
        write_headless(folder, family)


def families(of, default):
    """All, of which some are in the default run: patterns, layers, saved modules, one module that is three of ours."""
    return [pytest.param(name, marks=[] if name in default else pytest.mark.slow) for name in of]


def written_by_peft(folder, family, tensors=None, **config):
    golden = GOLDEN["from_peft"][family]
    folder.mkdir()
    content = weights(golden["shapes"])
    save_file({**content, **(tensors(content) if tensors else {})}, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({**golden["config"], **config}))
    return folder


@pytest.mark.parametrize("family", families(FROM_PEFT, ("bert", "roberta", "gpt2")))
def test_an_adapter_of_peft_gives_its_outputs(tmp_path, family):
    model = base(tmp_path, family)
    tun = jl.load_adapter(model, written_by_peft(tmp_path / "adapter", family))
    expected = np.array(GOLDEN["from_peft"][family]["logits"])
    found = outputs(tun, tun.theta0, family)
    np.testing.assert_allclose(found, expected, atol=1e-5, rtol=0)
    assert np.abs(expected - np.array(MODELS[family]["logits"])).max() > 1e-3  # the adapter counts
    if family == "bert":
        np.testing.assert_allclose(outputs(jl.linearize(tun), tun.theta0, family), found, atol=5e-6, rtol=0)
    # Back again, it is the same file, but for what holds no number.
    again = tmp_path / "again"
    jl.save_adapter(tun, tun.theta0, again, model)
    stored = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    new = load_file(again / "adapter_model.safetensors")
    assert set(new) == set(stored)
    for name, value in stored.items():
        np.testing.assert_array_equal(new[name], value)


@pytest.mark.parametrize("family", families(FROM_JAXLIN, ("gpt2",)))
def test_peft_reads_what_is_written_here(tmp_path, family):
    model, tun = write_from_jaxlin(tmp_path, family)
    golden, folder = GOLDEN["from_jaxlin"][family], tmp_path / "from_jaxlin" / family
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config.pop("base_model_name_or_path") == str(tmp_path / "base" / family)
    assert config == golden["config"]
    assert digest(folder / "adapter_model.safetensors", values=True) == golden["sha256"]
    found = outputs(tun, tuned_on(tun), family)
    np.testing.assert_allclose(found, golden["logits"], atol=1e-5, rtol=0)
    again = jl.load_adapter(model, folder)
    np.testing.assert_allclose(outputs(again, again.theta0, family), found, atol=1e-5, rtol=0)


@pytest.mark.parametrize("family", families(FROM_JAXLIN, ("gpt2",)))
def test_transformers_reads_what_is_merged_here(tmp_path, family):
    _, tun = write_merged(tmp_path, family)
    golden, folder = GOLDEN["merged"][family], tmp_path / "merged" / family
    assert digest(folder / "model.safetensors", values=False) == golden["sha256"]
    model = jl.load_model(folder, 2)
    assert not model.source.head_is_new
    assert model.config["id2label"] == {"0": "no", "1": "yes"}
    found = outputs(jl.full(model), model.params, family)
    np.testing.assert_allclose(found, golden["logits"], atol=1e-5, rtol=0)
    np.testing.assert_allclose(outputs(tun, tuned_on(tun), family), found, atol=1e-5, rtol=0)
    assert sorted(path.name for path in (tmp_path / "merged").iterdir()) == [family]
    assert "AutoModel" not in (card := (folder / "README.md").read_text())
    assert f"model = {model.config['architectures'][0]}.from_pretrained(FOLDER)" in card


@pytest.mark.slow
@pytest.mark.parametrize("family", ["roberta", "gpt2"])
def test_a_head_that_transformers_has_not(tmp_path, family):
    model, tun = write_headless(tmp_path, family)
    golden = GOLDEN["headless"][family]
    theta, folder = tuned_on(tun), tmp_path / "headless_adapter" / family
    assert digest(tmp_path / "headless" / family / "model.safetensors", values=False) == golden["sha256"]
    np.testing.assert_allclose(outputs(tun, theta, family), golden["logits"], atol=1e-5, rtol=0)
    assert "features @ weight.T + bias" in (folder / "README.md").read_text()
    assert digest(folder / "adapter_model.safetensors", values=True) == GOLDEN["headless_adapter"][family]["sha256"]
    again = jl.load_adapter(model, folder)
    # GPT-2's three factors come back as one of three times the rank: sums in another order.
    np.testing.assert_allclose(outputs(again, again.theta0, family), outputs(tun, theta, family), atol=5e-6, rtol=0)
    # peft's adapted model without a head, first token: what `cls` reads.
    if family == "roberta":
        params = jl.merge(tun, theta)
        first = base(tmp_path, family, head="cls")
        state = first.features({**first.params, **{k: params[k] for k in ("embeddings", "encoder")}}, inputs(family))
        np.testing.assert_allclose(state, GOLDEN["headless_adapter"][family]["state"], atol=1e-5, rtol=0)
    with pytest.raises(jl.InputError, match="head='mean'; this one's is"):
        jl.load_adapter(base(tmp_path, family), folder)
    other = jl.load_model(tmp_path / "base" / family, 3, head="mean")
    with pytest.raises(jl.InputError, match=r"reads 'mean', of shapes .*: load_model"):
        jl.load_adapter(other, folder)


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    return base(tmp_path_factory.mktemp("bert"), "bert")


QUERY = "base_model.model.bert.encoder.layer.1.attention.self.query.lora_A.weight"
BAD = {
    "dora": ({"use_dora": True}, "use_dora=True is not supported"),
    "ia3": ({"peft_type": "IA3"}, "peft_type='IA3' is not supported"),
    "bias": ({"bias": "all"}, "bias='all' is not supported"),
    "pissa": ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa' changes the pretrained weights"),
    "replication": ({"layer_replication": [[0, 2]]}, r"layer_replication=\[\[0, 2\]\] is not supported"),
    "another version": ({"new_trick": 3}, "new_trick=3 is not supported"),
    "rank": ({"r": 5}, r"lora_A has shape \(2, 16\); configuration and model say \(5, 16\)"),
    "zero rank": ({"r": 0}, "not as the peft library writes it"),
    "no rank": ({"r": None}, "not as the peft library writes it"),
    "regex": ({"target_modules": "("}, "not as the peft library writes it"),
    "fewer": ({"target_modules": ["query"]}, "has factors of .*attention.output.dense.*, other than adapter_config"),
    "more": ({"target_modules": ["query", "dense"]}, "lacks factors of"),
    "NaN": ({"tensors": {QUERY: np.full((2, 16), np.nan, np.float32)}}, "lora_A is not of finite"),
    "shape": ({"tensors": {QUERY: np.ones((3, 16), np.float32)}}, r"has shape \(3, 16\)"),
    "half": ({"tensors": {QUERY.replace("query", "key"): np.ones((2, 16), np.float32)}}, "has only lora_A"),
    "module": ({"tensors": {QUERY.replace("query", "quary"): np.ones((2, 16), np.float32)}}, "is no dense module|only"),
    "key": ({"tensors": {"bert.what": np.ones(2, np.float32)}}, "which is not of a plain LoRA adapter"),
    "head": ({"tensors": {"base_model.model.classifier.weight": np.ones((7, 16), np.float32)}}, "has 7 outputs"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_read_is_named(tmp_path, bert, name):
    options = dict(BAD[name][0])
    changed = options.pop("tensors", {})
    folder = written_by_peft(tmp_path / "adapter", "bert", lambda content: changed, **options)
    with pytest.raises(jl.InputError, match=BAD[name][1]):
        jl.load_adapter(bert, folder)


def test_a_folder_that_is_no_adapter(tmp_path, bert):
    with pytest.raises(jl.InputError, match=r"has no adapter_model.safetensors"):
        jl.load_adapter(bert, tmp_path)
    (tmp_path / "adapter_model.bin").write_bytes(b"")
    with pytest.raises(jl.InputError, match="a pickle, which is never loaded"):
        jl.load_adapter(bert, tmp_path)
    (tmp_path / "adapter_model.safetensors").write_bytes(b"no")
    with pytest.raises(jl.InputError, match=r"adapter_config.json cannot be read"):
        jl.load_adapter(bert, tmp_path)
    plain = jl.Model(bert.params, bert.module)
    with pytest.raises(jl.InputError, match="Hugging Face's names are known for models of load_model"):
        jl.load_adapter(plain, tmp_path)


def test_what_is_tuned_is_chosen(tmp_path, bert):
    folder = written_by_peft(tmp_path / "adapter", "bert")
    tun = jl.load_adapter(bert, folder)
    assert {path.partition("/")[0] for path in tun.blocks} == {"encoder", "classifier", "pooler"}
    frozen = jl.load_adapter(bert, folder, train_head=False, freeze_A=True)
    assert {path.rpartition("/")[2] for path in frozen.blocks if path.startswith("encoder")} == {"lora_B"}
    assert {path.partition("/")[0] for path in frozen.blocks} == {"encoder", "pooler"}
    np.testing.assert_array_equal(outputs(frozen, frozen.theta0, "bert"), outputs(tun, tun.theta0, "bert"))


def test_nothing_half_written_is_left(tmp_path, bert, monkeypatch):
    tun = jl.lora(bert, rank=2)
    for other, message in (
        (jl.ia3(bert), "needs plain LoRA; this Tunable has ia3_in, ia3_out"),
        (jl.full(bert), "this Tunable has no adapter"),
        (jl.lora(bert, rank=2, use_dora=True), "needs plain LoRA"),
        (jl.linearize(tun), "apply is a Linearized"),
        (jl.lora(bert, rank=2, modules_to_save=("query",)), "is tuned whole and has factors too"),
    ):
        with pytest.raises(jl.InputError, match=message):
            jl.save_adapter(other, other.theta0, tmp_path / "out", bert)
    with pytest.raises(jl.InputError, match="must have the structure and shapes"):
        jl.save_adapter(tun, jl.full(bert).theta0, tmp_path / "out", bert)
    with pytest.raises(jl.InputError, match="is not the one that the Tunable was made of"):
        jl.save_adapter(tun, tun.theta0, tmp_path / "out", cases.tiny_model(head="mean"))

    def full_disk(*_, **__):
        raise OSError(28, "No space left on device")

    for module in ("jaxlin.peft.adapter", "jaxlin.models.export"):
        monkeypatch.setattr(f"{module}.save_file", full_disk)
    with pytest.raises(jl.InputError, match=r"cannot be written: .*No space left"):
        jl.save_adapter(tun, tun.theta0, tmp_path / "out", bert)
    with pytest.raises(jl.InputError, match=r"cannot be written: .*No space left"):
        jl.save_model(bert, tmp_path / "out")
    assert not list(tmp_path.iterdir())
    (tmp_path / "mine").write_text("")
    with pytest.raises(jl.InputError, match="is not an empty folder"):
        jl.save_model(bert, tmp_path)


@pytest.mark.parametrize(
    "name", ["bert: masked LM", "roberta: masked LM", "distilbert: masked LM", "gpt2: LM", "llama: LM", "qwen3: LM"]
)
def test_a_language_model_comes_back_as_it_was(tmp_path, name):
    case = (cases.ENCODERS | cases.DECODERS)[name]
    load = jl.load_causal_lm if name in cases.DECODERS else jl.load_masked_lm
    model = load(cases.write_checkpoint(tmp_path / "base", case))
    jl.save_model(model, tmp_path / "out")
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert {key: list(value.shape) for key, value in stored.items()} == case["shapes"]  # those of torch's parameters
    again = load(tmp_path / "out")
    jax.tree.map(np.testing.assert_array_equal, again.params, model.params)
    assert again.config["architectures"] == case["config"]["architectures"]
    tun = jl.lora(model, rank=2)
    jl.save_adapter(tun, tuned_on(tun), tmp_path / "adapter", model)
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["task_type"] == ("CAUSAL_LM" if name in cases.DECODERS else None)
    jax.tree.map(np.testing.assert_allclose, jl.load_adapter(model, tmp_path / "adapter").theta0, written(tun, name))


def written(tun, name):
    """What comes back: GPT-2's query, key and value share an A, of query's and value's together."""
    flat = flatten_dict(tuned_on(tun), sep="/")
    if name != "gpt2: LM":
        return tuned_on(tun)
    out = {}
    for path in sorted({path.rpartition("/")[0].rpartition("/")[0] for path in flat}):
        (a_q, b_q), (a_v, b_v) = ([flat[f"{path}/{part}/lora_{x}"] for x in "AB"] for part in ("query", "value"))
        both, nothing = np.concatenate([a_q, a_v], axis=1), np.zeros_like(b_q)
        for part, b in {"query": [b_q, nothing], "key": [nothing, nothing], "value": [nothing, b_v]}.items():
            out |= {f"{path}/{part}/lora_A": both, f"{path}/{part}/lora_B": np.concatenate(b)}
    return unflatten_dict(out, sep="/")
