"""The zoo of small models, data and PEFT choices that the tests share, and the dense float64 reference."""

import csv
import json
import os
import shutil
import signal
import subprocess
import tempfile
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from jax.flatten_util import ravel_pytree
from safetensors.numpy import load_file, save_file

import jaxlin as jl
from jaxlin.data.dataset import as_dataset
from jaxlin.ntk.jacobian import to_float64
from jaxlin.tunable import leaf_paths
from tests.golden.weights import weights

GOLDEN = Path(__file__).parent / "golden"
TINY_BERT = GOLDEN / "tiny_bert"
ENCODERS = {
    f"{case['config']['model_type']}: {case['name']}": case
    for case in json.loads((GOLDEN / "encoders.json").read_text())
}
"""Golden encoders of every family: configuration, tensor shapes, inputs, PyTorch's logits."""
DECODERS = {
    f"{case['config']['model_type']}: {case['name']}": case
    for case in json.loads((GOLDEN / "decoders.json").read_text())
}
"""Golden decoders, likewise."""
FAMILIES = ("bert", "roberta", "distilbert", "electra")
DECODER_FAMILIES = ("gpt2", "llama", "mistral", "qwen2", "qwen3", "gemma")


def write_checkpoint(folder, case, num_labels=None):
    """Writes a golden model as transformers would; `num_labels` gives its head another number of outputs."""
    folder.mkdir(parents=True, exist_ok=True)
    last = (
        "classifier.weight",
        "classifier.bias",
        "classifier.out_proj.weight",
        "classifier.out_proj.bias",
        "score.weight",
    )
    shapes = {k: [num_labels or v[0], *v[1:]] if k in last else v for k, v in case["shapes"].items()}
    (folder / "config.json").write_text(json.dumps(case["config"]))
    save_file(weights(shapes), folder / "model.safetensors")
    return folder


def write_language_model(folder, case):
    """Writes a golden language model with the tiny tokenizer, its words and room for 64 tokens."""
    config, tokenizer = case["config"], json.loads((TINY_BERT / "tokenizer.json").read_text())
    rows = {config["vocab_size"]: len(tokenizer["model"]["vocab"]), 20: 64}
    sizes = ("vocab_size", "n_positions", "max_position_embeddings")
    changed = {name: rows[config[name]] for name in sizes if name in config}
    shapes = {name: [rows.get(shape[0], shape[0]), *shape[1:]] for name, shape in case["shapes"].items()}
    write_checkpoint(folder, {"config": {**config, **changed}, "shapes": shapes})
    if config["model_type"] in DECODER_FAMILIES:
        tokenizer["post_processor"] = None  # a decoder's text has no token behind it
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    shutil.copy(TINY_BERT / "tokenizer_config.json", folder)
    return folder


def edited_checkpoint(folder, tensors=None, config=None):
    """A copy of the tiny checkpoint in `folder/model`, with tensors or configuration changed."""
    copy = folder / "model"
    shutil.copytree(TINY_BERT, copy)
    if tensors is not None:
        content = load_file(copy / "model.safetensors")
        tensors(content)
        save_file(content, copy / "model.safetensors")
    if config is not None:
        old = json.loads((copy / "config.json").read_text())
        (copy / "config.json").write_text(json.dumps({**old, **config}))
    return copy


def headless_checkpoint(folder):
    """A copy of the tiny checkpoint in `folder/model` without its head of three outputs."""

    def without_head(tensors):
        for name in ("classifier.weight", "classifier.bias"):
            del tensors[name]

    return edited_checkpoint(folder, without_head)


def sentiments(folder, train, validation, tasks=("sst2",)):
    """Writes tasks in `folder`: sentences whose label is in a word, but for a quarter or so."""
    rng = np.random.default_rng(0)
    for task in tasks:
        (folder / task).mkdir(parents=True)
        for split, size in (("train", train), ("validation", validation)):
            labels = (np.arange(size) + (rng.random(size) < 0.25)) % 2
            words = [f"{'good' if i % 2 else 'bad'} film {rng.integers(9999)}" for i in range(size)]
            rows = [f"{text}\t{label}" for text, label in zip(words, labels, strict=True)]
            (folder / task / f"{split}.tsv").write_text("\n".join(["sentence\tlabel", *rows]) + "\n")
    return folder


def virtual_devices(count):
    """The environment of a process that has `count` CPU devices and else what this one has."""
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={count}"
    return {**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(Path(__file__).parent.parent)}


