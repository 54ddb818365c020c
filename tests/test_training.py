import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st

import jaxlin as jl
from jaxlin.data.dataset import Dataset
from jaxlin.ntk.jacobian import jacobian
from jaxlin.training.cached import cached_linearized
from jaxlin.training.config import OPTIMIZERS, SCHEDULES
from jaxlin.training.gaps import distances
from jaxlin.training.input import epoch_order
from jaxlin.training.losses import LOSSES, targets, to_mean
from jaxlin.training.metrics import metrics
from jaxlin.training.optim import proximal
from jaxlin.training.step import Schedule, compiled_step
from tests import cases


def norm(tree):
    return float(optax.tree.norm(tree))


def gap(a, b):
    return norm(jax.tree.map(jnp.subtract, a, b))


# --- the pull: every mode against its formula ---------------------------------------------------------


def by_hand(mode, theta, theta0, g, lam, eta):
    """New tensors under plain descent, T(g) = -ηg (theory 1), in NumPy."""
    delta = {k: theta[k] - theta0[k] for k in theta}
    inner = {k: np.vdot(g[k], delta[k]) for k in g}
    whole = sum(inner.values())
    out = {}
    for k in theta:
        t, d = theta[k], delta[k]
        if mode == "coupled":
            out[k] = t - eta * (g[k] + lam * d)
        elif mode == "selective":
            out[k] = t - eta * (g[k] + lam * (whole >= 0) * d)
        elif mode == "selective-per-tensor":
            out[k] = t - eta * (g[k] + lam * (inner[k] >= 0) * d)
        elif mode == "decoupled":
            out[k] = t - eta * g[k] - eta * lam * d
        elif mode == "prox":
            out[k] = (t - eta * g[k] + eta * lam * theta0[k]) / (1 + eta * lam)
        else:
            new = t - eta * g[k]
            far = np.linalg.norm(new - theta0[k])
            rho = np.clip((far - np.linalg.norm(d)) / far, 0, 1)
            out[k] = new - (lam * rho * (new - theta0[k]) if inner[k] > 0 else 0)
    return out


@pytest.mark.parametrize("mode", [*jl.optim.MODES, "selective-per-tensor"])
@given(seed=st.integers(0, 10**6))
def test_each_mode_is_its_formula(mode, seed):
    rng, eta, lam = np.random.default_rng(seed), 0.3, 0.7
    shapes = {"a": (3,), "b": (2, 2)}
    theta, theta0, g = ({k: rng.normal(size=s) for k, s in shapes.items()} for _ in range(3))
    with jax.enable_x64(True):
        name, _, per_tensor = mode.partition("-")
        tx = jl.optim.proximal(optax.sgd(eta), lam, name, eta, per_tensor=bool(per_tensor))
        state = tx.init(theta0)._replace(lam=jnp.asarray(lam))
        updates, state = jax.jit(tx.update)(g, state, theta)
        found = optax.apply_updates(theta, updates)
        expected = by_hand(mode, theta, theta0, g, lam, eta)
        for k in shapes:
            np.testing.assert_allclose(found[k], expected[k], atol=1e-12)
        assert int(state.steps) == 1


@pytest.mark.parametrize("mode", jl.optim.MODES)
def test_without_a_pull_every_mode_is_the_inner_optimizer(mode):
    tun, data = cases.mlp(), cases.vectors(8)
    config = jl.TrainConfig(max_steps=5, learning_rate=0.05, pull=mode)
    reference = jl.train(tun, data, config=dataclasses.replace(config, pull="coupled"))
    assert gap(jl.train(tun, data, config=config).theta, reference.theta) < 1e-6


def test_the_pull_is_stronger_with_lam_in_every_mode():
    tun, data = cases.mlp(), cases.vectors(8)
    for mode in ("coupled", "decoupled", "prox"):  # the others act at some steps only
        config = jl.TrainConfig(max_steps=20, learning_rate=0.05, optimizer="sgd", pull=mode)
        weak, strong = (dataclasses.replace(config, lam=lam) for lam in (2.0, 20.0))
        far = [gap(jl.train(tun, data, config=c).theta, tun.theta0) for c in (config, weak, strong)]
        assert far[0] > far[1] > far[2]


