"""Bad input through the real command line: one sentence, exit code 2, nothing half-written."""

import os

import numpy as np
import pytest

from tests import cases

WORDS = "bert.embeddings.word_embeddings.weight"


def training(files, text):
    files["train"].write_bytes(text if isinstance(text, bytes) else text.encode())


def task(folder, name, text):
    """A task of a folder, in place of files."""
    (folder / "tasks" / name).mkdir(parents=True)
    for split in ("train", "validation"):
        (folder / "tasks" / name / f"{split}.tsv").write_text(text)
    return {"train_file": False, "validation_file": False, "task_name": name, "data_dir": folder / "tasks"}


def model(folder, tensors=None, config=None):
    return {"model_name_or_path": cases.edited_checkpoint(folder, tensors, config)}


def truncated(folder, keep=-100):
    changed = model(folder)
    file = changed["model_name_or_path"] / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    return changed


def without(folder, *names):
    changed = model(folder)
    for name in names:
        (changed["model_name_or_path"] / name).unlink()
    return changed


def a_pickle(folder):
    changed = without(folder, "model.safetensors")
    (changed["model_name_or_path"] / "pytorch_model.bin").touch()
    return changed


def poisoned(tensors):
    tensors[WORDS][5, 5] = np.nan


def whole_numbers(tensors):
    tensors[WORDS] = np.ones_like(tensors[WORDS], np.int32)


def extra_tensor(tensors):
    tensors["bert.encoder.extra"] = np.ones(2)


def fewer_words(tensors):
    tensors[WORDS] = tensors[WORDS][:20].copy()


def loop(folder):
    """A file that cannot be opened, whoever asks: a link to itself."""
    os.symlink(folder / "loop.tsv", folder / "loop.tsv")
    return {"train_file": folder / "loop.tsv"}


def config_file(folder, text):
    (folder / "options.yaml").write_text(text)
    return {"config": folder / "options.yaml"}


def scores(files, **options):
    training(files, f"{ROWS}a\t0.5\nb\t0.1\n")
    files["validation"].write_text(f"{ROWS}c\t0.2\n")
    return options


def other_classes(files):
    training(files, "sentence\tlabel\na b\t0\nc d\t1\n")
    files["validation"].write_text("sentence\tlabel\nx y\t2\n")


NO_FILES = {"train_file": False, "validation_file": False}
ROWS = "sentence\tlabel\n"

