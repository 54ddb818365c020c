"""The empirical NTK as a host-side object."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
from jaxtyping import Float

from jaxlin.errors import InputError
from jaxlin.ntk.kinds import contrast_basis, kind_of
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
        epsilon_J: Relative Frobenius error of the Jacobian (of its signs, in kernels of signs), measured by
            recomputing the rows of a few examples of x1 in float64 (theory 6); `None` where it was not measured.
        note: Why the engine was chosen, where that was left to `ntk`; what changed on the way.
    """

    engine: str
    dtype: str
    gram_dtype: str
    precision: str
    device: str
    epsilon_J: float | None
    note: str = ""


@dataclasses.dataclass(frozen=True, eq=False)
class Parts(Mapping[str, np.ndarray]):
    """Some block kernels times a weight each, read from their source when they are asked for.

    Attributes:
        source: Block name to its kernel.
        weights: Block name to its weight.
        basis: Q, where the blocks are those of the combinations `Qᵀf` of outputs.
    """

    source: Mapping[str, Any]
    weights: Mapping[str, float]
    basis: np.ndarray | None = None

    def __getitem__(self, name: str) -> np.ndarray:
        """One block."""
        weight, block = self.weights[name], self.source[name]
        if self.basis is not None:
            block = np.einsum("nmcd,ck,dl->nmkl", block, self.basis, self.basis, optimize=True)
        return block if weight == 1 else weight * block

    def __iter__(self) -> Iterator[str]:
        return iter(self.weights)

    def __len__(self) -> int:
        return len(self.weights)


