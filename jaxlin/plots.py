"""Figures. One colour for one thing everywhere; readable at column width and without colour vision."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from jaxlin.theory.spectrum import Spectrum
    from jaxlin.training.trainer import Row

# Okabe & Ito's palette.
COLOURS = {
    "full": "#0072B2",
    "linearized": "#D55E00",
    "full_A_frozen": "#009E73",
    "kernel_regression": "#CC79A7",
    "start": "#999999",
    "majority_class": "#000000",
    "mean_score": "#000000",
    "linear_probe": "#E69F00",
}
NAMES = {
    "full": "full",
    "linearized": "linearized",
    "full_A_frozen": "full, A frozen",
    "kernel_regression": "kernel regression",
    "start": "start (θ₀)",
    "majority_class": "majority class",
    "mean_score": "mean score",
    "linear_probe": "linear probe",
}
MEASURED = {
    "distance": "‖δ‖",
    "parameter_gap": "‖θ−θ̄‖",
    "output_gap": "‖f(θ)−f̄(θ̄)‖",
    "same_theta_gap": "‖f(θ)−f̄(θ)‖",
    "kernel_drift": "‖K−K₀‖₂",
}
SCALINGS = {"distance": -1, "parameter_gap": -2, "output_gap": -2, "same_theta_gap": -2, "kernel_drift": -1}
"""Log-log slopes in λ → ∞ of these (theory 5)."""

_STYLE: dict[Any, Any] = {
    "font.size": 8,
    "axes.titlesize": 8.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "grid.linewidth": 0.5,
    "legend.frameon": False,
    "legend.fontsize": 7,
    "lines.linewidth": 1.3,
    "lines.markersize": 4,
    "svg.fonttype": "none",
    "figure.constrained_layout.use": True,
}


def _figure(rows: int, columns: int, width: float, height: float) -> tuple[Figure, Any]:
    import matplotlib

    matplotlib.use("Agg", force=False)
    import matplotlib.pyplot as plt

    with plt.rc_context(_STYLE):
        return plt.subplots(rows, columns, figsize=(width, height), squeeze=False)


def save(figure: Figure, path: Path) -> list[Path]:
    """Writes `<path>.png` and `<path>.svg`, and closes the figure."""
    import matplotlib.pyplot as plt

    files = [path.with_suffix(suffix) for suffix in (".png", ".svg")]
    with plt.rc_context(_STYLE):
        for file in files:
            figure.savefig(file, dpi=200)
    plt.close(figure)
    return files


def strength(table: Sequence[Mapping[str, Any]]) -> tuple[str, str]:
    """Returns the column that tells the runs of a sweep apart, and its label: λ/μ₁, or λ where that has no unit."""
    known = any(row["lam_over_mu1"] is not None for row in table)
    return ("lam_over_mu1", "λ/μ₁") if known else ("lam", "λ")


def _lam_axis(axis: Axes, values: Sequence[float], label: str) -> np.ndarray:
    """Makes a log axis with 0 at its left end; returns the positions of `values`."""
    positive = [value for value in values if value > 0]
    zero = min(positive, default=1.0) / 10
    axis.set_xscale("log")
    ticks = ([zero] if len(positive) < len(values) else []) + positive
    axis.set_xticks(ticks, ["0" if tick == zero else f"$10^{{{np.log10(tick):.2g}}}$" for tick in ticks])
    axis.minorticks_off()
    axis.set_xlabel(f"pull {label}")
    return np.array([value if value > 0 else zero for value in values])


def _series(table: Sequence[Row], arm: str, column: str) -> tuple[list[float], list[float]]:
    """Values of one arm by strength of the pull; empty where the column is blank or absent."""
    rows = [row for row in table if row["arm"] == arm and row["lam"] is not None and row.get(column) is not None]
    rows.sort(key=lambda row: row["lam"])
    return [row[strength(table)[0]] for row in rows], [row[column] for row in rows]


def _lines(axis: Axes, table: Sequence[Row], lines: Sequence[tuple[str, str, str, str, str]]) -> None:
    """Draws `(arm, column, label, colour, style)` against λ/μ₁; zeros are left out of a log axis."""
    for arm, column, label, colour, style in lines:
        shares, values = _series(table, arm, column)
        if shares:
            x = _lam_axis(axis, shares, strength(table)[1])
            y = np.array(values, float)
            axis.plot(
                x, np.where(y > 0, y, np.nan) if axis.get_yscale() == "log" else y, style, color=colour, label=label
            )


def late_rows(table: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Returns the gaps between full fine-tuning and its linearization at step k, by λ and k, k = 0 among them."""
    at_start = [{**row, "linearize_at": 0} for row in table if row["arm"] == "full"]
    late = [dict(row) for row in table if row["linearize_at"]]
    return sorted([*at_start, *late], key=lambda row: (row["lam"], row["linearize_at"]))


