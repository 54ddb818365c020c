"""The adapters of `adapters.json`, which peft wrote and jaxlin reads, and those that jaxlin wrote and peft read."""

import hashlib

from safetensors.numpy import load_file

FROM_PEFT = {
    "bert": {
        "target_modules": ["query", "attention.output.dense"], "layers_to_transform": [1], "layers_pattern": "layer",
        "r": 2, "lora_alpha": 3, "modules_to_save": ["classifier", "pooler"],
    },
    "roberta": {
        "target_modules": "all-linear", "r": 3, "lora_alpha": 6, "rank_pattern": {"layer.1.*query": 2, "value": 1},
        "alpha_pattern": {"key": 5, r"layer.0.output.dense": 9}, "use_rslora": True,
    },
    "distilbert": {"target_modules": r".*layer\.0\.attention\.[qv]_lin", "r": 2, "lora_alpha": 4},
    "electra": {"target_modules": ["key", "output.dense"], "exclude_modules": ["attention.output.dense"], "r": 2},
    "gpt2": {"target_modules": ["c_attn", "mlp.c_proj"], "r": 2, "lora_alpha": 5, "fan_in_fan_out": True},
    "llama": {
        "target_modules": ["q_proj", "v_proj", "gate_proj"], "layers_to_transform": 0, "r": 3, "lora_alpha": 8,
        "alpha_pattern": {"v_proj": 1},
    },
    "mistral": {"target_modules": ["k_proj", "o_proj"], "r": 2, "modules_to_save": ["score", "norm"]},
    "qwen2": {"target_modules": ["up_proj", "down_proj"], "r": 2},
    "qwen3": {"target_modules": ["q_proj", "o_proj"], "r": 2, "rank_pattern": {r"layers.1.self_attn.q_proj": 4}},
}  # fmt: skip
"""Family to peft's `LoraConfig`, for sequence classification."""

FROM_JAXLIN = {
    "bert": {"rank": 2, "targets": ["attention/output", "mlp/down"], "modules_to_save": ["layer_0/mlp_norm"]},
    "roberta": {
        "rank": 2, "alpha": 3, "targets": ["query", "mlp/up"], "layers": [1], "rank_pattern": {"query": 3},
        "alpha_pattern": {"mlp/up": 7},
    },
    "distilbert": {"rank": 1, "use_rslora": True},
    "electra": {"rank": 2, "targets": ["embeddings/project", "key"], "train_head": False},
    "gpt2": {
        "rank": 2, "targets": ["query", "value", "mlp/up"], "rank_pattern": {"value": 3}, "alpha_pattern": {"query": 5},
    },
    "llama": {"rank": 2, "targets": ["query", "mlp/gate"], "layers": [0]},
    "mistral": {"rank": 3, "modules_to_save": ["decoder/norm"]},
    "qwen2": {"rank": 2, "targets": ["key", "mlp/down"]},
    "qwen3": {"rank": 2, "targets": r".*layer_0/(attention|mlp)/(output|up)"},
}  # fmt: skip
"""Family to arguments of `jaxlin.lora`."""


def digest(file, values):
    """A hash of the names, types, shapes and values of tensors, whatever the order and header of their file.

    Values that are computed, such as merged weights, are not the same to the last bit everywhere.
    """
    found = hashlib.sha256()
    for name, value in sorted(load_file(file).items()):
        found.update(f"{name} {value.dtype} {value.shape}".encode() + (value.tobytes() if values else b""))
    return found.hexdigest()
