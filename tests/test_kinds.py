"""Kinds of kernels against the dense float64 reference, and what may be done with each."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import jaxlin as jl
from jaxlin.data.dataset import as_dataset
from jaxlin.mesh import make_mesh
from jaxlin.ntk.jacobian import jacobian
from jaxlin.ntk.kinds import KINDS, kind_of, signs, thresholds
from tests import cases

LINEAR = [name for name, kind in KINDS.items() if not kind.of_signs]


def dense(jac, n, kind, columns, tau, other=None):
    """The kernel of a kind [N1, N2, ...] from its definition, of rows [N*C, P] and the leaf of every column."""
    c = len(jac) // n
    j1, j2 = (np.asarray(x).reshape(-1, c, x.shape[1]) for x in (jac, jac if other is None else other))
    if kind == "full":
        return np.einsum("icp,jdp->ijcd", j1, j2)
    if kind == "trace":
        return np.einsum("icp,jcp->ij", j1, j2) / c
    if kind == "diagonal":
        return np.einsum("icp,jcp->ijc", j1, j2)
    if kind == "logit_difference":
        return np.einsum("ip,jp->ij", j1[:, 1] - j1[:, 0], j2[:, 1] - j2[:, 0])
    if kind == "pseudo":
        return np.einsum("ip,jp->ij", j1.sum(1), j2.sum(1)) / c

    def signs(rows):
        out = np.zeros_like(rows)
        for leaf in np.unique(columns):
            own = rows[..., columns == leaf]
            if not leaf.endswith("key/bias"):
                out[..., columns == leaf] = np.sign(own) * (np.abs(own) > tau * np.abs(own).max(-1, keepdims=True))
        return out

    left = signs(j1) if kind == "signgd" else np.where([not leaf.endswith("key/bias") for leaf in columns], j1, 0)
    return np.einsum("icp,jdp->ijcd", left, signs(j2))


FAST = ("bert", "lora", "jacobian", 2, "both")


def cases_of_kinds():
    """Family, what is tuned, engine, C, and of which examples: every way to tune every model."""
    yield FAST
    engines = itertools.cycle(["factored", "jacobian", "factored, over a mesh"])
    pairs = itertools.product((*cases.FAMILIES, *cases.DECODER_FAMILIES), cases.PEFT)
    for i, ((family, peft), engine) in enumerate(zip(pairs, engines, strict=False)):
        if peft == "bias" and family in ("llama", "mistral", "qwen3", "gemma"):  # which have none
            continue
        yield family, peft, engine, 2 + i % 2, "both" if family == "bert" else ("itself", "others")[i // 2 % 2]


@pytest.mark.parametrize(
    ("family", "peft", "engine", "c", "of"),
    [pytest.param(*case, marks=() if case == FAST else pytest.mark.slow) for case in cases_of_kinds()],
)
def test_kinds_equal_their_definitions(family, peft, engine, c, of):
    engine, _, over = engine.partition(", ")
    mesh = make_mesh(devices=jax.devices()[:1]) if over else None
    padding = 1 if family == "roberta" else 0
    model = (cases.encoder if family in cases.FAMILIES else cases.decoder)(family, c)
    batch, other = (
        cases.text_batch(n, seed, longest=12, num_labels=c, ids=40, padding_id=padding) for n, seed in ((5, 0), (3, 4))
    )
    if family not in ("bert", "electra"):
        del batch["token_type_ids"], other["token_type_ids"]
    tun = cases.PEFT[peft](model)
    theta = cases.moved(tun)
    jac, columns = cases.reference_jacobian(tun, batch, theta)
    jac2, _ = cases.reference_jacobian(tun, other, theta)
    if family == "qwen2":  # rotary: its key biases have a derivative, and a sign
        columns = np.array([leaf.replace("key/bias", "key/bias, turned") for leaf in columns])
    rounding = 5e-5 if family == "gemma" else 5e-6  # of float32; Gemma's in float64 are off by 6e-16
    for name, kind in KINDS.items():
        if name == "logit_difference" and c != 2:
            with pytest.raises(jl.InputError, match="two outputs"):
                jl.ntk(tun, batch, kind=name)
            continue
        options = {"dtype": "float64"} if kind.of_signs else {"check_examples": 0}
        for x2, j2 in {"itself": [(None, None)], "others": [(other, jac2)]}.get(of, [(None, None), (other, jac2)]):
            kernel = jl.ntk(tun, batch, x2, theta=theta, kind=name, engine=engine, blocks="layer", mesh=mesh, **options)
            exact = dense(jac, 5, name, columns, 8.4 * np.finfo(float).eps, j2)
            assert kernel.array.shape == exact.shape
            assert kernel.kind == name
            assert kernel.symmetric == (x2 is None and name != "asymmetric_signgd")
            # Entries at the threshold may count in one and not in the other: at most four of them here.
            few = 4 * (1 if name == "signgd" else np.abs(jac).max())
            assert np.abs(kernel.array - exact).max() <= (few if kind.of_signs else rounding * np.abs(exact).max()), (
                name
            )
            if kernel.symmetric:
                matrix = kernel.matrix()
                np.testing.assert_array_equal(matrix, matrix.T)
                assert np.linalg.eigvalsh(matrix).min() > -1e-6 * np.abs(matrix).max()
            if kind.of_signs and peft in ("full", "bias") and family in (*cases.FAMILIES, "gpt2"):  # not rotary
                assert "2 key biases left out" in kernel.info.note


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["jacobian", "factored"])
def test_float32_flips_few_signs(model, batch, engine):
    tun = jl.select(model, "layer_1/(attention|mlp)")
    exact = jl.ntk(tun, batch, kind="signgd", engine=engine, dtype="float64")
    kernel = jl.ntk(tun, batch, kind="signgd", engine=engine)
    # A flipped sign changes a product by 2, one that becomes 0 by 1: at most 0.1 % of the entries do either.
    assert np.abs(kernel.array - exact.array).max() <= 1e-3 * tun.num_params


@given(seed=st.integers(0, 10_000), n=st.integers(1, 4), c=st.integers(1, 3))
def test_kinds_follow_from_the_full_kernel(seed, n, c):
    rng = np.random.default_rng(seed)
    jac = rng.normal(size=(n * c, 7))
    full = dense(jac, n, "full", np.array(["w"] * 7), 0)
    for name in LINEAR:
        if name == "logit_difference" and c != 2:
            with pytest.raises(jl.InputError, match=f"of two outputs; the model has {c}"):
                kind_of(name).of_full(full)
        else:
            np.testing.assert_allclose(kind_of(name).of_full(full), dense(jac, n, name, np.array(["w"] * 7), 0))
    with pytest.raises(jl.InputError, match="does not follow from the full kernel"):
        kind_of("signgd").of_full(full)


def test_neural_tangents_gives_the_linear_kinds():
    tun, data = cases.mlp(2), cases.vectors(4)
    for name in LINEAR:
        ours, theirs = (jl.ntk(tun, data, kind=name, engine=engine) for engine in ("jacobian", "neural_tangents"))
        assert theirs.array.shape == ours.array.shape
        assert cases.relative_error(theirs.array, ours.array) < 1e-5


@pytest.mark.slow
def test_the_error_of_signs_is_of_signs(batch):
    tun = jl.select(cases.tiny_model(dtype=jnp.bfloat16), "layer_1/mlp/up")
    for kind in ("signgd", "asymmetric_signgd"):
        measured = jl.ntk(tun, batch, kind=kind, engine="jacobian", check_examples=6).info.epsilon_J
        found, exact = (jacobian(tun, as_dataset(batch), dtype=dtype).rows for dtype in (None, "float64"))
        error = square = 0.0
        for path in exact:
            signed = [
                signs(r, thresholds(np.abs(r).max(-1), np.dtype(jnp.bfloat16))) for r in (found[path], exact[path])
            ]
            error += float(np.sum((signed[0].astype(float) - signed[1]) ** 2))
            square += float(np.sum(signed[1] ** 2))
        assert measured == pytest.approx((error / square) ** 0.5)
        assert 1e-3 < measured < 0.5


def test_key_biases_count_where_keys_are_turned():
    tun, batch = jl.select(cases.decoder("qwen2", 2), "layer_1/attention/key/bias"), cases.text_batch(3, ids=40)
    batch = {name: batch[name] for name in ("input_ids", "attention_mask", "labels")}
    kernel = jl.ntk(tun, batch, kind="signgd", engine="jacobian", dtype="float64", blocks="leaf")
    jac, _ = cases.reference_jacobian(tun, batch)
    signed = np.sign(jac)
    assert np.abs(jac).max() > 1e-3
    assert cases.relative_error(kernel.matrix(), signed @ signed.T) < 1e-12
    assert "left out" not in kernel.info.note


def test_one_backward_pass_suffices_where_one_row_enters():
    """The kinds of one number a pair pull one cotangent back, not C."""
    for name, rows in (("pseudo", 1), ("logit_difference", 1), ("trace", 2), ("full", 2)):
        assert kind_of(name).seeds(2).shape == (rows, 2)


def test_what_has_no_spectrum_needs_an_explicit_choice():
    tun, data = cases.mlp(2), cases.vectors(5)
    kernel = jl.ntk(tun, data, kind="asymmetric_signgd")
    y = np.eye(2)[data["labels"]]
    for use in (jl.spectrum, lambda k: jl.kernel_regression(k, y, 0 * y, 0.1)):
        with pytest.raises(
            jl.InputError, match=r'one of kind="asymmetric_signgd" is neither. Choose kernel.nearest_ps'
        ):
            use(kernel)
    nearest = kernel.nearest_psd()
    half = (kernel.matrix() + kernel.matrix().T) / 2
    values, vectors = np.linalg.eigh(half)
    np.testing.assert_allclose(nearest.matrix(), vectors * np.maximum(values, 0) @ vectors.T, atol=1e-12)
    np.testing.assert_allclose(jl.spectrum(nearest).eigenvalues[::-1], np.maximum(values, 0), atol=1e-12)
    between = jl.ntk(tun, data, cases.vectors(3, 1), kind="asymmetric_signgd")
    square = jl.ntk(tun, data, cases.vectors(5, 1), kind="asymmetric_signgd")
    for other in (between, square, jl.ntk(tun, data, cases.vectors(5, 1))):
        with pytest.raises(jl.InputError, match="of two sets"):
            other.nearest_psd()
    assert jl.ntk(tun, data).nearest_psd().symmetric


@pytest.mark.parametrize("kind", ["trace", "pseudo", "diagonal"])
def test_regression_with_a_kernel_for_every_output_alike(kind):
    tun, data, other = cases.mlp(3), cases.vectors(6, num_labels=3), cases.vectors(4, 1, 3)
    kernel, between = jl.ntk(tun, data, kind=kind), jl.ntk(tun, other, data, kind=kind)
    rng = np.random.default_rng(0)
    y, f0, f0_test = rng.normal(size=(6, 3)), rng.normal(size=(6, 3)), rng.normal(size=(4, 3))
    fit = jl.kernel_regression(kernel, y, f0, 0.3)
    for c in range(3):
        k, k_test = (a.array[:, :, c] if kind == "diagonal" else a.array for a in (kernel, between))
        solved = np.linalg.solve(k + 0.3 * np.eye(6), f0[:, c] - y[:, c])
        np.testing.assert_allclose(fit.train()[:, c], f0[:, c] - k @ solved, atol=1e-10)
        np.testing.assert_allclose(fit.test(between, f0_test)[:, c], f0_test[:, c] - k_test @ solved, atol=1e-10)
        inverse = np.linalg.inv(k + 0.3 * np.eye(6))
        np.testing.assert_allclose(
            fit.leave_one_out()[:, c], y[:, c] + inverse @ (f0 - y)[:, c] / np.diag(inverse), atol=1e-10
        )


def test_key_biases_by_name():
    kind, paths = kind_of("signgd"), ("a/key/bias", "a/key/kernel", "monkey/bias", "h/k_proj/bias")
    assert [path for path in paths if kind.without_sign(path)] == ["a/key/bias", "h/k_proj/bias"]
    with jax.enable_x64(False):
        assert jnp.finfo(jnp.float32).eps * 8.4 == pytest.approx(1e-6, rel=0.01)
