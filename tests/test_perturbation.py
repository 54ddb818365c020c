"""Theory 7 on random positive semidefinite blocks and on the block kernels of a real transformer."""

import itertools

import numpy as np
import pytest
import scipy.linalg
from hypothesis import given
from hypothesis import strategies as st

import jaxlin as jl
from jaxlin.ntk.kernel import Kernel, KernelInfo
from tests import cases

INFO = KernelInfo("test", "float64", "float64", "highest", "cpu", 1e-15)
N, C = 5, 2
M = N * C


def kernel_of(**jacobians):
    """A kernel whose blocks are J Jᵀ of dense Jacobians [N*C, P]."""
    parts = {name: (jac @ jac.T).reshape(N, C, N, C).transpose(0, 2, 1, 3).copy() for name, jac in jacobians.items()}
    return Kernel(parts, True, INFO, {name: (name,) for name in parts})


def jacobian_of(rng, kind):
    """A block of a kind: well conditioned, graded, of low rank, with repeated rows, zero."""
    jac = rng.normal(size=(M, 2 * M))
    if kind == "graded":
        jac = np.logspace(0, -4, M)[:, None] * jac
    if kind == "low rank":
        jac = jac[:, :3]
    if kind == "repeated rows":
        jac[C : 2 * C] = jac[:C]
    return 0 * jac if kind == "zero" else jac * 10.0 ** rng.integers(-3, 4)


KINDS = ("plain", "graded", "low rank", "repeated rows", "zero")


def all_bounds(p):
    functions = (jl.bounds.weyl, jl.bounds.weyl_all_pairs, jl.bounds.relative, jl.bounds.condition, jl.bounds.tightest)
    return [one for function in functions for one in function(p)]


def check(p):
    """Every bound holds where it applies, and (b) is never looser than (a)."""
    for one in all_bounds(p):
        assert one.holds in (True, None), (one.name, one.slack.min(), one.rounding)
        assert one.applies == (one.holds is not None)
    (a_below, a_above), (b_below, b_above) = jl.bounds.weyl(p), jl.bounds.weyl_all_pairs(p)
    scale = 1e-12 * max(abs(p.total[0]), 1e-300)
    assert np.all(b_below.value >= a_below.value - scale)
    assert np.all(b_above.value <= a_above.value + scale)
    below, above = jl.bounds.tightest(p)
    for pair in (jl.bounds.weyl(p), jl.bounds.weyl_all_pairs(p), jl.bounds.relative(p)):
        if pair[0].applies:
            assert np.all(below.value >= pair[0].value)
            assert np.all(above.value <= pair[1].value)


@given(seed=st.integers(0, 10**6), base=st.sampled_from(KINDS), added=st.sampled_from(KINDS))
def test_every_bound_holds(seed, base, added):
    rng = np.random.default_rng(seed)
    kernel = kernel_of(S=jacobian_of(rng, base), T=jacobian_of(rng, added))
    p = jl.bounds.perturbation(kernel, ["S"], ["T"])
    check(p)
    assert (p.relative is not None) == (base in ("plain", "graded"))
    np.testing.assert_allclose(p.total, np.linalg.eigvalsh(kernel.matrix())[::-1], atol=1e-12 * p.total[0])
    if added == "zero":  # nothing is added: (a) and (b) say exactly that
        for pair in (jl.bounds.weyl(p), jl.bounds.weyl_all_pairs(p)):
            for one in pair:
                np.testing.assert_array_equal(one.value, p.base)


@given(seed=st.integers(0, 10**6))
def test_against_brute_force(seed):
    rng = np.random.default_rng(seed)
    kernel = kernel_of(S=rng.normal(size=(M, 2 * M)), T=rng.normal(size=(M, 3)))
    p = jl.bounds.perturbation(kernel, ["S"], ["T"])
    k_s, e = kernel.subset(["S"]).matrix(), kernel.subset(["T"]).matrix()
    mu_s, mu_e = (np.linalg.eigvalsh(matrix)[::-1] for matrix in (k_s, e))
    above, below = np.full(M, np.inf), np.full(M, -np.inf)
    for i in range(1, M + 1):
        for j in range(1, M + 1):
            if i + j - 1 <= M:
                above[i + j - 2] = min(above[i + j - 2], mu_s[i - 1] + mu_e[j - 1])
            if i + j - M >= 1:
                below[i + j - M - 1] = max(below[i + j - M - 1], mu_s[i - 1] + mu_e[j - 1])
    lower, upper = jl.bounds.weyl_all_pairs(p)
    np.testing.assert_allclose(lower.value, below, rtol=1e-12)
    np.testing.assert_allclose(upper.value, above, rtol=1e-12)
    root = np.linalg.inv(scipy.linalg.sqrtm(k_s))
    omega = np.linalg.eigvalsh(root @ e @ root)
    lower, upper = jl.bounds.relative(p)
    np.testing.assert_allclose(upper.value, mu_s * (1 + omega[-1]), rtol=1e-6)
    np.testing.assert_allclose(lower.value, mu_s * (1 + omega[0]), rtol=1e-6 * (1 + omega[-1]))
    lower, upper = jl.bounds.condition(p)
    assert lower.measured == pytest.approx(np.linalg.cond(k_s + e), rel=1e-6)
    assert upper.value == pytest.approx((mu_s[0] + mu_e[0]) / mu_s[-1], rel=1e-6)
    assert lower.value == pytest.approx(max(1, mu_s[0] / (mu_s[-1] + mu_e[0])), rel=1e-6)


