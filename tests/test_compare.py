import dataclasses
import io

import numpy as np
import pytest
from rich.console import Console

import jaxlin as jl
from jaxlin.experiments.tables import gap_tables, score_table
from jaxlin.theory.drift import relative
from jaxlin.training.gaps import distances, kl_divergence
from tests import cases


@pytest.fixture(scope="module")
def setting():
    model = cases.tiny_model(head="mean")
    train, held_out = cases.text_batch(12, longest=12), cases.text_batch(7, seed=1, longest=12)
    model = jl.probe_head(model, train, np.eye(3)[train["labels"]])
    return jl.lora(model, rank=3), jl.lora(model, rank=3, freeze_A=True), train, held_out


CONFIG = jl.TrainConfig(batch_size=4, max_steps=6, learning_rate=0.01, eval_steps=3)


@pytest.fixture(scope="module", params=["cached", pytest.param("streaming", marks=pytest.mark.slow)])
def result(request, setting):
    tun, frozen, train, held_out = setting
    seen = {"rows": [], "progress": []}
    comparison = jl.compare(
        tun,
        train,
        held_out,
        CONFIG,
        lam_rel=[0.0, 0.1],
        extra_arms={"full_A_frozen": frozen},
        linear_mode=request.param,
        log=seen["rows"].append,
        progress=lambda *args: seen["progress"].append(args),
    )
    return comparison, seen


def rows_of(comparison, arm):
    return [row for row in comparison.table if row["arm"] == arm]


def test_table_has_every_arm_and_baseline(result):
    comparison, _ = result
    assert [row["arm"] for row in comparison.table if row["lam"] is None] == ["majority_class", "start"]
    for arm in ("full", "full_A_frozen", "linearized", "kernel_regression"):
        assert [row["lam_over_mu1"] for row in rows_of(comparison, arm)] == pytest.approx([0.0, 0.1])
    assert len({tuple(row) for row in comparison.table}) == 1  # tidy: the same columns in every row


def test_numbers_are_those_of_the_trained_models(result, setting):
    comparison, _ = result
    tun, _, train, held_out = setting
    for row in rows_of(comparison, "full"):
        theta, bar = (comparison.results[arm, row["lam"]].theta for arm in ("full", "linearized"))
        assert row["distance"] == pytest.approx(distances(theta, tun.theta0)[""])
        assert row["parameter_gap"] == pytest.approx(distances(theta, bar)[""])
        parts = [row[f"parameter_gap_{part}"] for part in ("A", "B", "head")]
        assert sum(part**2 for part in parts) ** 0.5 == pytest.approx(row["parameter_gap"])
        for split, data in (("train", train), ("eval", held_out)):
            f, f_bar = jl.predict(tun, theta, data), jl.predict(jl.linearize(tun), bar, data)
            f0 = jl.predict(tun, tun.theta0, data)
            assert row[f"output_gap_{split}"] == pytest.approx(np.linalg.norm(f - f_bar), rel=1e-3)
            expected = np.linalg.norm(f - f_bar) / np.linalg.norm(f - f0)
            assert row[f"output_gap_relative_{split}"] == pytest.approx(expected, rel=1e-3)
            assert row[f"kl_{split}"] == pytest.approx(kl_divergence(f, f_bar), rel=1e-2)
            assert row[f"agreement_{split}"] == np.mean(f.argmax(1) == f_bar.argmax(1))
            assert row[f"agreement_f0_{split}"] == np.mean(f.argmax(1) == f0.argmax(1))
            assert row[f"accuracy_{split}"] == np.mean(f.argmax(1) == data["labels"])
            mean = 0.5 * np.mean(np.sum((f - np.eye(3)[data["labels"]]) ** 2, axis=1))
            assert row[f"loss_{split}"] == pytest.approx(mean)


