"""`jaxlin figures`: the paper's figures again, without a notebook; and what the notebooks read."""

from __future__ import annotations

import dataclasses
import functools
import io
import json
import os
import platform
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import jax
import tyro

from jaxlin import plots
from jaxlin.errors import InputError
from jaxlin.experiments.cache import Cache
from jaxlin.experiments.data_arguments import DataArguments, load_task
from jaxlin.experiments.figures import (
    choose_layers,
    condition_number,
    dynamics,
    kernel_regression,
    lipschitz,
    llm,
    quickstart,
    regularization,
    spectra,
)
from jaxlin.experiments.figures.study import WHOLE, Row, Setting, Study, Work, read_tables, write_tables
from jaxlin.experiments.figures.summary import name_of
from jaxlin.experiments.progress import ProgressReporter
from jaxlin.experiments.run_folder import RunFolder, write_json
from jaxlin.versions import versions

if TYPE_CHECKING:
    from matplotlib.figure import Figure

STUDIES: tuple[Study, ...] = (
    regularization.STUDY,
    dynamics.STUDY,
    lipschitz.STUDY,
    spectra.STUDY,
    condition_number.STUDY,
    choose_layers.STUDY,
    kernel_regression.STUDY,
    llm.STUDY,
)
"""Those whose results are kept, in the order of their numbers."""

QUICKSTART = quickstart.STUDY
"""That of the first notebook, which computes what it shows: no results of it are kept."""

FAST_SWITCH = "JAXLIN_NOTEBOOKS"
"""Environment variable; `fast` makes notebooks compute their study in small in place of reading kept tables."""


@dataclasses.dataclass(frozen=True)
class FiguresConfig:
    """Make the paper's figures again, from computing to drawing; what is computed already is not computed again.

    Attributes:
        names: Studies, by number or name: 01 quickstart, 02 regularization and linearity, 03 dynamics, 04 Lipschitz
            profile, 05 spectra and layers, 06 condition number, 07 choose layers, 08 kernel regression, 09 a language
            model (of the folder JAXLIN_MODELS); default: all.
        fast: One to three minutes a study, on embedded data.
        full: The setting of the results that are kept: needs the data (--data_dir), and hours; 04, 06 and the bounds of
            02 a GPU. (01 has one setting only.)
        paper: The paper's model and training, roberta-base on whole data sets (03 and 08: 1,000 training examples):
            for a GPU, and hours.
        output_dir: Folder for tables and figures, one folder a study in it.
        model_name_or_path: Another encoder: local folder in Hugging Face's layout, or hub id.
        tasks: Other tasks.
        data_dir: Folder of <task>/{train,validation}.{tsv,csv,json,jsonl,parquet}; default: the environment variable
            JAXLIN_DATA.
        seeds: Another number of draws.
        num_train: Another number of training examples.
        max_seq_length: Tokens a text is truncated to.
        quiet: No progress.
        debug: Show tracebacks.
    """

    names: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="[NAME ...]")] = ()
    fast: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    full: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    paper: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    output_dir: Path = Path("figures")
    model_name_or_path: str | None = None
    tasks: tuple[str, ...] = ()
    data_dir: Path | None = None
    seeds: int | None = None
    num_train: int | None = None
    max_seq_length: int | None = None
    quiet: bool = False
    debug: bool = False


def chosen(names: Sequence[str]) -> tuple[Study, ...]:
    """Returns the studies of these numbers or names; all if none is given.

    Raises:
        InputError: If there is none of a name.
    """
    studies, found = (QUICKSTART, *STUDIES), []
    for name in names:
        fitting = [study for study in studies if name in (study.name, study.name[:2], study.name[3:])]
        if not fitting:
            raise InputError(f"there is no study {name!r}; expected some of {', '.join(s.name for s in studies)}")
        found += fitting
    return tuple({study.name: study for study in found}.values()) or studies


SIZES = {
    "fast": "one to three minutes a study",
    "full": "the setting of the results kept",
    "paper": "roberta-base on whole data sets, for a GPU",
}
"""The settings of every study, in words."""
_OPTIONS = ("model_name_or_path", "data_dir", "seeds", "num_train", "max_seq_length")
"""Options that change the setting; `tasks` besides."""


def setting_of(study: Study, config: FiguresConfig) -> Setting:
    """Returns the setting that a study is run in.

    Raises:
        InputError: If not exactly one of fast, full and paper is asked for, or an option cannot be meant.
    """
    setting = getattr(study, _size_of(config))
    if setting is None:
        raise InputError(f"{study.name} has no part in the paper; run it with --full")
    given = _given(config)
    if config.tasks:
        given |= {"tasks": config.tasks}
        for name in ("pull_tasks", "frozen_tasks"):
            if hasattr(setting, name):
                given[name] = tuple(t for t in getattr(setting, name) if t in config.tasks) or config.tasks[:1]
    setting = dataclasses.replace(setting, **given)
    setting.check()
    return setting


