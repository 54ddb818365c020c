import collections
import csv
import json
import re
import sys

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import jaxlin as jl
from jaxlin.data.columns import Columns
from jaxlin.data.dataset import Dataset, choose_buckets
from jaxlin.data.files import load_file_task, load_folder_task, tasks_in
from jaxlin.data.known import KNOWN_TASKS
from jaxlin.data.labels import label_order, scale_of, standardise
from jaxlin.data.readers import READERS, read_table
from jaxlin.data.stdlib import AREAS, MASK, MAX_ROWS, load_stdlib_task
from jaxlin.data.task import TextSplit, subsample, tokenize
from tests import cases

# --- batches -------------------------------------------------------------------------------------------


def test_batches_are_cut_to_buckets_and_filled():
    columns = cases.text_batch(30, longest=50)
    data = Dataset.from_columns(columns)
    assert len(data.buckets) <= 4
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


ROWS = [{"text": 'a "b", c', "label": "1"}, {"text": '"open', "label": "0"}, {"text": "n/a", "label": "1"}]


def write_rows(path, rows):
    """Writes rows in the format of the file's suffix, by the formats' own libraries."""
    names = list(rows[0])
    if path.suffix == ".tsv":
        return write(path, "\t".join(names), *("\t".join(map(str, row.values())) for row in rows))
    if path.suffix == ".csv":
        with path.open("w", newline="") as stream:
            writer = csv.DictWriter(stream, names)
            writer.writeheader()
            writer.writerows(rows)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        pq.write_table(pa.Table.from_pylist(rows), path)
    return path


@pytest.mark.parametrize("suffix", READERS)
def test_every_format_gives_the_same(tmp_path, suffix):
    table = read_table(write_rows(tmp_path / f"t{suffix}", ROWS))
    assert dict(table.columns) == {name: [row[name] for row in ROWS] for name in ROWS[0]}
    assert len(table.rows) == 3


def test_csv_fields_hold_line_breaks_and_lines_are_counted(tmp_path):
    file = write(tmp_path / "t.csv", "text,label", '"two', 'lines, ""quoted""",0', "b,")
    table = read_table(file)
    assert table.columns["text"] == ['two\nlines, "quoted"', "b"]
    assert table.rows == [2, 4]


def test_json_takes_a_data_object_and_numbers_stay_numbers(tmp_path):
    (tmp_path / "t.json").write_text('{"data": [{"text": "a", "label": 0.5}, {"text": "b", "label": null}]}')
    assert read_table(tmp_path / "t.json").columns == {"text": ["a", "b"], "label": [0.5, None]}


def test_parquet_of_the_hub_declares_its_classes(tmp_path):
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["no", "yes"])})
    rows = {"text": ["a", "b"], "label": [1, 0]}
    for split in ("train", "validation"):
        datasets.Dataset.from_dict(rows, features).to_parquet(tmp_path / f"{split}.parquet")
        rows = {"text": ["c"], "label": [1]}
    task = load_file_task("t", tmp_path / "train.parquet", tmp_path / "validation.parquet")
    assert task.label_names == ("no", "yes")
    assert (task.train.labels.tolist(), task.validation.labels.tolist()) == ([1, 0], [1])


def task_of(tmp_path, train, validation, columns=None, known=None):
    files = [write(tmp_path / f"{name}.tsv", *lines) for name, lines in (("train", train), ("validation", validation))]
    return load_file_task("t", *files, columns, known)


def task_of_labels(tmp_path, train, validation, known=None):
    """A task of JSON lines, whose labels keep their types."""
    for name, labels in (("train", train), ("validation", validation)):
        write_rows(tmp_path / f"{name}.jsonl", [{"text": f"{name} {i}", "label": x} for i, x in enumerate(labels)])
    return load_file_task("t", tmp_path / "train.jsonl", tmp_path / "validation.jsonl", None, known)


