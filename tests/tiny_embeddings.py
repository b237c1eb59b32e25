"""Tiny embedding models, as sentence-transformers saves them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from tests.tiny import tiny_base
from tests.tiny_families import TINY_BERT, TinyFamily


def embedding_model(
    folder: Path, seed: int, pooling: str = "cls", *more: str, prompts: Any = None, family: TinyFamily = TINY_BERT
) -> Path:
    """As the library saves it: a transformer, pooling, and more modules."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Dense, LayerNorm, Normalize, Pooling, Transformer

    transformer = folder.parent / f"{folder.name}-transformer"
    tiny_base(transformer, family=family, base_seed=1000 + seed)
    family.tokenizer().save_pretrained(transformer)
    torch.manual_seed(seed)
    width = 16 * len(pooling.split("+"))
    made: dict[str, Callable[[], Any]] = {
        "dense": lambda: Dense(width, 8, activation_function=torch.nn.GELU()),
        "residual": lambda: Dense(width, 8, bias=False, use_residual=True),
        "layer norm": lambda: LayerNorm(8),
        "normalize": Normalize,
    }
    modules = [Transformer(str(transformer)), Pooling(16, tuple(pooling.split("+"))), *(made[name]() for name in more)]
    for module in modules[2:]:
        for parameter in module.parameters():
            torch.nn.init.normal_(parameter)
    model = SentenceTransformer(modules=modules, device="cpu", prompts=prompts)
    model.save_pretrained(str(folder), create_model_card=False)
    return folder
