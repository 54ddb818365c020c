"""Choosing layers: against exhaustive search, against kernels of the smaller Tunable, on data of another half."""

import dataclasses
import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.flatten_util import ravel_pytree

import jaxlin as jl
from jaxlin.data.dataset import as_dataset
from jaxlin.experiments.select_page import caveats, doubts
from jaxlin.ntk.kernel import Kernel, KernelInfo
from jaxlin.peft.config import peft_lora_config
from jaxlin.selection import layer_grid
from jaxlin.theory.criteria import criteria
from jaxlin.theory.selection import SELECTION_CRITERIA, Candidate, Draw, Estimate, Grid, _Sums, lam_curve, search
from tests import cases

INFO = KernelInfo("test", "float64", "float64", "highest", "cpu", 1e-15)
MODULES = ("attention/query", "attention/value", "mlp/up")
TARGETS = ("query", "key", "value", "attention/output", "mlp/up", "mlp/down")


def problem(seed, layers=3, modules=MODULES, n=6, c=2, p=5, head=True, held_out=True):
    """Random block kernels of a grid, with targets that some of the blocks explain."""
    rng = np.random.default_rng(seed)
    cells = {(layer, module): (f"layer_{layer}/{module}",) for layer in range(layers) for module in modules}
    always = ("classifier",) if head else ()
    names = [*always, *(name for blocks in cells.values() for name in blocks)]
    jac = {name: 10.0 ** rng.uniform(-1, 1) * rng.normal(size=(n + 3, c, p)) for name in names}
    parts = {name: np.einsum("icp,jdp->ijcd", j[:n], j[:n]) for name, j in jac.items()}
    across = {name: np.einsum("icp,jdp->ijcd", j[n:], j[:n]) for name, j in jac.items()}
    leaves = {name: (name,) for name in names}
    y = np.eye(c)[rng.integers(0, c, n + 3)]
    y[:2] = np.eye(c)[:2]
    f0 = rng.normal(size=(n + 3, c)) / 10
    draw = Draw(Kernel(parts, True, INFO, leaves), y[:n], f0[:n])
    if held_out:
        draw = dataclasses.replace(
            draw, kernel_eval=Kernel(across, False, INFO, leaves, of_two_sets=True), y_eval=y[n:], f0_eval=f0[n:]
        )
    return [draw], Grid(cells, always, {name: int(rng.integers(3, 30)) for name in names})


def brute_force(draws, grid, criterion, budget):
    """Value of the best candidate, each computed from the kernel of its own sum."""
    best = None
    for layers in itertools.chain.from_iterable(itertools.combinations(grid.layers, k) for k in (1, 2, 3)):
        for modules in itertools.chain.from_iterable(itertools.combinations(grid.modules, k) for k in (1, 2, 3)):
            blocks = [*grid.always, *(grid.cells[cell][0] for cell in itertools.product(layers, modules))]
            if sum(grid.sizes[block] for block in blocks) > budget:
                continue
            (draw,) = draws
            found = criteria(draw.kernel.subset(blocks), draw.y, draw.f0)
            values = dict(found.values)
            outputs = found.fit.test(draw.kernel_eval.subset(blocks), draw.f0_eval)
            values["validation_error"] = np.mean(0.5 * np.sum((outputs - draw.y_eval) ** 2, axis=1))
            value = values[criterion]
            if best is None or (value > best if SELECTION_CRITERIA[criterion] else value < best):
                best = value
    return best


