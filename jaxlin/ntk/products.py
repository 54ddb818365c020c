"""Products with the empirical NTK, where the kernel itself does not fit.

`K v = J(x1) (J(x2)ᵀ v)` (theory 0): a backward pass over x2, then a forward tangent pass over x1.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree

from jaxlin.data.dataset import Dataset, as_dataset
from jaxlin.errors import InputError, halved
from jaxlin.ntk.jacobian import (
    MAX_CHUNK,
    MEMORY_BUDGET,
    check_deviation,
    check_precision,
    evenly_spread,
    jacobian,
    jacobian_bytes,
    num_outputs,
    to_float64,
)
from jaxlin.tunable import Batch, Tunable, leaf_paths

if TYPE_CHECKING:
    import scipy.sparse.linalg


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Stacked:
    """A data set on the device: of every bucket its chunks, stacked, and where their rows stand."""

    buckets: tuple[Any, ...]  # (positions [chunks, rows], batch) of each; on unflattening anything may stand for them
    size: int = dataclasses.field(metadata={"static": True})


def _stack(data: Dataset, size: int) -> Stacked:
    """Puts a data set on the device, in chunks of at most so many examples of one length."""
    shapes: dict[Any, list[tuple[np.ndarray, dict[str, np.ndarray]]]] = {}
    size = min(size, len(data))
    for indices, batch in data.chunks(size):
        # A filler's position is beyond the end: there a vector reads as zero, and what is written is dropped.
        positions = np.concatenate([indices, np.full(size - len(indices), len(data))]).astype(np.int32)
        shapes.setdefault(tuple(value.shape for value in batch.values()), []).append((positions, batch))
    buckets = [jax.tree.map(lambda *parts: jnp.asarray(np.stack(parts)), *chunks) for chunks in shapes.values()]
    return Stacked(tuple(buckets), len(data))


@jax.jit
def pull(vector: Float[Array, "N C"], apply: Callable[[PyTree, Batch], Array], theta: PyTree, data: Stacked) -> PyTree:
    """Returns `Jᵀ vector`, a pytree like theta; in float64 between chunks."""

    def add(total: PyTree, chunk: tuple[Array, Batch]) -> tuple[PyTree, None]:
        positions, batch = chunk
        outputs, pullback = jax.vjp(lambda p: apply(p, batch), theta)
        (gradient,) = pullback(vector.at[positions].get(mode="fill", fill_value=0).astype(outputs.dtype))
        return jax.tree.map(lambda t, g: t + g.astype(t.dtype), total, gradient), None

    total = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, vector.dtype), theta)
    for bucket in data.buckets:
        total, _ = jax.lax.scan(add, total, bucket)
    return total


@jax.jit
def push(tangent: PyTree, apply: Callable[[PyTree, Batch], Array], theta: PyTree, data: Stacked) -> Float[Array, "N C"]:
    """Returns `J tangent`, for a pytree like theta in float64."""
    along = jax.tree.map(lambda t, leaf: t.astype(leaf.dtype), tangent, theta)

    def rows(_: None, chunk: tuple[Array, Batch]) -> tuple[None, Array]:
        return None, jax.jvp(lambda p: apply(p, chunk[1]), (theta,), (along,))[1].astype(jnp.float64)

    parts = [jax.lax.scan(rows, None, bucket)[1] for bucket in data.buckets]
    flat = jnp.concatenate([part.reshape(-1, part.shape[-1]) for part in parts])
    positions = jnp.concatenate([positions.reshape(-1) for positions, _ in data.buckets])
    return jnp.zeros((data.size, flat.shape[1])).at[positions].set(flat, mode="drop")


@dataclasses.dataclass(frozen=True, eq=False)
class NTKOperator:
    """The empirical NTK `K(x1, x2) = J(x1) J(x2)ᵀ`, unnormalised (theory 0), as a linear map on float64 vectors.

    Rows and columns are example-major, as those of `Kernel.matrix()`: `i*C + c` is output c of example i. A product
    costs one backward pass over x2 and one forward tangent pass over x1. It holds the inputs on the device, one
    chunk's activations, and J(x2)ᵀv in float64; neither K nor J.

    Attributes:
        tun: The model.
        theta: Where.
        data1: Rows.
        data2: Columns; the same object for a symmetric operator.
        num_outputs: C.
        dtype: Of the computation: `"float64"`, or `None` for that of the parameters. Between chunks sums are float64.
        precision: Of matrix products on the device.
        check_examples: Largest number of examples of each data set that were compared with float64.
        stacked: Rows and columns on the device.
        deviation: Largest relative deviation from float64 that was found there; `None` if nothing was compared.
            About `deviation * μ_1` is rounding: eigenvalues below are not known.
        events: What was changed on the way, where memory ran out.
    """

    tun: Tunable
    theta: PyTree
    data1: Dataset
    data2: Dataset
    num_outputs: int
    dtype: str | None
    precision: str
    check_examples: int
    _function: tuple[Any, PyTree] = dataclasses.field(repr=False)
    stacked: tuple[Stacked, Stacked] = dataclasses.field(repr=False)
    deviation: float | None = None
    events: tuple[str, ...] = ()

    @property
    def symmetric(self) -> bool:
        """Whether x2 is x1, so that K is symmetric and positive semidefinite."""
        return self.data1 is self.data2

    @property
    def shape(self) -> tuple[int, int]:
        """`(N1*C, N2*C)`."""
        return len(self.data1) * self.num_outputs, len(self.data2) * self.num_outputs

    @functools.cached_property
    def T(self) -> NTKOperator:
        """`K(x2, x1)`, checked likewise the first time; itself where it is symmetric."""
        if self.symmetric:
            return self
        swapped = {"data1": self.data2, "data2": self.data1, "stacked": self.stacked[::-1]}
        return _checked(dataclasses.replace(self, **swapped))  # type: ignore[arg-type]

    def at(self, theta: PyTree) -> NTKOperator:
        """Returns the operator at another theta, checked likewise; inputs and weights stay on the device.

        Args:
            theta: Where.

        Returns:
            The operator there.

        Raises:
            InputError: If theta has another structure or other shapes than theta0.
        """
        self.tun.check_theta(theta)
        with jax.enable_x64(self.dtype == "float64" or jax.config.read("jax_enable_x64")):
            cast = jax.tree.map(jnp.asarray, to_float64(theta) if self.dtype == "float64" else theta)
        return _checked(dataclasses.replace(self, theta=theta, _function=(self._function[0], cast)))

    def __matmul__(self, vectors: np.ndarray) -> np.ndarray:
        """Returns `K vectors`.

        Args:
            vectors: `[N2*C]`, columns `[N2*C, k]` (one product each), or `[N2, C]`.

        Returns:
            `[N1*C]`, `[N1*C, k]` or `[N1, C]`, float64.

        Raises:
            InputError: If `vectors` has another shape, or is not real.
        """
        v, c = np.asarray(vectors), self.num_outputs
        by_example = v.shape == (len(self.data2), c)
        if v.dtype.kind not in "biuf" or not (by_example or (v.ndim in (1, 2) and v.shape[0] == self.shape[1])):
            raise InputError(
                f"a product with this kernel takes real numbers of shape ({self.shape[1]},), ({self.shape[1]}, k) or "
                f"({len(self.data2)}, {c}); got {v.dtype} of shape {v.shape}"
            )
        if by_example or v.ndim == 1:
            product = self._push(self.pull(v))
            return product if by_example else product.reshape(-1)
        # The compiled programs that were checked, whatever the number of columns.
        products = [self._push(self.pull(column)).reshape(-1) for column in v.T]
        return np.stack(products, axis=1) if products else np.zeros((self.shape[0], 0))

    def linear_operator(self) -> scipy.sparse.linalg.LinearOperator:
        """Returns the operator as SciPy's, with its adjoint: float64, `[N1*C, N2*C]`."""
        import scipy.sparse.linalg

        return scipy.sparse.linalg.LinearOperator(
            self.shape,
            matvec=lambda v: self @ v.reshape(-1),
            rmatvec=lambda v: self.T @ v.reshape(-1),
            dtype=np.dtype(np.float64),
        )

    def run(self, function: Callable[..., Any], operand: Any, data: Stacked, **options: Any) -> Any:
        """Calls a compiled `function(operand, apply, theta, data)`, with x64 on and at the operator's precision."""
        with jax.enable_x64(True), jax.default_matmul_precision(self.precision):
            return function(operand, *self._function, data, **options)

    def pull(self, vector: np.ndarray) -> PyTree:
        """`J(x2)ᵀ vector`, on the device."""
        shaped = np.asarray(vector, np.float64).reshape(len(self.data2), self.num_outputs)
        return self.run(pull, shaped, self.stacked[1])

    def _push(self, tangent: PyTree) -> Float[np.ndarray, "N1 C"]:
        return np.asarray(self.run(push, tangent, self.stacked[0]))