def test_a_schedule_scales_the_pull():
    tx = jl.optim.proximal(optax.sgd(0.0), 1.0, "decoupled", lambda step: 0.5 / (1 + step))
    state = tx.init(jnp.zeros(1))
    for expected in (-0.5, -0.25):
        updates, state = tx.update(jnp.zeros(1), state, jnp.ones(1))
        assert float(updates[0]) == pytest.approx(expected)


BAD_PULLS = {
    "negative": ((optax.sgd(1.0), -1.0), "lam=-1.0"),
    "nan": ((optax.sgd(1.0), float("nan")), "lam=nan"),
    "mode": ((optax.sgd(1.0), 1.0, "pull"), "'pull' is unknown"),
    "no rate": ((optax.sgd(1.0), 1.0, "prox"), "needs the learning_rate"),
}


@pytest.mark.parametrize("case", BAD_PULLS)
def test_bad_pulls(case):
    arguments, message = BAD_PULLS[case]
    with pytest.raises(jl.InputError, match=message):
        jl.optim.proximal(*arguments)


# --- the linearized model against the closed forms of theory 2 ----------------------------------------


@pytest.mark.parametrize("momentum", [0.0, 0.8])
@pytest.mark.parametrize("lam_rel", [0.0, 0.1])
@pytest.mark.parametrize(("wide", "tolerance"), [(True, 1e-10), (False, 1e-4)])
def test_trainer_equals_the_closed_form(momentum, lam_rel, wide, tolerance):
    n, steps = 9, 37
    train_data, test_data = cases.vectors(n), cases.vectors(5, seed=1)
    with jax.enable_x64(wide):
        tun = cases.mlp(dtype=jnp.float64 if wide else jnp.float32)
        kernel, cross = jl.ntk(tun, train_data), jl.ntk(tun, test_data, train_data)
        mu1 = np.linalg.eigvalsh(kernel.matrix())[-1]
        lam = lam_rel * mu1
        rate = 0.8 / (mu1 + lam)  # of the summed loss
        config = jl.TrainConfig(
            optimizer=optax.sgd(to_mean(rate, n, "learning_rate"), momentum=momentum),
            learning_rate=to_mean(rate, n, "learning_rate"),
            batch_size=n,
            max_steps=steps,
            lam=lam,
        )
        lin = jl.linearize(tun)
        result = jl.train(lin, train_data, config=config)
        y = np.asarray(targets(train_data["labels"], 2))
        f0, f0_test = (jl.predict(tun, tun.theta0, data) for data in (train_data, test_data))
        fit = jl.kernel_regression(kernel, y, f0, lam)
        options = {"learning_rate": rate, "momentum": momentum}
        np.testing.assert_allclose(
            jl.predict(lin, result.theta, train_data), fit.train(steps, **options), atol=tolerance
        )
        np.testing.assert_allclose(
            jl.predict(lin, result.theta, test_data), fit.test(cross, f0_test, steps, **options), atol=tolerance
        )


