"""The framework of the figures, and study 02: what is kept and read back, what is refused, what is drawn and said."""

import dataclasses
import json
import re

import matplotlib.pyplot as plt
import numpy as np
import pytest
import scipy.stats

import jaxlin as jl
from jaxlin.data.task import subsample, tokenize
from jaxlin.experiments.cache import Cache
from jaxlin.experiments.data_arguments import DataArguments, load_task
from jaxlin.experiments.figures import regularization, run, summary
from jaxlin.experiments.figures.run import FiguresConfig, command_of, open_study, run_study, setting_of
from jaxlin.experiments.figures.study import WHOLE, Setting, Study, Work, read_tables, write_tables
from jaxlin.peft.lora import lora
from tests import cases

# What is kept.


def test_a_result_is_computed_once_for_what_it_depends_on(tmp_path):
    calls = []

    def unit(value):
        return lambda: calls.append(value) or {"rows": [{"x": np.nan, "y": [-np.inf, 1.5], "z": None}]}

    cache = Cache(tmp_path)
    for key, value in (({"a": 1, "b": [0.1]}, 1), ({"b": [0.1], "a": 1}, 2), ({"a": 1, "b": [0.2]}, 3)):
        found = cache.get(key, unit(value))
        (row,) = found["rows"]
        assert np.isnan(row["x"])
        assert row["y"] == [-np.inf, 1.5]
        assert row["z"] is None
    assert calls == [1, 3]
    assert len(list(tmp_path.iterdir())) == 2


def test_seconds_are_those_of_the_results_asked_for(tmp_path):
    first = Cache(tmp_path)
    first.get({"a": 1}, lambda: 1)
    first.get({"a": 2}, lambda: 2)
    for file in tmp_path.iterdir():
        content = json.loads(file.read_text())
        file.write_text(json.dumps({**content, "seconds": 10.0 * content["result"]}))
    second = Cache(tmp_path)
    for _ in range(2):
        assert second.get({"a": 2}, lambda: 3) == 2
        assert second.seconds == 20.0
    second.get({"a": 1}, lambda: 3)
    assert second.seconds == 30.0


def test_a_result_of_others_counts_their_seconds_once(tmp_path):
    """Two parts, the first of them from a process before."""
    Cache(tmp_path).get({"part": 0}, lambda: 1)
    (file,) = tmp_path.iterdir()
    file.write_text(json.dumps({**json.loads(file.read_text()), "seconds": 100.0}))
    cache, computed = Cache(tmp_path), []

    def whole():
        return sum(cache.get({"part": k}, lambda k=k: computed.append(k) or 1) for k in range(2))

    for one in (cache, Cache(tmp_path)):
        assert one.get({"whole": True}, whole) == 2
        assert computed == [1]
        assert 100 < one.seconds < 150
    assert cache.saved == 100


def toy_study(log, stop_at=None):
    """Three units; the one to stop at is interrupted in its middle."""

    def compute(setting, work):
        def unit(k):
            def made():
                log.append(k)
                if k == stop_at:
                    raise KeyboardInterrupt
                return {"value": k**2}

            return made

        rows = [{"unit": k, **work.cache.get({"unit": k, "seeds": setting.seeds}, unit(k))} for k in range(3)]
        return {"table": rows, "nothing": []}

    def draw(tables):
        figure, axes = plt.subplots()
        axes.plot([row["value"] for row in tables["table"]])
        return {"values": figure}

    return Study(
        "42_toy",
        "Three squares",
        Setting(tasks=("stdlib",)),
        Setting(tasks=("stdlib",), seeds=5),
        compute,
        draw,
        lambda tables: {"sum": f"The sum is {sum(row['value'] for row in tables['table'])}."},
    )


def test_an_interruption_loses_the_unit_it_meets_only(tmp_path):
    log = []
    stopped, whole = toy_study(log, stop_at=1), toy_study(log)
    with pytest.raises(KeyboardInterrupt):
        run_study(stopped, stopped.fast, tmp_path / "toy", "command", quiet=True)
    assert not (tmp_path / "toy" / "table.csv").exists()
    tables, record = run_study(whole, whole.fast, tmp_path / "toy", "command", quiet=True)
    assert log == [0, 1, 1, 2]
    assert tables == {"table": [{"unit": k, "value": k**2} for k in range(3)], "nothing": []}
    assert read_tables(tmp_path / "toy") == tables
    kept = json.loads((tmp_path / "toy" / "record.json").read_text())
    assert kept["seconds"] == record["seconds"]
    assert (kept["study"], kept["command"], kept["setting"]["seeds"]) == ("42_toy", "command", 3)
    assert (tmp_path / "toy" / "findings.md").read_text() == "# Three squares\n\nThe sum is 5.\n"
    assert {file.name for file in (tmp_path / "toy" / "figures").iterdir()} == {"values.png", "values.svg"}
    run_study(whole, whole.full, tmp_path / "toy", "command", quiet=True)  # another setting: nothing is taken over
    assert log == [0, 1, 1, 2, 0, 1, 2]