def late(table: Sequence[Row], title: str) -> Figure:
    """Draws the relative output gap on evaluation examples against the step of linearization, a line a λ.

    Args:
        table: Of a `Comparison` with `linearize_at`.
        title: What was compared, with sample sizes.

    Returns:
        The figure, for `save`.
    """
    import matplotlib.pyplot as plt

    figure, axes = _figure(1, 1, 4.4, 2.9)
    axis, (column, label) = axes[0, 0], strength(table)
    rows = late_rows(table)
    lams = sorted({row["lam"] for row in rows})
    with plt.rc_context(_STYLE):
        shades = plt.get_cmap("viridis")(np.linspace(0, 0.85, len(lams)))
        for lam, colour in zip(lams, shades, strict=True):
            mine = [row for row in rows if row["lam"] == lam]
            axis.plot(
                [row["linearize_at"] for row in mine],
                [row["output_gap_relative_eval"] or np.nan for row in mine],
                "o-",
                color=colour,
                label=f"{mine[0][column]:.2g}",
            )
        axis.set(xlabel="linearized at step k of full fine-tuning", ylabel="‖f−f̄‖ / ‖f−f₀‖, evaluation", yscale="log")
        axis.set_xticks(sorted({row["linearize_at"] for row in rows}))
        axis.legend(title=f"pull {label}", loc="center left", bbox_to_anchor=(1, 0.5))
        figure.suptitle(title, fontsize=7)
    return figure


