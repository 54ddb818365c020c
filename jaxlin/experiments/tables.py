"""A comparison as text: tables for a person to read, on a terminal of 80 columns too."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from jaxlin import plots
from jaxlin.plots import late_rows


def make_console() -> Console:
    """Returns a console as wide as the terminal; 100 columns where the output goes elsewhere."""
    console = Console()
    return console if console.is_terminal else Console(width=100)


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


def constants_table(constants: Sequence[Mapping[str, Any]]) -> Table:
    """Lays out the constants that the bounds used, a row a λ."""
    columns = {"η": "learning_rate", "D": "D", "ρ": "rho", "G": "G", "H*": "H_sampled", "β*": "beta_sampled"}
    out = _table("Constants of the runs (* the largest of samples: estimates from below)", ["λ/μ₁", *columns], gap=2)
    for row in constants:
        out.add_row(_show(row["lam_over_mu1"]), *(_show(row[key]) for key in columns.values()))
    return out


def bound_table(table: Sequence[Mapping[str, Any]]) -> Table:
    """Lays out how tight every bound is at the end, a row a bound and a column a λ."""
    shares = list(dict.fromkeys(row["lam_over_mu1"] for row in table))
    title = "Measured over bound, at the end (1: the bound is reached; n/a: it does not apply); λ/μ₁ ="
    out = _table(title, ["model", *map(_show, shares)], gap=2)
    out.columns[0].header = "theory"
    words = {True: "", False: "FAILS ", None: "n/a "}
    for name in dict.fromkeys(row["bound"] for row in table):
        rows = {row["lam_over_mu1"]: row for row in table if row["bound"] == name}
        star = " *" if any(row["sampled"] for row in rows.values()) else ""
        cells = [
            words[row["holds"]] + ("" if row["holds"] is None else _show(row["tightness_end"])) for row in rows.values()
        ]
        out.add_row(name + star, *(cell.strip() for cell in cells))
    return out


def bound_lines(table: Sequence[Mapping[str, Any]], slopes: Mapping[str, float | None]) -> list[str]:
    """Says how many bounds hold, which fail and by how much, which conditions are not met, and how the gaps scale."""
    applying = [row for row in table if row["applies"]]
    failing = [row for row in applying if not row["holds"]]
    lines = [f"{len(applying) - len(failing)} of the {len(applying)} bounds that apply hold, of {len(table)} in all"]
    for row in failing:
        why = "; H and β are sampled, so the samples missed the supremum" if row["sampled"] else ""
        lines.append(
            f"FAILS: {row['bound']} at λ/μ₁ = {row['lam_over_mu1']:.3g}: at entry {row['entry']} of {row['entries']} "
            f"the bound is {row['value']:.4g}, measured {row['measured']:.4g}{why}"
        )
    unmet: dict[tuple[str, str], list[str]] = {}
    for row in table:
        if not row["applies"]:
            unmet.setdefault((row["bound"], row["failing"]), []).append(f"{row['lam_over_mu1']:.3g}")
    lines += [f"n/a: {name} at λ/μ₁ = {', '.join(at)}: not {why}" for (name, why), at in unmet.items()]
    lines.append(
        "* uses H or β, the largest of samples along the runs and in random directions: estimates from below, so that "
        "holding is no proof"
    )
    known = [
        f"{plots.MEASURED[name]} {slope:.2f} ({plots.SCALINGS[name]})"
        for name, slope in slopes.items()
        if slope is not None
    ]
    if known:
        lines.append(f"log-log slopes between the two largest λ (theory, λ → ∞): {', '.join(known)}")
    return lines


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
