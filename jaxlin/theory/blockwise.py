"""Learning rates and (coupled) pulls by block in closed form, at any time (theory 7 with 2).

With rates `η·η_ℓ` and pulls `λ·w_ℓ` the parameters of block ℓ are `δ_ℓ = η_ℓ J_ℓᵀ q_ℓ`, where under the flow

    q_ℓ' = −(r_t + λ η_ℓ w_ℓ q_ℓ),    r_t = r₀ + Σ_k η_k K_k q_k.

Blocks whose product `η_ℓ w_ℓ` is the same have the same q, so that each such group is one kernel `K_g = Σ η_ℓ K_ℓ` with
one pull `λ c_g`. With `K_g = F_g F_gᵀ` and `b_g = F_gᵀ q_g` that is

    b' = −(RᵀR + λ diag(c)) b − Rᵀr₀,    R = [F_1 … F_G],    f̄ = f₀ + R b:

one symmetric system, whose every direction follows a φ of `jaxlin.theory.dynamics`, for steps and heavy ball alike.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping

import numpy as np
from jaxtyping import Float

from jaxlin.errors import InputError
from jaxlin.ntk.kernel import Kernel, Parts
from jaxlin.theory.dynamics import phi_at
from jaxlin.theory.inputs import cross_matrix, eigenpairs, training_matrix
from jaxlin.tunable import block_factors


@dataclasses.dataclass(frozen=True, eq=False)
class BlockGroup:
    """Blocks of parameters that move alike: those of one product of rate and pull.

    Attributes:
        rates: Block name to its η_ℓ, above 0.
        pull: c = η_ℓ w_ℓ, the same for all of them.
        vectors: V of `K_g = Σ η_ℓ K_ℓ`, on its range `[m, r]`.
        roots: √μ there `[r]`; `F_g = V√μ`.
    """

    rates: Mapping[str, float]
    pull: float
    vectors: Float[np.ndarray, "m r"]
    roots: Float[np.ndarray, " r"]


@dataclasses.dataclass(frozen=True, eq=False)
class BlockwiseRegression:
    """The linearized model trained by squared loss with rates and pulls by block, at any time (theory 7).

    Attributes:
        groups: Blocks that move alike; those of rate 0 are in none.
        fixed: Blocks of rate 0.
        eigenvalues: s of `RᵀR + λ diag(c)`, ascending `[k]`, k the sum of the groups' ranks.
        eigenvectors: Its eigenvectors `[k, k]`.
        factor: R `[m, k]`.
        f0: Outputs of the pretrained model on the training examples `[N, C]`.
        y: Targets `[N, C]`.
        noise_floor: Directions with s at or below it count as null space at infinite time.
    """

    groups: tuple[BlockGroup, ...]
    fixed: tuple[str, ...]
    eigenvalues: Float[np.ndarray, " k"]
    eigenvectors: Float[np.ndarray, "k k"]
    factor: Float[np.ndarray, "m k"]
    f0: Float[np.ndarray, "N C"]
    y: Float[np.ndarray, "N C"]
    noise_floor: float

    def _state(self, t: float | None, learning_rate: float | None, momentum: float) -> Float[np.ndarray, "k j"]:
        """b: one column for the kernel of all outputs, C of them for one that each output has alike."""
        phi = phi_at(self.eigenvalues, t, learning_rate, momentum, self.noise_floor)
        pulled = self.factor.T @ (self.f0 - self.y).reshape(len(self.factor), -1)
        return -(self.eigenvectors @ (phi[:, None] * (self.eigenvectors.T @ pulled)))

    def _by_group(
        self, t: float | None, learning_rate: float | None, momentum: float
    ) -> list[Float[np.ndarray, "m j"]]:
        """The q of each group, on its kernel's range, where alone it matters."""
        ends = np.cumsum([len(group.roots) for group in self.groups], dtype=int)
        states = np.split(self._state(t, learning_rate, momentum), ends)[:-1]
        return [
            group.vectors @ (state / group.roots[:, None]) for group, state in zip(self.groups, states, strict=True)
        ]

    def coefficients(
        self, t: float | None = None, learning_rate: float | None = None, momentum: float = 0.0
    ) -> dict[str, Float[np.ndarray, "N C"]]:
        """Returns `a_ℓ` of each block, with `δ_ℓ = J_ℓᵀ a_ℓ`.

        Args:
            t: Gradient-descent steps where `learning_rate` is given, else time of the flow; `None`: infinity.
            learning_rate: η of the summed loss.
            momentum: Heavy-ball momentum of gradient descent.

        Raises:
            InputError: If t is negative, the step diverges, or momentum is given without a learning rate.
        """
        found = {name: np.zeros_like(self.f0) for name in self.fixed}
        for group, q in zip(self.groups, self._by_group(t, learning_rate, momentum), strict=True):
            found |= {name: rate * q.reshape(self.f0.shape) for name, rate in group.rates.items()}
        return found

    def train(
        self, t: float | None = None, learning_rate: float | None = None, momentum: float = 0.0
    ) -> Float[np.ndarray, "N C"]:
        """Returns the outputs on the training examples `[N, C]`; arguments as for `coefficients`."""
        return self.f0 + (self.factor @ self._state(t, learning_rate, momentum)).reshape(self.f0.shape)

    def test(
        self,
        kernel_test_train: Kernel,
        f0_test: Float[np.ndarray, "M C"],
        t: float | None = None,
        learning_rate: float | None = None,
        momentum: float = 0.0,
    ) -> Float[np.ndarray, "M C"]:
        """Returns the outputs on other examples `[M, C]`.

        Args:
            kernel_test_train: `K(x_test, x_train)`, of the same blocks.
            f0_test: Outputs of the pretrained model there `[M, C]`.
            t: As for `coefficients`.
            learning_rate: As for `coefficients`.
            momentum: As for `coefficients`.

        Raises:
            InputError: If the blocks or shapes do not fit.
        """
        f0_test = np.asarray(f0_test, np.float64)
        blocks = {*self.fixed, *(name for group in self.groups for name in group.rates)}
        if set(kernel_test_train.parts) != blocks:
            raise InputError(
                f"kernel_test_train has the blocks {', '.join(kernel_test_train.parts)}; expected those of the "
                f"training kernel, {', '.join(sorted(blocks))}"
            )
        outputs = f0_test.copy()
        for group, q in zip(self.groups, self._by_group(t, learning_rate, momentum), strict=True):
            rows = cross_matrix(_summed(kernel_test_train, group.rates), f0_test, self.f0, len(self.factor))
            outputs += (rows @ q).reshape(f0_test.shape)
        return outputs


