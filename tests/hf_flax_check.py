"""Checks `from_hf_flax` where transformers 4.57, the last version with Flax classes, is installed.

Run by `tests/test_hf_flax.py` in an environment of its own.
"""

import numpy as np
from transformers import (
    BertConfig,
    FlaxBertForSequenceClassification,
    FlaxGPT2LMHeadModel,
    FlaxRobertaForSequenceClassification,
    GPT2Config,
    RobertaConfig,
)

import jaxlin as jl
from tests import cases

SIZE = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
GPT2 = GPT2Config(vocab_size=40, n_positions=20, n_embd=16, n_layer=2, n_head=2)


def last_logits(output):
    return output.logits[:, -1, :3]


MODELS = {
    "bert": (FlaxBertForSequenceClassification(BertConfig(**SIZE, num_labels=3), seed=1), ("query", "value"), None),
    "roberta": (
        FlaxRobertaForSequenceClassification(RobertaConfig(**SIZE, num_labels=3, pad_token_id=1), seed=1),
        ("attention/self/query", "intermediate/dense"),
        None,
    ),
    "gpt2": (FlaxGPT2LMHeadModel(GPT2, seed=1), ("c_attn", "c_fc"), last_logits),
}

rng = np.random.default_rng(0)
mask = np.array([[1] * 7, [1] * 7, [1] * 4 + [0] * 3])
batch = {"input_ids": np.where(mask, rng.integers(5, 40, mask.shape), 1), "attention_mask": mask}
for name, (hf, targets, logits) in MODELS.items():
    model = jl.from_hf_flax(hf, logits=logits)
    out = hf(**batch)
    expected = out.logits if logits is None else logits(out)
    np.testing.assert_allclose(model.apply(model.params, batch), expected, atol=1e-5)
    for tun in (jl.lora(model, rank=2, alpha=3, targets=targets, layers=[1]), jl.full(model)):
        cases.check(tun, batch, model)
    assert "layer_1/lora_A" in jl.lora(model, targets=targets).grouped("layer")
    print(name, "ok")