@pytest.mark.parametrize("criterion", SELECTION_CRITERIA)
@settings(max_examples=4)
@given(seed=st.integers(0, 10**6), share=st.sampled_from([0.4, 0.7, 1.0]))
def test_exhaustive_search_and_what_the_greedy_one_claims(criterion, seed, share):
    draws, grid = problem(seed)
    smallest = min(grid.num_params(Candidate((layer,), (module,))) for layer, module in grid.cells)
    budget = max(smallest, int(share * sum(grid.sizes.values())))
    whole = search(draws, grid, criterion, budget=budget)
    assert whole.method == "exhaustive"
    assert whole.gap == 0
    expected = brute_force(draws, grid, criterion, budget)
    assert whole.ranked[0].values[criterion] == pytest.approx(expected, rel=1e-9)
    values = [one.values[criterion] for one in whole.ranked]
    assert values == sorted(values, reverse=SELECTION_CRITERIA[criterion])

    limit = 1 if len(whole.ranked) > 1 else 0
    if not limit:
        return
    greedy = search(draws, grid, criterion, budget=budget, exhaustive_limit=limit)
    assert greedy.method == "greedy"
    assert all(one.num_params <= budget for one in (*whole.ranked, *greedy.ranked))
    found = greedy.ranked[0].values[criterion]
    if greedy.bound is None:
        assert greedy.gap is None
        assert "not bounded" in greedy.optimality
    else:  # the optimum lies between what was found and the bound
        low, high = sorted((found, greedy.bound))
        assert low - 1e-9 * abs(low) <= expected <= high + 1e-9 * abs(high)
        assert greedy.gap == pytest.approx(abs(found - greedy.bound))


@pytest.mark.parametrize("lam", [None, 3.0])
@given(seed=st.integers(0, 10**6))
def test_bounds_on_the_optimum_of_functions_of_lambda(lam, seed):
    draws, grid = problem(seed)
    for criterion in ("effective_dimension", "regularized_condition_number"):
        whole = search(draws, grid, criterion, lam=lam)
        greedy = search(draws, grid, criterion, lam=lam, exhaustive_limit=1)
        if criterion == "effective_dimension" and lam is None:
            assert greedy.bound is None
            continue
        best = whole.ranked[0].values[criterion]
        bound = greedy.bound
        assert best <= bound * (1 + 1e-9) if SELECTION_CRITERIA[criterion] else best >= bound * (1 - 1e-9)


def test_forward_and_exchange_mostly_finds_the_optimum():
    hits = 0
    for seed in range(20):
        draws, grid = problem(seed)
        budget = sum(grid.sizes.values()) // 2
        whole, greedy = (
            search(draws, grid, "leave_one_out_error", budget=budget, exhaustive_limit=limit) for limit in (512, 1)
        )
        assert len(greedy.ranked) <= len(whole.ranked)
        hits += greedy.ranked[0].candidate == whole.ranked[0].candidate
    assert hits >= 15


def test_draws_are_averaged():
    (one, grid), (other, _) = problem(1), problem(2)
    draws = [*one, *other]
    found = search(draws, grid, "condition_number").ranked
    for scored in found[:5]:
        kappas = [values["condition_number"] for values in scored.by_draw]
        assert scored.values["condition_number"] == pytest.approx(np.prod(kappas) ** 0.5)
        errors = [values["leave_one_out_error"] for values in scored.by_draw]
        assert scored.values["leave_one_out_error"] == pytest.approx(np.mean(errors))


def test_sums_equal_subsets():
    (draw,), grid = problem(3)
    sums = _Sums(draw.kernel, grid)
    for candidate in grid.candidates(np.inf):
        np.testing.assert_allclose(
            sums.of(candidate).array, draw.kernel.subset(grid.blocks(candidate)).array, rtol=1e-12
        )
    assert len(list(grid.candidates(np.inf))) == 49


def test_ragged_grids_hold_only_what_is_there():
    cells = {(0, "query"): ("a",), (1, "query"): ("b",), (1, "value"): ("c",)}
    grid = Grid(cells, (), {"a": 1, "b": 2, "c": 3})
    found = {(one.layers, one.modules) for one in grid.candidates(np.inf)}
    assert found == {((0,), ("query",)), ((1,), ("query",)), ((0, 1), ("query",)), ((1,), ("value",))} | {
        ((1,), ("query", "value"))
    }
    assert {(one.layers, one.modules) for one in grid.candidates(2)} == {((0,), ("query",)), ((1,), ("query",))}


def test_labels_of_candidates():
    assert Candidate((0, 2, 3, 4), ("attention/query", "mlp/up")).label == "layers 0, 2–4: query, mlp/up"
    assert Candidate((7,), ("attention/value",)).label == "layer 7: value"


