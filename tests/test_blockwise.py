"""Rates and pulls by block against brute-force descent in parameter space, and against the trainer."""

import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg
from hypothesis import given
from hypothesis import strategies as st

import jaxlin as jl
from jaxlin.ntk.kernel import Kernel
from jaxlin.training.losses import targets, to_mean
from tests import cases
from tests.kernels import INFO, kernel_of

SIZES = {"P > m": (7, 9, 4, 6), "P < m": (2, 1, 3, 2)}
FACTORS = st.sampled_from([0.0, 0.25, 1.0, 3.0])


def block_kernel(jacs, n, others=None):
    """Kernel of dense Jacobians [n*C, P_ℓ] by block."""
    others = jacs if others is None else others
    parts = {}
    for name, jac in jacs.items():
        c = len(jac) // n
        parts[name] = (jac @ others[name].T).reshape(n, c, -1, c).transpose(0, 2, 1, 3)
    return Kernel(parts, others is jacs, INFO, {name: (name,) for name in jacs}, of_two_sets=others is not jacs)


def problem(seed, sizes, n=6, c=2, repeated=True):
    rng = np.random.default_rng(seed)
    jacs = {f"block_{k}": rng.normal(size=(n * c, p)) for k, p in enumerate(sizes)}
    tests = {f"block_{k}": rng.normal(size=(4 * c, p)) for k, p in enumerate(sizes)}
    for jac in jacs.values():
        if repeated:
            jac[c : 2 * c] = jac[:c]
    return jacs, tests, rng.normal(size=(n, c)), rng.normal(size=(4, c)), rng.normal(size=(n, c))


def system(jacs, residual, lam, rates, weights):
    """Matrix and vector of δ' = −(Mδ + v), M = diag(η)(JᵀJ + λ diag(w)), and the sizes of the blocks."""
    jac = np.concatenate(list(jacs.values()), axis=1)
    eta, w = (np.concatenate([np.full(j.shape[1], by[k]) for k, j in jacs.items()]) for by in (rates, weights))
    return jac, eta[:, None] * (jac.T @ jac + lam * np.diag(w)), eta * (jac.T @ residual)


def largest(matrix):
    return np.abs(np.linalg.eigvals(matrix)).max()


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
@given(
    seed=st.integers(0, 10**6),
    lam=st.sampled_from([0.0, 2.0]),
    steps=st.integers(0, 30),
    momentum=st.sampled_from([0.0, 0.7]),
    factors=st.tuples(*[FACTORS] * 8),
)
def test_descent_equals_brute_force(sizes, seed, lam, steps, momentum, factors):
    jacs, tests, f0, f0_test, y = problem(seed, sizes)
    rates, weights = dict(zip(jacs, factors[:4], strict=True)), dict(zip(jacs, factors[4:], strict=True))
    jac, matrix, vector = system(jacs, (f0 - y).reshape(-1), lam, rates, weights)
    rate = 0.8 / max(largest(matrix), 1e-3)
    delta, velocity = np.zeros(len(vector)), np.zeros(len(vector))
    for _ in range(steps):
        velocity = momentum * velocity + matrix @ delta + vector
        delta = delta - rate * velocity
    kernel, cross = block_kernel(jacs, 6), block_kernel(tests, 4, jacs)
    fit = jl.blockwise_regression(kernel, y, f0, lam, rates, weights)
    options = {"learning_rate": rate, "momentum": momentum}
    np.testing.assert_allclose(fit.train(steps, **options), f0 + (jac @ delta).reshape(f0.shape), atol=1e-9)
    jac_test = np.concatenate(list(tests.values()), axis=1)
    expected = f0_test + (jac_test @ delta).reshape(f0_test.shape)
    np.testing.assert_allclose(fit.test(cross, f0_test, steps, **options), expected, atol=1e-9)
    alphas = fit.coefficients(steps, **options)
    moved = np.concatenate([jacs[name].T @ alphas[name].reshape(-1) for name in jacs])
    np.testing.assert_allclose(moved, delta, atol=1e-9)


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("lam", [0.0, 2.0])
@pytest.mark.parametrize(
    ("rates", "weights"),
    [((1, 1, 1, 1), (1, 1, 1, 1)), ((4, 0.25, 1, 2), (0.25, 4, 0.5, 3)), ((1, 0, 2, 0.5), (0, 1, 0, 2))],
    ids=["all-alike", "some-alike", "with-zeros"],
)
def test_flow_and_its_limit(sizes, lam, rates, weights):
    jacs, tests, f0, f0_test, y = problem(3, sizes)
    rates, weights = dict(zip(jacs, map(float, rates), strict=True)), dict(zip(jacs, map(float, weights), strict=True))
    jac, matrix, vector = system(jacs, (f0 - y).reshape(-1), lam, rates, weights)
    jac_test, p = np.concatenate(list(tests.values()), axis=1), len(vector)
    fit = jl.blockwise_regression(block_kernel(jacs, 6), y, f0, lam, rates, weights)
    cross = block_kernel(tests, 4, jacs)
    affine = np.block([[-matrix, -vector[:, None]], [np.zeros((1, p + 1))]])
    for time in (0.0, 0.02, 0.5, 1e3, None):
        # The flow at 10⁶: far beyond the slowest direction.
        delta = scipy.linalg.expm((1e6 if time is None else time) * affine)[:p, p]
        np.testing.assert_allclose(fit.train(time), f0 + (jac @ delta).reshape(f0.shape), atol=1e-7)
        expected = f0_test + (jac_test @ delta).reshape(f0_test.shape)
        np.testing.assert_allclose(fit.test(cross, f0_test, time), expected, atol=1e-7)


