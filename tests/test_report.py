"""The report along a run, against dense float64 references."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.flatten_util import ravel_pytree

import jaxlin as jl
from jaxlin.ntk.jacobian import evenly_spread, to_float64
from jaxlin.theory.drift import kernel_alignment, principal_angles, relative_drift, top_eigenspace, widest_gap
from jaxlin.training.report import LAZY, NOT_LAZY, verdict
from jaxlin.training.trainer import TrainState
from tests import cases
from tests.kernels import INFO, kernel_of

CONFIG = jl.TrainConfig(batch_size=4, max_steps=6, learning_rate=0.02)


def brute_angles(a, b, top):
    """Principal angles from the singular values of the product of bases."""
    bases = [np.linalg.eigh(matrix)[1][:, -top:] for matrix in (a, b)]
    return np.arccos(np.clip(np.linalg.svd(bases[0].T @ bases[1], compute_uv=False)[::-1], 0, 1))


@given(seed=st.integers(0, 10**6), top=st.integers(1, 12), scale=st.sampled_from([1e-3, 0.3, 3.0]))
def test_functions_of_two_kernels(seed, top, scale):
    rng = np.random.default_rng(seed)
    jac0 = rng.normal(size=(12, 20))
    jac = jac0 + scale * rng.normal(size=jac0.shape)
    a, b = jac @ jac.T, jac0 @ jac0.T
    kernel, kernel0 = kernel_of(jac, 6), kernel_of(jac0, 6)
    assert relative_drift(kernel, kernel0) == pytest.approx(np.linalg.norm(a - b) / np.linalg.norm(b))
    spectral = np.linalg.norm(a - b, 2) / np.linalg.norm(b, 2)
    assert relative_drift(kernel, kernel0, "spectral") == pytest.approx(spectral)
    assert kernel_alignment(kernel, kernel0) == pytest.approx(np.trace(a @ b) / np.linalg.norm(a) / np.linalg.norm(b))
    mu = np.linalg.eigvalsh(b)[::-1]
    basis, gap = top_eigenspace(kernel0, top)
    np.testing.assert_allclose(basis.T @ b @ basis, np.diag(mu[:top][::-1]), atol=1e-9 * mu[0])
    assert gap == pytest.approx(np.inf if top == 12 else (mu[top - 1] - mu[top]) / mu[0], rel=1e-6)
    found = principal_angles(kernel, kernel0, top)
    assert np.all(np.diff(found) <= 1e-6)  # angles of 0 are so to rounding of their cosine
    np.testing.assert_allclose(found, brute_angles(a, b, top), atol=1e-6)


@given(seed=st.integers(0, 10**6), low=st.integers(1, 14), high=st.integers(1, 14))
def test_the_widest_gap(seed, low, high):
    jac = np.random.default_rng(seed).normal(size=(12, 20))
    mu = np.linalg.eigvalsh(jac @ jac.T)[::-1]
    among = range(low, min(high, 11) + 1)
    expected = max(among, key=lambda k: mu[k - 1] / mu[k]) if among else min(low, 12)
    assert widest_gap(kernel_of(jac, 6), low, high) == expected
    assert widest_gap(kernel_of(jac[:, :5], 6), 3, 8) == 5  # the rank
    assert widest_gap(kernel_of(np.zeros((4, 5)), 2), 2, 4) == 2


def test_of_equal_and_scaled_kernels():
    jac = np.random.default_rng(0).normal(size=(6, 9))
    kernel, double = kernel_of(jac, 3), kernel_of(2**0.5 * jac, 3)
    assert relative_drift(kernel, kernel) == relative_drift(kernel, kernel, "spectral") == 0
    for norm in ("frobenius", "spectral"):
        assert relative_drift(double, kernel, norm) == pytest.approx(1)
    assert kernel_alignment(double, kernel) == pytest.approx(1)
    assert principal_angles(double, kernel, 2).max() < 1e-7


def test_a_kernel_that_vanishes_and_eigenvalues_that_are_tied():
    jac = np.random.default_rng(0).normal(size=(6, 9))
    kernel, zero = kernel_of(jac, 3), kernel_of(np.zeros((6, 9)), 3)
    assert relative_drift(zero, zero) == 0
    assert relative_drift(kernel, zero) == np.inf
    assert relative_drift(zero, kernel) == 1
    assert np.isnan(kernel_alignment(kernel, zero))
    assert np.isnan(principal_angles(kernel, zero, 2)).all()
    twice = kernel_of(np.kron(jac[:3], np.eye(2)), 3)  # every eigenvalue twice
    assert np.isnan(principal_angles(twice, twice, 3)).all()
    assert principal_angles(twice, twice, 4).max() < 1e-7
    coarse = kernel_of(np.kron(jac[:3], np.eye(2)), 3, info=dataclasses.replace(INFO, epsilon_J=0.05))
    assert np.isnan(principal_angles(twice, coarse, 4)).all()


def test_functions_of_two_kernels_refuse():
    jac = np.random.default_rng(0).normal(size=(6, 9))
    kernel = kernel_of(jac, 3)
    bad = {
        "of two sets": (lambda: relative_drift(kernel_of(jac, 3, jac), kernel)),
        "same examples; these are": (lambda: kernel_alignment(kernel_of(jac[:4], 2), kernel)),
        "NaN or infinity": (lambda: principal_angles(kernel_of(jac * np.nan, 3), kernel, 2)),
        "top=7; expected between 1 and 6": (lambda: principal_angles(kernel, kernel, 7)),
        "top=0": (lambda: top_eigenspace(kernel, 0)),
        "norm='nuclear' is unknown; expected one of frobenius, spectral": (
            lambda: relative_drift(kernel, kernel, "nuclear")
        ),
    }
    for message, call in bad.items():
        with pytest.raises(jl.InputError, match=message):
            call()


def run_both(tun, data, keep, config=CONFIG):
    return (jl.train(one, data, None, config, keep=keep) for one in (tun, jl.linearize(tun)))


def flat(theta):
    return np.asarray(ravel_pytree(theta)[0], np.float64)


@jax.jit
def outputs_of(apply, theta, data):
    return apply(theta, data)


def reference(tun, data, theta, other, chosen, top):
    """The row of a step, from dense float64 Jacobians and outputs."""
    with jax.enable_x64(True):
        f, f0 = (
            np.asarray(outputs_of(apply, point, data))
            for apply, point in (to_float64((tun.apply, point)) for point in (theta, tun.theta0))
        )
    n, c = f.shape
    jac0, jac = (cases.reference_jacobian(tun, data, point)[0] for point in (tun.theta0, theta))
    delta, delta_other = (flat(point) - flat(tun.theta0) for point in (theta, other))
    same, trajectory = (np.linalg.norm(f - f0 - (jac0 @ step).reshape(f.shape)) for step in (delta, delta_other))
    rows = (np.arange(n * c).reshape(n, c)[chosen]).reshape(-1)
    k, k0 = jac[rows] @ jac[rows].T, jac0[rows] @ jac0[rows].T
    angles = brute_angles(k, k0, top)
    y = np.eye(c)[data["labels"]]
    aligned = {name: value[chosen].reshape(-1) for name, value in {"targets": y, "residual": f0 - y}.items()}
    return {
        "distance": np.linalg.norm(delta),
        "distance_linearized": np.linalg.norm(delta_other),
        "parameter_gap": np.linalg.norm(delta - delta_other),
        "same_theta_gap": same,
        "same_theta_gap_relative": same / np.linalg.norm(f - f0),
        "trajectory_gap": trajectory,
        "trajectory_gap_relative": trajectory / np.linalg.norm(f - f0),
        "kernel_drift": np.linalg.norm(k - k0) / np.linalg.norm(k0),
        "kernel_drift_spectral": np.linalg.norm(k - k0, 2) / np.linalg.norm(k0, 2),
        "eigenspace_angle": np.degrees(angles.max()),
        "eigenspace_overlap": np.mean(np.cos(angles) ** 2),
        "alignment_kernel0": np.sum(k * k0) / np.linalg.norm(k) / np.linalg.norm(k0),
        **{f"alignment_{name}": v @ k @ v / np.linalg.norm(k) / (v @ v) for name, v in aligned.items()},
    }


PROBLEMS = {
    "mlp": (lambda: cases.mlp(), lambda: cases.vectors(9)),
    "bert": (
        lambda: jl.lora(cases.tiny_model(head="mean"), rank=3, layers=[1]),
        lambda: cases.text_batch(7, longest=8),
    ),
}


@pytest.mark.parametrize("case", ["mlp", pytest.param("bert", marks=pytest.mark.slow)])
def test_a_report_is_that_of_the_dense_reference(case):
    tun, data = (make() for make in PROBLEMS[case])
    full, linear = run_both(tun, data, [0, 2, 6])
    seen = []
    report = jl.linearization_report(
        tun, full, linear, data, kernel_examples=5, top=4, progress=lambda *args: seen.append(args)
    )
    assert seen == [("linearization report", done, 3) for done in (1, 2, 3)]
    chosen = evenly_spread(len(data["labels"]), 5)
    assert report.summary["kernel_examples"] == 5
    assert report.summary["examples"] == len(data["labels"])
    jac0 = cases.reference_jacobian(tun, data)[0]
    rows = np.arange(len(jac0)).reshape(len(data["labels"]), -1)[chosen].reshape(-1)
    mu = np.linalg.eigvalsh(jac0[rows] @ jac0[rows].T)[::-1]
    assert report.summary["eigengap"] == pytest.approx((mu[3] - mu[4]) / mu[0], rel=1e-3)
    assert [row["step"] for row in report.table] == [0, 2, 6]
    for row in report.table[1:]:
        states = [run.states[row["step"]].theta for run in (full, linear)]
        expected = reference(tun, data, *states, chosen, 4)
        assert set(row) == {"step", *expected}
        for name, value in expected.items():
            assert row[name] == pytest.approx(value, rel=2e-3, abs=2e-6), name
    start = report.table[0]
    zero = {name for name in start if "alignment" not in name} - {"eigenspace_overlap"}
    assert {name: start[name] for name in zero if start[name] > 1e-4} == {}
    assert start["same_theta_gap"] == start["trajectory_gap"] == start["kernel_drift"] == 0
    assert start["alignment_kernel0"] == pytest.approx(1)

    alone = jl.linearization_report(tun, full, None, data, [6], kernel_examples=5, top=4)
    (row,) = alone.table
    of_both = {"distance_linearized", "parameter_gap", "trajectory_gap", "trajectory_gap_relative"}
    assert all(row[name] is None for name in of_both)
    assert {name: row[name] for name in set(row) - of_both} == {
        name: report.table[-1][name] for name in set(row) - of_both
    }
    assert "trajectory" in report.verdict
    assert "trajectory" not in alone.verdict


def test_a_linear_model_has_not_moved(float64):
    rng = np.random.default_rng(0)
    tun = jl.Tunable(lambda theta, batch: batch["x"] @ theta["w"], {"w": jnp.asarray(rng.normal(size=(4, 3)))})
    data = cases.vectors(8, num_labels=3)
    full, linear = run_both(tun, data, [3, 6])
    for row in jl.linearization_report(tun, full, linear, data).table:
        assert row["distance"] > 0.01
        for name in ("same_theta_gap", "trajectory_gap", "parameter_gap", "kernel_drift", "kernel_drift_spectral"):
            assert row[name] < 1e-12, name
            assert row["eigenspace_angle"] < 1e-5
        assert row["eigenspace_overlap"] == pytest.approx(1)
        assert row["alignment_kernel0"] == pytest.approx(1)
    report = jl.linearization_report(tun, full, linear, data)
    assert report.summary["top"] == 12  # three outputs of rank four: the widest gap of all
    assert report.verdict.startswith("lazy, steps 3 to 6: relative same-θ gap")
    # Every eigenvalue comes three times: once for each output.
    tied = jl.linearization_report(tun, full, linear, data, top=4)
    assert tied.summary["eigengap"] < 1e-12
    assert all(row["eigenspace_angle"] is None and row["eigenspace_overlap"] is None for row in tied.table)


def test_a_cached_linearized_run_serves_too():
    tun, data = cases.mlp(), cases.vectors(8)
    full, linear = run_both(tun, data, [6])
    compared = jl.compare(tun, data, data, CONFIG, lams=[0.0], linear_mode="cached", track_linearization=[6])
    (expected,) = jl.linearization_report(tun, full, linear, data).table
    (row,) = compared.linearization[0.0].table
    assert (row["lam"], row["lam_over_mu1"]) == (0, 0)
    for name, value in expected.items():
        assert row[name] == pytest.approx(value, rel=1e-3, abs=1e-6), name


def test_compare_tracks_only_what_is_asked_for():
    tun, data = cases.mlp(), cases.vectors(8)
    result = jl.compare(tun, data, data, CONFIG, lam_rel=[0, 1], track_linearization=[0, 3], linearize_at=[2])
    assert [[row["step"] for row in report.table] for report in result.linearization.values()] == [[0, 3]] * 2
    assert [row["lam_over_mu1"] for report in result.linearization.values() for row in report.table] == [0, 0, 1, 1]
    arms = {arm for arm, _ in result.results}
    assert arms == {"full", "linearized", "linearized_at_step_2"}
    assert set(result.results["full", 0.0].states) == {2}
    weak, strong = (report.table[-1] for report in result.linearization.values())
    assert weak["kernel_drift"] > strong["kernel_drift"]
    assert not jl.compare(tun, data, data, CONFIG, lams=[1.0]).linearization
    with pytest.raises(jl.InputError, match="track_linearization=7 is no step of this run; expected 0 to 6"):
        jl.compare(tun, data, data, CONFIG, track_linearization=[7])


def test_one_example_and_a_kernel_that_vanishes():
    tun, data = cases.mlp(1), cases.vectors(1)
    full, linear = run_both(tun, data, [6])
    (row,) = jl.linearization_report(tun, full, linear, data).table
    assert row["eigenspace_angle"] == 0  # of the whole space
    assert row["alignment_kernel0"] == pytest.approx(1)
    assert row["alignment_targets"] == pytest.approx(1)
    # f = w²x at w = 0: no gradient, so that nothing but a push moves it, and the kernel at θ₀ is 0.
    flat_start = jl.Tunable(lambda theta, batch: theta["w"] ** 2 * batch["x"][:, :2], {"w": jnp.float32(0)})
    data = cases.vectors(3)
    run = jl.train(flat_start, data, None, CONFIG, keep=[6])
    report = jl.linearization_report(flat_start, run, None, data)
    (row,) = report.table
    assert row["same_theta_gap"] == row["same_theta_gap_relative"] == row["kernel_drift"] == 0
    undefined = ("eigenspace_angle", "alignment_kernel0", "alignment_targets")
    assert all(row[name] is None for name in undefined)
    assert report.verdict.startswith("lazy or not cannot be told: θ is at θ₀")
    pushed = TrainState({"w": jnp.float32(0.5)}, run.states[6].optimizer, 6)
    report = jl.linearization_report(flat_start, dataclasses.replace(run, states={6: pushed}), None, data)
    (row,) = report.table
    assert row["same_theta_gap_relative"] == pytest.approx(1)
    assert row["kernel_drift"] == row["kernel_drift_spectral"] == np.inf
    assert report.verdict.startswith("not lazy, steps 6 to 6: relative same-θ gap 1, kernel drift inf at most")


def test_the_verdict_is_of_the_largest_number():
    def row(step, *values):
        names = ("same_theta_gap_relative", "trajectory_gap_relative", "kernel_drift")
        return {"step": step, "distance": float(step), **dict(zip(names, values, strict=True))}

    lazy, between, far = LAZY, (LAZY + NOT_LAZY) / 2, NOT_LAZY + 1e-9
    for values, word in {
        (lazy, lazy, lazy): "lazy, steps 1 to 2",
        (lazy, between, lazy): "neither lazy nor far from it, steps",
        (lazy, lazy, far): "not lazy, steps",
        (far, None, lazy): "not lazy, steps",
    }.items():
        first = [None if value is None else 0.0 for value in values]
        assert verdict([row(0, *first), row(1, *values), row(2, *first)]).startswith(word)


BAD = {
    "not kept": ({"steps": [2, 3]}, r"step 3 of the full run was not kept \(kept: 2, 6\); train with keep="),
    "unknown": ({"steps": [-1]}, "step -1 of the full run"),
    "no step": ({"steps": []}, "no step of the full run was kept"),
    "no example": ({"kernel_examples": 0}, "kernel_examples=0; expected at least 1"),
    "top": ({"top": 17}, r"top=17; expected between 1 and 16 \(8 examples × 2 outputs\)"),
    "no eigenvalue": ({"top": 0}, "top=0"),
}


@pytest.fixture(scope="module")
def small():
    tun, data = cases.mlp(), cases.vectors(8)
    full, linear = run_both(tun, data, [2, 6])
    return tun, full, linear, data


@pytest.mark.parametrize("case", BAD)
def test_bad_arguments(small, case):
    options, message = BAD[case]
    with pytest.raises(jl.InputError, match=message):
        jl.linearization_report(*small, **options)


def test_bad_runs(small):
    tun, full, linear, data = small
    late = dataclasses.replace(linear, states={6: linear.states[6]})
    with pytest.raises(jl.InputError, match=r"step 2 of the linearized run was not kept \(kept: 6\)"):
        jl.linearization_report(tun, full, late, data)
    with pytest.raises(jl.InputError, match=r"no step of the full run was kept \(kept: none\)"):
        jl.linearization_report(tun, dataclasses.replace(full, states={}), None, data)
    with pytest.raises(jl.InputError, match="the parameters of the full run must have the structure and shapes"):
        jl.linearization_report(cases.mlp(width=6), full, None, data)
    with pytest.raises(jl.InputError, match="no column 'labels'"):
        jl.linearization_report(tun, full, None, {"x": data["x"]})
    broken = jax.tree.map(lambda leaf: leaf * np.nan, full.states[6].theta)
    nan = TrainState(broken, full.states[6].optimizer, 6)
    with pytest.warns(RuntimeWarning, match="deviates by nan"), pytest.raises(jl.InputError, match="NaN or infinity"):
        jl.linearization_report(tun, dataclasses.replace(full, states={6: nan}), None, data)


def test_movement_below_rounding_tells_nothing():
    tun, data = cases.mlp(), cases.vectors(6)
    config = jl.TrainConfig(optimizer="sgd", learning_rate=1e-7, max_steps=2, batch_size=6)
    run = jl.train(tun, data, config=config, keep=[1, 2])
    report = jl.linearization_report(tun, run, None, data)
    assert [row["same_theta_gap_relative"] for row in report.table] == [None, None]
    assert report.verdict.startswith("lazy, steps 1 to 2: relative kernel drift")
