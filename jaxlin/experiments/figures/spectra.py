"""The spectrum of every layer's kernel, of query, key and value, and how it moves as layers are added (theory 6, 7).

One pass over the examples gives the block kernel of LoRA on each query, key and value of each layer; all else is sums
of these. The kernels are of the contrasts of the logits, as softmax sees them: with a probe head LoRA's kernel vanishes
along the constant direction. At θ₀ they depend on the head that the gradients come through, so both heads are shown:
the probe, and a new random one.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Iterator

import numpy as np

from jaxlin.errors import InputError
from jaxlin.experiments.figures import spectra_page as page
from jaxlin.experiments.figures.choices import HEAD, MODULES, Choice, depth_of, num_params, tunable
from jaxlin.experiments.figures.spectra_page import ALL, BOTTOM, CELL, LAYER, MODULE, NEW, PROBE, TOP
from jaxlin.experiments.figures.study import FAST, PAPER_KERNEL, PAPER_MODEL, Problem, Row, Setting, Study, Tables, Work
from jaxlin.ntk.engine import ntk
from jaxlin.ntk.kernel import Kernel
from jaxlin.theory.perturbation import chain_bounds, condition, perturbation, perturbation_table
from jaxlin.theory.spectrum import spectrum
from jaxlin.tunable import Tunable

QKV = "".join(MODULES)


@dataclasses.dataclass(frozen=True)
class SpectraSetting(Setting):
    """Spectra of block kernels; there is no training, and no validation examples are read.

    A text that is drawn twice counts once, and another is drawn: two equal rows of J make every kernel singular,
    whatever is tuned.

    Attributes:
        lam_rel: λ in units of each kernel's own μ₁, for κ_λ and the effective dimension.
        kept: At most so many eigenvalues of a spectrum are kept, spread evenly on a log scale of their index.
    """

    num_eval: int | None = 0
    lam_rel: float = 1e-2
    kept: int = 28

    def check(self) -> None:
        """Refuses what cannot be meant.

        Raises:
            InputError: If something is.
        """
        super().check()
        if self.kept < 2 or not self.lam_rel > 0:
            raise InputError(f"--kept {self.kept}, --lam_rel {self.lam_rel}: expected at least 2, and above 0")


def sets_of(depth: int) -> Iterator[tuple[str, Choice]]:
    """Yields the sets of layers and modules that are looked at, with their kinds."""
    layers = tuple(range(depth))
    for layer, letter in itertools.product(layers, QKV):
        yield CELL, Choice((layer,), letter)
    for layer in layers:
        yield LAYER, Choice((layer,), QKV)
    for letter in QKV:
        yield MODULE, Choice(layers, letter)
    for count in range(1, depth + 1):
        yield TOP, Choice(layers[depth - count :], QKV)
        yield BOTTOM, Choice(layers[:count], QKV)
    yield ALL, Choice(layers, QKV)


def kept_indices(size: int, kept: int) -> list[int]:
    """Returns at most `kept` indices from 1 to `size`, the ends among them, evenly spread on a log scale."""
    return sorted({round(float(at)) for at in np.geomspace(1, size, min(kept, size))})


def kernel_of(tun: Tunable, problem: Problem) -> Kernel:
    """Returns the block kernels on the training examples, of contrasts where there are several outputs."""
    kernel = ntk(tun, problem.train)
    return kernel.contrasts() if problem.loaded.task.num_labels > 1 else kernel


def _of_sets(setting: SpectraSetting, tun: Tunable, kernel: Kernel, head: str) -> list[Row]:
    """What the spectrum of every set says."""
    rows = []
    for kind, choice in sets_of(depth_of(tun)):
        spec = spectrum(kernel.subset(choice.blocks))
        lam = setting.lam_rel * float(spec.eigenvalues[0])
        rows.append(
            {
                "head": head,
                "kind": kind,
                "choice": choice.name,
                "num_params": num_params(tun, choice.blocks),
                "condition_number": spec.condition_number,
                "condition_number_is_bound": spec.condition_number_is_bound,
                "regularized_condition_number": spec.regularized_condition_number(lam),
                "effective_dimension": spec.effective_dimension(lam),
                "mu_max": float(spec.eigenvalues[0]),
                "mu_min": float(spec.eigenvalues[-1]),
                "trace": spec.trace,
            }
        )
    return rows


def _eigenvalues(setting: SpectraSetting, tun: Tunable, kernel: Kernel) -> list[Row]:
    """Some eigenvalues of every layer, of every module, of everything, and of the head alone."""
    sets = [(kind, c.name, c.blocks) for kind, c in sets_of(depth_of(tun)) if kind in (LAYER, MODULE, ALL)]
    rows = []
    for kind, name, blocks in [*sets, (HEAD, HEAD, (HEAD,))]:
        spec = spectrum(kernel.subset(blocks))
        for index in kept_indices(len(spec.eigenvalues), setting.kept):
            mu = float(spec.eigenvalues[index - 1])
            known = mu > spec.noise_floor
            rows.append({"kind": kind, "choice": name, "index": index, "eigenvalue": mu if known else None})
    return rows


def _chain(depth: int) -> list[Choice]:
    """Layers are added from the top, where most people would begin."""
    return [Choice(tuple(range(depth - count, depth)), QKV) for count in range(1, depth + 1)]


def _bounds(setting: SpectraSetting, tun: Tunable, kernel: Kernel) -> dict[str, list[Row]]:
    """Eigenvalues between their bounds as layers are added, κ between its own, and whether each bound holds."""
    chain = _chain(depth_of(tun))
    blocks = [choice.blocks for choice in chain]
    lora = kernel.subset(blocks[-1])
    kept = set(kept_indices(len(lora.matrix()), setting.kept))
    names = ["step", "index", "base", "eigenvalue", "lower", "upper", "lower_by", "upper_by"]
    names += ["tightness_lower", "tightness_upper"]
    rows = [row for row in perturbation_table(lora, blocks) if row["index"] in kept]
    kappas = []
    for step, (before, after) in enumerate(itertools.pairwise(chain), start=1):
        p = perturbation(lora, before.blocks, [name for name in after.blocks if name not in before.blocks])
        lower, upper = condition(p)
        ends = {"lower": lower.value if lower.applies else None, "upper": upper.value if upper.applies else None}
        kappa = {"step": step, "choice": after.name, "condition_number": lower.measured, **ends}
        kappas.append({key: float(v) if isinstance(v, np.ndarray) else v for key, v in kappa.items()})
    holds = [
        {"bound": one.name, "steps": len(chain) - 1, "applies": one.applies, "holds": one.holds}
        for one in chain_bounds(lora, blocks)
    ]
    return {
        "bounds": [{"added": chain[row["step"]].layers[0]} | {name: row[name] for name in names} for row in rows],
        "kappa_bounds": kappas,
        "holds": holds,
    }


def _of_problem(setting: SpectraSetting, problem: Problem) -> dict[str, list[Row]]:
    starts = {PROBE: problem.model, NEW: problem.loaded.model}
    tuns = {head: tunable(model, setting.lora_rank, problem.seed) for head, model in starts.items()}
    kernels = {head: kernel_of(tun, problem) for head, tun in tuns.items()}
    tun, kernel = tuns[PROBE], kernels[PROBE]
    return {
        "spectra": _eigenvalues(setting, tun, kernel),
        "sets": [row for head in tuns for row in _of_sets(setting, tuns[head], kernels[head], head)],
        **_bounds(setting, tun, kernel),
    }


def _keeping(problem: Problem, examples: np.ndarray) -> Problem:
    """Returns the problem with some of its training examples."""
    data = {**problem.loaded.data, "train": problem.train.take(examples)}
    identity = {**problem.identity, "data": [part.sha256() for part in data.values()]}
    return dataclasses.replace(problem, loaded=dataclasses.replace(problem.loaded, data=data), identity=identity)


def without_repetitions(problem: Problem) -> Problem:
    """Returns the problem with one training example of each text."""
    columns = problem.train.columns
    texts = np.concatenate([column for name, column in columns.items() if name != "labels"], axis=1)
    _, first = np.unique(texts, axis=0, return_index=True)
    return problem if len(first) == len(texts) else _keeping(problem, np.sort(first))


def distinct_texts(setting: SpectraSetting, work: Work, task: str, seed: int) -> Problem:
    """Returns a problem with as many different training texts as asked for, or all that the task has."""
    drawn, problem = setting.num_train, work.problem(task, seed)
    while True:
        found = without_repetitions(problem)
        missing = setting.num_train - len(found.train)
        if missing < 0:  # where a larger draw happens to have fewer repetitions
            return _keeping(found, np.arange(setting.num_train))
        if not missing or len(problem.train) < drawn:
            return found
        drawn += missing
        problem = work.made(dataclasses.replace(setting, num_train=drawn), task, seed)


def compute(setting: SpectraSetting, work: Work) -> Tables:
    """Computes the kernels of every task and draw, two of each."""
    tables: dict[str, list[Row]] = {}
    problems = [(task, seed) for task in setting.tasks for seed in range(setting.seeds)]
    for done, (task, seed) in enumerate(problems):
        work.progress("kernels", done, len(problems))
        problem = distinct_texts(setting, work, task, seed)
        options = {"study": "spectra", "rank": setting.lora_rank, "lam_rel": setting.lam_rel, "kept": setting.kept}
        found = work.get(problem, options, functools.partial(_of_problem, setting, problem))
        labels = {"task": task, "seed": seed, "train_examples": len(problem.train)}
        for name, rows in found.items():
            tables.setdefault(name, []).extend({**labels, **row} for row in rows)
    return tables


STUDY = Study(
    name="05_spectra_and_layers",
    title="What the eigenvalues of every layer's kernel are, and how they move as layers are added",
    fast=SpectraSetting(**{**FAST, "num_eval": 0}, kept=16),
    full=SpectraSetting(),
    paper=SpectraSetting(**PAPER_MODEL, num_train=PAPER_KERNEL),
    compute=compute,
    draw=page.draw,
    findings=page.findings,
)
