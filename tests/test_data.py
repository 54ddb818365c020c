import collections
import re
import sys

import numpy as np
import pytest

import jaxlin as jl
from jaxlin.data.dataset import MAX_BUCKETS, Dataset, choose_buckets
from jaxlin.data.files import load_folder_task, load_tsv_task, read_tsv
from jaxlin.data.stdlib import AREAS, MASK, MAX_ROWS, load_stdlib_task
from jaxlin.data.task import TextSplit, subsample, tokenize
from tests import cases

# --- batches -------------------------------------------------------------------------------------------


def test_batches_are_cut_to_buckets_and_filled():
    columns = cases.text_batch(30, longest=50)
    data = Dataset.from_columns(columns)
    assert len(data.buckets) <= MAX_BUCKETS
    assert data.buckets[-1] == 50
    seen = []
    for indices, batch in data.chunks(7):
        width = batch["input_ids"].shape[1]
        assert width in data.buckets
        assert all(value.shape[0] == 7 for value in batch.values())
        np.testing.assert_array_equal(batch["weight"], np.arange(7) < len(indices))
        assert batch["attention_mask"].any(axis=1).all()  # filler rows are valid input
        for row, i in enumerate(indices):
            np.testing.assert_array_equal(batch["input_ids"][row], columns["input_ids"][i, :width])
            assert not columns["attention_mask"][i, width:].any()
        seen += list(indices)
    assert sorted(seen) == list(range(30))


def test_length_is_up_to_the_last_live_token():
    mask = np.array([[1, 1, 0, 0], [0, 0, 1, 0], [1, 0, 0, 1]])
    data = Dataset.from_columns({"input_ids": mask, "attention_mask": mask})
    assert data.lengths.tolist() == [2, 3, 4]


def test_buckets_waste_little():
    lengths = np.concatenate([np.full(90, 10), np.full(10, 100)])
    assert choose_buckets(lengths, 128) == (16, 104)
    assert choose_buckets(np.array([3]), 5) == (5,)


def test_hash_depends_on_content():
    one, other = cases.text_batch(3), cases.text_batch(3, seed=1)
    assert Dataset.from_columns(one).sha256() == Dataset.from_columns(dict(one)).sha256()
    assert Dataset.from_columns(one).sha256() != Dataset.from_columns(other).sha256()


# --- the embedded task ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stdlib():
    return load_stdlib_task()


def test_embedded_task(stdlib):
    assert stdlib.label_names == tuple(AREAS)
    for split, most in (("train", MAX_ROWS["train"]), ("validation", MAX_ROWS["validation"])):
        counts = collections.Counter(getattr(stdlib, split).labels.tolist())
        assert set(counts) == {0, 1, 2, 3}
        assert all(40 <= count <= most for count in counts.values())
    assert stdlib.provenance["python"] == sys.version.split()[0]
    assert stdlib.sha256() == load_stdlib_task().sha256()


def test_embedded_packages_stand_in_one_class_and_split_only():
    packages = [name for splits in AREAS.values() for split in splits for name in split]
    assert len(packages) == len(set(packages))
    # Shared by Python 3.11 to 3.14: nothing that was removed on the way.
    assert not set(packages) & {"cgi", "telnetlib", "nntplib", "imp", "asyncore", "smtpd", "distutils"}
    assert set(packages) <= sys.stdlib_module_names


def test_embedded_texts_are_disjoint_and_masked(stdlib):
    def words(split):
        return {" ".join(re.findall(r"\w+", text.lower())) for (text,) in split.texts}

    assert not words(stdlib.train) & words(stdlib.validation)
    assert len(words(stdlib.train)) == len(stdlib.train)
    assert any(MASK in text for (text,) in stdlib.train.texts)
    assert sum("asyncio" in text.lower().split() for (text,) in stdlib.train.texts) <= 1


def test_stripped_and_zipped_libraries(tmp_path):
    with pytest.raises(jl.InputError, match="no standard-library sources"):
        load_stdlib_task(tmp_path)
    (tmp_path / "json").mkdir()
    (tmp_path / "json" / "__init__.py").write_text("x = 1\n")
    with pytest.raises(jl.InputError, match="seem to be stripped"):
        load_stdlib_task(tmp_path)


# --- files ----------------------------------------------------------------------------------------------


def write(path, *lines, encoding="utf-8"):
    path.write_bytes(("\n".join(lines) + "\n").encode(encoding))
    return path


def test_quotes_are_characters(tmp_path):
    file = write(tmp_path / "t.tsv", "text\tlabel", '"open\t0', 'a "b" c\t1', "n/a\t1")
    assert read_tsv(file) == {"text": ['"open', 'a "b" c', "n/a"], "label": ["0", "1", "1"]}


def task_of(tmp_path, train, validation):
    files = [write(tmp_path / f"{name}.tsv", *lines) for name, lines in (("train", train), ("validation", validation))]
    return load_tsv_task("t", *files)