def test_linearized_model_never_moves_a(result):
    comparison, _ = result
    assert all(row["distance_A"] == 0 for row in rows_of(comparison, "linearized"))
    assert all(row["distance_A"] > 0 for row in rows_of(comparison, "full"))
    frozen = rows_of(comparison, "full_A_frozen")
    assert all(row["distance_A"] in (None, 0) and row["parameter_gap_A"] == 0 for row in frozen)


def test_kernel_regression_rows_are_the_limit(result, setting):
    comparison, _ = result
    tun, _, train, held_out = setting
    kernel, cross = jl.ntk(tun, train), jl.ntk(tun, held_out, train)
    f0, f0_eval = jl.predict(tun, tun.theta0, train), jl.predict(tun, tun.theta0, held_out)
    row = rows_of(comparison, "kernel_regression")[1]
    fit = jl.kernel_regression(kernel, np.eye(3)[train["labels"]], f0, row["lam"])
    expected = fit.test(cross, f0_eval)
    mean = 0.5 * np.mean(np.sum((expected - np.eye(3)[held_out["labels"]]) ** 2, axis=1))
    assert row["loss_eval"] == pytest.approx(mean, rel=1e-4)


def test_summary_is_the_spectrum(result, setting):
    comparison, _ = result
    tun, _, train, _ = setting
    mu = np.linalg.eigvalsh(jl.ntk(tun, train).matrix())
    assert comparison.summary["mu_1"] == pytest.approx(mu[-1], rel=1e-6)
    assert comparison.summary["kernel_examples"] == 12
    assert comparison.summary["trace"] == pytest.approx(mu.sum(), rel=1e-6)
    assert 1e-9 < comparison.summary["kernel"]["epsilon_J"] < 1e-5


def test_log_and_progress(result):
    comparison, seen = result
    cached = comparison.summary["linearized_arm"].startswith("Jacobians")
    assert len(seen["rows"]) == 3 * 2 * 6
    assert {row["arm"] for row in seen["rows"]} == {"full", "linearized", "full_A_frozen"}
    assert sum("eval_loss" in row for row in seen["rows"]) == 3 * 2 * 2
    training = [done for phase, done, _ in seen["progress"] if phase == "training"]
    assert training == list(range(1, (2 if cached else 3) * 2 * 6 + 1))
    _, done, total = next(p for p in reversed(seen["progress"]) if p[0] == "Jacobians")
    assert done == total == 19


def test_both_arms_see_the_same_batches(setting):
    tun, _, train, held_out = setting
    comparison = jl.compare(tun, train, held_out, CONFIG, lams=[1e9], linear_mode="cached")
    full, linear = (comparison.results[arm, 1e9].history for arm in ("full", "linearized"))
    # The first batch is met at θ₀, where the two models are equal.
    assert full[0]["loss"] == pytest.approx(linear[0]["loss"], rel=1e-5)


def test_ratios_at_step_0_are_defined(setting):
    tun, _, train, held_out = setting
    comparison = jl.compare(tun, train, held_out, jl.TrainConfig(max_steps=1, learning_rate=1e-30), lams=[0.0])
    (row,) = rows_of(comparison, "full")
    for split in ("eval", "train"):  # infinite on a CPU where the two programs round f₀ differently
        assert row[f"output_gap_relative_{split}"] in (0, float("inf"))
        assert row[f"output_gap_{split}"] < 1e-5
    assert relative(1.0, 0.0) == float("inf")
    assert relative(0.0, 0.0) == 0


def test_kernel_of_a_subset_scales_mu1(setting):
    tun, _, train, held_out = setting
    comparison = jl.compare(tun, train, held_out, CONFIG, lams=[1.0], kernel_examples=5)
    assert comparison.summary["kernel_examples"] == 5
    assert comparison.summary["mu_1"] == pytest.approx(comparison.summary["mu_max"] * 12 / 5)
    (row,) = rows_of(comparison, "kernel_regression")
    assert row["loss_train"] is None  # not trained on all of it
    assert row["loss_eval"] is not None