def test_a_notebook_opens_what_is_kept_or_computes_it_in_small(tmp_path, monkeypatch):
    log = []
    study = toy_study(log)
    monkeypatch.setattr(run, "STUDIES", (study,))
    with pytest.raises(jl.InputError, match=r"42_toy holds no results; run `jaxlin figures 42_toy --full"):
        open_study("42", tmp_path)
    run_study(study, study.full, tmp_path / study.name, "jaxlin figures 42_toy --full", quiet=True)
    opened = open_study("toy", tmp_path)
    assert opened.found("sum") == "The sum is 5."
    before = plt.get_fignums()
    for _ in range(3):
        assert opened.show("values")._repr_png_().startswith(b"\x89PNG")
    assert plt.get_fignums() == before  # none is left open
    assert "`jaxlin figures 42_toy --full`" in opened.about()
    assert log == [0, 1, 2]
    monkeypatch.setenv(run.FAST_SWITCH, "fast")
    fast = open_study("42_toy", tmp_path)
    assert log == [0, 1, 2] * 2
    assert fast.record["command"] == "jaxlin figures 42_toy --fast"
    assert fast.record["setting"]["seeds"] == 3


@pytest.mark.parametrize(
    ("seconds", "said"), [(59.4, "59 seconds"), (119.0, "119 seconds"), (120.0, "2 minutes"), (5400.0, "90 minutes")]
)
def test_the_time_said_is_that_of_the_record(seconds, said):
    study = toy_study([])
    record = {
        "command": "c",
        "setting": {"model_name_or_path": "m"},
        "cores": 2,
        "machine": "x",
        "device": "cpu",
        "seconds": seconds,
        "versions": {"jax": "1.2.3"},
    }
    assert f"**time taken** {said} ·" in run.Opened(study, {}, record).about()


def about(setting, cut=None, name="06"):
    """What is said of a setting."""
    (study,) = run.chosen([name])
    record = {"command": "c", "cores": 2, "machine": "x", "device": "cpu", "seconds": 1.0, "versions": {"jax": "1"}}
    record |= {"setting": {"model_name_or_path": "m", **setting}} | ({"cut": cut} if cut else {})
    return run.Opened(study, {}, record).about().split("**Setting** ")[1].split(" · ")


def test_the_setting_is_told():
    setting = {"tasks": ["cola", "sst2"], "seeds": 3, "num_train": 128, "num_eval": None, "lam_rel": [0.0, 1e-3]}
    setting |= {"max_seq_length": 48, "stable_factors": []}
    said = about(setting, {"cola": {"train": 0.0, "eval": 0.0}, "sst2": {"train": 0.25, "eval": 1 / 3}})
    assert said[:6] == [
        "tasks CoLA, SST-2",
        "draws (seeds) 3",
        "training examples 128",
        "validation examples all",
        "texts cut at 48 tokens",
        "λ/μ₁ 0, 0.001",
    ]
    assert said[6].startswith("optimizer: Adam, ")
    assert said[7:] == ["texts that are shortened: CoLA none; SST-2 25.0 % of training, 33.3 % of validation"]
    chosen = {**setting, "paper_learning_rates": [0.1, 0.2], "stable_factors": [0.3]}
    assert about(chosen)[6:8] == ["learning rate of Adam 0.1, 0.2 (one of them by task)", "c 0.3"]
    assert about({"num_train": WHOLE, "steps": 24}, name="03")[:2] == ["training examples all", "steps 24"]
    assert "heavy ball (momentum 0.9)" in about({}, name="03")[-1]