def test_classes_scores_and_names(tmp_path):
    ids = task_of(tmp_path, ["sentence\tlabel", "a b\t2", "c\t0"], ["sentence\tlabel", "d\t1"])
    assert ids.num_labels == 3
    assert ids.train.labels.tolist() == [2, 0]
    header = "sentence1\tsentence2\tlabel"
    scores = task_of(tmp_path, [header, "a\tb\t2.5", "c\td\t0"], [header, "e\tf\t1"])
    assert scores.num_labels == 1
    assert scores.train.labels.dtype == float
    assert scores.train.texts[0] == ("a", "b")
    names = task_of(tmp_path, ["text\tlabel", "a\tpos", "c\tneg"], ["text\tlabel", "d\tneg"])
    assert names.label_names == ("neg", "pos")
    assert names.train.labels.tolist() == [1, 0]


def test_training_rows_that_are_in_validation_are_dropped_and_counted(tmp_path):
    task = task_of(tmp_path, ["text\tlabel", "A  b\t0", "c\t1", "d\t0"], ["text\tlabel", "a B\t0"])
    assert task.train.texts == (("c",), ("d",))
    assert task.provenance["train_rows_also_in_validation_dropped"] == 1


HEADER = "text\tlabel"
GOOD = [HEADER, "a\t0", "b\t1"]
BAD_FILES = {
    "missing column": ([["text\ttarget", "a\t0"], GOOD], "no column 'label'; its columns: text, target"),
    "no text": ([["body\tlabel", "a\t0"], GOOD], "no text column known"),
    "one class": ([[HEADER, "c\t1", "d\t1"], GOOD], "have the one label '1'"),
    "label outside": ([GOOD, [HEADER, "c\t2"]], "label '2' is none of the training file's classes: 0, 1"),
    "negative label": ([[HEADER, "a\t-1", "b\t0"], GOOD], "label -1"),
    "large label": ([[HEADER, "a\t0", "b\t5000"], GOOD], "label 5000 but only 2 classes"),
    "nan score": ([[HEADER, "a\tnan", "b\t0.5"], GOOD], "NaN or infinite"),
    "empty label": ([[HEADER, "a\t0", "b\t"], GOOD], "line 3: the label is empty"),
    "commas": ([["text,label", "a,0"], GOOD], "separated by commas"),
    "ragged": ([[HEADER, "a\t0", "b"], GOOD], "line 3: 1 field"),
    "header only": ([[HEADER], GOOD], "holds 1 line"),
    "repeated column": ([["text\ttext\tlabel", "a\tb\t0"], GOOD], "column name twice"),
    "other columns": ([GOOD, ["sentence\tlabel", "a\t0"]], "other text columns"),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_bad_files(tmp_path, case):
    (train, validation), message = BAD_FILES[case]
    with pytest.raises(jl.InputError, match=message):
        task_of(tmp_path, train, validation)


def test_unreadable_files(tmp_path):
    with pytest.raises(jl.InputError, match="No such file"):
        read_tsv(tmp_path / "none.tsv")
    with pytest.raises(jl.InputError, match="is a folder"):
        read_tsv(tmp_path)
    with pytest.raises(jl.InputError, match="not UTF-8"):
        read_tsv(write(tmp_path / "latin.tsv", HEADER, "caf\u00e9\t0", encoding="latin-1"))
    (tmp_path / "empty.tsv").touch()
    with pytest.raises(jl.InputError, match=r"holds 0 line"):
        read_tsv(tmp_path / "empty.tsv")
    with pytest.raises(jl.InputError, match="nor any other task"):
        load_folder_task(tmp_path, "sst2")


ROWS = {"cola": (8551 - 16, 1043), "mnli": (8999, 1000), "mrpc": (3668, 408), "qnli": (8999, 2000)}
ROWS |= {"sst2": (67349, 872), "uci_imdb": (799, 200), "imdb": (3998, 2000), "wnli": (635, 71)}


@pytest.mark.parametrize("name", ROWS)
def test_shared_data_keeps_every_row(data_folder, name):
    task = load_folder_task(data_folder, name)
    assert (len(task.train), len(task.validation)) == ROWS[name]
    assert task.num_labels == (3 if name == "mnli" else 2)


# --- subsets and tokens ---------------------------------------------------------------------------------


def test_subsets_are_stratified_and_seeded():
    split = TextSplit(tuple((str(i),) for i in range(100)), np.repeat([0, 1], [80, 20]))
    first, again, other = (subsample(split, 20, seed) for seed in (0, 0, 1))
    assert first.texts == again.texts != other.texts
    assert first.labels.sum() == 4
    assert subsample(split, None, 0) is split
    assert len(subsample(split, 99, 0)) == 99
    with pytest.raises(jl.InputError, match="at least 2"):
        subsample(split, 1, 0)


def test_tokens_and_truncation(model):
    split = TextSplit((("is it good", "the film"), ("a b c d e f g h i j k l", "m")), np.array([0, 1]))
    data, truncated = tokenize(split, model.tokenizer, 10)
    assert truncated == 1
    assert data["input_ids"].shape == (2, 10)
    ids = model.tokenizer("is it good", "the film")["input_ids"]
    assert data["input_ids"][0, : len(ids)].tolist() == ids
    assert set(np.unique(data["token_type_ids"])) == {0, 1}
    assert data.lengths.tolist() == [len(ids), 10]
    with pytest.raises(jl.InputError, match="leaves no room"):
        tokenize(split, model.tokenizer, 4)
