"""Several processes as one program: their start, and their end when one of them is gone."""

from __future__ import annotations

import warnings

import jax

from jaxlin.errors import InputError

HEARTBEAT_SECONDS = 20
"""A process that was not heard of for so long is taken for dead, and the others end (JAX's default is 100)."""

SHUTDOWN_SECONDS = 20
"""How long a process that has finished or failed waits for the others to do so (JAX's default is 300)."""


def initialize(
    coordinator_address: str | None = None, num_processes: int | None = None, process_id: int | None = None
) -> None:
    """Joins this process with the others of its job, by `jax.distributed`; call it before anything else of JAX.

    Without arguments the environment says which processes there are, where JAX knows it (TPU pods, SLURM, Open MPI
    and others; every process runs the same command). Where it says nothing, or one process, nothing is done.

    When a process dies, the others fail in the next step (`ProcessLostError`), or are ended by JAX with a message
    when it has not been heard of for `HEARTBEAT_SECONDS`.

    Args:
        coordinator_address: `host:port` of process 0, the same in every process.
        num_processes: How many there are.
        process_id: Which of them this is, from 0.

    Raises:
        InputError: If only some of the three are given, one cannot be, or JAX is already in use.
        RuntimeError: If the others cannot be reached.
    """
    named = {"coordinator_address": coordinator_address, "num_processes": num_processes, "process_id": process_id}
    missing = [name for name, value in named.items() if value is None]
    if missing and len(missing) < len(named):
        given = ", ".join(f"{name}={value}" for name, value in named.items() if value is not None)
        raise InputError(
            f"{given} without {' and '.join(missing)}; give all three, or none to take them from the environment"
        )
    if not missing:
        assert num_processes is not None
        assert process_id is not None
        host, _, port = str(coordinator_address).rpartition(":")
        if not host or not port.isdecimal():
            raise InputError(f"coordinator_address={coordinator_address!r}; expected host:port of process 0")
        if num_processes < 1 or not 0 <= process_id < num_processes:
            raise InputError(
                f"process_id={process_id} of num_processes={num_processes}; expected 0 to num_processes - 1"
            )
    if jax.distributed.is_initialized() or num_processes == 1:
        return
    try:
        jax.distributed.initialize(
            coordinator_address,
            num_processes,
            process_id,
            heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
            shutdown_timeout_seconds=SHUTDOWN_SECONDS,
        )
    except ValueError as error:
        if not missing:
            raise InputError(f"these processes cannot be joined: {error}") from error
        # With nothing given: no cluster that JAX knows, so this process is alone.
    except RuntimeError as error:
        if "must be called before" not in str(error):
            raise
        if not missing:
            raise InputError("processes must be joined before anything else of JAX is used") from error
        warnings.warn("JAX was in use before other processes were looked for: this one works alone", stacklevel=2)
