"""How much a merge holds: some rows of every model, however large the tensors are."""

import json
import multiprocessing
import struct
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from worker.engine.catalog.checkpoints.headers import read_header
from worker.engine.catalog.checkpoints.info import CheckpointInfo
from worker.engine.catalog.families import Kind, Slot
from worker.engine.catalog.families.bert import BERT
from worker.engine.catalog.methods import METHODS, MethodParameters
from worker.engine.catalog.planning.memory import RUNTIME_BYTES, MemoryNeeds, estimate
from worker.engine.catalog.planning.plan import MergePlan, PlannedTensor
from worker.engine.catalog.primitives.values import TensorPlace
from worker.engine.checkpoints.writer import ShardWriter
from worker.engine.merging.backbone import Backbone
from worker.engine.merging.methods import BUILDERS, MeasuredModel
from worker.engine.runtime.device import peak_memory_bytes, reset_peak_memory

WIDTH = 1000
TINY_ROWS, SMALL_ROWS, LARGE_ROWS = 20, 3_000, 30_000  # in float32 80 kB, 12 MB and 120 MB
MOST_GROWTH = 30_000_000  # bytes, a quarter of the large tensor in one model
MODELS, MANY_ROWS = 16, 3000  # 12 blocks of each
NAME = "bert.embeddings.word_embeddings.weight"
LINEAR = "bert.encoder.layer.0.output.dense.weight"


def sparse_file(folder: Path, name: str, rows: int, drawn: int = 20) -> Path:
    """One tensor of float32, beyond the rows that are drawn a hole that takes no room and reads as zeros."""
    size = 4 * rows * WIDTH
    header = json.dumps({NAME: {"dtype": "F32", "shape": [rows, WIDTH], "data_offsets": [0, size]}}).encode()
    path = folder / f"{name}.{rows}.safetensors"
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        file.write(torch.randn(drawn, WIDTH, generator=torch.Generator().manual_seed(rows)).numpy().tobytes())
        file.truncate(8 + len(header) + size)
    return path


def planned(folder: Path, rows: int, models: int = 2, drawn: int = 20) -> MergePlan:
    """Of models and their base."""
    names = [*map(str, range(models)), "base"]
    tensors = [next(iter(read_header(sparse_file(folder, n, rows, drawn), n))) for n in names]
    slot, place = Slot(NAME, Kind.EMBEDDING, None, False), TensorPlace(NAME, 0.0)
    tensor = PlannedTensor(slot, place, (rows, WIDTH), "BF16", tuple(tensors[:-1]), tensors[-1])
    infos = [CheckpointInfo(n, folder, {}, {NAME: t}, {}, folder) for n, t in zip(names, tensors, strict=True)]
    return MergePlan(BERT, tuple(infos[:-1]), infos[-1], (), (tensor,), (), ())


def planned_matrix(folder: Path, shape: tuple[int, int]) -> MergePlan:
    """Of two models and their base, which differ in all of a linear layer's weight."""
    rng, infos = torch.Generator().manual_seed(0), []
    for name in ("0", "1", "base"):
        path = folder / f"{name}.{shape[0]}.safetensors"
        save_file({LINEAR: torch.randn(shape, generator=rng)}, path)
        infos.append(CheckpointInfo(name, folder, {}, {LINEAR: next(iter(read_header(path, name)))}, {}, folder))
    slot = BERT.slot(LINEAR)
    assert slot is not None
    *models, base = (info.tensors[LINEAR] for info in infos)
    tensor = PlannedTensor(slot, TensorPlace(LINEAR, 0.0), shape, "BF16", tuple(models), base)
    return MergePlan(BERT, tuple(infos[:-1]), infos[-1], (), (tensor,), (), ())


def merge_parameters(method: str, **given: float) -> MethodParameters:
    return METHODS[method].parameters.model_validate({"name": method, **given})


def peak_bytes(plan: MergePlan, parameters: MethodParameters, folder: Path) -> tuple[int, int]:
    """What this process holds before it merges and writes the tensor, and the most that it holds then."""
    torch.set_num_threads(1)
    models = [MeasuredModel(1.0 + index) for index in range(len(plan.checkpoints))]
    merger = BUILDERS[parameters.name](parameters, models)
    reset_peak_memory()
    before = peak_memory_bytes()
    [tensor] = plan.backbone
    file = folder / "merged.safetensors"
    with Backbone(plan, [True] * len(models), merger) as merged, ShardWriter(file, plan.backbone) as writer:
        writer.write(tensor, merged.blocks(tensor))
    file.unlink()
    return before, peak_memory_bytes()


