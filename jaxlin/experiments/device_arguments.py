"""Which devices and processes a command runs on."""

from __future__ import annotations

import dataclasses

import jax
from jax.sharding import Mesh

from jaxlin.distributed import initialize
from jaxlin.errors import InputError
from jaxlin.mesh import make_mesh
from jaxlin.sharding import DATA, DECODER_RULES, ENCODER_RULES, Rules


@dataclasses.dataclass(frozen=True)
class MeshArguments:
    """Devices and processes.

    Attributes:
        mesh: Devices that share the examples, such as data=8; auto: all of them, of all processes that the environment
            names (TPU pods, SLURM).
        coordinator_address: host:port of process 0, where the environment does not say.
        num_processes: Number of processes, all with this command, likewise.
        process_id: Which of them this is, from 0, likewise.
    """

    mesh: str | None = None
    coordinator_address: str | None = None
    num_processes: int | None = None
    process_id: int | None = None


@dataclasses.dataclass(frozen=True)
class DeviceArguments(MeshArguments):
    """Devices and their memory.

    Attributes:
        mesh: Devices to train on, such as data=4,model=2: examples over 4, parameters over 2; auto: data=all of
            them, of all processes that the environment names (TPU pods, SLURM).
        gradient_accumulation_steps: Times that a device computes before each step, for less memory.
        gradient_checkpointing: Compute the activations of each layer anew in derivatives: less memory, more time.
        bf16: Compute with bfloat16 weights and activations; parameters, optimizer, loss and evaluation stay float32.
    """

    gradient_accumulation_steps: int = 1
    gradient_checkpointing: bool = False
    bf16: bool = False


def mesh_axes(text: str) -> dict[str, int]:
    """Returns the axes that `--mesh` names, and their sizes.

    Raises:
        InputError: If it is not name=size, separated by commas, with an axis for the examples.
    """
    axes: dict[str, int] = {}
    for word in text.split(","):
        name, _, size = word.partition("=")
        if name not in (DATA, "model") or not size.isdecimal() or name in axes:
            raise InputError(f"--mesh {text}: expected data=N or data=N,model=M with whole numbers, or auto")
        axes[name] = int(size)
    return {DATA: 1, **axes}


def mesh_and_rules(arguments: MeshArguments) -> tuple[Mesh | None, Rules]:
    """Joins the processes and makes the mesh that was asked for.

    Args:
        arguments: The options.

    Returns:
        The mesh, `None` for one device, and the rules for its axis `model`, if it has one.

    Raises:
        InputError: If processes, mesh or number of devices do not fit.
    """
    given = arguments.coordinator_address, arguments.num_processes, arguments.process_id
    axes = None if arguments.mesh in (None, "auto") else mesh_axes(str(arguments.mesh))
    if arguments.mesh is not None or any(value is not None for value in given):
        initialize(*given)
    if arguments.mesh is None and jax.process_count() == 1:
        return None, ()
    mesh = make_mesh(axes)
    return mesh, (*ENCODER_RULES, *DECODER_RULES) if "model" in mesh.shape else ()
