import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxlin as jl
from jaxlin.data.dataset import TRUNK, Dataset, as_dataset
from jaxlin.ntk.jacobian import to_float64
from jaxlin.trunk import entered_alike, find_trunk
from tests import cases

TOP = {
    "lora": (lambda model: jl.lora(model, rank=3, alpha=6, layers=[1]), "encoder/layer_0"),
    "lora-frozen-A": (lambda model: jl.lora(model, rank=3, layers=[1], freeze_A=True), "encoder/layer_0"),
    "dora": (lambda model: jl.lora(model, rank=2, layers=[1], use_dora=True), "encoder/layer_0"),
    "layer": (lambda model: jl.select(model, "layer_1/"), "encoder/layer_0"),
    "bias": (lambda model: jl.select(model, "(layer_1/.*|classifier/)bias"), "encoder/layer_0"),
    "mlp": (lambda model: jl.select(model, "layer_1/mlp"), "encoder/layer_1/attention_norm"),
    "head": (jl.head_only, "pooler"),
}


def widened(tun):
    wide = [jax.tree.map(jnp.asarray, to_float64(tree)) for tree in (tun.apply, tun.theta0)]
    return dataclasses.replace(tun, apply=wide[0], theta0=wide[1])


def pair(name, model, batch, **options):
    tun = TOP[name][0](model)
    return tun, *jl.cache_trunk(tun, batch, **options)


@pytest.mark.slow
@pytest.mark.parametrize("name", TOP)
def test_everything_is_the_same_in_float64(name, model, float64):
    """Outputs, linearization, kernels by both engines, training of both models; against what goes without a cache."""
    batch, held_out = cases.text_batch(6), cases.text_batch(4, seed=3)
    for part in (batch, held_out):
        part["attention_mask"][:] = 1  # one length: fewer programs
    tun = widened(TOP[name][0](model))
    fast, data, data_held_out = jl.cache_trunk(tun, batch, held_out)
    assert fast.apply.cut.path == TOP[name][1]
    theta = cases.moved(tun)
    jac, _ = cases.reference_jacobian(tun, batch, theta)
    for engine in ("jacobian", "factored"):
        kernel = jl.ntk(fast, data, engine=engine, theta=theta, check_examples=1)
        assert cases.relative_error(kernel.matrix(), jac @ jac.T) < 1e-10
        assert kernel.info.epsilon_J < 1e-12
    config = jl.TrainConfig(max_steps=3, batch_size=4, learning_rate=0.01, lam=0.3, optimizer="momentum")
    for slow, quick in ((tun, fast), (jl.linearize(tun, theta), jl.linearize(fast, theta))):
        np.testing.assert_allclose(jl.predict(quick, theta, data), jl.predict(slow, theta, batch), atol=1e-11)
        expected = jl.train(slow, batch, held_out, config).history
        for row, other in zip(jl.train(quick, data, data_held_out, config).history, expected, strict=True):
            assert row.keys() == other.keys()
            for key, value in other.items():
                assert row[key] == (None if value is None else pytest.approx(value, abs=1e-10, rel=1e-10))


def test_no_weight_below_the_cut_is_read(model, batch):
    """Of NaN weights below, nothing arrives above, neither in values nor in tangents and cotangents."""
    tun, fast, data = pair("layer", model, batch)
    frozen = dict(fast.apply.frozen)
    frozen["embeddings"] = jax.tree.map(lambda leaf: leaf * np.nan, frozen["embeddings"])
    frozen["encoder"] = {
        **frozen["encoder"],
        "layer_0": jax.tree.map(lambda x: x * np.nan, frozen["encoder"]["layer_0"]),
    }
    dead = dataclasses.replace(fast, apply=dataclasses.replace(fast.apply, frozen=frozen))
    theta = cases.moved(tun)
    for one, other in ((dead, fast), (jl.linearize(dead), jl.linearize(fast))):
        np.testing.assert_array_equal(jl.predict(one, theta, data), jl.predict(other, theta, data))
    np.testing.assert_array_equal(jl.ntk(dead, data).array, jl.ntk(fast, data).array)


def test_the_compiled_program_has_no_layer_below(model, batch):
    tun, fast, data = pair("lora", model, batch)
    cost = [
        jax.jit(jl.linearize(t).apply).lower(t.theta0, part.batch(np.arange(4))).compile().cost_analysis()["flops"]
        for t, part in ((tun, as_dataset(batch)), (fast, data))
    ]
    assert cost[1] < 0.6 * cost[0]


def test_rows_have_the_length_of_their_bucket(model):
    batch = cases.text_batch(40, longest=24)
    tun, fast, data = pair("lora", model, batch)
    column = data[fast.apply.cut.column]
    assert column.shape == (40, 24, 32)
    for group, width in zip(data.groups(), data.buckets, strict=True):
        assert not column[group, width:].any()
        assert data.batch(group[:1])[fast.apply.cut.column].shape[1] == width
    some = data.take(np.array([3, 5, 8]))  # which has buckets of its own
    expected = jl.predict(tun, tun.theta0, batch)[[3, 5, 8]]
    np.testing.assert_allclose(jl.predict(fast, fast.theta0, some), expected, atol=5e-6)