@pytest.mark.slow
def test_texts_that_are_cut_are_counted(tmp_path):
    setting = dataclasses.replace(regularization.STUDY.fast, num_train=20, num_eval=12, max_seq_length=16)
    work = Work(setting, Cache(tmp_path), lambda *_: None)
    tokenizer = work.problem("stdlib", 0).model.tokenizer
    task = load_task(DataArguments())
    expected = {
        split: np.mean([len(tokenizer(*texts)["input_ids"]) > 16 for texts in subsample(part, size, 0).texts])
        for split, part, size in (("train", task.train, 20), ("eval", task.validation, 12))
    }
    assert work.cut == {"stdlib": expected}
    assert 0 < expected["train"] < 1
    work.problem("stdlib", 1)
    assert work.cut == {"stdlib": expected}  # of the first draw


# Tables.


def test_tables_read_as_they_were(tmp_path):
    rows = [
        {"a": 1, "b": 0.125, "c": None, "d": True, "e": 'x, "y"\nz', "f": np.float64(1 / 3), "g": np.int64(-4)},
        {"a": -2, "b": float("nan"), "c": 2.0, "d": False, "e": "1_0", "f": float("inf"), "g": 10**12},
        {"a": 0, "b": -0.0, "c": 1e-300, "d": None, "e": "cola", "f": -float("inf"), "g": 3},
    ]
    write_tables(tmp_path, {"one": rows, "none": []})
    found = read_tables(tmp_path)
    assert found["none"] == []
    for row, expected in zip(found["one"], rows, strict=True):
        for name, value in expected.items():
            if isinstance(value, float) and np.isnan(value):
                assert np.isnan(row[name])
            elif isinstance(value, float):
                assert row[name] == float(f"{value:.6g}")  # and no integer: 2.0 stays a float
                assert isinstance(row[name], float)
            else:
                assert row[name] == value
                assert type(row[name]) is (int if isinstance(value, np.int64) else type(value))
    write_tables(tmp_path / "..", {})  # nothing to write is nothing written
    again = tmp_path / "again"
    again.mkdir()
    write_tables(again, found)
    assert (again / "one.csv").read_bytes() == (tmp_path / "one.csv").read_bytes()


def test_the_papers_setting_is_one_switch():
    """Its public script: rank and α 8, 16 × 4 examples a step, 10 epochs, warm-up 6 %, kernels of 32 examples."""
    for number in ("02", "04", "07"):
        setting = setting_of(*run.chosen([number]), FiguresConfig((number,), paper=True))
        assert (setting.model_name_or_path, setting.lora_rank, setting.num_eval) == ("roberta-base", 8, None)
        training = setting.training(0)
        assert (training.batch_size, training.gradient_accumulation_steps) == (16 * 4, 4)
        assert (training.num_train_epochs, training.warmup_ratio, training.learning_rate) == (10, 0.06, 4e-4)
    (study,) = run.chosen(["06"])
    assert (study.paper.num_kernel, study.paper.paper_learning_rates) == (32, (4e-3, 4e-4))
    assert setting_of(study, FiguresConfig(paper=True, num_train=500)).num_train == 500


@pytest.mark.slow
def test_whole_training_sets(tmp_path):
    task = load_task(DataArguments())
    small = dataclasses.replace(regularization.STUDY.fast, num_train=WHOLE, num_eval=8)
    problem = Work(small, Cache(tmp_path), lambda *_: None).problem("stdlib", 0)
    assert len(problem.train) == len(task.train)


# What is refused.


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["99", "--fast"], "there is no study '99'; expected some of 01_quickstart, 02_regularization_and_linearity"),
        (["--fast"], "JAXLIN_MODELS names no folder that holds stories260K"),
        (["02"], "give one of --fast"),
        (["02", "--fast", "--full"], "give one of --fast"),
        (["09", "--paper"], "09_llm has no part in the paper; run it with --full"),
        (["02", "--fast", "--tasks", "stdlib", "nosuch"], "--tasks nosuch is no task; there are stdlib; no folder"),
        (["02", "--fast", "--data_dir", "."], "--tasks stdlib: there is no stdlib in --data_dir .; there are none"),
        (["02", "--fast", "--tasks", "stdlib", "stdlib"], "--tasks stdlib stdlib: expected at least one, each once"),
        (["02", "--fast", "--seeds", "0"], "--seeds 0: expected at least 1"),
        (["02", "--fast", "--model_name_or_path", "/no/such/model"], "/no/such/model"),
    ],
)
def test_bad_input(run, tmp_path, monkeypatch, arguments, message):
    def never(*_, **__):
        raise AssertionError("computed before it was refused")

    monkeypatch.setattr(regularization, "compare", never)
    for name in ("JAXLIN_DATA", "JAXLIN_MODELS"):
        monkeypatch.delenv(name, raising=False)
    code, out, err = run("figures", *arguments, "--output_dir", tmp_path / "out", "--quiet")
    assert code == 2
    assert message in " ".join((out + err).split())


