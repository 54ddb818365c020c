"""Checkpoints of a training run: written beside it, each whole or not at all, enough to go on to the bit."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import math
import shutil
import warnings
import zlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jaxtyping import PyTree

from jaxlin.errors import NO_SPACE, InputError
from jaxlin.hashing import differences
from jaxlin.training.config import TrainConfig
from jaxlin.training.state import Row, TrainState, copied
from jaxlin.tunable import Tunable

if TYPE_CHECKING:
    from orbax.checkpoint import CheckpointManager

_FULL = ("No space left", "Disk quota exceeded", "File too large")
"""How the libraries that write say it, where they do not say it by number."""


@dataclasses.dataclass(frozen=True)
class Checkpoints:
    """Where and when a training run is saved.

    Attributes:
        folder: Folder of this one run's checkpoints (for `compare`: of all the sweep's).
        every: Steps between two; `None`: only at the end, when interrupted, and where a state is kept anyway.
        keep: How many of the latest are kept while the run goes on; of one that is finished, the last.
        best: Column of the history (`"loss"`, `"eval_accuracy"`, …): the checkpoint where it is best is kept too;
            lower is better where the name ends in `loss`, higher elsewhere.
        inputs: What the run is of, by name, which a resumed run must be of too; `None`: hashes of model, θ₀ and data.

    Example:
        >>> import tempfile, jax.numpy as jnp, numpy as np, jaxlin as jl
        >>> tun = jl.Tunable(lambda theta, batch: batch["x"] @ theta["w"], {"w": jnp.zeros((3, 2))})
        >>> data = {"x": np.eye(3, dtype=np.float32), "labels": np.array([0, 1, 1])}
        >>> saving = jl.Checkpoints(tempfile.mkdtemp(), every=2)
        >>> run = jl.train(tun, data, config=jl.TrainConfig(max_steps=4), checkpoints=saving)
        >>> again = jl.train(tun, data, config=jl.TrainConfig(max_steps=4), checkpoints=saving, resume=True)
        >>> again.history == run.history
        True
    """

    folder: str | Path
    every: int | None = None
    keep: int = 2
    best: str | None = None
    inputs: Mapping[str, str] | None = None

    def check(self, config: TrainConfig, evaluated: bool) -> None:
        """Checks the values.

        Args:
            config: Of the run.
            evaluated: Whether it evaluates.

        Raises:
            InputError: Naming the first that cannot be.
        """
        for name, value in {"every": self.every, "keep": self.keep}.items():
            if value is not None and value < 1:
                raise InputError(f"checkpoints: {name}={value}; expected at least 1")
        if self.best is None or not self.best.startswith("eval_"):
            return
        if not evaluated or config.eval_steps is None:
            raise InputError(f"checkpoints: best={self.best!r} needs evaluation data and eval_steps")
        if self.every is not None and self.every % config.eval_steps:
            raise InputError(
                f"checkpoints: best={self.best!r} needs an evaluation at every checkpoint; every={self.every} "
                f"is no multiple of eval_steps={config.eval_steps}"
            )


@dataclasses.dataclass(frozen=True, eq=False)
class Saved:
    """What is needed to go on with a run.

    Attributes:
        state: Where it stands.
        history: Its rows so far.
        input: State of its input's iterator.
        states: Those that `keep` asked for, up to there.
    """

    state: TrainState
    history: list[Row]
    input: dict[str, Any]
    states: dict[int, TrainState]


class _DamagedError(Exception):
    """A checkpoint cannot be read, or is not what was written."""


def run_record(config: TrainConfig, **more: Any) -> dict[str, Any]:
    """Returns what a run is, as JSON holds it: its configuration (the `seed` is all the randomness it has) and more.

    An optax optimizer is known by the structure of its state alone: its numbers cannot be compared.
    """
    values = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)} | more
    if not isinstance(config.optimizer, str):
        state = jax.eval_shape(config.optimizer.init, jnp.zeros(1))
        values["optimizer"] = f"optax: {jax.tree.structure(state)}"
    record: dict[str, Any] = json.loads(json.dumps(values, default=lambda value: np.asarray(value).tolist()))
    return record


def _scores(history: Sequence[Row], name: str | None) -> dict[int, float]:
    """Returns by step what a column says, more being better."""
    found = {row["step"]: row[name] for row in history if name is not None and row.get(name) is not None}
    sign = -1 if str(name).endswith("loss") else 1
    return {step: sign * value for step, value in found.items() if math.isfinite(value)}


class RunCheckpoints:
    """The checkpoints of one run, by step, through Orbax: written by threads while the run goes on."""

    def __init__(
        self, config: Checkpoints, run: Mapping[str, Any], keep: Collection[int], total: int, resume: bool
    ) -> None:
        """Opens the folder; what a process that was killed left half-written is removed.

        Args:
            config: Where and when.
            run: Of `run_record`.
            keep: Steps whose checkpoints are never deleted.
            total: Steps of the run.
            resume: Whether there may be some already.

        Raises:
            InputError: If there are and may not, or the folder cannot be made.
        """
        import orbax.checkpoint as ocp

        self.config, self._run, self._keep, self._total = config, dict(run), frozenset(keep), total
        self._scores: dict[int, float] = {}
        self._being_written = (0, 0)
        self.path = Path(config.folder).absolute()
        if not resume and self.path.exists() and (self.path.is_file() or any(self.path.iterdir())):
            raise InputError(f"{self.path} holds checkpoints already; go on with resume=True, or give another folder")
        if jax.process_count() > 1:  # no process makes it while another looks
            multihost_utils.sync_global_devices("jaxlin checkpoints")
        options = ocp.CheckpointManagerOptions(preservation_policy=self, cleanup_tmp_directories=True)
        try:
            self._manager = ocp.CheckpointManager(self.path, options=options)
        except OSError as error:
            raise InputError(f"checkpoints cannot be made in {self.path}: {error.strerror or error}") from error

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        """Says for each of Orbax's checkpoints, oldest first, whether it is kept: its preservation policy."""
        steps = [checkpoint.step for checkpoint in checkpoints]
        kept = {*self._keep, *steps[-1 if steps and steps[-1] == self._total else -self.config.keep :]}
        scored = [step for step in steps if step in self._scores]
        if scored:
            kept.add(max(scored, key=lambda step: self._scores[step]))
        return [step in kept for step in steps]

    def due(self, step: int) -> bool:
        """Whether a checkpoint is to be saved after `step`."""
        every = self.config.every
        return step == self._total or step in self._keep or (every is not None and step > 0 and step % every == 0)

    def save(self, state: TrainState, history: Sequence[Row], at: Mapping[str, Any]) -> None:
        """Begins to save; returns as soon as the arrays may change.

        Args:
            state: Where the run stands; a step that is there already is left as it is.
            history: All rows so far.
            at: State of the input's iterator.

        Raises:
            InputError: If the disk is full, now or at the checkpoint before.
        """
        import orbax.checkpoint as ocp

        if state.step in self._manager.all_steps():
            return
        arrays: tuple[PyTree, PyTree] = state.theta, state.optimizer
        if jax.default_backend() == "cpu":  # where the host's view of an array is the array, which a step takes over
            arrays = copied(arrays)
        about: dict[str, Any] = {
            "run": self._run,
            "step": state.step,
            "input": dict(at),
            "dtypes": {"theta": _dtypes(arrays[0]), "optimizer": _dtypes(arrays[1])},
            "checksums": {"theta": _checksums(arrays[0]), "optimizer": _checksums(arrays[1])},
            "history": list(history),
        }
        self._scores |= _scores(history[-1:], self.config.best)
        self._finish()
        self._being_written = state.step, sum(leaf.nbytes for leaf in jax.tree.leaves(arrays))
        with self._room():
            self._manager.save(
                state.step,
                args=ocp.args.Composite(
                    theta=ocp.args.StandardSave(arrays[0]),
                    optimizer=ocp.args.StandardSave(arrays[1]),
                    about=ocp.args.JsonSave({**about, "crc32": _text_checksum(about)}),
                ),
            )

    @contextlib.contextmanager
    def _room(self, needed: bool = True) -> Iterator[None]:
        """Says that the disk is full, where it is, in a sentence; `needed`: where it is seen to be, too."""
        step, size = self._being_written
        free = shutil.disk_usage(self.path).free
        try:
            if needed and free < size:
                raise OSError(errno.ENOSPC, "No space left")
            yield
        except Exception as error:
            if not _says_full(error):
                raise
            whole = [done for done in self._manager.all_steps() if (self.path / str(done)).is_dir()]
            good = f"that of step {max(whole)} is whole" if whole else "there is none before it"
            raise InputError(
                f"no space is left for the checkpoint of step {step}, which takes {size / 2**20:.1f} MiB, in "
                f"{self.path}, where {free / 2**20:.1f} MiB are free; {good}: free some and go on "
                "(resume=True, --resume_from_checkpoint)"
            ) from error

    def _finish(self) -> None:
        with self._room(needed=False):
            self._manager.wait_until_finished()

    def last(self) -> str:
        """Says which checkpoint is the last that is whole."""
        self._finish()
        step = self._manager.latest_step()
        return "there is no checkpoint" if step is None else f"the last checkpoint, of step {step}, is in {self.path}"

    def restore(self, template: TrainState) -> Saved | None:
        """Returns the last checkpoint that can be read, with all states that are kept up to there.

        Args:
            template: A state of the same shapes; arrays come back on its devices.

        Returns:
            It, or `None` if there are no checkpoints.

        Raises:
            InputError: If they are of another run, or none can be read.
        """
        steps, damaged = sorted(self._manager.all_steps(), reverse=True), []
        for step in steps:
            try:
                state, about = self._load(step, template)
                kept = [k for k in self._keep if template.step < k <= step or k == template.step == 0]
                states = {k: self._load(k, template)[0] for k in sorted(kept)}
            except _DamagedError as error:
                damaged.append(str(error))
                continue
            if damaged:
                warnings.warn(f"{'; '.join(damaged)}; going on from step {step}", RuntimeWarning, stacklevel=2)
                for later in steps[: steps.index(step)]:  # made again, the same to the bit
                    self._manager.delete(later)
            self._scores = _scores(about["history"], self.config.best)
            return Saved(state, about["history"], about["input"], states)
        if steps:
            raise InputError(f"no checkpoint in {self.path} can be read: {'; '.join(damaged)}; give another folder")
        return None

    def _load(self, step: int, template: TrainState) -> tuple[TrainState, dict[str, Any]]:
        if step not in self._manager.all_steps():
            raise _DamagedError(f"the checkpoint of step {step} is missing")
        about = _about(self._manager, step)
        other = differences(about["run"], self._run)
        if other:
            raise InputError(f"{self.path} is of another run ({other}); resume with the same, or give another folder")
        theta = _arrays(self._manager, step, about, "theta", template.theta)
        optimizer = _arrays(self._manager, step, about, "optimizer", template.optimizer)
        return TrainState(theta, optimizer, about["step"]), about

    def close(self) -> None:
        """Waits until all is written.

        Raises:
            InputError: If the disk is full.
        """
        try:
            self._finish()
        finally:
            self._manager.close()


