"""What the study of spectra shows: figures and findings from its tables."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxlin import plots
from jaxlin.experiments.figures.choices import HEAD, MODULES
from jaxlin.experiments.figures.study import Row, Tables
from jaxlin.experiments.figures.summary import band, distinct, name_of, number, of, spread, values_of, written

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


PROBE, NEW = "probe", "random"
"""Starts of the head."""
CELL, LAYER, MODULE, TOP, BOTTOM, ALL = "cell", "layer", "module", "top", "bottom", "all"
"""Kinds of sets: a module of a layer; a layer; a module of all layers; layers from the top or bottom; everything."""


def _sizes(rows: Sequence[Row]) -> str:
    draws = len(distinct(rows, "seed"))
    return f"{spread(distinct(rows, 'train_examples'))} training examples, {draws} draws of examples, A and head"


def _grid(rows: Sequence[Row], lines: int, height: float, **options: Any) -> tuple[Figure, Any, list[str]]:
    tasks = distinct(rows, "task")
    figure, axes = plots.canvas(lines, len(tasks), plots.COLUMN, height, **options)
    for column, task in enumerate(tasks):
        axes[0, column].set_title(name_of(task))
    return figure, axes, tasks


def _shades(count: int) -> Any:
    import matplotlib.pyplot as plt

    return plt.get_cmap(plots.LAYER_MAP)(np.linspace(0, 0.9, count))


def _layer(name: str) -> int:
    return int(name.partition(":")[0].split(",")[0])


def _spectra(rows: Sequence[Row]) -> Figure:
    """Eigenvalues by layer, and by module, a column a task."""
    with plots.drawing():
        figure, axes, tasks = _grid(rows, 2, 4.0, sharex=True, sharey=True)
        for column, task in enumerate(tasks):
            mine = of(rows, task=task)
            layers = distinct(of(mine, kind=LAYER), "choice")
            for name, shade in zip(layers, _shades(len(layers)), strict=True):
                label = f"layer {_layer(name)}"
                band(
                    axes[0, column], of(mine, kind=LAYER, choice=name), "index", "eigenvalue", color=shade, label=label
                )
            for name in distinct(of(mine, kind=MODULE), "choice"):
                module = MODULES[name.rpartition(":")[2]]
                some = of(mine, kind=MODULE, choice=name)
                band(axes[1, column], some, "index", "eigenvalue", color=plots.COLOURS[module], label=module)
            for axis in axes[:, column]:
                axis.set(xscale="log", yscale="log")
                look: dict[str, Any] = {
                    "color": "#000000",
                    "alpha": 0.4,
                    "lw": 3,
                    "zorder": 1.5,
                }  # below: value nearly coincides with it
                band(axis, of(mine, kind=ALL), "index", "eigenvalue", label="all of them", **look)
            head = of(mine, kind=HEAD)
            band(axes[1, column], head, "index", "eigenvalue", fmt=":", color=plots.COLOURS["start"], label="the head")
            axes[1, column].set_xlabel("index i")
        for axis, name in zip(axes[:, 0], ("by layer", "by module"), strict=True):
            axis.set_ylabel(f"μᵢ, {name}")
        for line in axes:
            line[-1].legend(loc="center left", bbox_to_anchor=(1, 0.5))
        plots.headline(figure, f"Eigenvalues of LoRA’s kernels, probe head;\n{_sizes(rows)} (mean and range)")
    return figure


def _kappa(axis: Axes, rows: Sequence[Row], across: str, fmt: str, **line: Any) -> None:
    """Draws the geometric mean of κ over draws, with their range as a band."""
    at = sorted(distinct(rows, across))
    found = [values_of(of(rows, **{across: value}), "condition_number") for value in at]
    axis.set_yscale("log")
    (drawn,) = axis.plot(at, [np.exp(np.log(values).mean()) for values in found], fmt, **line)
    low, high = ([end(values) for values in found] for end in (np.min, np.max))
    axis.fill_between(at, low, high, color=drawn.get_color(), alpha=0.18, lw=0)


def _by_choice(rows: Sequence[Row]) -> Figure:
    """κ of single layers by module, and as layers are added from either end."""
    rows = of(rows, head=PROBE)
    with plots.drawing():
        figure, axes, tasks = _grid(rows, 2, 3.8, sharey=True)
        for column, task in enumerate(tasks):
            mine = of(rows, task=task)
            single, added = axes[:, column]
            for letter, module in MODULES.items():
                some = [{**row, "layer": _layer(row["choice"])} for row in of(mine, kind=CELL)]
                some = [row for row in some if row["choice"].endswith(f":{letter}")]
                _kappa(single, some, "layer", fmt="o-", color=plots.COLOURS[module], label=module)
            whole = [{**row, "layer": _layer(row["choice"])} for row in of(mine, kind=LAYER)]
            _kappa(single, whole, "layer", fmt="s--", color="#000000", label="all three")
            for kind, style in ((TOP, "o-"), (BOTTOM, "s--")):
                some = [{**row, "count": 1 + row["choice"].count(",")} for row in of(mine, kind=kind)]
                colour = plots.COLOURS[f"from_{kind}"]
                _kappa(added, some, "count", fmt=style, color=colour, label=f"from the {kind}")
            single.set(xlabel="layer", xticks=distinct(whole, "layer"))
            added.set(xlabel="layers tuned", xticks=sorted(distinct(some, "count")))
        axes[0, 0].set_ylabel("κ, one layer")
        axes[1, 0].set_ylabel("κ, query, key, value")
        for line in axes:
            line[-1].legend(loc="center left", bbox_to_anchor=(1, 0.5))
        plots.headline(
            figure, f"κ by choice of layers and modules, probe head;\n{_sizes(rows)} (geometric mean, range)"
        )
    return figure


def between(axis: Axes, rows: Sequence[Row]) -> None:
    """Draws by what factor each eigenvalue grows as a layer is added, between its bounds."""
    from matplotlib.ticker import FixedLocator, NullLocator

    known = [row for row in rows if row["base"] is not None and row["base"] > 0]
    index, base = [row["index"] for row in known], np.array([row["base"] for row in known])
    lower, upper, mu = (
        np.array([np.nan if row[name] is None else row[name] for row in known]) / base
        for name in ("lower", "upper", "eigenvalue")
    )
    axis.set(xscale="log", yscale="log")
    wide = np.nanmax(upper, initial=1.0) > 20  # where ticks that are closer would run into each other
    axis.yaxis.set_major_locator(FixedLocator((1, 3, 10, 30, 100, 300, 1000) if wide else (1, 1.5, 2, 3, 5, 10, 20)))
    axis.yaxis.set_major_formatter("{x:g}")
    axis.yaxis.set_minor_locator(NullLocator())
    axis.fill_between(index, lower, upper, color=plots.COLOURS["bound"], alpha=0.6, lw=0, label="between the bounds")
    axis.axhline(1, ls="--", lw=0.9, color=plots.COLOURS["start"], label="before")
    axis.plot(index, mu, ".", color="#000000", ms=4, label="after")


def _bound_figure(rows: Sequence[Row], kappas: Sequence[Row]) -> Figure:
    """The first and the last layer that is added, and κ at each step, of the first draw."""
    rows, kappas = of(rows, seed=0), of(kappas, seed=0)
    steps = sorted({1, max(row["step"] for row in rows)})
    with plots.drawing():
        figure, axes, tasks = _grid(rows, len(steps) + 1, 1.6 * (len(steps) + 1) + 0.4, sharey="row")
        for column, task in enumerate(tasks):
            for axis, step in zip(axes[:, column], steps, strict=False):
                mine = of(rows, task=task, step=step)
                between(axis, mine)
                axis.set_xlabel("index i")
                if not column:
                    axis.set_ylabel(f"μᵢ after / before,\nlayer {mine[0]['added']} added")
            axis, mine = axes[-1, column], of(kappas, task=task)
            at = [row["step"] + 1 for row in mine]
            ends = [[row[name] if row[name] is not None else np.nan for row in mine] for name in ("lower", "upper")]
            axis.fill_between(at, *ends, color=plots.COLOURS["bound"], alpha=0.6, lw=0)
            axis.plot(at, [row["condition_number"] for row in mine], "o", color="#000000", ms=3.5)
            axis.set(yscale="log", xlabel="layers tuned,\nfrom the top")
            axis.set_xticks(at)
        axes[-1, 0].set_ylabel("κ")
        figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
        plots.headline(
            figure,
            "Eigenvalues (over those before) and κ between the bounds of theory 7, probe head;\n"
            f"{spread(distinct(rows, 'train_examples'))} training examples, first draw",
        )
    return figure


def _draws(rows: Sequence[Row]) -> Figure:
    """κ of each layer in each draw, below a probe and below a random head."""
    rows = of(rows, kind=LAYER)
    with plots.drawing():
        figure, axes, tasks = _grid(rows, 1, 2.2, sharey=True)
        for axis, task in zip(axes[0], tasks, strict=True):
            for shift, head, marker in ((-0.12, PROBE, "o"), (0.12, NEW, "s")):
                for seed in distinct(rows, "seed"):
                    mine = of(rows, task=task, head=head, seed=seed)
                    label = f"{head} head" if seed == 0 else None
                    at, colour = [_layer(row["choice"]) + shift for row in mine], plots.COLOURS[f"{head}_head"]
                    values = [row["condition_number"] for row in mine]
                    axis.plot(at, values, f"{marker}-", color=colour, ms=3, lw=0.6, label=label)
            axis.set(yscale="log", xlabel="layer", xticks=sorted({_layer(row["choice"]) for row in rows}))
        axes[0, 0].set_ylabel("κ, query, key, value")
        axes[0, -1].legend(loc="center left", bbox_to_anchor=(1, 0.5))
        plots.headline(figure, f"κ of each layer, a line a draw;\n{_sizes(rows)}")
    return figure


def draw(tables: Tables) -> dict[str, Figure]:
    """Draws spectra, κ by choice, bounds, and the spread over draws."""
    return {
        "spectra": _spectra(tables["spectra"]),
        "kappa_by_choice": _by_choice(tables["sets"]),
        "bounds": _bound_figure(tables["bounds"], tables["kappa_bounds"]),
        "draws": _draws(tables["sets"]),
    }


def _shares(rows: Sequence[Row], kind: str) -> dict[str, np.ndarray]:
    """By choice of a kind, its share of the trace of everything, a value a draw."""
    whole = {row["seed"]: row["trace"] for row in of(rows, kind=ALL)}
    return {
        name: np.array([row["trace"] / whole[row["seed"]] for row in of(rows, kind=kind, choice=name)])
        for name in distinct(of(rows, kind=kind), "choice")
    }


def _kappas(rows: Sequence[Row], kind: str) -> np.ndarray:
    """Log κ, `[draws, choices]` of a kind."""
    names = distinct(of(rows, kind=kind), "choice")
    found = [
        [of(rows, kind=kind, choice=name, seed=seed)[0]["condition_number"] for name in names]
        for seed in distinct(rows, "seed")
    ]
    return np.log(found)


def _upper(rows: Sequence[Row]) -> list[float]:
    """Share of the trace in the upper half of the layers, by task."""
    layers = [list(_shares(of(rows, task=task, head=PROBE), LAYER).values()) for task in distinct(rows, "task")]
    return [float(sum(share.mean() for share in found[len(found) // 2 :])) for found in layers]


def _in_tasks(count: int, tasks: int) -> str:
    """Says in how many of the tasks something is."""
    return {0: "in no task", tasks: "in every task"}.get(count, f"in {count} of {tasks} tasks")


def _mostly(shares: Sequence[float]) -> str:
    """Says in how many tasks a share is above one half."""
    return _in_tasks(sum(share > 0.5 for share in shares), len(shares))


def _all_is_best(rows: Sequence[Row]) -> int:
    """In how many tasks everything has a smaller κ than any single layer."""
    tasks = [of(rows, task=task, head=PROBE) for task in distinct(rows, "task")]
    return sum(bool(_kappas(mine, ALL).mean() < _kappas(mine, LAYER).mean(axis=0).min()) for mine in tasks)


def _of_layers(rows: Sequence[Row]) -> str:
    """Where the kernel lies."""
    lines, upper = [], _upper(rows)
    for task, share in zip(distinct(rows, "task"), upper, strict=True):
        mine = of(rows, task=task, head=PROBE)
        layers, modules = _shares(mine, LAYER), _shares(mine, MODULE)
        most = max(layers, key=lambda name: layers[name].mean())
        module = max(modules, key=lambda name: modules[name].mean())
        cells = [f"{_layer(most)}: {written(100 * layers[most])} %", f"{MODULES[module[-1]]}: "]
        cells[1] += f"{written(100 * modules[module])} %"
        lines.append(f"| {name_of(task)} | " + " | ".join([*cells, f"{100 * share:.3g} %"]) + " |")
    head = (
        "| Task | layer with most of the trace | module with most of it | upper half of the layers |\n|---|---|---|---|"
    )
    return (
        "Share of the trace of LoRA's kernel (query, key and value of all layers), mean and range over draws:\n\n"
        f"{head}\n" + "\n".join(lines) + f"\n\nThe upper half of the layers holds most of the kernel {_mostly(upper)}."
    )


def _of_choice(rows: Sequence[Row]) -> str:
    """κ by choice, and whether adding layers lowers it."""
    lines, best = [], 0
    tasks = distinct(rows, "task")
    for task in tasks:
        mine = of(rows, task=task, head=PROBE)
        layers = {
            name: values_of(of(mine, kind=LAYER, choice=name), "condition_number") for name in _names(mine, LAYER)
        }
        cells = {name: values_of(of(mine, kind=CELL, choice=name), "condition_number") for name in _names(mine, CELL)}
        whole = values_of(of(mine, kind=ALL), "condition_number")
        ordered = sorted(layers, key=lambda name: np.log(layers[name]).mean())
        cell = min(cells, key=lambda name: np.log(cells[name]).mean())
        best += _layer(ordered[0]) == 0
        shown = [f"{_layer(name)}: {_geometric(layers[name])}" for name in (ordered[0], ordered[-1])]
        single = f"{_layer(cell)}, {MODULES[cell[-1]]}: {_geometric(cells[cell])}"
        lines.append(f"| {name_of(task)} | " + " | ".join([*shown, single, _geometric(whole)]) + " |")
    head = (
        "| Task | layer of least κ | of largest κ | single module of least κ | κ of everything |\n|---|---|---|---|---|"
    )
    changes = [_change(of(rows, head=PROBE), kind) for kind in (TOP, BOTTOM)]
    ends = " and ".join(
        f"{'falls' if change < 1 else 'rises'} by a factor of {max(change, 1 / change):.3g} from the {kind}"
        for change, kind in zip(changes, (TOP, BOTTOM), strict=True)
    )
    bounds = float(np.mean([row["condition_number_is_bound"] for row in of(rows, head=PROBE)]))
    return (
        f"κ with the probe head, geometric mean over draws and range:\n\n{head}\n" + "\n".join(lines) + "\n\n"
        f"κ of all layers is below that of the best single one {_in_tasks(_all_is_best(rows), len(tasks))}; the first "
        f"layer has the least κ of the single ones {_in_tasks(best, len(tasks))}. As layers are added κ "
        f"{ends} (tasks averaged). {100 * bounds:.3g} % of all κ are only known as “at least”."
    )


def _change(rows: Sequence[Row], kind: str) -> float:
    """By what factor κ changes from one layer to all, added from one end; geometric mean over tasks and draws."""
    logs = [_kappas(of(rows, task=task), kind) for task in distinct(rows, "task")]
    return float(np.exp(np.mean([log[:, -1].mean() - log[:, 0].mean() for log in logs])))


def _names(rows: Sequence[Row], kind: str) -> list[str]:
    return distinct(of(rows, kind=kind), "choice")


def _geometric(values: np.ndarray) -> str:
    return f"{np.exp(np.log(values).mean()):.3g} ({values.min():.3g} to {values.max():.3g})"


def _of_bounds(tables: Tables) -> str:
    holds, rows = tables["holds"], tables["bounds"]
    applying = [row for row in holds if row["applies"]]
    true = sum(bool(row["holds"]) for row in applying)
    by = {letter: np.mean([row["upper_by"] == letter for row in rows]) for letter in "abc"}
    known = [row for row in rows if row["tightness_upper"] is not None]
    third = max(row["index"] for row in rows) // 3
    parts = [[row for row in known if (row["index"] <= third) == top] for top in (True, False)]
    tight = [[float(np.median([row[f"tightness_{side}"] for row in part])) for side in _SIDES] for part in parts]
    kappas = [row for row in tables["kappa_bounds"] if row["upper"] is not None]
    loose = (
        ""
        if not kappas
        else (
            "κ is at the median "
            f"{np.median([row['condition_number'] / row['lower'] for row in kappas]):.3g} times its bound from below: "
            "that one says next to nothing. The bound from above is at the median "
            f"{np.median([row['upper'] / row['condition_number'] for row in kappas]):.3g} times κ, where it applies "
            f"({len(kappas)} of {len(tables['kappa_bounds'])} steps). "
        )
    )
    verdict = "All of them hold." if true == len(applying) else f"**{len(applying) - true} of them fail.**"
    return (
        f"Bounds 7(a) to 7(d), from below and above, as layers are added from the top: {len(holds)} in all tasks and "
        f"draws, each of all steps and eigenvalues; {len(applying)} apply, {true} hold. {verdict}\n\n"
        f"Of the bounds from above the tightest is (a) for {100 * by['a']:.3g} %, (b) for {100 * by['b']:.3g} %, (c) "
        f"for {100 * by['c']:.3g} % of the eigenvalues kept. Median ratio of eigenvalue and tightest bound (1: equal): "
        f"{tight[0][0]:.2f} from below and {tight[0][1]:.2f} from above for the first third, {tight[1][0]:.2f} and "
        f"{tight[1][1]:.2f} for the others. {loose}"
    ).strip()


_SIDES = ("lower", "upper")


def _of_draws(rows: Sequence[Row]) -> str:
    """How far κ is a matter of the draw."""
    from scipy.stats import spearmanr

    if len(distinct(rows, "seed")) < 2:
        return "One draw alone says nothing of the spread."
    lines: list[str] = []
    orders: dict[str, list[float]] = {PROBE: [], NEW: []}
    for task in distinct(rows, "task"):
        cells = []
        for head in orders:
            log = _kappas(of(rows, task=task, head=head), LAYER)
            over_draws = float(np.exp(np.ptp(log, axis=0).max()))
            between = float(np.exp(np.ptp(log.mean(axis=0))))
            pairs = itertools.combinations(log, 2)
            singular = (np.ptp(log, axis=1) == 0).any()  # all κ of a draw are the largest that can be known
            order = np.nan if singular else float(np.mean([spearmanr(a, b).statistic for a, b in pairs]))
            orders[head].append(order)
            cells += [f"{over_draws:.3g}", f"{between:.3g}", "–" if np.isnan(order) else number(order, "+.2f")]
        lines.append(f"| {name_of(task)} | " + " | ".join(cells) + " |")
    names = ("over draws, at most", "between layers", "order kept")
    head = " | ".join(f"{start} head: {name}" for start in orders for name in names)
    verdicts = [_order_kept(start, found) for start, found in orders.items()]
    return (
        "By what factor κ of a layer differs over draws (the layer where it differs most), by what factor the layers' "
        "geometric means differ, and the mean rank correlation of the layers' κ between two draws:\n\n"
        f"| Task | {head} |\n{'|---' * 7}|\n" + "\n".join(lines) + "\n\n" + " ".join(verdicts)
    )


def _order_kept(start: str, correlations: Sequence[float]) -> str:
    """Says whether the layers have one order by κ in every draw, of the correlations of every task."""
    if np.isnan(correlations).any():
        return f"With a {start} head κ gives the layers no order in some draw, all of whose kernels are singular."
    same = "much the same" if min(correlations) > 0.8 else "not the same"
    least = number(min(correlations), "+.2f")
    return (
        f"With a {start} head the order of the layers by κ is {same} in every draw (least rank correlation of a task "
        f"{least})."
    )


def _in_short(tables: Tables) -> str:
    rows, upper = tables["sets"], _upper(tables["sets"])
    tasks = distinct(rows, "task")
    applying = [row for row in tables["holds"] if row["applies"]]
    return (
        f"**The upper half of the layers holds most of LoRA's kernel {_mostly(upper)}**: {100 * min(upper):.3g} to "
        f"{100 * max(upper):.3g} % of its trace. κ of all layers is below that of the best single one "
        f"{_in_tasks(_all_is_best(rows), len(tasks))}. Of {len(applying)} bounds that apply as layers are added, "
        f"{sum(bool(row['holds']) for row in applying)} hold ({_sizes(rows)})."
    )


def findings(tables: Tables) -> dict[str, str]:
    """Says where the kernel lies, what κ does by choice, whether the bounds hold, and what is a matter of the draw."""
    rows = tables["sets"]
    return {
        "in_short": _in_short(tables),
        "layers": _of_layers(rows),
        "choice": _of_choice(rows),
        "bounds": _of_bounds(tables),
        "draws": _of_draws(rows),
    }