def test_rates_by_block_are_the_kernel_they_weigh(float64):
    """Theory 7: K_η = Σ η_ℓ K_ℓ, where the pull on a block is λ/η_ℓ; the limit has 1/w_ℓ for pulls λ w_ℓ."""
    n, rates = 7, {"hidden/bias": 4.0, "out": 0.25}
    train_data, test_data = cases.vectors(n), cases.vectors(5, seed=1)
    tun = cases.mlp(dtype=jnp.float64)
    kernel, cross = (jl.ntk(tun, x, x2, blocks="leaf") for x, x2 in ((train_data, None), (test_data, train_data)))
    mu1 = np.linalg.eigvalsh(kernel.weighted(rates).matrix())[-1]
    lam = 0.05 * mu1
    rate = 1 / (mu1 + lam)
    y = np.asarray(targets(train_data["labels"], 2))
    f0, f0_test = (jl.predict(tun, tun.theta0, data) for data in (train_data, test_data))
    config = jl.TrainConfig(
        optimizer="sgd",
        learning_rate=to_mean(rate, n, "learning_rate"),
        batch_size=n,
        max_steps=25,
        lam=lam,
        learning_rate_blocks=rates,
        lam_blocks={pattern: 1 / value for pattern, value in rates.items()},
    )
    lin = jl.linearize(tun)
    theta = jl.train(lin, train_data, config=config).theta
    fit = jl.kernel_regression(kernel.weighted(rates), y, f0, lam)
    expected = fit.test(cross.weighted(rates), f0_test, 25, learning_rate=rate)
    np.testing.assert_allclose(jl.predict(lin, theta, test_data), expected, atol=1e-10)
    assert np.abs(expected - jl.kernel_regression(kernel, y, f0, lam).test(cross, f0_test, 25)).max() > 1e-3

    # Pulls alone, to the end: rates do not matter then.
    weights = {"hidden/kernel": 3.0, "out": 0.5}
    long = dataclasses.replace(config, learning_rate_blocks=None, lam_blocks=weights, max_steps=4000)
    inverse = {pattern: 1 / weight for pattern, weight in weights.items()}
    limit = jl.kernel_regression(kernel.weighted(inverse), y, f0, lam).test(cross.weighted(inverse), f0_test)
    np.testing.assert_allclose(
        jl.predict(lin, jl.train(lin, train_data, config=long).theta, test_data), limit, atol=1e-8
    )


@pytest.mark.parametrize("mode", ["coupled", "decoupled", "prox", "spd"])
def test_factors_by_block_are_separate_optimizers(mode):
    """A rule that acts by tensor, on two tensors with factors, is two rules."""
    keys = jax.random.split(jax.random.key(0), 3)
    theta0, theta, grads = ({"a": jax.random.normal(k, (3,)), "b": jax.random.normal(k, (2, 2)) + 1} for k in keys)
    factors = {"a": (2.0, 0.5), "b": (0.0, 3.0)}
    together = proximal(
        optax.sgd(0.1),
        0.7,
        mode,
        0.1,
        lam_blocks={k: v for k, (v, _) in factors.items()},
        learning_rate_blocks={k: v for k, (_, v) in factors.items()},
    )
    moves, _ = together.update(grads, together.init(theta0), theta)
    for name, (weight, rate) in factors.items():
        alone = proximal(optax.sgd(0.1 * rate), 0.7 * weight, mode, 0.1 * rate)
        expected, _ = alone.update(grads[name], alone.init(theta0[name]), theta[name])
        np.testing.assert_allclose(moves[name], expected, rtol=1e-6)


def test_lora_plus_moves_b_faster(model):
    tun, batch = jl.lora(model, rank=3), cases.text_batch(6)
    plain = jl.TrainConfig(max_steps=1, batch_size=6)
    plus = dataclasses.replace(plain, learning_rate_blocks={"lora_B": 16})
    moved = [distances(jl.train(tun, batch, config=config).theta, tun.theta0) for config in (plain, plus)]
    assert moved[1]["_B"] == pytest.approx(16 * moved[0]["_B"], rel=1e-5)
    assert moved[1]["_head"] == pytest.approx(moved[0]["_head"], rel=1e-5)
    for patterns, message in (
        ({"lora_C": 1.0}, r"learning_rate_blocks: 'lora_C' is found in no tuned parameter, such as"),
        ({"(": 1.0}, "is no regular expression"),
        ({"lora_B": 16.0, "layer_1/.*/lora_B": 4.0}, "never counts, since patterns before it match the same"),
        ({"lora_B": -1.0}, "expected a finite factor, at least 0"),
    ):
        with pytest.raises(jl.InputError, match=message):
            jl.train(tun, batch, config=dataclasses.replace(plain, learning_rate_blocks=patterns))


