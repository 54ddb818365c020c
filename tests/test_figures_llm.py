"""Study 09 on a tiny decoder: its numbers are those of compare, ntk and the trainer, called directly."""

import dataclasses

import numpy as np
import pytest

import jaxlin as jl
from jaxlin.experiments.cache import Cache
from jaxlin.experiments.figures import llm
from jaxlin.experiments.figures.study import Work, read_tables, write_tables
from tests import cases

TEMPLATE, WORDS = "{text} it is {mask}", ("bad", "good")


@pytest.fixture
def setting(tmp_path):
    return llm.LlmSetting(
        tasks=("sst2",),
        seeds=1,
        num_train=16,
        max_seq_length=32,
        model_name_or_path=str(cases.write_language_model(tmp_path / "lm", cases.DECODERS["llama: LM"])),
        data_dir=cases.sentiments(tmp_path / "data", 40, 12),
        lora_rank=2,
        template=TEMPLATE,
        label_words=WORDS,
        lam_rel=(0.0, 0.1),
        num_kernel=8,
        num_train_epochs=1.0,
        batch_size=8,
        random_choices=1,
        budget_share=0.5,
    )


@pytest.mark.slow
def test_a_run_and_going_on(setting, tmp_path, monkeypatch):
    work = Work(setting, Cache(tmp_path / "runs"), lambda *_: None)
    write_tables(tmp_path, llm.compute(setting, work))
    tables = read_tables(tmp_path)
    assert {row["start"] for row in tables["table"]} == set(llm.STARTS)

    # One arm from its parts: the prompt's model, and the comparison of it.
    lm = jl.load_causal_lm(setting.model_name_or_path)
    problem = work.made(setting, "sst2", 0)
    model = jl.prompt_classifier(lm, TEMPLATE, list(WORDS))
    tun = jl.lora(model, 2, 2.0, rng=0)
    config = jl.TrainConfig(
        loss="cross_entropy", lr_scheduler_type="linear", batch_size=8, num_train_epochs=1.0, group_by_length=True
    )
    found = jl.compare(tun, problem.train, problem.eval, config, lam_rel=[0.0, 0.1])
    expected = {(row["arm"], row["lam_over_mu1"]): row for row in found.table}
    for row in tables["table"]:
        if row["start"] == "prompt" and row["arm"] == "full":
            other = expected["full", row["lam_over_mu1"]]
            for name in ("distance", "output_gap_relative_eval", "accuracy_eval"):
                assert row[name] == pytest.approx(other[name], rel=1e-4)
    some = problem.train.take(np.arange(8))
    spec = jl.spectrum(jl.ntk(tun, some).contrasts())
    values = [row["eigenvalue"] for row in tables["spectrum"] if row["start"] == "prompt"]
    np.testing.assert_allclose(values, spec.eigenvalues, rtol=1e-4, atol=1e-5 * spec.eigenvalues[0])
    for start in llm.STARTS:
        assert sum(row["share"] for row in tables["shares"] if row["start"] == start) == pytest.approx(1, abs=1e-4)
    assert {row["choice"] for row in tables["choices"]} == {"chosen", "last layers", "random layers", "all layers"}
    whole = next(row["num_params"] for row in tables["choices"] if row["choice"] == "all layers")
    assert all(row["num_params"] <= whole / 2 for row in tables["choices"] if row["choice"] != "all layers")

    # What is told is of the table.
    gaps = {
        row["start"]: row["output_gap_relative_eval"]
        for row in tables["table"]
        if row["arm"] == "full" and row["lam_over_mu1"] == 0
    }
    told = llm.findings(tables)["gap"]
    assert ("on every task, as Malladi" in told) == (min(gaps, key=gaps.get) == "prompt")
    assert all(f"{gap:.3g} (" in told for gap in gaps.values())
    assert set(llm.draw(tables)) == {"against_the_pull", "kernels", "choices"}

    cases.forbid(monkeypatch, llm, "compare", "ntk", "train", "select_layers")
    again = Work(setting, Cache(tmp_path / "runs"), lambda *_: None)
    assert str(llm.compute(setting, again)) == str(llm.compute(setting, work))
    with pytest.raises(AssertionError, match="computed again"):
        llm.compute(dataclasses.replace(setting, num_train_epochs=2.0), again)


def test_the_model_must_be_there(monkeypatch):
    monkeypatch.delenv("JAXLIN_MODELS", raising=False)
    with pytest.raises(jl.InputError, match="JAXLIN_MODELS names no folder that holds stories260K"):
        llm.LlmSetting().model_arguments()
