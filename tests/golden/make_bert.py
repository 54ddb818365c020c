"""Makes the golden files of BERT from PyTorch; run where torch, transformers 5 and tokenizers are installed.

    python tests/golden/make_bert.py [MINILM_FOLDER]

Writes `tiny_bert/` (a small random checkpoint with its tokenizer, as transformers saves it, and the
logits that PyTorch computes for it) and, given the folder of all-MiniLM-L6-v2, `minilm.json`.
"""

import json
import string
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    PreTrainedTokenizerFast,
)

HERE = Path(__file__).parent
TEXTS = ["a dull film", "This function returns the number of seconds since the epoch, as a float.", "yes"]
PAIRS = ["it is good", "why?", "one two three four five"]
CHARACTERS = string.ascii_lowercase + string.digits + string.punctuation


def tokenizer() -> PreTrainedTokenizerFast:
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    words = ["the", "of", "is", "and", "to", "in", "good", "bad", "film", "##ing", "##ed"]
    pieces = special + list(CHARACTERS) + [f"##{c}" for c in string.ascii_lowercase + string.digits] + words
    tok = Tokenizer(models.WordPiece({piece: i for i, piece in enumerate(pieces)}, unk_token="[UNK]"))
    tok.normalizer = normalizers.BertNormalizer(lowercase=True)
    tok.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tok.post_processor = processors.BertProcessing(("[SEP]", pieces.index("[SEP]")), ("[CLS]", pieces.index("[CLS]")))
    names = dict(zip(("pad_token", "unk_token", "cls_token", "sep_token", "mask_token"), special, strict=True))
    return PreTrainedTokenizerFast(tokenizer_object=tok, model_max_length=128, **names)


def tiny_bert() -> None:
    folder = HERE / "tiny_bert"
    tok = tokenizer()
    config = BertConfig(
        vocab_size=len(tok), hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48,
        max_position_embeddings=128, num_labels=3, initializer_range=0.15, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    model = BertForSequenceClassification(config).eval()
    with torch.no_grad():  # transformers starts biases at 0 and norms at 1, which would hide a mix-up
        for name, parameter in model.named_parameters():
            if name.endswith("bias") or "LayerNorm" in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    tok.save_pretrained(folder)
    names = folder / "tokenizer_config.json"  # transformers 4.57 does not know the class that 5 writes
    names.write_text(names.read_text().replace("TokenizersBackend", "PreTrainedTokenizerFast"))
    batch = tok(TEXTS, PAIRS, padding=True, return_tensors="pt")
    batch["token_type_ids"] = torch.stack(
        [(torch.arange(row.shape[0]) > row.tolist().index(3)).long() * m for row, m in zip(
            batch["input_ids"], batch["attention_mask"], strict=True)]
    )  # fmt: skip
    save = {name: batch[name].to(torch.int32) for name in ("input_ids", "attention_mask", "token_type_ids")}
    with torch.no_grad():
        for act in ("gelu", "gelu_new", "relu", "silu"):
            other = BertForSequenceClassification(BertConfig(**{**config.to_dict(), "hidden_act": act})).eval()
            other.load_state_dict(model.state_dict())
            save[f"logits_{act}"] = other(**batch).logits
        state = model.bert(**batch).last_hidden_state
        weight = batch["attention_mask"][..., None] / batch["attention_mask"].sum(1)[:, None, None]
        save["mean"] = (state * weight).sum(1)
        save["cls"] = state[:, 0].contiguous()
    save_file(save, folder / "golden.safetensors")


def minilm(folder: str) -> None:
    model, tok = BertModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    batch = tok(TEXTS, padding="longest", truncation=False, return_tensors="pt")
    with torch.no_grad():
        state = model(**batch).last_hidden_state
    weight = batch["attention_mask"][..., None] / batch["attention_mask"].sum(1)[:, None, None]
    golden = {
        "texts": TEXTS,
        "input_ids": batch["input_ids"].tolist(),
        "mean": (state * weight).sum(1).tolist(),
    }
    (HERE / "minilm.json").write_text(json.dumps(golden) + "\n")


if __name__ == "__main__":
    tiny_bert()
    if len(sys.argv) > 1:
        minilm(sys.argv[1])
