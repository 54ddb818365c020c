"""Progress with rate and time left: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

PLAIN_INTERVAL_S = 10.0
UNITS = {
    "Jacobians": "examples",
    "trunk": "examples",
    "training": "steps",
    "linearization report": "steps",
    "kernel tiles": "tiles",
    "candidates": "candidates",
    "derivatives": "models",
}
"""By what a phase's name begins with."""


def _clock(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"


class ProgressReporter:
    """Shows phases of long work on standard error and hands plain lines to a log.

    The rate counts from the first report of a phase on, so that compilation before it is left out.
    """

    def __init__(self, log: Callable[[str], None], quiet: bool = False) -> None:
        """Prepares to report.

        Args:
            log: Called with each plain line.
            quiet: Show nothing on standard error.
        """
        self._log = log
        self._quiet = quiet
        self._bar: Progress | None = None
        if sys.stderr.isatty() and not quiet:
            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(bar_width=30),
                MofNCompleteColumn(),
                TextColumn("{task.fields[speed]}"),
                console=Console(stderr=True),
            )
        self._tasks: dict[str, int] = {}
        self._first: dict[str, tuple[float, int]] = {}
        self._last_line: dict[str, float] = {}
        self._note = ""

    def __enter__(self) -> ProgressReporter:
        """Starts the bar."""
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        """Stops the bar, leaving what it showed."""
        if self._bar is not None:
            self._bar.stop()

    def say(self, text: str) -> None:
        """Shows and logs a line."""
        self._log(text)
        if self._bar is not None:
            self._bar.console.print(text, highlight=False)
        elif not self._quiet:
            print(text, file=sys.stderr, flush=True)

    def note(self, text: str) -> None:
        """Sets what is shown behind the rate of `training` from now on, such as the loss."""
        self._note = text

    def update(self, phase: str, done: int, total: int) -> None:
        """Reports `done` of `total` units of a phase."""
        now = time.monotonic()
        start, done_then = self._first.setdefault(phase, (now, done))
        speed = ""
        if done > done_then:
            rate = (done - done_then) / (now - start)
            unit = next((unit for name, unit in UNITS.items() if phase.startswith(name)), "units")
            speed = f"{rate:.1f} {unit}/s, {_clock((total - done) / rate)} left"
        if self._note and phase == "training":
            speed = f"{speed}, {self._note}".removeprefix(", ")
        if self._bar is not None:
            if phase not in self._tasks:
                self._tasks[phase] = self._bar.add_task(phase, total=total, speed="")
            self._bar.update(self._tasks[phase], completed=done, total=total, speed=speed)  # type: ignore[arg-type]
        if done >= total or now - self._last_line.get(phase, -PLAIN_INTERVAL_S) >= PLAIN_INTERVAL_S:
            self._last_line[phase] = now
            line = f"{phase}: {done}/{total}" + (f", {speed}" if speed else "")
            self._log(line)
            if self._bar is None and not self._quiet:
                print(line, file=sys.stderr, flush=True)
