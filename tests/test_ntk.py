import contextlib
import functools
import itertools
import sys
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import jaxlin as jl
from jaxlin.data.dataset import Dataset
from jaxlin.ntk import jacobian as jacobians
from jaxlin.ntk import neural_tangents as tiled
from jaxlin.ntk import products
from jaxlin.ntk.jacobian import jacobian
from jaxlin.ntk.neural_tangents import IMPLEMENTATIONS, load_neural_tangents
from jaxlin.tunable import leaf_paths
from tests import cases

# The rest: tests/test_table.py.
FAST = {("lora", True)}


@pytest.mark.parametrize(
    ("name", "away"),
    [
        pytest.param(name, away, marks=() if (name, away) in FAST else pytest.mark.slow)
        for name in ("lora", "lora-frozen-head", "dora", "full")
        for away in (False, True)
    ],
)
def test_jacobian_engine_equals_the_dense_reference(model, batch, name, away):
    tun = cases.PEFT[name](model)
    theta = cases.moved(tun) if away else None
    dense, columns = cases.reference_jacobian(tun, batch, theta)
    kernel = jl.ntk(tun, batch, theta=theta, blocks="leaf", engine="jacobian")
    assert cases.relative_error(kernel.matrix(), dense @ dense.T) < 5e-6
    scale = np.abs(dense @ dense.T).max()
    for block, part in kernel.blocks.items():
        own = dense[:, columns == block]
        assert np.abs(part.matrix() - own @ own.T).max() < 5e-6 * scale
    assert kernel.info.engine == "jacobian"
    assert 1e-9 < kernel.info.epsilon_J < 1e-5


def test_float64_jacobian(model, batch):
    tun, before = jl.lora(model, rank=3), jax.config.read("jax_enable_x64")
    dense, _ = cases.reference_jacobian(tun, batch)
    kernel = jl.ntk(tun, batch, dtype="float64")
    assert cases.relative_error(kernel.matrix(), dense @ dense.T) < 1e-13
    assert kernel.info.dtype == "float64"
    assert jax.config.read("jax_enable_x64") == before


@pytest.mark.parametrize(
    ("name", "implementation"),
    [
        pytest.param(name, implementation, marks=() if implementation in fast else pytest.mark.slow)
        for name, fast in {
            "lora-frozen-head": [],
            "head": [],
            "select": ["STRUCTURED_DERIVATIVES"],
        }.items()
        for implementation in IMPLEMENTATIONS
    ],
)
def test_neural_tangents_equals_the_jacobian_engine(model, name, implementation):
    tun = cases.PEFT[name](model)
    theta = cases.moved(tun)
    text = {key: value[:3, :9] for key, value in cases.text_batch(3).items() if key != "labels"}
    text["attention_mask"][1, 8] = 1  # one bucket: every tile shape is a compilation of the library's
    ours = jl.ntk(tun, text, theta=theta, blocks="layer")
    theirs = jl.ntk(tun, text, theta=theta, blocks="layer", engine="neural_tangents", implementation=implementation)
    assert cases.relative_error(theirs.matrix(), ours.matrix()) < 2e-5
    assert list(theirs.parts) == list(ours.parts)
    for block in ours.parts:
        assert cases.relative_error(theirs.parts[block], ours.parts[block]) < 2e-5
    assert theirs.info.engine == f"neural_tangents:{implementation}"


def test_engines_with_x64(x64, batch):
    tun, data = cases.mlp(3), cases.vectors(5, num_labels=3)
    dense, _ = cases.reference_jacobian(tun, data)
    for engine in ("jacobian", "neural_tangents"):
        assert cases.relative_error(jl.ntk(tun, data, engine=engine).matrix(), dense @ dense.T) < 1e-5
    if x64:
        tun = cases.mlp(3, dtype=jnp.float64)
        dense, _ = cases.reference_jacobian(tun, data)
        for engine in ("jacobian", "neural_tangents"):
            assert cases.relative_error(jl.ntk(tun, data, engine=engine).matrix(), dense @ dense.T) < 1e-13


