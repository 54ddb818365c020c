"""What a run took: time to compile apart from time of steps, memory, and a trace of a few steps."""

from __future__ import annotations

import contextlib
import resource
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax

_COMPILING = ("/jax/core/compile/jaxpr_to_mlir_module_duration", "/jax/core/compile/backend_compile_duration")
PROFILED_STEPS = range(3, 8)
"""Steps of an arm that are traced: the first ones compile."""


def peak_memory() -> dict[str, Any]:
    """Returns the largest use of memory so far: of the first device where it counts, else of this process (bytes)."""
    device = jax.local_devices()[0]
    if (stats := device.memory_stats()) and "peak_bytes_in_use" in stats:
        return {"peak_memory_bytes": int(stats["peak_bytes_in_use"]), "peak_memory_of": str(device)}
    unit = 1 if sys.platform == "darwin" else 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return {"peak_memory_bytes": int(peak), "peak_memory_of": "process"}


class RunClock:
    """Tells the time of training steps apart from what JAX spends on compiling.

    Attributes:
        compile_seconds: Spent on lowering and compiling, or on loading what was compiled before.
    """

    def __init__(self) -> None:
        self.compile_seconds = 0.0
        self._last = time.monotonic(), 0.0
        self._arm: str | None = None
        self._seconds: dict[str, float] = {}
        self._rows: dict[str, int] = {}

    def _listen(self, event: str, duration_secs: float, **_: Any) -> None:
        if event in _COMPILING:
            self.compile_seconds += duration_secs

    @contextlib.contextmanager
    def running(self) -> Iterator[RunClock]:
        """Counts what is compiled inside of it."""
        jax.monitoring.register_event_duration_secs_listener(self._listen)
        try:
            yield self
        finally:
            jax.monitoring.unregister_event_duration_listener(self._listen)

    def step(self, arm: str) -> None:
        """Counts the time since the last call as a step of `arm`, if that was one of this arm too."""
        now = time.monotonic(), self.compile_seconds
        if arm == self._arm:
            taken = (now[0] - self._last[0]) - (now[1] - self._last[1])
            self._seconds[arm] = self._seconds.get(arm, 0.0) + max(taken, 0.0)
            self._rows[arm] = self._rows.get(arm, 0) + 1
        self._last, self._arm = now, arm

    def summary(self) -> dict[str, Any]:
        """Returns `compile_seconds`, the mean `step_seconds` of every arm (evaluation included), and peak memory."""
        means = {arm: self._seconds[arm] / self._rows[arm] for arm in self._rows}
        return {"compile_seconds": self.compile_seconds, "step_seconds": means, **peak_memory()}


class StepProfiler:
    """Writes JAX traces of `PROFILED_STEPS`, each arm's in a folder of its own, for Perfetto or TensorBoard."""

    def __init__(self, folder: Path | None) -> None:
        """Prepares.

        Args:
            folder: Where traces go; `None`: nothing is traced.
        """
        self._folder = folder
        self._tracing: str | None = None
        self._done: set[str] = set()

    def step(self, arm: str, step: int) -> None:
        """Is told of every step after it; starts and stops traces. An arm is traced once, at its first λ."""
        if self._folder is None:
            return
        if self._tracing is not None and (arm != self._tracing or step >= PROFILED_STEPS[-1]):
            self.stop()
        elif self._tracing is None and arm not in self._done and step == PROFILED_STEPS[0] - 1:
            jax.profiler.start_trace(str(self._folder / arm))
            self._tracing = arm
            self._done.add(arm)

    def stop(self) -> None:
        """Writes the trace that is being taken, if any."""
        if self._tracing is not None:
            jax.profiler.stop_trace()
            self._tracing = None