BAD = {
    # the model
    "unknown model": (lambda t, f: {"model_name_or_path": t / "none"}, "there is no folder"),
    "not a hub id": (lambda t, f: {"model_name_or_path": "no such model!"}, "neither a folder nor a valid hub id"),
    "model is a file": (lambda t, f: {"model_name_or_path": f["train"]}, "is a file; expected a Hugging Face model"),
    "folder without config": (lambda t, f: {"model_name_or_path": t}, "without config.json"),
    "revision of a folder": (lambda t, f: {"model_revision": "v2"}, "is for models of the hub"),
    "truncated weights": (lambda t, f: truncated(t), "cannot be read as safetensors"),
    "corrupt weights": (lambda t, f: truncated(t, 7), "cannot be read as safetensors"),
    "no weights": (lambda t, f: without(t, "model.safetensors"), "has no model.safetensors"),
    "a pickle": (lambda t, f: a_pickle(t), "transformers.BertForSequenceClassification.from_pretrained("),
    "NaN in weights": (lambda t, f: model(t, poisoned), "holds NaN or infinity"),
    "integer weights": (lambda t, f: model(t, whole_numbers), "has dtype int32; expected floating point"),
    "a tensor missing": (lambda t, f: model(t, lambda x: x.pop(WORDS)), "lacks 1 tensor(s)"),
    "a tensor too many": (lambda t, f: model(t, extra_tensor), "unexpected tensor 'bert.encoder.extra'"),
    "another architecture": (lambda t, f: model(t, config={"model_type": "t5"}), "model_type 't5'; supported"),
    "configuration of another size": (lambda t, f: model(t, config={"hidden_size": 64}), "the configuration says"),
    "configuration that is no JSON": (
        lambda t, f: [changed := model(t), (changed["model_name_or_path"] / "config.json").write_text("{")][0],
        "is not a JSON model configuration",
    ),
    "no tokenizer": (lambda t, f: without(t, "tokenizer.json", "tokenizer_config.json"), "no usable tokenizer"),
    "a damaged tokenizer": (
        lambda t, f: [changed := model(t), (changed["model_name_or_path"] / "tokenizer.json").write_text("{}")][0],
        "no usable tokenizer",
    ),
    "vocabulary smaller than ids": (lambda t, f: model(t, fewer_words, {"vocab_size": 20}), "outside the vocabulary"),
    "wrong number of labels": (lambda t, f: {"head": "pooler"}, "head has 3 outputs, the task 2"),
    # the data
    "empty file": (lambda t, f: training(f, ""), "is empty (0 bytes)"),
    "header only": (lambda t, f: training(f, ROWS), "train.tsv"),
    "one class": (lambda t, f: training(f, f"{ROWS}a b\t1\nc d\t1\n"), "the one label '1'"),
    "label outside": (lambda t, f: other_classes(f), "label '2' is none of the task's classes: 0, 1"),
    "empty label": (lambda t, f: training(f, f"{ROWS}a b\t1\nc d\t\n"), "line 3"),
    "missing column": (lambda t, f: training(f, "sentence\ttarget\na b\t1\n"), "no column 'label'"),
    "duplicate columns": (lambda t, f: training(f, "sentence\tlabel\tlabel\na\t1\t1\n"), "twice"),
    "ragged row": (lambda t, f: training(f, f"{ROWS}a b\t1\nc d\t1\t7\n"), "line 3"),
    "wrong delimiter": (lambda t, f: training(f, "sentence,label\na b,1\n"), "comma"),
    "missing file": (lambda t, f: {"train_file": t / "none.tsv"}, "cannot be read"),
    "folder as a file": (lambda t, f: {"train_file": t}, "is a folder; expected"),
    "unreadable file": (lambda t, f: loop(t), "cannot be read"),
    "binary file": (lambda t, f: training(f, b"\x89PNG\r\n\x1a\n\x00"), "NUL byte in line 3: it is binary"),
    "NUL byte": (lambda t, f: training(f, f"{ROWS}a\0b\t1\n"), "NUL byte"),
    "mixed encodings": (lambda t, f: training(f, f"{ROWS}é\t1\n".encode() + "é\t0\n".encode("latin-1")), "not UTF-8"),
    "a line of 10 MB": (lambda t, f: training(f, f"{ROWS}{'long ' * 2_000_000}\t1\n"), "characters"),
    "unknown suffix": (lambda t, f: {"train_file": cases.TINY_BERT / "model.safetensors"}, "has the suffix"),
    "constant scores": (lambda t, f: training(f, f"{ROWS}a b\t0.5\nc d\t0.5\n"), "training scores are 0.5"),
    "scores in a classification task": (lambda t, f: task(t, "sst2", f"{ROWS}a\t0.5\nb\t0.1\n"), "0.5"),
    "scores under cross-entropy": (lambda t, f: scores(f, loss="cross_entropy"), "need one output and loss='squared'"),
    "one of two files": (lambda t, f: {"validation_file": False}, "belong together"),
    "two sources": (lambda t, f: {"task_name": "sst2"}, "--train_file and --task_name are both given; give one of"),
    "three sources": (lambda t, f: {"dataset_name": "a/b"}, "--train_file and --dataset_name are both given"),
    "folder and file": (lambda t, f: {"data_dir": t}, "--data_dir is given beside --train_file; it is for a"),
    "configuration of nothing": (lambda t, f: {"dataset_config_name": "x"}, "--dataset_config_name is given without"),
    "revision of a file": (
        lambda t, f: {"dataset_revision": "v2"},
        "--dataset_revision is given, but the data are not",
    ),
    "revision of a folder's task": (
        lambda t, f: {**task(t, "sst2", ""), "dataset_revision": "v2"},
        "--dataset_revision is given, but the data are not",
    ),
    "split of a file": (lambda t, f: {"train_split_name": "x"}, "--train_split_name is given without --dataset_name"),
    "columns of the embedded task": (
        lambda t, f: {**NO_FILES, "label_column_name": "y"},
        "the embedded task has no columns to choose",
    ),
    "unknown task": (lambda t, f: {**NO_FILES, "task_name": "SST-2"}, "--task_name SST-2 is no task (near: sst2"),
    "task not in the folder": (
        lambda t, f: {**NO_FILES, "task_name": "sst2", "data_dir": t},
        "sst2 has no file train",
    ),
    "column that is not there": (lambda t, f: {"text_column_names": ["body"]}, "has no column 'body'"),
    "length": (lambda t, f: {"max_seq_length": 2}, "leaves no room"),
    "samples": (lambda t, f: {"max_train_samples": 1}, "at least 2"),
    # what is tuned
    "rank 0": (lambda t, f: {"lora_rank": 0}, "LoRA rank 0: expected 1 to 32"),
    "rank too large": (lambda t, f: {"lora_rank": 33}, "LoRA rank 33: expected 1 to 32"),
    "no target": (lambda t, f: {"lora_targets": ["valeu"]}, "near: "),
    "no layer": (lambda t, f: {"lora_layers": [7]}, "expected some of 0 to 1"),
    "rank pattern": (lambda t, f: {"lora_rank_pattern": ["query:4"]}, "expected regex=number"),
    "pattern of nothing": (lambda t, f: {"lora_alpha_pattern": ["up=4"]}, "'up' matches none of the adapted modules"),
    "module to save": (lambda t, f: {"modules_to_save": ["lost"]}, "modules_to_save: 'lost' matches no module"),
    "zero frozen head": (lambda t, f: {"head_init": "zero", "no-train_head": True}, "the head is zero and frozen"),
    "option of another method": (lambda t, f: {"peft": "full", "use_dora": True}, "--lora_rank needs --peft lora"),
    "scaled modules of LoRA": (lambda t, f: {"ia3_targets": ["query"]}, "--ia3_targets needs --peft ia3; it is lora"),
    "selection without a pattern": (lambda t, f: {"peft": "select", "lora_rank": False}, "belong together"),
    "selection of nothing": (
        lambda t, f: {"peft": "select", "lora_rank": False, "select": "layer_9"},
        "matches no parameter; near",
    ),
    "frozen head of a full model": (
        lambda t, f: {"peft": "full", "lora_rank": False, "no-train_head": True},
        "--no-train_head contradicts --peft full",
    ),
    "frozen A twice": (lambda t, f: {"freeze_A": True, "with_frozen_A": True}, "--with_frozen_A needs --peft lora"),
    # the comparison and its training
    "negative lam": (lambda t, f: {"lams": ["-1"]}, "each at least 0"),
    "lam no number": (lambda t, f: {"lams": ["much"]}, "expected numbers, or auto"),
    "two grids": (lambda t, f: {"lams": ["1"], "lam_rel": [1]}, "give one of them"),
    "spd in units": (lambda t, f: {"pull": "spd", "lam_rel": [1]}, "give lams, not lam_rel"),
    "factor of nothing": (lambda t, f: {"lam_blocks": ["lora_C=2"]}, "'lora_C' is found in no tuned parameter"),
    "factor no number": (lambda t, f: {"learning_rate_blocks": ["lora_B=x"]}, "expected regex=number"),
    "rate of B twice": (
        lambda t, f: {"learning_rate_blocks": ["lora_B=2"], "loraplus_lr_ratio": 4},
        "are both given; give one",
    ),
    "late after the end": (lambda t, f: {"linearize_at": "0,9"}, "linearize_at=9 is no step of this run"),
    "late at no step": (lambda t, f: {"linearize_at": "soon"}, "expected steps, such as 0,10,50"),
    "kernel examples": (lambda t, f: {"kernel_examples": 0}, "kernel_examples=0"),
    "optimizer": (lambda t, f: {"optimizer": "adamw"}, "is AdamW towards theta0"),
    "unknown optimizer": (lambda t, f: {"optimizer": "adan"}, "optimizer 'adan' is unknown; expected one of"),
    "schedule": (lambda t, f: {"warmup_ratio": 1.5}, "warmup_ratio=1.5; expected at least 0 and below 1"),
    "steps": (lambda t, f: {"max_steps": -3}, "max_steps=-3"),
    "epochs": (lambda t, f: {"num_train_epochs": 0}, "num_train_epochs=0"),
    "learning rate": (lambda t, f: {"learning_rate": "nan"}, "learning_rate=nan"),
    "batch": (lambda t, f: {"per_device_train_batch_size": 0}, "batch_size=0"),
    "seed": (lambda t, f: {"seed": -1}, "seed=-1"),
    # where results go, and the file of options
    "output is a file": (lambda t, f: {"output_dir": f["train"]}, "is a file; expected a folder"),
    "output below a file": (lambda t, f: {"output_dir": f["train"] / "out"}, "--output_dir"),
    "unwritable output": (lambda t, f: {"output_dir": "/proc/jaxlin/out"}, "--output_dir /proc/jaxlin/out cannot be"),
    "no such options": (lambda t, f: {"config": t / "none.yaml"}, "cannot be read"),
    "two files of options": (
        lambda t, f: {"config": ["a.yaml", "--config", "b.yaml"]},
        "given 2 times (a.yaml, b.yaml)",
    ),
    "options that are no YAML": (lambda t, f: config_file(t, "a: [1"), "is not YAML"),
    "options that are no mapping": (lambda t, f: config_file(t, "- 1"), "expected lines `option: value`"),
    "unknown option in the file": (lambda t, f: config_file(t, "sed: 3"), "'sed' is no option; did you mean seed?"),
    "a file in the file": (lambda t, f: config_file(t, "config: b.yaml"), "'config' is no option"),
    "words that are no words": (lambda t, f: config_file(t, "label_words: [yes, no]"), "put words in quotes"),
    "nested options": (lambda t, f: config_file(t, "seed: {a: 1}"), "seed is nested"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_sentence(run, arguments, files, tmp_path, monkeypatch, case):
    change, message = BAD[case]
    monkeypatch.delenv("JAXLIN_DATA", raising=False)
    changed = {**arguments, **(change(tmp_path, files) or {})}
    before = sorted(tmp_path.rglob("*"))
    code, out, err = run(*cases.flags(changed))
    assert code == 2
    assert err.startswith("jaxlin: ")
    assert err.count("\n") == 1
    assert message in err
    assert not out
    assert sorted(tmp_path.rglob("*")) == before


MISSPELT = {
    "option": (["--learning_rte", "1"], "learning"),
    "choice": (["--pull", "copled"], "coupled"),
    "number": (["--lora_rank", "eight"], "eight"),
    "command": (None, "compare"),
}


@pytest.mark.parametrize("case", MISSPELT)
def test_misspelt_options_say_what_there_is(run, case):
    words, message = MISSPELT[case]
    code, out, err = run("comprae") if words is None else run("compare", *words)
    assert code == 2
    assert message in out + err
    assert "Traceback" not in out + err
