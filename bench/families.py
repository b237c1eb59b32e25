"""The packaged BERT as a checkpoint of every family, and experts fine-tuned from it.

What a family computes as BERT does, it computes with the same pre-trained weights under its own names. Relative
positions are what some families add: MPNet's start at zero, DeBERTa's small.
"""

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

# Before this folder, one file of which is called as the one of the examples.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))

import torch
from experts import Row, base_model_folder, fit, make_batches, write_rows
from torch import Tensor
from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification, AutoTokenizer

from worker.engine.catalog.families import FAMILIES, Family, Kind

__all__ = ["fine_tune", "write_ancestor", "write_rows"]

BERT = FAMILIES["bert"]
BATCH_ROWS = 32
ENCODERS = ("bert", "camembert", "deberta-v2", "distilbert", "electra", "mpnet", "roberta", "xlm-roberta")
"""Model types that the packaged BERT can be written as."""
SEGMENTS = "embeddings.token_type_embeddings"
POSITIONS = "embeddings.position_embeddings"
RELATIVE_SCALE = 0.2  # of DeBERTa's relative positions, which its layer norm would else make as large as the text
OWN_SETTINGS: dict[str, dict[str, Any]] = {
    "deberta-v2": {
        "relative_attention": True,
        "position_buckets": 64,
        "pos_att_type": ["p2c", "c2p"],
        "share_att_key": True,
        "norm_rel_ebd": "layer_norm",
        "position_biased_input": True,  # unlike DeBERTa v3, so that BERT's own positions have a place
    },
    "mpnet": {"pad_token_id": 1},
}
PROBE = ["A cat sat on the mat.", "Shares in London fell for the third day in a row, and the pound with them."]


def write_ancestor(model_type: str, folder: Path) -> float:
    """Write the packaged BERT as a checkpoint of the family, without a task head.

    Returns:
        The largest difference of a last hidden state from BERT's, relative positions left out.
    """
    source = base_model_folder()
    bert = AutoModel.from_pretrained(source, attn_implementation="eager").eval()
    tokenizer = AutoTokenizer.from_pretrained(source)
    family = FAMILIES[model_type]
    if SEGMENTS not in family.outer_modules:
        tokenizer.model_input_names = ["input_ids", "attention_mask"]
    model = AutoModel.from_config(configuration(family, bert.config), attn_implementation="eager").eval()
    state = model.state_dict()
    for name, tensor in renamed(bert.state_dict(), family, model.config.to_dict()).items():
        state[name].copy_(tensor)
    for name in ("encoder.relative_attention_bias.weight", "encoder.LayerNorm.weight"):
        if name in state:
            state[name].zero_()
    probe = tokenizer(PROBE, padding=True, return_tensors="pt")
    with torch.inference_mode():
        ours, reference = (run(**probe).last_hidden_state[probe["attention_mask"].bool()] for run in (model, bert))
    if "encoder.LayerNorm.weight" in state:
        state["encoder.LayerNorm.weight"].fill_(RELATIVE_SCALE)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return float((ours - reference).abs().max())


def configuration(family: Family, bert: Any) -> Any:
    """BERT's sizes under the family's names, and positions for the rows that it never reads."""
    sizes = {family.config_names[what]: getattr(bert, name) for what, name in BERT.config_names.items()}
    own = OWN_SETTINGS.get(family.model_type, {})
    settings = {"pad_token_id": 0, "vocab_size": bert.vocab_size, "layer_norm_eps": bert.layer_norm_eps} | own
    settings |= {"type_vocab_size": bert.type_vocab_size, "embedding_size": bert.hidden_size}
    sizes[family.config_names["positions"]] += _unread_positions(family, settings)
    return AutoConfig.for_model(family.model_type, **sizes, **settings)


def renamed(bert: Mapping[str, Tensor], family: Family, settings: Mapping[str, Any]) -> dict[str, Tensor]:
    """BERT's tensors under the family's names, changed to give the same where the family computes otherwise."""
    of_kind = {kind: module for module, kind in family.layer_kinds.items()}
    state = {}
    for name, tensor in bert.items():
        slot = BERT.slot(f"bert.{name}")
        if slot is None or slot.kind is Kind.UNREAD or (slot.kind is Kind.POOLER and family is not BERT):
            continue
        if slot.layer is not None:
            part = "bias" if slot.is_bias else "weight"
            path = family.layers.format(layer=slot.layer)
            if family.model_type == "deberta-v2" and slot.kind is Kind.QUERY:
                # Scores are divided by sqrt(3 width); where tokens say nothing to positions, the bias counts twice.
                tensor = tensor * 3**0.5 / (2 if slot.is_bias else 1)
            state[f"{path}.{of_kind[slot.kind]}.{part}"] = tensor
        else:
            state[name] = tensor
    positions = state[f"{POSITIONS}.weight"]
    if SEGMENTS not in family.outer_modules:
        positions = positions + state.pop(f"{SEGMENTS}.weight")[0]
    unread = torch.zeros(_unread_positions(family, settings), positions.shape[1])
    return {**state, f"{POSITIONS}.weight": torch.cat([unread, positions])}


def _unread_positions(family: Family, settings: Mapping[str, Any]) -> int:
    return 0 if family.padding_position is None else int(settings["pad_token_id"]) + 1


def fine_tune(ancestor: Path, labels: list[str], train: list[Row], folder: Path, epochs: int, seed: int) -> None:
    """Write an expert: the ancestor with a new head, trained on the rows as the examples' experts are."""
    torch.manual_seed(seed)
    tokenizer = AutoTokenizer.from_pretrained(ancestor)
    tokenizer.save_pretrained(folder)  # before its use, which would leave this training's settings in it
    model = AutoModelForSequenceClassification.from_pretrained(
        ancestor,
        num_labels=len(labels),
        id2label=dict(enumerate(labels)),
        label2id={name: label for label, name in enumerate(labels)},
        attn_implementation="eager",
    )
    fit(model, make_batches(tokenizer, train, BATCH_ROWS), epochs, seed, on_step=lambda done, total: None)
    model.save_pretrained(folder)
