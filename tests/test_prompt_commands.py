"""Prompts, and decoders with a head, through every command: what is written, what is said, what is refused."""

import csv
import json

import pytest
import yaml

import jaxlin as jl
from tests import cases

TEMPLATE, WORDS = "{text} it is {mask}", ["bad", "good"]
MODELS = {
    "gpt2": (cases.DECODERS["gpt2: LM"], jl.load_causal_lm),
    "bert": (cases.ENCODERS["bert: masked LM"], jl.load_masked_lm),
}
SIZES = {
    "compare": {"max_steps": 3, "per_device_train_batch_size": 8, "lam_rel": [0.1]},
    "ntk": {"num_samples": 24},
    "select": {"num_samples": 8, "draws": 1, "lora_targets": ["query", "value"], "lipschitz_directions": 0},
    "bounds": {"num_samples": 20, "steps": 2, "selective_steps": 1, "directions": 1, "lam_rel": ["1"]},
}


@pytest.fixture
def options(setting_arguments, tmp_path):
    folder = cases.write_language_model(tmp_path / "lm", MODELS["gpt2"][0])
    prompt = {"model_name_or_path": folder, "head": False, "template": TEMPLATE, "label_words": WORDS}
    return {**setting_arguments, **prompt}


def words(command, options):
    return cases.flags({**options, **SIZES[command]}, command)


@pytest.mark.slow
@pytest.mark.parametrize("command", SIZES)
def test_a_decoder_with_a_new_head(run, options, tmp_path, command):
    folder = cases.write_language_model(tmp_path / "qwen2", cases.DECODERS["qwen2: LM"])
    headed = {"model_name_or_path": folder, "template": False, "label_words": False}
    code, out, err = run(*words(command, {**options, **headed}))
    assert code == 0, err
    assert "qwen2 with head 'last'" in err
    assert "the checkpoint has no head of this kind: a new one starts as probe" in err
    assert ("linear probe" in out) == (command == "compare")
    assert "FAILS" not in out


def pairs(files):
    for file in files.values():
        rows = [f"a {file.stem} film {i}\tgood\t{i % 2}" for i in range(8)]
        file.write_text("\n".join(["sentence1\tsentence2\tlabel", *rows]) + "\n")


@pytest.mark.slow
def test_compare_has_no_probe(run, options, tmp_path):
    code, out, err = run(*words("compare", options))
    assert code == 0, err
    assert "prompt '{text} it is {mask}', answered by 'bad' (0), 'good' (1)" in err
    assert "with head 'prompt'" in err
    assert "linear probe" not in out + err
    with (tmp_path / "out" / "table.csv").open() as stream:
        arms = {row["arm"] for row in csv.DictReader(stream)}
    assert arms == {"full", "linearized", "kernel_regression", "majority_class", "start"}
    saved = yaml.safe_load((tmp_path / "out" / "config.yaml").read_text())
    assert (saved["template"], saved["label_words"]) == (TEMPLATE, WORDS)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["bert", "gpt2"])
def test_the_kernel_is_that_of_the_prompts(run, options, files, tmp_path, kind):
    case, load = MODELS[kind]
    folder = cases.write_language_model(tmp_path / kind, case)
    code, _, err = run(*words("ntk", {**options, "model_name_or_path": folder}))
    assert code == 0, err
    texts = [line.split("\t")[0] for line in files["train"].read_text().splitlines()[1:]]
    model = jl.prompt_classifier(load(folder), TEMPLATE, WORDS)
    jac, _ = cases.reference_jacobian(jl.lora(model, rank=2), jl.prompt_batch(model, texts))
    assert cases.relative_error(jl.load_kernel(tmp_path / "out" / "kernel.zarr").matrix(), jac @ jac.T) < 1e-4


