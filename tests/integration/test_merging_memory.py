"""How much a merge holds: some rows of every model, however large the tensors are."""

import json
import multiprocessing
import struct
from collections.abc import Iterator
from concurrent.futures import Executor, ProcessPoolExecutor
from pathlib import Path

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
SMALL_ROWS, LARGE_ROWS = 10_000, 100_000  # in float32 40 and 400 MB
MOST_BYTES = 100_000_000  # a quarter of the large tensor in one model
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


def held_bytes(method: str, folder: Path, rows: int) -> int:
    """How far merging and writing the tensor takes this process above what it holds before."""
    torch.set_num_threads(1)
    plan = planned(folder, rows)
    parameters = METHODS[method].parameters.model_validate({"name": method})
    reset_peak_memory()
    before = peak_memory_bytes()
    [tensor] = plan.backbone
    file = folder / "merged.safetensors"
    with (
        Backbone(plan, (True, True), BUILDERS[method](parameters, [MeasuredModel(1.0), MeasuredModel(2.0)])) as merged,
        ShardWriter(file, plan.backbone) as writer,
    ):
        writer.write(tensor, merged.blocks(tensor))
    file.unlink()
    return peak_memory_bytes() - before


@pytest.fixture(scope="module")
def process() -> Iterator[Executor]:
    """A process that holds nothing else."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        yield pool


def without_statistics() -> list[str]:
    merging = METHODS.keys() - {"passthrough"}  # which copies rows, and is tested to copy every bit
    made = {name: METHODS[name].parameters.model_validate({"name": name}) for name in sorted(merging)}
    return [name for name, parameters in made.items() if parameters.merges_rows and not parameters.statistics]


@pytest.mark.parametrize("method", without_statistics())
def test_what_is_held_does_not_grow_with_the_tensor(process: Executor, tmp_path: Path, method: str) -> None:
    small, large = (process.submit(held_bytes, method, tmp_path, rows).result() for rows in (SMALL_ROWS, LARGE_ROWS))
    assert small < MOST_BYTES
    assert large < MOST_BYTES