def test_going_on_from_a_kept_state_is_the_same_run(model):
    tun, batch = jl.lora(model, rank=3), cases.text_batch(10)
    config = jl.TrainConfig(batch_size=4, max_steps=7, lam=0.5, lr_scheduler_type="linear")
    whole = jl.train(tun, batch, config=config, keep=[0, 4, 7])
    assert sorted(whole.states) == [0, 4, 7]
    rest = jl.train(tun, batch, config=config, start=whole.states[4])
    assert gap(rest.theta, whole.theta) == 0
    assert rest.history == whole.history[4:]
    assert gap(whole.states[0].theta, tun.theta0) == 0
    assert jl.train(tun, batch, config=config, start=whole.states[7]).history == []


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
@pytest.mark.parametrize("loss", LOSSES)
def test_cached_equals_streaming(model, optimizer, loss):
    batch = cases.text_batch(10, longest=30)
    tun, data = jl.lora(model, rank=3), Dataset.from_columns(batch)
    config = jl.TrainConfig(
        loss=loss, optimizer=optimizer, learning_rate=0.01, batch_size=4, max_steps=8, lam=0.5, group_by_length=True
    )
    cached, (rows,) = cached_linearized(tun, [data], [jacobian(tun, data)])
    streaming = jl.train(jl.linearize(tun), data, config=config)
    result = jl.train(cached, rows, config=config)
    assert gap(result.theta, streaming.theta) < 1e-4 * gap(result.theta, tun.theta0)
    for a, b in zip(result.history, streaming.history, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-5)
    np.testing.assert_allclose(
        jl.predict(cached, result.theta, rows), jl.predict(jl.linearize(tun), result.theta, data), atol=1e-5
    )


# --- theory 0, 3 and 5 --------------------------------------------------------------------------------


def test_mean_and_sum_agree_whatever_the_batch_size():
    """Copies of one example: every minibatch gradient is the full one, so batch size must not matter for λ."""
    one = cases.vectors(1)
    data = {key: np.repeat(value, 6, axis=0) for key, value in one.items()}
    tun = cases.mlp()
    results = [
        jl.train(
            tun, data, config=jl.TrainConfig(optimizer="sgd", learning_rate=0.1, batch_size=b, max_steps=9, lam=4.0)
        )
        for b in (2, 4, 6)
    ]
    assert gap(results[0].theta, results[2].theta) < 1e-6
    assert gap(results[1].theta, results[2].theta) < 1e-6
    assert to_mean(4.0, 6, "lam") == pytest.approx(4 / 6)
    assert to_mean(0.1, 6, "learning_rate") == pytest.approx(0.6)
    with pytest.raises(ValueError, match="'lam' or"):
        to_mean(1.0, 1, "eta")


@given(st.integers(0, 10**6), st.floats(0.1, 30), st.floats(0.1, 1))
def test_selective_rule_never_raises_the_risk_of_a_quadratic(seed, lam, share):
    """Theory 3, where β = μ_1 is known: a step of at most 2⟨g,u⟩/(β‖u‖²)."""
    rng = np.random.default_rng(seed)
    jac, y = rng.normal(size=(6, 9)), rng.normal(size=6)
    beta = np.linalg.eigvalsh(jac @ jac.T)[-1]
    with jax.enable_x64(True):
        theta0, theta = jnp.zeros(9), jnp.asarray(rng.normal(size=9))

        def risk(p):
            return 0.5 * jnp.sum((jac @ p - y) ** 2)

        for _ in range(6):
            g = jax.grad(risk)(theta)
            tx = jl.optim.proximal(optax.sgd(1.0), lam, "selective")
            updates, _ = tx.update(g, tx.init(theta0)._replace(lam=jnp.asarray(lam)), theta)
            assert jnp.vdot(g, -updates) >= jnp.vdot(g, g) - 1e-9
            eta = share * 2 * jnp.vdot(g, -updates) / (beta * jnp.vdot(updates, updates))
            new = theta + eta * updates
            assert risk(new) <= risk(theta) + 1e-12
            theta = new


