"""β of theory 3 and 4: how sharply the risk `R = ½‖f − y‖²` can bend, from products with its Hessian."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, PyTree

from jaxlin.ntk.lanczos import Extreme, largest_magnitude
from jaxlin.ntk.products import NTKOperator, Stacked
from jaxlin.training.losses import squared
from jaxlin.tunable import Batch


@jax.jit
def hessian_product(tangent: PyTree, apply: Callable[[PyTree, Batch], Array], theta: PyTree, data: Stacked) -> PyTree:
    """Returns `∇²R tangent` of the summed squared loss, a pytree like theta: forward over reverse mode."""

    def add(total: PyTree, chunk: tuple[Array, Batch]) -> tuple[PyTree, None]:
        batch = chunk[1]

        def risk(p: PyTree) -> Array:
            return jnp.sum(squared(apply(p, batch), batch["labels"]) * batch["weight"])

        product = jax.jvp(jax.grad(risk), (theta,), (tangent,))[1]
        return jax.tree.map(jnp.add, total, product), None

    total = jax.tree.map(jnp.zeros_like, theta)
    for bucket in data.buckets:
        total, _ = jax.lax.scan(add, total, bucket)
    return total


def smoothness(
    operator: NTKOperator, *, tolerance: float = 1e-3, start: np.ndarray | None = None, width: int = 12, rng: int = 0
) -> Extreme:
    """Computes the largest |eigenvalue| of the Hessian of R at one θ (theory 3), by Lanczos on products with it.

    β is the supremum of it over a set: the largest of several points is an estimate from below.

    Args:
        operator: The model's kernel at θ, of the training examples, in `dtype="float64"`: it holds the examples, with
            their `labels`, on the device. In float32 XLA's CPU compiler (jaxlib <= 0.10.2) can be wrong in products of
            jvp and vjp.
        tolerance: Relative residual at which Lanczos stops.
        start: Vector to start from, that of a point nearby; random by default.
        width: Vectors of `[P]` held, and products made at least.
        rng: Seed of a random start.

    Returns:
        The eigenvalue, with its residual and vector `[P]`.

    Raises:
        ValueError: If the operator is not of one set of examples in float64.
        FloatingPointError: If Lanczos does not converge, or a product is NaN.
    """
    if operator.dtype != "float64" or not operator.symmetric:
        raise ValueError("smoothness needs an operator of one set of examples, in float64")
    with jax.enable_x64(True):
        flat, unravel = ravel_pytree(jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float64), operator.theta))

    def product(vector: np.ndarray) -> np.ndarray:
        with jax.enable_x64(True):
            tangent = unravel(jnp.asarray(vector))
            return np.asarray(ravel_pytree(operator.run(hessian_product, tangent, operator.stacked[0]))[0])

    return largest_magnitude(product, flat.size, tolerance=tolerance, start=start, width=width, rng=rng)