LABELS = {
    "ids": ([2, 0, 1], [1], ("0", "1", "2"), [2, 0, 1]),
    "stars": ([5, 1, 2, 4, 3], [1], ("1", "2", "3", "4", "5"), [4, 0, 1, 3, 2]),
    "signs": ([-1, 1], [1], ("-1", "1"), [0, 1]),
    "numbers written": (["10", "9", "+9"], ["9"], ("9", "10"), [1, 0, 0]),
    "truth": ([True, False], [True], ("0", "1"), [1, 0]),
    "names": (["pos", "neg"], [" pos"], ("neg", "pos"), [1, 0]),
    "scores": ([2.5, 0.0], [1.0], (), [2.5, 0.0]),
    "scores written": (["2.5", "-1e-1"], ["3"], (), [2.5, -0.1]),
}


@pytest.mark.parametrize("case", LABELS)
def test_label_rules(tmp_path, case):
    train, validation, names, expected = LABELS[case]
    task = task_of_labels(tmp_path, train, validation)
    assert task.label_names == names
    assert task.train.labels.tolist() == expected
    assert task.train.labels.dtype.kind == ("i" if names else "f")
    assert task.num_labels == max(len(names), 1)
    assert task.metrics == (("accuracy",) if names else ("pearson", "spearman"))


def test_a_known_task_takes_its_ids_or_its_names(tmp_path):
    rte = KNOWN_TASKS["rte"]
    for labels in ([0, 1], ["0", "1"], ["entailment", "Not_Entailment"]):
        task = task_of_labels(tmp_path, labels, labels[:1], rte)
        assert task.label_names == ("entailment", "not_entailment")
        assert task.train.labels.tolist() == [0, 1]
    assert task_of_labels(tmp_path, [1, 5], [2], KNOWN_TASKS["stsb"]).train.labels.tolist() == [1.0, 5.0]
    with pytest.raises(jl.InputError, match=r"holds scores such as 0\.5, but this task has the classes 0 entailment"):
        task_of_labels(tmp_path, [0.5, 1.0], [1.0], rte)
    with pytest.raises(jl.InputError, match="row without label: is this a test split"):
        task_of_labels(tmp_path, [0, 1], [-1], rte)
    with pytest.raises(jl.InputError, match="labels of this task are scores; column 'label' holds 'good'"):
        task_of_labels(tmp_path, ["good", "bad"], ["bad"], KNOWN_TASKS["stsb"])


COLUMNS = {
    "known names first": (["idx\tquestion\tsentence\tlabel", "1\ta\tb\t0", "2\tc\td\t1"], None, ("a", "b")),
    "words": (["id\ttitle\tcontent\tn\tlabel", "x\ta\tb\t7\t0", "y\tc\td\t8\t1"], None, ("a", "b")),
    "given": (["text\tother\ty", "a\tb\t0", "c\td\t1"], Columns(("other",), "y"), ("b",)),
    "given pair": (["text\tother\tlabel", "a\tb\t0", "c\td\t1"], Columns(("other", "text")), ("b", "a")),
}


@pytest.mark.parametrize("case", COLUMNS)
def test_column_rules(tmp_path, case):
    lines, columns, expected = COLUMNS[case]
    validation = [lines[0], lines[1].replace("a", "e").replace("b", "f")]
    assert task_of(tmp_path, lines, validation, columns).train.texts[0] == expected


def test_training_rows_that_are_in_validation_are_dropped_and_counted(tmp_path):
    task = task_of(tmp_path, ["text\tlabel", "A  b\t0", "c\t1", "d\t0"], ["text\tlabel", "a B\t0"])
    assert task.train.texts == (("c",), ("d",))
    assert task.provenance["train_rows_also_in_validation_dropped"] == 1


HEADER = "text\tlabel"
GOOD = [HEADER, "a\t0", "b\t1"]
BAD_TASKS = {
    "missing column": ([["text\ttarget", "a\t0"], GOOD], "no column 'label'; its columns: text, target; name another"),
    "no text": ([["n\tlabel", "1\t0"], GOOD], "no text column known; its columns: n, label; name one or two by"),
    "three texts": ([["a\tb\tc\tlabel", "x\tx\tx\t0"], GOOD], "its columns: a, b, c, label"),
    "one class": ([[HEADER, "c\t1", "d\t1"], GOOD], "have the one label '1'"),
    "label outside": (
        [GOOD, [HEADER, "c\t2"]],
        "validation.tsv, line 2: label '2' is none of the task's classes: 0, 1",
    ),
    "score among ids": ([GOOD, [HEADER, "c\t0.5"]], "label '0.5' is none"),
    "nan score": ([[HEADER, "a\tnan", "b\t0.5"], GOOD], "line 2: the score is 'nan'"),
    "word among scores": ([[HEADER, "a\t1.5", "b\t0.5"], [HEADER, "c\tx"]], "line 2: the score is 'x'"),
    "empty label": ([[HEADER, "a\t0", "b\t"], GOOD], "line 3: the label is empty"),
    "text as label": ([[HEADER, *(f"a{i}\tb{i}" for i in range(1001))], GOOD], "1001 different labels, such as 'b0'"),
    "other columns": ([GOOD, ["sentence\tlabel", "a\t0"]], "validation.tsv has no column 'text'"),
}