def test_what_is_asked_for_changes_the_setting():
    config = FiguresConfig(
        names=("02", "regularization_and_linearity"), full=True, tasks=("rte", "sst2"), seeds=2, model_name_or_path="m"
    )
    (study,) = run.chosen(config.names)  # named twice, run once
    setting = setting_of(study, config)
    expected = {"tasks": ("rte", "sst2"), "seeds": 2, "model_name_or_path": "m"}
    expected |= dict.fromkeys(("pull_tasks", "frozen_tasks"), ("sst2",))
    assert setting == dataclasses.replace(study.full, **expected)
    assert setting_of(study, dataclasses.replace(config, tasks=("rte",))).frozen_tasks == ("rte",)
    assert command_of(study, config) == (
        "jaxlin figures 02_regularization_and_linearity --full --tasks rte sst2 --model_name_or_path m --seeds 2"
    )
    assert run.chosen(()) == (run.QUICKSTART, *run.STUDIES)
    names = [study.name for study in run.chosen(())]
    assert names == sorted(set(names))


# Means and bands.


@pytest.mark.parametrize("n", [2, 3, 12])
def test_intervals_are_students(n):
    values = np.random.default_rng(n).normal(size=n)
    mean, low, high = summary.mean_interval(values)
    expected = scipy.stats.t.interval(0.95, n - 1, values.mean(), scipy.stats.sem(values))
    np.testing.assert_allclose((mean, low, high), (values.mean(), *expected), rtol=1e-12)
    said = summary.with_interval(values)
    numbers = [cases.number(text) for text in re.findall(r"[+−][\d.]+", said)]
    np.testing.assert_allclose(numbers, (mean, low, high), atol=5.1e-4)


def test_one_value_has_no_interval():
    assert summary.mean_interval([2.0]) == (2.0, -np.inf, np.inf)
    assert summary.with_interval([-2.0]) == "−2.000"
    assert summary.written([2.0, 1.0, 6.0]) == "3 (1 to 6)"


ROWS = [
    {"task": "sst2", "seed": seed, "lam_over_mu1": share, "y": y, "train_examples": 10, "eval_examples": size}
    for share, seed, y, size in [
        (0.0, 0, 1.0, 7),
        (0.0, 1, 3.0, 7),
        (1.0, 0, 2.0, 9),
        (1.0, 1, 8.0, 9),
        (0.1, 0, None, 9),
        (0.1, 1, 4.0, 9),
        (10.0, 0, None, 9),
    ]
]


def test_a_band_is_the_mean_and_range_of_the_seeds():
    _, axis = plt.subplots()
    at = summary.lam_positions(axis, ROWS)
    assert at == {0.0: 0.01, 0.1: 0.1, 1.0: 1.0, 10.0: 10.0}
    summary.band(axis, ROWS, "lam_over_mu1", "y", at, color="red")
    (line,), (area,) = axis.lines, axis.collections
    np.testing.assert_allclose(line.get_xydata(), [(0.01, 2.0), (0.1, 4.0), (1.0, 5.0)])
    vertices = area.get_paths()[0].vertices
    for x, low, high in ((0.01, 1.0, 3.0), (0.1, 4.0, 4.0), (1.0, 2.0, 8.0)):
        here = vertices[np.isclose(vertices[:, 0], x), 1]
        assert (here.min(), here.max()) == (low, high)
    plt.close()


def test_a_band_on_a_log_axis_leaves_out_what_has_no_logarithm():
    _, axis = plt.subplots()
    axis.set_yscale("log")
    rows = [{"x": x, "y": y} for x, y in ((1, 0.0), (1, 0.0), (2, 1.0), (2, 3.0))]
    summary.band(axis, rows, "x", "y")
    np.testing.assert_array_equal(axis.lines[0].get_ydata(), [np.nan, 2.0])
    summary.band(axis, [{"x": 1, "y": None}], "x", "y")
    assert len(axis.lines) == 1  # nothing known, nothing drawn
    plt.close()