@pytest.mark.slow
def test_training_compiles_as_often_as_without(model):
    batch = cases.text_batch(24)
    tun, fast, data = pair("lora", model, batch)
    traces = []

    def counted(t):
        class Counting(type(t.apply)):
            def __call__(self, theta, batch):
                traces.append(batch["input_ids"].shape)
                return super().__call__(theta, batch)

        fields = {f.name: getattr(t.apply, f.name) for f in dataclasses.fields(t.apply)}
        jax.tree_util.register_dataclass(Counting, ["frozen"], [name for name in fields if name != "frozen"])
        return dataclasses.replace(t, apply=Counting(**fields))

    config = jl.TrainConfig(batch_size=8, num_train_epochs=4, group_by_length=True)
    counts = []
    for t, part in ((tun, batch), (fast, data)):
        traces.clear()
        jl.train(counted(t), part, config=config)
        counts.append(len(traces))
    assert counts[0] == counts[1] <= 2 * 4 + 2


# --- memory, files -------------------------------------------------------------------------------


def test_what_does_not_fit_the_budget_is_mapped_from_a_file(model, batch, tmp_path):
    tun, fast, data = pair("lora", model, batch)
    held = data[fast.apply.cut.column]
    for folder in (None, tmp_path / "new"):
        _, other = jl.cache_trunk(tun, batch, memory_budget=100, folder=folder)
        column = other[fast.apply.cut.column]
        assert isinstance(column, np.memmap)
        assert not column.flags.writeable
        np.testing.assert_array_equal(column, held)
        np.testing.assert_array_equal(jl.predict(fast, fast.theta0, other), jl.predict(fast, fast.theta0, data))
    (file,) = (tmp_path / "new").iterdir()  # no half-written one beside it
    np.testing.assert_array_equal(np.load(file), held)


def test_a_file_serves_again_and_only_the_same_weights_and_data(model, batch, tmp_path):
    calls = []
    options = {"memory_budget": 100, "folder": tmp_path, "progress": lambda done, total: calls.append((done, total))}
    tun = TOP["lora"][0](model)
    jl.cache_trunk(tun, batch, **options)
    assert calls[-1] == (6, 6)
    calls.clear()
    jl.cache_trunk(jl.lora(model, rank=2, layers=[1]), batch, **options)  # another rank: the same below
    assert not calls
    jl.cache_trunk(tun, cases.text_batch(6, seed=1), **options)
    other = jax.tree.map(lambda leaf: leaf + 1, model.params["embeddings"])
    jl.cache_trunk(
        TOP["lora"][0](dataclasses.replace(model, params={**model.params, "embeddings": other})), batch, **options
    )
    assert len(list(tmp_path.iterdir())) == 3
    assert calls


def test_an_interrupted_pass_leaves_no_file(model, batch, tmp_path):
    def stop(done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        jl.cache_trunk(TOP["lora"][0](model), batch, memory_budget=100, folder=tmp_path, progress=stop)
    assert not list(tmp_path.iterdir())


def test_too_little_disk_is_said_before_the_pass(model, batch, tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 10}))
    with pytest.raises(jl.InputError, match="GiB free"):
        jl.cache_trunk(TOP["lora"][0](model), batch, memory_budget=100, folder=tmp_path / "a" / "b")
    assert not list(tmp_path.iterdir())


# --- what it refuses -----------------------------------------------------------------------------


def test_nothing_lies_below(model, batch):
    for tun in (jl.full(model), jl.lora(model, rank=2), jl.bias_only(model)):
        with pytest.raises(jl.InputError, match="no trunk to cache"):
            jl.cache_trunk(tun, batch)
    with pytest.raises(jl.InputError, match="PlainFunction"):
        jl.cache_trunk(cases.mlp(), cases.vectors(3))
    with pytest.raises(jl.InputError, match="needs the data"):
        jl.cache_trunk(jl.head_only(model))


def test_other_data_or_weights_are_refused(model, batch):
    tun, fast, data = pair("lora", model, batch)
    with pytest.raises(jl.InputError, match="cache_trunk returned with it"):
        jl.predict(fast, fast.theta0, batch)
    moved = dataclasses.replace(model, params=jax.tree.map(lambda leaf: leaf * 1.5, model.params))
    _, other, _ = pair("lora", moved, batch)
    with pytest.raises(jl.InputError, match="cache_trunk returned with it"):
        jl.train(jl.linearize(other), data)
    with pytest.raises(jl.InputError, match="cached already"):
        jl.cache_trunk(fast, data)
    long = {**data.columns, "input_ids": data["input_ids"] + 10_000}
    with pytest.raises(jl.InputError, match="vocabulary"):
        jl.predict(fast, fast.theta0, long)
    np.testing.assert_allclose(jl.predict(tun, tun.theta0, data), jl.predict(tun, tun.theta0, batch), atol=5e-6)