@pytest.mark.parametrize("engine", ["jacobian", pytest.param("neural_tangents", marks=pytest.mark.slow)])
def test_train_test_kernel_and_layout(model, batch, engine):
    tun, other = jl.lora(model, rank=3), cases.text_batch(4, seed=9, longest=12)
    j1, _ = cases.reference_jacobian(tun, batch)
    j2, _ = cases.reference_jacobian(tun, other)
    kernel = jl.ntk(tun, batch, other, engine=engine, blocks={"all": leaf_paths(tun.theta0)})
    assert kernel.array.shape == (6, 4, 3, 3)
    assert not kernel.symmetric
    assert cases.relative_error(kernel.matrix(), j1 @ j2.T) < 1e-5
    assert kernel.matrix()[3 * 2 + 1, 3 * 3 + 2] == kernel.array[2, 3, 1, 2]
    with pytest.raises(jl.InputError, match="examples with themselves"):
        jl.spectrum(kernel)


@given(st.integers(0, 10**6), st.integers(1, 7), st.integers(1, 3))
def test_algebra(seed, n, c):
    tun = cases.mlp(c, seed=seed % 17)
    kernel = jl.ntk(tun, cases.vectors(n, seed), blocks="leaf", check_examples=0)
    matrix = kernel.matrix()
    np.testing.assert_array_equal(matrix, matrix.T)
    assert np.linalg.eigvalsh(matrix).min() > -1e-12 * np.trace(matrix)
    total = sum(block.array for block in kernel.blocks.values())
    np.testing.assert_allclose(total, kernel.array, rtol=0, atol=1e-12 * np.abs(kernel.array).max())
    first, *rest = kernel.parts
    np.testing.assert_allclose(
        kernel.subset([first]).array + kernel.subset(rest).array, kernel.array, atol=1e-12 * np.abs(kernel.array).max()
    )


@pytest.mark.slow
@pytest.mark.parametrize("layer", [0, 1])
def test_subset_is_the_kernel_of_lora_on_those_layers(model, batch, layer):
    everything = jl.ntk(jl.lora(model, rank=3), batch, keep_jacobian=True)
    chosen = everything.subset([f"encoder/layer_{layer}", "classifier"])
    alone = jl.ntk(jl.lora(model, rank=3, layers=[layer]), batch)
    assert cases.relative_error(chosen.array, alone.array) < 1e-6
    expected = jl.spectrum(alone).eigenvalues
    np.testing.assert_allclose(jl.spectrum(chosen).eigenvalues, expected, atol=1e-5 * expected[0])
    with pytest.raises(jl.InputError, match="'encoder/layer_' is no block"):
        everything.subset(["encoder/layer_"])
    with pytest.raises(jl.InputError, match="at least one block"):
        everything.subset([])


def test_layer_blocks_by_name(model, batch):
    kernel = jl.ntk(jl.lora(model, rank=3), batch, blocks="layer")
    assert set(kernel.blocks) == {"classifier", *(f"layer_{i}/lora_{x}" for i in (0, 1) for x in "AB")}
    assert not kernel.parts["layer_0/lora_A"].any()  # B = 0 at the start
    assert kernel.subset(["layer_0"]).array.any()


@pytest.mark.slow
@settings(max_examples=3)  # each compiles
@given(st.integers(0, 10**6))
def test_invariance_to_batch_order_and_padding(seed):
    model, batch = cases.tiny_model(), cases.text_batch(5, seed=3, longest=11)
    tun = jl.lora(model, rank=3)
    order = np.random.default_rng(seed).permutation(5)
    kernel = jl.ntk(tun, batch, check_examples=0).array
    shuffled = {key: value[order] for key, value in batch.items()}
    wider = {k: np.pad(v, ((0, 0), (0, seed % 9))) if v.ndim == 2 else v for k, v in shuffled.items()}
    found = jl.ntk(tun, wider, check_examples=0).array
    assert cases.relative_error(found, kernel[np.ix_(order, order)]) < 2e-6


def test_invariance_to_chunk_and_bucket(model):
    batch, tun = cases.text_batch(9, seed=5, longest=30), jl.lora(model, rank=2)
    data = Dataset.from_columns(batch)
    assert len(data.buckets) > 1
    whole = jacobian(tun, Dataset(data.columns))  # one bucket
    size = sum(rows.nbytes for rows in whole.rows.values())
    for budget in (4 << 30, 4 * size):
        found = jacobian(tun, data, memory_budget=budget)
        for path, rows in whole.rows.items():
            np.testing.assert_allclose(found.rows[path], rows, atol=2e-5 * np.abs(rows).max())
    seen = []
    jacobian(tun, data, progress=lambda done, total: seen.append((done, total)))
    assert seen[-1] == (9, 9)