def test_groups_are_blocks_of_one_product():
    jacs, _, f0, _, y = problem(0, SIZES["P > m"])
    kernel = block_kernel(jacs, 6)
    rates = {"block_0": 2.0, "block_1": 4.0, "block_3": 0.0}
    fit = jl.blockwise_regression(kernel, y, f0, 0.5, rates, {"block_0": 0.5, "block_1": 0.25})
    assert [dict(group.rates) for group in fit.groups] == [{"block_0": 2.0, "block_1": 4.0, "block_2": 1.0}]
    assert fit.fixed == ("block_3",)
    np.testing.assert_allclose(fit.train(3.0), jl.kernel_regression(kernel.weighted(rates), y, f0, 0.5).train(3.0))
    without_ridge = jl.blockwise_regression(kernel, y, f0, 0.0, None, {"block_0": 7.0})
    assert len(without_ridge.groups) == 1
    still = jl.blockwise_regression(kernel, y, f0, 0.5, {"block": 0.0})
    np.testing.assert_array_equal(still.train(), f0)
    assert not any(alpha.any() for alpha in still.coefficients(5, 0.1).values())


def test_outputs_alike():
    """A kernel [N, N] by block is one that every output has alone."""
    jacs, tests, *_ = problem(1, (3, 4), c=1)
    rng = np.random.default_rng(0)
    f0, y, f0_test = (rng.normal(size=(n, 3)) for n in (6, 6, 4))
    spread = [{k: np.kron(j, np.eye(3)) for k, j in of.items()} for of in (jacs, tests)]
    full, cross = block_kernel(spread[0], 6), block_kernel(spread[1], 4, spread[0])
    small, small_cross = (
        Kernel({k: a[:, :, 0, 0] for k, a in of.parts.items()}, of.symmetric, INFO, of.leaves, kind="trace")
        for of in (block_kernel(jacs, 6), block_kernel(tests, 4, jacs))
    )
    factors = 0.3, {"block_0": 2.0}, {"block_1": 0.0}
    one, other = jl.blockwise_regression(small, y, f0, *factors), jl.blockwise_regression(full, y, f0, *factors)
    for t in (0.3, None):
        np.testing.assert_allclose(one.train(t), other.train(t), atol=1e-9)
        np.testing.assert_allclose(one.test(small_cross, f0_test, t), other.test(cross, f0_test, t), atol=1e-8)


@pytest.mark.parametrize("momentum", [False, True])
def test_the_trainer_with_rates_and_pulls(float64, momentum):
    n, rates, weights = 7, {"hidden/bias": 4.0, "out": 0.25}, {"hidden/kernel": 0.0, "out": 3.0}
    train_data, test_data = cases.vectors(n), cases.vectors(5, seed=1)
    tun = cases.mlp(dtype=jnp.float64)
    kernel, cross = (jl.ntk(tun, x, x2, blocks="leaf") for x, x2 in ((train_data, None), (test_data, train_data)))
    y = np.asarray(targets(train_data["labels"], 2))
    f0, f0_test = (jl.predict(tun, tun.theta0, data) for data in (train_data, test_data))
    lam = 0.1 * np.linalg.eigvalsh(kernel.matrix())[-1]
    fit = jl.blockwise_regression(kernel, y, f0, lam, rates, weights)
    rate = 1 / fit.eigenvalues[-1]
    config = jl.TrainConfig(
        optimizer="momentum" if momentum else "sgd",
        learning_rate=to_mean(rate, n, "learning_rate"),
        batch_size=n,
        max_steps=25,
        lam=lam,
        learning_rate_blocks=rates,
        lam_blocks=weights,
    )
    lin = jl.linearize(tun)
    theta = jl.train(lin, train_data, config=config).theta
    options = {"learning_rate": rate, "momentum": 0.9 if momentum else 0.0}
    np.testing.assert_allclose(jl.predict(lin, theta, train_data), fit.train(25, **options), atol=1e-9)
    np.testing.assert_allclose(jl.predict(lin, theta, test_data), fit.test(cross, f0_test, 25, **options), atol=1e-9)
    plain = jl.kernel_regression(kernel, y, f0, lam).train(25, **options)
    assert np.abs(fit.train(25, **options) - plain).max() > 1e-2


def test_bad_input():
    jacs, tests, f0, f0_test, y = problem(0, SIZES["P > m"])
    kernel, cross = block_kernel(jacs, 6), block_kernel(tests, 4, jacs)
    for change, message in (
        ({"ridge": -1.0}, "ridge=-1"),
        ({"f0": f0 * np.nan}, "NaN"),
        ({"learning_rate_blocks": {"nowhere": 1.0}}, "learning_rate_blocks: 'nowhere' is found in no"),
        ({"lam_blocks": {"block_0": -1.0}}, "lam_blocks: 'block_0'=-1.0; expected a finite factor"),
        ({"kernel": cross}, "two sets"),
    ):
        with pytest.raises(jl.InputError, match=message):
            jl.blockwise_regression(**{"kernel": kernel, "y": y, "f0": f0, "ridge": 1.0, **change})
    coarse = Kernel({"all": kernel.array}, True, INFO, {"all": tuple(jacs)})
    with pytest.raises(jl.InputError, match="factors part the parameters of block 'all'"):
        jl.blockwise_regression(coarse, y, f0, 1.0, {"block_0": 2.0})
    fit = jl.blockwise_regression(kernel, y, f0, 1.0)
    with pytest.raises(jl.InputError, match="kernel_test_train has the blocks all"):
        fit.test(kernel_of(np.zeros((8, 3)), 4, np.zeros((12, 3))), f0_test)
    with pytest.raises(jl.InputError, match="descent diverges"):
        fit.train(3, learning_rate=10.0)
