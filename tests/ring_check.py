"""Kernels over many devices, written to a file: `python -m tests.ring_check OUT PACE [PORT PROCESSES PROCESS]`.

Run by `tests/test_mesh.py`, which says how many devices a process has; the cases are shared with it.
"""

import sys

import jax
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as Spec

import jaxlin as jl
from jaxlin.data.dataset import as_dataset
from jaxlin.mesh import make_mesh
from jaxlin.ntk.ring import ring_parts
from tests import cases


def problems(pace):
    """Name to model, theta, examples, other examples, options; every number of examples leaves devices unequal.

    Those that compile for long are of the pace "slow", the others "quick".
    """
    if pace == "quick":
        mlp, text = cases.mlp(3, width=6), jl.lora(cases.tiny_model(), rank=3, layers=[1])
        vectors, others = cases.vectors(13, num_labels=3), cases.vectors(5, seed=1, num_labels=3)
        return {
            "vectors": (mlp, None, vectors, None, {}),
            "float64: vectors, others": (mlp, None, vectors, others, {"dtype": "float64"}),
            "text": (text, cases.moved(text), cases.text_batch(11, longest=14), None, {}),
        }
    text = jl.lora(cases.tiny_model(), rank=3)
    words, others = cases.text_batch(11), cases.text_batch(5, seed=1, longest=12)
    return {
        "text, others": (text, cases.moved(text), words, others, {}),
        "float64: text": (text, cases.moved(text), words, None, {"dtype": "float64"}),
        "float64: text, others": (text, cases.moved(text), others, words, {"dtype": "float64"}),
    }


def as_matrix(part):
    return part.transpose(0, 2, 1, 3).reshape(part.shape[0] * part.shape[2], -1)


def kernels(mesh, pace):
    """Problem and block to the kernel that a mesh computes, as a matrix."""
    found = {}
    for name, (tun, theta, x1, x2, options) in problems(pace).items():
        data1, data2, blocks = as_dataset(x1), None if x2 is None else as_dataset(x2), tun.grouped("layer")
        parts = ring_parts(tun, data1, data2, theta, blocks, mesh=mesh, seeds=np.eye(3), **options)
        found |= {f"{name}: {block}": as_matrix(part) for block, part in parts.items()}
    return found


def split_weights_kernels():
    """The kernels of "vectors", with weights that are split over another axis of the mesh than the examples."""
    mesh = make_mesh({"model": 2, "data": len(jax.devices()) // 2})
    tun, _, x1, _, _ = problems("quick")["vectors"]
    specs = {"hidden": {"bias": Spec("model"), "kernel": Spec(None, "model")}, "out": {"kernel": Spec("model")}}

    def split(leaf, spec):
        sharding = NamedSharding(mesh, spec)
        return jax.make_array_from_callback(leaf.shape, sharding, lambda index: np.asarray(leaf)[index])

    theta, blocks = jax.tree.map(split, tun.theta0, specs), tun.grouped("layer")
    parts = ring_parts(tun, as_dataset(x1), None, theta, blocks, mesh=mesh, seeds=np.eye(3))
    return {f"vectors: {block}": as_matrix(part) for block, part in parts.items()}


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
        found |= {f"split weights, {name}": part for name, part in split_weights_kernels().items()}
    np.savez(out, **found)
