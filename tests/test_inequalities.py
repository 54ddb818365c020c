"""Theory 3 to 6 on a small tanh network in float64, where β and H can be had on a dense sample."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import jaxlin as jl
from jaxlin.theory.bound import bound

N, D_IN, HIDDEN = 8, 3, 4
P = HIDDEN * (D_IN + 1)


class Network:
    """f(x) = v·tanh(Wx), one output, with exact derivatives in NumPy."""

    def __init__(self, seed):
        rng = np.random.default_rng(seed)
        self.x, self.y = rng.normal(size=(N, D_IN)), rng.normal(size=N)
        self.theta0 = rng.normal(size=P) / 2

    def f(self, theta):
        w, v = theta[: HIDDEN * D_IN].reshape(HIDDEN, D_IN), theta[HIDDEN * D_IN :]
        return np.tanh(self.x @ w.T) @ v

    def jac(self, theta):
        w, v = theta[: HIDDEN * D_IN].reshape(HIDDEN, D_IN), theta[HIDDEN * D_IN :]
        h = np.tanh(self.x @ w.T)
        return np.concatenate([((v * (1 - h**2))[:, :, None] * self.x[:, None, :]).reshape(N, -1), h], axis=1)

    def risk(self, theta):
        return 0.5 * np.sum((self.f(theta) - self.y) ** 2)

    def gradient(self, theta):
        return self.jac(theta).T @ (self.f(theta) - self.y)

    def hessian_norm(self, theta, step=1e-6):
        rows = [(self.gradient(theta + step * e) - self.gradient(theta - step * e)) / (2 * step) for e in np.eye(P)]
        return np.abs(np.linalg.eigvalsh((np.array(rows) + np.array(rows).T) / 2)).max()


def run(net, lam, eta, steps, selective=False):
    """Descent of the network and of its linearization, with all that the bounds speak of at every step."""
    j0, f0 = net.jac(net.theta0), net.f(net.theta0)
    theta, linear = net.theta0.copy(), net.theta0.copy()
    rows = []
    for _ in range(steps + 1):
        g, delta = net.gradient(theta), theta - net.theta0
        u = g + lam * delta * (g @ delta >= 0 if selective else 1.0)
        f_linear = f0 + j0 @ (linear - net.theta0)
        rows.append(
            {
                "theta": theta,
                "distance": np.linalg.norm(delta),
                "risk": net.risk(theta),
                "residual": np.linalg.norm(net.f(theta) - net.y),
                "gradient": np.linalg.norm(g),
                "inner": g @ u,
                "update": np.linalg.norm(u),
                "same_theta": np.linalg.norm(net.f(theta) - f0 - j0 @ delta),
                "parameters": np.linalg.norm(theta - linear),
                "outputs": np.linalg.norm(net.f(theta) - f_linear),
                "drift": np.linalg.norm(net.jac(theta) @ net.jac(theta).T - j0 @ j0.T, 2),
                "linear": linear,
            }
        )
        theta = theta - eta * u
        linear = linear - eta * (j0.T @ (f_linear - net.y) + lam * (linear - net.theta0))
    return {key: np.array([row[key] for row in rows]) for key in rows[0]}


def suprema(net, radius, seed, count=60):
    """Sampled β and H in the ball, widened by half: the supremum of a smooth function over it."""
    rng, beta, lipschitz, j0 = np.random.default_rng(seed), 0.0, 0.0, net.jac(net.theta0)
    for _ in range(count):
        v = rng.normal(size=P)
        theta = net.theta0 + radius * rng.uniform() * v / np.linalg.norm(v)
        beta = max(beta, net.hessian_norm(theta))
        lipschitz = max(lipschitz, np.linalg.norm(net.jac(theta) - j0, 2) / np.linalg.norm(theta - net.theta0))
    return 1.5 * beta, 1.5 * lipschitz


@given(seed=st.integers(0, 10**6), lam=st.sampled_from([0.5, 3.0, 30.0, 300.0]))
def test_every_bound_holds_along_descent(seed, lam):
    net = Network(seed)
    j0 = net.jac(net.theta0)
    sigma = np.linalg.norm(j0, 2)
    radius = (2 * net.risk(net.theta0) / lam) ** 0.5
    beta, lipschitz = suprema(net, radius, seed)
    eta = 0.9 / (max(beta, sigma**2) + lam)
    t, steps = run(net, lam, eta, 40), np.arange(41)
    largest = t["distance"].max()
    found = [
        jl.bounds.distance_a_posteriori(t["distance"], t["risk"][0], t["risk"], lam, eta, beta),
        jl.bounds.distance_a_priori(t["distance"], t["risk"][0], lam, eta, beta),
        jl.bounds.distance_by_recursion(t["distance"], steps, t["gradient"].max(), lam, eta),
        jl.bounds.same_theta_gap(t["same_theta"], t["distance"], lipschitz),
        jl.bounds.parameter_gap(t["parameters"], steps, lipschitz, largest, t["residual"].max(), sigma, lam, eta),
        jl.bounds.output_gap(t["outputs"], t["parameters"], lipschitz, largest, sigma),
        jl.bounds.kernel_drift(t["drift"], t["distance"], lipschitz, sigma),
    ]
    found.append(jl.bounds.smallest_distance(found[1], found[2]))
    np.testing.assert_array_equal(found[-1].value, np.minimum(found[1].value, found[2].value))
    for one in found:
        assert one.holds is True, (one.name, one.slack.min())
        assert one.slack.shape == (41,)
        assert 0 <= one.tightness <= 1


@given(seed=st.integers(0, 10**6), lam=st.sampled_from([0.0, 3.0, 300.0]))
def test_selective_descent_is_monotone(seed, lam):
    net = Network(seed)
    beta, _ = suprema(net, 1.0, seed, 20)
    eta = 0.2 / (beta + lam)
    t = run(net, lam, eta, 30, selective=True)
    arrays = [t["risk"][:-1], t["risk"][1:], t["inner"][:-1], t["update"][:-1]]
    assert jl.bounds.selective_direction(t["inner"], t["gradient"]).holds
    along = [net.hessian_norm(theta) for theta in t["theta"]]
    beta = max(beta, 1.5 * max(along))
    assert jl.bounds.descent_step(*arrays, eta, beta).holds
    assert jl.bounds.monotone_descent(*arrays, eta, beta).holds in (True, None)


@given(seed=st.integers(0, 10**6), lam=st.sampled_from([0.0, 0.1, 10.0]))
def test_contraction_of_the_linearized_model(seed, lam):
    net = Network(seed)
    jac, residual = net.jac(net.theta0), net.f(net.theta0) - net.y
    mu = np.linalg.eigvalsh(jac @ jac.T)
    eta = 2 / (mu[-1] + mu[0] + 2 * lam)
    limit = -jac.T @ np.linalg.solve(jac @ jac.T + lam * np.eye(N), residual)
    deltas = [np.zeros(P)]
    for _ in range(50):
        deltas.append(deltas[-1] - eta * (jac.T @ (residual + jac @ deltas[-1]) + lam * deltas[-1]))
    gaps = np.linalg.norm(np.array(deltas) - limit, axis=1)
    found = jl.bounds.contraction(gaps, np.arange(51), mu[-1], mu[0], lam, eta)
    assert found.holds
    kappa = (mu[-1] + lam) / (mu[0] + lam)
    np.testing.assert_allclose(found.value, gaps[0] * ((kappa - 1) / (kappa + 1)) ** np.arange(51), rtol=1e-9)


@pytest.mark.parametrize(
    ("change", "condition"),
    [
        ({"learning_rate": 1.0}, "η ≤ 1/(β+λ)"),
        ({"lam": 0.0}, "λ > 0"),
        ({"descent": False}, "full-batch descent, constant step, coupled pull, no momentum"),
    ],
)
def test_where_a_condition_fails_nothing_is_claimed(change, condition):
    options = {"lam": 1.0, "learning_rate": 0.1, "beta": 5.0, **change}
    for found in (
        jl.bounds.distance_a_posteriori(np.array([1.0]), 3.0, np.array([1.0]), **options),
        jl.bounds.distance_a_priori(np.array([1.0]), 3.0, **options),
    ):
        assert found.holds is None
        assert not found.applies
        assert [name for name, met in found.conditions.items() if not met] == [condition]


def test_the_smaller_bound_is_of_those_that_apply():
    options = {"lam": 1.0, "learning_rate": 0.5}
    priori = jl.bounds.distance_a_priori(np.array([1.0]), 3.0, beta=5.0, **options)
    recursion = jl.bounds.distance_by_recursion(np.array([1.0]), np.array([9]), 40.0, **options)
    assert (priori.holds, recursion.holds) == (None, True)
    found = jl.bounds.smallest_distance(priori, recursion)
    assert found.holds is True
    assert found.value == recursion.value > priori.value
    neither = jl.bounds.distance_by_recursion(np.array([1.0]), np.array([9]), 40.0, descent=False, **options)
    assert jl.bounds.smallest_distance(priori, neither).holds is None


def test_distance_at_a_stationary_point():
    net, lam = Network(0), 5.0
    t = run(net, lam, 0.02, 4000)
    assert t["gradient"][-1] > 0.1
    assert jl.bounds.stationary_distance(t["gradient"][-1], lam) == pytest.approx(t["distance"][-1], rel=1e-6)
    with pytest.raises(jl.InputError, match="lam=0"):
        jl.bounds.stationary_distance(1.0, 0.0)


def test_pull_sum_against_the_sum():
    for lam, eta in ((0.0, 0.3), (2.0, 0.1), (1e-9, 0.5), (2.0, 0.5)):
        expected = [sum(eta * (1 - eta * lam) ** k for k in range(t)) for t in range(6)]
        np.testing.assert_allclose(jl.bounds.pull_sum(np.arange(6), lam, eta), expected, rtol=1e-9)


def test_a_bound_that_fails_says_so():
    found = bound("x", np.array([1.0, 2.0]), np.array([0.5, 2.1]))
    assert found.holds is False
    np.testing.assert_allclose(found.slack, [0.5, -0.1])
    assert bound("x", 1.0, float("nan")).holds is False
    assert bound("x", np.array([1.0, 1.0]), np.array([0.5, np.inf])).holds is False
    assert bound("x", np.inf, 1.0, lower=True).holds is False
    assert bound("x", np.inf, np.inf).holds is True  # nothing is claimed
    assert bound("x", np.inf, 1.0).tightness == 0
    assert bound("x", 1.0, 1.0 + 1e-12).holds is True
    assert bound("x", 2.0, 1.0, lower=True).holds is False