@pytest.mark.parametrize(("draws", "spread"), [(1, 0.0), (10, 0.1)])
def test_an_interval_covers_as_often_as_it_says(draws, spread):
    rng = np.random.default_rng(0)
    covered = 0
    for seed in range(200):
        of_draw = 0.7 + spread * rng.uniform(-1, 1, size=(draws, 1))
        found = Estimate.of((rng.uniform(size=(draws, 80)) < of_draw).astype(float), resamples=400, seed=seed)
        covered += found.low <= 0.7 <= found.high
        assert found.low <= found.value <= found.high
        assert found.value == pytest.approx(np.mean(found.by_draw))
    assert 0.9 <= covered / 200 <= 0.995


def test_an_interval_holds_the_spread_over_draws():
    draws = np.random.default_rng(0).normal(size=40)
    found = Estimate.of(np.repeat(draws[:, None], 7, axis=1))  # examples are alike: only draws vary
    half = 1.96 * draws.std() / 40**0.5
    assert (found.value - found.low, found.high - found.value) == pytest.approx((half, half), rel=0.1)
    values = np.random.default_rng(1).normal(size=(1, 50))
    found = Estimate.of(values, seed=3)
    means = values[0][np.random.default_rng(3).integers(50, size=(2000, 50))].mean(axis=1)
    assert (found.low, found.high) == pytest.approx(tuple(np.quantile(means, [0.025, 0.975])))


def test_curve_of_lambda_is_that_of_the_regressions():
    (draw,), _ = problem(4)
    fit = jl.kernel_regression(draw.kernel, draw.y, draw.f0, 0.0)
    for row in lam_curve([fit], [1e-3, 1.0]):
        at = jl.kernel_regression(draw.kernel, draw.y, draw.f0, row["lam_rel"] * fit.eigenvalues[-1])
        assert row["leave_one_out_error"] == pytest.approx(np.mean(0.5 * np.sum((at.leave_one_out() - at.y) ** 2, 1)))
        assert row["log_marginal_likelihood"] == pytest.approx(at.log_marginal_likelihood())


# On a real transformer.


def tunable(seed=0, **options):
    return jl.lora(cases.tiny_model(2, head="mean"), 2, 6, rng=seed, **{"targets": TARGETS, **options})


def chosen(candidate, seed=0):
    """The Tunable of a candidate alone."""
    return tunable(seed, targets=candidate.modules, layers=candidate.layers)


@pytest.fixture(scope="module")
def batch():
    return cases.text_batch(24, num_labels=2)


@pytest.fixture(scope="module")
def y(batch):
    """What a linearized model that moves value and mlp/up of layer 1 would answer."""
    tun = tunable()
    rng = np.random.default_rng(0)
    kernel = jl.ntk(tun, batch, blocks="module", check_examples=0)
    part = kernel.subset(["encoder/layer_1/attention/value", "encoder/layer_1/mlp/up"]).matrix()
    outputs = (part @ rng.normal(size=len(part))).reshape(-1, 2)
    difference = outputs[:, 0] - outputs[:, 1]
    return np.eye(2)[(difference > np.median(difference)).astype(int)]


@pytest.fixture(scope="module")
def report(batch, y):
    options = {"criterion": "leave_one_out_error", "budget": 900, "draws": 2, "lipschitz": 2.0}
    return jl.select_layers(tunable, batch, y, **options)


@pytest.mark.slow
def test_block_sums_equal_kernels_of_the_smaller_tunable(batch):
    kernel = jl.ntk(tunable(), batch, blocks="module", check_examples=0)
    grid = layer_grid(tunable())
    assert grid.layers == (0, 1)
    assert set(grid.modules) == {*(f"attention/{name}" for name in ("query", "key", "value", "output")), *TARGETS[-2:]}
    candidate = Candidate((0, 1), ("attention/value", "mlp/down"))
    small = chosen(candidate)
    assert grid.num_params(candidate) == small.num_params
    expected = jl.ntk(small, batch, check_examples=0).matrix()
    assert cases.relative_error(kernel.subset(grid.blocks(candidate)).matrix(), expected) < 1e-5
    assert layer_grid(tunable(train_head=False)).always == ()


