"""`jaxlin ntk`: the tangent kernel of a pretrained transformer on real text, with its spectrum."""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
from jax.sharding import Mesh
from rich import box
from rich.table import Table

from jaxlin import plots
from jaxlin.data.dataset import Dataset
from jaxlin.errors import InputError
from jaxlin.experiments.data_arguments import DataArguments, check_numbers
from jaxlin.experiments.device_arguments import MeshArguments, mesh_and_rules
from jaxlin.experiments.model_arguments import ModelArguments, starts_as_probe
from jaxlin.experiments.progress import ProgressReporter
from jaxlin.experiments.record import options_file, resolved
from jaxlin.experiments.resume import check_resume, resume_command
from jaxlin.experiments.run_arguments import OutputArguments
from jaxlin.experiments.run_folder import RunFolder, SilentFolder, write_csv, write_json
from jaxlin.experiments.setting import Loaded, load
from jaxlin.experiments.tables import make_console, spectrum_line
from jaxlin.experiments.tuned_arguments import TunedArguments, tune
from jaxlin.mesh import from_first
from jaxlin.ntk.engine import ntk, ntk_estimate, ntk_plan
from jaxlin.ntk.kernel import Kernel
from jaxlin.ntk.kinds import kind_of
from jaxlin.ntk.work import Cost
from jaxlin.theory.spectrum import Spectrum, spectrum
from jaxlin.training.modes import size
from jaxlin.tunable import Tunable

STORE, EVAL_STORE = "kernel.zarr", "kernel_eval.zarr"


@dataclasses.dataclass(frozen=True)
class KernelArguments:
    """The kernel.

    Attributes:
        num_samples: Training examples, stratified.
        num_eval_samples: Also the kernel of so many validation examples with the training examples.
        blocks: Parameters whose kernels are kept apart.
        kind: Of kernel; signgd and asymmetric_signgd are of the signs of derivatives.
        nearest_psd: For asymmetric_signgd: the spectrum of the nearest symmetric positive semidefinite kernel.
        engine: How; auto says what it chose.
        dtype: Of the Jacobian; float64 tells condition numbers to 1e14.
        precision: Of matrix products on the device; highest is true float32.
        memory_budget: GiB held at a time, beside the model; with a mesh, on each device.
        check_examples: Examples whose Jacobian is recomputed in float64, to measure its error.
        seed: Of head, A and subsets.
        estimate: Say what it takes in time, memory and disk, and stop.
        resume: Go on with the kernel in output_dir; start one if there is none.
    """

    num_samples: int = 256
    num_eval_samples: int = 0
    blocks: Literal["layer", "module", "leaf"] = "layer"
    kind: Literal["full", "trace", "diagonal", "logit_difference", "pseudo", "signgd", "asymmetric_signgd"] = "full"
    nearest_psd: bool = False
    engine: Literal["auto", "jacobian", "factored"] = "auto"
    dtype: Literal["parameters", "float64"] = "parameters"
    precision: Literal["highest", "high", "default"] = "highest"
    memory_budget: float = 4.0
    check_examples: int = 2
    seed: int = 0
    estimate: bool = False
    resume: bool = False


@dataclasses.dataclass(frozen=True)
class KernelConfig:
    """Compute the tangent kernel of what is tuned, with a kernel for every layer, and its spectrum.

    Attributes:
        kernel: The kernel.
        model: The model.
        data: The data.
        tuned: What is tuned.
        devices: On what.
        output: Where results go.
    """

    kernel: KernelArguments = dataclasses.field(default_factory=KernelArguments)
    model: ModelArguments = dataclasses.field(default_factory=ModelArguments)
    data: DataArguments = dataclasses.field(default_factory=DataArguments)
    tuned: TunedArguments = dataclasses.field(default_factory=TunedArguments)
    devices: MeshArguments = dataclasses.field(default_factory=MeshArguments)
    output: OutputArguments = dataclasses.field(default_factory=OutputArguments)


def _check(config: KernelConfig) -> None:
    """Refuses what cannot be meant.

    Raises:
        InputError: If something is.
    """
    arguments, output = config.kernel, config.output
    check_numbers(arguments, config.data, num_samples=1, num_eval_samples=0, check_examples=0)
    if arguments.nearest_psd and kind_of(arguments.kind).symmetric:
        raise InputError(f"--nearest_psd is for --kind asymmetric_signgd; {arguments.kind} is symmetric as it is")
    check_resume(arguments.resume, output, "ntk", "a kernel")