def ntk_vector_product(
    tun: Tunable,
    x1: Dataset | Mapping[str, Any],
    x2: Dataset | Mapping[str, Any] | None = None,
    *,
    theta: PyTree | None = None,
    dtype: str | None = None,
    precision: str = "highest",
    check_examples: int = 2,
) -> NTKOperator:
    """Returns the map `v -> K(x1, x2) v` of the kernel `K = J(x1) J(x2)ᵀ` (theory 0), which is never formed.

    Before it is returned, its two compiled passes are run on a vector that is zero but for a few examples (one
    product's cost) and compared with the dense float64 Jacobian of those: XLA's CPU compiler (jaxlib <= 0.10.2) can
    be wrong by 1e-3, silently, in products of jvp and vjp. Passes are of at most 16 examples of one length; where that
    check finds too little memory, of half as many.

    Args:
        tun: The model; the kernel is of exactly its theta.
        x1: Examples: a `Dataset` or a dict of arrays.
        x2: Other examples, for a train-test kernel; `None` for x1 itself.
        theta: Where; default `tun.theta0`.
        dtype: `"float64"` computes everything in float64; `None` as the parameters, with float64 sums over chunks.
        precision: Of matrix products on the device: `"highest"` is true float32.
        check_examples: How many examples of each data set are compared with float64, fewer where their float64
            Jacobian takes over 4 GiB; 0 for none.

    Returns:
        The operator, `[N1*C, N2*C]`.

    Raises:
        InputError: If an argument is not one of those listed, an input does not fit the model, or the float64 Jacobian
            of one example is too large.
        FloatingPointError: If the passes deviate from float64.
        MemoryError: If memory runs out for one example, too; a device's is a `JaxRuntimeError`.
        jax.errors.JaxRuntimeError: Likewise.

    Example:
        >>> import jax.numpy as jnp, numpy as np, jaxlin as jl
        >>> from jaxlin.ntk.products import ntk_vector_product
        >>> tun = jl.Tunable(lambda theta, batch: batch["x"] @ theta["w"], {"w": jnp.zeros((2, 1))})
        >>> K = ntk_vector_product(tun, {"x": np.array([[1.0, 2.0], [0.0, 3.0]])})
        >>> K @ np.array([1.0, 0.0])  # K = x xᵀ = [[5, 6], [6, 9]]
        array([5., 6.])
    """
    if dtype not in (None, "float64"):
        raise InputError(f'dtype={dtype!r} is unknown; expected "float64", or None for that of the parameters')
    if check_examples < 0:
        raise InputError(f"check_examples={check_examples}; expected 0 (no check) or more")
    check_precision(precision)
    theta = tun.theta0 if theta is None else theta
    tun.check_theta(theta)
    data1 = as_dataset(x1)
    data2 = data1 if x2 is None else as_dataset(x2)
    for data in (data1, data2):
        tun.check_batch(data.columns)
    c, function = num_outputs(tun, data1), (tun.apply, theta)
    # Inputs and frozen weights in the dtypes that JAX gives them by default, though products run with x64 on.
    in_float64 = dtype == "float64" or jax.config.read("jax_enable_x64")
    with jax.enable_x64(in_float64):
        function = jax.tree.map(jnp.asarray, to_float64(function) if dtype == "float64" else function)

    def checked(size: int) -> NTKOperator:
        with jax.enable_x64(in_float64):
            first = _stack(data1, size)
            stacked = (first, first if data2 is data1 else _stack(data2, size))
        given = (tun, theta, data1, data2, c, dtype, precision, check_examples, function, stacked)
        return _checked(NTKOperator(*given, events=events))

    size, events = min(MAX_CHUNK, max(len(data1), len(data2))), tuple[str, ...]()
    while True:
        try:
            return checked(size)
        except (MemoryError, jax.errors.JaxRuntimeError) as error:
            size, event = halved(size, "a pass of {} examples", error)
            events = (*events, event)