@pytest.mark.parametrize("case", BAD_TASKS)
def test_bad_tasks(tmp_path, case):
    (train, validation), message = BAD_TASKS[case]
    with pytest.raises(jl.InputError, match=message):
        task_of(tmp_path, train, validation)


def test_bad_columns_and_missing_values(tmp_path):
    for names in (("a", "b", "c"), ("text", "text"), ("label",)):
        with pytest.raises(jl.InputError, match="expected one or two columns, each once and not the label"):
            task_of(tmp_path, GOOD, GOOD, Columns(names))
    with pytest.raises(jl.InputError, match="no column 'body'"):
        task_of(tmp_path, GOOD, GOOD, Columns(("body",)))
    good = write_rows(tmp_path / "good.jsonl", [{"text": "a", "label": 0}, {"text": "b", "label": 1}])
    for row, message in (
        ({"text": None, "label": 1}, r"bad.jsonl, line 2: column 'text' holds no value; expected text"),
        ({"text": 5, "label": 1}, r"line 2: column 'text' holds '5' \(int\); expected text"),
        ({"text": "b \ud800", "label": 1}, "line 2: column 'text' holds half a character"),
        ({"text": "b", "label": None}, "line 2: the label is empty"),
        ({"text": "b", "label": [1]}, "line 2: the label is a list"),
    ):
        bad = write_rows(tmp_path / "bad.jsonl", [{"text": "a", "label": 0}, row])
        with pytest.raises(jl.InputError, match=message):
            load_file_task("t", bad, good)


