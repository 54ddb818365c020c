"""Posterior variance and its calibration against Bayesian regression in parameter space."""

import numpy as np
import pytest
from scipy.stats import multivariate_normal, norm

import jaxlin as jl
from tests.kernels import SIZES, alike, each_alone, kernel_of, problem


def in_parameter_space(jac, jac_test, f0, y, lam):
    """Mean and covariance of δ given y, and of the test outputs, at the likeliest σ² by its definition."""
    residual = (y - f0).reshape(-1)
    precision = jac.T @ jac / lam + np.eye(jac.shape[1])
    mean = np.linalg.solve(precision, jac.T @ residual / lam)
    marginal = jac @ jac.T + lam * np.eye(len(jac))
    scale = residual @ np.linalg.solve(marginal, residual) / len(residual)
    return jac_test @ mean, scale * jac_test @ np.linalg.solve(precision, jac_test.T), scale


def blocks_of(covariance, m):
    return np.einsum("mcmd->mcd", covariance.reshape(m, len(covariance) // m, m, -1))


@pytest.mark.parametrize("p", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("repeated", [False, True])
def test_posterior_equals_bayesian_regression(p, repeated):
    jac, jac_test, f0, f0_test, y = problem(0, p=p)
    if repeated:
        jac[2:4] = jac[:2]
        jac_test[:2] = jac[:2]
    mean, covariance, _ = in_parameter_space(jac, jac_test, f0, y, 0.7)
    fit = jl.kernel_regression(kernel_of(jac, 6), y, f0, 0.7)
    kernel_test = kernel_of(jac_test, 4)
    given = (kernel_test, blocks_of(jac_test @ jac_test.T, 4))
    for one in given:
        found = fit.test(kernel_of(jac_test, 4, jac), f0_test, kernel_test=one, return_variance=True)
        np.testing.assert_allclose(found[0], f0_test + mean.reshape(4, 2), atol=1e-10)
        np.testing.assert_allclose(found[1], blocks_of(covariance, 4), atol=1e-10)


def test_posterior_of_outputs_alike():
    jac, jac_test, *_ = problem(1, n=6, c=1)
    f0, y, f0_test = (np.random.default_rng(k).normal(size=(n, 3)) for k, n in enumerate((6, 6, 4)))
    k, k_cross, k_test = jac @ jac.T, jac_test @ jac.T, jac_test @ jac_test.T
    expected = in_parameter_space(np.kron(jac, np.eye(3)), np.kron(jac_test, np.eye(3)), f0, y, 0.7)
    for kernel, cross, given in (
        (alike(k), alike(k_cross, False), alike(k_test)),
        (alike(k), alike(k_cross, False), np.diag(k_test).copy()),
        (each_alone(k, 3), each_alone(k_cross, 3, False), each_alone(k_test, 3)),
    ):
        fit = jl.kernel_regression(kernel, y, f0, 0.7)
        mean, covariance = fit.test(cross, f0_test, kernel_test=given, return_variance=True)
        np.testing.assert_allclose(mean, f0_test + expected[0].reshape(4, 3), atol=1e-10)
        np.testing.assert_allclose(covariance, blocks_of(expected[1], 4), atol=1e-10)


def test_variance_vanishes_where_the_model_knows():
    jac, _, f0, _, y = problem(2)
    fit = jl.kernel_regression(kernel_of(jac, 6), y, f0, 1e-13)
    kernel = kernel_of(jac, 6)
    _, covariance = fit.test(kernel, f0, kernel_test=kernel, return_variance=True)
    assert np.linalg.eigvalsh(covariance).min() >= -1e-20
    assert np.abs(covariance).max() < 1e-10 * np.abs(kernel.array).max()


def test_calibration_equals_its_definition():
    jac, jac_test, f0, f0_test, y = problem(3)
    y_test = np.random.default_rng(0).normal(size=(4, 2))
    mean, covariance, scale = in_parameter_space(jac, jac_test, f0, y, 0.7)
    mean = f0_test + mean.reshape(4, 2)
    predictive = blocks_of(covariance, 4) + scale * 0.7 * np.eye(2)
    fit = jl.kernel_regression(kernel_of(jac, 6), y, f0, 0.7)
    found = jl.calibration(fit, kernel_of(jac_test, 4, jac), f0_test, y_test, kernel_of(jac_test, 4), (0.3, 0.9))
    surprise = [-multivariate_normal(mean[i], predictive[i]).logpdf(y_test[i]) for i in range(4)]
    squared = [(y_test - mean)[i] @ np.linalg.inv(predictive[i]) @ (y_test - mean)[i] / 2 for i in range(4)]
    assert found.negative_log_density == pytest.approx(np.mean(surprise), rel=1e-9)
    assert found.negative_log_density_error == pytest.approx(np.std(surprise, ddof=1) / 2, rel=1e-9)
    assert found.squared_residual == pytest.approx(np.mean(squared), rel=1e-9)
    assert found.squared_residual_error == pytest.approx(np.std(squared, ddof=1) / 2, rel=1e-9)
    deviation = np.sqrt(np.einsum("mcc->mc", predictive))
    for level, covered in zip((0.3, 0.9), found.coverage, strict=True):
        low, high = (norm(mean, deviation).ppf(q) for q in ((1 - level) / 2, (1 + level) / 2))
        assert covered == pytest.approx(np.mean((y_test >= low) & (y_test <= high)))
    np.testing.assert_allclose(found.coverage_error, [np.sqrt(0.21 / 4), np.sqrt(0.09 / 4)])
    assert found.num_examples == 4


def test_a_right_model_is_calibrated_and_a_wrong_one_is_not():
    rng, n, m, p, lam, sigma = np.random.default_rng(0), 150, 400, 30, 2.0, 0.6
    jac, jac_test, delta = rng.normal(size=(2 * n, p)), rng.normal(size=(2 * m, p)), sigma * rng.normal(size=p)
    f0, f0_test = np.zeros((n, 2)), np.zeros((m, 2))
    y, y_test = ((j @ delta + sigma * lam**0.5 * rng.normal(size=len(j))).reshape(-1, 2) for j in (jac, jac_test))
    fit = jl.kernel_regression(kernel_of(jac, n), y, f0, lam)
    held_out = (kernel_of(jac_test, m, jac), f0_test)
    blocks = blocks_of(jac_test @ jac_test.T, m)
    assert fit.scale == pytest.approx(sigma**2, rel=0.3)
    found = jl.calibration(fit, *held_out, y_test, blocks)
    assert np.all(np.abs(found.coverage - found.levels) < 4 * found.coverage_error)
    assert abs(found.squared_residual - 1) < 4 * found.squared_residual_error + 0.1  # σ² is itself an estimate
    wrong = jl.calibration(fit, *held_out, 3 * y_test, blocks)
    assert wrong.coverage[-1] < 0.95 - 4 * wrong.coverage_error[-1]
    assert wrong.negative_log_density > found.negative_log_density


def test_bad_uncertainty():
    jac, jac_test, f0, f0_test, y = problem(4)
    kernel, cross, kernel_test = kernel_of(jac, 6), kernel_of(jac_test, 4, jac), kernel_of(jac_test, 4)
    fit = jl.kernel_regression(kernel, y, f0, 0.5)
    for options, message in (
        ({}, "needs kernel_test"),
        ({"kernel_test": kernel}, r"diagonal blocks of shape \(6, 2, 2\); expected \(4, 2, 2\)"),
        ({"kernel_test": cross}, "two sets"),
        ({"kernel_test": np.full((4, 2, 2), np.nan)}, "NaN"),
        ({"kernel_test": kernel_test, "t": 3.0}, "t=3.0; the posterior variance"),
    ):
        with pytest.raises(jl.InputError, match=message):
            fit.test(cross, f0_test, return_variance=True, **options)
    with pytest.raises(jl.InputError, match="needs ridge > 0"):
        jl.kernel_regression(kernel, y, f0, 0.0).test(cross, f0_test, kernel_test=kernel_test, return_variance=True)
    with pytest.raises(jl.InputError, match="levels"):
        jl.calibration(fit, cross, f0_test, f0_test, kernel_test, (0.5, 1.0))
    with pytest.raises(jl.InputError, match=r"y_test has shape \(1, 2\)"):
        jl.calibration(fit, cross, f0_test[:1], f0_test[:1], kernel_test)
    with pytest.raises(jl.InputError, match="fits y exactly"):
        jl.calibration(jl.kernel_regression(kernel, f0, f0, 0.5), cross, f0_test, f0_test, kernel_test)
