"""Tiny adapters that PEFT itself saves, and what PEFT makes of them."""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.tiny import Tensors
from tests.tiny_families import TINY_BERT, TinyFamily


def tiny_adapter(
    folder: Path,
    base: Path,
    *,
    labels: int = 2,
    seed: int = 0,
    family: TinyFamily = TINY_BERT,
    tokenizer: bool = True,
    **lora: Any,
) -> Path:
    """A LoRA adapter of a classifier on `base`, with a head of its own and every weight drawn anew."""
    from transformers import AutoModelForSequenceClassification

    lora = {"task_type": "SEQ_CLS", "target_modules": ["query", "value"], **lora}
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=labels, ignore_mismatched_sizes=True)
    save_adapter(model, folder, seed, **lora)
    if tokenizer:
        family.tokenizer().save_pretrained(folder)
    return folder


def save_adapter(model: Any, folder: Path, seed: int, **lora: Any) -> None:
    """An adapter of `model`; PEFT begins with B = 0, which would show nothing."""
    import peft

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what PEFT says of its own settings
        adapted = peft.get_peft_model(model, peft.LoraConfig(**{"r": 4, "lora_alpha": 6, **lora}))
        drawn = torch.Generator().manual_seed(seed)
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.data = 0.2 * torch.randn(parameter.shape, generator=drawn)
        adapted.save_pretrained(folder)


def merged_by_peft(model: Any, adapter: Path) -> Any:
    """The model of transformers that PEFT makes of a whole one and an adapter."""
    import peft

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.PeftModel.from_pretrained(model, adapter).merge_and_unload().eval()


def edit_adapter(folder: Path, edit: Callable[[Tensors], Tensors | None]) -> None:
    """Rewrite an adapter's weights; `edit` changes its argument, or returns other tensors."""
    file = folder / "adapter_model.safetensors"
    tensors: dict[str, Tensor] = load_file(file)
    tensors = edit(tensors) or tensors
    file.unlink()
    save_file(tensors, file, {"format": "pt"})
