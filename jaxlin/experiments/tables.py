"""A comparison as text: tables for a person to read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table

from jaxlin import plots


def _show(value: Any, form: str = ".3g") -> str:
    return "" if value is None else format(value, form)


def gap_tables(table: Sequence[Mapping[str, Any]], arm: str = "full") -> list[Table]:
    """Lays out how far an arm is from the linearized one, in parameters and in outputs, a row a λ."""
    title = f"{plots.NAMES[arm]} (θ, f) against linearized (θ̄, f̄)"
    linear = {row["lam"]: row for row in table if row["arm"] == "linearized"}
    rows = [row for row in table if row["arm"] == arm]
    parts = [part for part in ("A", "B", "head", "other") if rows[0].get(f"parameter_gap_{part}") is not None]
    parameters = {"λ": "lam", "‖θ−θ₀‖": "distance", "‖θ̄−θ₀‖": "", "‖θ−θ̄‖": "parameter_gap"}
    parameters |= {f"in {part}": f"parameter_gap_{part}" for part in parts}
    outputs: dict[str, str] = {}
    for split in ("train", "eval"):
        outputs |= {f"‖f−f̄‖ {split}": f"output_gap_{split}", f"of ‖f−f₀‖ {split}": f"output_gap_relative_{split}"}
    outputs |= {"KL(f‖f̄) eval": "kl_eval", "agree eval": "agreement_eval"}
    tables = []
    for what, columns in (("parameters", parameters), ("outputs", outputs)):
        out = Table("λ/μ₁", *columns, title=f"{title}: {what}", title_justify="left")
        for column in out.columns:
            column.justify, column.no_wrap = "right", True
        for row in rows:
            cells = [row[key] if key else linear[row["lam"]]["distance"] for key in columns.values()]
            out.add_row(*map(_show, [row["lam_over_mu1"], *cells]))
        tables.append(out)
    return tables


def score_table(table: Sequence[Mapping[str, Any]]) -> Table:
    """Lays out loss and metric of every arm and baseline."""
    out = Table(title="Loss and accuracy", title_justify="left")
    out.add_column("λ/μ₁", justify="right")
    out.add_column("model")
    for name in ("loss train", "loss eval", "acc. train", "acc. eval", "agrees with f₀"):
        out.add_column(name, justify="right", no_wrap=True)
    last = None
    for row in table:
        out.add_section() if row["lam"] != last else None
        last = row["lam"]
        out.add_row(
            _show(row["lam_over_mu1"]),
            plots.NAMES.get(row["arm"], row["arm"]),
            *(_show(row[f"{key}"], ".4f") for key in ("loss_train", "loss_eval")),
            *(_show(row[f"{key}"], ".3f") for key in ("accuracy_train", "accuracy_eval", "agreement_f0_eval")),
        )
    return out


def spectrum_line(summary: Mapping[str, Any]) -> str:
    """Says what the kernel's spectrum is, in one line."""
    sign = "≥" if summary["condition_number_is_lower_bound"] else "="
    epsilon = summary["kernel"]["epsilon_J"]
    return (
        f"NTK at θ₀ ({summary['kernel_examples']} examples × {summary['outputs']} outputs): "
        f"μ_max = {summary['mu_max']:.4g}, μ_min = {summary['mu_min']:.3g}, "
        f"κ {sign} {summary['condition_number']:.3g}, "
        f"κ on the range = {summary['condition_number_on_range']:.3g}, "
        f"rank {summary['rank']} of {summary['kernel_size']}, "
        f"noise floor {summary['noise_floor']:.2g} (ε_J = {epsilon:.1g})"
    )
