"""Signals that end a run: held back while a step is taken, so that what is saved is whole."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType

from jaxlin.errors import Interrupted

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


def _in_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()  # only there can handlers be set


def _interrupt(signum: int, _: FrameType | None) -> None:
    raise Interrupted("terminated" if signum == signal.SIGTERM else "interrupted", signum)


@contextlib.contextmanager
def termination_interrupts() -> Iterator[None]:
    """Makes SIGTERM (which ends a process at once) raise `Interrupted`, as Ctrl-C raises `KeyboardInterrupt`."""
    if not _in_main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, _interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def held_back() -> Iterator[Callable[[], int | None]]:
    """Holds SIGINT and SIGTERM back where Python handles them; a second one comes through at once.

    Yields:
        A function that returns the signal that came, or `None`; one that was never asked for comes through at the end.
    """
    if not _in_main_thread():
        yield lambda: None
        return
    came: list[int] = []
    told: list[int] = []
    # The others end the process without Python, or are ignored.
    handlers = {signum: handler for signum in _SIGNALS if callable(handler := signal.getsignal(signum))}

    def hold(signum: int, frame: FrameType | None) -> None:
        if came:
            handlers[signal.Signals(signum)](signum, frame)
        came.append(signum)

    for signum in handlers:
        signal.signal(signum, hold)

    def tell() -> int | None:
        told.extend(came[:1])
        return came[0] if came else None

    try:
        yield tell
    finally:
        for signum, handler in handlers.items():
            signal.signal(signum, handler)
        if came and not told:
            handlers[signal.Signals(came[0])](came[0], None)