@pytest.mark.slow
def test_h_is_sampled_of_what_is_chosen(batch, y, report):
    options = {"criterion": "leave_one_out_error", "budget": 900, "draws": 1, "lipschitz_directions": 2}
    found = jl.select_layers(tunable, batch, y, **options)
    small = chosen(found.choice)
    jac, _ = cases.reference_jacobian(small, batch)
    f0 = jl.predict(small, small.theta0, batch)
    fit = jl.kernel_regression(jl.ntk(small, batch, check_examples=0), y, f0, found.lam)
    flat, unravel = ravel_pytree(small.theta0)
    theta = unravel(flat + (jac.T @ fit.coefficients().reshape(-1)).astype(np.float32))
    at_ridge = np.linalg.norm(cases.reference_jacobian(small, batch, theta)[0] - jac, 2) / found.trust.distance
    assert found.trust.lipschitz >= at_ridge * (1 - 1e-3)
    h, distance, movement = found.trust.lipschitz, found.trust.distance, found.trust.movement
    assert found.trust.gap_bound == pytest.approx(h / 2 * distance**2 / movement)
    assert found.trust.measured_gap <= found.trust.gap_bound
    assert found.trust.lipschitz_is_sampled
    profile = jl.lipschitz_profile(small, batch, [found.trust.distance], directions=2, along=[theta])
    assert h == pytest.approx(profile.largest(), rel=1e-3)


@pytest.mark.slow
def test_the_report(report, batch, y):
    assert report.num_params <= 900
    assert (report.draws, report.examples) == (2, 24)
    assert all(row["num_params"] <= 900 for row in report.table)
    # Its numbers, from the smaller Tunables themselves.
    errors, hits, tops, distances, gaps, bounds = [], [], [], [], [], []
    for seed in range(2):
        small = chosen(report.choice, seed)
        f0 = jl.predict(small, small.theta0, batch)
        fit = jl.kernel_regression(jl.ntk(small, batch, check_examples=0), y, f0, report.lam)
        held = fit.leave_one_out()
        errors.append(np.mean(0.5 * np.sum((held - y) ** 2, axis=1)))
        hits.append(np.mean(held.argmax(axis=1) == y.argmax(axis=1)))
        tops.append(fit.eigenvalues[-1])
        jac, _ = cases.reference_jacobian(small, batch)
        delta = jac.T @ fit.coefficients().reshape(-1)
        flat, unravel = ravel_pytree(small.theta0)
        moved = (jac @ delta).reshape(f0.shape)
        outputs = jl.predict(small, unravel(flat + delta.astype(np.float32)), batch)
        distances.append(np.linalg.norm(delta))
        gaps.append(np.linalg.norm(outputs - f0 - moved) / np.linalg.norm(moved))
        bounds.append(np.sum(delta**2) / np.linalg.norm(moved))  # H/2 is 1
    assert small.num_params == report.num_params
    np.testing.assert_allclose(report.loss.by_draw, errors, rtol=1e-3)
    np.testing.assert_allclose(report.accuracy.by_draw, hits, atol=0.05)
    assert report.lam == pytest.approx(report.lam_rel * np.mean(tops), rel=1e-4)
    assert report.learning_rate == pytest.approx(2 / (max(tops) + report.lam), rel=1e-4)
    assert report.learning_rate_mean == pytest.approx(24 * report.learning_rate)
    assert report.trust.distance == pytest.approx(np.mean(distances), rel=1e-3)
    assert report.trust.measured_gap == pytest.approx(max(gaps), rel=2e-2)
    assert report.trust.lipschitz == 2.0
    sampled = dataclasses.replace(report, trust=dataclasses.replace(report.trust, lipschitz_is_sampled=True))
    assert ["sampled supremum" in " ".join(caveats(one, 0)) for one in (report, sampled)] == [False, True]
    assert report.trust.gap_bound == pytest.approx(max(bounds), rel=1e-3)
    assert [row["tuned"] for row in report.references] == ["chosen", "runner-up", "everything", "always tuned only"]
    assert all(row["low"] <= row["loss_minus_choice"] <= row["high"] for row in report.references)
    assert report.references[0]["loss_minus_choice"] == 0
    assert report.references[0]["loss"] == pytest.approx(report.loss.value, rel=1e-3)
    assert report.criteria_lam_rel == report.references[2]["lam_over_mu1"]
    whole, head = (tunable() if head is None else jl.head_only(cases.tiny_model(2, head="mean")) for head in (None, 1))
    assert whole.num_params == report.references[2]["num_params"]
    assert head.num_params == report.references[3]["num_params"]
    traces = [
        [np.trace(jl.ntk(one, batch, check_examples=0).matrix()) for one in (head, chosen(report.choice, seed))]
        for seed in range(2)
    ]
    assert report.always_share == pytest.approx(np.mean([part / all_of for part, all_of in traces]), rel=1e-4)
    assert {row["criterion"] for row in report.by_criterion} == set(SELECTION_CRITERIA) - {"validation_error"}
    assert report.peft_config("bert")["r"] == 2
    assert report.peft_config("bert")["lora_alpha"] == 6
    assert report.peft_config("t5") is None
    assert report.to_dict()["summary"]["layers"] == list(report.choice.layers)


