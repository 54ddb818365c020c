"""The engine that never holds a large Jacobian, against the dense float64 reference."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

import jaxlin as jl
from jaxlin.data.dataset import as_dataset
from jaxlin.ntk import jacobian, tiles, work
from jaxlin.ntk.factored import Site, derivatives_and_factors, find_sites
from jaxlin.tunable import leaf_paths
from tests import cases


def check(tun, data, theta=None, tolerance=5e-6, **options):
    dense, columns = cases.reference_jacobian(tun, data, theta)
    kernel = jl.ntk(tun, data, theta=theta, blocks="leaf", engine="factored", **options)
    whole = dense @ dense.T
    assert cases.relative_error(kernel.matrix(), whole) < tolerance
    for block, part in kernel.blocks.items():
        own = dense[:, columns == block]
        assert np.abs(part.matrix() - own @ own.T).max() < tolerance * np.abs(whole).max()
    return kernel


# By default each kind of module is met once, at theta0 or elsewhere; the rest is slow.
FAST = {("lora", False), ("full", True)}
POINTS = [(name, away, (name, away) in FAST) for name in cases.PEFT for away in (False, True)]


@pytest.mark.parametrize(
    ("name", "away"),
    [
        pytest.param(
            name, away, marks=() if fast else pytest.mark.slow, id=f"{name}-{'elsewhere' if away else 'theta0'}"
        )
        for name, away, fast in POINTS
    ],
)
def test_it_equals_the_dense_reference(model, batch, name, away):
    tun = cases.PEFT[name](model)
    kernel = check(tun, batch, cases.moved(tun) if away else None, check_examples=1)
    assert kernel.info.engine == "factored"
    assert 1e-9 < kernel.info.epsilon_J < 1e-5
    np.testing.assert_array_equal(kernel.matrix(), kernel.matrix().T)


@pytest.mark.slow
@pytest.mark.parametrize("family", [family for family in cases.FAMILIES if family != "bert"])
@pytest.mark.parametrize("peft", ["lora-all-modules", "full"])
def test_other_encoders(family, peft):
    batch = cases.text_batch(4, longest=8, ids=40, padding_id=1 if family == "roberta" else 0)
    if family in ("roberta", "distilbert"):
        del batch["token_type_ids"]
    check(cases.PEFT[peft](cases.encoder(family)), batch, check_examples=0)


@pytest.mark.slow
def test_float64_and_the_columns_of_other_examples(model, batch):
    tun, other = jl.full(model), cases.text_batch(4, seed=9, longest=12)
    kernel = check(tun, batch, dtype="float64", tolerance=1e-12)
    assert kernel.info.dtype == "float64"
    j1, _ = cases.reference_jacobian(tun, batch)
    j2, _ = cases.reference_jacobian(tun, other)
    between = jl.ntk(tun, batch, other, engine="factored")
    assert between.array.shape == (6, 4, 3, 3)
    assert not between.symmetric
    assert cases.relative_error(between.matrix(), j1 @ j2.T) < 5e-6


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["full", "diagonal"])
def test_products_of_tokens_equal_those_of_derivatives(model, batch, kind, monkeypatch):
    tun, other = jl.select(model, "layer_1/"), cases.text_batch(4, seed=9, longest=12)
    options = {"kind": kind, "engine": "factored", "blocks": "leaf", "dtype": "float64", "check_examples": 0}
    for data in ((batch,), (batch, other)):
        both = []
        for choice in (False, True):
            monkeypatch.setattr(tiles, "by_tokens", lambda *_, choice=choice: choice)
            both.append(jl.ntk(tun, *data, **options))
        expected, found = both
        largest = np.abs(expected.array).max()
        for block, part in expected.parts.items():
            assert np.abs(found.parts[block] - part).max() < 1e-12 * largest, block
        assert any((found.parts[block] != part).any() for block, part in expected.parts.items())  # another way
        if len(data) == 1:
            np.testing.assert_array_equal(found.matrix(), found.matrix().T)


@pytest.mark.parametrize(
    ("tokens", "others", "slab_bytes", "expected"),
    [(16, True, 1 << 30, True), (16, False, 1 << 30, True), (128, True, 1 << 30, False), (16, True, 1 << 20, False)],
)
def test_tokens_are_multiplied_where_they_are_few(tokens, others, slab_bytes, expected):
    site = Site("dense", nn.Dense(768), (), "kernel", (tokens, 768), (tokens, 768), "dense")
    factors = {i: (np.zeros((tokens, 768), np.float32), np.zeros((2, tokens, 768), np.float32)) for i in range(32)}
    assert tiles.by_tokens(site, 2, False, factors, dict(factors) if others else factors, slab_bytes) == expected


@pytest.mark.parametrize(
    "memory_budget",
    [pytest.param(133_000, id="in memory", marks=pytest.mark.slow), pytest.param(100_000, id="in files")],
)
def test_invariance_to_chunks_tiles_and_slabs(model, batch, memory_budget):
    """A budget too small for all that is kept, for tiles of all examples and for whole derivatives changes rounding."""
    tun, seen = jl.select(model, "layer_1/mlp|word"), []
    whole = jl.ntk(tun, batch, blocks="layer", engine="factored", check_examples=0)
    options = {"engine": "factored", "memory_budget": memory_budget, "check_examples": 0, "blocks": "layer"}
    parts = jl.ntk(tun, batch, **options, progress=lambda *step: seen.append(step))
    passes = [step[1:] for step in seen if step[0] == work.PASSES]
    tiles = [step[1:] for step in seen if step[0] == work.TILES]
    assert passes[-1] == (6, 6)  # one pass over six examples, however small the budget
    assert len(passes) > 1
    assert tiles[-1][0] == tiles[-1][1] == len(tiles) > 2 * len(whole.parts)
    assert list(parts.parts) == list(whole.parts)
    for name in whole.parts:
        assert cases.relative_error(parts.parts[name], whole.parts[name]) < 1e-6
    with pytest.raises(jl.InputError, match=r"one example and a tile of the kernel take .* more than memory_b"):
        jl.ntk(tun, batch, **{**options, "memory_budget": 10_000})


@pytest.mark.slow
@pytest.mark.parametrize("peft", ["lora", "full"])
def test_a_few_examples_at_a_time(model, monkeypatch, peft):
    """However many go through the network together, with fillers or without, J is the same to rounding."""
    tun, batch = cases.PEFT[peft](model), cases.text_batch(11, longest=24)
    whole = jl.ntk(tun, batch, engine="factored", check_examples=0).array
    for tokens in (1, 48):
        monkeypatch.setattr(jacobian, "_CPU_TOKENS", tokens)
        found = jl.ntk(tun, batch, engine="factored", check_examples=0).array
        assert cases.relative_error(found, whole) < 1e-6


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="on an accelerator all go together")
@pytest.mark.parametrize(
    ("tokens", "count", "width", "together"),
    [
        (16, 256, 768, 32),
        (16, 256, 384, 16),
        (16, 24, 768, 8),  # not 32, of which 8 would be fillers
        (32, 7, 768, 8),
        (34, 1, 768, 1),
        (128, 16, 768, 4),
        (1024, 5, 768, 1),
    ],
)
def test_how_many_go_together(tokens, count, width, together):
    batch = {"input_ids": np.zeros((32, tokens)), "weight": np.ones(32)}
    assert jacobian.at_a_time(batch, count, width) == together


def test_only_examples_that_are_wanted_go_through_the_network(model):
    tun, data = jl.lora(model, rank=2), as_dataset(cases.text_batch(8, longest=8))
    sites, given = find_sites(tun, data, tun.theta0, 3), (tun.apply, tun.theta0, data.batch(np.arange(8)), np.eye(3))
    all_of_them = derivatives_and_factors(*given, sites, 8, 8)
    five = derivatives_and_factors(*given, sites, 5, 2)
    for name, value in all_of_them.items():
        assert cases.relative_error(np.asarray(five[name])[:5], np.asarray(value)[:5]) < 5e-6
        assert not np.any(np.asarray(five[name])[6:])


@pytest.mark.slow
@pytest.mark.parametrize("pattern", ["layer_1/mlp/up", "word"])
def test_half_precision_is_summed_in_float32(batch, pattern):
    kernel = jl.ntk(jl.select(cases.tiny_model(dtype=jnp.bfloat16), pattern), batch, engine="factored")
    exact = jl.ntk(jl.select(cases.tiny_model(), pattern), batch)
    assert kernel.info.dtype == "bfloat16"
    assert 1e-3 < kernel.info.epsilon_J < 0.03
    assert cases.relative_error(kernel.matrix(), exact.matrix()) < 0.03


def test_auto_takes_it_where_it_can(model, batch):
    kernel = jl.ntk(jl.full(model), batch, check_examples=0)
    assert kernel.info.engine == "factored"
    assert kernel.info.note == "chosen since every tuned parameter belongs to a module that is called once"
    whole = jl.ntk(jl.full(model), batch, keep_jacobian=True, check_examples=0)
    assert whole.info.engine == "jacobian"
    assert cases.relative_error(kernel.matrix(), whole.matrix()) < 1e-6
    plain = jl.ntk(cases.mlp(), cases.vectors(3), check_examples=0)
    assert plain.info.engine == "jacobian"
    assert "needs a Tunable made of a Model; its apply is a PlainFunction" in plain.info.note


def test_zero_derivatives_of_a_are_left_out_only_where_b_is_zero(model, batch):
    tun, data = jl.lora(model, rank=3), as_dataset(batch)
    names = {name for site in find_sites(tun, data, tun.theta0, 3) for name in site.rows}
    assert "lora_A" not in names
    assert "lora_A" in {name for site in find_sites(tun, data, cases.moved(tun), 3) for name in site.rows}
    partly = cases.moved(tun)
    query = partly["encoder"]["layer_1"]["attention"]["query"]
    query["lora_B"] = jnp.zeros_like(query["lora_B"])
    check(tun, batch, partly, check_examples=0)


def vectors_of(batch):
    return (batch["x"],)


class Twice(nn.Module):
    @nn.compact
    def __call__(self, batch):
        again = nn.Dense(4, name="again")
        return nn.Dense(2, name="last")(jnp.tanh(again(jnp.tanh(again(batch["x"])))))


class SharedDropout(nn.Module):
    @nn.compact
    def __call__(self, batch):
        dropout = nn.Dropout(0.5, deterministic=True)
        x = jnp.tanh(nn.Dense(16, name="first")(dropout(batch["x"])))
        return nn.Dense(2, name="last")(jnp.tanh(nn.Dense(16, name="second")(dropout(x))))


def test_modules_that_read_through_one_that_is_called_twice():
    batch = cases.vectors(3)
    model = jl.from_linen(SharedDropout(), SharedDropout().init(jax.random.key(0), batch)["params"])
    tun = jl.full(model)
    factored = [site.leaf(site.factored) for site in find_sites(tun, as_dataset(batch), tun.theta0, 2) if site.factored]
    assert factored == ["first/kernel", "second/kernel", "last/kernel"]
    check(tun, batch, check_examples=0)


def test_what_it_cannot_see_is_refused():
    batch = cases.vectors(3)
    with pytest.raises(jl.InputError, match="needs a Tunable made of a Model; its apply is a PlainFunction"):
        jl.ntk(cases.mlp(), batch, engine="factored")
    model = jl.from_linen(Twice(), Twice().init(jax.random.key(0), batch)["params"])
    with pytest.raises(jl.InputError, match=r"needs again, which owns tuned parameters, .* it is called 2 times"):
        jl.ntk(jl.full(model), batch, engine="factored")
    check(jl.select(model, "last"), batch, check_examples=0)
    alone = jl.from_linen(nn.Dense(2), nn.Dense(2).init(jax.random.key(0), batch["x"])["params"], inputs=vectors_of)
    check(jl.full(alone), batch, check_examples=1)
    with pytest.raises(jl.InputError, match="keep_jacobian is an option of"):
        jl.ntk(jl.select(model, "last"), batch, engine="factored", keep_jacobian=True)


def test_tied_weights_are_refused(tmp_path):
    """The masked-LM head reads the word embedding beside its module's call."""
    model = jl.load_masked_lm(cases.write_checkpoint(tmp_path, cases.ENCODERS["bert: masked LM"]))
    text = cases.text_batch(2, longest=6, ids=40)
    batch = {**text, "positions": np.array([1, 2])}
    with pytest.raises(jl.InputError, match="embeddings/word/embedding is used outside of its module's call"):
        jl.ntk(jl.select(model, "embeddings/word"), batch, engine="factored")
    with pytest.raises(jl.InputError, match=r"needs lm_head, .* with other than one array"):
        jl.ntk(jl.full(model), batch, engine="factored")
    tun = jl.select(model, "encoder/layer_1")
    assert set(jl.ntk(tun, batch, engine="factored", blocks="leaf").parts) == set(leaf_paths(tun.theta0))