@dataclasses.dataclass(frozen=True, eq=False)
class Kernel:
    """Empirical NTK `K(x1, x2) = J(x1) J(x2)ᵀ`, unnormalised (theory 0), or of another kind, in float64 on the host.

    Attributes:
        parts: Block name to its kernel, in the shape of the kind; the kernel is their sum. They may lie on disk, and
            are not to be written to.
        symmetric: Whether the kernel is symmetric: x2 is x1, and the kind is. It is positive semidefinite then.
        info: How it was computed.
        jacobian: Leaf path to `[N1, C, size]`, where it was kept; leaves that vanish are left out.
        leaves: Block name to the paths of its leaves.
        kind: `"full"` is `[N1, N2, C, C]`; see `jaxlin.ntk.kinds.KINDS` for the others.
        of_two_sets: Whether rows and columns are of different examples.
    """

    parts: Mapping[str, Any]  # not checked any further: it may lie on disk
    symmetric: bool
    info: KernelInfo
    leaves: Mapping[str, tuple[str, ...]]
    jacobian: Mapping[str, Float[np.ndarray, "N1 C _"]] | None = None
    kind: str = "full"
    of_two_sets: bool = False

    @functools.cached_property
    def array(self) -> Float[np.ndarray, "N1 N2 ..."]:
        """The kernel, in neural-tangents' layout `[N1, N2, C, C]` where it is full."""
        parts = iter(self.parts.values())
        total = next(parts)
        if len(self.parts) > 1:
            total = total.copy()
            for part in parts:  # one at a time: they may lie on disk
                total += part
        return total

    def matrix(self) -> Float[np.ndarray, "m1 m2"]:
        """Returns the kernel as a matrix, example-major: row `i*C + c` is output c of example i.

        Returns:
            `[N1*C, N2*C]`; of the diagonal kind with zeros between different outputs. `[N1, N2]` for kinds with one
            number a pair of examples: in a regression such a kernel means K ⊗ I_C (theory 9).
        """
        if self.array.ndim == 2:
            return self.array
        n1, n2, c = self.array.shape[:3]
        full = self.array if self.array.ndim == 4 else self.array[..., None] * np.eye(c)
        return full.transpose(0, 2, 1, 3).reshape(n1 * c, n2 * c)

    def nearest_psd(self) -> Kernel:
        """Returns the positive semidefinite kernel nearest to this one in the Frobenius norm (Higham 1988).

        The explicit choice that a kernel without symmetry, such as `"asymmetric_signgd"`, needs before it has a
        spectrum: its symmetric part, with negative eigenvalues set to 0. One block, since blocks would not sum to it.

        Raises:
            InputError: If the kernel is of two sets of examples.
        """
        if kind_of(self.kind).symmetric:
            return self.require_symmetric("nearest_psd")
        matrix = self.matrix()
        if self.of_two_sets:
            raise InputError("nearest_psd needs the kernel of examples with themselves; this one is of two sets")
        values, vectors = np.linalg.eigh((matrix + matrix.T) / 2)
        nearest = (vectors * np.clip(values, 0, None)) @ vectors.T
        n, c = self.array.shape[0], self.array.shape[2]
        block = ((nearest + nearest.T) / 2).reshape(n, c, n, c).transpose(0, 2, 1, 3)
        leaves = {"all": tuple(path for paths in self.leaves.values() for path in paths)}
        note = f"nearest positive semidefinite kernel to the {self.kind} kernel"
        info = dataclasses.replace(self.info, note="; ".join(filter(None, (self.info.note, note))))
        return Kernel({"all": np.ascontiguousarray(block)}, True, info, leaves)

    def require_symmetric(self, what: str) -> Kernel:
        """Returns the kernel, if it is symmetric and positive semidefinite.

        Args:
            what: What needs it, for the message.

        Raises:
            InputError: If it is not; says what to do.
        """
        if not kind_of(self.kind).symmetric and not self.symmetric:
            raise InputError(
                f'{what} needs a symmetric positive semidefinite kernel; one of kind="{self.kind}" is neither. Choose '
                "kernel.nearest_psd() explicitly, or another kind"
            )
        if not self.symmetric:
            raise InputError(
                f"{what} needs the kernel of examples with themselves; this one is of two sets of examples"
            )
        return self

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
        return self.scaled(block_factors(self.paths, factors, "factors"))

    def scaled(self, by_path: Mapping[str, float]) -> Kernel:
        """Returns `weighted` by the factor of every leaf.

        Args:
            by_path: Path of a leaf to its factor.

        Raises:
            InputError: If the parameters of one block have different factors.
        """
        parts = Parts(self.parts, self.by_block(by_path))
        rows = self.jacobian and {path: by_path[path] ** 0.5 * jac for path, jac in self.jacobian.items()}
        return dataclasses.replace(self, parts=parts, jacobian=rows)

    @property
    def paths(self) -> list[str]:
        """Paths of the leaves of all blocks."""
        return [path for members in self.leaves.values() for path in members]

    def by_block(self, by_path: Mapping[str, float]) -> dict[str, float]:
        """Returns the factor of every block from that of every leaf.

        Args:
            by_path: Path of a leaf to its factor.

        Raises:
            InputError: If the parameters of one block have different factors.
        """
        for block, members in self.leaves.items():
            if len({by_path[path] for path in members}) > 1:
                raise InputError(
                    f"the factors part the parameters of block {block!r}; compute the kernel with smaller blocks, such "
                    'as blocks="leaf"'
                )
        return {block: by_path[members[0]] for block, members in self.leaves.items()}

    def contrasts(self) -> Kernel:
        """Returns the kernel of the C − 1 contrasts `Qᵀf`, `[N1, N2, C-1, C-1]`: without what softmax ignores.

        Q is `contrast_basis(C)`, orthonormal with `Qᵀ1 = 0`: adding a constant to all logits moves no contrast. Up to
        that rotation the nonzero eigenvalues are those of the kernel of `f − mean(f)`.

        Raises:
            InputError: If the kernel is of another kind than `"full"`, or there is one output only.
        """
        if self.kind != "full":
            raise InputError(
                f'contrasts need a kernel of kind="full"; this one is "{self.kind}" (a kernel [N1, N2] stands for '
                "K ⊗ I_C, whose contrasts have K ⊗ I: the same eigenvalues)"
            )
        basis = contrast_basis(next(iter(self.parts.values())).shape[-1])
        parts = Parts(self.parts, dict.fromkeys(self.parts, 1.0), basis)
        rows = self.jacobian and {path: np.einsum("ncp,ck->nkp", jac, basis) for path, jac in self.jacobian.items()}
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
            self, parts=Parts(self.parts, dict.fromkeys(leaves, 1.0)), leaves=leaves, jacobian=jacobian
        )