def test_slopes_in_lam():
    """Theory 5's consequence: as λ → ∞, D ~ 1/λ and both gaps ~ 1/λ², with η = c/(μ_1+λ)."""
    with jax.enable_x64(True):
        tun, data, n = cases.mlp(width=8, dtype=jnp.float64), cases.vectors(7), 7
        mu1 = np.linalg.eigvalsh(jl.ntk(tun, data).matrix())[-1]
        lin, rows = jl.linearize(tun), []
        for lam in (30 * mu1, 300 * mu1, 3000 * mu1):
            rate = to_mean(0.5 / (mu1 + lam), n, "learning_rate")
            config = jl.TrainConfig(optimizer="sgd", learning_rate=rate, batch_size=n, max_steps=80, lam=lam)
            full, linear = jl.train(tun, data, config=config), jl.train(lin, data, config=config)
            outputs = jl.predict(tun, full.theta, data) - jl.predict(lin, linear.theta, data)
            rows.append([gap(full.theta, tun.theta0), gap(full.theta, linear.theta), np.linalg.norm(outputs)])
    slopes = np.diff(np.log10(rows), axis=0)
    np.testing.assert_allclose(slopes[:, 0], -1, atol=0.05)
    np.testing.assert_allclose(slopes[:, 1:], -2, atol=0.1)


# --- the trainer ---------------------------------------------------------------------------------------


def test_reproducible_to_the_bit(model, batch):
    tun = jl.lora(model, rank=3)
    config = jl.TrainConfig(batch_size=4, max_steps=6, lam=1.0, seed=3)
    first, second = (jl.train(tun, batch, batch, config) for _ in range(2))
    jax.tree.map(np.testing.assert_array_equal, first.theta, second.theta)
    assert first.history == second.history
    assert first.history != jl.train(tun, batch, batch, dataclasses.replace(config, seed=4)).history


def test_a_sweep_compiles_once(model):
    batch = cases.text_batch(8, longest=20)
    tun = jl.lora(model, rank=3)
    config = jl.TrainConfig(batch_size=8, max_steps=2)
    step = _step(config, 8)
    before, traces = step._cache_size(), []
    for lam, rate in ((0.0, 1e-3), (1.0, 1e-3), (10.0, 2e-3)):
        jl.train(tun, batch, config=dataclasses.replace(config, lam=lam, learning_rate=rate))
        traces.append(step._cache_size() - before)
    assert traces == [1, 1, 1]


def _step(config, n):
    """The compiled step of a configuration, whatever its λ and rate."""
    total = config.total_steps(n)
    schedule = Schedule(1.0, config.lr_scheduler_type, int(config.warmup_ratio * total), total)
    return compiled_step(config.loss, config.optimizer, schedule, config.pull, (), (), 1)[1]


def test_at_most_four_shapes(model):
    batch = cases.text_batch(40, longest=90)
    data = Dataset.from_columns(batch)
    assert len(data.buckets) <= 4
    config = jl.TrainConfig(batch_size=4, num_train_epochs=2, group_by_length=True)
    before = _step(config, 40)._cache_size()
    jl.train(jl.lora(model, rank=2, layers=[1]), data, config=config)
    assert 0 < _step(config, 40)._cache_size() - before <= 4


def test_history_and_evaluation(model, batch):
    tun = jl.lora(model, rank=3)
    rows = []
    result = jl.train(
        tun,
        batch,
        cases.text_batch(5, seed=4),
        jl.TrainConfig(batch_size=4, max_steps=5, eval_steps=2),
        log=rows.append,
    )
    assert rows == result.history
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5]
    assert [row["step"] for row in rows if "eval_loss" in row] == [2, 4, 5]
    assert rows[-1]["distance"] == pytest.approx(gap(result.theta, tun.theta0), rel=1e-5)
    outputs = jl.predict(tun, tun.theta0, batch)
    order = epoch_order(Dataset.from_columns(batch), jl.TrainConfig(batch_size=4), 0)[:4]
    y = np.eye(3)[batch["labels"]]
    assert rows[0]["loss"] == pytest.approx(0.5 * np.sum((outputs - y)[order] ** 2) / 4, rel=1e-5)