def test_the_relative_bound_is_reached_where_a_block_is_doubled():
    jac = jacobian_of(np.random.default_rng(0), "graded")
    p = jl.bounds.perturbation(kernel_of(S=jac, T=jac), ["S"], ["T"])
    for one in jl.bounds.relative(p):
        np.testing.assert_allclose(one.value, 2 * p.base, rtol=1e-4)
    assert jl.bounds.relative(p)[1].value[-1] < 1e-3 * jl.bounds.weyl(p)[1].value[-1]


def test_singular_sums_claim_no_condition_number():
    jac = jacobian_of(np.random.default_rng(1), "low rank")
    lower, upper = jl.bounds.condition(jl.bounds.perturbation(kernel_of(S=jac[:, :2], T=jac[:, 2:]), ["S"], ["T"]))
    assert lower.holds
    assert np.isinf(lower.measured)
    assert upper.holds is None
    zero = np.zeros((M, 3))
    p = jl.bounds.perturbation(kernel_of(S=zero, T=zero), ["S"], ["T"])
    check(p)
    assert all(one.holds is None for one in jl.bounds.condition(p))


@pytest.fixture(scope="module")
def kernel():
    tun = jl.lora(cases.tiny_model(2, head="mean"), rank=2, targets=("query", "key", "value", "mlp/up"))
    return jl.ntk(tun, cases.text_batch(8, num_labels=2), blocks="module")


def test_a_transformer_chain(kernel):
    chain = [["classifier"], ["classifier", "encoder/layer_1"], ["classifier", "encoder"]]
    for base, whole in itertools.pairwise(chain):
        blocks = set(kernel.subset(base).parts)
        check(jl.bounds.perturbation(kernel, base, sorted(set(kernel.subset(whole).parts) - blocks)))
    rows = jl.bounds.perturbation_table(kernel, chain)
    m = len(kernel.matrix())
    assert [(row["step"], row["index"]) for row in rows] == [(s, i) for s in (1, 2) for i in range(1, m + 1)]
    mu = np.linalg.eigvalsh(kernel.matrix())[::-1]
    np.testing.assert_allclose([row["eigenvalue"] for row in rows[m:]], mu, atol=1e-12 * mu[0])
    np.testing.assert_allclose([row["base"] for row in rows[m:]], [row["eigenvalue"] for row in rows[:m]], atol=1e-9)
    for row in rows:
        room = 1e-9 * mu[0]
        assert row["lower"] - room <= row["eigenvalue"] <= row["upper"] + room
        assert row["lower"] == row[f"lower_{row['lower_by']}"] == max(row["lower_a"], row["lower_b"], row["lower"])
        assert row["upper"] == row[f"upper_{row['upper_by']}"] == min(row["upper_a"], row["upper_b"], row["upper"])
        for side in ("lower", "upper"):
            assert row[f"tightness_{side}"] is None or 0 <= row[f"tightness_{side}"] <= 1
    assert rows[0]["set"].split()[0].startswith("encoder/layer_1/")


@pytest.mark.parametrize("ridge", [0.0, 0.7])
def test_bounds_along_a_chain_are_those_of_its_steps(kernel, ridge):
    chain = [["classifier"], ["classifier", "encoder/layer_1"], ["classifier", "encoder"]]
    found = jl.bounds.chain_bounds(kernel, chain, ridge)
    steps = [
        jl.bounds.perturbation(kernel, ["classifier"], ["encoder/layer_1"], ridge),
        jl.bounds.perturbation(kernel, ["classifier", "encoder/layer_1"], ["encoder/layer_0"], ridge),
    ]
    expected = [all_bounds(p)[:8] for p in steps]
    for one, *parts in zip(found, *expected, strict=True):
        assert one.holds in (True, None)
        assert one.name == parts[0].name
        np.testing.assert_array_equal(one.value, np.concatenate([np.atleast_1d(part.value) for part in parts]))
    mu = np.linalg.eigvalsh(kernel.matrix())[::-1] + ridge
    np.testing.assert_allclose(found[0].measured[-len(mu) :], mu, atol=1e-12 * mu[0])
    assert float(found[-1].measured[-1]) == pytest.approx(mu[0] / mu[-1], rel=1e-6) or ridge == 0
    with pytest.raises(jl.InputError, match="ridge=-1"):
        jl.bounds.perturbation(kernel, ["classifier"], ["encoder"], -1.0)


def test_bad_sets(kernel):
    for base, added, message in (
        (["encoder/layer_0"], ["encoder"], "is in both sets"),
        (["encoder/layer_0"], ["layer_9"], "is no block"),
        ([], ["encoder"], "needs at least one block"),
    ):
        with pytest.raises(jl.InputError, match=message):
            jl.bounds.perturbation(kernel, base, added)
    for chain, message in (
        ([["encoder"]], "a chain of 1 set"),
        ([["encoder"], ["encoder"]], "does not hold set 1 and more"),
        ([["encoder/layer_0"], ["encoder/layer_1"]], "does not hold set 1 and more"),
    ):
        with pytest.raises(jl.InputError, match=message):
            jl.bounds.perturbation_table(kernel, chain)
    nan = kernel_of(S=np.full((M, 2), np.nan), T=np.ones((M, 2)))
    with pytest.raises(jl.InputError, match="NaN"):
        jl.bounds.perturbation(nan, ["S"], ["T"])
