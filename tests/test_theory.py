import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg
from hypothesis import given
from hypothesis import strategies as st

import jaxlin as jl
from jaxlin.ntk.kernel import KernelInfo
from jaxlin.ntk.neural_tangents import load_neural_tangents
from jaxlin.theory.dynamics import phi_flow, phi_gradient_descent, phi_heavy_ball
from tests import cases
from tests.kernels import SIZES, kernel_of, problem


@pytest.mark.parametrize("p", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("lam", [0.0, 3.0])
@given(seed=st.integers(0, 10**6), steps=st.integers(0, 40), momentum=st.sampled_from([0.0, 0.5, 0.9]))
def test_descent_equals_brute_force(p, lam, seed, steps, momentum):
    jac, jac_test, f0, f0_test, y = problem(seed, p=p)
    rate = 0.7 / (np.linalg.eigvalsh(jac @ jac.T)[-1] + lam)
    delta, velocity = np.zeros(p), np.zeros(p)
    for _ in range(steps):
        velocity = momentum * velocity + jac.T @ ((f0 - y).reshape(-1) + jac @ delta) + lam * delta
        delta = delta - rate * velocity
    fit = jl.kernel_regression(kernel_of(jac, 6), y, f0, lam)
    options = {"learning_rate": rate, "momentum": momentum}
    np.testing.assert_allclose(fit.train(steps, **options), f0 + (jac @ delta).reshape(f0.shape), atol=1e-10)
    test = fit.test(kernel_of(jac_test, 4, jac), f0_test, steps, **options)
    np.testing.assert_allclose(test, f0_test + (jac_test @ delta).reshape(f0_test.shape), atol=1e-10)


@pytest.mark.parametrize("p", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("lam", [0.0, 3.0])
def test_flow_and_its_limit(p, lam):
    jac, jac_test, f0, f0_test, y = problem(1, p=p)
    fit, residual = jl.kernel_regression(kernel_of(jac, 6), y, f0, lam), (f0 - y).reshape(-1)
    system = np.block([[-(jac.T @ jac + lam * np.eye(p)), -(jac.T @ residual)[:, None]], [np.zeros((1, p + 1))]])
    for time in (0.0, 0.01, 0.3, 5.0):
        delta = scipy.linalg.expm(time * system)[:p, p]
        np.testing.assert_allclose(fit.train(time), f0 + (jac @ delta).reshape(f0.shape), atol=1e-9)
    delta = -np.linalg.pinv(jac.T @ jac + lam * np.eye(p)) @ jac.T @ residual
    np.testing.assert_allclose(fit.train(), f0 + (jac @ delta).reshape(f0.shape), atol=1e-9)
    expected = f0_test + (jac_test @ delta).reshape(f0_test.shape)
    np.testing.assert_allclose(fit.test(kernel_of(jac_test, 4, jac), f0_test), expected, atol=1e-9)


def test_phi_keeps_its_digits():
    s = np.array([0.0, 1e-14, 1e-8, 1.0, 1.9])
    np.testing.assert_allclose(phi_gradient_descent(s, 5, 1.0)[:2], 5.0, rtol=1e-13)
    np.testing.assert_allclose(phi_heavy_ball(s, 7, 1.0, 0.0), phi_gradient_descent(s, 7, 1.0), rtol=1e-7)
    np.testing.assert_allclose(phi_flow(s, 3.0)[:2], 3.0, rtol=1e-13)
    with pytest.raises(jl.InputError, match="descent diverges at learning_rate=2"):
        phi_gradient_descent(s, 5, 2.0)
    with pytest.raises(jl.InputError, match="descent diverges"):
        phi_heavy_ball(s, 5, 3.0, 0.5)
    with pytest.raises(jl.InputError, match="momentum=1"):
        phi_heavy_ball(s, 5, 1.0, 1.0)


@pytest.mark.parametrize("p", SIZES.values(), ids=SIZES)
def test_leave_one_out_equals_refitting(p):
    jac, _, f0, _, y = problem(2, p=p)
    found = jl.kernel_regression(kernel_of(jac, 6), y, f0, 0.8).leave_one_out()
    for i in range(6):
        rest = np.delete(np.arange(6), i)
        rows = jac.reshape(6, 2, -1)
        others = rows[rest].reshape(10, -1)
        fit = jl.kernel_regression(kernel_of(others, 5), y[rest], f0[rest], 0.8)
        held = fit.test(kernel_of(rows[i], 1, others), f0[i : i + 1])
        np.testing.assert_allclose(found[i], held[0], atol=1e-10)


@pytest.mark.parametrize("lam", [0.0, 0.5])
def test_neural_tangents_flow(lam):
    """Test outputs for λ > 0, with the training points as test points: its train outputs leave the bias out."""
    predict = load_neural_tangents().predict
    jac, jac_test, f0, f0_test, y = problem(3)
    kernel, cross = kernel_of(jac, 6), kernel_of(jac_test, 4, jac)
    fit = jl.kernel_regression(kernel, y, f0, lam)
    with jax.enable_x64(True):
        k = jnp.asarray(kernel.array)
        fn = predict.gradient_descent_mse(k, jnp.asarray(y), diag_reg=lam, diag_reg_absolute_scale=True, trace_axes=())
        for time in (0.05, 1.0, None):
            t = None if time is None else time * y.size
            on_train, on_test = fn(t, jnp.asarray(f0), jnp.asarray(f0_test), jnp.asarray(cross.array))
            _, as_test = fn(t, jnp.asarray(f0), jnp.asarray(f0), k)
            np.testing.assert_allclose(fit.test(cross, f0_test, time), on_test, atol=1e-9)
            np.testing.assert_allclose(fit.train(time), as_test, atol=1e-9)
            if lam == 0:
                np.testing.assert_allclose(fit.train(time), on_train, atol=1e-9)


def test_bad_regressions():
    jac, _, f0, _, y = problem(4)
    kernel = kernel_of(jac, 6)
    for change, message in (
        ({"ridge": -1.0}, "ridge=-1.0"),
        ({"y": y[:5], "f0": f0[:5]}, "got a matrix of shape"),
        ({"f0": f0 * np.nan}, "NaN"),
    ):
        with pytest.raises(jl.InputError, match=message):
            jl.kernel_regression(kernel, **{"y": y, "f0": f0, "ridge": 1.0, **change})
    fit = jl.kernel_regression(kernel, y, f0, 0.0)
    with pytest.raises(jl.InputError, match="ridge > 0"):
        fit.leave_one_out()
    with pytest.raises(jl.InputError, match="t=-1"):
        fit.train(-1)
    with pytest.raises(jl.InputError, match="whole number"):
        fit.train(2.5, learning_rate=1e-3)
    with pytest.raises(jl.InputError, match="descent diverges"):
        fit.train(learning_rate=1e6)
    with pytest.raises(jl.InputError, match="momentum needs"):
        fit.train(1, momentum=0.5)
    with pytest.raises(jl.InputError, match="kernel_test_train has a matrix of shape"):
        fit.test(kernel, f0[:3])


def graded(condition, m=12, p=30, epsilon=1e-15):
    """A Jacobian with singular values from 1 down to 1/√condition."""
    rng = np.random.default_rng(0)
    u, v = (np.linalg.qr(rng.normal(size=(k, m)))[0] for k in (m, p))
    sigma = np.logspace(0, -np.log10(condition) / 2, m)
    info = KernelInfo("test", "float64", "float64", "highest", "cpu", epsilon)
    return (u * sigma) @ v.T, sigma**2, info


def test_spectrum_from_singular_values_and_from_the_matrix():
    jac, mu, info = graded(1e12)
    spec = jl.spectrum(kernel_of(jac, 6, info=info, keep=True))
    np.testing.assert_allclose(spec.eigenvalues, mu, rtol=1e-8)
    assert spec.condition_number == pytest.approx(1e12, rel=1e-6)
    assert not spec.condition_number_is_bound
    assert spec.rank == 12
    plain = jl.spectrum(kernel_of(jac, 6, info=info))
    np.testing.assert_allclose(plain.eigenvalues[:6], mu[:6], rtol=1e-8)


def test_condition_number_beyond_the_noise_is_a_bound():
    jac, mu, info = graded(1e12, epsilon=1e-6)
    spec = jl.spectrum(kernel_of(jac, 6, info=info, keep=True))
    assert spec.condition_number_is_bound
    assert spec.condition_number == pytest.approx((0.05 / 1e-6) ** 2)
    assert spec.noise_floor == pytest.approx(1e-12, rel=1e-6)
    assert spec.condition_number_on_range == pytest.approx(mu[0] / mu[mu >= 4e-10][-1], rel=1e-3)


def test_singular_kernels_and_functions_of_the_spectrum():
    jac = np.random.default_rng(0).normal(size=(8, 3))
    mu = np.linalg.eigvalsh(jac @ jac.T)[::-1]
    for keep in (True, False):
        spec = jl.spectrum(kernel_of(jac, 4, keep=keep))
        assert spec.rank == 3
        assert spec.condition_number_is_bound
        assert spec.condition_number_on_range == pytest.approx(mu[0] / mu[2])
        assert spec.trace == pytest.approx(np.sum(jac**2))
        assert spec.effective_dimension(2.0) == pytest.approx(np.sum(mu[:3] / (mu[:3] + 2)))
        assert spec.regularized_condition_number(2.0) == pytest.approx((mu[0] + 2) / 2)
    for function in (spec.effective_dimension, spec.regularized_condition_number):
        with pytest.raises(jl.InputError, match="expected above 0"):
            function(0.0)
    zero = jl.spectrum(kernel_of(np.zeros((4, 3)), 2))
    assert np.isnan(zero.condition_number)
    assert zero.rank == 0
    with pytest.raises(jl.InputError, match="NaN"):
        jl.spectrum(kernel_of(np.full((4, 3), np.nan), 2))


def test_float32_gram_has_its_own_noise():
    kernel = jl.ntk(cases.mlp(), cases.vectors(12), engine="neural_tangents")
    spec = jl.spectrum(kernel)
    assert spec.noise_floor == pytest.approx(spec.eigenvalues[0] * np.finfo(np.float32).eps * 24**0.5)