def test_memory_budget_limits_the_kernel(setting):
    tun, _, train, held_out = setting
    comparison = jl.compare(tun, train, held_out, CONFIG, lams=[1.0], memory_budget=12 * 3 * tun.num_params * 4)
    assert comparison.summary["linearized_arm"] == "jvp at every step"
    assert comparison.summary["kernel_examples"] == 6


def test_scores_leave_blank_what_is_undefined():
    tun, rows = cases.mlp(1), cases.vectors(8)
    data = {**rows, "labels": np.linspace(0, 5, 8)}
    comparison = jl.compare(tun, data, data, jl.TrainConfig(max_steps=2), lams=[1.0])
    (row,) = rows_of(comparison, "full")
    assert row["kl_eval"] is None
    assert row["accuracy_eval"] is None
    assert row["agreement_eval"] is None
    assert row["output_gap_eval"] > 0
    assert row["spearman_eval"] is not None
    (mean,) = rows_of(comparison, "mean_score")
    assert mean["loss_eval"] == pytest.approx(np.var(data["labels"]) / 2)
    assert mean["pearson_eval"] is None
    headings = [column.header for column in score_table(comparison.table, ("pearson", "spearman")).columns]
    assert [heading.split("\n")[0] for heading in headings[2:]] == 2 * ["loss"] + 2 * ["pearson"] + 2 * ["spearman"]
    (_, outputs) = gap_tables(comparison.table)
    assert not any("KL" in column.header or "agree" in column.header for column in outputs.columns)


@pytest.mark.parametrize("metrics", [("accuracy",), ("matthews",), ("accuracy", "f1")])
def test_tables_fit_80_columns(result, metrics):
    comparison, _ = result
    tables = [score_table(comparison.table, metrics), *gap_tables(comparison.table)]
    for table in tables:
        console = Console(width=300, record=True, file=io.StringIO())
        console.print(table)
        lines = [line.rstrip() for line in console.export_text().splitlines()]
        assert max(map(len, lines)) <= 80
        assert not any("…" in line for line in lines)


