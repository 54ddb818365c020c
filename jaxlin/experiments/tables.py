"""A comparison as text: tables for a person to read, on a terminal of 80 columns too."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.table import Table

from jaxlin import plots
from jaxlin.plots import late_rows


def _show(value: Any, form: str = ".3g") -> str:
    return "" if value is None else format(value, form)


def _table(title: str, columns: Sequence[str], gap: int = 1) -> Table:
    out = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, gap, 0, 0))
    for name in columns:
        out.add_column(name, justify="left" if name == "model" else "right", no_wrap=True, vertical="bottom")
    return out


def gap_tables(table: Sequence[Mapping[str, Any]], arm: str = "full") -> list[Table]:
    """Lays out how far an arm is from the linearized one, in parameters and in outputs, a row a λ."""
    title = f"{plots.NAMES[arm]} (θ, f) against linearized (θ̄, f̄)"
    linear = {row["lam"]: row for row in table if row["arm"] == "linearized"}
    rows = [row for row in table if row["arm"] == arm]
    strength, label = plots.strength(table)
    parts = [part for part in ("A", "B", "head", "other") if rows[0].get(f"parameter_gap_{part}") is not None]
    parameters = {"λ": "lam", "‖θ−θ₀‖": "distance", "‖θ̄−θ₀‖": "", "‖θ−θ̄‖": "parameter_gap"}
    parameters |= {f"‖θ−θ̄‖\nin {part}": f"parameter_gap_{part}" for part in parts}
    outputs: dict[str, str] = {}
    for split in ("train", "eval"):
        outputs |= {f"‖f−f̄‖\n{split}": f"output_gap_{split}", f"÷‖f−f₀‖\n{split}": f"output_gap_relative_{split}"}
    outputs |= {"KL(f‖f̄)\neval": "kl_eval", "agree\neval": "agreement_eval"}
    outputs = {heading: key for heading, key in outputs.items() if any(row[key] is not None for row in rows)}
    tables = []
    for what, columns in (("parameters", parameters), ("outputs", outputs)):
        out = _table(f"{title}: {what}", [label, *columns])
        for row in rows:
            cells = [row[key] if key else linear[row["lam"]]["distance"] for key in columns.values()]
            out.add_row(*map(_show, [row[strength], *cells]))
        tables.append(out)
    return tables


def late_table(table: Sequence[Mapping[str, Any]]) -> Table:
    """Lays out how far full fine-tuning ends from its linearization at step k, a row a λ and k."""
    strength, label = plots.strength(table)
    columns = {"‖θ−θ̄‖": "parameter_gap"}
    for split in ("train", "eval"):
        columns |= {f"‖f−f̄‖\n{split}": f"output_gap_{split}", f"÷‖f−f₀‖\n{split}": f"output_gap_relative_{split}"}
    columns |= {"KL(f‖f̄)\neval": "kl_eval", "agree\neval": "agreement_eval"}
    rows = late_rows(table)
    columns = {heading: key for heading, key in columns.items() if any(row[key] is not None for row in rows)}
    out = _table("full (θ, f) against linearized at step k of it (θ̄, f̄), at the end", [label, "k", *columns])
    last = None
    for row in rows:
        if row["lam"] != last:
            out.add_section()
        last = row["lam"]
        out.add_row(_show(row[strength]), str(row["linearize_at"]), *(_show(row[key]) for key in columns.values()))
    return out


_FORMS = {"eigenspace_angle": ".2f", "alignment_kernel0": ".3f"}


def linearization_table(table: Sequence[Mapping[str, Any]], summary: Mapping[str, Any]) -> Table:
    """Lays out gaps and kernel drift along the runs, a row a λ and step.

    Args:
        table: Of `linearization_report`, with the columns `lam` and `lam_over_mu1`.
        summary: Likewise.

    Returns:
        The table.
    """
    strength, label = plots.strength(table)
    columns = {
        "‖θ−θ₀‖": "distance",
        "‖θ−θ̄‖": "parameter_gap",
        "same-θ\ngap": "same_theta_gap_relative",
        "path\ngap": "trajectory_gap_relative",
        "K\ndrift": "kernel_drift",
        "turn\nin °": "eigenspace_angle",
        "cos\nK,K₀": "alignment_kernel0",
        "cos\nK,yyᵀ": "alignment_targets",
    }
    title = (
        "Along full fine-tuning (θ, f) against linearized (θ̄, f̄), training examples:\n"
        "gaps over ‖f(θ)−f₀‖ at the same θ and between the paths; ‖K−K₀‖/‖K₀‖;\n"
        f"largest angle of the top-{summary['top']} eigenspaces (K of {summary['kernel_examples']} examples)"
    )
    out = _table(title, [label, "step", *columns])
    last = None
    for row in table:
        if row["lam"] != last:
            out.add_section()
        last = row["lam"]
        cells = [_show(row[key], _FORMS.get(key, ".3g")) for key in columns.values()]
        out.add_row(_show(row[strength]), str(row["step"]), *cells)
    return out


def score_table(table: Sequence[Mapping[str, Any]], metrics: Sequence[str]) -> Table:
    """Lays out loss and metrics of every arm and baseline.

    Args:
        table: Of a `Comparison`.
        metrics: Those that the task is judged by, names of `jaxlin.training.metrics.METRICS`.

    Returns:
        The table, without columns that are blank throughout.
    """
    strength, label = plots.strength(table)
    columns = {
        f"{name}\n{split}": (f"{name}_{split}", "z.4f" if name == "loss" else "z.3f")
        for name in ("loss", *metrics)
        for split in ("train", "eval")
    }
    columns["agrees\nwith f₀\neval"] = ("agreement_f0_eval", "z.3f")
    columns = {head: cell for head, cell in columns.items() if any(row[cell[0]] is not None for row in table)}
    out = _table(f"Loss and {', '.join(metrics)}", [label, "model", *columns], gap=int(len(metrics) < 2))
    last = None
    for row in table:
        if row["lam"] != last:
            out.add_section()
        last = row["lam"]
        cells = [_show(row[key], form) for key, form in columns.values()]
        out.add_row(_show(row[strength]), plots.NAMES.get(row["arm"], row["arm"].replace("_", " ")), *cells)
    return out


def spectrum_line(summary: Mapping[str, Any]) -> str:
    """Says what the kernel's spectrum is, in one line; `summary` is that of a run."""
    sign = "≥" if summary["condition_number_is_lower_bound"] else "="
    epsilon = summary["kernel"]["epsilon_J"]
    return (
        f"μ_max = {summary['mu_max']:.4g}, μ_min = {summary['mu_min']:.3g}, "
        f"κ {sign} {summary['condition_number']:.3g}, "
        f"κ on the range = {summary['condition_number_on_range']:.3g}, "
        f"rank {summary['rank']} of {summary['kernel_size']}, "
        f"noise floor {summary['noise_floor']:.2g} (ε_J {'not measured' if epsilon is None else f'= {epsilon:.1g}'})"
    )
