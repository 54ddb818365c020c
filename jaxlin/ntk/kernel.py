"""The empirical NTK as a host-side object."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Mapping

import numpy as np
from jaxtyping import Float

from jaxlin.errors import InputError
from jaxlin.tunable import block_factors


@dataclasses.dataclass(frozen=True)
class KernelInfo:
    """How a kernel was computed.

    Attributes:
        engine: `"jacobian"`, `"factored"`, or `"neural_tangents:<implementation>"`.
        dtype: Of the Jacobian (or of the whole computation, where none is formed).
        gram_dtype: Of the sum over parameters.
        precision: Of the matrix products on the device.
        device: Platform it ran on.
        epsilon_J: Relative Frobenius error of the Jacobian, measured by recomputing the rows of a few
            examples in float64 (theory 6); `None` where it was not measured.
    """

    engine: str
    dtype: str
    gram_dtype: str
    precision: str
    device: str
    epsilon_J: float | None


@dataclasses.dataclass(frozen=True, eq=False)
class Kernel:
    """Empirical NTK `K(x1, x2) = J(x1) J(x2)ᵀ`, unnormalised (theory 0), in float64 on the host.

    Attributes:
        parts: Block name to its kernel `[N1, N2, C, C]`; the kernel is their sum.
        symmetric: Whether x2 is x1, so that the kernel is symmetric and positive semidefinite.
        info: How it was computed.
        jacobian: Leaf path to `[N1, C, size]`, where it was kept; leaves that vanish are left out.
        leaves: Block name to the paths of its leaves.
    """

    parts: Mapping[str, Float[np.ndarray, "N1 N2 C C"]]
    symmetric: bool
    info: KernelInfo
    leaves: Mapping[str, tuple[str, ...]]
    jacobian: Mapping[str, Float[np.ndarray, "N1 C _"]] | None = None

    @functools.cached_property
    def array(self) -> Float[np.ndarray, "N1 N2 C C"]:
        """The kernel in neural-tangents' layout `[N1, N2, C, C]`."""
        parts = list(self.parts.values())
        return parts[0] if len(parts) == 1 else np.sum(parts, axis=0)

    def matrix(self) -> Float[np.ndarray, "m1 m2"]:
        """The kernel as a matrix `[N1*C, N2*C]`, example-major: row `i*C + c` is output c of example i."""
        n1, n2, c, _ = self.array.shape
        return self.array.transpose(0, 2, 1, 3).reshape(n1 * c, n2 * c)

    @property
    def blocks(self) -> dict[str, Kernel]:
        """The kernel of each block of parameters; they sum to this one (theory 7)."""
        return {name: self.subset([name]) for name in self.parts}

    def weighted(self, factors: Mapping[str, float]) -> Kernel:
        """Returns `K_η = Σ η_ℓ K_ℓ`, the kernel under learning rates by block (theory 7).

        With rates `η·η_ℓ` gradient descent on the linearized model follows the closed forms (theory 2) of `K_η` at
        rate η, where there is no pull or one of strength `λ/η_ℓ` on each block. With pulls `λ·w_ℓ` its limit is
        kernel regression with `K_η`, `η_ℓ = 1/w_ℓ`, and ridge λ, whatever the rates above 0.

        Args:
            factors: Regular expression, searched for in the paths of parameters, to η_ℓ ≥ 0; the first that matches
                counts, 1 where none does. As `TrainConfig.learning_rate_blocks`.

        Raises:
            InputError: If a pattern matches nothing, or the parameters of one block have different factors.
        """
        paths = [path for members in self.leaves.values() for path in members]
        return self.scaled(block_factors(paths, factors, "factors"))

    def scaled(self, by_path: Mapping[str, float]) -> Kernel:
        """Returns `weighted` by the factor of every leaf.

        Args:
            by_path: Path of a leaf to its factor.

        Raises:
            InputError: If the parameters of one block have different factors.
        """
        weights: dict[str, float] = {}
        for block, members in self.leaves.items():
            if len({by_path[path] for path in members}) > 1:
                raise InputError(
                    f"the factors part the parameters of block {block!r}; compute the kernel with smaller blocks, such "
                    'as blocks="leaf"'
                )
            weights[block] = by_path[members[0]]
        parts = {block: weights[block] * part for block, part in self.parts.items()}
        rows = self.jacobian and {path: by_path[path] ** 0.5 * jac for path, jac in self.jacobian.items()}
        return dataclasses.replace(self, parts=parts, jacobian=rows)

    def subset(self, names: Iterable[str]) -> Kernel:
        """Returns the kernel of some blocks: the sum of theirs, with no further pass over the data.

        Args:
            names: Block names, or prefixes of them that end before a `/` (`"encoder/layer_0"`).

        Raises:
            InputError: If a name is no block and no such prefix, or none is given.
        """
        chosen: set[str] = set()
        for name in names:
            hits = {block for block in self.parts if f"{block}/".startswith(f"{name.rstrip('/')}/")}
            if not hits:
                raise InputError(
                    f"{name!r} is no block of this kernel, nor a prefix; its blocks: {', '.join(self.parts)}"
                )
            chosen |= hits
        if not chosen:
            raise InputError("a subset needs at least one block")
        leaves = {block: self.leaves[block] for block in self.parts if block in chosen}
        kept = {path for paths in leaves.values() for path in paths}
        jacobian = None if self.jacobian is None else {p: j for p, j in self.jacobian.items() if p in kept}
        return dataclasses.replace(
            self, parts={block: self.parts[block] for block in leaves}, leaves=leaves, jacobian=jacobian
        )