@pytest.mark.slow
def test_layers_are_chosen(run, options, tmp_path):
    folder = cases.write_language_model(tmp_path / "bert", MODELS["bert"][0])
    code, _, err = run(*words("select", {**options, "model_name_or_path": folder}))
    assert code == 0, err
    found = json.loads((tmp_path / "out" / "all_results.json").read_text())
    assert len(found["table"]) == 9  # 3 sets of layers × 3 of modules
    assert found["summary"]["examples"] == 8
    adapter = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (adapter["task_type"], adapter["modules_to_save"]) == (None, None)
    page = (tmp_path / "out" / "report.html").read_text()
    assert "probe head" not in page
    assert "--label_words bad good" in page


@pytest.mark.slow
def test_bounds_hold_of_prompts(run, options, tmp_path):
    code, out, err = run(*words("bounds", options))
    assert code == 0, err
    assert "FAILS" not in out
    assert "prompt" in (tmp_path / "out" / "run.log").read_text()


@pytest.mark.slow
def test_compare_with_the_real_tiny_llama(run, options, models_folder):
    prompt = {"model_name_or_path": models_folder / "stories260K", "template": "{text} One day, {mask}"}
    code, _, err = run(*words("compare", {**options, **prompt, "label_words": ["Lily", "Tim"], "lora_layers": 4}))
    assert code == 0, err
    assert "stories260K with head 'prompt'" in err


@pytest.mark.slow
def test_pairs_of_texts(run, options, files, tmp_path):
    pairs(files)
    pair = {**options, "template": "{text_b} means {text_a}: {mask}", "num_samples": 8}
    code, _, err = run(*cases.flags(pair, "ntk"))
    assert code == 0, err
    record = json.loads((tmp_path / "out" / "config.json").read_text())
    assert record["task"]["text_columns"] == ["sentence1", "sentence2"]
    code, _, err = run(*cases.flags({**options, "overwrite_output_dir": True}, "ntk"))
    assert code == 2
    assert "has {text}, and an example has 2 text(s); expected {text} for one text, {text_a} and {text_b}" in err


BAD = {
    "template alone": ({"label_words": False}, "--template is given without --label_words"),
    "words alone": ({"template": False}, "--label_words is given without --template"),
    "head start": ({"head_init": "zero"}, "--head_init is given beside --template; there is no head then"),
    "new head": ({"new_head": True}, "--new_head is given beside --template"),
    "head": ({"head": "last"}, "--head is given beside --template"),
    "number": ({"label_words": ["bad", "good", "film"]}, "expected 2, one for each class in this order: 0, 1"),
    "word": ({"label_words": ["bad", "terrible"]}, "label word ' terrible' is 8 token(s)"),
    "no such text": ({"template": "{sentence} is {mask}"}, "has {sentence}; expected {text}, or {text_a} and"),
    "half a pair": ({"template": "{text_a} is {mask}"}, "has {text_b} 0 times; expected once"),
    "pair": ({"template": "{text_a} {text_b} {mask}"}, "an example has 1 text(s)"),
    "no blank": ({"template": "{text} is"}, "has {mask} 0 times; expected once"),
    "not read": ({"template": "{mask}: {text}"}, "a causal LM reads only what stands before {mask}; expected {text}"),
    "no language model": ({"model_name_or_path": cases.TINY_BERT}, "lacks"),
    "tuning a head": ({"peft": "head", "lora_rank": 8}, "has no head 'classifier'"),
    "too short": ({"max_seq_length": 2}, "max_seq_length=2 leaves no room for text beside 3 tokens of the template"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_prompts_write_nothing(run, options, tmp_path, case):
    change, message = BAD[case]
    code, _, err = run(*words("compare", {**options, **change}))
    assert code == 2
    assert message in " ".join(err.split())
    assert not (tmp_path / "out").exists()


def test_scores_have_no_label_words(run, options, files):
    for file in files.values():
        rows = [f"a {file.stem} film {i}\t{i / 3:.2f}" for i in range(8)]
        file.write_text("\n".join(["sentence\tlabel", *rows]) + "\n")
    code, _, err = run(*words("compare", options))
    assert code == 2
    assert "--template is for classes; task train has scores" in err