@contextlib.contextmanager
def _reading(step: int) -> Iterator[None]:
    """Turns what reading a checkpoint raises into `_DamagedError`; Orbax and TensorStore raise all kinds."""
    try:
        yield
    except PermissionError:  # it may be whole
        raise
    except Exception as error:
        reason = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:160]}"
        raise _DamagedError(f"the checkpoint of step {step} is damaged ({reason})") from error


def _about(manager: CheckpointManager, step: int) -> dict[str, Any]:
    """Reads the record of a checkpoint."""
    import orbax.checkpoint as ocp

    with _reading(step):
        about = dict(manager.restore(step, args=ocp.args.Composite(about=ocp.args.JsonRestore())).about)
        if about.pop("crc32") != _text_checksum(about):
            raise ValueError("its record is not what was written")
    return about


def _arrays(manager: CheckpointManager, step: int, about: Mapping[str, Any], item: str, template: PyTree) -> PyTree:
    """Reads an item of a checkpoint.

    Args:
        manager: Orbax's.
        step: Which checkpoint.
        about: Its record.
        item: `"theta"` or `"optimizer"`.
        template: Arrays of the same shapes and dtypes.

    Returns:
        The arrays, on the devices of the template.

    Raises:
        InputError: If it is in another dtype, which Orbax would convert.
        ValueError: Within `_reading`, which turns it into `_DamagedError`.
    """
    import orbax.checkpoint as ocp

    held, want = (", ".join(sorted(set(dtypes))) for dtypes in (about["dtypes"][item], _dtypes(template)))
    if held != want:
        raise InputError(f"the checkpoint of step {step} holds {item} in {held}; expected {want}, as the model's is")
    with _reading(step):
        target = ocp.args.StandardRestore(jax.tree.map(_target, template))
        found = manager.restore(step, args=ocp.args.Composite(**{item: target}))[item]
        arrays = jax.tree.map(_as_device_array, found, template)
        for was, now in zip(about["checksums"][item], _checksums(arrays), strict=True):
            if None not in (was, now) and was != now:
                raise ValueError(f"an array of {item} is not what was written")
    return arrays


