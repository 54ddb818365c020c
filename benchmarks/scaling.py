"""Bytes and FLOPs of a chip and of its links for large models and many examples, by arithmetic: nothing is measured.

    uv run python benchmarks/scaling.py        # the tables of docs/scaling.md

F is a forward pass of an example, 2 FLOPs a multiply-add. A LoRA step is 2F an example, a linearized one 3F; the
Jacobian takes (1 + C) F, its Gram matrix (NC)² p (one side of the diagonal), p the parameters that are live at theta0
(LoRA's B). Times are at the peak rates in `CHIPS`: a run reaches perhaps half of them.
"""

from __future__ import annotations

import dataclasses
import math


@dataclasses.dataclass(frozen=True)
class Chip:
    """Peak rates of one chip, as its maker states them.

    Attributes:
        name: What it is called.
        bf16: FLOP/s of matrix products in bfloat16.
        float32: FLOP/s of products true to float32 (of a TPU: six passes in bfloat16).
        memory: Bytes of device memory.
        bandwidth: Bytes/s of that memory.
        link: Bytes/s that one chip sends to its next neighbour over one link of its node or pod.
        network: Bytes/s of its share of the network between nodes; of a pod, again its link.
    """

    name: str
    bf16: float
    float32: float
    memory: float
    bandwidth: float
    link: float
    network: float


@dataclasses.dataclass(frozen=True)
class Shape:
    """A transformer with LoRA on query and value.

    Attributes:
        name: What it is called.
        layers: Number of layers.
        width: D.
        intermediate: Width of the MLP.
        dense_maps: Matrices of an MLP (3 where it is gated).
        embeddings: Parameters of embeddings and output.
        tokens: Length of an example.
        rank: Of LoRA.
        outputs: C.
    """

    name: str
    layers: int
    width: int
    intermediate: int
    dense_maps: int
    embeddings: float
    tokens: int
    rank: int = 8
    outputs: int = 2

    @property
    def dense(self) -> float:
        """Parameters of all layers' matrices."""
        return self.layers * (4 * self.width**2 + self.dense_maps * self.width * self.intermediate)

    @property
    def forward(self) -> float:
        """F, in FLOPs an example."""
        return 2 * self.dense * self.tokens + 4 * self.layers * self.tokens**2 * self.width

    @property
    def live(self) -> int:
        """LoRA's B on query and value: what has a derivative at theta0."""
        return 2 * self.layers * self.width * self.rank

    @property
    def weights(self) -> float:
        """Bytes of the frozen weights in bfloat16."""
        return 2 * (self.dense + self.embeddings)

    @property
    def activations(self) -> float:
        """Bytes kept of an example to go back: by layer, 17 arrays [T, D] and 2.5 [T, T] a head, bfloat16."""
        heads = self.width // 64
        return self.layers * (34 * self.tokens * self.width + 5 * heads * self.tokens**2)

    @property
    def rematerialised(self) -> float:
        """Bytes an example keeps where layers are recomputed: each layer's input, and one layer's activations."""
        return 2 * self.layers * self.tokens * self.width + self.activations / self.layers


CHIPS = (
    Chip("H100 SXM", 989e12, 67e12, 80e9, 3.35e12, 450e9, 50e9),
    Chip("TPU v5e", 197e12, 197e12 / 6, 16e9, 0.82e12, 50e9, 50e9),
    Chip("TPU v5p", 459e12, 459e12 / 6, 95e9, 2.77e12, 100e9, 100e9),
)
SHAPES = (
    Shape("RoBERTa-large, T = 128", 24, 1024, 4096, 2, 52e6, 128),
    Shape("7B decoder, T = 512", 32, 4096, 11008, 3, 262e6, 512),
)
EXAMPLES = (10**4, 10**5, 10**6)
CHIPS_USED = 16


def quantity(value: float, unit: str) -> str:
    """Returns a number with a decimal prefix, two digits."""
    for factor, prefix in ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= factor:
            return (
                f"{value / factor:.2g} {prefix}{unit}"
                if value < 99.5 * factor
                else f"{value / factor:.0f} {prefix}{unit}"
            )
    return f"{value:.2g} {unit}"


def duration(seconds: float) -> str:
    """Returns a time in the unit that suits it."""
    for factor, unit in ((86400, "d"), (3600, "h"), (60, "min"), (1, "s"), (1e-3, "ms"), (1e-6, "µs")):
        if seconds >= factor:
            return f"{seconds / factor:.2g} {unit}" if seconds < 99.5 * factor else f"{seconds / factor:.0f} {unit}"
    return f"{seconds:.2g} s"