@pytest.mark.parametrize("group", [False, True])
def test_epochs_visit_every_example_once(group):
    data = Dataset.from_columns(cases.text_batch(23, longest=60))
    config = jl.TrainConfig(batch_size=5, group_by_length=group)
    orders = [epoch_order(data, config, epoch) for epoch in range(3)]
    for order in orders:
        assert sorted(order) == list(range(23))
    assert not np.array_equal(orders[0], orders[1])
    if group:
        assert len({data.lengths[order[20:]].max() for order in orders}) > 1  # not always the longest
        longest = [data.lengths[orders[0][i : i + 5]] for i in range(0, 20, 5)]
        spread = np.mean([np.ptp(lengths) for lengths in longest])
        assert spread < np.ptp(data.lengths) / 2


def test_the_last_partial_batch_is_weighted_right():
    tun, data = cases.mlp(), cases.vectors(5)
    config = jl.TrainConfig(batch_size=3, max_steps=2, optimizer="sgd", learning_rate=0.1)
    result = jl.train(tun, data, config=config)
    order = epoch_order(Dataset.from_columns(data), config, 0)
    theta = tun.theta0
    for part in (order[:3], order[3:]):
        rows = {key: value[part] for key, value in data.items()}

        def loss(p, rows=rows):
            return jnp.mean(LOSSES["squared"](tun.apply(p, rows), jnp.asarray(rows["labels"])))

        theta = jax.tree.map(lambda p, g: p - 0.1 * g, theta, jax.grad(loss)(theta))
    assert gap(result.theta, theta) < 1e-6


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_schedules(schedule):
    rates = [float(Schedule(2.0, schedule, 4, 20)(i)) for i in range(20)]
    np.testing.assert_allclose(rates[:4], [0.5, 1.0, 1.5, 2.0])
    assert rates[-1] == (2.0 if schedule == "constant" else pytest.approx(0, abs=0.3))


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_every_optimizer_descends(optimizer):
    tun, data = cases.mlp(), cases.vectors(12)
    result = jl.train(tun, data, config=jl.TrainConfig(optimizer=optimizer, learning_rate=0.01, max_steps=60))
    assert result.history[-1]["loss"] < result.history[0]["loss"]


def test_one_output_classes_and_scores():
    tun, rows = cases.mlp(1), cases.vectors(8)
    np.testing.assert_array_equal(targets(np.array([0, 1]), 1), [[-1], [1]])
    result = jl.train(tun, rows, rows, jl.TrainConfig(max_steps=3))
    assert result.history[-1]["eval_accuracy"] is not None
    scored = {**rows, "labels": np.linspace(0, 5, 8)}
    last = jl.train(tun, scored, scored, jl.TrainConfig(max_steps=3)).history[-1]
    assert last["eval_accuracy"] is None
    assert -1 <= last["eval_pearson"] <= 1
    with pytest.raises(jl.InputError, match="at least two outputs"):
        jl.train(tun, rows, config=jl.TrainConfig(loss="cross_entropy"))
    with pytest.raises(jl.InputError, match="need one output"):
        jl.train(cases.mlp(2), scored)


def test_divergence_stops_with_the_step_and_keeps_the_log():
    rows = []
    config = jl.TrainConfig(optimizer="sgd", learning_rate=1e12, max_steps=60)
    tun = jl.Tunable(lambda theta, batch: theta["w"] ** 3 * batch["x"][:, :2], {"w": jnp.float32(1.0)})
    with pytest.raises(jl.TrainingDivergedError, match=r"at step \d+ of 60 \(examples \[0, 1"):
        jl.train(tun, cases.vectors(4), config=config, log=rows.append)
    assert rows
    assert all(np.isfinite(row["loss"]) for row in rows)


