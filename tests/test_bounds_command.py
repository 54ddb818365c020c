"""`jaxlin bounds`: what it writes, what it says, what it refuses."""

import functools
import json
import xml.etree.ElementTree as ET

import pytest

from jaxlin.training import bound_sweep as module
from tests import cases

words = functools.partial(cases.flags, command="bounds")


@pytest.fixture
def options(setting_arguments):
    sizes = {"num_samples": 6, "steps": 4, "selective_steps": 2, "directions": 1}
    return {**setting_arguments, **sizes, "lam_rel": ["0", "1", "10"]}


@pytest.mark.slow
def test_it_writes_tables_and_a_figure_and_says_what_holds(run, options, tmp_path, monkeypatch):
    code, out, err = run(*words(options))
    assert code == 0, err
    folder = tmp_path / "out"
    table, results = cases.rows(folder / "table.csv"), json.loads((folder / "all_results.json").read_text())
    assert len(table) == 60 == len(results["table"])
    assert {row["lam_over_mu1"] for row in table} == {"0.0", "1.0", "10.0"}
    assert all(row["holds"] == ("True" if row["applies"] == "True" else "") for row in table)
    assert len(cases.rows(folder / "measurements.csv")) == 3 * 3
    assert results["summary"]["derivatives"] == "dense"
    assert results["config"]["command"] == "bounds"
    assert (folder / "figures" / "bounds.png").read_bytes()[:4] == b"\x89PNG"
    assert ET.parse(folder / "figures" / "bounds.svg").getroot().tag.endswith("svg")
    assert "bounds that apply hold, of 60 in all" in out
    assert "n/a: 4(a) ‖δ_t‖ at λ/μ₁ = 0: not λ > 0" in out
    assert "estimates from below, so that holding is no proof" in out
    assert "FAILS" not in out
    assert "training: 18/18" in (folder / "run.log").read_text()

    # The same again from its own configuration; as if the samples had missed the supremum.
    monkeypatch.setattr(module._Samples, "within", lambda self, what, radius: 1e-6)
    again = ["--config", folder / "config.yaml", "--output_dir", tmp_path / "again", "--quiet"]
    code, out, err = run("bounds", *again)
    assert (code, err) == (0, "")
    assert "FAILS: 5(b) ‖θ_t−θ̄_t‖ at λ/μ₁ = 10: at entry" in out
    assert "H and β are sampled, so the samples missed the supremum" in out
    failing = {row["bound"][:4] for row in cases.rows(tmp_path / "again" / "table.csv") if row["holds"] == "False"}
    assert "5(b)" in failing
    for before, after in zip(
        results["table"], json.loads((tmp_path / "again" / "all_results.json").read_text())["table"], strict=True
    ):
        if after["holds"] is not False:  # then it is shown where it fails most
            assert after["measured"] == pytest.approx(before["measured"], rel=1e-6)


@pytest.mark.slow
def test_it_goes_on_after_an_interrupt(run, options, tmp_path, monkeypatch):
    folder, descend, lams = tmp_path / "out", module.descend, []

    def interrupted(origin, lam, *others):
        lams.append(lam)
        if len(lams) == 2:
            raise KeyboardInterrupt
        return descend(origin, lam, *others)

    monkeypatch.setattr(module, "descend", interrupted)
    options = {**options, "num_samples": 4, "steps": 1, "selective_steps": 1, "lam_rel": ["1", "10"]}
    code, out, err = run(*words(options))
    assert code == 130, err
    last = out.strip().splitlines()[-1]
    assert last == f"go on with: jaxlin bounds --config {folder}/config.yaml --output_dir {folder} --resume"
    assert not (folder / "table.csv").exists()
    code, _, err = run(*words({**options, "steps": 2}), "--resume")
    assert (code, "--steps was 1, is 2" in err) == (2, True)
    code, out, err = run(*last.partition("go on with: jaxlin ")[2].split(), "--quiet")
    assert (code, err) == (0, "")
    assert len(lams) == 3  # the first λ is not run again
    results = json.loads((folder / "all_results.json").read_text())
    assert {row["lam_over_mu1"] for row in results["table"]} == {1.0, 10.0}
    parts = [json.loads(file.read_text())["seconds"] for file in (folder / "parts").iterdir()]
    assert len(parts) == 3  # β and two λ
    assert results["summary"]["seconds"] > sum(parts)  # of both processes
    code, _, err = run(*words({**options, "lam_rel": ["1", "10", "30"]}), "--resume")
    assert code == 0, err
    assert len(lams) == 4
    code, _, err = run(*words(options), "--resume", "--overwrite_output_dir")
    assert (code, "--resume and --overwrite_output_dir contradict each other" in err) == (2, True)
    code, _, err = run("ntk", "--output_dir", folder, "--resume")
    assert (code, "is of `jaxlin bounds`; --resume goes on with a kernel" in " ".join(err.split())) == (2, True)
    code, _, err = run(*words({**options, "lam_rel": ["3"]}), "--overwrite_output_dir")
    assert code == 0, err
    assert len(list((folder / "parts").iterdir())) == 2  # the old ones are gone


BAD = {
    "no samples": ({"num_samples": 0}, "--num_samples 0: expected at least 1"),
    "memory": ({"memory_budget": 0}, "--memory_budget 0.0: expected GiB above 0"),
    "compare's": ({"max_train_samples": 5}, "--max_train_samples and --max_eval_samples are of compare"),
    "share": ({"share": 2}, "share=2.0; expected above 0 and at most 1"),
    "λ": ({"lam_rel": ["-1"]}, "each at least 0"),
    "method": ({"method": "exact"}, "invalid choice"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_writes_nothing(run, options, tmp_path, case):
    change, message = BAD[case]
    code, _, err = run(*words({**options, **change}))
    assert code == 2
    assert message in " ".join(err.split())
    assert not (tmp_path / "out").exists()
