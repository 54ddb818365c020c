"""Study 08 on small data: its numbers are what the parts give, kept once, and said as they are."""

import dataclasses

import matplotlib.pyplot as plt
import numpy as np
import pytest
import scipy.stats

import jaxlin as jl
from jaxlin.data.task import subsample, tokenize
from jaxlin.experiments.data_arguments import DataArguments, load_task
from jaxlin.experiments.figures import kernel_regression as study
from jaxlin.experiments.figures import kernel_regression_findings as told
from jaxlin.experiments.figures import summary
from jaxlin.experiments.figures.run import run_study
from jaxlin.experiments.setting import Loaded
from tests import cases


@pytest.fixture(scope="module")
def fitted():
    """Tasks whose probe was fitted while the study ran."""
    return []


@pytest.fixture(scope="module")
def small(tmp_path_factory, fitted):
    folder = tmp_path_factory.mktemp("kernel")
    setting = study.KernelRegressionSetting(
        tasks=("sst2", "cola"),
        seeds=1,
        num_train=16,
        num_eval=10,
        max_seq_length=16,
        model_name_or_path=str(cases.headless_checkpoint(folder)),
        data_dir=cases.sentiments(folder / "data", 40, 12, ("sst2", "cola")),
        lora_rank=2,
        lam_rel=(1e-3, 1e-1),
        levels=(0.5, 0.9),
        bins=3,
        num_train_epochs=1.0,
        batch_size=8,
    )
    own = Loaded.probed
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Loaded, "probed", lambda loaded: fitted.append(loaded.task.name) or own(loaded))
        return setting, folder / "08", *run_study(study.STUDY, setting, folder / "08", "command", quiet=True)


@pytest.fixture(scope="module")
def parts(small):
    """The second task again, by the public functions alone."""
    setting = small[0]
    task = load_task(DataArguments(task_name="cola", data_dir=setting.data_dir))
    model = jl.load_model(setting.model_name_or_path, 2, rng=0)
    train, held_out = (
        tokenize(subsample(split, size, 0), model.tokenizer, 16)[0]
        for split, size in ((task.train, 16), (task.validation, 10))
    )
    y = np.eye(2)[train["labels"]]
    tun = jl.lora(jl.probe_head(model, train, y), rank=2, alpha=2)
    kernel, cross, own = jl.ntk(tun, train), jl.ntk(tun, held_out, train), jl.ntk(tun, held_out)
    return train, held_out, y, tun, kernel, cross, own


def one(tables, name, **equal):
    (row,) = summary.of(tables[name], task="cola", **equal)
    return row


def loss(outputs, labels):
    return 0.5 * np.mean(np.sum((outputs - np.eye(2)[labels]) ** 2, axis=1))


