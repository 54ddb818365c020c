"""The results page: what it says of tables that are made up, and that the README's is of the kept ones."""

import importlib.util
import itertools
import re
from pathlib import Path

import matplotlib.pyplot as plt
import pytest
from matplotlib.transforms import Bbox

from jaxlin import plots
from jaxlin.experiments.figures import dynamics, lipschitz, llm, overview
from jaxlin.experiments.figures.run import STUDIES

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def page():
    spec = importlib.util.spec_from_file_location("results_page", ROOT / "notebooks" / "results_page.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_readme_says_what_the_kept_tables_say(page):
    readme = page.README.read_text(encoding="utf-8")
    shown = readme.split(page.BEGIN)[1].split(page.END)[0]
    assert shown == page.claims(page.kept_studies()), "run python notebooks/results_page.py"
    assert (ROOT / "notebooks" / "results" / "overview.svg").is_file()


def test_a_caption():
    setting = {"model_name_or_path": "M", "lora_rank": 2, "tasks": ["cola", "sst2", "qqp"], "num_train": 9, "seeds": 3}
    assert overview.caption(setting).startswith("*M with LoRA of rank 2 on CoLA, SST-2 and QQP: 9 training examples, 3")


def test_the_sample_of_a_claim():
    rows = [{"task": task, "draw": draw, "train_examples": 9 + draw} for task in ("cola", "wnli") for draw in (0, 1)]
    claim = overview.Claim("02", "words", lambda tables: ("", ""), "some")
    assert claim.sample({"some": rows}) == "1 task, 2 draws, n = 9 to 10"


def test_every_study_has_a_claim_and_a_panel(page):
    names = {study.name for study in STUDIES}
    assert {claim.study for claim in overview.CLAIMS} == names
    studies = page.tables_of(page.kept_studies())
    figure = overview.draw(studies)
    try:
        titles = [axis.get_title() for axis in figure.axes if axis.get_title()]
        assert [title[:3] for title in titles] == [f"({'abcdefgh'[i]})" for i in range(len(studies))]
    finally:
        plt.close(figure)


def written(figure):
    """What is written in a figure, tick labels aside, of which matplotlib holds some that it does not draw."""
    legends = [*figure.legends, *(axis.get_legend() for axis in figure.axes if axis.get_legend())]
    texts = [figure._suptitle, *(t for legend in legends for t in (legend.get_title(), *legend.get_texts()))]
    for axis in figure.axes:
        texts += [axis.title, axis.xaxis.label, axis.yaxis.label, *axis.texts]
    return [text for text in texts if text is not None and text.get_text() and text.get_visible()]


@pytest.mark.slow
@pytest.mark.parametrize("study", STUDIES, ids=lambda study: study.name)
def test_kept_figures_are_readable_at_the_width_of_a_column(page, study):
    for name, figure in study.draw(page.tables_of(page.kept_studies())[study.name]).items():
        try:
            figure.canvas.draw()
            assert figure.get_figwidth() <= plots.COLUMN, name
            inside = figure.bbox.padded(1)
            for text in written(figure):
                ends = text.get_window_extent()
                assert text.get_fontsize() >= 6, (name, text)
                corners = [(x, y) for x in (ends.x0, ends.x1) for y in (ends.y0, ends.y1)]
                assert all(inside.contains(*corner) for corner in corners), (name, text)
            for one, other in itertools.combinations(written(figure), 2):
                crossing = Bbox.intersection(one.get_window_extent(), other.get_window_extent())
                assert crossing is None or min(crossing.size) < 2, (name, one, other)  # pixels
            for axis in figure.axes:
                assert all(label.get_fontsize() >= 6 for label in [*axis.get_xticklabels(), *axis.get_yticklabels()])
        finally:
            plt.close(figure)


def answer(study, tables, which=0):
    claims = [claim for claim in overview.CLAIMS if claim.study == study]
    return claims[which].answer(tables)


def scored(rows):
    """With a start, and scores that are 0.1 above it without a pull and as it is with one."""
    starts = [
        {"task": task, "seed": seed, "arm": "start", "pull": "coupled", "lam_over_mu1": None, "score_eval": 0.5}
        for task in ("cola", "sst2")
        for seed in (0, 1)
    ]
    tuned = [
        row | {"seed": seed, "score_eval": 0.5 + (0.1 + 1e-4 * seed) * (not row["lam_over_mu1"])}
        for row in rows
        for seed in (0, 1)
    ]
    return [*starts, *tuned]


def gaps(values, **labels):
    """Rows of full fine-tuning with these relative gaps at λ/μ₁ = 0, 0.1, 1, on two tasks."""
    return [
        {"task": task, "seed": 0, "arm": "full", "lam_over_mu1": share, "output_gap_relative_eval": factor * value}
        | {"pull": "coupled"}
        | labels
        for task, factor in (("cola", 1.0), ("sst2", 0.5))
        for share, value in zip((0.0, 0.1, 1.0), values, strict=True)
    ]


def test_the_pull():
    measured, holds = answer("02_regularization_and_linearity", {"table": gaps([0.6, 0.02, 0.04])})
    assert measured == ("‖f−f̄‖/‖f−f₀‖ on validation examples is 0.3 to 0.6 at λ/μ₁ = 0 and 0.01 to 0.02 at 0.1")
    assert holds == "yes, with a pull: below 0.1 from λ/μ₁ = 0.1 on"
    _, holds = answer("02_regularization_and_linearity", {"table": scored(gaps([0.6, 0.02, 0.04]))})
    assert holds.endswith("nothing is left (CoLA +0.100, there +0.000; SST-2 +0.100, there +0.000)")
    _, holds = answer("02_regularization_and_linearity", {"table": gaps([0.6, 0.3, 0.16])})
    assert holds == "in part: below 0.1 on 1 of 2 tasks"


LOOSE = ("4(a)", "4(b)", "4(c)", "5(b)", "5(c)")


@pytest.mark.parametrize(
    ("rows", "holds"),
    [
        ([(True, True), (False, None)], "yes: theorems, and the code agrees"),
        ([(True, True), (True, False)], "no: 1 fail"),
        ([(False, None)], "none applies"),
    ],
)
def test_bounds(rows, holds):
    names = ("4(a) ‖δ_t‖", "5(c) ‖f−f̄‖")
    table = [
        {"bound": names[i % 2], "applies": applies, "holds": held, "tightness_end": 0.5, "measured": 0.1}
        for i, (applies, held) in enumerate(rows)
    ]
    of_all = [
        {"bound": f"{name} x", "applies": True, "holds": True, "tightness_end": 0.25, "measured": 0.2} for name in LOOSE
    ]
    told = [*table, *of_all, {"bound": "7(a) μᵢ", "applies": True, "holds": False, "tightness_end": 1.0}]
    measured, _ = answer("02_regularization_and_linearity", {"bounds": told}, 1)
    assert measured.startswith(f"of {len(rows) + 5} bounds of theory 4 and 5")  # and not of theory 7
    assert "4(a)" not in measured
    assert "(5(b), 5(c)) 4 and " in measured
    assert measured.endswith("The runs end 0.1 to 0.2 from θ₀")
    assert answer("05_spectra_and_layers", {"holds": table})[1] == holds


def curves(off, gap):
    rows = []
    for share in (1e-4, 1.0):
        for step, loss in ((0, 2.0), (1, 1.0)):
            labels = {"task": "sst2", "seed": 0, "lam_over_mu1": share, "step": step}
            offs = {
                f"off{of}_{split}": off if step else None for of in ("", "_relative") for split in ("train", "eval")
            }
            rows.append({**labels, "arm": dynamics.LINEARIZED, "loss_train": loss, **offs})
            rows.append({**labels, "arm": dynamics.FULL, "loss_train": loss + gap * (step == 1) * (share < 1)})
    return {"curves": rows}


def test_dynamics():
    measured, holds = answer("03_dynamics", curves(1e-6, 0.5))
    assert "by 1e−06 of the way" in measured
    assert "at most 1 at λ/μ₁ = 0.0001 and 0 at λ/μ₁ = 1" in measured
    assert "yes, to rounding" in holds
    assert "not to rounding" in answer("03_dynamics", curves(0.1, 0.5))[1]


def profile(along):
    rows = [
        {
            "task": "cola",
            "seed": 0,
            "quantity": lipschitz.STACKED,
            "lam_over_mu1": share,
            "step": step,
            "radius": radius,
        }
        | {"L_upper": value, "sigma": 1.0}
        for share, step, radius, value in ((None, None, 0.1, 2.0), (None, None, 10.0, 2.0), (0.0, 5, 1.0, along))
    ]
    return {"profile": rows, "reached": [{"task": "cola", "seed": 0, "lam_over_mu1": 0.0, "radius": 1.0}]}


def test_directions():
    measured, holds = answer("04_lipschitz_profile", profile(6.0))
    assert "changes the Jacobian 3 times as much" in measured
    assert holds == "no: they tell too little"
    assert answer("04_lipschitz_profile", profile(1.0))[1] == "in part"


def choices(advantage):
    arms = {"leave_one_out_error": 0.8 + advantage, "last_layers": 0.8, "random_choice": 0.7}
    sizes = {"leave_one_out_error": 30, "last_layers": 40, "random_choice": 40}
    return {
        "table": [
            {"task": task, "seed": seed, "arm": arm, "score_eval": 0.0, "accuracy_eval": score + 0.001 * i}
            | {"loss_train": 0.5 - score, "num_params": sizes[arm]}
            for i, task in enumerate(("cola", "sst2", "mrpc"))
            for seed in range(2)
            for arm, score in {**arms, "leave_one_out_error": 0.8 + advantage * (1 + 0.1 * i)}.items()
        ]
    }


def test_choosing():
    measured, holds = answer("07_choose_layers", choices(0.05))
    assert holds == "yes"  # by accuracy, whatever a task's own score is
    assert "of which it used 75 % and the others all: minus last layers +0.055 [" in measured
    assert "Training loss: minus last layers −0.055 [" in measured
    assert answer("07_choose_layers", choices(-0.05))[1] == "no"


def differences(tuned, kernel):
    """Pairs of two draws on two tasks: what fine-tuning and the kernel gain on the probe."""
    same = {
        ("full", "linear_probe"): tuned,
        ("kernel_regression", "linear_probe"): kernel,
        ("kernel_regression", "full"): [b - a for a, b in zip(tuned, kernel, strict=True)],
        ("kernel_regression", "full_pulled"): kernel,
    }
    return [
        {"arm": arm, "other": other, "task": task, "seed": seed, "accuracy_difference": value + 1e-4 * seed}
        for (arm, other), values in same.items()
        for task, value in zip(("cola", "sst2"), values, strict=True)
        for seed in (0, 1)
    ]


@pytest.mark.parametrize(
    ("tuned", "kernel", "holds"),
    [
        ((-0.01, -0.02), (0.1, 0.1), "not testable: fine-tuning without a pull gains on its start on no task"),
        ((-0.01, 0.03), (0.1, -0.01), "no: where fine-tuning learns (SST-2), the kernel shows none of the gain"),
        ((0.02, 0.03), (0.1, -0.01), "in part: where fine-tuning learns, the kernel gains on 1 of 2 tasks"),
        ((0.02, 0.03), (0.1, 0.01), "yes: where fine-tuning learns, the kernel gains on 2 of 2 tasks"),
    ],
)
def test_predicting(tuned, kernel, holds):
    assert answer("08_kernel_regression", {"pairs": differences(tuned, kernel)})[1] == holds


def test_prompts():
    best, worst = (gaps(values, accuracy_eval=0.54) for values in ([0.1, 0.01, 0.01], [0.5, 0.1, 0.1]))

    def tables(*three, share=0.5):
        table = [row | {"start": s} for s, rows in zip(llm.STARTS, three, strict=True) for row in rows]
        return {"table": table, "shares": [{"task": "cola", "start": "probe", "part": "head", "share": share}]}

    measured, holds = answer("09_llm", tables(best, worst, worst))
    assert holds == "yes"
    assert "0.05 to 0.1 with prompt" in measured
    measured, holds = answer("09_llm", tables(best, worst, worst, share=0.95))
    assert holds == "not testable with this decoder"
    assert "at least 95.0% of the kernel’s trace" in measured
    assert answer("09_llm", tables(worst, best, worst))[1] == "no"
    mixed = [best[i] if best[i]["task"] == "cola" else worst[i] for i in range(len(best))]
    other = [worst[i] if best[i]["task"] == "cola" else best[i] for i in range(len(best))]
    assert answer("09_llm", tables(mixed, other, worst))[1] == "on 1 of 2 tasks"


def test_no_claim_over_tasks_counts_tasks_of_too_few_examples():
    def with_wnli(tables):
        more = {
            name: [
                row | {"task": "wnli"} | dict.fromkeys(set(row) & {"L_upper", "output_gap_relative_eval"}, 0.9)
                for row in rows
                if row["task"] == "cola"
            ]
            for name, rows in tables.items()
        }
        return {name: [*rows, *more[name]] for name, rows in tables.items()}

    prompts = [row | {"start": start, "accuracy_eval": 0.5} for start in llm.STARTS for row in gaps([0.1, 0.01, 0.01])]
    studies = {
        "02_regularization_and_linearity": {"table": gaps([0.6, 0.02, 0.04])},
        "04_lipschitz_profile": profile(6.0),
        "07_choose_layers": choices(0.05),
        "08_kernel_regression": {"pairs": differences((0.02, 0.03), (0.1, 0.01))},
        "09_llm": {"table": prompts, "shares": []},
    }
    for study, tables in studies.items():
        assert answer(study, with_wnli(tables)) == answer(study, tables)


def test_what_is_said_has_true_minus_signs(page):
    studies = page.tables_of(page.kept_studies())
    said = [text for study in STUDIES for text in study.findings(studies[study.name]).values()]
    for text in [*said, overview.claims_table(studies)]:
        assert not re.findall(r"(?<![\w-])-\d|\de-\d", text)