def markdown(columns: list[str], rows: list[list[str]]) -> list[str]:
    """Returns a table's lines."""
    return [f"| {' | '.join(row)} |" for row in (columns, ["---"] * len(columns), *rows)]


def model_table() -> list[str]:
    """What one example costs."""
    columns = [
        "",
        "frozen weights, bf16",
        "F",
        "LoRA step 2F",
        "linearized 3F",
        "activations",
        "the same, layers recomputed",
        "p live at θ₀",
    ]
    return markdown(
        columns,
        [
            [
                shape.name,
                quantity(shape.weights, "B"),
                quantity(shape.forward, "FLOP"),
                quantity(2 * shape.forward, "FLOP"),
                quantity(3 * shape.forward, "FLOP"),
                quantity(shape.activations, "B"),
                quantity(shape.rematerialised, "B"),
                quantity(shape.live, ""),
            ]
            for shape in SHAPES
        ],
    )


def step_table() -> list[str]:
    """A linearized step of 16 examples a chip: compute, and what crosses links."""
    columns = [
        "",
        "chip",
        "model axis m",
        "weights a chip",
        "examples that fit",
        "compute",
        "gradients, all-reduce",
        "activations, all-reduce (m)",
        "bound by",
    ]
    rows = []
    for shape in SHAPES:
        for chip in CHIPS:
            m = next(m for m in (1, 2, 4, 8) if shape.weights / m < 0.7 * chip.memory)
            fit = int((0.9 * chip.memory - shape.weights / m) / (shape.rematerialised / m))
            batch = min(16 * m, fit)
            compute = 3 * batch * shape.forward / m / chip.bf16
            # 2 (n-1)/n of the bytes leave each chip in a ring all-reduce; A and B are both trained, in float32.
            gradients = 2 * 2 * shape.live * 4 / chip.network
            # Two sums a layer forward, in the tangent pass and in the transposed one, in bfloat16.
            sums = (
                0.0
                if m == 1
                else 6 * shape.layers * batch * shape.tokens * shape.width * 2 * 2 * (m - 1) / m / chip.link
            )
            longest = max((compute, "compute"), (gradients, "gradients"), (sums, "links of the model axis"))[1]
            rows.append(
                [
                    shape.name,
                    chip.name,
                    str(m),
                    quantity(shape.weights / m, "B"),
                    str(fit),
                    f"{duration(compute)} ({batch} examples)",
                    duration(gradients),
                    duration(sums) if sums else "none",
                    longest,
                ]
            )
    return markdown(columns, rows)


def kernel_table() -> list[str]:
    """A kernel of N examples on 16 chips, part by part."""
    columns = [
        "",
        "N",
        "J (float32)",
        "K (float64)",
        "chip",
        "passes",
        "Gram",
        "J round the ring",
        "K v once",
        "chips for the ring",
        "bound by",
    ]
    rows = []
    for shape in SHAPES:
        for n in EXAMPLES:
            m = n * shape.outputs
            jacobian, kernel = m * shape.live * 4.0, 8.0 * m * m
            for chip in CHIPS:
                passes = n * (1 + shape.outputs) * shape.forward / chip.float32 / CHIPS_USED
                gram = m**2 * shape.live / chip.float32 / CHIPS_USED
                ring = jacobian / 2 / chip.network  # half a round: half of J passes through every chip
                product = 2 * jacobian / chip.bandwidth / CHIPS_USED  # J and its transpose are read once each
                parts = {"passes": passes, "Gram": gram, "ring": ring}
                fits = jacobian / CHIPS_USED < 0.8 * chip.memory
                bound = max(parts, key=lambda part: parts[part])
                rows.append(
                    [
                        shape.name,
                        f"10^{len(str(n)) - 1}",
                        quantity(jacobian, "B"),
                        quantity(kernel, "B"),
                        chip.name,
                        duration(passes),
                        duration(gram),
                        duration(ring),
                        duration(product) if fits else "J does not fit",
                        str(math.ceil(3 * jacobian / (0.8 * chip.memory))),  # its own rows, and two visitors
                        bound,
                    ]
                )
    return markdown(columns, rows)


def tables() -> dict[str, list[str]]:
    """Returns every table's lines, by name."""
    return {"an example": model_table(), "a step": step_table(), "a kernel": kernel_table()}


if __name__ == "__main__":
    for name, lines in tables().items():
        print(f"\n{name}\n", *lines, sep="\n")
