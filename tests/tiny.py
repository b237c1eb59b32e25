"""Tiny real inputs: checkpoints that transformers loads with their tokenizer, rows for them, and merges of both."""

import json
import random
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tests.tiny_families import TINY_BERT, WORDS, TinyFamily
from worker.engine.catalog.contracts.spec import MergeSpec, ModelSpec
from worker.engine.catalog.data.rows import Row, RowFile, sample
from worker.engine.catalog.data.spec import DatasetSpec
from worker.engine.catalog.families import Slot
from worker.engine.catalog.primitives.values import TensorPlace
from worker.engine.merging.methods.blocks import Block, Merger, Versions

LAYERS = 2
HEADS = 4
NEURONS = 24
POSITIONS = 48
SPREAD = 0.3  # of the ancestor's weights: wide enough for attention and softmax to leave their linear range
STEP = 0.1  # of a fine-tuning

Tensors = dict[str, Tensor]


def tiny_checkpoint(
    folder: Path,
    *,
    family: TinyFamily = TINY_BERT,
    labels: int = 2,
    seed: int = 0,
    base_seed: int = 1000,
    problem_type: str | None = None,
    dtype: torch.dtype = torch.float32,
    hidden: int = 16,
    layers: int = LAYERS,
    names: Sequence[str] | None = None,
    task: str = "SequenceClassification",
) -> Path:
    """A model as `save_pretrained` writes it: the ancestor of `base_seed`, fine-tuned as `seed` says, its own head.

    `task` is the end of the name of its Auto class. One label, or `problem_type` regression, is a regression head.
    `names` are the labels' names.
    """
    if names is None and family.names_labels:
        names = [f"label {chr(ord('a') + index)}" for index in range(labels)]
    named = {"id2label": dict(enumerate(names)), "label2id": {n: i for i, n in enumerate(names)}} if names else {}
    settings = {**(named or {"num_labels": labels}), "problem_type": problem_type}
    if task not in ("SequenceClassification", "TokenClassification", "ImageClassification"):
        settings = {}
    model = _tiny_model(family, (hidden, layers), seed, base_seed, STEP, settings, task)
    model.to(dtype).save_pretrained(folder)
    family.tokenizer().save_pretrained(folder)
    return folder


def tiny_base(
    folder: Path, *, family: TinyFamily = TINY_BERT, base_seed: int = 1000, hidden: int = 16, layers: int = LAYERS
) -> Path:
    """The ancestor of `tiny_checkpoint`s, without head, as pre-trained models are published."""
    _tiny_model(family, (hidden, layers), 0, base_seed, 0.0, {}).base_model.save_pretrained(folder)
    return folder


def _tiny_model(
    family: TinyFamily,
    size: tuple[int, int],
    seed: int,
    base_seed: int,
    width: float,
    settings: Mapping[str, Any],
    task: str = "SequenceClassification",
) -> Any:
    # Imported late: whoever imports this module may still have to say that the hub is out of reach.
    import transformers
    from transformers import AutoConfig

    hidden, layers = size
    of_texts = {}
    if task != "ImageClassification":
        of_texts = {
            "vocab_size": len(family.tokenizer()),
            "max_position_embeddings": POSITIONS + family.reserved_positions,
        }
    config = AutoConfig.for_model(
        family.model_type,
        **family.configured(hidden, HEADS, layers, NEURONS),
        **of_texts,
        **settings,
    )
    model = getattr(transformers, f"AutoModelFor{task}").from_config(config)
    ancestor, fine_tuning = torch.Generator().manual_seed(base_seed), torch.Generator().manual_seed(seed)
    state = {}
    for name, tensor in model.state_dict().items():
        step = torch.randn(tensor.shape, generator=fine_tuning)
        if name.startswith(family.head):
            state[name] = step
        else:
            centre = 1.0 if "norm" in name.lower() and name.endswith("weight") else 0.0
            state[name] = centre + SPREAD * torch.randn(tensor.shape, generator=ancestor) + width * step
    model.load_state_dict(state)
    return model


def edit_tensors(checkpoint: Path, edit: Callable[[Tensors], Tensors | None]) -> None:
    """Rewrite the weights of a checkpoint of one file; `edit` changes its argument, or returns other tensors."""
    file = checkpoint / "model.safetensors"
    tensors = load_file(file)
    tensors = edit(tensors) or tensors
    file.unlink()
    save_file(tensors, file, {"format": "pt"})


def edit_json(file: Path, **changes: Any) -> None:
    """Change keys of a JSON object; None removes a key."""
    content = {**json.loads(file.read_text()), **changes}
    file.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


def tiny_texts(count: int, seed: int = 0, longest: int = POSITIONS - 8) -> list[str]:
    """Texts of 3 to `longest` words, each word one token."""
    rng = random.Random(seed)
    return [" ".join(rng.choices(WORDS, k=rng.randint(3, longest))) for _ in range(count)]


