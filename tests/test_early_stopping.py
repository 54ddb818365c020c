"""Curves over time against brute-force descent, with leave-one-out by refitting in parameter space."""

import math

import numpy as np
import pytest

import jaxlin as jl
from tests.kernels import SIZES, alike, kernel_of, problem


def descend(jac, residual, lam, rate, momentum, steps):
    """δ after each number of steps up to the largest."""
    delta, velocity, deltas = np.zeros(jac.shape[1]), 0.0, []
    for _ in range(max(steps) + 1):
        deltas.append(delta)
        velocity = momentum * velocity + jac.T @ (residual + jac @ delta) + lam * delta
        delta = delta - rate * velocity
    return [deltas[t] for t in steps]


def mean_loss(outputs, y):
    return np.mean([0.5 * np.sum((outputs[i] - y[i]) ** 2) for i in range(len(y))])


@pytest.mark.parametrize("p", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize(("lam", "momentum"), [(0.0, 0.0), (0.4, 0.0), (0.4, 0.8)])
def test_curves_equal_descent(p, lam, momentum):
    jac, jac_test, f0, f0_test, y = problem(0, p=p)
    y_val = np.random.default_rng(5).normal(size=(4, 2))
    jac[2:4] = jac[:2]
    rate, steps = 0.5 / (np.linalg.norm(jac, 2) ** 2 + lam), (0, 1, 2, 7, 40)
    fit = jl.kernel_regression(kernel_of(jac, 6), y, f0, lam)
    options = {"learning_rate": rate, "momentum": momentum}
    found = jl.early_stopping(fit, steps, validation=(kernel_of(jac_test, 4, jac), f0_test, y_val), **options)
    deltas = descend(jac, (f0 - y).reshape(-1), lam, rate, momentum, steps)
    train = [mean_loss(f0 + (jac @ d).reshape(6, 2), y) for d in deltas]
    held_out = [mean_loss(f0_test + (jac_test @ d).reshape(4, 2), y_val) for d in deltas]
    np.testing.assert_allclose(found.train_loss, train, atol=1e-9)
    np.testing.assert_allclose(found.held_out_loss, held_out, atol=1e-9)
    assert found.best_time == steps[int(np.argmin(held_out))]
    assert found.best_loss == pytest.approx(min(held_out))
    assert found.held_out == "validation"

    left_out = np.zeros((len(steps), 6, 2))
    for i in range(6):
        rest = np.delete(np.arange(6), i)
        others = jac.reshape(6, 2, -1)[rest].reshape(10, -1)
        for k, d in enumerate(descend(others, (f0 - y)[rest].reshape(-1), lam, rate, momentum, steps)):
            left_out[k, i] = f0[i] + jac[2 * i : 2 * i + 2] @ d
    loo = jl.early_stopping(fit, steps, **options)
    np.testing.assert_allclose(loo.held_out_loss, [mean_loss(one, y) for one in left_out], atol=1e-9)
    np.testing.assert_allclose(loo.train_loss, train, atol=1e-9)
    assert loo.held_out == "leave-one-out"


def test_the_limit_of_the_flow_is_leave_one_out_in_closed_form():
    jac, _, f0, _, y = problem(1)
    fit = jl.kernel_regression(kernel_of(jac, 6), y, f0, 0.3)
    found = jl.early_stopping(fit, [0.0, 1e9, math.inf])
    np.testing.assert_allclose(found.held_out_loss[1:], mean_loss(fit.leave_one_out(), y), rtol=1e-9)
    assert found.held_out_loss[0] == pytest.approx(mean_loss(f0, y))
    alone = jl.kernel_regression(alike(jac[::2] @ jac[::2].T), y, f0, 0.3)
    np.testing.assert_allclose(
        jl.early_stopping(alone, [math.inf]).held_out_loss, mean_loss(alone.leave_one_out(), y), rtol=1e-9
    )


@pytest.mark.parametrize("p", SIZES.values(), ids=SIZES)
def test_residuals_along_eigenvectors(p):
    jac, _, f0, _, y = problem(2, p=p)
    for lam in (0.0, 0.6):
        fit = jl.kernel_regression(kernel_of(jac, 6), y, f0, lam)
        for options in (
            {"t": 0.2},
            {"t": 5, "learning_rate": 0.01},
            {"t": 5, "learning_rate": 0.01, "momentum": 0.5},
            {},
        ):
            expected = fit.eigenvectors.T @ (fit.train(**options) - y).reshape(-1, 1)
            np.testing.assert_allclose(fit.residuals(**options), expected, atol=1e-10)
        mu, start = fit.eigenvalues, (fit.eigenvectors.T @ (f0 - y).reshape(-1))[:, None]
        if lam:
            formula = (lam + mu * np.exp(-(mu + lam) * 0.2)) / (mu + lam)
            np.testing.assert_allclose(fit.residuals(0.2), formula[:, None] * start, atol=1e-12)
    alone = jl.kernel_regression(alike(jac[::2] @ jac[::2].T), y, f0, 0.3)
    np.testing.assert_allclose(alone.residuals(0.2), alone.eigenvectors.T @ (alone.train(0.2) - y), atol=1e-12)


def test_bad_curves():
    jac, jac_test, f0, f0_test, y = problem(3)
    fit = jl.kernel_regression(kernel_of(jac, 6), y, f0, 0.3)
    cross = kernel_of(jac_test, 4, jac)
    for times, options, message in (
        ([], {}, "at least one time"),
        ([-1.0], {}, "t=-1"),
        ([math.nan], {}, "t=nan"),
        ([1.5], {"learning_rate": 1e-3}, "whole number"),
        ([1.0], {"learning_rate": 10.0}, "descent diverges"),
        ([1.0], {"validation": (cross, f0_test, f0_test * math.nan)}, "finite y"),
        ([1.0], {"validation": (cross, f0, y)}, "kernel_test_train has a matrix of shape"),
    ):
        with pytest.raises(jl.InputError, match=message):
            jl.early_stopping(fit, times, **options)
    one = jl.kernel_regression(kernel_of(jac[:2], 1), y[:1], f0[:1], 0.3)
    with pytest.raises(jl.InputError, match="at least two"):
        jl.early_stopping(one, [1.0])