@pytest.mark.slow
def test_a_kernel_in_float64_needs_a_trunk_in_float64(model, batch):
    tun, fast, data = pair("lora", model, batch)
    with pytest.raises(jl.InputError, match='dtype="float64"'):
        jl.ntk(fast, data, dtype="float64")
    with pytest.raises(jl.InputError, match="float16"):
        jl.cache_trunk(tun, batch, dtype="float16")
    fast, data = jl.cache_trunk(tun, batch, dtype="float64")
    jac, _ = cases.reference_jacobian(tun, batch)
    assert cases.relative_error(jl.ntk(fast, data, dtype="float64").matrix(), jac @ jac.T) < 1e-12
    np.testing.assert_allclose(jl.predict(fast, fast.theta0, data), jl.predict(tun, tun.theta0, batch), atol=5e-6)


# --- other models, other arms --------------------------------------------------------------------


def test_linearizations_are_entered_too(model, batch):
    tun = TOP["layer"][0](model)
    theta = cases.moved(tun)
    late = jl.linearize(tun, theta)
    fast, data = jl.cache_trunk(late, batch)
    np.testing.assert_allclose(jl.predict(fast, tun.theta0, data), jl.predict(late, tun.theta0, batch), atol=1e-5)


def test_another_arm_is_entered_where_its_trunk_is_the_same(model, batch):
    _, fast, data = pair("lora", model, batch)
    same = entered_alike(jl.lora(model, rank=3, layers=[1], freeze_A=True), data, fast)
    assert same.apply.cut == fast.apply.cut
    for tun in (jl.head_only(model), jl.full(model), cases.mlp()):
        if isinstance(tun.apply, type(fast.apply)):
            assert entered_alike(tun, data, fast) is tun


class Looped(nn.Module):
    """Layers under `nn.scan` and `nn.remat`, whose insides are no place to enter."""

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(64, name="first")(x)
        loop = nn.scan(Inner, variable_axes={"params": 0}, split_rngs={"params": True}, length=3)
        x, _ = loop(name="loop")(x, None)
        x = nn.remat(nn.Dense)(64, name="rematerialised")(x)
        return nn.Dense(2, name="classifier")(jnp.tanh(x))


class Inner(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return jnp.sin(nn.Dense(64, name="map")(x)), None


def test_a_module_with_loops_is_entered_outside_of_them():
    x = np.random.default_rng(0).normal(size=(5, 512)).astype(np.float32)
    net = Looped()
    model = jl.from_linen(net, net.init(jax.random.key(0), x)["params"], inputs=lambda batch: (batch["x"],))
    for pattern, path in {"classifier": "first", "rematerialised": "first"}.items():
        tun = jl.select(model, pattern)
        assert find_trunk(tun, {"x": x}).cut.path == path
        fast, data = jl.cache_trunk(tun, {"x": x})
        theta = cases.moved(tun)
        np.testing.assert_allclose(jl.predict(fast, theta, data), jl.predict(tun, theta, {"x": x}), atol=5e-6)


def test_width_of_activations_is_no_length():
    """`[N, K, D]` with K as many as there are tokens by chance: it must not be cut to a bucket, so it is not kept."""

    class Odd(nn.Module):
        @nn.compact
        def __call__(self, batch):
            mask = jnp.asarray(batch["attention_mask"])
            x = nn.Dense(64, name="lower")(mask.sum(axis=1, keepdims=True) * jnp.ones(512))
            y = nn.Dense(4, name="spread")(jnp.stack([x * (i + 1) for i in range(20)], axis=1))
            return nn.Dense(3, name="classifier")(y.reshape(len(x), -1))

    batch = cases.text_batch(6)
    net = Odd()
    model = jl.from_linen(net, net.init(jax.random.key(0), batch)["params"])
    trunk = find_trunk(jl.select(model, "classifier"), batch)
    assert trunk.cut.path == "lower"
    assert trunk.shape == (64,)


def test_buckets_cut_activations_of_tokens_alone():
    columns = {"attention_mask": np.ones((3, 8), int), f"{TRUNK}a": np.ones((3, 8, 2)), f"{TRUNK}b": np.ones((3, 16))}
    data = Dataset(columns, np.array([2, 4, 8]), (4, 8))
    shapes = {name: value.shape for name, value in data.batch(np.array([0, 1])).items()}
    assert shapes == {"attention_mask": (2, 4), f"{TRUNK}a": (2, 4, 2), f"{TRUNK}b": (2, 16), "weight": (2,)}


@pytest.mark.slow
def test_activations_in_bfloat16_are_kept_in_memory_and_in_files(model, batch, tmp_path):
    half = dataclasses.replace(model, params=jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), model.params))
    tun = jl.lora(half, rank=2, layers=[1])
    plain = jl.predict(tun, tun.theta0, batch)
    for options in ({}, {"memory_budget": 1}, {"memory_budget": 1, "folder": tmp_path}):
        fast, held = jl.cache_trunk(tun, batch, **options)
        (name,) = [name for name in held.columns if name.startswith("trunk:")]
        assert held[name].dtype == jnp.bfloat16
        np.testing.assert_allclose(jl.predict(fast, tun.theta0, held), plain, atol=1e-2 * np.abs(plain).max())