def _size_of(config: FiguresConfig) -> str:
    asked = [name for name in SIZES if getattr(config, name)]
    if len(asked) != 1:
        raise InputError(f"give one of {', '.join(f'--{name} ({what})' for name, what in SIZES.items())}")
    return asked[0]


def _given(config: FiguresConfig) -> dict[str, Any]:
    return {name: value for name in _OPTIONS if (value := getattr(config, name)) is not None}


def command_of(study: Study, config: FiguresConfig) -> str:
    """Returns the command line that makes a study again."""
    tasks = f" --tasks {' '.join(config.tasks)}" if config.tasks else ""
    options = "".join(f" --{name} {value}" for name, value in _given(config).items())
    return f"jaxlin figures {study.name} --{_size_of(config)}{tasks}{options}"


def hardware() -> dict[str, Any]:
    """Returns what the study runs on."""
    device = jax.devices()[0]
    return {
        "device": f"{device.platform}: {device.device_kind}",
        "machine": platform.machine(),
        "cores": os.cpu_count(),
    }


def run_study(
    study: Study, setting: Setting, folder: Path, command: str, quiet: bool = False
) -> tuple[dict[str, list[Row]], dict[str, Any]]:
    """Computes a study, as far as it is not yet, and writes its tables, figures and record.

    Args:
        study: What.
        setting: On what.
        folder: Where: `<table>.csv`, `record.json`, `figures/<figure>.{png,svg}`, `findings.md`; `runs/` holds results
            by what they depend on.
        command: That asked for it, for the record.
        quiet: Show no progress.

    Returns:
        Tables as they were written, and the record.

    Raises:
        InputError: If anything given cannot be used.
        KeyboardInterrupt: If interrupted; the results so far are kept, and the same command goes on.
    """
    output = RunFolder(folder, overwrite=False, resume=True)
    arguments = {name: str(value) if isinstance(value, Path) else value for name, value in vars(setting).items()}
    record = {"study": study.name, "command": command, "setting": arguments, **hardware(), "versions": versions()}
    output.open(record, "")
    try:
        with ProgressReporter(output.line, quiet) as progress:
            progress.say(f"{study.name}: {study.title}")
            work = Work(setting, Cache(folder / "runs"), progress.update)
            write_tables(folder, study.compute(setting, work))
    finally:
        output.close()
    record |= {"seconds": work.cache.seconds, "data_sha256": work.data_sha256, "cut": work.cut}
    write_json(folder / "record.json", record)
    tables = read_tables(folder)
    for name, figure in study.draw(tables).items():
        plots.save(figure, folder / "figures" / name)
    findings = study.findings(tables)
    (folder / "findings.md").write_text("\n\n".join([f"# {study.title}", *findings.values()]) + "\n", encoding="utf-8")
    return tables, record


def run(config: FiguresConfig) -> None:
    """Runs the studies that are asked for, one after the other, and prints what they found.

    Raises:
        InputError: If anything given cannot be used.
        KeyboardInterrupt: If interrupted; the same command goes on.
    """
    studies = chosen(config.names)
    if config.paper and not config.names:
        studies = tuple(study for study in studies if study.paper is not None)
    settings = [(study, setting_of(study, config)) for study in studies]
    for _, setting in settings:  # for its error, before the first study's minutes
        setting.model_arguments()
    tasks = dict.fromkeys(task for _, setting in settings for task in setting.tasks)
    for task in tasks:  # for its error, before the first task's hours
        load_task(DataArguments(task_name=task, data_dir=settings[0][1].data_dir))
    for study, setting in settings:
        folder = config.output_dir / study.name
        tables, record = run_study(study, setting, folder, command_of(study, config), config.quiet)
        print(f"{study.name}: {study.title}")
        for text in study.findings(tables).values():
            print(f"  {text}")
        print(f"  tables and figures are in {folder} (computed in {record['seconds']:.0f} s in all)")


_WORDS = {
    "tasks": "tasks {}",
    "seeds": "draws (seeds) {}",
    "num_train": "training examples {}",
    "num_eval": "validation examples {}",
    "max_seq_length": "texts cut at {} tokens",
    "lora_rank": "LoRA of rank {}",
    "lam_rel": "λ/μ₁ {}",
    "learning_rate": "learning rate {}",
    "paper_learning_rates": "learning rate of Adam {}",
    "stable_factors": "c {}",
    "step_size": "c {}",
    "warmup_ratio": "warm-up {} of the steps",
    "num_train_epochs": "epochs {}",
    "batch_size": "batch {}",
    "steps": "steps {}",
    "num_kernel": "examples of a kernel {}",
    "profile_examples": "examples of a profile {}",
    "select_examples": "examples that layers are chosen on {}",
}
"""What a notebook tells of a setting, in words."""

_CHOSEN_FROM = ("paper_learning_rates", "stable_factors")
"""Options of which a task chooses one value where there are several."""


