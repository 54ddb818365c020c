"""Makes `adapters.json` from PyTorch and the peft library: logits of small models with adapters.

    python -c "from tests.test_adapters import write_all; write_all('FOLDER')"     # jaxlin writes what peft reads
    python tests/golden/make_adapters.py FOLDER             # where torch, transformers 5 and peft are installed

The models are those of `encoders.json` and `decoders.json`. Weights of theirs and of adapters that peft writes are
those of `weights.py`, so that only configurations, shapes and logits are stored; of what jaxlin writes, a hash.
"""

import json
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from adapter_cases import FROM_PEFT, digest
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.numpy import load_file, save_file
from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification
from weights import weights

HERE = Path(__file__).parent
CASES = [*json.loads((HERE / "encoders.json").read_text()), *json.loads((HERE / "decoders.json").read_text())]
MODELS = {case["config"]["model_type"]: case for case in CASES if case["name"] == "uneven, C = 2"}


def filled(model, named):
    values = weights({name: list(parameter.shape) for name, parameter in named})
    with torch.no_grad():
        for name, parameter in named:
            parameter.copy_(torch.from_numpy(values[name]))
    return model.eval()


def base(family):
    case = MODELS[family]
    model = AutoModelForSequenceClassification.from_config(AutoConfig.for_model(**case["config"]))
    return filled(model, list(model.named_parameters()))


def outputs(model, family):
    inputs = {name: torch.from_numpy(np.array(value)) for name, value in MODELS[family]["inputs"].items()}
    with torch.no_grad():
        return model(**inputs)


def rounded(logits):
    return np.round(logits.numpy().astype(float), 7).tolist()


def from_peft(family):
    model = get_peft_model(base(family), LoraConfig(task_type="SEQ_CLS", **FROM_PEFT[family]))
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        config = json.loads((Path(folder) / "adapter_config.json").read_text())
        stored = load_file(Path(folder) / "adapter_model.safetensors")
        shapes = {name: list(value.shape) for name, value in sorted(stored.items())}
        # By the names that are stored, which is what the test does.
        save_file(weights(shapes), Path(folder) / "adapter_model.safetensors", metadata={"format": "pt"})
        logits = outputs(PeftModel.from_pretrained(base(family), folder).eval(), family).logits
    config["target_modules"] = sorted(t) if isinstance(t := config["target_modules"], list) else t
    return {"config": config, "shapes": shapes, "logits": rounded(logits)}


def from_jaxlin(folder):
    family = folder.name
    logits = outputs(PeftModel.from_pretrained(base(family), folder).eval(), family).logits
    config = json.loads((folder / "adapter_config.json").read_text())
    del config["base_model_name_or_path"]
    written = digest(folder / "adapter_model.safetensors", values=True)
    return {"config": config, "sha256": written, "logits": rounded(logits)}


def merged(folder):
    logits = outputs(AutoModelForSequenceClassification.from_pretrained(folder).eval(), folder.name).logits
    return {"sha256": digest(folder / "model.safetensors", values=False), "logits": rounded(logits)}


def headless(folder):
    """A model whose head no class of transformers has: as its card says."""
    state = outputs(AutoModel.from_pretrained(folder).eval(), folder.name).last_hidden_state
    mask = torch.tensor(MODELS[folder.name]["inputs"]["attention_mask"])
    features = (state * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
    head = load_file(folder / "jaxlin_head.safetensors")
    logits = features @ torch.from_numpy(head["weight"]).T + torch.from_numpy(head.get("bias", np.float32([0])))
    return {"sha256": digest(folder / "model.safetensors", values=False), "logits": rounded(logits)}


def headless_adapter(folder):
    case = MODELS[folder.name]
    model = AutoModel.from_config(AutoConfig.for_model(**case["config"]))
    whole = base(folder.name)
    model.load_state_dict(getattr(whole, whole.base_model_prefix).state_dict(), strict=False)
    adapted = PeftModel.from_pretrained(model.eval(), folder)
    assert any("lora" in name for name, _ in adapted.named_parameters())
    state = outputs(adapted.eval(), folder.name).last_hidden_state
    return {"sha256": digest(folder / "adapter_model.safetensors", values=True), "state": rounded(state[:, 0])}


def main(folder):
    made = {"from_peft": {family: from_peft(family) for family in FROM_PEFT}}
    for make in (from_jaxlin, merged, headless, headless_adapter):
        made[make.__name__] = {case.name: make(case) for case in sorted((folder / make.__name__).iterdir())}
    lines = [
        f"{json.dumps(kind)}: {{\n"
        + ",\n".join(f"{json.dumps(k)}: {json.dumps(v)}" for k, v in content.items())
        + "\n}"
        for kind, content in made.items()
    ]
    (HERE / "adapters.json").write_text("{" + ",\n".join(lines) + "}\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