def _is_key(leaf: jax.Array) -> bool:
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _target(leaf: jax.Array) -> jax.ShapeDtypeStruct | np.ndarray:
    """Returns what an array is restored as: on its devices where it was put there, else as a host array."""
    if leaf.committed or _is_key(leaf):
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)
    return np.broadcast_to(np.zeros((), leaf.dtype), leaf.shape)


def _as_device_array(found: Any, leaf: jax.Array) -> jax.Array:
    return found if leaf.committed or _is_key(leaf) else jnp.asarray(found, leaf.dtype)


def _dtypes(arrays: PyTree) -> list[str]:
    return [str(leaf.dtype) for leaf in jax.tree.leaves(arrays)]


def _checksums(arrays: PyTree) -> list[int | None]:
    """CRC-32 of every array that this process holds all of; `None` of the others."""

    def checksum(leaf: jax.Array) -> int | None:
        if leaf.is_fully_replicated:
            leaf = leaf.addressable_data(0)
        elif not leaf.is_fully_addressable:
            return None
        value = np.ascontiguousarray(jax.random.key_data(leaf) if _is_key(leaf) else leaf)
        return zlib.crc32(value.reshape(-1).view(np.uint8).data)

    return [checksum(leaf) for leaf in jax.tree.leaves(arrays)]


