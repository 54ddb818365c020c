"""The quick start as a command: its tables are what the notebook's own lines give."""

import dataclasses

import matplotlib.pyplot as plt
import numpy as np
import pytest

import jaxlin as jl
from jaxlin.data.task import subsample, tokenize
from jaxlin.experiments.cache import Cache
from jaxlin.experiments.data_arguments import DataArguments, load_task
from jaxlin.experiments.figures import quickstart as study
from jaxlin.experiments.figures.study import Work, read_tables, write_tables
from tests import cases


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    model, data = cases.headless_checkpoint(folder), cases.sentiments(folder / "data", 24, 24)
    options = {"num_train": 8, "num_eval": 6, "batch_size": 4, "steps": 3, "lam_rel": (0.0, 1.0), "lora_rank": 2}
    return study.QuickstartSetting(tasks=("sst2",), model_name_or_path=str(model), data_dir=data, **options)


def tables_of(setting, folder):
    write_tables(folder, study.compute(setting, Work(setting, Cache(folder / "runs"), lambda *_: None)))
    return read_tables(folder)


def test_tables_are_what_the_lines_of_the_notebook_give(setting, tmp_path):
    tables = tables_of(setting, tmp_path)
    task = load_task(DataArguments(task_name="sst2", data_dir=setting.data_dir))
    model = jl.load_model(setting.model_name_or_path, num_labels=task.num_labels)
    train, held_out = (
        tokenize(subsample(split, size, seed=0), model.tokenizer, max_length=32)[0]
        for split, size in ((task.train, 8), (task.validation, 6))
    )
    model = jl.probe_head(model, train, np.eye(task.num_labels)[train["labels"]])
    tun = jl.lora(model, rank=2, alpha=2.0, targets=("query", "value"))
    mu = jl.spectrum(jl.ntk(tun, train)).eigenvalues
    np.testing.assert_allclose([row["eigenvalue"] for row in tables["spectrum"]], mu, rtol=1e-4, atol=1e-6 * mu[0])
    config = jl.TrainConfig(optimizer="adam", learning_rate=1e-3, batch_size=4, max_steps=3)
    expected = jl.compare(tun, train, held_out, config, lam_rel=[0, 1])
    assert [row["arm"] for row in tables["table"]] == [row["arm"] for row in expected.table]
    for found, row in zip(tables["table"], expected.table, strict=True):
        for column in ("distance", "output_gap_relative_eval", "agreement_eval", "loss_eval"):
            assert found[column] == (None if row.get(column) is None else pytest.approx(row[column], rel=1e-3))
    assert [row["step"] for row in tables["history"]] == 4 * [1, 2, 3]
    (said,) = study.findings(tables).values()
    full = [row for row in tables["table"] if row["arm"] == "full"]
    assert all(f"{row['output_gap_relative_eval']:.2g} of the outputs' change apart" in said for row in full)
    assert "(SST-2, 8 training and 6 validation examples, seed 0)" in said


def test_every_draw_has_its_figures(setting, tmp_path):
    figures = study.draw(tables_of(dataclasses.replace(setting, seeds=2), tmp_path))
    assert list(figures) == [f"{what}_sst2_{seed}" for seed in (0, 1) for what in ("spectrum", "comparison")]
    for seed, figure in zip((0, 0, 1, 1), figures.values(), strict=True):
        assert f"seed {seed}" in figure.get_suptitle()
        plt.close(figure)
