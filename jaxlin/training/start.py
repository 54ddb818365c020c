"""What is known at θ₀ before anything is trained: outputs, Jacobians, kernels, the linearized model's limit."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np

from jaxlin.data.dataset import Dataset
from jaxlin.ntk.engine import kernel_from_jacobian
from jaxlin.ntk.jacobian import Jacobian, jacobian, jacobian_bytes, measure_epsilon
from jaxlin.ntk.kernel import Kernel
from jaxlin.ntk.work import PhaseProgress
from jaxlin.theory.regression import KernelRegression, kernel_regression
from jaxlin.training.config import TrainConfig
from jaxlin.training.gaps import by_split, gaps, scores
from jaxlin.training.losses import targets
from jaxlin.training.trainer import Row, predict
from jaxlin.tunable import Blocks, Tunable, block_factors, leaf_paths

_PRECISION = "highest"


def factor_blocks(tun: Tunable, config: TrainConfig) -> dict[str, tuple[str, ...]]:
    """Groups theta by what multiplies its λ and its rate: the blocks that closed forms need apart."""
    paths = leaf_paths(tun.theta0)
    pulls = block_factors(paths, config.lam_blocks, "lam_blocks")
    rates = block_factors(paths, config.learning_rate_blocks, "learning_rate_blocks")
    groups: dict[str, tuple[str, ...]] = {}
    for path in paths:
        name = f"λ×{pulls[path]:g}, η×{rates[path]:g}"
        groups[name] = (*groups.get(name, ()), path)
    return groups


@dataclasses.dataclass(frozen=True, eq=False)
class Start:
    """What is known at θ₀: outputs, Jacobians where they are held, kernels of (some) training examples."""

    data: Mapping[str, Dataset]
    f0: Mapping[str, np.ndarray]
    jacobians: Mapping[str, Jacobian] | None
    kernel: Kernel
    kernel_eval: Kernel | None
    chosen: np.ndarray

    @classmethod
    def compute(
        cls,
        tun: Tunable,
        data: Mapping[str, Dataset],
        hold: bool,
        kernel_examples: int,
        budget: int,
        blocks: Blocks,
        progress: PhaseProgress | None,
    ) -> Start:
        """Computes it in one pass over the examples.

        Args:
            tun: The model.
            data: Splits `train` and `eval`.
            hold: Whether the Jacobians of all examples are kept.
            kernel_examples: At most so many training examples make the kernel.
            budget: Bytes for Jacobians.
            blocks: Blocks whose kernels are kept apart.
            progress: Called with a phase's name, units done and in all.

        Returns:
            What is known.
        """
        n = len(data["train"])
        fitting = max(1, budget // 2 // (jacobian_bytes(tun, data["train"]) // n))
        chosen = np.sort(np.random.default_rng(0).permutation(n)[: min(kernel_examples, fitting)])
        # The kernel's rows: all of the training examples, or a subset; the Jacobian of all only where it is held.
        wanted = dict(data) if hold else {"train": data["train"].take(chosen)}
        if len(data["eval"]) <= fitting:
            wanted["eval"] = data["eval"]
        total, done, found = sum(map(len, wanted.values())), 0, {}
        for split, part in wanted.items():
            report = None if progress is None else (lambda now, _, base=done: progress("Jacobians", base + now, total))
            found[split] = jacobian(tun, part, precision=_PRECISION, memory_budget=budget, progress=report)
            done += len(part)
        epsilon = measure_epsilon(tun, wanted["train"], None, found["train"], 2, _PRECISION, budget)
        jac = found["train"]
        if hold and len(chosen) < n:
            rows = {path: rows[chosen] for path, rows in jac.rows.items()}
            jac = dataclasses.replace(jac, outputs=jac.outputs[chosen], rows=rows)
        # A Gram in float64 resolves all that a float32 Jacobian holds (theory 6), for a fraction of an SVD's time.
        keep = jac.outputs.dtype == np.float64
        kernel = kernel_from_jacobian(jac, jac, blocks, _PRECISION, epsilon, keep)
        kernel_eval = None
        if "eval" in found:
            kernel_eval = kernel_from_jacobian(found["eval"], jac, blocks, _PRECISION, epsilon, keep=False)
        f0 = {split: predict(tun, tun.theta0, part) for split, part in data.items()}
        return cls(data, f0, found if hold else None, kernel, kernel_eval, chosen)

    def scores(self, outputs: Mapping[str, np.ndarray], loss: str) -> Row:
        """Returns loss, metrics and agreement with the start, by split."""
        return by_split({k: scores(v, self.f0[k], self.data[k]["labels"], loss) for k, v in outputs.items()})

    def gaps(self, outputs: Mapping[str, np.ndarray], linear: Mapping[str, np.ndarray]) -> Row:
        """Returns how far outputs are from the linearized model's, by split."""
        return by_split({k: gaps(v, linear[k], self.f0[k], self.data[k]["labels"]) for k, v in outputs.items()})

    def limit(self, config: TrainConfig, pulled: bool) -> Limit | None:
        """Returns the closed form of what the linearized arm converges to; `None` where it has none.

        With a pull it is the minimiser of the loss with `λ w_ℓ` on each block: K_η with η = 1/w (theory 7). Without
        one it is the point that gradient descent from θ₀ reaches: K_η with the rates, if the optimizer is descent.

        Args:
            config: Its pull and factors by block.
            pulled: Whether λ > 0.
        """
        descent = config.optimizer in ("sgd", "momentum")
        if config.pull in ("selective", "spd") or (config.pull in ("decoupled", "prox") and pulled and not descent):
            return None  # they minimise no such objective
        paths = self.kernel.paths
        pulls = block_factors(paths, config.lam_blocks, "lam_blocks")
        rates = block_factors(paths, config.learning_rate_blocks, "learning_rate_blocks")
        if pulled and any(rates[path] and not pulls[path] for path in paths):
            return None  # a block without a pull: ridge regression with an unpenalised part
        # A rate of 0 freezes a block; other rates matter to where descent ends only where nothing pulls.
        weights = {
            path: 1 / pulls[path] if pulled else rates[path] if descent else 1.0 for path in paths if rates[path]
        }
        factors = {path: weights.get(path, 0.0) for path in paths}
        y = np.asarray(targets(self.data["train"]["labels"], self.f0["train"].shape[1]), np.float64)
        fit = kernel_regression(self.kernel.scaled(factors), y[self.chosen], self.f0["train"][self.chosen], 0.0)
        kernel_eval = None if self.kernel_eval is None else self.kernel_eval.scaled(factors)
        return Limit(fit, kernel_eval, self.f0, len(self.chosen))


@dataclasses.dataclass(frozen=True, eq=False)
class Limit:
    """Limit of the linearized arm under squared loss, trained on the kernel's examples, at any λ."""

    fit: KernelRegression
    kernel_eval: Kernel | None
    f0: Mapping[str, np.ndarray]
    examples: int

    def outputs(self, lam: float) -> dict[str, np.ndarray]:
        """Returns its outputs by split: training examples where all make the kernel, evaluation where it is known."""
        n = len(self.f0["train"])
        # λ is for n examples; with fewer of them the data term shrinks, and λ with it.
        fit = dataclasses.replace(self.fit, ridge=lam * self.examples / n)
        out = {"train": fit.train()} if self.examples == n else {}
        if self.kernel_eval is not None:
            out["eval"] = fit.test(self.kernel_eval, self.f0["eval"])
        return out
