"""Kernel logistic regression against minimisation in parameter space."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import log_softmax
from sklearn.linear_model import LogisticRegression

import jaxlin as jl
from jaxlin.training.losses import to_mean
from tests import cases
from tests.kernels import alike, each_alone, kernel_of


def problem(seed, n=7, c=3, p=25, repeated=False):
    rng = np.random.default_rng(seed)
    jac, jac_test = rng.normal(size=(n * c, p)), rng.normal(size=(4 * c, p))
    if repeated:
        jac[c : 2 * c] = jac[:c]
    return jac, jac_test, rng.normal(size=(n, c)), rng.normal(size=(4, c)), rng.integers(0, c, n)


def objective(jac, f0, labels, lam):
    """The objective and its gradient as functions of δ."""
    rows = np.arange(len(labels))

    def function(delta):
        log_p = log_softmax(f0 + (jac @ delta).reshape(f0.shape), axis=1)
        slope = np.exp(log_p)
        slope[rows, labels] -= 1
        return -log_p[rows, labels].sum() + lam / 2 * delta @ delta, jac.T @ slope.reshape(-1) + lam * delta

    return function


def newton(jac, f0, labels, lam, steps=60):
    """δ by plain Newton steps with the dense Hessian in parameter space, by least squares, started by BFGS."""
    function = objective(jac, f0, labels, lam)
    delta = scipy.optimize.minimize(function, np.zeros(jac.shape[1]), jac=True, method="BFGS").x
    for _ in range(steps):
        p = np.exp(log_softmax(f0 + (jac @ delta).reshape(f0.shape), axis=1))
        hessian = lam * np.eye(len(delta))
        for block, q in zip(jac.reshape(*f0.shape, -1), p, strict=True):
            hessian += block.T @ (np.diag(q) - np.outer(q, q)) @ block
        delta = delta - np.linalg.lstsq(hessian, function(delta)[1], rcond=1e-12)[0]
    assert np.linalg.norm(function(delta)[1]) < 1e-9
    return delta


@pytest.mark.parametrize("p", [25, 5], ids=["P > m", "P < m"])
@pytest.mark.parametrize("c", [2, 3])
@given(seed=st.integers(0, 10**6), lam=st.sampled_from([1e-2, 1.0, 30.0]), repeated=st.booleans(), far=st.booleans())
def test_minimiser_equals_that_in_parameter_space(p, c, seed, lam, repeated, far):
    jac, jac_test, f0, f0_test, labels = problem(seed, c=c, p=p, repeated=repeated)
    f0 = 20 * f0 if far else f0  # saturated at the start
    fit = jl.kernel_logistic_regression(kernel_of(jac, 7), labels, f0, lam)
    delta, function = newton(jac, f0, labels, lam), objective(jac, f0, labels, lam)
    found = jac.T @ fit.alpha.reshape(-1)
    np.testing.assert_allclose(found, delta, atol=1e-6)
    np.testing.assert_allclose(fit.outputs, f0 + (jac @ delta).reshape(f0.shape), atol=1e-5)
    np.testing.assert_allclose(fit.alpha.sum(1), 0, atol=1e-8)
    assert fit.objective == pytest.approx(function(delta)[0], rel=1e-9)
    assert fit.distance == pytest.approx(np.linalg.norm(delta), abs=1e-6)
    tolerance = 1e-9 * np.linalg.norm(jac, 2)
    assert fit.gradient_norm <= tolerance
    assert np.linalg.norm(function(found)[1]) <= 2 * tolerance
    test = fit.test(kernel_of(jac_test, 4, jac), f0_test)
    np.testing.assert_allclose(test, f0_test + (jac_test @ delta).reshape(f0_test.shape), atol=1e-5)


def test_gradient_by_finite_differences():
    jac, _, f0, _, labels = problem(3)
    fit = jl.kernel_logistic_regression(kernel_of(jac, 7), labels, f0, 0.5, tolerance=1e-2)
    delta, function = jac.T @ fit.alpha.reshape(-1), objective(jac, f0, labels, 0.5)
    slopes = [(function(delta + 1e-5 * e)[0] - function(delta - 1e-5 * e)[0]) / 2e-5 for e in np.eye(len(delta))]
    assert 1e-6 < fit.gradient_norm <= 1e-2 * np.linalg.norm(jac, 2)
    assert fit.gradient_norm == pytest.approx(np.linalg.norm(slopes), rel=1e-5)


def test_equals_scikit_learn():
    """A linear model without bias on features: J is features ⊗ I_C."""
    rng = np.random.default_rng(0)
    x, labels = rng.normal(size=(30, 4)), rng.integers(0, 3, 30)
    theirs = LogisticRegression(C=1 / 0.7, fit_intercept=False, tol=1e-12, max_iter=10_000).fit(x, labels)
    zero = np.zeros((30, 3))
    test = rng.normal(size=(5, 4))
    expected = log_softmax(theirs.decision_function(test), axis=1)
    jac = np.kron(x, np.eye(3))
    for kernel, cross in (
        (kernel_of(jac, 30), kernel_of(np.kron(test, np.eye(3)), 5, jac)),
        (alike(x @ x.T), alike(test @ x.T, False)),
        (each_alone(x @ x.T, 3), each_alone(test @ x.T, 3, False)),
    ):
        fit = jl.kernel_logistic_regression(kernel, labels, zero, 0.7)
        np.testing.assert_allclose(log_softmax(fit.test(cross, np.zeros((5, 3))), axis=1), expected, atol=1e-6)
        by_hand = jl.kernel_logistic_regression(kernel_of(jac, 30), labels, zero, 0.7)
        np.testing.assert_allclose(fit.outputs, by_hand.outputs, atol=1e-9)
        assert fit.loss == pytest.approx(-log_softmax(theirs.decision_function(x), axis=1)[range(30), labels].sum())


def conflicting(c):
    """Few parameters and every input with every label: no direction separates anything."""
    rng = np.random.default_rng(1)
    one = rng.normal(size=(4 * c, 3))
    jac = np.tile(one.reshape(4, c, 3), (c, 1, 1)).reshape(-1, 3)
    return jac, np.tile(rng.normal(size=(4, c)), (c, 1)), np.repeat(np.arange(c), 4)


@pytest.mark.parametrize("c", [2, 3])
@pytest.mark.parametrize("invariant", [False, True])
def test_without_ridge_where_there_is_a_minimiser(c, invariant):
    jac, f0, labels = conflicting(c)
    if invariant:  # a parameter that shifts all logits alike, one that does nothing, and one twice
        jac = np.concatenate([jac, np.ones((len(jac), 1)), np.zeros((len(jac), 1)), jac[:, :1]], axis=1)
    fit = jl.kernel_logistic_regression(kernel_of(jac, len(f0)), labels, f0, 0.0)
    delta = newton(jac, f0, labels, 0.0)
    seen = (jac.reshape(*f0.shape, -1) - jac.reshape(*f0.shape, -1).mean(1, keepdims=True)).reshape(jac.shape)
    shortest = np.linalg.pinv(seen) @ (seen @ delta)
    np.testing.assert_allclose(jac.T @ fit.alpha.reshape(-1), shortest, atol=1e-7)
    np.testing.assert_allclose(fit.outputs, f0 + (jac @ shortest).reshape(f0.shape), atol=1e-6)
    small = jl.kernel_logistic_regression(kernel_of(jac, len(f0)), labels, f0, 1e-7)
    np.testing.assert_allclose(fit.outputs, small.outputs, atol=1e-5)


def line(inputs, labels):
    """A slope and a bias on one input, two classes."""
    x = np.asarray(inputs, float)
    jac = np.kron(np.stack([x, np.ones(len(x))], 1), np.array([[-1.0], [1.0]]))
    return kernel_of(jac, len(x)), np.asarray(labels), np.zeros((len(x), 2))


def test_without_ridge_on_separable_data_there_is_none():
    jac, _, f0, _, labels = problem(0, p=25)
    complete = line([-2, -1, 1, 2], [0, 0, 1, 1])
    quasi = line([-2, 0, 0, 2], [0, 0, 1, 1])  # the two in the middle stay as they are
    one_class = line([-2, 0, 1], [1, 1, 1])
    for kernel, y, start in ((kernel_of(jac, 7), labels, f0), complete, quasi, one_class):
        with pytest.raises(jl.InputError, match=r"no minimiser at ridge=0.*take ridge > 0"):
            jl.kernel_logistic_regression(kernel, y, start, 0.0)
        assert jl.kernel_logistic_regression(kernel, y, start, 1e-6).loss < 2  # and it exists with one
    overlapping = line([-2, -1, 1, 2], [0, 1, 0, 1])
    fit = jl.kernel_logistic_regression(*overlapping, 0.0)
    assert fit.gradient_norm < 1e-8


@given(seed=st.integers(0, 10**6))
def test_the_linear_program_decides_as_angles_do(seed):
    """Two classes on a plane without bias: separable in the wide sense where some half-plane holds every margin."""
    rng = np.random.default_rng(seed)
    x, labels = rng.normal(size=(5, 2)), rng.integers(0, 2, 5)
    signed = x * (2 * labels[:, None] - 1)
    angles = np.arctan2(signed[:, 1], signed[:, 0])
    gaps = np.diff(np.sort(np.concatenate([angles, [angles.min() + 2 * np.pi]])))
    separable = gaps.max() >= np.pi
    kernel = kernel_of(np.kron(x, np.array([[-0.5], [0.5]])), 5)
    if separable:
        with pytest.raises(jl.InputError, match="no minimiser"):
            jl.kernel_logistic_regression(kernel, labels, np.zeros((5, 2)), 0.0)
    else:
        assert jl.kernel_logistic_regression(kernel, labels, np.zeros((5, 2)), 0.0).gradient_norm < 1e-8


def test_where_nothing_is_tuned_nothing_moves():
    f0, labels = np.random.default_rng(0).normal(size=(4, 3)), np.array([0, 1, 2, 0])
    shift = np.tile(np.eye(4)[:, None, :], (1, 3, 1)).reshape(12, 4)  # moves all logits of an example alike
    for jac in (np.zeros((12, 5)), shift):
        for lam in (0.0, 1.0):
            fit = jl.kernel_logistic_regression(kernel_of(jac, 4), labels, f0, lam)
            np.testing.assert_allclose(fit.outputs, f0, atol=1e-12)
            assert fit.distance < 1e-12


def test_the_trainer_comes_to_the_same(float64):
    n, lam = 9, 0.3
    data, test_data = cases.vectors(n, num_labels=3), cases.vectors(5, 1, 3)
    tun = cases.mlp(3, dtype=jnp.float64)
    kernel, cross = jl.ntk(tun, data), jl.ntk(tun, test_data, data)
    rate = 1 / (0.5 * np.linalg.eigvalsh(kernel.matrix())[-1] + lam)
    config = jl.TrainConfig(
        loss="cross_entropy",
        optimizer="sgd",
        learning_rate=to_mean(rate, n, "learning_rate"),
        batch_size=n,
        max_steps=400,
        lam=lam,
    )
    lin = jl.linearize(tun)
    theta = jl.train(lin, data, config=config).theta
    f0, f0_test = (jl.predict(tun, tun.theta0, x) for x in (data, test_data))
    fit = jl.kernel_logistic_regression(kernel, data["labels"], f0, lam)
    np.testing.assert_allclose(fit.outputs, jl.predict(lin, theta, data), atol=1e-8)
    np.testing.assert_allclose(fit.test(cross, f0_test), jl.predict(lin, theta, test_data), atol=1e-8)
    moved = jax.tree.map(jnp.subtract, theta, tun.theta0)
    assert fit.distance == pytest.approx(sum(float(jnp.sum(x**2)) for x in jax.tree.leaves(moved)) ** 0.5, abs=1e-8)


def test_bad_input():
    jac, jac_test, f0, f0_test, labels = problem(4)
    kernel = kernel_of(jac, 7)
    for change, message in (
        ({"ridge": -1.0}, "ridge=-1"),
        ({"ridge": float("nan")}, "ridge=nan"),
        ({"tolerance": 0.0}, "tolerance=0"),
        ({"labels": labels + 1}, "integers from 0 to 2"),
        ({"f0": f0 * np.nan}, "NaN"),
        ({"kernel": kernel_of(jac_test, 4, jac)}, "two sets"),
        ({"kernel": kernel_of(jac[:18], 6)}, "got a matrix of shape"),
        ({"tolerance": 1e-30}, "is .* after 200 Newton steps; expected at most"),
    ):
        arguments = {"kernel": kernel, "labels": labels, "f0": f0, "ridge": 1.0, **change}
        with pytest.raises(jl.InputError, match=message):
            jl.kernel_logistic_regression(**arguments)
    with pytest.raises(jl.InputError, match="two outputs; f0 has one"):
        jl.kernel_logistic_regression(alike(np.eye(7)), np.zeros(7, int), np.zeros((7, 1)), 1.0)
    with pytest.raises(jl.InputError, match="kernel_test_train has a matrix of shape"):
        jl.kernel_logistic_regression(kernel, labels, f0, 1.0).test(kernel, f0_test)