@pytest.mark.slow
def test_regressions_are_those_of_the_kernel(small, parts):
    setting, _, tables, _ = small
    train, held_out, y, tun, kernel, cross, own = parts
    mu1 = np.linalg.eigvalsh(kernel.matrix())[-1]
    starts = {"kernel_alone": 0.0, "kernel_regression": 1.0}
    left_out = {}
    for arm, scale in starts.items():
        f0, f0_test = (scale * jl.predict(tun, tun.theta0, part) for part in (train, held_out))
        for share in setting.lam_rel:
            fit = jl.kernel_regression(kernel, y, f0, ridge=share * mu1)
            by_hand = np.array([_without(kernel.matrix(), y, f0, share * mu1, i) for i in range(len(y))])
            row = one(tables, "curve", arm=arm, lam_over_mu1=share)
            left_out[arm, share] = loss(by_hand, train["labels"])
            assert row["loss_leave_one_out"] == pytest.approx(left_out[arm, share], rel=1e-3)
            outputs = fit.test(cross, f0_test)
            assert row["loss_eval"] == pytest.approx(loss(outputs, held_out["labels"]), rel=1e-3)
            assert row["accuracy_eval"] == np.mean(outputs.argmax(1) == held_out["labels"])
    chosen = min(setting.lam_rel, key=lambda share: left_out["kernel_alone", share])
    assert {row["lam_over_mu1"] for row in tables["curve"] if row["chosen"] and row["task"] == "cola"} == {chosen}
    for arm, scale in starts.items():
        f0, f0_test = (scale * jl.predict(tun, tun.theta0, part) for part in (train, held_out))
        fit = jl.kernel_regression(kernel, y, f0, ridge=chosen * mu1)
        expected = jl.calibration(fit, cross, f0_test, np.eye(2)[held_out["labels"]], own, levels=setting.levels)
        for level, covered in zip(setting.levels, expected.coverage, strict=True):
            assert one(tables, "coverage", arm=arm, level=level)["coverage"] == pytest.approx(covered, abs=0.051)
        row = one(tables, "calibration", arm=arm)
        assert row["squared_residual"] == pytest.approx(expected.squared_residual, rel=1e-3)
        assert row["negative_log_density"] == pytest.approx(expected.negative_log_density, rel=1e-3, abs=1e-3)
        score = one(tables, "table", arm=arm)
        assert (score["metric"], score["lam_over_mu1"]) == ("matthews", chosen)
        assert score["loss_eval"] == pytest.approx(loss(fit.test(cross, f0_test), held_out["labels"]), rel=1e-3)


def _without(matrix, y, f0, ridge, i):
    """Prediction for example i of ridge regression on the others, by a dense solve."""
    rest = np.delete(np.arange(y.size).reshape(y.shape), i, axis=0).reshape(-1)
    own = np.arange(y.size).reshape(y.shape)[i]
    r = (y - f0).reshape(-1)
    alpha = np.linalg.solve(matrix[np.ix_(rest, rest)] + ridge * np.eye(len(rest)), r[rest])
    return f0[i] + matrix[np.ix_(own, rest)] @ alpha


@pytest.mark.slow
def test_logistic_regression_and_its_bins(small, parts):
    tables = small[2]
    train, held_out, _, _, kernel, cross, _ = parts
    mu1 = np.linalg.eigvalsh(kernel.matrix())[-1]
    share = one(tables, "table", arm="kernel_logistic")["lam_over_mu1"]
    fit = jl.kernel_logistic_regression(kernel, train["labels"], np.zeros((16, 2)), share * mu1)
    logits = fit.test(cross, np.zeros((10, 2)))
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    nats = -np.mean(np.log(p[np.arange(10), held_out["labels"]]))
    assert one(tables, "calibration", arm="kernel_logistic")["cross_entropy"] == pytest.approx(nats, rel=1e-3)
    bins = summary.of(tables["reliability"], task="cola", arm="kernel_logistic")
    assert [row["examples"] for row in bins] == [4, 3, 3]
    sorted_confidence = np.sort(p.max(axis=1))
    for row, part in zip(bins, np.split(sorted_confidence, [4, 7]), strict=True):
        assert row["confidence"] == pytest.approx(part.mean(), rel=1e-3)
    right = sum(row["examples"] * row["accuracy"] for row in bins) / 10
    assert right == pytest.approx(np.mean(logits.argmax(1) == held_out["labels"]))
    gap = sum(row["examples"] * abs(row["confidence"] - row["accuracy"]) for row in bins) / 10
    assert told.calibration_error(bins) == pytest.approx(gap)


