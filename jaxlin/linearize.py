"""The exact first-order Taylor model of a Tunable."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from jaxlin.tunable import Batch, Tunable, check_inputs


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Linearized:
    """`f̄(theta) = f(at) + J(at) (theta - at)`, computed by one jvp (theory 1)."""

    apply: Callable[[PyTree, Batch], Array]
    at: PyTree

    def __call__(self, theta: PyTree, batch: Batch) -> Array:
        """Returns `f̄(theta)`, shape `[B, C]`."""
        delta = jax.tree.map(lambda t, a: (t - a).astype(jnp.result_type(a)), theta, self.at)
        primal, tangent = jax.jvp(lambda p: self.apply(p, batch), (self.at,), (delta,))
        return primal + tangent

    def check_batch(self, batch: Batch) -> None:
        """Checks inputs as the model that is linearized does."""
        check_inputs(self.apply, batch)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Remainder:
    """`f − f̄`, what the first-order Taylor model at `at` leaves out: its Jacobian is `J(theta) − J(at)`."""

    apply: Callable[[PyTree, Batch], Array]
    at: PyTree

    def __call__(self, theta: PyTree, batch: Batch) -> Array:
        """Returns `f(theta) − f̄(theta)`, shape `[B, C]`."""
        return self.apply(theta, batch) - Linearized(self.apply, self.at)(theta, batch)

    def check_batch(self, batch: Batch) -> None:
        """Checks inputs as the model does."""
        check_inputs(self.apply, batch)


def remainder(tun: Tunable) -> Tunable:
    """Returns `f − f̄` as a Tunable: its outputs are the gap of theory 5(a), its Jacobian is `J(theta) − J₀`."""
    return dataclasses.replace(tun, apply=Remainder(tun.apply, tun.theta0))


def linearize(tun: Tunable, at: PyTree | None = None) -> Tunable:
    """Returns the exact first-order Taylor model of `tun`, itself a Tunable.

    Nothing is precomputed: an evaluation is one primal and one tangent pass, and its gradient adds one
    transposed pass. `jit`, `vmap`, `grad`, `jvp` and `vjp` of it work as of any function. It is
    linear in the parameters *as trained*: for LoRA in `(A, B)`, not in the product `A B`.

    Args:
        tun: The model to linearize.
        at: Point of expansion, a pytree like `tun.theta0`. Default: `tun.theta0`. Elsewhere along a
            trajectory it gives "late" linearization.

    Returns:
        A Tunable with the same `theta0` and blocks, whose outputs are
        `f(at) + J(at) (theta - at)`, exactly `f(at)` at `theta = at`.

    Raises:
        InputError: If `at` has another structure or other shapes than `tun.theta0`.

    Example:
        >>> import jax.numpy as jnp, jaxlin as jl
        >>> tun = jl.Tunable(lambda theta, batch: theta["w"] ** 2 * batch["x"], {"w": jnp.float32(3.0)})
        >>> lin = jl.linearize(tun)
        >>> float(lin.apply({"w": jnp.float32(4.0)}, {"x": jnp.ones((1, 1))})[0, 0])  # 9 + 6 (4 - 3)
        15.0
    """
    if at is None:
        at = tun.theta0
    else:
        tun.check_theta(at, "at")
    return dataclasses.replace(tun, apply=Linearized(tun.apply, at))
