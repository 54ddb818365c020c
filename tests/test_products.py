import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.sparse.linalg

import jaxlin as jl
from jaxlin import (
    estimate_effective_dimension,
    estimate_trace,
    extreme_eigenvalues,
    lanczos_quadrature,
    ntk_vector_product,
    sketch,
    spectral_density,
)
from jaxlin.data.dataset import as_dataset
from jaxlin.ntk import lanczos, products
from jaxlin.ntk.jacobian import to_float64
from tests import cases
from tests.test_ntk import gelu_network


def dense(tun, x1, x2=None, theta=None):
    j1 = cases.reference_jacobian(tun, x1, theta)[0]
    return j1 @ (j1 if x2 is None else cases.reference_jacobian(tun, x2, theta)[0]).T


def some(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


def orthonormal(n, scale=2.0):
    """A linear model whose kernel is `scale**2` times the identity."""
    return jl.Tunable(lambda theta, batch: batch["x"] @ theta["w"], {"w": jnp.zeros((n, 1))}), {"x": scale * np.eye(n)}


@pytest.fixture(scope="module")
def small():
    """An MLP on 21 examples with three outputs in float64, where K is known to 1e-15: operator and dense kernel."""
    tun, data = cases.mlp(3), cases.vectors(21, num_labels=3)
    return ntk_vector_product(tun, data, dtype="float64"), dense(tun, data)


@pytest.mark.parametrize(
    ("n1", "n2", "away"), [(21, None, False), (16, None, True), (1, None, True), (21, 5, True), (3, 40, False)]
)
def test_product_equals_the_dense_reference(n1, n2, away):
    tun, x1 = cases.mlp(3), cases.vectors(n1)
    x2, theta = None if n2 is None else cases.vectors(n2, seed=4), cases.moved(tun) if away else None
    kernel, v = dense(tun, x1, x2, theta), some(3 * (n2 or n1), 4)
    for dtype, tolerance in ((None, 1e-6), ("float64", 1e-14)):
        operator = ntk_vector_product(tun, x1, x2, theta=theta, dtype=dtype)
        assert operator.shape == kernel.shape
        assert operator.symmetric == (n2 is None)
        assert operator.deviation < tolerance
        assert cases.relative_error(operator @ v, kernel @ v) < tolerance
        single = operator @ v[:, 0]
        np.testing.assert_array_equal(single, (operator @ v)[:, 0])
        np.testing.assert_array_equal(single.reshape(-1, 3), operator @ v[:, 0].reshape(-1, 3))
        assert single.dtype == np.float64
        u = some(3 * n1, seed=3)
        assert abs(u @ single - (operator.T @ u) @ v[:, 0]) < tolerance * np.linalg.norm(u) * np.linalg.norm(single)
        scipys = operator.linear_operator()
        np.testing.assert_array_equal(scipys.matmat(v), operator @ v)
        np.testing.assert_array_equal(scipys.rmatvec(u), operator.T @ u)
    assert (operator @ np.zeros((kernel.shape[1], 0))).shape == (kernel.shape[0], 0)


@pytest.mark.parametrize(
    ("name", "away"),
    [("lora", True), *(pytest.param(name, False, marks=pytest.mark.slow) for name in ("lora", "full"))],
)
def test_product_with_text_of_several_lengths(model, name, away):
    tun, text = cases.PEFT[name](model), cases.text_batch(19, seed=5, longest=12)
    theta = cases.moved(tun) if away else None
    operator = ntk_vector_product(tun, text, theta=theta, check_examples=0 if name == "full" else 2)
    assert [positions.shape for positions, _ in operator.stacked[0].buckets] == [
        (1, 16)
    ] * 2  # two lengths, of at most 16 examples
    v = some(57, seed=1)
    assert cases.relative_error(operator @ v, dense(tun, text, theta=theta) @ v) < 2e-6
    assert name == "full" or 1e-9 < operator.deviation < 2e-6


def test_x64_changes_nothing_of_a_float32_model(x64):
    tun, data = cases.mlp(2), cases.vectors(9)
    operator = ntk_vector_product(tun, data)
    assert {leaf.dtype for leaf in jax.tree.leaves(operator._function)} == {np.dtype(np.float32)}
    v = some(18)
    assert 1e-9 < cases.relative_error(operator @ v, dense(tun, data) @ v) < 1e-6
    assert jax.config.read("jax_enable_x64") == x64


def test_the_pattern_that_xla_gets_wrong_is_right_or_refused():
    """tanh-GELU with respect to low-rank factors (jaxlib <= 0.10.2): both passes, and matfree's program of both."""
    data = {"x": some(40, 8).astype(np.float32)}
    kernel, operator = dense(gelu_network(), data), ntk_vector_product(gelu_network(), data)
    v = some(len(kernel))
    assert cases.relative_error(operator @ v, kernel @ v) < 2e-5
    top = max(nodes[-1] for nodes in lanczos_quadrature(operator, probes=2, depth=30).nodes)
    assert top == pytest.approx(np.linalg.eigvalsh(kernel)[-1], rel=1e-5)


def test_a_wrong_product_is_not_returned(monkeypatch):
    tun, data, other = cases.mlp(2), cases.vectors(5), cases.vectors(4, seed=1)
    right = ntk_vector_product(tun, data)
    rectangular = ntk_vector_product(tun, data, other)
    expected = right @ some(10)
    pull, push, decompose = products.pull, products.push, lanczos._lanczos
    with monkeypatch.context() as patch:
        patch.setattr(products, "pull", lambda *args: jax.tree.map(lambda leaf: leaf * 1.001, pull(*args)))
        for x2 in (None, other):
            with pytest.raises(FloatingPointError, match=r"product with the kernel deviates by 1\.0e-03"):
                ntk_vector_product(tun, data, x2)
        with pytest.raises(FloatingPointError, match="deviates"):
            _ = rectangular.T
        wrong = ntk_vector_product(tun, data, check_examples=0)
        assert wrong.deviation is None
        np.testing.assert_allclose(wrong @ some(10), 1.001 * expected, rtol=1e-5)
    with monkeypatch.context() as patch:
        patch.setattr(products, "push", lambda *args: push(*args).at[0, 0].add(jnp.nan))
        with pytest.raises(FloatingPointError, match="deviates by nan"):
            ntk_vector_product(tun, data)
    with monkeypatch.context() as patch:
        patch.setattr(lanczos, "_lanczos", lambda *a, **k: jax.tree.map(lambda x: x * 1.001, decompose(*a, **k)))
        with pytest.raises(FloatingPointError, match="Lanczos step deviates"):
            lanczos_quadrature(right)
    monkeypatch.setattr(products, "MEMORY_BUDGET", 100)
    with pytest.raises(jl.InputError, match="check_examples=0 to go without"):
        ntk_vector_product(tun, data)


def test_nothing_is_compiled_again():
    traced = []

    def apply(theta, batch):
        traced.append(batch["x"].shape)
        return cases.mlp_apply(theta, batch)

    tun = dataclasses.replace(cases.mlp(2), apply=apply)
    operator = ntk_vector_product(tun, cases.vectors(40))
    assert lanczos_quadrature(operator, probes=2, depth=5)
    traced.clear()
    _ = operator @ some(80, 3)
    lanczos_quadrature(operator, probes=3, depth=5)
    estimate_trace(operator, probes=2)
    extreme_eigenvalues(operator, 2)
    ntk_vector_product(tun, cases.vectors(40, seed=1), theta=cases.moved(tun), check_examples=0) @ some(80)
    assert not traced


@pytest.mark.slow
def test_weights_are_arguments_and_memory_does_not_grow(model):
    lora = ntk_vector_product(jl.lora(model, rank=2), cases.text_batch(3, longest=8), check_examples=0)
    with jax.enable_x64(True):
        closed = jax.make_jaxpr(products.pull)(some(3, 3), *lora._function, lora.stacked[0])
    assert all(np.size(const) < 200 for const in closed.consts)
    sizes = {}
    for n in (32, 3200):
        operator = ntk_vector_product(cases.mlp(2, width=64), cases.vectors(n), check_examples=0)
        with jax.enable_x64(True):
            vector, tangent = jnp.zeros((n, 2)), operator.pull(np.zeros((n, 2)))
            for name, operand in (("pull", vector), ("push", tangent)):
                lowered = getattr(products, name).lower(operand, *operator._function, operator.stacked[0])
                sizes[name, n] = lowered.compile().memory_analysis().temp_size_in_bytes
    assert sizes["pull", 3200] == sizes["pull", 32]
    assert sizes["push", 3200] - sizes["push", 32] <= 4 * 3168 * 2 * 8  # a few vectors


@pytest.mark.parametrize("which", ["largest", "smallest"])
def test_extreme_eigenvalues(which):
    tun, data = cases.mlp(3), cases.vectors(12, num_labels=3)
    kernel, expected = dense(tun, data), np.linalg.eigvalsh(dense(tun, data))[::-1]
    for dtype, tolerance in ((None, 1e-6), ("float64", 1e-12)):
        operator = ntk_vector_product(tun, data, dtype=dtype)
        found = extreme_eigenvalues(operator, 4, which=which, vectors=True, tolerance=1e-8)
        exact = expected[:4] if which == "largest" else expected[-4:]
        np.testing.assert_allclose(found.values, exact, rtol=0, atol=tolerance * expected[0])
        assert np.all(np.abs(found.values - exact) <= found.residuals + (operator.deviation + 1e-14) * expected[0])
        assert np.all(found.residuals < 1e-6 * expected[0])
        error = np.linalg.norm(kernel @ found.vectors - found.vectors * found.values, axis=0)
        np.testing.assert_allclose(error, found.residuals, atol=2 * tolerance * expected[0])
        np.testing.assert_allclose(found.vectors.T @ found.vectors, np.eye(4), atol=1e-6)
    assert extreme_eigenvalues(operator, 1).vectors is None


def test_eigenvalues_that_do_not_converge_are_not_returned(small):
    with pytest.raises(FloatingPointError, match="of the 3 smallest eigenvalues converged to tolerance=1e-14"):
        extreme_eigenvalues(small[0], 3, which="smallest", tolerance=1e-14, max_products=20)


def test_trace(small):
    operator, kernel = small
    found = estimate_trace(operator, probes=300)
    assert found.samples.shape == (300,)
    assert found.value == found.samples.mean()
    assert abs(found.value - np.trace(kernel)) < 3 * found.standard_error
    variance = 2 * (np.sum(kernel**2) - np.sum(np.diag(kernel) ** 2))
    assert found.standard_error == pytest.approx((variance / 300) ** 0.5, rel=0.15)
    np.testing.assert_array_equal(estimate_trace(operator, probes=7).samples, found.samples[:7])
    assert estimate_trace(operator, probes=7, rng=1).value != found.samples[:7].mean()


def test_effective_dimension(small):
    operator, kernel = small
    mu = np.clip(np.linalg.eigvalsh(kernel), 0, None)
    for depth in (6, 12, 63):
        quadrature = lanczos_quadrature(operator, probes=60, depth=depth)
        for lam in (1e-3 * mu[-1], 0.1 * mu[-1], mu[-1]):
            exact, found = np.sum(mu / (mu + lam)), quadrature.effective_dimension(lam)
            assert -3 * found.standard_error < found.value - exact < found.truncation + 3 * found.standard_error
            assert found.standard_error < 0.05 * len(mu)
            if depth == 63:
                assert found.truncation < 1e-9
    # Gauss from above, Gauss-Radau from below, of every probe's exact value: more depth cannot leave the bracket.
    lam = 1e-3 * mu[-1]
    short, whole = (lanczos_quadrature(operator, probes=8, depth=depth).effective_dimension(lam) for depth in (6, 63))
    assert short.truncation > 0.1
    assert whole.value < short.value < whole.value + short.truncation
    assert np.all(short.samples >= whole.samples - 1e-9)
    # At full depth each probe is exact, though the kernel is singular (P < m) and Lanczos ends before.
    inverse = np.linalg.solve(kernel + lam * np.eye(len(kernel)), kernel)
    drawn = [probe.reshape(-1) for probe in lanczos._probes(operator, 8, 0, "lanczos")]
    np.testing.assert_allclose(whole.samples, [v @ inverse @ v for v in drawn], rtol=1e-10)
    same = estimate_effective_dimension(operator, lam, probes=8, depth=6)
    np.testing.assert_array_equal(same.samples, short.samples)


@pytest.mark.slow
def test_where_the_kernel_does_not_fit():
    """Of 30,000 examples K has 27 GiB; JᵀJ, of 35 parameters, has its eigenvalues."""
    tun, data = cases.mlp(), cases.vectors(30_000)
    with jax.enable_x64(True):
        rows = jax.vmap(jax.jacrev(lambda theta, x: cases.mlp_apply(theta, {"x": x})), (None, 0))
        leaves = jax.tree.leaves(rows(to_float64(tun.theta0), data["x"]))
    jac = np.concatenate([np.asarray(leaf).reshape(60_000, -1) for leaf in leaves], axis=1)
    mu = np.linalg.eigvalsh(jac.T @ jac)[::-1]
    operator = ntk_vector_product(tun, data)
    assert operator.shape == (60_000, 60_000)
    np.testing.assert_allclose(extreme_eigenvalues(operator, 3).values, mu[:3], rtol=1e-5)
    trace = estimate_trace(operator, probes=20)
    assert abs(trace.value - mu.sum()) < 4 * trace.standard_error
    lam = 1e-4 * mu[0]
    found = estimate_effective_dimension(operator, lam, probes=10, depth=20)
    assert (
        -4 * found.standard_error < found.value - np.sum(mu / (mu + lam)) < found.truncation + 4 * found.standard_error
    )


@pytest.mark.parametrize("scale", ["log", "linear"])
def test_spectral_density(small, scale):
    operator, kernel = small
    mu = np.linalg.eigvalsh(kernel)
    mu = mu[mu > 1e-10 * mu[-1]]  # P < m: the others are zero
    assert len(mu) < len(kernel)
    if scale == "log":
        width, places = 0.3, np.linspace(-5, 3, 200)
        grid, centres = 10**places, np.log10(mu)
    else:
        width = 0.05 * mu[-1]
        places = grid = np.linspace(-0.5, 1.5, 200) * mu[-1]
        centres = np.concatenate([mu, np.zeros(len(kernel) - len(mu))])
    exact = np.exp(-0.5 * ((places[:, None] - centres) / width) ** 2).sum(axis=1) / len(kernel)
    exact /= width * (2 * np.pi) ** 0.5
    found = spectral_density(operator, grid, width=width, scale=scale, probes=60, depth=63)
    np.testing.assert_array_equal(found.grid, grid)
    assert np.all(np.abs(found.values - exact) < 4 * found.standard_error + 1e-6 * exact.max())
    assert np.median(np.abs(found.values - exact)[exact > 0.05 * exact.max()] / exact[exact > 0.05 * exact.max()]) < 0.1
    assert np.all(found.standard_error[exact > 0.2 * exact.max()] < 0.1 * exact.max())
    assert np.trapezoid(found.values, places) == pytest.approx(len(centres) / len(kernel), rel=0.02)


def test_estimates_are_exact_where_probes_are():
    operator = ntk_vector_product(*orthonormal(6))
    assert estimate_trace(operator, probes=2).value == pytest.approx(24, rel=1e-12)
    quadrature = lanczos_quadrature(operator, probes=2)
    for nodes in quadrature.nodes:
        np.testing.assert_allclose(nodes, [4.0], rtol=1e-6)  # the Krylov space ends after one step
    found = quadrature.effective_dimension(2.0)
    assert (found.value, found.standard_error, found.truncation) == (
        pytest.approx(4, rel=1e-6),
        pytest.approx(0, abs=1e-12),
        0.0,
    )
    density = quadrature.density(np.array([4.0]), width=0.5, scale="linear")
    np.testing.assert_allclose(density.values, [1 / (0.5 * (2 * np.pi) ** 0.5)], rtol=1e-6)
    one = ntk_vector_product(cases.mlp(1), cases.vectors(1))
    kernel = dense(cases.mlp(1), cases.vectors(1)).item()
    assert estimate_effective_dimension(one, 0.3, probes=2).value == pytest.approx(kernel / (kernel + 0.3), rel=1e-6)


def test_a_kernel_that_vanishes():
    tun, data = orthonormal(4, scale=0.0)
    operator = ntk_vector_product(tun, data)
    assert operator.deviation == 0
    assert not (operator @ some(4)).any()
    assert estimate_trace(operator, probes=2).value == 0
    assert estimate_effective_dimension(operator, 1.0, probes=2).value == 0
    assert sketch(tun, data, 2).relative_error == 0
    with pytest.raises(jl.InputError, match="this kernel vanishes"):
        extreme_eigenvalues(operator, 2)


@pytest.mark.slow
def test_estimates_with_text(model):
    tun, text = cases.PEFT["lora"](model), cases.text_batch(19, seed=5, longest=12)
    theta, calls = cases.moved(tun), []
    kernel, operator = dense(tun, text, theta=theta), ntk_vector_product(tun, text, theta=theta)
    mu = np.linalg.eigvalsh(kernel)
    lam = 1e-2 * mu[-1]
    quadrature = lanczos_quadrature(operator, probes=8, depth=16, progress=lambda *done: calls.append(done))
    found, trace, exact = (
        quadrature.effective_dimension(lam),
        estimate_trace(operator, probes=8),
        np.sum(mu / (mu + lam)),
    )
    assert -3 * found.standard_error < found.value - exact < found.truncation + 3 * found.standard_error
    assert found.truncation < 0.02 * exact
    assert abs(trace.value - np.trace(kernel)) < 3 * trace.standard_error
    np.testing.assert_allclose(extreme_eigenvalues(operator, 3).values, mu[::-1][:3], rtol=1e-5)
    assert calls == [(i, 8) for i in range(1, 9)]


def test_sketch_is_unbiased_with_the_error_stated():
    tun, data = cases.mlp(3), cases.vectors(21, num_labels=3)
    jac, _ = cases.reference_jacobian(tun, data)
    kernel, d, draws = jac @ jac.T, 8, 150
    t, f, fourth = np.trace(kernel) ** 2, np.sum(kernel**2), np.sum(np.sum(jac**2, axis=0) ** 2)
    found = [sketch(tun, data, d, rng=seed) for seed in range(draws)]
    assert found[0].rows.shape == (21, 3, d)
    assert found[0].rows.dtype == np.float64
    assert found[0].trace == pytest.approx(np.trace(kernel), rel=1e-6)
    assert found[0].column_fourth == pytest.approx(fourth, rel=1e-6)
    error = [np.sum((one.kernel_matrix() - kernel) ** 2) for one in found]
    expected = (t + f - 2 * fourth) / d
    assert np.mean(error) == pytest.approx(expected, rel=0.07)
    mean = np.mean([one.kernel_matrix() for one in found], axis=0)
    assert np.linalg.norm(mean - kernel) < 1.5 * (expected / draws) ** 0.5
    assert np.mean([one.squared_norm for one in found]) == pytest.approx(f, rel=0.1)  # the clip hardly acts at d = 8
    wide = [sketch(tun, data, 64, rng=seed) for seed in range(20)]
    stated = [one.relative_error for one in wide]
    assert np.mean(stated) == pytest.approx(((t + f - 2 * fourth) / 64 / f) ** 0.5, rel=0.05)
    assert np.std(stated) < 0.2 * np.mean(stated)
    measured = np.mean([np.sum((one.kernel_matrix() - kernel) ** 2) for one in wide]) ** 0.5 / f**0.5
    assert measured == pytest.approx(np.mean(stated), rel=0.1)


def test_sketch_of_two_data_sets():
    tun, data, other = cases.mlp(2), cases.vectors(7), cases.vectors(3, seed=1)
    kernel = dense(tun, data, other)
    pairs = [(sketch(tun, data, 32, rng=seed), sketch(tun, other, 32, rng=seed)) for seed in range(60)]
    mean = np.mean([first.kernel_matrix(second) for first, second in pairs], axis=0)
    spread = np.std([first.kernel_matrix(second) for first, second in pairs], axis=0) / 60**0.5
    assert np.sum((mean - kernel) ** 2) < 2 * np.sum(spread**2)
    assert np.array_equal(pairs[0][0].rows, sketch(tun, data, 32, rng=jax.random.key(0)).rows)
    with pytest.raises(jl.InputError, match="rng and dimension of both"):
        pairs[0][0].kernel_matrix(pairs[1][1])


def test_random_signs_of_a_leaf_depend_on_its_name_only():
    tun, data = cases.mlp(2), cases.vectors(5)

    def only(kept):
        fixed = {name: leaves for name, leaves in tun.theta0.items() if name != kept}
        part = jl.Tunable(lambda theta, b: cases.mlp_apply({**fixed, **theta}, b), {kept: tun.theta0[kept]})
        return sketch(part, data, 40).rows

    np.testing.assert_allclose(only("hidden") + only("out"), sketch(tun, data, 40).rows, atol=1e-6)
    signs = {}
    for x64 in (False, True):
        with jax.enable_x64(x64):
            signs[x64] = sketch(*orthonormal(7, scale=1.0), 40).rows * 40**0.5
    np.testing.assert_allclose(np.abs(signs[False]), 1, rtol=1e-12)
    np.testing.assert_array_equal(signs[False], signs[True])
    assert len(np.unique(signs[False], axis=0)) == 7


def test_random_signs_are_independent(monkeypatch):
    """Over the blocks that they are drawn in: entries of RᵀR/P off the diagonal have variance 1/P."""
    from jaxlin.ntk import sketch as module

    monkeypatch.setattr(module, "_COLUMNS", 64)
    size, d = 1000, 45
    signs = module._project(np.eye(size), d, jax.random.key(3))
    np.testing.assert_array_equal(np.abs(signs), 1)
    correlations = (signs.T @ signs / size)[~np.eye(d, dtype=bool)]
    assert correlations.std() == pytest.approx(size**-0.5, rel=0.1)
    assert np.abs(signs.mean()) < 4 * (size * d) ** -0.5


def test_sketch_in_parts_is_the_same(model):
    tun, text = jl.head_only(model), cases.text_batch(9, seed=5, longest=12)
    seen = []
    whole = sketch(tun, text, 5, theta=cases.moved(tun))
    one = products.jacobian_bytes(tun, as_dataset(text)) // 9
    parts = sketch(
        tun, text, 5, theta=cases.moved(tun), memory_budget=4 * one, progress=lambda *done: seen.append(done)
    )
    assert seen == [(4, 9), (8, 9), (9, 9)]
    assert cases.relative_error(parts.rows, whole.rows) < 1e-5
    assert parts.trace == pytest.approx(whole.trace, rel=1e-6)
    assert parts.column_fourth == pytest.approx(whole.column_fourth, rel=1e-5)


BAD = {
    "dtype": (lambda op: ntk_vector_product(op.tun, op.data1, dtype="float16"), "dtype='float16' is unknown"),
    "check": (lambda op: ntk_vector_product(op.tun, op.data1, check_examples=-1), "check_examples=-1"),
    "precision": (lambda op: ntk_vector_product(op.tun, op.data1, precision="hi"), "precision='hi' is unknown"),
    "theta": (lambda op: ntk_vector_product(op.tun, op.data1, theta={"w": jnp.ones(2)}), "structure and shapes"),
    "vector": (lambda op: op @ np.zeros(5), r"takes real numbers of shape \(63,\), \(63, k\) or \(21, 3\)"),
    "complex": (lambda op: op @ np.zeros(63, complex), "got complex128"),
    "k": (lambda op: extreme_eigenvalues(op, 63), "k=63; expected from 1 to N"),
    "which": (lambda op: extreme_eigenvalues(op, 2, which="LM"), "which='LM' is unknown"),
    "tolerance": (lambda op: extreme_eigenvalues(op, 2, tolerance=-1.0), "tolerance=-1.0"),
    "probes": (lambda op: estimate_trace(op, probes=1), "probes=1; expected at least 2"),
    "probes too": (lambda op: lanczos_quadrature(op, probes=0), "probes=0; expected at least 2"),
    "depth": (lambda op: lanczos_quadrature(op, depth=0), "depth=0; expected at least 1"),
    "lam": (lambda op: estimate_effective_dimension(op, 0.0), "lam=0.0; expected above 0"),
    "lam nan": (lambda op: estimate_effective_dimension(op, float("nan")), "lam=nan; expected above 0"),
    "scale": (lambda op: spectral_density(op, np.ones(1), width=1.0, scale="sqrt"), "scale='sqrt' is unknown"),
    "width": (lambda op: spectral_density(op, np.ones(1), width=0.0), "width=0.0; expected above 0"),
    "grid": (lambda op: spectral_density(op, np.arange(2.0), width=1.0), "grid must be numbers"),
    "dimension": (lambda op: sketch(op.tun, op.data1, 0), "dimension=0; expected at least 1"),
    "sketch dtype": (lambda op: sketch(op.tun, op.data1, 2, dtype="bfloat16"), "dtype='bfloat16' is unknown"),
    "budget": (lambda op: sketch(op.tun, op.data1, 2, memory_budget=10), "more than memory_budget"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_arguments(small, case):
    call, message = BAD[case]
    with pytest.raises(jl.InputError, match=message):
        call(small[0])


def test_products_of_less_precision_are_checked_for_theirs():
    operator = ntk_vector_product(cases.mlp(2), cases.vectors(6), precision="BF16_BF16_F32")
    assert 1e-5 < operator.deviation < 0.1


def test_spectra_are_of_examples_with_themselves():
    operator = ntk_vector_product(cases.mlp(), cases.vectors(4), cases.vectors(4, seed=1), check_examples=0)
    for call in (
        lambda: extreme_eigenvalues(operator),
        lambda: estimate_trace(operator),
        lambda: lanczos_quadrature(operator),
    ):
        with pytest.raises(jl.InputError, match="two sets of examples"):
            call()
    assert isinstance(operator.linear_operator(), scipy.sparse.linalg.LinearOperator)