@pytest.mark.slow
def test_fine_tuning_and_pairs_are_what_training_gives(small, parts):
    tables = small[2]
    train, held_out, _, tun, kernel, _, _ = parts
    mu1 = np.linalg.eigvalsh(kernel.matrix())[-1]
    right = {}
    for arm in ("full", "full_pulled"):
        row = one(tables, "table", arm=arm)
        config = jl.TrainConfig(
            lr_scheduler_type="linear",
            batch_size=8,
            num_train_epochs=1.0,
            group_by_length=True,
            lam=row["lam_over_mu1"] * mu1,
        )
        outputs = jl.predict(tun, jl.train(tun, train, config=config).theta, held_out)
        assert row["loss_eval"] == pytest.approx(loss(outputs, held_out["labels"]), rel=1e-3)
        right[arm] = outputs.argmax(1) == held_out["labels"]
        assert row["accuracy_eval"] == np.mean(right[arm])
        cut = np.clip(outputs, 1e-6, 1)
        confidence = np.sort((cut / cut.sum(1, keepdims=True)).max(axis=1))
        bins = summary.of(tables["reliability"], task="cola", arm=arm)
        for found, part in zip(bins, np.split(confidence, [4, 7]), strict=True):
            assert found["confidence"] == pytest.approx(part.mean(), rel=1e-3)
        assert sum(found["examples"] * found["accuracy"] for found in bins) == pytest.approx(right[arm].sum())
    right["linear_probe"] = jl.predict(tun, tun.theta0, held_out).argmax(1) == held_out["labels"]
    assert one(tables, "table", arm="full")["lam_over_mu1"] == 0
    for arm in ("full", "full_pulled"):
        row = one(tables, "pairs", arm=arm, other="linear_probe")
        only = (right[arm] & ~right["linear_probe"]).sum(), (~right[arm] & right["linear_probe"]).sum()
        assert (row["only_arm_right"], row["only_other_right"]) == only
        assert row["accuracy_difference"] == pytest.approx((only[0] - only[1]) / 10)
        scores = [one(tables, "table", arm=name)["score_eval"] for name in (arm, "linear_probe")]
        assert row["difference"] == pytest.approx(scores[0] - scores[1], abs=1e-5)


def test_the_probe_is_fitted_once_so_that_the_time_of_predicting_is_without_it(small, fitted):
    assert fitted == list(small[0].tasks)


def test_a_second_run_computes_nothing(small, monkeypatch):
    setting, folder, tables, _ = small

    cases.forbid(monkeypatch, study, "jacobian", "train")
    again, _ = run_study(study.STUDY, setting, folder, "command", quiet=True)
    assert str(again) == str(tables)
    with pytest.raises(AssertionError, match="computed again"):
        run_study(study.STUDY, dataclasses.replace(setting, lam_rel=(1e-2,)), folder, "command", quiet=True)


def seeds_of(tables):
    """The same tables with three seeds that differ by known amounts."""
    out = {name: [] for name in tables}
    for name, rows in tables.items():
        for seed, shift in enumerate((0.0, 0.02, 0.07)):
            for row in rows:
                changed = {**row, "seed": seed}
                if name == "pairs":
                    changed["difference"] = row["difference"] + shift
                    changed["accuracy_difference"] = row["accuracy_difference"] + shift
                if name == "times":
                    changed["cpu_seconds"] = row["cpu_seconds"] * (1 + seed)
                out[name].append(changed)
    return out


def cells_of(text, line):
    row = next(found for found in text.splitlines() if found.startswith(f"| {line}"))
    return [cell.strip() for cell in row.strip("|").split("|")]