@pytest.mark.slow
@pytest.mark.parametrize(("engine", "tune"), [("jacobian", "lora"), ("factored", "lora"), ("factored", "full")])
def test_more_examples_compile_nothing_more(engine, tune, model):
    tun = jl.lora(model, rank=2) if tune == "lora" else jl.full(model)
    options = {"engine": engine, "memory_budget": 1 << 20 if tune == "lora" else 6 << 20}
    some, compiled, counts = cases.text_batch(8, seed=5, longest=30), [], []

    def listen(event, *_, **__):
        if event == "/jax/core/compile/backend_compile_duration":
            compiled.append(event)

    for times in (4, 16):
        data = Dataset.from_columns({name: np.concatenate([value] * times) for name, value in some.items()})
        assert jl.ntk_plan(tun, data, **options).chunk <= 32
        jax.clear_caches()
        jax.monitoring.register_event_duration_secs_listener(listen)
        try:
            jl.ntk(tun, data, check_examples=0, **options)
        finally:
            jax.monitoring.unregister_event_duration_listener(listen)
        counts.append(len(compiled))
        compiled.clear()
    assert 0 < counts[1] <= counts[0]


@pytest.mark.slow
def test_zero_jacobian_of_a_is_left_out_only_where_it_is_zero(model, batch):
    tun, data = jl.lora(model, rank=3), Dataset.from_columns(batch)
    assert not any(path.endswith("lora_A") for path in jacobian(tun, data).rows)
    assert any(path.endswith("lora_A") for path in jacobian(tun, data, cases.moved(tun)).rows)


def gelu_network():
    """Three residual layers with the tanh form of GELU that XLA's CPU compiler (jaxlib <= 0.10.2) gets wrong."""
    keys = jax.random.split(jax.random.key(0), 5)
    w1, w2 = jax.random.normal(keys[0], (8, 16)), jax.random.normal(keys[1], (16, 8))
    theta = {"a": jax.random.normal(keys[3], (8, 2)), "b": jax.random.normal(keys[4], (2, 16))}

    def apply(theta, batch):
        h = jnp.asarray(batch["x"], theta["a"].dtype)
        for _ in range(3):
            h = h + jax.nn.gelu(h @ w1 + h @ theta["a"] @ theta["b"]) @ w2
        return h[:, :3]

    return jl.Tunable(apply, theta)


def test_a_wrong_neural_tangents_kernel_is_not_returned(monkeypatch):
    data = {"x": np.random.default_rng(0).normal(size=(4, 8)).astype(np.float32)}
    dense, _ = cases.reference_jacobian(gelu_network(), data)
    assert cases.relative_error(jl.ntk(gelu_network(), data).matrix(), dense @ dense.T) < 1e-5
    for implementation in ("JACOBIAN_CONTRACTION", "NTK_VECTOR_PRODUCTS"):
        kernel = None
        with contextlib.suppress(FloatingPointError):
            kernel = jl.ntk(gelu_network(), data, engine="neural_tangents", implementation=implementation)
        if kernel is not None:  # never a wrong one
            assert cases.relative_error(kernel.matrix(), dense @ dense.T) < 1e-4
    monkeypatch.setattr(sys.modules["jaxlin.ntk.jacobian"], "CHECK_TOLERANCE", -1.0)
    with pytest.raises(
        FloatingPointError,
        match=r"JACOBIAN_CONTRACTION kernel, in entries checked, deviates by \S+ relative .* in float64",
    ):
        jl.ntk(gelu_network(), data, engine="neural_tangents")


def test_the_bridge_keeps_tensorflow_out_and_fails_clearly(monkeypatch):
    assert load_neural_tangents().__version__ == "0.6.5"
    assert "tensorflow" not in sys.modules
    monkeypatch.setitem(sys.modules, "neural_tangents", None)
    with pytest.raises(ImportError, match="cannot be bridged to JAX"):
        load_neural_tangents.__wrapped__()


def test_a_bridge_that_fails_when_it_is_used_is_the_same_error(monkeypatch):
    from neural_tangents._src import empirical

    monkeypatch.setattr(jax, "linearize", lambda *_: None)  # as a changed JAX might
    monkeypatch.setattr(empirical, "_get_primals_out_and_pullback", None)
    with pytest.raises(ImportError, match=r"cannot be bridged to JAX .*: TypeError: .* NoneType"):
        load_neural_tangents.__wrapped__()


