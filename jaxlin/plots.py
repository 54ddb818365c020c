"""Figures. One colour for one thing everywhere; readable at column width and without colour vision."""

from __future__ import annotations

import itertools
import textwrap
import zlib
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from jaxlin.theory.spectrum import Spectrum
    from jaxlin.training.trainer import Row

# Okabe & Ito's palette for what is trained and what predicts, whose blue and vermilion stand for nothing else; Tol's
# for what is compared besides, where a colour may stand for several things, though never in one figure.
COLOURS = {
    "full": "#0072B2",
    "linearized": "#D55E00",
    "full_A_frozen": "#009E73",
    "full_pulled": "#0072B2",
    "kernel_regression": "#CC79A7",
    "kernel_alone": "#56B4E9",
    "kernel_logistic": "#882255",
    "closed_form": "#000000",
    "start": "#999999",
    "majority_class": "#000000",
    "mean_score": "#000000",
    "linear_probe": "#E69F00",
    "query": "#332288",
    "key": "#999933",
    "value": "#44AA99",
    "from_top": "#AA4499",
    "from_bottom": "#882255",
    "probe_head": "#E69F00",
    "random_head": "#44AA99",
    "prompt_head": "#332288",
    "coupled": "#0072B2",
    "selective": "#999933",
    "decoupled": "#44AA99",
    "bound": "#88CCEE",
    "plain": "#332288",
    "partial": "#999933",
    "condition_number": "#AA4499",
    "chosen": "#EE3377",
    "runner_up": "#999933",
    "everything": "#000000",
    "last_layers": "#332288",
    "random_choice": "#999933",
    "random_direction": "#999933",
}
TASK_LOOKS = {
    "cola": ("#882255", "o-"),
    "sst2": ("#77AADD", "s--"),
    "mrpc": ("#CC6677", "^-."),
    "qqp": ("#BFA845", "D:"),
    "rte": ("#117733", "v-"),
    "uci_yelp": ("#AA4499", "P--"),
    "yelp": ("#AA4499", "<-."),
    "imdb": ("#661100", "X-."),
    "uci_imdb": ("#661100", ">:"),
    "uci_amazon": ("#332288", "p-"),
    "qnli": ("#999933", "h--"),
    "mnli": ("#44AA99", "d-."),
    "mnli_mismatched": ("#44AA99", "8:"),
    "stsb": ("#555555", "*-"),
    "wnli": ("#BBBBBB", "o--"),
    "ag_news": ("#EE8866", "s-."),
    "stdlib": ("#000000", "^:"),
}
"""Colour and style of each task."""
LAYER_MAP, COUNT_MAP = "plasma", "cividis"
"""Colour maps of a layer's number and of counts and shares; that of λ is viridis."""
NAMES = {
    "full": "full",
    "linearized": "linearized",
    "full_A_frozen": "full, A frozen",
    "kernel_regression": "kernel regression",
    "closed_form": "linearized, closed form",
    "start": "start (θ₀)",
    "majority_class": "majority class",
    "mean_score": "mean score",
    "linear_probe": "linear probe",
    "random_direction": "random directions",
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

CRITERIA = {
    "condition_number": "condition number κ",
    "regularized_condition_number": "κ with λ",
    "mu_max": "μ_max",
    "mu_min": "μ_min",
    "trace": "trace",
    "effective_dimension": "effective dimension",
    "alignment": "alignment with r₀",
    "residual_share": "share of r₀ in the top tenth",
    "leave_one_out_error": "leave-one-out loss",
    "log_marginal_likelihood": "log marginal likelihood",
    "validation_error": "held-out loss",
}
"""Criteria that layers are chosen by, in words."""
COLUMN = 5.5
"""Inches: the width of the text of a page of one column, as NeurIPS and ICLR have it."""
_STYLE: dict[Any, Any] = {
    "font.size": 7,
    "axes.titlesize": 7.5,
    "figure.titlesize": 7,
    "xtick.labelsize": 6.5,
    "ytick.labelsize": 6.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "grid.linewidth": 0.5,
    "legend.frameon": False,
    "legend.fontsize": 6.5,
    "lines.linewidth": 1.2,
    "lines.markersize": 3.5,
    "svg.fonttype": "none",
    "svg.hashsalt": "jaxlin",  # the same ids whenever it is drawn
    "figure.constrained_layout.use": True,
}


def canvas(rows: int, columns: int, width: float, height: float, **options: Any) -> tuple[Figure, Any]:
    """Returns a figure of `width` × `height` inches and its axes `[rows, columns]`; options are of `subplots`."""
    import matplotlib

    matplotlib.use("Agg", force=False)
    import matplotlib.pyplot as plt

    with drawing():
        return plt.subplots(rows, columns, figsize=(width, height), squeeze=False, **options)


def width_of(columns: int) -> float:
    """Returns the width in inches of a figure of several small panels side by side, with a legend or colour bar."""
    return min(max(1.3 * columns + 0.6, 3.5), COLUMN)


def headline(figure: Figure, text: str) -> None:
    """Writes what a figure is of above it, in lines that fit its width."""
    most = int(19 * figure.get_figwidth())  # characters of 7 points
    with drawing():
        figure.suptitle("\n".join(_balanced(line, most) for line in text.splitlines()))


def _balanced(text: str, most: int) -> str:
    """Returns text in as few lines of at most so many characters as hold it, of about one length."""
    count = len(textwrap.wrap(text, most))
    return textwrap.fill(text, next(width for width in range(1, most + 1) if len(textwrap.wrap(text, width)) <= count))


def drawing() -> AbstractContextManager[None]:
    """Returns the context that every figure is drawn in."""
    import matplotlib.pyplot as plt

    return plt.rc_context(_STYLE)


NO_METADATA = dict.fromkeys(("Creator", "Date", "Format", "Type"))
"""Of an SVG, so that the same figure is the same bytes, whenever and by whichever version it is drawn."""


def save(figure: Figure, path: Path, suffixes: Sequence[str] = (".png", ".svg")) -> list[Path]:
    """Writes `<path>.png` and `<path>.svg`, the same bytes for the same figure, and closes it."""
    import matplotlib.pyplot as plt

    files = [path.with_suffix(suffix) for suffix in suffixes]
    with drawing():
        figure.draw_without_rendering()
        figure.set_layout_engine("none")  # it is laid out: each time takes as long as drawing it
        for file in files:
            figure.savefig(file, dpi=200, metadata=NO_METADATA if file.suffix == ".svg" else None)
    plt.close(figure)
    return files


def element(file: Path) -> str:
    """Returns the `<svg>` element of a figure that was saved, for a page; its text is text."""
    text = file.read_text(encoding="utf-8")
    return text[text.index("<svg") :]


def task_look(task: str) -> tuple[str, str]:
    """Returns a task's colour and style: those of `TASK_LOOKS`, of a task not among them one of these by its name."""
    return TASK_LOOKS.get(task) or tuple(TASK_LOOKS.values())[zlib.crc32(task.encode()) % len(TASK_LOOKS)]


def lam_look(share: float) -> tuple[tuple[float, ...], str]:
    """Returns colour and marker of a λ/μ₁, the same in every figure: dark is 0, and from 1e-4 to 10 it gets lighter."""
    import matplotlib.pyplot as plt

    shades = plt.get_cmap("viridis")
    if not share:
        return shades(0.0), "o"
    decade = float(np.clip(np.log10(share), -4, 1)) + 4
    return shades(0.28 + 0.13 * decade), "s^DvPX"[round(decade)]


def _lam_looks(table: Sequence[Mapping[str, Any]]) -> dict[float, tuple[Any, str]]:
    """Returns the look of each λ of a table: by λ/μ₁, or colours spread evenly where that is not known."""
    import matplotlib.pyplot as plt

    column, _ = strength(table)
    found = {row["lam"]: row[column] for row in table if row["lam"] is not None}
    if column == "lam":
        shades = plt.get_cmap("viridis")(np.linspace(0, 0.9, len(found)))
        return dict(zip(sorted(found), zip(shades, itertools.cycle("os^Dv"), strict=False), strict=True))
    return {lam: lam_look(share) for lam, share in sorted(found.items())}


def strength(table: Sequence[Mapping[str, Any]]) -> tuple[str, str]:
    """Returns the column that tells the runs of a sweep apart, and its label: λ/μ₁, or λ where that has no unit."""
    known = any(row["lam_over_mu1"] is not None for row in table)
    return ("lam_over_mu1", "λ/μ₁") if known else ("lam", "λ")


def lam_axis(axis: Axes, values: Sequence[float], label: str) -> np.ndarray:
    """Makes a log axis with 0 at its left end, ticks at a few of `values`; returns the positions of all."""
    positive = sorted({value for value in values if value > 0})
    zero = min(positive, default=1.0) / 10
    decades = [value for value in positive if abs(np.log10(value) - round(np.log10(value))) < 1e-6] or positive
    axis.set_xscale("log")
    ticks = ([zero] if 0 in values else []) + (decades[(len(decades) - 1) % 2 :: 2] if len(decades) > 4 else decades)
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
            x = lam_axis(axis, shares, strength(table)[1])
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
    figure, axes = canvas(1, 1, 4.0, 2.6)
    axis, (column, label) = axes[0, 0], strength(table)
    rows = late_rows(table)
    with drawing():
        for lam, (colour, marker) in _lam_looks(rows).items():
            mine = [row for row in rows if row["lam"] == lam]
            axis.plot(
                [row["linearize_at"] for row in mine],
                [row["output_gap_relative_eval"] or np.nan for row in mine],
                f"{marker}-",
                color=colour,
                label=f"{mine[0][column]:.2g}",
            )
        axis.set(xlabel="linearized at step k of full fine-tuning", ylabel="‖f−f̄‖ / ‖f−f₀‖, evaluation", yscale="log")
        axis.set_xticks(sorted({row["linearize_at"] for row in rows}))
        axis.legend(title=f"pull {label}", loc="center left", bbox_to_anchor=(1, 0.5))
        headline(figure, title)
    return figure


def linearization(table: Sequence[Row], top: int, title: str) -> Figure:
    """Draws kernel drift, both output gaps and the turn of the top eigenspace against steps, a line a λ.

    Args:
        table: Of `linearization_report`, with the columns `lam` and `lam_over_mu1`.
        top: k of the eigenspace.
        title: What was fine-tuned, with sample sizes.

    Returns:
        The figure, for `save`.
    """
    panels = {
        "kernel_drift": ("(a) Kernel drift", "‖K−K₀‖ / ‖K₀‖"),
        "same_theta_gap_relative": ("(b) Same-θ gap, training examples", "‖f(θ)−f̄(θ)‖ / ‖f(θ)−f₀‖"),
        "trajectory_gap_relative": ("(c) Trajectory gap, training examples", "‖f(θ)−f̄(θ̄)‖ / ‖f(θ)−f₀‖"),
        "eigenspace_angle": (f"(d) Turn of the top-{top} eigenspace", "largest principal angle in °"),
    }
    figure, axes = canvas(2, 2, COLUMN, 3.9)
    column, name = strength(table)
    looks = _lam_looks(table)
    with drawing():
        headline(figure, title)
        for axis, (key, (heading, unit)) in zip(axes.flat, panels.items(), strict=True):
            for lam, (shade, marker) in looks.items():
                rows = [row for row in table if row["lam"] == lam]
                values = [np.nan if row[key] is None else row[key] for row in rows]
                axis.plot(
                    [row["step"] for row in rows], values, f"{marker}-", color=shade, label=f"{rows[0][column]:.3g}"
                )
            axis.set(title=heading, ylabel=unit, xlabel="step", ylim=(0, None))
        handles, labels = axis.get_legend_handles_labels()
        figure.legend(handles, labels, title=f"pull {name}", loc="outside right center")
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
    figure, axes = canvas(2, 2, COLUMN, 4.3)
    full, linear = COLOURS["full"], COLOURS["linearized"]
    with drawing():
        headline(figure, title)
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
        parameters.legend(loc="lower left")  # lines fall with the pull
        outputs.set_yscale("log")
        _lines(
            outputs,
            table,
            [
                ("full", "output_gap_eval", "absolute ‖f−f̄‖", gap, "^-"),
                ("full", "output_gap_relative_eval", "relative to ‖f−f₀‖", gap, "o--"),
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
        column, name = strength(table)
        shares = {row["lam"]: row[column] for row in table if row["lam"] is not None}
        looks = _lam_looks(table)
        for lam in sorted({lam for _, lam in history}):
            shade, _ = looks[lam]
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
    """Draws the eigenvalues, and what of their noise is not far below them."""
    figure, axes = canvas(1, 1, 4.0, 2.6)
    axis = axes[0, 0]
    with drawing():
        index = np.arange(1, len(spec.eigenvalues) + 1)
        positive = spec.eigenvalues > 0
        axis.loglog(index[positive], spec.eigenvalues[positive], ".", ms=2.5, color="#000000", label="μᵢ of K₀")
        known = spec.eigenvalues[spec.eigenvalues > max(spec.noise_floor, 0.0)]
        bottom = float(known.min()) / 10 if len(known) else spec.noise_floor
        marks = ((spec.resolution, "known to 10 % above", "--"), (spec.noise_floor, "noise floor", "-."))
        for value, label, style in marks:
            look: dict[str, Any] = {"color": COLOURS["start"], "lw": 0.9, "ls": style}
            if value >= bottom:
                axis.axhline(value, label=f"{label} {value:.0e}", **look)
            elif value > 0:  # it would squeeze the spectrum
                axis.plot([], [], label=f"{label} {value:.0e} ↓", **look)
        if bottom > 0:
            axis.set_ylim(bottom=bottom)
        axis.set(xlabel="index", ylabel="eigenvalue")
        axis.legend(loc="lower left")
        headline(figure, title)
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
    "4(a)": ("#332288", "s--"),
    "4(b)": ("#999933", "D-."),
    "4(c)": ("#44AA99", "v:"),
    "5(a)": ("#88CCEE", "v--"),
    "5(b)": ("#AA4499", "s--"),
    "5(c)": ("#AA4499", "s--"),
    "5(d)": ("#AA4499", "s--"),
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
    figure, axes = canvas(2, 2, COLUMN, 4.4)
    with drawing():
        headline(figure, title)
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
    x = lam_axis(axis, [row["lam_over_mu1"] for row in rows], "λ/μ₁")
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
    x = lam_axis(axis, [row["lam_over_mu1"] for row in rows], "λ/μ₁")
    y = np.array([row["measured"] if row["measured"] > 0 else np.nan for row in rows])
    axis.plot(x, y, "o-", color=colour, label=f"measured {MEASURED[name]}")
    large = x[x >= 1]
    if len(large) > 1 and np.isfinite(y[-1]):
        guide = 0.5 * y[-1] * (large / large[-1]) ** SCALINGS[name]
        axis.plot(large, guide, color=colour, lw=0.8, ls=_DOTS, label="_")


def candidates(table: Sequence[Row], criterion: str, title: str) -> Figure:
    """Draws every candidate: the criterion against parameters, and a predicted loss against the criterion.

    The loss is that of held-out examples where there are any, else leave-one-out; where that is the criterion itself,
    it is the condition number.

    Args:
        table: Of a `LayerSelection`, the best first.
        criterion: What it was ranked by.
        title: What the kernels are of, with sample sizes.

    Returns:
        The figure, for `save` or `svg`.
    """
    figure, axes = canvas(1, 2, COLUMN, 2.4)
    wanted = ("validation_error", "leave_one_out_error", "condition_number")
    other = next(name for name in wanted if name in table[0] and name != criterion)
    params, values, others = (np.array([row[key] for row in table], float) for key in ("num_params", criterion, other))
    marks = [
        (np.arange(6, len(table)), "o", 9, COLOURS["start"], "other candidates"),
        (np.arange(1, min(6, len(table))), "D", 18, COLOURS["runner_up"], "next five"),
        (np.arange(1), "*", 110, COLOURS["chosen"], "chosen"),
    ]
    with drawing():
        for rows, marker, size, colour, label in marks:
            for axis, x, y in ((axes[0, 0], params, values), (axes[0, 1], values, others)):
                axis.scatter(x[rows], y[rows], marker=marker, s=size, color=colour, label=label, linewidths=0, zorder=3)
        axes[0, 0].set(title="(a) By number of parameters", xlabel="tuned parameters", ylabel=CRITERIA[criterion])
        axes[0, 0].set_yscale(_scale(values))
        axes[0, 1].set(title="(b) Against another criterion", xlabel=CRITERIA[criterion], ylabel=CRITERIA[other])
        axes[0, 1].set(xscale=_scale(values), yscale=_scale(others))
        axes[0, 0].legend()
        headline(figure, title)
    return figure


def _scale(values: np.ndarray) -> str:
    return "log" if (values > 0).all() and values.max() > 30 * values.min() else "linear"


def cells(table: Sequence[Row], title: str, share: float = 0.1) -> Figure:
    """Draws how often each module of each layer is in the best candidates; those chosen are framed.

    Args:
        table: Of a `LayerSelection`, the best first.
        title: What the kernels are of.
        share: Of the candidates that count as the best, at least five.

    Returns:
        The figure, for `save` or `svg`.
    """
    from matplotlib.patches import Rectangle

    layers = sorted({int(layer) for row in table for layer in row["layers"].split()})
    modules = list(dict.fromkeys(module for row in reversed(table) for module in row["modules"].split()))
    modules.sort(key=lambda module: (module.rpartition("/")[0], module))
    top = table[: max(5, round(share * len(table)))]
    counts = np.zeros((len(modules), len(layers)))
    for row in top:
        for module in row["modules"].split():
            for layer in row["layers"].split():
                counts[modules.index(module), layers.index(int(layer))] += 1 / len(top)
    figure, axes = canvas(1, 1, min(1.9 + 0.38 * len(layers), COLUMN), 1.3 + 0.28 * len(modules))
    axis = axes[0, 0]
    with drawing():
        image = axis.imshow(counts, cmap=COUNT_MAP, vmin=0, vmax=1, aspect="auto")
        for module in table[0]["modules"].split():
            for layer in table[0]["layers"].split():
                corner = (layers.index(int(layer)) - 0.44, modules.index(module) - 0.44)
                axis.add_patch(Rectangle(corner, 0.88, 0.88, fill=False, edgecolor=COLOURS["chosen"], lw=1.8))
        axis.set_xticks(range(len(layers)), [str(layer) for layer in layers])
        axis.set_yticks(range(len(modules)), modules)
        axis.grid(False)
        axis.set_xlabel("layer (framed: chosen)")
        headline(figure, title)
        figure.colorbar(image, label=f"share of the best {len(top)}")
    return figure


def spectra(specs: Mapping[str, Spectrum], title: str) -> Figure:
    """Draws the spectra of several sets of blocks, with the noise floor of the first.

    Args:
        specs: `"chosen"`, and `"everything"`, `"runner-up"` where there are such, to a spectrum.
        title: What the kernels are of.

    Returns:
        The figure, for `save` or `svg`.
    """
    figure, axes = canvas(1, 1, 3.9, 2.9)
    axis = axes[0, 0]
    shades = {name: COLOURS[name.replace("-", "_")] for name in ("chosen", "everything", "runner-up")}
    styles = {"chosen": "-", "everything": "--", "runner-up": ":"}
    with drawing():
        for name, spec in specs.items():
            mu = np.where(spec.eigenvalues > spec.noise_floor, spec.eigenvalues, np.nan)
            width = 2.4 if name == "chosen" else 1.3
            axis.loglog(np.arange(1, len(mu) + 1), mu, styles[name], color=shades[name], label=name, lw=width)
        first = next(iter(specs.values()))
        if first.resolution > first.eigenvalues[-1] / 100:  # else it is far below the axis
            axis.axhline(first.resolution, color=COLOURS["start"], lw=0.9, ls="-.", label="resolved to 10 % (chosen)")
        axis.set(xlabel="index", ylabel="eigenvalue above the noise")
        headline(figure, title)
        axis.legend()
    return figure


def lam_curve(curve: Sequence[Mapping[str, float]], chosen: float, title: str) -> Figure:
    """Draws leave-one-out loss and log marginal likelihood against λ/μ₁.

    Args:
        curve: Rows with `lam_rel`, `leave_one_out_error`, `log_marginal_likelihood`.
        chosen: λ/μ₁ that is suggested.
        title: What the kernel is of.

    Returns:
        The figure, for `save` or `svg`.
    """
    figure, axes = canvas(1, 2, COLUMN, 2.0)
    x = [row["lam_rel"] for row in curve]
    panels = (("leave_one_out_error", "leave-one-out loss"), ("log_marginal_likelihood", "log marginal likelihood"))
    with drawing():
        for axis, (column, label) in zip(axes[0], panels, strict=True):
            axis.semilogx(x, [row[column] for row in curve], "o-", ms=2.5, color="#000000")
            axis.axvline(chosen, color=COLOURS["chosen"], lw=1.2, ls="--", label=f"suggested, {chosen:.2g}")
            axis.set(xlabel="pull λ/μ₁", ylabel=label)
            axis.legend()
        headline(figure, title)
    return figure
