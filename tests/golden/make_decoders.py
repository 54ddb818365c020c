"""Makes `decoders.json` from PyTorch: logits of small decoders of every family, on odd shapes.

    python tests/golden/make_decoders.py [STORIES_FOLDER]        # where torch and transformers 5 are installed

Their weights are those of `weights.py`, so that only shapes and logits are stored. Given the folder of stories260K,
also `stories260k.json`: a passage, its loss, and the logits after some of its tokens.
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch
from make_encoders import golden, inputs
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

HERE = Path(__file__).parent
SIZE = {
    "vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 24, "max_position_embeddings": 20, "pad_token_id": 0,
}  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 50.0, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 3.0,
    "original_max_position_embeddings": 16,
}  # fmt: skip
LINEAR = {"rope_type": "linear", "rope_theta": 100.0, "factor": 2.5}
FAMILIES = {
    "gpt2": {"vocab_size": 40, "n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": 20, "pad_token_id": 0},
    "llama": SIZE,
    "mistral": {**SIZE, "sliding_window": 4, "head_dim": 6, "num_key_value_heads": 1},
    "qwen2": {**SIZE, "use_sliding_window": True, "sliding_window": 3, "max_window_layers": 1},
    "qwen3": {**SIZE, "head_dim": 6},
    "gemma": {**SIZE, "head_dim": 6},
}
OPTIONS = {
    "llama": {"rope_parameters": LLAMA3},
    "qwen3": {"tie_word_embeddings": True},
}
TEXT = (
    "Once upon a time, there was a little girl named Sue. She had a red ball. She liked to play with her ball in the "
    "park. One day, Sue saw a big dog. The dog wanted to play with the ball too. Sue was scared at first, but the dog "
    "was nice. She threw the ball and the dog ran to get it. They played all day and had lots of fun. Sue went home "
    "and told her mom about her new friend."
)


def case(family, name, auto, lengths, **options):
    config = AutoConfig.for_model(family, **{**FAMILIES[family], **OPTIONS.get(family, {}), **options})
    batch = inputs(len(name), lengths, 0, types=False)
    return golden(name, family, config, auto, batch)


def decoders():
    classifier, lm = AutoModelForSequenceClassification, AutoModelForCausalLM
    cases = []
    for family in FAMILIES:
        cases.append(case(family, "uneven, C = 2", classifier, [7, 3, 5], num_labels=2))
        cases.append(case(family, "full length, C = 5", classifier, [20, 11], num_labels=5))
        cases.append(case(family, "LM", lm, [9, 4]))
    biases = {"attention_bias": True, "mlp_bias": True, "rope_parameters": LINEAR, "tie_word_embeddings": True}
    cases.append(case("llama", "LM, linear scaling, biases, tied", lm, [9, 4], **biases))
    cases.append(case("gpt2", "LM, untied, relu, width 10", lm, [9, 4], tie_word_embeddings=False, n_inner=10,
                      activation_function="relu"))  # fmt: skip
    (HERE / "decoders.json").write_text("[\n" + ",\n".join(json.dumps(item) for item in cases) + "\n]\n")


def stories(folder):
    model, tok = AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    ids = torch.tensor([tok(TEXT)["input_ids"]])
    with torch.no_grad():
        out = model(ids, labels=ids)
    at = [0, 10, ids.shape[1] // 2, ids.shape[1] - 1]
    golden = {
        "text": TEXT,
        "input_ids": ids[0].tolist(),
        "loss": out.loss.item(),
        "positions": at,
        "logits": np.round(out.logits[0, at].numpy().astype(float), 6).tolist(),
    }
    (HERE / "stories260k.json").write_text(json.dumps(golden) + "\n")


if __name__ == "__main__":
    decoders()
    if len(sys.argv) > 1:
        stories(sys.argv[1])
