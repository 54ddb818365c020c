"""When to stop: training and held-out loss of the linearized model over time, in closed form (theory 2)."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

from jaxlin.errors import InputError
from jaxlin.ntk.kernel import Kernel
from jaxlin.theory.regression import KernelRegression


@dataclasses.dataclass(frozen=True, eq=False)
class EarlyStopping:
    """Losses over time; each is the mean over examples of ½‖f̄_t(x) − y‖², without the pull.

    Attributes:
        times: Gradient-descent steps, or times of the flow `[T]`; infinity is the limit.
        train_loss: On the training examples `[T]`.
        held_out_loss: On the examples held out `[T]`.
        held_out: `"validation"` or `"leave-one-out"`.
        best_time: The first of the times at which the held-out loss is least.
        best_loss: The held-out loss there.
    """

    times: Float[np.ndarray, " T"]
    train_loss: Float[np.ndarray, " T"]
    held_out_loss: Float[np.ndarray, " T"]
    held_out: str
    best_time: float
    best_loss: float


def _mean_loss(outputs: Float[np.ndarray, "T N C"], y: Float[np.ndarray, "N C"]) -> Float[np.ndarray, " T"]:
    return 0.5 * np.sum((outputs - y) ** 2, axis=2).mean(1)


def _leave_one_out(
    fit: KernelRegression, times: Float[np.ndarray, " T"], learning_rate: float | None, momentum: float
) -> Float[np.ndarray, "T N C"]:
    """Outputs for each example of the model trained on the others."""
    n, outputs = len(fit.f0), np.empty((len(times), *fit.f0.shape))
    by_example = fit.matrix.reshape(n, -1, n, len(fit.matrix) // n)
    for i in range(n):
        others = fit.without(i)
        rows = np.delete(by_example[i], i, axis=1).reshape(by_example.shape[1], -1)
        for k, t in enumerate(times):
            alpha = others.coefficients(float(t), learning_rate, momentum)
            outputs[k, i] = fit.f0[i] + (rows @ alpha.reshape(rows.shape[1], -1)).reshape(-1)
    return outputs


def early_stopping(
    fit: KernelRegression,
    times: Sequence[float] | Float[np.ndarray, " T"],
    learning_rate: float | None = None,
    momentum: float = 0.0,
    validation: tuple[Kernel, Float[np.ndarray, "M C"], Float[np.ndarray, "M C"]] | None = None,
) -> EarlyStopping:
    """Finds the best time to stop training the linearized model.

    Args:
        fit: The regression.
        times: Gradient-descent steps where `learning_rate` is given, else times of the flow; `math.inf` is the limit.
        learning_rate: η of the summed loss.
        momentum: Heavy-ball momentum of gradient descent.
        validation: `K(x_val, x_train)`, f₀ and y of examples held out; `None`: exact leave-one-out, by refitting. That
            costs N eigendecompositions of the kernel of N − 1 examples, O(N m³), which serve all times.

    Returns:
        The curve and its best time.

    Raises:
        InputError: If no time is given, a time is no time, descent diverges, shapes do not fit, or there is no example
            to leave out besides one.
    """
    grid = np.asarray(times, np.float64)
    if grid.ndim != 1 or not grid.size:
        raise InputError(f"times has shape {grid.shape}; expected at least one time, [T]")
    train = np.stack([fit.train(float(t), learning_rate=learning_rate, momentum=momentum) for t in grid])
    if validation is None:
        if len(fit.f0) < 2:
            raise InputError("leave-one-out needs at least two training examples; give a validation set")
        held_out = _mean_loss(_leave_one_out(fit, grid, learning_rate, momentum), fit.y)
    else:
        cross, f0, y = validation[0], *(np.asarray(array, np.float64) for array in validation[1:])
        if f0.shape != y.shape or not len(y) or not np.isfinite(y).all():
            raise InputError(f"validation f0 has shape {f0.shape} and y {y.shape}; expected the same, and finite y")
        held_out = _mean_loss(
            np.stack([fit.test(cross, f0, float(t), learning_rate=learning_rate, momentum=momentum) for t in grid]), y
        )
    best = int(np.argmin(held_out))
    return EarlyStopping(
        grid,
        _mean_loss(train, fit.y),
        held_out,
        "leave-one-out" if validation is None else "validation",
        float(grid[best]),
        float(held_out[best]),
    )