def killed_at_random(command, seed, most=4, cwd=None, env=None):
    """Runs a command, which prints a line a step, until it ends by itself, killed up to so often at random moments.

    Returns the number of steps before each kill (-9).
    """
    rng, killed = np.random.default_rng(seed), []
    while True:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=cwd, env=env)
        steps, last = 0, rng.integers(1, 20) if len(killed) < most else np.inf
        for _ in process.stdout:
            steps += 1
            if steps == last:
                time.sleep(rng.uniform(0, 0.1))
                process.kill()
                break
        process.stdout.close()
        if process.wait() == 0:
            return killed
        assert process.returncode == -signal.SIGKILL
        killed.append(steps)


def forbid(monkeypatch, module, *names):
    """Makes functions of a module raise `AssertionError("computed again")`."""

    def never(*_, **__):
        raise AssertionError("computed again")

    for name in names:
        monkeypatch.setattr(module, name, never)


def encoder(family, num_labels=3, **options):
    """A golden encoder: 2 layers, width 16, with its family's classification head."""
    with tempfile.TemporaryDirectory() as folder:
        path = write_checkpoint(Path(folder), ENCODERS[f"{family}: uneven, C = 2"], num_labels)
        return jl.load_model(path, num_labels, **options)


def decoder(family, num_labels=3, **options):
    """A golden decoder: 2 layers, width 16, with its family's classification head."""
    with tempfile.TemporaryDirectory() as folder:
        path = write_checkpoint(Path(folder), DECODERS[f"{family}: uneven, C = 2"], num_labels)
        return jl.load_model(path, num_labels, **options)


def tiny_model(num_labels=3, **options):
    """The golden checkpoint: BERT, 2 layers, width 32, trained-looking random weights."""
    return jl.load_model(str(TINY_BERT), num_labels, **options)