def _summed(kernel: Kernel, rates: Mapping[str, float]) -> Kernel:
    """Returns `Σ η_ℓ K_ℓ` over some blocks of a kernel."""
    return dataclasses.replace(kernel, parts=Parts(kernel.parts, rates), jacobian=None)


def _groups(kernel: Kernel, rates: Mapping[str, float], pulls: Mapping[str, float]) -> Iterator[BlockGroup]:
    """Puts together what moves alike, and takes each group's kernel apart."""
    members: dict[float, dict[str, float]] = {}
    for name, rate in rates.items():
        if rate > 0:
            members.setdefault(pulls[name], {})[name] = rate
    for pull, of_group in members.items():
        mu, vectors, floor = eigenpairs(_summed(kernel, of_group).matrix(), kernel.info)
        yield BlockGroup(of_group, pull, vectors[:, mu > floor], np.sqrt(mu[mu > floor]))


def blockwise_regression(
    kernel: Kernel,
    y: Float[np.ndarray, "N C"],
    f0: Float[np.ndarray, "N C"],
    ridge: float,
    learning_rate_blocks: Mapping[str, float] | None = None,
    lam_blocks: Mapping[str, float] | None = None,
) -> BlockwiseRegression:
    """Prepares closed-form predictions under learning rates `η·η_ℓ` and pulls `λ·w_ℓ` by block (theory 7).

    Costs an eigendecomposition of each group's kernel (m × m), and one of a system as large as their ranks together:
    at most m times the number of different products `η_ℓ w_ℓ`. Where there is one product only, this is
    `kernel_regression` with `kernel.weighted(learning_rate_blocks)`.

    Args:
        kernel: K₀ of the training examples, by blocks no coarser than the factors.
        y: Targets `[N, C]`.
        f0: Outputs of the pretrained model `[N, C]`.
        ridge: λ of the summed loss, at least 0.
        learning_rate_blocks: Regular expression, searched for in the paths of parameters, to η_ℓ ≥ 0; the first that
            matches counts, 1 where none does. As `TrainConfig.learning_rate_blocks`; at 0 a block stays where it is.
        lam_blocks: Likewise w_ℓ ≥ 0, as `TrainConfig.lam_blocks`; at 0 a block is free.

    Returns:
        The predictor, at every time.

    Raises:
        InputError: If the shapes do not fit, the ridge is negative, the kernel is not symmetric or finite, a pattern
            matches nothing, or the parameters of one block have different factors.
    """
    y, f0 = np.asarray(y, np.float64), np.asarray(f0, np.float64)
    matrix = training_matrix(kernel, "blockwise regression", y=y, f0=f0)
    if not 0 <= ridge < math.inf:
        raise InputError(f"ridge={ridge}; expected at least 0, and finite")
    rates, weights = (
        kernel.by_block(block_factors(kernel.paths, patterns, what))
        for patterns, what in ((learning_rate_blocks, "learning_rate_blocks"), (lam_blocks, "lam_blocks"))
    )
    # Without a ridge there is no pull, and all blocks move alike.
    groups = tuple(_groups(kernel, rates, {name: ridge and rates[name] * weights[name] for name in rates}))
    factor = np.concatenate([np.zeros((len(matrix), 0)), *(group.vectors * group.roots for group in groups)], axis=1)
    pulls = np.repeat([group.pull for group in groups], [len(group.roots) for group in groups])
    values, vectors, floor = eigenpairs(factor.T @ factor + ridge * np.diag(pulls), kernel.info)
    fixed = tuple(name for name, rate in rates.items() if rate == 0)
    return BlockwiseRegression(groups, fixed, values, vectors, factor, f0, y, floor)
