"""What `jaxlin select` found, as one page for a person to read: no file or address beside it is needed."""

from __future__ import annotations

import html
import json
from collections.abc import Mapping, Sequence
from typing import Any

from jaxlin import plots
from jaxlin.selection_report import LayerSelection
from jaxlin.theory.selection import Estimate

_CSS = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1a1a1a; max-width: 60em; margin: 2em auto; padding: 0 1em; }
h1 { font-size: 1.5em; } h2 { font-size: 1.15em; margin-top: 2em; }
table { border-collapse: collapse; font-size: 13px; margin: .5em 0; }
th, td { padding: .25em .7em; border-bottom: 1px solid #ddd; text-align: right; }
th:first-child, td:first-child, td.words { text-align: left; }
tr.chosen { background: #fdeee2; font-weight: 600; }
.answer { border-left: 5px solid #D55E00; background: #faf6f2; padding: .6em 1.2em; }
.answer dt { font-weight: 600; } .answer dd { margin: 0 0 .5em 0; }
pre { background: #f4f4f4; padding: .8em; overflow-x: auto; font-size: 12.5px; }
figure { margin: 1em 0; } figure svg { max-width: 100%; height: auto; } figcaption { font-size: 13px; color: #444; }
.scroll { overflow-x: auto; }
"""


LAM_BY = {"leave_one_out": "leave-one-out loss", "marginal_likelihood": "marginal likelihood"}


def interval(found: Estimate | None) -> str:
    """Says an estimate with its interval and its spread over draws."""
    if found is None:
        return "–"
    text = f"{found.value:.3f} ({found.confidence:.0%} interval {found.low:.3f} to {found.high:.3f}"
    if len(found.by_draw) > 1:
        text += f"; over {len(found.by_draw)} draws {min(found.by_draw):.3f} to {max(found.by_draw):.3f}"
    return f"{text}; {found.examples} examples)"


def rate_line(report: LayerSelection) -> str:
    """Says the largest stable learning rate."""
    return (
        f"{report.learning_rate_mean:.3g} for the mean loss ({report.learning_rate:.3g} for the summed): above it, "
        "full-batch gradient descent on the linearized model diverges. Not a rate for Adam"
    )


def doubts(report: LayerSelection) -> list[str]:
    """Returns what speaks against reading much into this choice, the gravest first."""
    said = []
    even = [row for row in report.references[1:] if row["low"] <= 0 <= row["high"]]
    if even:
        words = {"always tuned only": "the head alone", "everything": "tuning everything", "runner-up": "the runner-up"}
        names = " or ".join(words[row["tuned"]] for row in even)
        said.append(
            f"On {report.examples} examples the predicted loss of the choice cannot be told from that of {names}: the "
            "interval of the difference holds 0."
        )
    if report.always_share > 0.9:
        said.append(
            f"{report.always_share:.1%} of the kernel's trace is what every candidate tunes (the head), so that the "
            "layers hardly change it. A frozen head (no-train_head) shows what the layers themselves do; a larger α/r "
            "gives them more weight beside the head."
        )
    tied, seen = sum(row["condition_number_is_bound"] for row in report.table), len(report.table)
    if tied:
        said.append(
            f"κ is only a lower bound (≥) for {tied} of {seen} candidates: their smallest eigenvalue is rounding "
            "(fewer parameters than outputs, repeated rows, or the precision of J). κ cannot rank these; ties go to "
            "fewer parameters."
            + (
                ""
                if report.contrasts
                else " If that is so because the head's columns sum to 0 (a frozen probe), contrasts cures it."
            )
        )
    if report.lam_at_edge:
        said.append("The suggested λ is an end of its grid: a better one may lie beyond.")
    if report.draws < 3:
        said.append(f"Only {report.draws} draw(s) of what is random at the start: the spread over draws is not known.")
    return said


def caveats(report: LayerSelection, probe_examples: int) -> list[str]:
    """Returns what a reader must know before believing the numbers.

    Args:
        report: What was found.
        probe_examples: How many other examples the probe head was fitted on; 0: the head is none.
    """
    found, seen = report.search, len(report.table)
    said = [
        *doubts(report),
        "Nothing was trained: every number is of the linearized model at θ₀ under squared loss, which full fine-tuning "
        "follows only as far as “Is it linear there?” says.",
        f"The choice is the best of {seen} candidates on the same {report.examples} examples that predict its loss and "
        "accuracy: these are a little optimistic (a winner's curse). "
        + (
            "The validation rows are held out from that."
            if report.eval_loss is not None and found.criterion != "validation_error"
            else "Held-out examples, which no criterion used, would tell (num_eval_samples)."
        ),
        "Ranks are not chosen: at LoRA's start B = 0, so that the kernel depends on the rank only through (α/r)² and "
        "the draw of A, and cannot tell one rank from another.",
        "That κ at θ₀ predicts the outcome of fine-tuning is a claim of the paper, not a theorem; compare what the "
        "other criteria would choose.",
    ]
    if probe_examples:
        said.append(
            f"The head is a probe, fitted on {probe_examples} other training examples, so that leaving an example out "
            "leaves out all of it."
        )
    if report.trust.gap_bound is not None and report.trust.lipschitz_is_sampled:
        said.append("H is a sampled supremum, hence an estimate from below; so is the bound that it gives.")
    return said


def _cell(value: Any) -> str:
    if value is None:
        return "<td>–</td>"
    if isinstance(value, float):
        return f"<td>{value:.4g}</td>"
    if isinstance(value, int):
        return f"<td>{value:,}</td>"
    return f'<td class="words">{html.escape(str(value))}</td>'


def _table(rows: Sequence[Mapping[str, Any]], columns: Mapping[str, str], chosen: int | None = None) -> str:
    """Lays out rows; `columns` maps a key to its heading, `chosen` is the row set off."""
    heads = "".join(f"<th>{html.escape(head)}</th>" for head in columns.values())
    body = "".join(
        f"<tr{' class=chosen' * (i == chosen)}>{''.join(_cell(row.get(key)) for key in columns)}</tr>"
        for i, row in enumerate(rows)
    )
    return f'<div class="scroll"><table><thead><tr>{heads}</tr></thead><tbody>{body}</tbody></table></div>'


def _figure(svg: str, caption: str) -> str:
    return f"<figure>{svg}<figcaption>{html.escape(caption)}</figcaption></figure>"


def _answer(report: LayerSelection) -> str:
    trust, optimality = report.trust, report.search.optimality
    budget = "no limit was given" if report.budget is None else f"the budget is {report.budget:,}"
    items = {
        "Tune": f"{report.choice.label}{', and the head' if report.head else ''}",
        "Parameters": f"{report.num_params:,} ({budget}). Ranked by {plots.CRITERIA[report.search.criterion]}: "
        f"{optimality}.",
        "Predicted accuracy (leave-one-out)": interval(report.accuracy),
        f"Predicted loss ½‖f − y‖²{' of contrasts' * report.contrasts} (leave-one-out)": interval(report.loss),
    }
    if report.eval_loss is not None:
        items["Predicted on held-out examples"] = (
            f"loss {interval(report.eval_loss)}, accuracy {interval(report.eval_accuracy)}"
        )
    items["Suggested pull λ"] = (
        f"{report.lam_rel:.3g} μ₁ = {report.lam:.3g} for the summed loss, by {LAM_BY[report.lam_by]}"
    )
    items["Largest stable learning rate 2/(μ₁+λ)"] = rate_line(report)
    bound = "" if trust.gap_bound is None else f" Bound by H (theory 5(a)): {trust.gap_bound:.2g} of the movement."
    items["Is it linear there?"] = (
        f"{trust.verdict}. The ridge solution lies ‖δ‖ = {trust.distance:.3g} from θ₀ and moves the outputs by "
        f"‖f̄ − f₀‖ = {trust.movement:.3g} over all examples.{bound}"
    )
    listed = "".join(f"<dt>{html.escape(k)}</dt><dd>{html.escape(v)}</dd>" for k, v in items.items())
    return f'<dl class="answer">{listed}</dl>'


_CHOICE = {"layers": "layers", "modules": "modules", "num_params": "parameters"}


def _shown(row: Mapping[str, Any]) -> dict[str, Any]:
    """A candidate's row, with κ as "≥" where it is only that."""
    sign = "≥ " if row["condition_number_is_bound"] else ""
    return {**row, "rank": str(row["rank"]), "condition_number": f"{sign}{row['condition_number']:.4g}"}


def named_criterion(row: Mapping[str, Any]) -> dict[str, Any]:
    """A criterion's row, in words; κ as "≥" where it is only that."""
    value = f"≥ {row['value']:.4g}" if row["is_bound"] else row["value"]
    return {**row, "criterion": plots.CRITERIA[row["criterion"]], "value": value}


def _at(report: LayerSelection) -> str:
    lam, rel = report.criteria_lam, report.criteria_lam_rel
    return f"λ = {rel:.3g} μ₁ of each candidate" if lam is None else f"λ = {lam:.3g}"


def page(
    report: LayerSelection,
    title: str,
    figures: Mapping[str, str],
    peft: Mapping[str, Any] | None,
    command: str | None,
    warnings: Sequence[str],
    about: Sequence[str],
) -> str:
    """Returns the page.

    Args:
        report: What was found.
        title: Of the page.
        figures: `<svg>` elements by name.
        peft: The choice for the `peft` library, where it can be said.
        command: A command line that compares full and linearized fine-tuning of the choice.
        warnings: See `caveats`.
        about: Lines on model, data and versions.

    Returns:
        HTML.
    """
    criterion = report.search.criterion
    ranked = _CHOICE | {criterion: plots.CRITERIA[criterion], "score_min": "least draw", "score_max": "largest draw"}
    ranked |= {name: plots.CRITERIA[name] for name in ("leave_one_out_error", "validation_error") if name != criterion}
    ranked = {key: head for key, head in ranked.items() if key in _CHOICE or key in report.table[0]}
    by_criterion = {"criterion": "criterion"} | _CHOICE
    by_criterion |= {
        "value": "its value",
        "of_the_choice": "of the choice",
        "leave_one_out_error": "leave-one-out loss",
    }
    named = [named_criterion(row) for row in report.by_criterion]
    references = {"tuned": "tuned", "num_params": "parameters", "lam_over_mu1": "at λ/μ₁", "loss": "leave-one-out loss"}
    references |= {"accuracy": "accuracy", "loss_minus_choice": "loss minus the choice's"}
    references |= {"low": "95 % interval from", "high": "to"}
    top = [_shown(row) for row in report.table[:10]]
    parts = [
        _answer(report),
        "<h2>Why this one</h2>",
        _table(top, {"rank": "rank"} | ranked, chosen=0),
        _figure(figures["candidates"], "Every candidate that was computed."),
        _figure(
            figures["cells"],
            "How often a module of a layer is in the best tenth of the candidates.",
        ),
        f"<p>Criteria that depend on λ are at {_at(report)}.</p>",
        "<h2>Against the runner-up, tuning everything, and the head alone</h2>",
        "<p>Each at the λ that suits it; the difference is over the same examples and draws.</p>",
        _table(report.references, references, chosen=0),
        "<h2>What other criteria would choose</h2>",
        _table(named, by_criterion),
        "<h2>Spectra</h2>",
        _figure(
            figures["spectra"],
            "Eigenvalues of the kernel at θ₀, first draw. By Weyl none is above that of everything.",
        ),
        "<h2>How strongly to pull towards the pretrained weights</h2>",
        _figure(
            figures["lam"],
            "Kernel ridge regression with the chosen kernel, mean over draws. Low loss, high likelihood are better.",
        ),
        "<h2>Caveats</h2>",
        "<ul>" + "".join(f"<li>{html.escape(line)}</li>" for line in warnings) + "</ul>",
        "<h2>To use it</h2>",
        "<p>No configuration for the peft library: the modules' Hugging Face names are not known, or it is no LoRA.</p>"
        if peft is None
        else f"<p>For <code>peft.LoraConfig</code> (adapter_config.json):</p><pre>{_json(peft)}</pre>",
        "" if command is None else f"<p>Full and linearized fine-tuning of it:</p><pre>{html.escape(command)}</pre>",
        "<h2>What it is of</h2>",
        "<ul>" + "".join(f"<li>{html.escape(line)}</li>" for line in about) + "</ul>",
    ]
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f"<style>{_CSS}</style></head>\n<body><h1>{html.escape(title)}</h1>\n" + "\n".join(parts) + "\n</body></html>\n"
    )


def _json(content: Mapping[str, Any]) -> str:
    return html.escape(json.dumps(content, indent=2))