BAD = {
    "negative": ({"lams": [-1.0]}, r"lams=\[-1.0\]"),
    "empty": ({"lams": []}, "at least one"),
    "twice": ({"lams": [1.0, 1.0]}, "given once"),
    "word": ({"lams": "many"}, "lams='many'"),
    "mode": ({"linear_mode": "fast"}, "linear_mode='fast'"),
    "examples": ({"kernel_examples": 0}, "kernel_examples=0"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_arguments(setting, case):
    tun, _, train, held_out = setting
    options, message = BAD[case]
    with pytest.raises(jl.InputError, match=message):
        jl.compare(tun, train, held_out, CONFIG, **options)


def test_divergence_names_arm_and_lam():
    tun = jl.Tunable(lambda theta, batch: theta["w"] ** 3 * batch["x"][:, :2], {"w": np.float32(1.0)})
    config = jl.TrainConfig(optimizer="sgd", learning_rate=1e12, max_steps=60)
    with pytest.raises(jl.TrainingDivergedError, match="arm 'full' at λ = 0: the loss is"):
        jl.compare(tun, cases.vectors(4), cases.vectors(4), config, lams=[0.0])


def test_kernel_regression_is_the_end_of_coupled_descent_and_absent_elsewhere():
    tun, data = cases.mlp(), cases.vectors(6)
    mu1 = np.linalg.eigvalsh(jl.ntk(tun, data).matrix())[-1]
    config = jl.TrainConfig(optimizer="sgd", learning_rate=6 / (2 * mu1), batch_size=6, max_steps=400)
    ends = jl.compare(tun, data, data, config, lams=np.array([0.3 * mu1]))
    (linear,), (fit,) = rows_of(ends, "linearized"), rows_of(ends, "kernel_regression")
    assert linear["loss_train"] == pytest.approx(fit["loss_train"], rel=1e-4)
    for pull in ("selective", "spd"):
        few = jl.TrainConfig(max_steps=2, pull=pull)
        assert not rows_of(jl.compare(tun, data, data, few, lams=[0.3]), "kernel_regression")


def test_linearizing_late(setting):
    """Against the same by hand; at the last step nothing is left to differ."""
    tun, _, train, held_out = setting
    comparison = jl.compare(tun, train, held_out, CONFIG, lam_rel=[0.0, 0.1], linearize_at=[0, 2, 6])
    for lam in {row["lam"] for row in comparison.table} - {None}:
        rows = {row["linearize_at"]: row for row in comparison.table if row["lam"] == lam}
        assert set(rows) == {0, 2, 6, None}
        assert rows[2]["arm"] == "linearized_at_step_2"
        assert rows[6]["parameter_gap"] == 0
        assert rows[6]["output_gap_eval"] < 1e-4
        assert rows[6]["output_gap_eval"] < rows[2]["output_gap_eval"]
        full = next(row for row in rows_of(comparison, "full") if row["lam"] == lam)
        assert rows[2]["parameter_gap"] < full["parameter_gap"]
        config = dataclasses.replace(CONFIG, lam=lam)
        state = jl.train(tun, train, None, config, keep=[2]).states[2]
        late = jl.linearize(tun, at=state.theta)
        theta = jl.train(late, train, None, config, start=state).theta
        assert rows[2]["distance"] == pytest.approx(distances(theta, tun.theta0)[""], rel=1e-5)
        gap = jl.predict(tun, comparison.results["full", lam].theta, held_out) - jl.predict(late, theta, held_out)
        assert rows[2]["output_gap_eval"] == pytest.approx(np.linalg.norm(gap), rel=1e-3)
    with pytest.raises(jl.InputError, match="linearize_at=7 is no step of this run; expected 0 to 6"):
        jl.compare(tun, train, held_out, CONFIG, linearize_at=[7])


@pytest.mark.slow
@pytest.mark.parametrize("lam_rel", [0.0, 0.3])
def test_kernel_regression_with_factors_by_block_is_the_end_of_descent(lam_rel):
    tun, data = cases.mlp(width=9), cases.vectors(4)
    factors = {"hidden": 0.5, "out": 2.0}
    mu1 = np.linalg.eigvalsh(jl.ntk(tun, data).weighted(factors).matrix())[-1]
    config = jl.TrainConfig(
        optimizer="sgd",
        learning_rate=4 / (2 * mu1),
        batch_size=4,
        max_steps=6000,
        lam_blocks={"hidden": 3.0},
        learning_rate_blocks=factors,
    )
    ends = jl.compare(tun, data, cases.vectors(5, seed=1), config, lams=[lam_rel * mu1])
    (linear,), (fit,) = rows_of(ends, "linearized"), rows_of(ends, "kernel_regression")
    assert linear["loss_eval"] == pytest.approx(fit["loss_eval"], rel=2e-3)
    frozen = dataclasses.replace(config, learning_rate_blocks={"out": 0.0})
    ends = jl.compare(tun, data, cases.vectors(5, seed=1), frozen, lams=[lam_rel * mu1])
    (linear,), (fit,) = rows_of(ends, "linearized"), rows_of(ends, "kernel_regression")
    assert linear["loss_eval"] == pytest.approx(fit["loss_eval"], rel=2e-3)
    if lam_rel:
        adamw = dataclasses.replace(config, optimizer="adam", pull="decoupled", max_steps=2)
        assert not rows_of(jl.compare(tun, data, data, adamw, lams=[1.0]), "kernel_regression")
        free = dataclasses.replace(config, lam_blocks={"hidden": 0.0}, max_steps=2)
        assert not rows_of(jl.compare(tun, data, data, free, lams=[1.0]), "kernel_regression")


def test_factors_of_frozen_parameters_do_not_matter(setting):
    tun, frozen, train, held_out = setting
    config = dataclasses.replace(CONFIG, learning_rate_blocks={"lora_A": 0.5}, max_steps=2)
    comparison = jl.compare(tun, train, held_out, config, lam_rel=[0.1], extra_arms={"full_A_frozen": frozen})
    assert rows_of(comparison, "full_A_frozen")


def test_spd_has_no_unit_of_lam():
    tun, data = cases.mlp(), cases.vectors(6)
    config = jl.TrainConfig(max_steps=2, pull="spd")
    table = jl.compare(tun, data, data, config).table
    assert [row["lam"] for row in table if row["arm"] == "full"] == [0.0, 1e-3, 1e-2, 1e-1, 1.0]
    assert all(row["lam_over_mu1"] is None for row in table)
    with pytest.raises(jl.InputError, match="give lams, not lam_rel"):
        jl.compare(tun, data, data, config, lam_rel=[1.0])


def test_majority_is_the_best_constant_under_each_loss():
    tun, data = cases.mlp(), {**cases.vectors(10), "labels": np.repeat([0, 1], [9, 1])}
    for loss, best in (("squared", 0.5 * (0.9 * 0.02 + 0.1 * 1.62)), ("cross_entropy", 0.325083)):
        comparison = jl.compare(tun, data, data, jl.TrainConfig(max_steps=1, loss=loss), lams=[1.0])
        assert rows_of(comparison, "majority_class")[0]["loss_eval"] == pytest.approx(best, abs=1e-6)


@pytest.mark.slow
def test_the_modes_change_nothing(model):
    """Cached trunk and Jacobians or neither: the same table and the same log to rounding, in the same order."""
    train, held_out = cases.text_batch(9, longest=8), cases.text_batch(5, seed=1, longest=8)
    tun = jl.lora(model, rank=2, layers=[1])
    options = {
        "config": jl.TrainConfig(max_steps=3, batch_size=4, learning_rate=0.01, eval_steps=2),
        "lams": [0.0, 1.0],
    }
    options["extra_arms"] = {"frozen_A": jl.lora(model, rank=2, layers=[1], freeze_A=True)}
    logs, found = [], []
    for trunk_cache, linear_mode in (("off", "streaming"), ("auto", "cached")):
        log = []
        modes = {"trunk_cache": trunk_cache, "linear_mode": linear_mode}
        found.append(jl.compare(tun, train, held_out, **options, **modes, log=log.append))
        logs.append(log)
    assert found[0].summary["trunk_cache"] == "the whole network at every step, as asked for"
    assert "'encoder/layer_0', inclusive; its activations take" in found[1].summary["trunk_cache"]
    assert found[1].summary["linear_mode"] == "Jacobians computed once, as asked for"
    for key in ("full", "frozen_A"):
        assert found[1].results[key, 1.0].theta.keys() == found[0].results[key, 1.0].theta.keys()
    for rows in (logs, [result.table for result in found]):
        for row, other in zip(*rows, strict=True):
            assert list(row) == list(other)
            for name, value in other.items():
                wanted = pytest.approx(value, abs=2e-4, rel=2e-3) if isinstance(value, float) else value
                assert row[name] == wanted, name


@pytest.mark.slow
def test_a_trunk_that_does_not_fit(model):
    """Left out by itself, mapped from a file when it is asked for; words that are none are refused."""
    train, held_out = cases.text_batch(6, longest=8), cases.text_batch(3, seed=1, longest=8)
    options = {"config": jl.TrainConfig(max_steps=1, batch_size=6), "lams": [0.0], "memory_budget": 9000}
    tun = jl.lora(model, rank=1, layers=[1], targets=("query",), train_head=False)
    for trunk_cache, words in (("auto", "more than the budget"), ("on", "on disk, as asked for")):
        assert words in jl.compare(tun, train, held_out, **options, trunk_cache=trunk_cache).summary["trunk_cache"]
    with pytest.raises(jl.InputError, match="trunk_cache='always'"):
        jl.compare(tun, train, held_out, trunk_cache="always")