def _checked(operator: NTKOperator) -> NTKOperator:
    """Compares both passes with float64 in a few examples; returns the operator with the deviation found."""
    if not operator.check_examples:
        return operator
    chosen2, rows2 = _reference(operator, operator.data2)
    chosen1, rows1 = (chosen2, rows2) if operator.symmetric else _reference(operator, operator.data1)
    paths, (n2, c) = leaf_paths(operator.theta), (len(operator.data2), operator.num_outputs)
    vector = np.zeros((n2, c))
    vector[chosen2] = np.random.default_rng(0).normal(size=(len(chosen2), c))
    shapes = dict(zip(paths, map(np.shape, jax.tree.leaves(operator.theta)), strict=True))
    exact = {
        path: np.einsum("nc,ncp->p", vector[chosen2], rows2[path]).reshape(shape) if path in rows2 else np.zeros(shape)
        for path, shape in shapes.items()
    }
    pulled = dict(zip(paths, jax.device_get(jax.tree.leaves(operator.pull(vector))), strict=True))
    tangent = jax.tree.unflatten(jax.tree.structure(operator.theta), list(exact.values()))
    pushed = operator._push(tangent)[chosen1]
    expected = sum((rows1[path] @ exact[path].reshape(-1) for path in rows1), np.zeros(pushed.shape))
    backward = relative(np.concatenate([(pulled[path] - exact[path]).reshape(-1) for path in paths]), exact.values())
    forward = relative(pushed - expected, [expected])
    deviation = float(np.maximum(backward, forward))  # NaN stays NaN
    require(operator, deviation, "product with the kernel")
    return dataclasses.replace(operator, deviation=deviation)