BAD = {
    "optimizer": ({"optimizer": "adamw"}, "pull='decoupled' is AdamW"),
    "loss": ({"loss": "hinge"}, "loss='hinge' is unknown"),
    "rate": ({"learning_rate": 0.0}, "learning_rate=0.0"),
    "steps": ({"max_steps": -1}, "max_steps=-1"),
    "lam": ({"lam": -0.5}, "lam=-0.5"),
    "seed": ({"seed": -1}, "seed=-1"),
    "warmup": ({"warmup_ratio": 1.0}, "warmup_ratio=1.0"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_configurations(case):
    values, message = BAD[case]
    with pytest.raises(jl.InputError, match=message):
        jl.train(cases.mlp(), cases.vectors(3), config=jl.TrainConfig(**values))


@pytest.mark.parametrize(
    ("name", "value", "message"), [("batch_size", 2.5, "2.5"), ("optimizer", optax.sgd, "optax.sgd")]
)
def test_wrong_types(name, value, message):
    config = jl.TrainConfig()
    object.__setattr__(config, name, value)  # as it is without the type checker of this test run
    with pytest.raises(jl.InputError, match=message):
        config.check()


def test_bad_labels():
    tun, rows = cases.mlp(), cases.vectors(3)
    with pytest.raises(jl.InputError, match="label 2 lies outside the 2 classes"):
        jl.train(tun, {**rows, "labels": np.array([0, 1, 2])})
    for labels in (rows["labels"][:, None], np.array(["a", "b", "a"])):
        with pytest.raises(jl.InputError, match="expected"):
            jl.train(tun, {**rows, "labels": labels})
    with pytest.raises(jl.InputError, match="no column 'labels'"):
        jl.train(tun, {"x": rows["x"]})


@pytest.mark.filterwarnings("error")
def test_metrics_and_where_they_are_blank():
    rng = np.random.default_rng(0)
    outputs, labels = rng.normal(size=(50, 3)), rng.integers(0, 3, 50)
    found = metrics(outputs, labels)
    confusion = np.histogram2d(labels, outputs.argmax(1), bins=3)[0]
    by_class = [2 * confusion[k, k] / (confusion[k].sum() + confusion[:, k].sum()) for k in range(3)]
    assert found["accuracy"] == pytest.approx(np.trace(confusion) / 50)
    assert found["f1"] == pytest.approx(np.mean(by_class))
    assert found["pearson"] is found["spearman"] is None
    yes, sign = labels > 0, outputs[:, 0] > 0
    binary = metrics(outputs[:, :1], yes.astype(int))
    assert binary["f1"] == pytest.approx(2 * (yes & sign).sum() / (yes.sum() + sign.sum()))
    assert binary["matthews"] == pytest.approx(np.corrcoef(yes, sign)[0, 1])
    constant = metrics(np.tile([0.0, 1.0], (4, 1)), np.zeros(4, int))
    assert constant == {"accuracy": 0.0, "f1": 0.0, "matthews": 0.0, "pearson": None, "spearman": None}
    x, y = outputs[:, :1], outputs[:, 1]
    scores = metrics(x, y)
    assert scores["pearson"] == pytest.approx(np.corrcoef(x[:, 0], y)[0, 1])
    ranks = (x[:, 0].argsort().argsort(), y.argsort().argsort())
    assert scores["spearman"] == pytest.approx(np.corrcoef(*ranks)[0, 1])
    assert scores["accuracy"] is scores["f1"] is scores["matthews"] is None
    for flat in (np.zeros((4, 1)), np.array([[0.1], [0.1 + 2e-17], [0.1], [0.1 + 1e-14]])):
        assert set(metrics(flat, np.arange(4.0)).values()) == {None}
    assert set(metrics(x[:1], y[:1]).values()) == {None}