@pytest.mark.slow
def test_contrasts_of_a_frozen_head_whose_columns_sum_to_zero(batch, y):
    model = jl.probe_head(cases.tiny_model(2, head="mean"), batch, np.eye(2)[batch["labels"]])
    tun = jl.lora(model, 8, 8, targets=TARGETS, train_head=False)
    some = as_dataset(batch).take(np.arange(8))
    plain, seen = (
        jl.select_layers(tun, some, y[:8], budget=1100, contrasts=contrasts, lam_by="marginal_likelihood")
        for contrasts in (False, True)
    )
    assert all(row["condition_number_is_bound"] for row in plain.table)
    assert not any(row["condition_number_is_bound"] for row in seen.table)
    small = jl.lora(model, 8, 8, targets=seen.choice.modules, layers=seen.choice.layers, train_head=False)
    mu = np.linalg.eigvalsh(jl.ntk(small, some, check_examples=0).matrix())[8:]
    assert seen.table[0]["condition_number"] == pytest.approx(mu[-1] / mu[0], rel=1e-2)
    q = np.array([[1.0], [-1.0]]) / 2**0.5
    kernel, f0 = jl.ntk(small, some, check_examples=0).contrasts(), jl.predict(small, small.theta0, some)
    fit = jl.kernel_regression(kernel, y[:8] @ q, f0 @ q, seen.lam)
    held = fit.leave_one_out()
    assert seen.loss.value == pytest.approx(np.mean(0.5 * (held - y[:8] @ q) ** 2), rel=1e-3)
    right = (held[:, 0] > 0) == ((y[:8] @ q)[:, 0] > 0)
    assert seen.accuracy.value == pytest.approx(right.mean())
    jac, _ = cases.reference_jacobian(small, some)
    delta = jac.T @ (fit.coefficients() @ q.T).reshape(-1)
    flat, unravel = ravel_pytree(small.theta0)
    moved = (jac @ delta).reshape(8, 2) @ q
    outputs = jl.predict(small, unravel(flat + delta.astype(np.float32)), some) @ q
    assert seen.trust.measured_gap == pytest.approx(
        np.linalg.norm(outputs - f0 @ q - moved) / np.linalg.norm(moved), rel=2e-2
    )


def test_the_rate_is_that_of_all_outputs():
    """A layer that moves both outputs alike is no contrast's, but makes training steeper."""
    x, y = np.random.default_rng(0).normal(size=(10, 3)).astype(np.float32), np.eye(2)[np.arange(10) % 2]
    theta = {"layer_0": {"w": np.zeros((3, 2), np.float32), "v": np.zeros((3, 1), np.float32)}}
    tun = jl.Tunable(lambda t, b: b["x"] @ t["layer_0"]["w"] + np.float32(3) * (b["x"] @ t["layer_0"]["v"]), theta)
    found = jl.select_layers(tun, {"x": x}, y, criterion="mu_max", contrasts=True)
    top = np.linalg.eigvalsh(x.astype(float) @ x.T)[-1]
    assert found.lam == pytest.approx(found.lam_rel * top, rel=1e-4)  # of contrasts
    assert found.learning_rate == pytest.approx(2 / ((1 + 2 * 9) * top + found.lam), rel=1e-4)