@pytest.mark.slow
def test_a_tunable_is_an_apply_fn_of_neural_tangents(model, batch):
    nt, tun = load_neural_tangents(), jl.lora(model, rank=2)
    options = {"trace_axes": (), "vmap_axes": (dict.fromkeys(batch, 0), 0, {})}
    columns = {name: jnp.asarray(values) for name, values in batch.items()}
    theirs = jax.jit(nt.empirical_ntk_fn(tun.apply, **options))(columns, None, tun.theta0)
    K = jl.ntk(tun, batch)
    np.testing.assert_allclose(theirs, K.array, rtol=1e-4, atol=1e-5 * K.array.max())
    moved = jax.tree.map(lambda leaf: leaf + 0.01, tun.theta0)
    linear = nt.linearize(tun.apply, tun.theta0)(moved, columns)
    np.testing.assert_allclose(linear, jl.linearize(tun).apply(moved, columns), rtol=1e-5, atol=1e-5)
    # Their closed form of our kernel is our closed form: outputs that start at f₀, at the end of training.
    y, f0 = np.eye(K.array.shape[2])[np.arange(len(K.array)) % 2], jl.predict(tun, tun.theta0, batch)
    theirs = nt.predict.gradient_descent_mse(K.array, y, trace_axes=())(3.0, f0)
    ours = jl.kernel_regression(K, y, f0, 0.0).train(3.0 / y.size)
    np.testing.assert_allclose(theirs, ours, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("tokens", [1, pytest.param(48, marks=pytest.mark.slow)])
def test_a_few_examples_at_a_time(model, monkeypatch, tokens):
    """However many go through the network together, J is the same to rounding."""
    tun, batch = jl.lora(model, rank=3), cases.text_batch(11, longest=24)
    columns, theta = {k: jnp.asarray(v) for k, v in batch.items()}, cases.moved(tun)
    whole = jax.tree.leaves(jacobians.outputs_and_jacobian(tun.apply, theta, columns))
    monkeypatch.setattr(jacobians, "_CPU_TOKENS", tokens)
    found = jacobians.outputs_and_jacobian.__wrapped__(tun.apply, theta, columns)
    for ours, expected in zip(jax.tree.leaves(found), whole, strict=True):
        assert cases.relative_error(np.asarray(ours), np.asarray(expected)) < 1e-5


def test_frozen_weights_are_not_compiled_in(model, batch):
    tun = jl.lora(model, rank=3)
    columns = {k: jnp.asarray(v) for k, v in batch.items()}
    closed = jax.make_jaxpr(jacobians.outputs_and_jacobian)(tun.apply, tun.theta0, columns)
    assert all(np.size(const) < 200 for const in closed.consts)


def full_above(function, most, size):
    """A function for which memory runs out where the size of its arguments is above a limit."""

    def called(*args, **options):
        if size(*args) > most:
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate")
        return function(*args, **options)

    return called


def test_out_of_memory_halves_what_is_computed_at_a_time(monkeypatch):
    tun, data = cases.mlp(2), cases.vectors(11)
    exact = jl.ntk(tun, data)

    def check(found, events):
        assert cases.relative_error(found, exact.matrix()) < 1e-5
        check_told(events)

    def check_told(events):
        assert [event.split(": ")[1] for event in events] == [f"{size} from then on" for size in sizes]

    def in_pass(apply, theta, batch, *_):
        return len(batch["x"])

    sizes = (5, 2)
    with monkeypatch.context() as patch:
        patch.setattr(jacobians, "outputs_and_jacobian", full_above(jacobians.outputs_and_jacobian, 2, in_pass))
        kept = jl.ntk(tun, data, keep_jacobian=True, check_examples=0)
        check(kept.matrix(), kept.info.note.split("; ")[1:])
        assert kept.info.note.startswith("chosen since the Jacobian is to be held")
        random = jl.sketch(tun, data, 4)
        check_told(random.events)
    np.testing.assert_allclose(random.rows, jl.sketch(tun, data, 4).rows, rtol=1e-5, atol=1e-6)
    with monkeypatch.context() as patch:
        patch.setattr(products, "push", full_above(products.push, 2, lambda *given: len(given[3].buckets[0][0][0])))
        operator = jl.ntk_vector_product(tun, data)
        check(operator @ np.eye(22), operator.events)
    sizes = (4, 2)
    with monkeypatch.context() as patch:
        patch.setattr(tiled, "_kernel_tile", full_above(tiled._kernel_tile, 2, in_pass))
        kernel = jl.ntk(tun, data, engine="neural_tangents")
        check(kernel.matrix(), kernel.info.note.split("; "))
    monkeypatch.setattr(jacobians, "outputs_and_jacobian", full_above(None, 0, in_pass))
    with pytest.raises(jax.errors.JaxRuntimeError, match="Out of memory"):
        jl.ntk(tun, data, keep_jacobian=True)


BAD = {
    "engine": ({"engine": "fast"}, "engine='fast' is unknown"),
    "dtype": ({"dtype": "float16"}, "dtype='float16' is unknown"),
    "implementation": ({"engine": "neural_tangents", "implementation": "BEST"}, "'BEST' is unknown"),
    "option of the other": ({"engine": "neural_tangents", "dtype": "float64"}, "options of engine"),
    "memory": ({"memory_budget": 100}, "take .* GiB, more than memory_budget"),
    "memory for all of J": ({"memory_budget": 100, "keep_jacobian": True}, "takes 0.0 GiB, more than memory_budget"),
    "kind": ({"kind": "ntk"}, "kind='ntk' is unknown; expected one of full, trace"),
    "kind of two outputs": ({"kind": "logit_difference"}, "difference of two outputs; the model has 3"),
    "kind of signs": ({"engine": "neural_tangents", "kind": "signgd"}, "does not follow from the kernels"),
    "theta": ({"theta": {"w": jnp.ones(2)}}, "theta must have the structure and shapes of theta0"),
    "precision": ({"precision": "hi"}, "precision='hi' is unknown; expected \"highest\""),
    "check": ({"check_examples": -1}, "check_examples=-1; expected 0"),
    "resume": ({"resume": True}, "needs the store to go on with"),
    "store": ({"store": "k", "keep_jacobian": True}, "nothing else holds the whole Jacobian"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_arguments(case):
    options, message = BAD[case]
    with pytest.raises(jl.InputError, match=message):
        jl.ntk(cases.mlp(3), cases.vectors(3), **options)


def test_bad_outputs_and_data():
    tun = jl.Tunable(lambda theta, batch: theta["w"] * batch["x"].sum(), {"w": jnp.ones(())})
    with pytest.raises(jl.InputError, match=r"must return outputs \[B, C\]"):
        jl.ntk(tun, cases.vectors(2))
    with pytest.raises(jl.InputError, match="no example"):
        jl.ntk(cases.mlp(), {"x": np.zeros((0, 4))})
    with pytest.raises(jl.InputError, match="one leading axis"):
        jl.ntk(cases.mlp(), {"x": np.zeros((3, 4)), "labels": np.zeros(2)})


def test_one_example(model, batch):
    one = jl.ntk(jl.head_only(model), {key: value[:1] for key, value in batch.items()})
    assert one.array.shape == (1, 1, 3, 3)


@pytest.mark.parametrize(
    ("tune", "options"),
    [
        *itertools.product(["head", "lora", "full"], [{"engine": "factored"}, {"keep_jacobian": True}]),
        ("head", {"engine": "neural_tangents"}),
        *(pytest.param(tune, {"engine": "neural_tangents"}, marks=pytest.mark.slow) for tune in ("lora", "full")),
    ],
)
def test_duplicates(model, batch, tune, options):
    """K is singular, and κ known to be at least so large."""
    tun = {"head": jl.head_only, "lora": functools.partial(jl.lora, rank=3), "full": jl.full}[tune](model)
    twice = {key: np.concatenate([value[:2], value[:2]]) for key, value in batch.items()}
    spec = jl.spectrum(jl.ntk(tun, twice, **options))
    assert spec.rank == 2 * 3
    assert spec.condition_number_is_bound
    assert spec.condition_number > 1e5


@pytest.mark.parametrize("engine", ["jacobian", "factored"])
def test_a_jacobian_that_is_off_is_said(engine, model, batch, monkeypatch):
    tun = jl.head_only(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        jl.ntk(tun, batch, engine=engine)
        jl.ntk(tun, batch, engine=engine, kind="signgd")
    monkeypatch.setattr(sys.modules["jaxlin.ntk.jacobian"], "CHECK_TOLERANCE", 1e-12)
    with pytest.warns(RuntimeWarning, match=r"the Jacobian deviates by \S+ relative .* in float64 \(at most 1e-12"):
        jl.ntk(tun, batch, engine=engine)