def test_findings_are_of_the_tables(small):
    _, folder, tables, _ = small
    several = seeds_of(tables)
    said = told.findings(several)
    pairs = cases.rows(folder / "pairs.csv")
    means = {}
    for name in ("sst2", "cola"):
        (row,) = [r for r in pairs if (r["task"], r["arm"], r["other"]) == (name, "kernel_regression", "full")]
        means[name] = float(row["accuracy_difference"]) + 0.03
        values = float(row["difference"]) + np.array([0.0, 0.02, 0.07])
        low, high = scipy.stats.t.interval(0.95, 2, values.mean(), scipy.stats.sem(values))
        cell = cells_of(said["differences"], "kernel from the probe − full, no pull")[1 + (name == "cola")]
        assert cell == f"{values.mean():+.3f} [{low:+.3f}, {high:+.3f}]".replace("-", "−")
    low, high = scipy.stats.t.interval(0.95, 1, np.mean(list(means.values())), scipy.stats.sem(list(means.values())))
    verdict = "no difference is resolved" if not low > 0 and not high < 0 else "is better"
    line = said["in_all"].splitlines()[1]
    assert f"[{low:+.3f}, {high:+.3f}]".replace("-", "−") in line or np.isnan(low)
    assert verdict in line
    times = [r for r in cases.rows(folder / "times.csv") if r["task"] == "cola"]
    training = sum(float(r["cpu_seconds"]) for r in times if (r["arm"], r["stage"]) == ("full", "training"))
    kernel = sum(
        float(r["cpu_seconds"])
        for r in times
        if r["arm"] == "kernel"
        and "validation" not in r["stage"]
        and "predictions" not in r["stage"]
        and not r["stage"].endswith("kernel_regression")
    )
    cells = cells_of(said["times"], "CoLA")
    assert float(cells[2]) == pytest.approx(2 * kernel, rel=0.06)  # the median of 1, 2, 3 times
    assert float(cells[3]) == pytest.approx(2 * training, rel=0.06)
    assert float(cells[-2]) == pytest.approx(kernel / training, abs=6e-3)
    curve = [r for r in cases.rows(folder / "curve.csv") if (r["task"], r["arm"]) == ("cola", "kernel_alone")]
    best = min(curve, key=lambda r: float(r["loss_leave_one_out"]))
    cells = cells_of(said["leave_one_out"], "CoLA")
    assert cases.number(cells[1]) == pytest.approx(
        float(best["loss_leave_one_out"]) / float(best["loss_eval"]), abs=6e-3
    )
    cost = float(best["loss_eval"]) / min(float(r["loss_eval"]) for r in curve) - 1
    assert cases.number(cells[3]) == pytest.approx(100 * cost, abs=0.06)


def test_verdicts_follow_the_interval():
    assert told._verdict(np.array([0.1, 0.11, 0.12]), "kernel_alone", "full") == "kernel alone is better"
    assert told._verdict(-np.array([0.1, 0.11, 0.12]), "kernel_alone", "full") == "full, no pull is better"
    assert told._verdict(np.array([-0.1, 0.11]), "kernel_alone", "full") == "no difference is resolved"
    assert told._verdict(np.array([0.5]), "kernel_alone", "full") == "no difference is resolved"
    rows = [
        {"task": task, "arm": "a", "other": "b", "seed": seed, "accuracy_difference": value}
        for task, seed, value in [
            ("cola", 0, 0.1),
            ("cola", 1, 0.3),
            ("wnli", 0, 9.0),
            ("stsb", 0, None),
            ("qqp", 0, 0.0),
        ]
    ]
    np.testing.assert_allclose(told.pooled(rows, "a", "b"), [0.2, 0.0])  # a mean each, those never pooled left out
    a, b, m = 6, 2, 100
    each = np.concatenate([np.ones(a), -np.ones(b), np.zeros(m - a - b)])
    row = {"only_arm_right": a, "only_other_right": b, "eval_examples": m}
    assert told.sampling_error(row) == pytest.approx(each.std() / m**0.5)


def test_figures_are_drawn_for_any_tables(small):
    _, _, tables, _ = small
    scores_only = {
        name: [{**row, "accuracy_difference": None, "only_arm_right": None} if name == "pairs" else row for row in rows]
        for name, rows in tables.items()
        if name != "reliability"
    } | {"reliability": []}
    for content in (tables, seeds_of(tables), scores_only):
        assert "nothing is pooled" in told.findings(content)["in_all"] or content is not scores_only
        for figure in study.STUDY.draw(content).values():
            said = " ".join(figure.get_suptitle().split())  # in lines
            assert "validation examples" in said
            assert "seed" in said
            figure.canvas.draw()
            plt.close(figure)
