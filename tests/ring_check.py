"""Kernels over many devices, written to a file: `python -m tests.ring_check OUT PACE [PORT PROCESSES PROCESS]`.

Run by `tests/test_mesh.py`, which says how many devices a process has; the cases are shared with it.
"""

import contextlib
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as Spec

import jaxlin as jl
from jaxlin.mesh import make_mesh
from jaxlin.ntk.work import TILES
from tests import cases


def problems(pace):
    """Name to model, theta, examples, other examples, options; every number of examples leaves devices unequal.

    Those that compile for long are of the pace "slow", the others "quick".
    """
    if pace == "quick":
        mlp, text = cases.mlp(3, width=6), jl.lora(cases.tiny_model(), rank=3, layers=[1])
        large = jl.select(cases.tiny_model(), "embeddings/word|layer_1/mlp")
        vectors, others = cases.vectors(13, num_labels=3), cases.vectors(5, seed=1, num_labels=3)
        return {
            "vectors": (mlp, None, vectors, None, {}),
            "float64: vectors, others": (mlp, None, vectors, others, {"dtype": "float64"}),
            "text": (text, cases.moved(text), cases.text_batch(11, longest=14), None, {}),
            "large": (large, cases.moved(large), cases.text_batch(11, longest=14), None, {"memory_budget": 400_000}),
        }
    text, full = jl.lora(cases.tiny_model(), rank=3), jl.full(cases.tiny_model())
    words, others = cases.text_batch(11), cases.text_batch(5, seed=1, longest=12)
    return {
        "text, others": (text, cases.moved(text), words, others, {}),
        "all, others": (full, cases.moved(full), words, others, {}),
        "float64: text": (text, cases.moved(text), words, None, {"dtype": "float64"}),
        "float64: text, others": (text, cases.moved(text), others, words, {"dtype": "float64"}),
    }


MORE = ("split weights, ", "stored, ")
"""Beginnings of the names of what is computed in other ways, too."""


def as_matrix(part):
    return part.transpose(0, 2, 1, 3).reshape(part.shape[0] * part.shape[2], -1)


def kernels(mesh, pace):
    """Problem and block to the kernel that a mesh computes, as a matrix."""
    found = {}
    for name, (tun, theta, x1, x2, options) in problems(pace).items():
        kernel = jl.ntk(tun, x1, x2, theta=theta, blocks="layer", mesh=mesh, check_examples=0, **options)
        found |= {f"{name}: {block}": as_matrix(part) for block, part in kernel.parts.items()}
    return found


def split_weights_kernels():
    """The kernels of "vectors", with weights that are split over another axis of the mesh than the examples."""
    across = np.reshape(jax.devices(), (2, -1)).T.ravel().tolist()  # halves of a weight in different processes
    mesh = make_mesh({"data": len(across) // 2, "model": 2}, devices=across)
    tun, _, x1, _, _ = problems("quick")["vectors"]
    specs = {"hidden": {"bias": Spec("model"), "kernel": Spec(None, "model")}, "out": {"kernel": Spec("model")}}

    def split(leaf, spec):
        sharding = NamedSharding(mesh, spec)
        return jax.make_array_from_callback(leaf.shape, sharding, lambda index: np.asarray(leaf)[index])

    theta = jax.tree.map(split, tun.theta0, specs)
    kernel = jl.ntk(tun, x1, theta=theta, blocks="layer", mesh=mesh, check_examples=0)
    return {f"vectors: {block}": as_matrix(part) for block, part in kernel.parts.items()}


def stored_kernels(mesh, path):
    """The kernels of "vectors", from a store that is written in two goes."""
    tun, _, x1, _, _ = problems("quick")["vectors"]
    budget = 6_000 if jax.process_count() == 1 else 9_000  # of several each fetches all tiles
    options = {"blocks": "layer", "mesh": mesh, "check_examples": 0, "memory_budget": budget, "store": path}
    plan = jl.ntk_plan(tun, x1, mesh=mesh, memory_budget=budget)
    assert 1 < plan.row_block < 13
    cost = jl.ntk_estimate(tun, x1, blocks="layer", mesh=mesh, memory_budget=budget, stored=True)
    assert (cost.plan, cost.devices) == (plan, 8)
    given = 3 * 4 * tun.num_params
    assert cost.kernel_bytes + 13 * given <= cost.disk_bytes <= cost.kernel_bytes + (13 + 8 * 8) * given
    assert cost.memory_bytes <= budget
    assert 0 < cost.pass_seconds < cost.seconds < 10

    def stop(phase, done, total):
        if phase == TILES and done > total // 2:
            raise KeyboardInterrupt

    with contextlib.suppress(KeyboardInterrupt):
        jl.ntk(tun, x1, **options, progress=stop)
    with pytest.raises(jl.InputError, match="is there already"):  # in every process
        jl.ntk(tun, x1, **options)
    kernel = jl.ntk(tun, x1, **options, resume=True)
    return {f"stored, vectors: {block}": as_matrix(part) for block, part in kernel.parts.items()}


if __name__ == "__main__":
    out, pace, *processes = sys.argv[1:]
    if processes:
        port, count, index = map(int, processes)
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        jax.distributed.initialize(f"127.0.0.1:{port}", count, index, initialization_timeout=60)
        assert jax.process_count() == count
    assert len(jax.devices()) == 8
    found = kernels(make_mesh(), pace)
    if pace == "quick":
        found |= stored_kernels(make_mesh(), Path(out).with_name("store"))
        found |= {f"split weights, {name}": part for name, part in split_weights_kernels().items()}
    np.savez(out, **found)