def test_sizes_say_examples_and_seeds():
    assert summary.sizes(ROWS) == ("10 training and 7 to 9 validation examples, 2 seeds (mean, and range as a band)")
    assert summary.sizes(ROWS[:1]) == "10 training and 7 validation examples, 1 seed"
    assert summary.of(ROWS, seed=1, lam_over_mu1=0.1) == [ROWS[5]]
    assert summary.distinct(ROWS, "y") == [1.0, 3.0, 2.0, 8.0, 4.0]


def test_what_is_learnt_is_held_against_the_majority_class():
    scores = {"sst2": ("accuracy", 0.5, (0.8, 0.9, 0.85)), "cola": ("matthews", 0.0, (0.04, 0.05, -0.01))}
    rows = []
    for task, (metric, majority, found) in scores.items():
        for seed, score in enumerate(found):
            row = {"task": task, "seed": seed, "metric": metric, "lam_over_mu1": 0.0}
            rows += [
                row | {"arm": "majority_class", "score_eval": majority},
                row | {"arm": "full", "score_eval": score},
            ]
            rows.append(row | {"arm": "full", "lam_over_mu1": 1.0, "score_eval": 0.0})
    said = summary.learnt(rows, "full", "tuning", lam_over_mu1=0.0)
    assert said.startswith(
        "Against always answering the majority class, tuning has learnt something on SST-2 (accuracy 0.85 against "
        "0.5). On CoLA (Matthews correlation 0.0267 against 0) the 95 % interval"
    )
    alone = summary.learnt([row for row in rows if row["seed"] == 0], "full", "tuning", lam_over_mu1=0.0)
    assert alone.startswith("On SST-2 (accuracy 0.8 against 0.5), CoLA")  # one seed has no interval
    assert summary.learnt([row for row in rows if row["arm"] == "full"], "full", "tuning") == ""


# Study 02 on small data.


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """Setting, folder, tables and record of a small run."""
    folder = tmp_path_factory.mktemp("figures")
    setting = regularization.RegularizationSetting(
        tasks=("cola",),
        pull_tasks=("cola",),
        frozen_tasks=("cola",),
        seeds=1,
        num_train=16,
        num_eval=10,
        max_seq_length=16,
        model_name_or_path=str(cases.headless_checkpoint(folder)),
        data_dir=cases.sentiments(folder / "data", 40, 12, ("sst2", "cola")),
        lora_rank=2,
        lam_rel=(0.0, 1e-2, 1.0),
        pull_lam_rel=(1e-2,),
        bound_examples=4,
        bound_steps=2,
        num_train_epochs=1.0,
        batch_size=8,
    )
    return setting, folder, *run_study(regularization.STUDY, setting, folder / "02", "command", quiet=True)


@pytest.mark.slow
def test_rows_are_what_compare_gives(small):
    setting, _, tables, _ = small
    task = load_task(DataArguments(task_name="cola", data_dir=setting.data_dir))
    model = jl.load_model(setting.model_name_or_path, 2, rng=0)
    train, held_out = (
        tokenize(subsample(split, size, 0), model.tokenizer, 16)[0]
        for split, size in ((task.train, 16), (task.validation, 10))
    )
    model = jl.probe_head(model, train, np.eye(2)[train["labels"]])
    config = jl.TrainConfig(
        learning_rate=setting.learning_rate,
        lr_scheduler_type="linear",
        batch_size=8,
        num_train_epochs=1.0,
        group_by_length=True,
    )
    arms = {"full_A_frozen": lora(model, 2, 2.0, rng=0, freeze_A=True)}
    tun = jl.lora(model, rank=2, alpha=2)
    expected = jl.compare(tun, train, held_out, config, lam_rel=setting.lam_rel, extra_arms=arms).table
    found = summary.of(tables["table"], task="cola", pull="coupled")
    assert len(found) == len(expected)
    for row, direct in zip(found, expected, strict=True):
        assert (row["task"], row["seed"], row["train_examples"], row["eval_examples"]) == ("cola", 0, 16, 10)
        assert (row["metric"], row["score_eval"]) == ("matthews", row["matthews_eval"])
        for name in ("arm", "lam_over_mu1", *regularization._COLUMNS):
            value = direct.get(name)
            assert row[name] == (pytest.approx(value, rel=2e-3, abs=1e-5) if isinstance(value, float) else value)
    others = {row["pull"] for row in tables["table"]} - {"coupled"}
    assert others == {"selective", "decoupled"}


