"""Training over many devices, written to a file: `python -m tests.shard_check OUT PACE [PORT PROCESSES PROCESS]`.

Run by `tests/test_sharding.py`, which says how many devices a process has; the cases are shared with it.
"""

import dataclasses
import sys

import jax
import numpy as np
from jax.sharding import PartitionSpec as Spec

import jaxlin as jl
from jaxlin.distributed import initialize
from jaxlin.mesh import make_mesh
from tests import cases

MLP_RULES = (
    ("hidden/kernel$", Spec(None, "model")),
    ("hidden/bias$", Spec("model")),
    ("out/kernel$", Spec("model", None)),
)
COLUMNS = ("loss", "gradient_norm", "distance")
CONFIG = jl.TrainConfig(batch_size=6, max_steps=4, learning_rate=0.05, optimizer="momentum", lam=0.5, seed=3)
"""22 examples: batches of 6, which 4 and 8 devices share unevenly, and a partial one of 4."""


def problems(pace):
    """Name to model, rules, examples, configuration; those that compile for long are of the pace "slow"."""
    found = {}
    if pace == "quick":
        mlp, vectors = cases.mlp(3, width=6), cases.vectors(22, num_labels=3)
        in_parts = dataclasses.replace(CONFIG, optimizer="adam", gradient_accumulation_steps=2)
        found["MLP in parts"] = (mlp, MLP_RULES, vectors, in_parts)
        found["MLP, linearized"] = (jl.linearize(mlp), MLP_RULES, vectors, CONFIG)
        return found
    at_once = dataclasses.replace(CONFIG, batch_size=22, group_by_length=True, gradient_accumulation_steps=3)
    lora = jl.lora(cases.tiny_model(), rank=4)
    found["LoRA, all at once"] = (lora, jl.ENCODER_RULES, cases.text_batch(22, longest=24), at_once)
    for name, tun in {"LoRA": lora, "full": jl.full(cases.tiny_model())}.items():
        words = cases.text_batch(22, longest=8)
        found[name] = (tun, jl.ENCODER_RULES, words, CONFIG)
        found[f"{name}, linearized"] = (jl.linearize(tun), jl.ENCODER_RULES, words, CONFIG)
    return found


def histories(mesh, pace):
    """Problem to history, then the loss on other examples, as the mesh (`None`: one device) has them."""
    found = {}
    for name, (tun, rules, data, config) in problems(pace).items():
        split = rules if mesh is not None and "model" in mesh.shape else ()
        result = jl.train(tun, data, {k: v[:5] for k, v in data.items()}, config, mesh=mesh, rules=split)
        rows = [[row[column] for column in COLUMNS] for row in result.history]
        found[name] = np.array([*rows, [result.history[-1]["eval_loss"]] * 3])
        if split:
            assert_split(tun, result.theta, mesh, rules)
    return found


def assert_split(tun, theta, mesh, rules):
    """What the rules name lies in halves on the devices, before training and after it, and the rest whole."""
    placed = jl.shard(tun, mesh, rules)
    halves = 0
    for tree in (placed.theta0, theta, placed.apply):
        for leaf in jax.tree.leaves(tree):
            shares = {shard.data.nbytes for shard in leaf.addressable_shards}
            split = "model" in leaf.sharding.spec
            assert shares == {leaf.nbytes // (mesh.shape["model"] if split else 1)}, leaf.sharding
            halves += split
    for before, after in zip(jax.tree.leaves(placed.theta0), jax.tree.leaves(theta), strict=True):
        assert after.sharding.is_equivalent_to(before.sharding, before.ndim)
    assert halves


if __name__ == "__main__":
    out, pace, *processes = sys.argv[1:]
    if processes:
        port, count, index = map(int, processes)
        initialize(f"127.0.0.1:{port}", count, index)
        assert jax.process_count() == count
    assert len(jax.devices()) == 8
    found = {}
    for axes in ({"data": 8}, {"data": 4, "model": 2}):
        found |= {f"{axes}: {name}": part for name, part in histories(make_mesh(axes), pace).items()}
    np.savez(out, **found)