def block_table(kernel: Kernel) -> list[dict[str, Any]]:
    """Returns every block's shares of the kernel.

    Args:
        kernel: Of examples with themselves.

    Returns:
        A row a block: how many leaves it has, its share of the trace, and `norm_share` ⟨K_ℓ, K⟩/‖K‖²; both sum to 1.
    """
    whole = kernel.array
    total, norm = _trace(whole), float(np.sum(whole**2))
    rows = []
    for name, part in kernel.parts.items():
        row: dict[str, Any] = {"block": name, "leaves": len(kernel.leaves[name])}
        row["trace_share"] = _trace(part) / total if total else None
        row["norm_share"] = float(np.sum(part * whole)) / norm if norm else None
        rows.append(row)
    return rows


def _trace(array: np.ndarray) -> float:
    """Sum over examples, and over outputs where there are."""
    own = array[np.arange(len(array)), np.arange(len(array))]
    return float(np.einsum("ncc->", own) if own.ndim == 3 else own.sum())


def cost_lines(cost: Cost, num_blocks: int) -> list[str]:
    """Says what a kernel will take."""
    plan = cost.plan
    devices = f" on each of {cost.devices} devices" if cost.devices > 1 else ""
    return [
        f"engine {cost.engine}: passes of {plan.chunk} examples, tiles of {plan.row_block} × {plan.row_block} examples",
        f"time   about {cost.seconds:.3g} s on this machine ({cost.pass_seconds:.3g} s of it passes over the data), "
        f"and {cost.compile_seconds:.3g} s to compile",
        f"memory about {size(cost.memory_bytes)}{devices} beside the model",
        f"disk   {size(cost.disk_bytes)} while it runs, {size(cost.kernel_bytes)} in the end ({num_blocks} blocks)",
    ]


def _mesh(config: KernelConfig) -> Mesh | None:
    """Returns the mesh that was asked for; joins the processes.

    Raises:
        InputError: If it cannot be had, or the rest does not go with it.
    """
    mesh, rules = mesh_and_rules(config.devices)
    if mesh is None:
        return None
    if rules:
        raise InputError(
            f"--mesh {config.devices.mesh}: a kernel's examples are split, not parameters; expected data=N or auto"
        )
    if jax.process_count() > 1 and config.output.output_dir is None and not config.kernel.estimate:
        raise InputError("several processes need one --output_dir, in a file system that all of them see")
    return mesh


def _options(arguments: KernelArguments, mesh: Mesh | None) -> dict[str, Any]:
    return {
        "mesh": mesh,
        "kind": arguments.kind,
        "blocks": arguments.blocks,
        "engine": arguments.engine,
        "dtype": None if arguments.dtype == "parameters" else arguments.dtype,
        "precision": arguments.precision,
        "memory_budget": int(arguments.memory_budget * 2**30),
    }


def run(config: KernelConfig) -> Kernel | None:
    """Computes the kernel and writes its folder.

    Args:
        config: What to run.

    Returns:
        The kernel of the training examples, in every process; `None` where only an estimate was asked for.

    Raises:
        InputError: If anything given cannot be used; nothing has been written then. If the disk is full; what was
            computed is kept.
        KeyboardInterrupt: If interrupted; what was computed is kept.
    """
    begin, arguments = time.monotonic(), config.kernel
    _check(config)
    default = Path("runs") / time.strftime("ntk-%Y%m%d-%H%M%S")
    path = config.output.output_dir or default
    mesh = _mesh(config)
    first = jax.process_index() == 0  # the one that writes and shows
    if not arguments.estimate:
        given = path, config.output.overwrite_output_dir, arguments.resume
        from_first(lambda: RunFolder(*given) is not None)  # for its errors, in every process
        folder = (RunFolder if first else SilentFolder)(*given)
    sizes = {"train": arguments.num_samples, "eval": arguments.num_eval_samples}
    loaded = load(config.model, config.data, sizes, arguments.seed, "squared")
    tune(loaded.model, config.tuned, arguments.seed, False)  # for its errors, before the probe's pass
    if starts_as_probe(loaded.model, config.model):
        loaded = dataclasses.replace(loaded, model=loaded.probed())
    tun, _ = tune(loaded.model, config.tuned, arguments.seed, False)
    options = _options(arguments, mesh)
    wanted = _wanted(loaded, arguments)
    if arguments.estimate:
        for name, (what, data) in wanted.items():
            cost = ntk_estimate(tun, *data, **options, stored=True)
            if first:
                print(f"{name}: {what}", *cost_lines(cost, len(tun.grouped(arguments.blocks))), sep="\n  ")
        return None

    def check() -> None:
        for name, (_, data) in wanted.items():
            ntk_plan(tun, *data, **options, store=path / name, resume=arguments.resume)

    from_first(check)  # for its errors, before anything is written
    folder.open(resolved("ntk", config, loaded), options_file(config, loaded))
    try:
        with ProgressReporter(folder.line, config.output.quiet or not first) as progress:
            for line in loaded.lines(config.tuned.peft, tun.num_params, config.model.head_init):
                progress.say(line)
            kernel = _compute(wanted, tun, folder.path, arguments.check_examples, options, progress)
        if not first:
            return kernel
        results = _Results.of(kernel, arguments.nearest_psd)
        title = f"Spectrum of K₀ ({arguments.kind}), {len(loaded.data['train'])} examples"
        _write(results, title, folder.path, time.monotonic() - begin)
    except KeyboardInterrupt:
        folder.line("stopped: interrupted")
        if first:
            print(f"go on with: {resume_command('ntk', folder.path)}", flush=True)
        raise
    finally:
        folder.close()
    _print(results, folder.path, time.monotonic() - begin)
    return kernel


