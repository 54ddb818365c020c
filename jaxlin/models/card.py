"""The `README.md` of what is exported: what it is, how it is used, and what is known of it."""

from __future__ import annotations

import json
from collections.abc import Mapping

_HEAD = """
No class of transformers has its head, which is in `jaxlin_head.safetensors`: logits are `features @ weight.T + bias` \
(a decoder's has no bias), where `features` is {features}."""

_FEATURES = {
    "mean": "the mean of the last hidden states over the tokens with `attention_mask` 1",
    "cls": "the last hidden state of the first token",
}


def model_card(base: str, kind: str, head: str | None, facts: Mapping[str, str], adapter: bool) -> str:
    """Returns a model card.

    Args:
        base: Name of the model that was fine-tuned.
        kind: Class of transformers that it is loaded by.
        head: What a head of our own reads: `"mean"` or `"cls"`; `None` if the class has the head.
        facts: What is known of it, heading to text.
        adapter: Whether it is an adapter of the `peft` library, not a whole model.
    """
    library = "peft" if adapter else "transformers"
    use = [f"from transformers import {kind}"]
    if adapter:
        use.insert(0, "from peft import PeftModel")
        use.append(f"model = PeftModel.from_pretrained({kind}.from_pretrained({json.dumps(base)}), FOLDER)")
    else:
        use.append(f"model = {kind}.from_pretrained(FOLDER)")
    lines = ["---", f"base_model: {json.dumps(base)}", f"library_name: {library}", "tags: [jaxlin]", "---", ""]
    what = "A LoRA adapter for" if adapter else "Fine-tuned from"
    lines += [f"{what} `{base}`, made by jaxlin.", "", "```python", *use, "```"]
    if head is not None:
        lines.append(_HEAD.format(features=_FEATURES[head]))
    if facts:
        lines += ["", "| | |", "|---|---|", *(f"| {name} | {text} |" for name, text in facts.items())]
    return "\n".join(lines) + "\n"