def test_a_candidate_that_vanishes_comes_last():
    """Without held-out examples too; everything is here what the runner-up is, or the choice."""
    x, y = np.random.default_rng(0).normal(size=(10, 3)).astype(np.float32), np.eye(2)[np.arange(10) % 2]
    theta = {f"layer_{i}": {"w": np.full((3, 2), 0.1, np.float32)} for i in range(2)}
    tun = jl.Tunable(lambda t, b: b["x"] @ t["layer_0"]["w"] + 0 * b["x"] @ t["layer_1"]["w"], theta)
    for options in ({}, {"x_eval": {"x": x}, "y_eval": y}):
        found = jl.select_layers(tun, {"x": x}, y, **options)
        assert [row["layers"] for row in found.table] == ["0", "0 1", "1"]
        assert np.isnan(found.table[-1]["trace"])
        assert len({frozenset(row) for row in found.table}) == 1
        assert ("validation_error" in found.table[0]) == bool(options)
        assert [row["tuned"] for row in found.references] == ["chosen", "everything"]
    singles = jl.select_layers(tun, {"x": x}, y, budget=6)
    assert [row["layers"] for row in singles.table] == ["0", "1"]
    alone = jl.select_layers(
        jl.Tunable(lambda t, b: b["x"] @ t["layer_0"]["w"], {"layer_0": theta["layer_0"]}), {"x": x}, y
    )
    assert [row["tuned"] for row in alone.references] == ["chosen"]
    assert "everything" not in " ".join(doubts(alone))