def comparison(table: Sequence[Row], history: Mapping[tuple[str, float], Sequence[Row]], title: str) -> Figure:
    """Draws a comparison: parameters, outputs, evaluation loss against λ; distance against steps.

    Args:
        table: Of a `Comparison`.
        history: `(arm, λ)` to training rows.
        title: What was compared, with sample sizes.

    Returns:
        The figure, for `save`.
    """
    import matplotlib.pyplot as plt

    figure, axes = _figure(2, 2, 7.0, 5.2)
    full, linear = COLOURS["full"], COLOURS["linearized"]
    with plt.rc_context(_STYLE):
        figure.suptitle(title, fontsize=8.5)
        (parameters, outputs), (losses, training) = axes
        parameters.set_yscale("log")
        gap = "#000000"
        _lines(
            parameters,
            table,
            [
                ("full", "distance", "‖θ−θ₀‖ full", full, "o-"),
                ("linearized", "distance", "‖θ̄−θ₀‖ linearized", linear, "s--"),
                ("full", "parameter_gap", "‖θ−θ̄‖", gap, "^-"),
                ("full", "parameter_gap_A", "  of it in A", gap, "v:"),
            ],
        )
        parameters.set(title="(a) How far the parameters move", ylabel="Euclidean norm")
        parameters.legend()
        outputs.set_yscale("log")
        _lines(
            outputs,
            table,
            [
                ("full", "output_gap_eval", "absolute ‖f−f̄‖", gap, "^-"),
                ("full", "output_gap_relative_eval", "relative to ‖f−f₀‖", full, "o--"),
            ],
        )
        outputs.set(title="(b) Output gap, evaluation examples", ylabel="Frobenius norm | ratio")
        outputs.legend()
        _lines(
            losses,
            table,
            [
                (arm, "loss_eval", NAMES[arm], COLOURS[arm], style)
                for arm, style in (("full", "o-"), ("linearized", "s--"), ("kernel_regression", "D:"))
            ],
        )
        for arm in ("start", "majority_class", "mean_score"):
            for row in table:
                if row["arm"] == arm and row["loss_eval"] is not None:
                    losses.axhline(row["loss_eval"], color=COLOURS[arm], lw=0.9, ls="-.", label=NAMES[arm])
        losses.set(title="(c) Evaluation loss", ylabel="mean loss")
        losses.legend()
        lams = sorted({lam for _, lam in history})
        shades = plt.get_cmap("viridis")(np.linspace(0, 0.85, len(lams)))
        column, name = strength(table)
        shares = {row["lam"]: row[column] for row in table if row["lam"] is not None}
        for lam, shade in zip(lams, shades, strict=True):
            for arm, style in (("full", "-"), ("linearized", "--")):
                rows = history.get((arm, lam), ())
                label = f"{shares[lam]:.3g}" if arm == "full" else None
                steps, values = [row["step"] for row in rows], [row["distance"] for row in rows]
                training.plot(steps, values, style, color=shade, label=label)
        training.set_yscale("log")
        training.set(title="(d) ‖θ−θ₀‖: full (solid), linearized (dashed)", xlabel="step", ylabel="Euclidean norm")
        training.legend(title=name, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def spectrum(spec: Spectrum, title: str) -> Figure:
    """Draws the eigenvalues with the noise they stand on."""
    import matplotlib.pyplot as plt

    figure, axes = _figure(1, 1, 3.5, 2.7)
    axis = axes[0, 0]
    with plt.rc_context(_STYLE):
        index = np.arange(1, len(spec.eigenvalues) + 1)
        positive = spec.eigenvalues > 0
        axis.loglog(index[positive], spec.eigenvalues[positive], ".", ms=2.5, color=COLOURS["full"], label="μᵢ of K₀")
        axis.axhline(spec.resolution, color=COLOURS["linearized"], lw=0.9, ls="--", label="resolved to 10 %")
        axis.axhline(spec.noise_floor, color=COLOURS["start"], lw=0.9, ls="-.", label="noise floor")
        axis.set(title=title, xlabel="index", ylabel="eigenvalue")
        if spec.noise_floor > 0:
            axis.set_ylim(bottom=spec.noise_floor / 10)
        axis.legend()
    return figure


_BOUND_PANELS: tuple[tuple[str, tuple[tuple[str, str, tuple[str, ...]], ...]], ...] = (
    ("(a) How far the parameters move", (("distance", "#000000", ("4(a)", "4(b)", "4(c)")),)),
    ("(b) Full against linearized: parameters", (("parameter_gap", "#000000", ("5(b)",)),)),
    (
        "(c) Full against linearized: outputs",
        (("output_gap", "#000000", ("5(c)",)), ("same_theta_gap", "#999999", ("5(a)",))),
    ),
    ("(d) Change of the kernel", (("kernel_drift", "#000000", ("5(d)",)),)),
)
_DOTS = (0, (1, 2))
_BOUND_STYLES = {
    "4(a)": ("#0072B2", "s--"),
    "4(b)": ("#E69F00", "D-."),
    "4(c)": ("#009E73", "v:"),
    "5(a)": ("#56B4E9", "v--"),
    "5(b)": ("#D55E00", "s--"),
    "5(c)": ("#D55E00", "s--"),
    "5(d)": ("#D55E00", "s--"),
}


def bounds(table: Sequence[Row], title: str) -> Figure:
    """Draws bounds and what they bound at the end of each run against λ, with the slopes of theory 5.

    A hollow marker is a bound that does not apply there; a red cross one that fails.

    Args:
        table: Of a `BoundSweep`.
        title: What was run, with sample sizes.

    Returns:
        The figure, for `save`.
    """
    import matplotlib.pyplot as plt

    figure, axes = _figure(2, 2, 7.0, 5.4)
    with plt.rc_context(_STYLE):
        figure.suptitle(title, fontsize=8)
        for axis, (heading, lines) in zip(axes.flat, _BOUND_PANELS, strict=True):
            axis.set_yscale("log")
            for measured, colour, names in lines:
                for name in names:
                    _bound(axis, [row for row in table if row["bound"].startswith(name)], name)
                rows = [row for row in table if row["bound"].startswith(names[0])]
                _measured(axis, rows, measured, colour)
            axis.plot(
                [], [], color="#000000", lw=0.8, ls=_DOTS, label=f"slope {SCALINGS[lines[0][0]]}".replace("-", "−")
            )
            axis.set(title=heading, ylabel="Euclidean norm" if "kernel" not in heading else "spectral norm")
            axis.legend()
    return figure


def _bound(axis: Axes, rows: Sequence[Row], name: str) -> None:
    """Draws one bound, its markers by whether it applies and holds."""
    colour, style = _BOUND_STYLES[name]
    rows = sorted(rows, key=lambda row: row["lam"])
    x = _lam_axis(axis, [row["lam_over_mu1"] for row in rows], "λ/μ₁")
    y = np.array([row["value"] if 0 < row["value"] < np.inf else np.nan for row in rows])
    label = f"bound {name}" + (", H sampled" if name.startswith("5") else "")
    axis.plot(x, y, style, color=colour, label=label)
    hollow = np.array([not row["applies"] for row in rows])
    axis.plot(x, np.where(hollow, y, np.nan), style[0], color=colour, mfc="white", label="_")
    failing = np.array([row["holds"] is False for row in rows])
    if failing.any():
        axis.plot(x, np.where(failing, y, np.nan), "x", color="#FF0000", ms=9, mew=2, label=f"{name} fails")


def _measured(axis: Axes, rows: Sequence[Row], name: str, colour: str) -> None:
    """Draws what was measured, and the slope that it comes to have as λ grows."""
    rows = sorted(rows, key=lambda row: row["lam"])
    x = _lam_axis(axis, [row["lam_over_mu1"] for row in rows], "λ/μ₁")
    y = np.array([row["measured"] if row["measured"] > 0 else np.nan for row in rows])
    axis.plot(x, y, "o-", color=colour, label=f"measured {MEASURED[name]}")
    large = x[x >= 1]
    if len(large) > 1 and np.isfinite(y[-1]):
        guide = 0.5 * y[-1] * (large / large[-1]) ** SCALINGS[name]
        axis.plot(large, guide, color=colour, lw=0.8, ls=_DOTS, label="_")
