"""The command line: parses, calls an experiment, turns its errors into one sentence."""

from __future__ import annotations

import contextlib
import io
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import tyro

from jaxlin.errors import RUN_ERRORS, InputError
from jaxlin.experiments import config_file
from jaxlin.experiments.bounds import BoundsConfig
from jaxlin.experiments.bounds import run as run_bounds
from jaxlin.experiments.compare import CompareConfig
from jaxlin.experiments.compare import run as run_compare
from jaxlin.experiments.export import ExportConfig
from jaxlin.experiments.export import run as run_export
from jaxlin.experiments.figures.run import FiguresConfig
from jaxlin.experiments.figures.run import run as run_figures
from jaxlin.experiments.kernel import KernelConfig
from jaxlin.experiments.kernel import run as run_ntk
from jaxlin.experiments.resume import options_of_resumed
from jaxlin.experiments.select import SelectConfig
from jaxlin.experiments.select import run as run_select
from jaxlin.interrupt import termination_interrupts

EXIT_FAILED, EXIT_BAD_INPUT, EXIT_SIGNALLED = 1, 2, 128


def set_up() -> None:
    """Quietens imports and keeps compiled programs, unless the environment says otherwise."""
    import jax

    for stream in (sys.stdout, sys.stderr):  # λ and θ must not end a run whose terminal cannot show them
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        jax.config.update("jax_compilation_cache_dir", str(home / "jaxlin" / "compiled"))


def compare(config: Annotated[CompareConfig, tyro.conf.arg(name="")]) -> None:
    """Fine-tune a model in full and linearized, over a sweep of pulls λ, and say how close the two are."""
    run_compare(config)


def ntk(config: Annotated[KernelConfig, tyro.conf.arg(name="")]) -> None:
    """Compute the tangent kernel of what is tuned, with a kernel for every layer, and its spectrum."""
    run_ntk(config)


def bounds(config: Annotated[BoundsConfig, tyro.conf.arg(name="")]) -> None:
    """Run descent, full and linearized, over a sweep of pulls λ, and hold every bound of the theory against it."""
    run_bounds(config)


def select(config: Annotated[SelectConfig, tyro.conf.arg(name="")]) -> None:
    """Choose which layers and modules to adapt, by tangent kernels before anything is trained."""
    run_select(config)


def export(config: Annotated[ExportConfig, tyro.conf.arg(name="")]) -> None:
    """Write tuned weights of a compare run, or an adapter, for transformers or for peft."""
    run_export(config)


def figures(config: Annotated[FiguresConfig, tyro.conf.arg(name="")]) -> None:
    """Make the paper's figures again, from computing to drawing."""
    run_figures(config)


def doctor() -> None:
    """Print versions, devices, precision, what can be imported, and where models and data are found."""
    from jaxlin.experiments.doctor import report

    for topic, text in report().items():
        print(f"{topic:>18}  {text}")


@contextlib.contextmanager
def one_sentence(debug: bool = False) -> Iterator[None]:
    """Ends the program on an error of the user's, or of a run, with one sentence and its exit code.

    Args:
        debug: Whether errors are shown with their traceback instead.

    Raises:
        InputError: With `debug`, as it came.
        TrainingDivergedError: Likewise.
        DeviceMemoryError: Likewise.
        ProcessLostError: Likewise.
    """
    try:
        yield
    except (InputError, *RUN_ERRORS) as error:
        if debug:
            raise
        print(f"jaxlin: {error}", file=sys.stderr)
        sys.exit(EXIT_BAD_INPUT if isinstance(error, InputError) else EXIT_FAILED)
    except KeyboardInterrupt as error:
        print(f"jaxlin: {str(error) or 'interrupted'}", file=sys.stderr)
        sys.exit(EXIT_SIGNALLED + getattr(error, "signal", signal.SIGINT))


def main() -> None:
    """Runs the command line; exits with 2 on bad input, 1 on a failed run, 130 when interrupted, 143 on SIGTERM."""
    set_up()
    words = sys.argv[1:]
    with one_sentence("--debug" in words), termination_interrupts():
        commands = {"compare": CompareConfig, "ntk": KernelConfig, "select": SelectConfig, "bounds": BoundsConfig}
        configured = commands.get(words[0]) if words else None
        if configured is not None and (file := config_file.find(words) or options_of_resumed(words)) is not None:
            # Before the others, so that what stands on the command line counts.
            known = set(config_file.flat_options(configured())) - {"config", "debug"}
            words[1:1] = config_file.read(file, known)
        tyro.extras.subcommand_cli_from_dict(
            {
                "compare": compare,
                "ntk": ntk,
                "select": select,
                "bounds": bounds,
                "export": export,
                "figures": figures,
                "doctor": doctor,
            },
            prog="jaxlin",
            description="Linearized fine-tuning of transformer language models.",
            config=(tyro.conf.OmitArgPrefixes,),
            args=words,
        )
