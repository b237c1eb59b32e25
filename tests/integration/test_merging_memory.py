"""How much a merge holds: some rows of every model, however large the tensors are."""

import json
import multiprocessing
import struct
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from worker.engine.backbone import Backbone
from worker.engine.catalog.families import Kind, Slot
from worker.engine.catalog.families.bert import BERT
from worker.engine.catalog.headers import CheckpointInfo, read_header
from worker.engine.catalog.methods import METHODS
from worker.engine.catalog.planning import MergePlan, PlannedTensor
from worker.engine.catalog.values import Place
from worker.engine.checkpoints.writer import ShardWriter
from worker.engine.device import peak_memory_bytes, reset_peak_memory
from worker.engine.methods import BUILDERS, MeasuredModel

WIDTH = 1000
TINY_ROWS, SMALL_ROWS, LARGE_ROWS = 20, 3_000, 30_000  # in float32 80 kB, 12 MB and 120 MB
MOST_GROWTH = 30_000_000  # bytes, a quarter of the large tensor in one model
NAME = "bert.embeddings.word_embeddings.weight"


def sparse_file(folder: Path, name: str, rows: int) -> Path:
    """One tensor of float32, almost all of it a hole that takes no room and reads as zeros."""
    size = 4 * rows * WIDTH
    header = json.dumps({NAME: {"dtype": "F32", "shape": [rows, WIDTH], "data_offsets": [0, size]}}).encode()
    path = folder / f"{name}.{rows}.safetensors"
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        file.write(torch.randn(20, WIDTH, generator=torch.Generator().manual_seed(rows)).numpy().tobytes())
        file.truncate(8 + len(header) + size)
    return path


def planned(folder: Path, rows: int) -> MergePlan:
    """Of two models and their base."""
    first, second, base = (next(iter(read_header(sparse_file(folder, n, rows), n))) for n in ("a", "b", "base"))
    tensor = PlannedTensor(
        Slot(NAME, Kind.EMBEDDING, None, False), Place(NAME, 0.0), (rows, WIDTH), "BF16", (first, second), base
    )
    ancestor = CheckpointInfo("base", folder, {}, {NAME: base}, {}, folder)
    return MergePlan(BERT, (), ancestor, (), (tensor,), (), ())


def peak_bytes(method: dict[str, Any], folder: Path, rows: int) -> int:
    """The most that this process holds while it merges and writes the tensor."""
    plan = planned(folder, rows)
    entry = METHODS[method["name"]]
    merger = BUILDERS[entry.name](entry.parameters.model_validate(method), [MeasuredModel(1.0), MeasuredModel(2.0)])
    reset_peak_memory()
    [tensor] = plan.backbone
    file = folder / "merged.safetensors"
    with Backbone(plan, (True, True), merger) as merged, ShardWriter(file, plan.backbone) as writer:
        writer.write(tensor, merged.blocks(tensor))
    file.unlink()
    return peak_memory_bytes()


def growth(method: dict[str, Any], folder: Path) -> int:
    """How much more the large tensor takes than the small one, once all that a first merge loads is there."""
    torch.set_num_threads(1)
    _, small, large = (peak_bytes(method, folder, rows) for rows in (TINY_ROWS, SMALL_ROWS, LARGE_ROWS))
    return large - small


def without_statistics() -> list[dict[str, Any]]:
    merging = METHODS.keys() - {"passthrough"}  # which copies rows, and is tested to copy every bit
    made = [METHODS[name].parameters.model_validate({"name": name}) for name in sorted(merging)]
    return [{"name": of.name} for of in made if of.merges_rows and not of.statistics]


VARIANTS: list[dict[str, Any]] = [
    {"name": "nuslerp", "vectors": "rows"},
    {"name": "nuslerp", "vectors": "columns"},
    {"name": "model_stock", "filter_wise": True},
    {"name": "sce", "select_topk": 0.5},
]


@pytest.mark.parametrize("method", [*without_statistics(), *VARIANTS], ids=lambda of: " ".join(map(str, of.values())))
def test_what_is_held_does_not_grow_with_the_tensor(tmp_path: Path, method: dict[str, Any]) -> None:
    """In a process of its own: memory that another merge gave back would hide what this one takes."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        assert pool.submit(growth, method, tmp_path).result() < MOST_GROWTH
