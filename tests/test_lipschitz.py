"""Lipschitz profiles and smoothness against dense float64 references and models whose constants are known."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

import jaxlin as jl
from jaxlin.linearize import remainder
from jaxlin.ntk import change as norms
from jaxlin.ntk.change import DenseChange, ProductChange, change, distance
from jaxlin.ntk.jacobian import jacobian_bytes, to_float64
from jaxlin.ntk.lipschitz import moved, random_direction
from jaxlin.training.losses import targets
from jaxlin.training.smoothness import smoothness
from tests import cases

METHODS = ("dense", "products")
QUANTITIES = ["stacked", "jacobian", "kernel"]


def quadratic_apply(theta, batch):
    x = jnp.asarray(batch["x"], theta["w"].dtype)
    return (x @ theta["w"] + 0.5 * batch["s"] * jnp.sum(theta["w"] ** 2))[:, None]


def quadratic(n=5, seed=0):
    """f = xᵀθ + ½ s‖θ‖², whose J(θ) − J₀ is s δᵀ: every ratio is known, whatever the direction."""
    rng = np.random.default_rng(seed)
    x, s = rng.normal(size=(n, 3)), rng.normal(size=n)
    return jl.Tunable(quadratic_apply, {"w": jnp.asarray(rng.normal(size=3), jnp.float32)}), {"x": x, "s": s}


PROBLEMS = {
    "mlp": lambda: (cases.mlp(), cases.vectors(6)),
    "one output": lambda: (cases.mlp(num_outputs=1), cases.vectors(5)),
    "bert-lora": lambda: (jl.lora(cases.tiny_model(), rank=2), cases.text_batch(5, longest=8)),
}


@pytest.fixture(scope="module", params=["mlp", "one output", pytest.param("bert-lora", marks=pytest.mark.slow)])
def problem(request):
    return PROBLEMS[request.param]()


def reference(tun, data, theta, c):
    """The three quantities and the drift of the kernel, times r, from dense float64 Jacobians."""
    before, after = (cases.reference_jacobian(tun, data, point)[0] for point in (tun.theta0, theta))
    rows = (after - before).reshape(-1, c, before.shape[1])
    drift = after @ after.T - before @ before.T
    n = len(rows)
    blocks = drift.reshape(n, c, n, c).transpose(0, 2, 1, 3)
    return {
        "stacked": np.linalg.norm(after - before, 2),
        "jacobian": max(np.linalg.norm(one, 2) for one in rows),
        "kernel": max(np.linalg.norm(blocks[i, j], 2) for i in range(n) for j in range(n)),
        "drift": np.linalg.norm(drift, 2),
    }


@pytest.mark.parametrize(("method", "on_a_gpu"), [("dense", False), ("dense", True), ("products", False)])
def test_every_norm_against_dense_float64(problem, method, on_a_gpu, monkeypatch):
    monkeypatch.setattr(norms, "multiplies_on_device", lambda: on_a_gpu)  # the choice alone is made as there
    tun, data = problem
    c = np.asarray(tun.apply(tun.theta0, data)).shape[1]
    data = jl.Dataset.from_columns(data)
    measure = change(tun, data, method=method, tolerance=1e-8)
    assert isinstance(measure, DenseChange if method == "dense" else ProductChange)
    sigma = np.linalg.norm(cases.reference_jacobian(tun, data)[0], 2)
    assert measure.sigma().value == pytest.approx(sigma, rel=1e-10)
    for theta in (cases.moved(tun), cases.moved(tun, 1e-3, 1)):
        expected = reference(tun, data, theta, c)
        found = measure.norms(theta, [*QUANTITIES, "drift"])
        for name, norm in found.items():
            assert norm.value == pytest.approx(expected[name], rel=1e-9), name
            assert 0 <= norm.residual <= 1e-7
            assert method == "products" or norm.residual == 0


def test_norms_in_the_dtype_of_the_parameters_against_dense_float64(problem, x64):
    tun, data = problem
    c = np.asarray(tun.apply(tun.theta0, data)).shape[1]
    data = jl.Dataset.from_columns(data)
    measure = change(tun, data, dtype=None)
    assert isinstance(measure, DenseChange)
    assert {rows.dtype for rows in measure.start.rows.values()} == {np.dtype(np.float32)}
    theta = cases.moved(tun)
    there = measure._jacobian(to_float64(theta))  # as random models are
    assert {rows.dtype for rows in there.rows.values()} == {np.dtype(np.float32)}
    found = measure.norms(to_float64(theta), [*QUANTITIES, "drift"])
    expected = reference(tun, data.columns, theta, c)
    for name, norm in found.items():
        assert norm.value == pytest.approx(expected[name], rel=1e-4), name


def test_jacobians_that_are_held_fit_the_budget_in_their_own_dtype():
    tun, data = cases.mlp(), jl.Dataset.from_columns(cases.vectors(6))
    budget = 3 * jacobian_bytes(tun, data, "float32")
    assert isinstance(change(tun, data, memory_budget=budget, dtype=None), DenseChange)
    assert isinstance(change(tun, data, memory_budget=budget), ProductChange)


@pytest.mark.parametrize("method", METHODS)
def test_a_profile_against_dense_float64(method, x64):
    tun, data = cases.mlp(), cases.vectors(6)
    c = 2
    path = [tun.theta0, cases.moved(tun, 0.05, 2)]
    options = {"quantity": QUANTITIES, "directions": 3, "along": path, "seed": 4, "tolerance": 1e-8, "method": method}
    seen = []
    profile = jl.lipschitz_profile(tun, data, [0.1, 1.0], **options, progress=lambda *now: seen.append(now))
    assert seen == [(k, 7) for k in range(1, 8)]
    assert len(profile.table) == 3 * 3
    for radius in (0.1, 1.0):
        thetas = [moved(tun.theta0, random_direction(tun.theta0, 4, k), radius) for k in range(3)]
        assert [distance(theta, to_float64(tun.theta0)) for theta in thetas] == pytest.approx([radius] * 3, rel=1e-12)
        expected = [reference(tun, data, theta, c) for theta in thetas]
        for name in QUANTITIES:
            (row,) = [row for row in profile.table if (row["quantity"], row["radius"]) == (name, radius)]
            ratios = [one[name] / radius for one in expected]
            assert row["L_avg"] == pytest.approx(np.mean(ratios), rel=1e-8)
            assert row["L_upper"] == pytest.approx(max(ratios), rel=1e-8)
            assert (row["directions"], row["seed"], row["along_trajectory"]) == (3, 4, False)
    length, expected = distance(path[1], tun.theta0), reference(tun, data, path[1], c)
    for row in profile.table[-3:]:
        assert row["radius"] == pytest.approx(length)
        assert row["L_upper"] == row["L_avg"] == pytest.approx(expected[row["quantity"]] / length, rel=1e-8)
        assert (row["directions"], row["seed"], row["along_trajectory"]) == (1, None, True)
    # A single example is a row of the stack, and the stack no more than all of them.
    by = {(row["quantity"], row["radius"]): row["L_upper"] for row in profile.table}
    for radius in (0.1, 1.0):
        assert by["jacobian", radius] <= by["stacked", radius] * (1 + 1e-9)
        assert by["stacked", radius] <= by["jacobian", radius] * len(data["labels"]) ** 0.5 * (1 + 1e-9)


@pytest.mark.parametrize("method", METHODS)
def test_a_model_whose_constants_are_known(method):
    tun, data = quadratic()
    profile = jl.lipschitz_profile(tun, data, [0.01, 3.0], quantity=QUANTITIES[:2], directions=2, method=method)
    for row in profile.table:
        size = np.abs(data["s"])
        exact = np.linalg.norm(size) if row["quantity"] == "stacked" else size.max()
        assert row["L_avg"] == pytest.approx(exact, rel=1e-6)
        assert row["L_upper"] == pytest.approx(exact, rel=1e-6)
    assert profile.largest() == pytest.approx(np.linalg.norm(data["s"]), rel=1e-6)
    assert profile.largest("jacobian", within=0.01) == pytest.approx(np.abs(data["s"]).max(), rel=1e-6)
    gap = np.asarray(remainder(tun).apply({"w": tun.theta0["w"] + 2.0}, data))[:, 0]
    np.testing.assert_allclose(gap, 0.5 * data["s"] * 3 * 4, rtol=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_a_linear_model_has_constant_zero(method):
    tun = jl.linearize(cases.mlp())
    profile = jl.lipschitz_profile(tun, cases.vectors(4), [0.5], quantity=QUANTITIES, directions=2, method=method)
    assert max(row["L_upper"] for row in profile.table) < 1e-12


def test_examples_and_pairs_are_those_that_were_given():
    tun, data = cases.mlp(), cases.vectors(7)
    theta = cases.moved(tun)
    options = {"examples": [2, 5], "pairs": [(1, 4), (6, 2)], "along": [theta], "quantity": ["jacobian", "kernel"]}
    found = {row["quantity"]: row["L_upper"] for row in jl.lipschitz_profile(tun, data, [], **options).table}
    before, after = (cases.reference_jacobian(tun, data, point)[0].reshape(7, 2, -1) for point in (tun.theta0, theta))
    r = distance(theta, tun.theta0)
    assert found["jacobian"] == pytest.approx(max(np.linalg.norm((after - before)[i], 2) for i in (2, 5)) / r)
    drifts = [after[i] @ after[j].T - before[i] @ before[j].T for i, j in options["pairs"]]
    assert found["kernel"] == pytest.approx(max(np.linalg.norm(one, 2) for one in drifts) / r)


def test_directions_depend_on_seed_number_and_names_only():
    tun = cases.mlp()
    one, other = (jl.lipschitz_profile(tun, cases.vectors(4), [0.5], directions=k).table[0] for k in (2, 2))
    assert one == other
    assert one != jl.lipschitz_profile(tun, cases.vectors(4), [0.5], directions=2, seed=1).table[0]
    with jax.enable_x64(True):
        again = random_direction(tun.theta0, 0, 1)
    first = random_direction(tun.theta0, 0, 1)
    assert jax.tree.all(jax.tree.map(np.array_equal, first, again))
    assert float(ravel_pytree(first)[0] @ ravel_pytree(first)[0]) == pytest.approx(1)
    alone = random_direction({"out": tun.theta0["out"]}, 0, 1)["out"]["kernel"]
    whole = first["out"]["kernel"]
    np.testing.assert_allclose(alone / np.linalg.norm(alone), whole / np.linalg.norm(whole), rtol=1e-6)


BAD = {
    "radius 0": ({"radii": [0.0]}, "radius 0.0; expected above 0"),
    "negative": ({"radii": [1.0, -1.0]}, "radius -1.0; expected above 0"),
    "NaN": ({"radii": [float("nan")]}, "radius nan; expected above 0"),
    "no radius": ({"radii": []}, "radii is empty and there is no trajectory"),
    "no distance": ({"radii": [], "along": ["start"]}, "every point of the trajectory is θ₀ itself"),
    "no direction": ({"directions": 0}, "directions=0; expected at least 1"),
    "quantity": ({"quantity": "hessian"}, "quantity 'hessian' is unknown"),
    "no quantity": ({"quantity": []}, "no quantity is given"),
    "method": ({"method": "exact"}, "method='exact' is unknown"),
    "dtype": ({"dtype": "bfloat16"}, "dtype='bfloat16'; expected 'float64', or None"),
    "tolerance": ({"tolerance": 0.0}, "tolerance=0.0; expected above 0"),
    "other theta": ({"along": [{"w": np.zeros(3)}]}, r"along\[0\] must have the structure"),
    "examples": ({"examples": [9], "quantity": "jacobian"}, "examples must be indices of the 4 examples"),
    "pairs": ({"pairs": [[0, 1, 2]], "quantity": "kernel"}, "pairs, two each, must be indices of the 4 examples"),
    "no fit": ({"method": "dense", "memory_budget": 10}, "more than memory_budget"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case):
    change, message = BAD[case]
    tun = cases.mlp()
    options = {"radii": [1.0], **change}
    options["along"] = [tun.theta0 if theta == "start" else theta for theta in options.get("along", ())]
    with pytest.raises(jl.InputError, match=message):
        jl.lipschitz_profile(tun, cases.vectors(4), options.pop("radii"), **options)


def test_a_profile_without_the_quantity_says_so():
    profile = jl.lipschitz_profile(cases.mlp(), cases.vectors(3), [1.0], directions=1)
    with pytest.raises(jl.InputError, match="no 'kernel' within radius inf"):
        profile.largest("kernel")
    with pytest.raises(jl.InputError, match=r"no 'stacked' within radius 0\.5"):
        profile.largest(within=0.5)


@pytest.mark.parametrize("method", METHODS)
def test_nan_is_an_error(method):
    tun, data = cases.mlp(), cases.vectors(3)
    data["x"][1] = np.nan
    with pytest.raises(FloatingPointError, match="NaN"):
        jl.lipschitz_profile(tun, data, [1.0], directions=1, method=method)


def dense_hessian(tun, data, theta):
    with jax.enable_x64(True):
        apply, theta = to_float64((tun.apply, theta))
        flat, unravel = ravel_pytree(jax.tree.map(jnp.asarray, theta))
        outputs = apply(theta, data)
        y = targets(data["labels"], outputs.shape[1])
        return jax.jit(jax.hessian(lambda v: 0.5 * jnp.sum((apply(unravel(v), data) - y) ** 2)))(flat)


@pytest.mark.parametrize("name", PROBLEMS)
def test_smoothness_against_the_dense_hessian(name):
    tun, data = PROBLEMS[name]()
    if name == "bert-lora":
        tun = jl.select(cases.tiny_model(), "classifier|layer_1/attention/query/bias")
    operator = jl.ntk_vector_product(tun, data, dtype="float64", check_examples=0)
    for theta in (tun.theta0, cases.moved(tun)):
        expected = float(np.abs(np.linalg.eigvalsh(dense_hessian(tun, data, theta))).max())
        found = smoothness(operator.at(theta), tolerance=1e-8)
        assert found.value == pytest.approx(expected, rel=1e-9)
        assert found.residual < 1e-7
        again = smoothness(operator.at(theta), tolerance=1e-8, start=found.vector, width=4)
        assert again.value == pytest.approx(expected, rel=1e-9)


def test_smoothness_of_least_squares_is_the_largest_eigenvalue_of_the_kernel():
    tun = jl.linearize(cases.mlp())
    operator = jl.ntk_vector_product(tun, cases.vectors(5), dtype="float64")
    top = jl.spectrum(jl.ntk(tun, cases.vectors(5), dtype="float64")).eigenvalues[0]
    assert smoothness(operator).value == pytest.approx(top, rel=1e-6)
    with pytest.raises(ValueError, match="in float64"):
        smoothness(jl.ntk_vector_product(tun, cases.vectors(5)))
