"""The errors that the command line shows as one sentence."""

import errno
import signal


class InputError(ValueError):
    """What the caller gave cannot be used; the message says what was given, what is expected, what to do."""


class TrainingDivergedError(FloatingPointError):
    """The loss became NaN or infinite; the message says at which step."""


class Interrupted(KeyboardInterrupt):
    """A signal ended the work; the message says what was saved.

    Attributes:
        signal: Which: `SIGINT` (Ctrl-C) or `SIGTERM` (pre-emption).
    """

    def __init__(self, message: str = "interrupted", signum: int = signal.SIGINT) -> None:
        super().__init__(message)
        self.signal = signal.Signals(signum)


class DeviceMemoryError(MemoryError):
    """A training step, or a kernel over a mesh, does not fit a device's memory; the message says what to lower."""


class ProcessLostError(RuntimeError):
    """A computation over several processes failed since one of them has ended; the message says how to go on."""


RUN_ERRORS = (TrainingDivergedError, DeviceMemoryError, ProcessLostError)
"""Those that end a run that had begun."""

NO_SPACE = (errno.ENOSPC, errno.EDQUOT)
"""Numbers of an `OSError` that mean a full disk."""


def is_out_of_memory(error: Exception) -> bool:
    """Whether an error says that memory ran out, the host's or a device's."""
    return isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error)


def halved(size: int, what: str, error: Exception) -> tuple[int, str]:
    """Finds how to go on where memory ran out.

    Args:
        size: Examples that were computed together.
        what: What they are together, with `{}` in the place of their number.
        error: What was raised.

    Returns:
        Half of the size, and what to record of it.

    Raises:
        Exception: The error itself, where it is another or there is one example only.
    """
    if size == 1 or not is_out_of_memory(error):
        raise error
    return size // 2, f"out of memory in {what.format(size)}: {size // 2} from then on"