def taken_by_matrix(parameters: MethodParameters, shape: tuple[int, int], folder: Path) -> tuple[int, int]:
    """What a merge of the matrix takes after a first, small one; and what is announced of it."""
    peak_bytes(planned_matrix(folder, (TINY_ROWS, TINY_ROWS)), parameters, folder)
    plan = planned_matrix(folder, shape)
    before, peak = peak_bytes(plan, parameters, folder)
    return peak - before, estimate(plan, MemoryNeeds(parameters, loads_models=False, threads=1)) - RUNTIME_BYTES


def taken(plan: MergePlan, parameters: MethodParameters, folder: Path) -> int:
    """What a merge takes beyond what the process holds, once all that a first one loads is there."""
    peak_bytes(planned(folder, TINY_ROWS), parameters, folder)
    before, peak = peak_bytes(plan, parameters, folder)
    return peak - before


def growth(parameters: MethodParameters, folder: Path) -> int:
    """How much more the large tensor takes than the small one, after a first merge as in `taken`."""
    models = METHODS[parameters.name].models[1] or 2
    plans = [planned(folder, rows, models) for rows in (TINY_ROWS, SMALL_ROWS, LARGE_ROWS)]
    _, (_, small), (_, large) = (peak_bytes(plan, parameters, folder) for plan in plans)
    return large - small


@pytest.fixture(scope="module")
def alone() -> Callable[..., Any]:
    """Calls a function in a process of its own, which has what this file imports and memory of nobody else."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])

    def call(function: Callable[..., Any], *arguments: Any) -> Any:
        with ProcessPoolExecutor(1, context) as process:
            return process.submit(function, *arguments).result()

    return call


def without_statistics() -> list[dict[str, Any]]:
    merging = METHODS.keys() - {"passthrough"}  # which copies rows, and is tested to copy every bit
    made = [METHODS[name].parameters.model_validate({"name": name}) for name in sorted(merging)]
    return [{"name": of.name} for of in made if of.merges_rows and not of.statistics]


OF_EACH_KIND = {"slerp", "ties", "della", "karcher"}
"""A method that takes values as they come, one that ranks them, one that draws, one that repeats."""
VARIANTS: list[dict[str, Any]] = [
    {"name": "nuslerp", "vectors": "rows"},
    {"name": "nuslerp", "vectors": "columns"},
    {"name": "model_stock", "filter_wise": True},
    {"name": "sce", "select_topk": 0.5},
]


@pytest.mark.parametrize(
    "method",
    [
        pytest.param(method, marks=() if method["name"] in OF_EACH_KIND else pytest.mark.long)
        for method in [*without_statistics(), *VARIANTS]
    ],
    ids=lambda of: " ".join(map(str, of.values())),
)
def test_what_is_held_does_not_grow_with_the_tensor(
    tmp_path: Path, alone: Callable[..., Any], method: dict[str, Any]
) -> None:
    """In a process of its own: memory that another merge gave back would hide what this one takes."""
    parameters = METHODS[method["name"]].parameters.model_validate(method)
    assert alone(growth, parameters, tmp_path) < MOST_GROWTH


@pytest.mark.parametrize(
    ("method", "given"),
    [
        ("average", {}),
        ("ties", {"density": 0.3}),
        pytest.param("breadcrumbs", {"density": 0.3, "gamma": 0.1}, marks=pytest.mark.long),
        pytest.param("sce", {"select_topk": 0.3}, marks=pytest.mark.long),
        pytest.param("della", {}, marks=pytest.mark.long),
        ("model_stock", {}),
    ],
)
def test_no_less_is_announced_than_many_models_take(
    tmp_path: Path, alone: Callable[..., Any], method: str, given: dict[str, float]
) -> None:
    """Of one tensor of several blocks, in a process that has no memory of others to use again."""
    parameters = merge_parameters(method, **given)
    plan = planned(tmp_path, MANY_ROWS, models=MODELS, drawn=MANY_ROWS)
    announced = estimate(plan, MemoryNeeds(parameters, loads_models=False, threads=1))
    assert 0.2 * (announced - RUNTIME_BYTES) < alone(taken, plan, parameters, tmp_path) < announced - RUNTIME_BYTES


@pytest.mark.parametrize(
    ("method", "shape"), [({"name": "tsv_m"}, (900, 900)), ({"name": "wudi", "filter": "exponential"}, (1600, 500))]
)
def test_no_less_is_announced_than_decomposing_a_matrix_takes(
    tmp_path: Path, alone: Callable[..., Any], method: dict[str, Any], shape: tuple[int, int]
) -> None:
    parameters = METHODS[method["name"]].parameters.model_validate(method)
    found, announced = alone(taken_by_matrix, parameters, shape, tmp_path)
    assert 0.3 * announced < found < announced