_Wanted = dict[str, tuple[str, tuple[Dataset, ...]]]
"""Store to what its kernel is of, in words and as data."""


def _wanted(loaded: Loaded, arguments: KernelArguments) -> _Wanted:
    """The kernel of the training examples, and, where asked for, that of evaluation examples with them."""
    train = loaded.data["train"]
    wanted: _Wanted = {STORE: (f"kernel of {len(train)} training examples", (train,))}
    if arguments.num_eval_samples:
        evaluation = loaded.data["eval"]
        what = f"kernel of {len(evaluation)} evaluation examples with the {len(train)} training examples"
        wanted[EVAL_STORE] = (what, (evaluation, train))
    return wanted


def _compute(
    wanted: _Wanted,
    tun: Tunable,
    path: Path,
    check_examples: int,
    options: Mapping[str, Any],
    progress: ProgressReporter,
) -> Kernel:
    """Computes the kernels; returns that of the training examples."""
    kernels = {}
    for name, (what, data) in wanted.items():
        progress.say(what)

        def report(phase: str, done: int, total: int, suffix: str = "" if name == STORE else " (evaluation)") -> None:
            progress.update(phase + suffix, done, total)

        check = check_examples if name == STORE else 0
        kernel = ntk(tun, *data, **options, store=path / name, resume=True, progress=report, check_examples=check)
        if name == STORE:
            progress.say(f"engine {kernel.info.engine}{f': {kernel.info.note}' if kernel.info.note else ''}")
        kernels[name] = kernel
    return kernels[STORE]


@dataclasses.dataclass(frozen=True, eq=False)
class _Results:
    """What is written of a kernel."""

    summary: dict[str, Any]
    table: list[dict[str, Any]]
    spectrum: Spectrum | None

    @classmethod
    def of(cls, kernel: Kernel, nearest_psd: bool) -> _Results:
        """Finds it; the spectrum, where asked for, is that of the nearest kernel that has one."""
        summary = {
            "kind": kernel.kind,
            "nearest_psd": nearest_psd,
            "shape": list(kernel.array.shape),
            "symmetric": kernel.symmetric,
        }
        analysed = kernel.nearest_psd() if nearest_psd else kernel
        spec = spectrum(analysed) if analysed.symmetric else None
        summary |= {"kernel": dataclasses.asdict(analysed.info), **(spec.summary() if spec else {})}
        return cls(summary, block_table(kernel), spec)


def _write(results: _Results, title: str, path: Path, seconds: float) -> None:
    write_csv(path / "table.csv", results.table)
    write_json(path / "all_results.json", {"summary": {**results.summary, "seconds": seconds}, "table": results.table})
    if (spec := results.spectrum) is not None:
        rows = [
            {"index": i, "eigenvalue": float(mu), "above_noise": bool(mu > spec.noise_floor)}
            for i, mu in enumerate(spec.eigenvalues, start=1)
        ]
        write_csv(path / "spectrum.csv", rows)
        plots.save(plots.spectrum(spec, title), path / "figures" / "spectrum")


def _print(results: _Results, path: Path, seconds: float) -> None:
    console, summary = make_console(), results.summary
    plain = functools.partial(console.print, highlight=False, markup=False, soft_wrap=True)
    shape, info = "×".join(map(str, summary["shape"])), summary["kernel"]
    plain(
        f"kernel {summary['kind']} [{shape}] by {info['engine']}, J in {info['dtype']}, precision {info['precision']}"
    )
    if results.spectrum is None:
        console.print("no spectrum: this kernel is not symmetric (--nearest_psd takes that of the nearest one that is)")
        plain("ε_J not measured" if info["epsilon_J"] is None else f"ε_J = {info['epsilon_J']:.1g}")
    else:
        plain(spectrum_line(summary))
    out = Table(title="Blocks: shares of trace and norm", title_justify="left", box=box.SIMPLE_HEAD)
    out.add_column("block")
    for heading in ("trace K_ℓ / trace K", "⟨K_ℓ, K⟩ / ‖K‖²"):
        out.add_column(heading, justify="right")
    for row in results.table:
        out.add_row(row["block"], *("" if row[k] is None else f"{row[k]:.2g}" for k in ("trace_share", "norm_share")))
    console.print(out)
    plain(f"written to {path} in {seconds:.0f} s")