def _in_words(setting: Mapping[str, Any], optimizer: str, cut: Mapping[str, Mapping[str, float]]) -> list[str]:
    """Writes what `_WORDS` knows of a setting, the optimizer, and the shares of texts that are cut."""
    names = [name for name in _WORDS if name in setting and setting[name] not in (0, [], ())]
    found = [
        _WORDS[name].format(_value(setting[name]))
        + " (one of them by task)" * (name in _CHOSEN_FROM and len(setting[name]) > 1)
        for name in names
    ]
    if optimizer:
        found.append(f"optimizer: {optimizer}")
    if cut:
        found.append("texts that are shortened: " + "; ".join(_cut(*one) for one in cut.items()))
    return found


def _value(value: Any) -> str:
    if isinstance(value, list | tuple):
        return ", ".join(name_of(item) if isinstance(item, str) else f"{item:g}" for item in value)
    return "all" if value in (None, WHOLE) else f"{value:g}"


def _cut(task: str, shares: Mapping[str, float]) -> str:
    words = {"train": "training", "eval": "validation"}
    each = [f"{100 * share:.1f} % of {words[split]}" for split, share in shares.items()]
    return f"{name_of(task)} {', '.join(each) if any(shares.values()) else 'none'}"


class Text(str):
    """Markdown that a notebook shows as such."""

    def _repr_markdown_(self) -> str:
        return str(self)


@dataclasses.dataclass(frozen=True, eq=False)
class Picture:
    """A figure that a notebook shows, whatever its backend.

    Attributes:
        figure: It.
        vector: Keep it as SVG, too; those of studies lie beside their tables.
    """

    figure: Figure
    vector: bool = False

    def _repr_png_(self) -> bytes:
        from PIL import Image

        drawn, small = io.BytesIO(), io.BytesIO()
        self.figure.savefig(drawn, format="png", dpi=165)
        palette = Image.open(drawn).convert("RGB").quantize(256, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE)
        palette.save(small, format="png", optimize=True)  # a notebook keeps it as text
        return small.getvalue()

    def _repr_svg_(self) -> str | None:
        if not self.vector:
            return None
        stream = io.StringIO()
        with plots.drawing():
            self.figure.savefig(stream, format="svg", metadata=plots.NO_METADATA)
        return stream.getvalue()


@dataclasses.dataclass(frozen=True, eq=False)
class Opened:
    """A study as a notebook tells it.

    Attributes:
        study: Which.
        tables: Its tables.
        record: Command, setting, hardware, seconds, versions, hashes of the data, shares of the texts that are cut; of
            kept ones also `about`, what else there is to say.
    """

    study: Study
    tables: Mapping[str, Sequence[Row]]
    record: Mapping[str, Any]

    def about(self) -> Text:
        """What was run: command, hardware, time taken; and in which setting."""
        record, setting = self.record, self.record["setting"]
        minutes = record["seconds"] / 60
        took = f"{minutes:.0f} minutes" if minutes >= 2 else f"{record['seconds']:.0f} seconds"
        return Text(
            f"**Command** `{record['command']}` · **model** {setting['model_name_or_path']} · **hardware** "
            f"{record['cores']} cores ({record['machine']}), {record['device']} · **time taken** {took} · "
            f"**JAX** {record['versions']['jax']}"
            + (f" · {record['about']}" if "about" in record else "")
            + f"\n\n**Setting** {' · '.join(_in_words(setting, self.study.full.optimizer, record.get('cut', {})))}"
        )

    @functools.cached_property
    def findings(self) -> dict[str, str]:
        """What was found, by name."""
        return self.study.findings(self.tables)

    @functools.cached_property
    def figures(self) -> dict[str, Figure]:
        """Figures by name, which matplotlib's interactive side forgets."""
        import matplotlib.pyplot as plt

        drawn = self.study.draw(self.tables)
        for figure in drawn.values():
            plt.close(figure)
        return drawn

    def found(self, name: str) -> Text:
        """One finding; its numbers are the tables'."""
        return Text(self.findings[name])

    def show(self, name: str) -> Picture:
        """One figure."""
        return Picture(self.figures[name])


def open_study(name: str, results: Path | str = "results") -> Opened:
    """Opens a study for a notebook: the tables that are kept, or, with `JAXLIN_NOTEBOOKS=fast`, a small run here.

    Args:
        name: Number or name.
        results: Folder of kept results, one folder a study.

    Returns:
        The study with its tables.

    Raises:
        InputError: If there is no such study, or no kept tables of it.
    """
    (study,) = chosen([name])
    if os.environ.get(FAST_SWITCH) == "fast":
        with tempfile.TemporaryDirectory() as folder:
            command = f"jaxlin figures {study.name} --fast"
            return Opened(study, *run_study(study, study.fast, Path(folder) / study.name, command, quiet=True))
    kept = Path(results) / study.name
    if not (kept / "record.json").is_file():
        raise InputError(f"{kept} holds no results; run `jaxlin figures {study.name} --full --output_dir {results}`")
    return Opened(study, read_tables(kept), json.loads((kept / "record.json").read_text()))
