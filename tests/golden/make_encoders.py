"""Makes `encoders.json` from PyTorch: logits of small encoders of every family, on odd shapes.

    python tests/golden/make_encoders.py        # where torch and transformers 5 are installed

Their weights are those of `weights.py`, so that only shapes and logits are stored.
"""

import json
from pathlib import Path

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForMaskedLM, AutoModelForSequenceClassification
from weights import weights

HERE = Path(__file__).parent
SIZE = {
    "vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24,
    "max_position_embeddings": 20,
}  # fmt: skip
ROBERTA = {**SIZE, "max_position_embeddings": 22, "type_vocab_size": 1, "pad_token_id": 1, "layer_norm_eps": 1e-5}
FAMILIES = {
    "bert": {**SIZE, "pad_token_id": 0},
    "roberta": ROBERTA,
    "xlm-roberta": ROBERTA,
    "camembert": ROBERTA,
    "electra": {**SIZE, "embedding_size": 8, "pad_token_id": 0},
    "distilbert": {
        "vocab_size": 40, "dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 24, "max_position_embeddings": 20,
        "pad_token_id": 0,
    },
}  # fmt: skip
LAYERS = {"distilbert": "n_layers"}


def inputs(seed, lengths, padding_id, types):
    rng = np.random.default_rng(seed)
    longest = max(lengths)
    mask = (np.arange(longest) < np.array(lengths)[:, None]).astype(int)
    ids = np.where(mask, rng.integers(5, 40, mask.shape), padding_id)
    batch = {"input_ids": ids, "attention_mask": mask}
    if types:
        batch["token_type_ids"] = mask * (np.arange(longest) >= longest // 2)
    return batch


def golden(name, family, config, auto, batch):
    """A case: the logits of a model of a configuration, its weights those of `weights.py`."""
    model = auto.from_config(config).eval()
    shapes = {key: list(value.shape) for key, value in model.named_parameters()}
    values = weights(shapes)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            parameter.copy_(torch.from_numpy(values[key]))
    with torch.no_grad():
        logits = model(**{key: torch.from_numpy(np.asarray(value)) for key, value in batch.items()}).logits
    config.architectures = [type(model).__name__]
    kept = {key: value for key, value in config.to_diff_dict().items() if key != "transformers_version"}
    return {
        "name": name,
        "config": {"model_type": family, **kept},
        "shapes": shapes,
        "inputs": {key: np.asarray(value).tolist() for key, value in batch.items()},
        "logits": np.round(logits.numpy().astype(float), 7).tolist(),
    }


def case(family, name, auto, lengths, layers=2, **options):
    config = AutoConfig.for_model(family, **{**FAMILIES[family], LAYERS.get(family, "num_hidden_layers"): layers})
    for key, value in options.items():
        setattr(config, key, value)
    batch = inputs(len(name), lengths, FAMILIES[family]["pad_token_id"], family in ("bert", "electra"))
    return golden(name, family, config, auto, batch)


def main():
    classifier, lm = AutoModelForSequenceClassification, AutoModelForMaskedLM
    cases = []
    for family in FAMILIES:
        cases.append(case(family, "uneven, C = 2", classifier, [7, 3, 5], num_labels=2))
        cases.append(case(family, "masked LM", lm, [6, 4]))
        if family in ("xlm-roberta", "camembert"):
            continue
        cases.append(case(family, "full length, C = 5", classifier, [20, 11], num_labels=5))
        cases.append(case(family, "one token, one layer, C = 1", classifier, [1, 1], layers=1, num_labels=1))
    (HERE / "encoders.json").write_text("[\n" + ",\n".join(json.dumps(item) for item in cases) + "\n]\n")


if __name__ == "__main__":
    main()