def test_a_choice_made_on_one_half_serves_on_the_other():
    """Four layers that read columns of their own; the labels depend on those of layer 2."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(120, 4, 5)).astype(np.float32)
    labels = (x[:, 2] @ rng.normal(size=5) > 0).astype(int)
    theta = {f"layer_{i}": {"w": np.zeros((5, 2), np.float32)} for i in range(4)}
    tun = jl.Tunable(lambda t, b: sum(b["x"][:, i] @ t[f"layer_{i}"]["w"] for i in range(4)), theta)
    data, y, (first, second) = as_dataset({"x": x}), np.eye(2)[labels], (np.arange(0, 120, 2), np.arange(1, 120, 2))
    for criterion in ("leave_one_out_error", "log_marginal_likelihood", "alignment", "validation_error"):
        found = jl.select_layers(
            tun, data.take(first), y[first], criterion=criterion, budget=20, x_eval=data.take(second), y_eval=y[second]
        )
        assert 2 in found.choice.layers
        assert len(found.table) == 10  # one or two of four layers
        assert found.eval_accuracy.examples == 60
        assert found.eval_accuracy.value > 0.8
    kernel, f0 = jl.ntk(tun, data.take(second), check_examples=0), np.zeros((60, 2))
    errors = {
        layers: criteria(kernel.subset([f"layer_{i}" for i in layers]), y[second], f0).values["leave_one_out_error"]
        for layers in [*itertools.combinations(range(4), 1), *itertools.combinations(range(4), 2)]
    }
    assert errors[found.choice.layers] <= sorted(errors.values())[3]  # one of the four that hold layer 2
    without = [error for layers, error in errors.items() if 2 not in layers]
    assert errors[found.choice.layers] < min(without)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"y": np.ones((24, 3))}, r"y has shape \(24, 3\); expected \(examples, outputs\) = \(24, 2\)"),
        ({"y": np.tile([1.0, 0.0], (24, 1))}, "all 24 examples have the one target"),
        ({"y": np.full((24, 2), np.nan)}, "y holds NaN"),
        ({"budget": 10}, "budget=10: the smallest candidate tunes 194 parameters, 66 of them always"),
        ({"criterion": "kappa"}, "criterion='kappa' is unknown"),
        ({"criterion": "validation_error"}, "needs held-out examples"),
        ({"lam": 0.0}, "lam=0.0; expected above 0"),
        ({"lam_by": "luck"}, "lam_by='luck' is unknown"),
        ({"lipschitz": -1.0}, "lipschitz=-1.0"),
        ({"lipschitz_directions": -1}, "lipschitz_directions=-1"),
        ({"exhaustive_limit": 0}, "exhaustive_limit=0"),
        ({"y_eval": np.ones((3, 2))}, "belong together"),
        ({"tun": tunable, "draws": 0}, "draws=0"),
        ({"tun": []}, "no Tunable is given"),
    ],
)
def test_bad_input(batch, y, change, message):
    options = {"tun": tunable(), "x": batch, "y": y, **change}
    with pytest.raises(jl.InputError, match=message):
        jl.select_layers(options.pop("tun"), options.pop("x"), options.pop("y"), **options)


def test_degenerate_models(batch, y):
    other = jl.lora(cases.tiny_model(2, head="mean"), rank=3, targets=TARGETS)
    with pytest.raises(jl.InputError, match="draws tune different parameters"):
        jl.select_layers([tunable(), other], batch, y)
    with pytest.raises(jl.InputError, match="no layers to choose from"):
        jl.select_layers(jl.head_only(cases.tiny_model(2, head="mean")), batch, y)
    data = {"x": np.ones((4, 3), np.float32)}
    targets = np.eye(2)[[0, 1, 0, 1]]
    theta = {"layer_0": {"w": np.zeros((3, 2), np.float32)}}
    with pytest.raises(jl.InputError, match="the kernel of all that may be tuned vanishes"):
        jl.select_layers(jl.Tunable(lambda t, b: 0.0 * b["x"] @ t["layer_0"]["w"], theta), data, targets)
    broken = jl.Tunable(lambda t, b: b["x"] @ t["layer_0"]["w"] / 0.0, theta)
    with pytest.raises((jl.InputError, FloatingPointError)):
        jl.select_layers(broken, data, targets, check_examples=0)


def test_repeated_rows_and_more_outputs_than_parameters():
    data = {"x": np.repeat(np.random.default_rng(0).normal(size=(4, 3)), 3, axis=0).astype(np.float32)}
    theta = {f"layer_{i}": {"w": np.full((3, 2), 0.1, np.float32)} for i in range(2)}
    tun = jl.Tunable(lambda t, b: b["x"] @ t["layer_0"]["w"] + np.float32(2) * b["x"] @ t["layer_1"]["w"], theta)
    targets = np.eye(2)[np.arange(12) % 2]
    found = jl.select_layers(tun, data, targets)
    assert len(found.table) == 3
    assert all(row["condition_number_is_bound"] for row in found.table)
    assert found.trust.measured_gap < 1e-5  # it is linear
    assert found.peft_config("bert") is None


@pytest.mark.parametrize("family", ["bert", "roberta", "distilbert", "electra", "llama", "gpt2"])
def test_peft_names_pick_exactly_what_is_meant(family):
    from jaxlin.models.families import FAMILIES

    names = FAMILIES[family].modules
    ours = {
        (FAMILIES[family].prefix + theirs).replace("{i}", str(i)): path.replace("{i}", str(i))
        for theirs, path in names.items()
        for i in (0, 1)
    }
    stem = "decoder" if FAMILIES[family].is_decoder else "encoder"
    whole = tuple(path.removeprefix(f"{stem}/layer_{{i}}/") for path in names.values() if "{i}" in path)
    modules = [module for module in whole if not module.endswith("norm")]
    for size in (1, 2, min(6, len(modules))):
        for chosen in itertools.combinations(modules, size):
            config = peft_lora_config([1], chosen, 8, 16, family)
            targets = config["target_modules"]
            # As peft's `check_target_module_exists` finds them.
            hit = {theirs for theirs in ours if any(theirs == t or theirs.endswith(f".{t}") for t in targets)}
            if "layers_to_transform" in config:
                assert config["layers_to_transform"] == [1]
                hit = {theirs for theirs in hit if f".{config['layers_pattern']}.1." in theirs}
            assert {ours[theirs] for theirs in hit} == {f"{stem}/layer_1/{module}" for module in chosen}
    query = peft_lora_config([1], ["attention/query"], 8, 16, family)
    if family == "gpt2":  # whose c_attn is query, key and value at once
        assert query is None
    else:
        assert query["target_modules"] == [{"distilbert": "q_lin", "llama": "q_proj"}.get(family, "query")]
    assert peft_lora_config([0], ["no/such"], 8, 16, family) is None