@pytest.mark.slow
def test_a_second_run_computes_nothing(small, monkeypatch):
    setting, folder, tables, record = small

    cases.forbid(monkeypatch, regularization, "compare", "bound_sweep")
    again, record_again = run_study(regularization.STUDY, setting, folder / "02", "command", quiet=True)
    assert str(again) == str(tables)  # NaN among them
    assert record_again["seconds"] == pytest.approx(record["seconds"])
    hashes = {
        task: load_task(DataArguments(task_name=task, data_dir=setting.data_dir)).sha256() for task in setting.tasks
    }
    assert record["data_sha256"] == hashes
    changed = dataclasses.replace(setting, learning_rate=2e-3)
    with pytest.raises(AssertionError, match="computed again"):
        run_study(regularization.STUDY, changed, folder / "02", "command", quiet=True)


@pytest.mark.slow
def test_findings_are_of_the_table(small):
    _, folder, tables, _ = small
    rows = cases.rows(folder / "02" / "table.csv")
    said = regularization.STUDY.findings(tables)
    mine = [row for row in rows if row["pull"] == "coupled" and row["arm"] == "full"]
    at = {float(row["lam_over_mu1"]): row for row in mine}
    line = next(line for line in said["gap"].splitlines() if line.startswith("| CoLA |"))
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    ends = [(share, c) for c in ("output_gap_relative_eval", "agreement_eval") for share in (0.0, 1.0)]
    for cell, (share, column) in zip(cells[1:5], ends, strict=True):
        assert cases.number(cell) == pytest.approx(float(at[share][column]), rel=5e-3)
    good = [s for s in sorted(at) if all(float(at[t]["output_gap_relative_eval"]) < 0.1 for t in at if t >= s)]
    assert cells[5] == (f"from λ/μ₁ = {good[0]:g} on" if good else "at no λ of the grid")
    for cell, column in zip(cells[6:], ("distance", "parameter_gap", "output_gap_eval"), strict=True):
        slope = np.log(float(at[1.0][column]) / float(at[1e-2][column])) / np.log(100)
        assert cases.number(cell) == pytest.approx(slope, abs=6e-3)
    bounds = cases.rows(folder / "02" / "bounds.csv")
    applying = [row for row in bounds if row["applies"] == "True"]
    holding = sum(row["holds"] == "True" for row in applying)
    counted = re.match(
        r"Of (\d+) bounds of theory 3 to 7 evaluated .* examples\), (\d+) apply, and (\d+) of", said["bounds"]
    )
    assert [int(number) for number in counted.groups()] == [len(bounds), len(applying), holding]
    ends = {(row["bound"][:4], float(row["lam_over_mu1"])): float(row["measured"]) for row in bounds}
    moved = [value for (name, _), value in ends.items() if name == "4(a)"]
    assert f"end {min(moved):.2g} to {max(moved):.2g} from θ₀, Adam’s without a pull" in said["bounds"]
    slope = np.log(ends["5(b)", 1.0] / ends["5(b)", 1e-2]) / np.log(100)
    assert f"‖θ−θ̄‖ {slope:.2f}".replace("-", "−") in said["bounds"]


@pytest.mark.slow
def test_findings_on_pulls_are_of_the_table(small):
    _, folder, tables, _ = small
    rows = cases.rows(folder / "02" / "table.csv")
    said = regularization.STUDY.findings(tables)["pulls"]
    free = {row["arm"]: row for row in rows if row["pull"] == "coupled" and row["lam_over_mu1"] == "0.0"}
    (decoupled,) = (row for row in rows if row["pull"] == "decoupled" and row["arm"] == "full")
    assert f"runs end {float(decoupled['distance']):.3g} from θ₀ at λ/μ₁ = 0.01" in said
    line = next(line for line in said.splitlines() if line.startswith("- CoLA: gap"))
    found = [cases.number(text) for text in re.findall(r"(\S+) \(", line)]
    columns = ("output_gap_relative_eval", "score_eval")
    expected = [float(free[arm][column]) for column in columns for arm in ("full", "full_A_frozen")]
    assert found == pytest.approx(expected, rel=5e-3, abs=1e-9)


@pytest.mark.slow
def test_every_figure_says_its_examples_and_seeds(small):
    _, _, tables, _ = small
    for figure in regularization.STUDY.draw(tables).values():
        title = figure.get_suptitle()
        assert "training" in title
        assert "1 seed" in title
        plt.close(figure)