def text_batch(n, seed=0, longest=20, num_labels=3, ids=110, padding_id=0):
    """Random token ids of uneven lengths, padded on the right, with labels."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(3, longest + 1, n)
    lengths[0] = longest
    mask = (np.arange(longest) < lengths[:, None]).astype(np.int32)
    tokens = np.where(mask, rng.integers(5, ids, (n, longest)), padding_id).astype(np.int32)
    types = np.where(mask, (np.arange(longest) >= lengths[:, None] // 2), 0).astype(np.int32)
    labels = rng.integers(0, num_labels, n)
    return {"input_ids": tokens, "attention_mask": mask, "token_type_ids": types, "labels": labels}


def mlp(num_outputs=2, width=5, seed=0, dtype=jnp.float32):
    """A plain function as a Tunable: tanh network on vectors of 4."""
    k1, k2, k3 = jax.random.split(jax.random.key(seed), 3)
    theta = {
        "hidden": {"kernel": jax.random.normal(k1, (4, width)) / 2, "bias": 0.1 * jax.random.normal(k2, (width,))},
        "out": {"kernel": jax.random.normal(k3, (width, num_outputs)) / width**0.5},
    }
    return jl.Tunable(mlp_apply, jax.tree.map(lambda leaf: leaf.astype(dtype), theta))


def mlp_apply(theta, batch):
    x = jnp.asarray(batch["x"], theta["out"]["kernel"].dtype)
    return jnp.tanh(x @ theta["hidden"]["kernel"] + theta["hidden"]["bias"]) @ theta["out"]["kernel"]


def vectors(n, seed=0, num_labels=2):
    rng = np.random.default_rng(seed)
    return {"x": rng.normal(size=(n, 4)), "labels": rng.integers(0, num_labels, n)}


PEFT = {
    "lora": lambda model: jl.lora(model, rank=3, alpha=6),
    "lora-all-modules": lambda model: jl.lora(model, rank=2, targets=r".*(attention|mlp)/\w+"),
    "lora-frozen-A": lambda model: jl.lora(model, rank=3, freeze_A=True),
    "lora-patterns": lambda model: jl.lora(
        model, rank=2, alpha=3, use_rslora=True, rank_pattern={"value": 4}, alpha_pattern={"layer_1/.*": 5.0}
    ),
    "lora-and-norms": lambda model: jl.lora(model, rank=2, layers=[0], modules_to_save=("mlp_norm", "query")),
    "dora": lambda model: jl.lora(model, rank=3, alpha=6, use_dora=True, targets=("value", "mlp/up")),
    "ia3": jl.ia3,
    "lora-frozen-head": lambda model: jl.lora(model, rank=3, train_head=False, layers=[1]),
    "head": jl.head_only,
    "bias": jl.bias_only,
    "layer-norm": jl.layer_norm_only,
    "select": lambda model: jl.select(model, "layer_1/attention"),
    "full": jl.full,
}


def moved(tun, scale=0.1, seed=0):
    """A theta away from theta0, with B ≠ 0."""
    leaves, tree = jax.tree.flatten(tun.theta0)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    drawn = [x + scale * jax.random.normal(k, x.shape, x.dtype) for k, x in zip(keys, leaves, strict=True)]
    return jax.tree.unflatten(tree, drawn)


@jax.jit
def _outputs(model, params, batch):
    return model.apply(params, batch)


def outputs(model, batch, params=None):
    """Of a model, or of a Tunable; compiled: quicker than one operation at a time."""
    if params is None:
        params = model.theta0 if isinstance(model, jl.Tunable) else model.params
    return np.asarray(_outputs(model, params, batch))


def check(tun, batch, model=None, tolerance=1e-4):
    """What holds for everything that can be tuned: start, merge, round trip, linearization, kernel and its blocks.

    Linearization and kernel are held to the dense reference, both at theta0 and away from it.
    """
    theta = moved(tun)
    start, there = outputs(tun, batch), outputs(tun, batch, theta)
    if model is not None:
        np.testing.assert_allclose(start, outputs(model, batch), atol=1e-5)
        np.testing.assert_allclose(outputs(model, batch, jl.merge(tun, theta)), there, atol=tolerance)

    flat, unravel = ravel_pytree(theta)
    assert flat.size == tun.num_params
    written = safetensors.numpy.save(dict(zip(leaf_paths(theta), jax.device_get(jax.tree.leaves(theta)), strict=True)))
    read = safetensors.numpy.load(written)
    back = jax.tree.unflatten(jax.tree.structure(tun.theta0), [read[path] for path in leaf_paths(tun.theta0)])
    for other in (unravel(flat), back):
        assert jax.tree.all(jax.tree.map(np.array_equal, other, theta))
    np.testing.assert_array_equal(outputs(tun, batch, back), there)

    step = np.asarray(flat - ravel_pytree(tun.theta0)[0], np.float64)
    for at, to, delta, f in (
        (tun.theta0, theta, step, start),
        (theta, tun.theta0, -step, there),
    ):
        jac, columns = reference_jacobian(tun, batch, at)
        linear = np.asarray(jax.jit(jl.linearize(tun, at=at).apply)(to, batch))
        assert relative_error(linear.reshape(-1), f.reshape(-1) + jac @ delta) < tolerance
        kernel = jl.ntk(tun, batch, theta=at, blocks="leaf", check_examples=0)
        assert relative_error(kernel.matrix(), jac @ jac.T) < tolerance
        assert set(kernel.parts) == set(leaf_paths(tun.theta0))
        for name, block in kernel.blocks.items():
            of_block = jac[:, columns == name]
            assert np.abs(block.matrix() - of_block @ of_block.T).max() < tolerance * np.abs(jac @ jac.T).max()


@jax.jit
def _jacrev(apply, theta, batch):
    return jax.jacrev(lambda p: apply(p, batch))(theta)


def reference_jacobian(tun, data, theta=None):
    """Dense float64 Jacobian [N*C, P] by one jacrev over the whole batch, and the leaf path of every column."""
    data = as_dataset(data)
    with jax.enable_x64(True):
        apply, theta = to_float64((tun.apply, tun.theta0 if theta is None else theta))
        batch = data.batch(np.arange(len(data)))
        jac = _jacrev(apply, theta, batch)
        rows = [np.asarray(leaf) for leaf in jax.tree.leaves(jac)]
    assert all(leaf.dtype == np.float64 for leaf in rows)
    n, c = rows[0].shape[:2]
    columns = np.concatenate(
        [np.full(leaf.size // (n * c), path) for path, leaf in zip(leaf_paths(theta), rows, strict=True)]
    )
    return np.concatenate([leaf.reshape(n * c, -1) for leaf in rows], axis=1), columns


def relative_error(found, expected):
    return np.abs(np.asarray(found, np.float64) - expected).max() / max(np.abs(expected).max(), 1e-300)


def rows(file):
    """Rows of a CSV file, as it has them: words."""
    with file.open(newline="", encoding="utf-8") as stream:
        return list(csv.DictReader(stream))


def number(text):
    """The number that a text begins with, as findings write it: with a true minus sign."""
    return float(text.split()[0].replace("−", "-"))


def flags(arguments, command="compare"):
    """Words of a command line; True is a bare flag, False leaves the option out."""
    listed = []
    for name, value in arguments.items():
        if value is False:
            continue
        values = [] if value is True else value if isinstance(value, list) else [value]
        listed += [f"--{name}", *values]
    return [command, *listed]