def write_rows(file: Path, *, count: int = 40, labels: int = 2, seed: int = 0, longest: int = POSITIONS - 8) -> Path:
    """JSON lines with `text` and `label`: an id, or for one label a number."""
    rng = random.Random(f"labels {seed}")
    texts = tiny_texts(count, seed, longest)
    rows = [{"text": text, "label": rng.randrange(labels) if labels > 1 else rng.gauss(0, 1)} for text in texts]
    return write_lines(file, [json.dumps(row) for row in rows])


def write_lines(file: Path, lines: Sequence[str]) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return file


def dataset_spec(file: Path, **columns: Any) -> DatasetSpec:
    return DatasetSpec(source=file.name, path=file, **{"label": "label", **columns})


def read_rows(file: Path) -> list[Row]:
    """Every row of a file, in its order."""
    spec = dataset_spec(file)
    return sample(RowFile(spec), spec, None, shuffle=False)


def model_spec(checkpoint: Path, rows: Path | None = None, *, weight: float = 1.0, **fields: Any) -> ModelSpec:
    """The checkpoint under its folder's name, scored on `rows`."""
    dataset = None if rows is None else dataset_spec(rows)
    fields = {"name": checkpoint.name, "source": f"local:{checkpoint.name}", "dataset": dataset, **fields}
    return ModelSpec(path=checkpoint, weight=weight, **fields)


def merge_spec(
    folder: Path,
    models: Sequence[ModelSpec],
    method: Mapping[str, Any] | None = None,
    *,
    evaluate: bool = False,
    **output: Any,
) -> MergeSpec:
    """A merge in float32 whose artifact goes to `folder`."""
    method = {"name": "mask_fisher", "precision": "float32", **(method or {})}
    fields = {"models": list(models), "method": method, "output": output, "folder": folder}
    return MergeSpec.model_validate({"name": "tiny", "evaluate": evaluate, "recipe": {"method": method}, **fields})


def versions_of(
    slot: Slot,
    versions: Sequence[Tensor],
    base: Tensor | None = None,
    place: TensorPlace | None = None,
    block_elements: int = 64,
) -> Versions:
    """Versions of one tensor in memory, in blocks so small that most tensors have several."""

    def read(rows: slice) -> Block:
        if not versions[0].dim():
            return Block.of(rows, versions, base)
        return Block.of(rows, [v[rows] for v in versions], None if base is None else base[rows])

    return Versions(slot, place or TensorPlace(slot.name, 0.0), versions[0].shape, read, block_elements)


def merged_of(merger: Merger, slot: Slot, versions: Sequence[Tensor], base: Tensor | None = None, **how: Any) -> Tensor:
    """What a method makes of versions in memory."""
    given = versions_of(slot, versions, base, **how)
    merge = merger(given)
    parts = [merge(block) for block in given.blocks()]
    return torch.cat(parts) if given.shape else parts[0]


def float64_model(checkpoint: Path) -> Any:
    """The model as transformers loads it, for computing what the engine should find."""
    from transformers import AutoModelForSequenceClassification

    return AutoModelForSequenceClassification.from_pretrained(checkpoint, dtype=torch.float64).eval()


def insert_masks(model: Any, family: TinyFamily = TINY_BERT) -> tuple[Tensor, ...]:
    """Real masks at one of each kind of node: (layers, heads) times the heads' contexts, (layers, neurons) times the
    activations, and (layers, heads that others share) times the contexts of all heads that share one. Masks of layers
    that share their weights multiply in every use."""
    masks = {
        kind: torch.ones(family.stored(LAYERS), count, dtype=torch.float64, requires_grad=True)
        for kind, count in family.counts(HEADS, NEURONS).items()
    }
    for kind, mask in masks.items():
        blocks, module = family.seen_at(kind)
        for layer, block in enumerate(model.get_submodule(blocks)):
            _multiply_input(block.get_submodule(module), mask, layer)
    return tuple(masks.values())


def _multiply_input(module: nn.Module, masks: Tensor, layer: int) -> None:
    def multiply(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return inputs[0] * masks[layer].repeat_interleave(inputs[0].shape[-1] // masks.shape[1]), *inputs[1:]

    module.register_forward_pre_hook(multiply)


def silent(*_: object) -> None:
    """A listener that lets everything pass."""


def read_model(folder: Path) -> Tensors:
    """Every tensor of a checkpoint folder, whatever its shards."""
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def drifted_tensors(
    shape: Sequence[int], models: int = 3, dtype: torch.dtype = torch.float32, *, seed: int
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """A base, and models that have drifted from it, in part alike."""
    rng = torch.Generator().manual_seed(seed)
    base, common = (torch.randn(tuple(shape), generator=rng, dtype=torch.float64) for _ in range(2))
    steps = [torch.randn(tuple(shape), generator=rng, dtype=torch.float64) for _ in range(models)]
    return base.to(dtype), [(base + 0.2 * common + 0.3 * step).to(dtype) for step in steps]