def _text_checksum(about: Mapping[str, Any]) -> int:
    return zlib.crc32(json.dumps(about, sort_keys=True).encode())


def _says_full(error: BaseException | None) -> bool:
    while error is not None:
        if isinstance(error, OSError) and error.errno in (*NO_SPACE, errno.EFBIG):
            return True
        if any(words in str(error) for words in _FULL):
            return True
        error = error.__cause__ or error.__context__
    return False


def load_checkpoint(folder: str | Path, tun: Tunable, step: int | None = None, best: str | None = None) -> PyTree:
    """Returns the parameters that `train(…, checkpoints=…)` saved.

    Args:
        folder: Of the run's checkpoints.
        tun: What was trained.
        step: Which checkpoint; `None`: the last.
        best: Column of the history, in place of `step`: the checkpoint where it is best, as `Checkpoints` has it.

    Returns:
        θ, a pytree like `tun.theta0`.

    Raises:
        InputError: If there is no such checkpoint, it cannot be read, or is of other parameters.
    """
    import orbax.checkpoint as ocp

    path = Path(folder).absolute()
    if not path.is_dir():
        raise InputError(f"{path} is no folder of checkpoints")
    with ocp.CheckpointManager(path, options=ocp.CheckpointManagerOptions(read_only=True)) as manager:
        steps = sorted(manager.all_steps())
        if not steps or (step is not None and step not in steps):
            raise InputError(f"{path} has no checkpoint{'' if step is None else f' of step {step}'}; it has {steps}")
        try:
            chosen = steps[-1] if step is None else step
            if best is not None:
                scores = _scores(_about(manager, steps[-1])["history"], best)
                if not (among := [k for k in steps if k in scores]):
                    raise InputError(f"no checkpoint in {path} has {best!r}")
                chosen = max(among, key=lambda k: scores[k])
            return _arrays(manager, chosen, _about(manager, chosen), "theta", tun.theta0)
        except _DamagedError as error:
            raise InputError(f"{path}: {error}") from error