LONG = "x" * 10_000_000
BAD_FILES = {
    "empty.tsv": (b"", r"is empty \(0 bytes\)"),
    "blank.tsv": (b"\n\n", "holds no line of text"),
    "latin.tsv": ("text\tlabel\ncaf\u00e9\t0".encode("latin-1"), "not UTF-8 text in line 2"),
    "mixed.csv": ("text,label\ncaf\u00e9,0\n".encode() + b"caf\xe9,1\n", "not UTF-8 text in line 3"),
    "utf16.csv": ("text,label\na,0".encode("utf-16"), "is UTF-16"),
    "nul.tsv": (b"text\tlabel\na\0\t0\n", "NUL byte in line 2"),
    "binary.jsonl": (bytes(range(256)), "NUL byte in line 1"),
    "long.tsv": (f"text\tlabel\n{LONG}\t0\n".encode(), "line 2 has 10,000,002 characters, more than 1,000,000"),
    "long.csv": (f"text,label\n{LONG},0\n".encode(), r"line 2: field larger than field limit \(1000000\)"),
    "long.json": (json.dumps([{"text": LONG, "label": 0}]).encode(), "row 1: column 'text' has 10,000,000 characters"),
    "commas.tsv": (b"text,label\na,0\n", r"is it separated by commas \(named .csv\)"),
    "tabs.csv": (b"text\tlabel\na\t0\n", r"is it separated by tabs \(named .tsv\)"),
    "semicolons.csv": (b"text;label\na;0\n", "is it separated by semicolons"),
    "twice.tsv": (b"text\ttext\tlabel\na\tb\t0\n", "a column name twice, 'text'"),
    "twice.json": (b'[{"text": "a", "text": "b"}]', "a key twice among text, text"),
    "ragged.tsv": (b"text\tlabel\na\t0\nb\n", "line 3: 1 field"),
    "ragged.csv": (b"text,label\na,0\nb,c,1\n", "line 3: 3 field"),
    "header.tsv": (b"text\tlabel\n", r"header line \(text, label\) and no row"),
    "quote.csv": (b'text,label\n"a,0\nb,1\n', "line 2: unexpected end of data; expected fields separated by commas"),
    "inner.csv": (b'text,label\n"a"b,0\n', "line 2: ',' expected after"),
    "truncated.json": (b'[{"text": "a", "label": 0}, {"te', "is not JSON: .*one object a line is named .jsonl"),
    "scalar.json": (b"5", "holds a JSON int; expected a list of objects"),
    "object.json": (b'{"text": "a"}', "holds a JSON dict; expected a list of objects"),
    "list.json": (b"[[1, 2]]", r"row 1 is \[1, 2\]; expected an object"),
    "none.json": (b"[]", "holds no object"),
    "keys.jsonl": (
        b'{"text": "a", "label": 0}\n{"text": "b"}\n',
        "line 2 has the keys text; the first row has text, label",
    ),
    "broken.jsonl": (b'{"text": "a", "label": 0}\n{"text"\n', "line 2 is not a JSON object"),
    "truncated.parquet": (b"PAR1abcdef", "is not whole Parquet"),
    "table.xlsx": (b"PK", "suffix '.xlsx'; expected one of .tsv, .csv, .json, .jsonl, .parquet"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_files(tmp_path, name):
    content, message = BAD_FILES[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(jl.InputError, match=message) as raised:
        read_table(tmp_path / name)
    assert "\n" not in str(raised.value)
    assert len(str(raised.value)) < 500


def test_unreadable_files(tmp_path):
    with pytest.raises(jl.InputError, match="No such file"):
        read_table(tmp_path / "none.tsv")
    with pytest.raises(jl.InputError, match="is a folder; expected a file"):
        read_table(tmp_path)
    whole = write_rows(tmp_path / "t.parquet", ROWS).read_bytes()
    for content, message in ((whole[:-20], "not whole Parquet"), (b"", "is empty")):
        (tmp_path / "t.parquet").write_bytes(content)
        with pytest.raises(jl.InputError, match=message):
            read_table(tmp_path / "t.parquet")


# --- folders --------------------------------------------------------------------------------------------


def test_folders_of_tasks(tmp_path):
    rows = [{"premise": f"a {i}", "hypothesis": "b", "label": i} for i in range(3)]
    for name in ("train-00000-of-00001", "validation_matched-00000-of-00001", "validation_mismatched"):
        (tmp_path / "mnli").mkdir(exist_ok=True)
        write_rows(tmp_path / "mnli" / f"{name}.parquet", [{**row, "hypothesis": name} for row in rows])
    (tmp_path / "mine").mkdir()
    for split in ("train", "validation"):
        write_rows(tmp_path / "mine" / f"{split}.csv", [{"text": f"{split}{i}", "label": i} for i in range(2)])
    assert tasks_in(tmp_path) == ["mine", "mnli", "mnli_mismatched"]
    for name, split in (("mnli", "validation_matched-00000-of-00001"), ("mnli_mismatched", "validation_mismatched")):
        task = load_folder_task(tmp_path, name)
        assert task.label_names == ("entailment", "neutral", "contradiction")
        assert task.validation.texts[0] == ("a 0", split)
    assert load_folder_task(tmp_path, "mine").num_labels == 2
    with pytest.raises(jl.InputError, match=r"sst2 has no file train \(.tsv, .*it has mine, mnli, mnli_mismatched"):
        load_folder_task(tmp_path, "sst2")
    write_rows(tmp_path / "mine" / "train.json", ROWS)
    with pytest.raises(jl.InputError, match=r"has both train.csv and train.json; expected one"):
        load_folder_task(tmp_path, "mine")
    with pytest.raises(jl.InputError, match="is not a folder"):
        load_folder_task(tmp_path / "none", "mine")


SIZES = {"cola": (8551 - 16, 1043), "sst2": (67349, 872), "mrpc": (3668, 408), "rte": (2490, 277), "wnli": (635, 71)}
SIZES |= {"stsb": (5749 - 6, 1500), "qnli": (8999, 2000), "mnli": (8999, 1000), "qqp": (8999, 1000)}
SIZES |= {"imdb": (4000 - 2, 2000), "uci_amazon": (796, 200), "uci_imdb": (799, 200), "uci_yelp": (799, 200)}


@pytest.mark.parametrize("name", SIZES)
def test_shared_data_keeps_every_row(data_folder, name):
    task = load_folder_task(data_folder, name)
    assert (len(task.train), len(task.validation)) == SIZES[name]
    known = KNOWN_TASKS.get(name)
    assert task.label_names == (known.label_names if known else ("0", "1"))
    assert task.metrics == (known.metrics if known else ("accuracy",))
    assert {len(texts) for texts in task.train.texts} == {len(known.text_columns) if known else 1}


# --- labels of a model ----------------------------------------------------------------------------------

NLI = ("entailment", "neutral", "contradiction")


def test_classes_follow_the_checkpoint_by_name():
    theirs = {"id2label": {"0": "CONTRADICTION", "1": "NEUTRAL", "2": "ENTAILMENT"}}
    order, note = label_order(NLI, theirs)
    assert order.tolist() == [2, 1, 0]
    assert "CONTRADICTION, NEUTRAL, ENTAILMENT" in note
    assert label_order(NLI, {"id2label": dict(enumerate(NLI))}) == (None, None)
    assert label_order(NLI, {"id2label": {"0": "LABEL_0", "1": "LABEL_1", "2": "LABEL_2"}}) == (None, None)
    assert label_order(NLI, {}) == (None, None)
    order, note = label_order(NLI, {"id2label": {"0": "sad", "1": "glad", "2": "mad"}})
    assert order is None
    assert "named sad, glad, mad, the task's entailment, neutral, contradiction: class ids are used as they are" in note
    order, note = label_order(("a", "b"), {"id2label": {"0": "b", "1": "a"}})
    assert order.tolist() == [1, 0]
    assert "F1 is of a" in note


def test_scores_are_standardised_by_the_training_scores():
    train = TextSplit((("a",), ("b",)), np.array([1.0, 5.0]))
    scale = scale_of(train)
    assert (scale.mean, scale.std) == (3.0, 2.0)
    assert standardise(train, scale).labels.tolist() == [-1.0, 1.0]
    with pytest.raises(jl.InputError, match="all 2 training scores are 5; expected at least two different"):
        scale_of(TextSplit(train.texts, np.array([5.0, 5.0])))


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


@pytest.mark.parametrize(
    ("counts", "size", "shares"),
    [
        ((80, 20), 20, (16, 4)),
        ((6, 5, 1), 11, (5, 5, 1)),  # one left over
        ((97, 2, 1), 10, (8, 1, 1)),  # a class of one, and one whose share rounds to nothing
        ((50, 30, 20), 7, (4, 2, 1)),
        ((5, 5, 5), 3, (1, 1, 1)),
    ],
)
def test_subsets_take_the_largest_remainders(counts, size, shares):
    labels = np.random.default_rng(0).permutation(np.repeat(np.arange(len(counts)), counts))
    split = TextSplit(tuple((str(i),) for i in range(len(labels))), labels)
    for seed in range(3):
        assert tuple(np.bincount(subsample(split, size, seed).labels)) == shares


def test_subsets_of_scores_are_drawn_from_all():
    split = TextSplit(tuple((str(i),) for i in range(9)), np.linspace(0, 5, 9))
    assert len(subsample(split, 4, 0)) == 4


def test_tokens_and_truncation(model):
    split = TextSplit((("is it good", "the film"), ("a b c d e f g h i j k l", "m")), np.array([0, 1]))
    data, truncated = tokenize(split, model.tokenizer, 10)
    assert truncated == 1
    assert data["input_ids"].shape == (2, 10)
    ids = model.tokenizer("is it good", "the film")["input_ids"]
    assert data["input_ids"][0, : len(ids)].tolist() == ids
    assert set(np.unique(data["token_type_ids"])) == {0, 1}
    assert data.lengths.tolist() == [len(ids), 10]
    assert "token_type_ids" not in tokenize(split, model.tokenizer, 10, token_types=False)[0].columns
    with pytest.raises(jl.InputError, match="leaves no room"):
        tokenize(split, model.tokenizer, 4)
