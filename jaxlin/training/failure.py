"""What a failing device or process means for a run, and what to change."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import jax
from jax.sharding import Mesh

from jaxlin.errors import DeviceMemoryError, ProcessLostError, is_out_of_memory
from jaxlin.linearize import Linearized
from jaxlin.sharding import DATA
from jaxlin.training.config import TrainConfig
from jaxlin.training.groups import Groups
from jaxlin.tunable import Batch, Tunable, text_config


def _to_lower(config: TrainConfig, tun: Tunable, batch: Batch, parts: int, mesh: Mesh | None, runs: int) -> list[str]:
    """What makes a step take less memory, that which leaves the result as it is first; a batch in some parts."""
    devices = 1 if mesh is None else mesh.shape[DATA]
    held = len(batch["weight"]) // (parts * devices)
    parts = config.gradient_accumulation_steps
    listed = [f"the runs that are trained together, from {runs} to {-(-runs // 2)}"] if runs > 1 else []
    if held > 1:
        listed.append(
            f"gradient_accumulation_steps from {parts} to {2 * parts} (a device then holds the activations of "
            f"{runs * -(-held // 2)} examples at a time in place of {runs * held}; the step stays the same)"
        )
    if getattr(text_config(tun.apply), "remat", None) is False:
        listed.append("--gradient_checkpointing (with_remat(model)), for a third more time")
    if isinstance(tun.apply, Linearized):
        listed.append("linear_mode='cached', which needs no network, where the Jacobian fits")
    if config.compute_dtype == "float32":
        listed.append("compute_dtype='bfloat16', which halves activations")
    if "input_ids" in batch and held == 1:
        listed.append(f"max_seq_length from {batch['input_ids'].shape[1]} to {batch['input_ids'].shape[1] // 2}")
    if runs > 1:  # which no mesh takes
        return listed
    split = "a mesh with more devices on its axis 'model'" if mesh is not None else "a mesh with an axis 'model'"
    rules = "rules (ENCODER_RULES, DECODER_RULES)"
    listed.append(f"the parameters on each device, by {split} and {rules}, where they are what is large")
    return listed


def _shape(batch: Batch) -> str:
    """The size of a batch in words."""
    if "input_ids" in batch:
        return "×".join(map(str, batch["input_ids"].shape)) + " tokens"
    return f"{len(batch['weight'])} examples"


@contextlib.contextmanager
def explained(
    step: int, config: TrainConfig, tun: Tunable, batch: Batch | Groups, mesh: Mesh | None, runs: int = 1
) -> Iterator[None]:
    """Turns a device's error in a training step into one that says what to do.

    Args:
        step: Which step it is.
        config: Of the run.
        tun: What is trained.
        batch: Of the step.
        mesh: The devices; `None` for one.
        runs: How many are trained together.

    Raises:
        DeviceMemoryError: If memory ran out.
        ProcessLostError: If a computation over several processes failed otherwise.
        jax.errors.JaxRuntimeError: Any other, as it came.
    """
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if is_out_of_memory(error):
            groups = batch if isinstance(batch, Groups) else Groups((batch,), (config.gradient_accumulation_steps,))
            shape = ", ".join(map(_shape, groups.batches))
            shape += f" in each of {runs} runs" if runs > 1 else ""
            lower = _to_lower(config, tun, groups.batches[-1], groups.parts[-1], mesh, runs)
            raise DeviceMemoryError(
                f"out of memory in step {step}, a batch of {shape}. Lower, first that which leaves the result as it "
                f"is: {'; '.join(lower)}. The device said: {str(error).splitlines()[0]}"
            ) from error
        if mesh is not None and mesh.is_multi_process:
            raise ProcessLostError(
                f"step {step} failed in process {jax.process_index()} of {jax.process_count()}, as it does where "
                "another process has ended or cannot be reached; look at the end of the others' logs, then start all "
                f"of them again, from the last checkpoint. The device said: {str(error).splitlines()[0]}"
            ) from error
        raise