def _reference(operator: NTKOperator, data: Dataset) -> tuple[np.ndarray, Mapping[str, np.ndarray]]:
    """Returns some examples, spread evenly, and the float64 Jacobian of each leaf there."""
    one = jacobian_bytes(operator.tun, data, "float64") // len(data)
    count = min(operator.check_examples, len(data), MEMORY_BUDGET // one)
    if not count:
        raise InputError(
            f"checking products against float64 takes {one / 2**30:.1f} GiB an example, more than "
            f"{MEMORY_BUDGET / 2**30:.0f} GiB; tune less, or pass check_examples=0 to go without"
        )
    chosen = evenly_spread(len(data), count)
    options: dict[str, Any] = {"dtype": "float64", "precision": operator.precision}
    return chosen, jacobian(operator.tun, data.take(chosen), operator.theta, **options).rows


def relative(error: np.ndarray, exact: Any) -> float:
    """Euclidean norm of an error, relative to that of some arrays together."""
    return float(np.linalg.norm(error) / max(sum(float(np.sum(part**2)) for part in exact) ** 0.5, 1e-300))


def require(operator: NTKOperator, deviation: float, what: str) -> None:
    """Raises where a deviation from float64 is beyond what the dtype explains."""
    remedy = 'the model returns NaN there, or a compiler bug is likely: use ntk(...), or dtype="float64"'
    check_deviation(deviation, operator._function[1], operator.precision, f"a {what}", remedy)
