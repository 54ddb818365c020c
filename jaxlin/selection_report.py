"""What choosing layers gives: the choice, what it is expected to do, and what else there was."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from jaxlin.peft.config import peft_lora_config
from jaxlin.theory.selection import Candidate, Estimate, Search
from jaxlin.theory.spectrum import Spectrum

Row = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Trust:
    """How far the linearized model is expected to move, and how good it is there.

    Attributes:
        distance: ‖δ‖ of the ridge solution, `√(αᵀKα)`; the mean over draws.
        movement: ‖f̄ − f₀‖ there, over all examples and outputs; the mean over draws.
        measured_gap: ‖f − f̄‖ at that very θ, relative to ‖f̄ − f₀‖; the largest over draws.
        lipschitz: H, as given or sampled (then an estimate from below, theory 8); `None` where neither.
        lipschitz_is_sampled: Whether it was sampled.
        gap_bound: The gap's bound by `(H/2)‖δ‖²` (theory 5(a)), the largest over draws; an estimate where H is one.
    """

    distance: float
    movement: float
    measured_gap: float
    lipschitz: float | None
    lipschitz_is_sampled: bool
    gap_bound: float | None

    @property
    def verdict(self) -> str:
        """In words."""
        if not math.isfinite(self.measured_gap):
            return "cannot be told: the ridge solution does not move, or the model is not finite there"
        share = f"{self.measured_gap:.2g} of the movement at the ridge solution is not linear"
        if self.measured_gap <= 0.1:
            return f"yes: {share}"
        return f"roughly: {share}" if self.measured_gap <= 0.5 else f"no: {share}"


@dataclasses.dataclass(frozen=True, eq=False)
class LayerSelection:
    """What `select_layers` gives. λ is for the summed loss (theory 0).

    Attributes:
        choice: Layers and modules.
        blocks: Its blocks, for `Kernel.subset`; those that every candidate holds among them.
        num_params: Parameters that it tunes.
        budget: Most that it might tune.
        table: Tidy, a row a candidate that was computed, the best first: `rank`, `layers`, `modules`, `num_params`,
            every criterion (its mean over draws; λ-dependent ones at `criteria_lam` or `criteria_lam_rel`),
            `condition_number_is_bound`, and `score_min`, `score_max` of the criterion over draws.
        by_criterion: What each criterion would choose of the same candidates; `is_bound`: its value is κ as "≥".
        references: The choice, the runner-up, everything, and what every candidate tunes (the head), each set of
            blocks once: leave-one-out `loss` and `accuracy`, each at its own best λ, and `loss_minus_choice` with the
            interval `low`, `high` of a bootstrap over examples and draws, the same ones for both.
        always_share: Share of the trace of the chosen kernel that every candidate holds (the head's); the mean over
            draws. Near 1 the layers hardly matter to the kernel.
        search: How the ranking was found.
        criteria_lam: λ that criteria are at, where one was given.
        criteria_lam_rel: Else λ in units of each candidate's own μ₁.
        contrasts: Whether all is of the contrasts of the outputs.
        loss: Predicted ½‖f − y‖² an example, leave-one-out at the suggested λ; its interval, as those below, is of
            both examples and draws.
        accuracy: Predicted accuracy, likewise; `None` for scores.
        eval_loss: On the held-out examples, where there are any.
        eval_accuracy: Likewise.
        lam: Suggested λ.
        lam_rel: In units of μ₁, the mean over draws.
        lam_by: What it was suggested by.
        lam_at_edge: Whether it is an end of the grid: a better one may lie beyond.
        lam_curve: Leave-one-out error and log marginal likelihood against λ.
        learning_rate: Largest stable η of descent on the summed squared loss of all C outputs, `2/(μ₁ + λ)`, μ₁ of
            their kernel, that of contrasts or not, and the largest over draws.
        learning_rate_mean: The same for the trainer's mean loss, which changes little with the number of examples.
        trust: Whether the linearization can be trusted.
        spectra: Of the first draw: `"chosen"`, `"everything"`, `"runner-up"` where there is one.
        rank: LoRA's rank; `None` where it is not one number, or what is tuned is no LoRA.
        alpha: LoRA's α, likewise.
        head: Whether the classification head is tuned.
        examples: How many the kernel is of.
        draws: How many draws there were.
    """

    choice: Candidate
    blocks: tuple[str, ...]
    num_params: int
    budget: int | None
    table: list[Row]
    by_criterion: list[Row]
    references: list[Row]
    always_share: float
    search: Search
    criteria_lam: float | None
    criteria_lam_rel: float
    contrasts: bool
    loss: Estimate
    accuracy: Estimate | None
    eval_loss: Estimate | None
    eval_accuracy: Estimate | None
    lam: float
    lam_rel: float
    lam_by: str
    lam_at_edge: bool
    lam_curve: list[dict[str, float]]
    learning_rate: float
    learning_rate_mean: float
    trust: Trust
    spectra: Mapping[str, Spectrum]
    rank: int | None
    alpha: float | None
    head: bool
    examples: int
    draws: int

    def peft_config(self, model_type: str | None) -> dict[str, Any] | None:
        """Returns the choice for the `peft` library, where Hugging Face's names are known; see `peft_lora_config`.

        Args:
            model_type: Of the checkpoint's `config.json`, such as `"bert"`.
        """
        if self.rank is None or self.alpha is None:
            return None
        return peft_lora_config(
            self.choice.layers, self.choice.modules, self.rank, self.alpha, model_type, head=self.head
        )

    def summary(self) -> dict[str, Any]:
        """Returns its numbers without the tables, for a record."""
        return {
            "layers": list(self.choice.layers),
            "modules": list(self.choice.modules),
            "num_params": self.num_params,
            "budget": self.budget,
            "criterion": self.search.criterion,
            "method": self.search.method,
            "candidates": len(self.search.ranked),
            "optimum_bound": self.search.bound,
            "optimality_gap": self.search.gap,
            "optimality": self.search.optimality,
            "criteria_lam": self.criteria_lam,
            "criteria_lam_over_mu1": self.criteria_lam_rel if self.criteria_lam is None else None,
            "contrasts": self.contrasts,
            "always_share_of_trace": self.always_share,
            **{
                name: None if (found := getattr(self, name)) is None else dataclasses.asdict(found)
                for name in ("accuracy", "loss", "eval_accuracy", "eval_loss")
            },
            "lam": self.lam,
            "lam_over_mu1": self.lam_rel,
            "lam_by": self.lam_by,
            "lam_at_edge": self.lam_at_edge,
            "learning_rate_summed_loss": self.learning_rate,
            "learning_rate_mean_loss": self.learning_rate_mean,
            "linearization": {**dataclasses.asdict(self.trust), "verdict": self.trust.verdict},
            "lora_rank": self.rank,
            "lora_alpha": self.alpha,
            "examples": self.examples,
            "draws": self.draws,
        }

    def to_dict(self) -> dict[str, Any]:
        """Returns its summary and tables, of plain values."""
        return {
            "summary": self.summary(),
            "table": self.table,
            "by_criterion": self.by_criterion,
            "references": self.references,
            "lam_curve": self.lam_curve,
            "spectra": {name: spec.eigenvalues.tolist() for name, spec in self.spectra.items()},
        }
