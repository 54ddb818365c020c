"""The numbers that layers are chosen by, each against its definition on dense matrices."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import multivariate_normal

import jaxlin as jl
from jaxlin.ntk.kinds import contrast_basis
from jaxlin.theory.criteria import CRITERIA, alignment, criteria, residual_share
from tests.kernels import alike, kernel_of, problem


def top_share(matrix, residual, k):
    """By projection on the k leading right singular vectors."""
    basis = np.linalg.svd(matrix)[2][:k]
    return np.sum((basis.T @ (basis @ residual)) ** 2) / np.sum(residual**2)


@given(seed=st.integers(0, 10**6), p=st.sampled_from([5, 20]), lam=st.sampled_from([0.3, 10.0]), repeated=st.booleans())
def test_every_criterion_is_its_definition(seed, p, lam, repeated):
    jac, _, f0, _, y = problem(seed, p=p)
    if repeated:
        jac[2:4] = jac[:2]
    kernel, residual = kernel_of(jac, 6, keep=False), (f0 - y).reshape(-1)
    matrix, found = jac @ jac.T, criteria(kernel_of(jac, 6), y, f0, lam)
    sigma = np.linalg.svd(jac, compute_uv=False)
    mu = np.concatenate([sigma**2, np.zeros(max(0, 12 - p))])
    singular = p < 12 or repeated
    values = found.values
    assert set(values) == set(CRITERIA)
    assert found.lam == lam
    assert found.condition_number_is_bound == singular
    if not singular:
        assert values["condition_number"] == pytest.approx(np.linalg.cond(jac) ** 2, rel=1e-3)
    assert values["mu_max"] == pytest.approx(mu[0])
    assert values["mu_min"] == pytest.approx(0 if singular else mu[-1], rel=1e-3, abs=1e-10 * mu[0])
    assert values["trace"] == pytest.approx(np.sum(jac**2))
    bottom = 0 if singular else mu[-1]
    assert values["regularized_condition_number"] == pytest.approx((mu[0] + lam) / (bottom + lam))
    smoother = matrix @ np.linalg.inv(matrix + lam * np.eye(12))
    assert values["effective_dimension"] == pytest.approx(np.trace(smoother))
    outer = np.outer(residual, residual)
    assert values["alignment"] == pytest.approx(
        np.trace(matrix @ outer) / np.linalg.norm(matrix) / np.linalg.norm(outer)
    )
    assert values["residual_share"] == pytest.approx(top_share(matrix, residual, 1))
    errors = []
    for i in range(6):
        rest = np.delete(np.arange(12).reshape(6, 2), i, 0).reshape(-1)
        delta = np.linalg.solve(jac[rest].T @ jac[rest] + lam * np.eye(p), -jac[rest].T @ residual[rest])
        errors.append(0.5 * np.sum((residual[2 * i : 2 * i + 2] + jac[2 * i : 2 * i + 2] @ delta) ** 2))
    assert values["leave_one_out_error"] == pytest.approx(np.mean(errors))
    marginal = matrix + lam * np.eye(12)
    scales = residual @ np.linalg.solve(marginal, residual) / 12 * np.array([0.98, 1.0, 1.02])
    likely = [multivariate_normal(np.zeros(12), scale * marginal).logpdf(residual) for scale in scales]
    assert values["log_marginal_likelihood"] == pytest.approx(likely[1])
    assert likely[1] > max(likely[0], likely[2])
    relative = criteria(kernel, y, f0, lam_rel=0.05)
    assert relative.lam == pytest.approx(0.05 * mu[0])


@given(seed=st.integers(0, 10**6), k=st.integers(1, 12), p=st.sampled_from([5, 20]))
def test_share_of_the_residual_in_the_top_eigenspace(seed, k, p):
    jac, _, f0, _, y = problem(seed, p=p)
    fit = jl.kernel_regression(kernel_of(jac, 6), y, f0, 0.0)
    residual = (f0 - y).reshape(-1)
    if k <= p:  # beyond the rank the eigenvectors are any
        assert residual_share(fit, k) == pytest.approx(top_share(jac @ jac.T, residual, k), abs=1e-9)
    on_range = jac @ np.linalg.lstsq(jac, residual)[0]
    assert residual_share(fit, min(p, 12)) == pytest.approx(np.sum(on_range**2) / np.sum(residual**2))


def test_outputs_alike_are_that_many_kernels():
    rng = np.random.default_rng(0)
    jac = rng.normal(size=(20, 30))
    f0, y = rng.normal(size=(20, 2)), rng.normal(size=(20, 2))
    small, full = (
        criteria(kernel, y, f0, 0.4) for kernel in (alike(jac @ jac.T), kernel_of(np.kron(jac, np.eye(2)), 20))
    )
    for name in CRITERIA:  # of 40 eigenvalues the top tenth are two eigenspaces
        assert small.values[name] == pytest.approx(full.values[name], rel=1e-6), name
    shares = [residual_share(small.fit, k) for k in (2, 3, 4, 40)]
    assert shares[1] == pytest.approx((shares[0] + shares[2]) / 2)
    assert shares[3] == pytest.approx(1)


def test_where_alignment_is_largest_and_where_it_is_not_defined():
    target = np.random.default_rng(0).normal(size=(6, 1))
    assert alignment(target @ target.T, target) == pytest.approx(1)
    assert np.isnan(alignment(np.zeros((6, 6)), target))
    assert np.isnan(alignment(np.eye(6), 0 * target))


def test_degenerate_kernels_and_bad_input():
    jac, jac_test, f0, _, y = problem(0)
    one_class = np.tile([0.0, 1.0], (6, 1))
    assert all(np.isfinite(value) for value in criteria(kernel_of(jac, 6), one_class, f0).values.values())
    fit = jl.kernel_regression(kernel_of(jac, 6), y, y, 0.1)
    assert np.isnan(residual_share(fit, 3))
    for k in (0, 13):
        with pytest.raises(jl.InputError, match=f"k={k}; expected from 1 to the kernel's 12"):
            residual_share(fit, k)
    for kernel, options, message in (
        (kernel_of(np.zeros((12, 3)), 6), {}, "the kernel vanishes"),
        (kernel_of(jac, 6), {"lam": 0.0}, "lam=0.0; expected above 0"),
        (kernel_of(jac, 6), {"lam_rel": -1.0}, "expected above 0"),
        (kernel_of(jac * np.nan, 6), {}, "NaN"),
        (kernel_of(jac_test, 4, jac), {}, "two sets"),
    ):
        with pytest.raises(jl.InputError, match=message):
            criteria(kernel, y, f0, **options)
    fitted, other = criteria(kernel_of(jac, 6), y, y).values, criteria(kernel_of(jac, 6), y, f0).values
    of_the_residual = {"alignment", "residual_share", "log_marginal_likelihood"}
    assert {name for name, value in fitted.items() if np.isnan(value)} == of_the_residual
    assert fitted.pop("leave_one_out_error") == pytest.approx(0)
    assert all(fitted[name] == other[name] for name in fitted.keys() - of_the_residual)


# --- without the direction that softmax ignores -------------------------------------------------------


def centred(jac, c):
    """Jacobian of `f − mean(f)`."""
    by_output = jac.reshape(-1, c, jac.shape[1])
    return (by_output - by_output.mean(1, keepdims=True)).reshape(jac.shape)


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("p", [5, 40])
@pytest.mark.parametrize("c", [2, 4])
def test_spectrum_without_the_constant(keep, p, c):
    jac, jac_test, *_ = problem(0, c=c, p=p)
    kernel = kernel_of(jac, 6, keep=keep)
    expected = np.linalg.svd(centred(jac, c), compute_uv=False) ** 2
    found = jl.spectrum(kernel, ignore_constant=True)
    size = 6 * (c - 1)
    assert found.eigenvalues.shape == (size,)
    padded = np.concatenate([expected, np.zeros(6 * c)])[:size]
    np.testing.assert_allclose(found.eigenvalues, padded, atol=1e-12 * expected[0])
    assert found.rank == min(p, size)
    # What only shifts all logits alike changes nothing.
    shifts = np.kron(np.random.default_rng(0).normal(size=(6, 2)), np.ones((c, 1)))
    moved = jl.spectrum(kernel_of(np.concatenate([jac, 5 * shifts], axis=1), 6, keep=keep), ignore_constant=True)
    np.testing.assert_allclose(moved.eigenvalues, found.eigenvalues, atol=1e-10 * expected[0])
    between = kernel_of(jac_test, 4, jac).contrasts()
    assert between.array.shape == (4, 6, c - 1, c - 1)
    basis = contrast_basis(c)
    np.testing.assert_allclose(basis.T @ basis, np.eye(c - 1), atol=1e-14)
    np.testing.assert_allclose(basis.sum(0), 0, atol=1e-14)
    lifted = np.kron(np.eye(4), basis) @ between.matrix() @ np.kron(np.eye(6), basis).T
    np.testing.assert_allclose(lifted, centred(jac_test, c) @ centred(jac, c).T, atol=1e-10)


def test_contrasts_of_blocks_are_read_when_asked_for():
    jac, *_ = problem(0, c=3)
    whole = kernel_of(jac, 6, keep=True)
    halves = {"a": jac[:, :8], "b": jac[:, 8:]}
    kernel = jl.Kernel(
        {name: kernel_of(half, 6).array for name, half in halves.items()},
        True,
        whole.info,
        {"a": ("a",), "b": ("b",)},
        {name: half.reshape(6, 3, -1) for name, half in halves.items()},
    ).contrasts()
    np.testing.assert_allclose(kernel.array, whole.contrasts().array, atol=1e-12)
    for name, half in halves.items():
        np.testing.assert_allclose(kernel.blocks[name].array, kernel_of(half, 6).contrasts().array, atol=1e-12)
    assert kernel.jacobian["a"].shape == (6, 2, 8)
    weighted = kernel.weighted({"a": 4.0})
    np.testing.assert_allclose(weighted.array, kernel.array + 3 * kernel.parts["a"], atol=1e-12)
    rows = np.concatenate([2 * kernel.jacobian["a"], kernel.jacobian["b"]], axis=2).reshape(12, -1)
    np.testing.assert_allclose(weighted.matrix(), rows @ rows.T, atol=1e-12)


def test_what_has_no_contrasts():
    jac, *_ = problem(0)
    with pytest.raises(jl.InputError, match='this one is "trace"'):
        jl.spectrum(alike(jac @ jac.T), ignore_constant=True)
    with pytest.raises(jl.InputError, match="at least two"):
        jl.spectrum(kernel_of(jac, 12), ignore_constant=True)
