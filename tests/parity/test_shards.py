"""Scoring that is cut into shards gives the bits of scoring that is not, whoever computes which shard."""

import random
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.tiny import merge_spec, model_spec, silent, tiny_checkpoint, write_rows
from worker.engine.catalog.contracts.report import ScoreResult
from worker.engine.catalog.contracts.spec import ScoreSpec, ShardSpec, ShardWork, SharedScoring, StoreSpec
from worker.engine.catalog.contracts.statistics import NODE_SUMS
from worker.engine.checkpoints.reader import Digests
from worker.engine.jobs.context import EngineState, job_context
from worker.engine.jobs.cutting import Cut, Cutter, Part
from worker.engine.jobs.engine import Engine
from worker.engine.jobs.score import load
from worker.engine.models.loading import ModelCache
from worker.engine.scoring.batching import BatchSizes
from worker.engine.scoring.pieces import PIECE_ROWS, in_pieces, pieces

ROWS = 600  # blocks end at 256, 512 and 600
NEVER_S = 1e9
SHARD_S = 0.01


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two models with rows of their own."""
    root = tmp_path_factory.mktemp("shards")
    for seed, labels in enumerate((2, 3)):
        tiny_checkpoint(root / f"m{seed}", labels=labels, seed=seed)
        write_rows(root / f"m{seed}.jsonl", count=ROWS, labels=labels, seed=seed)
    return [root / "m0", root / "m1"]


def score_spec(pair: list[Path], folder: Path, shard_seconds: float | None, **method: Any) -> ScoreSpec:
    models = [model_spec(path, path.with_suffix(".jsonl")) for path in pair]
    merge = merge_spec(folder / "artifact", models, {"examples": ROWS, **method})
    common = merge.model_dump(include={"name", "method", "recipe", "folder"})
    store = StoreSpec(folder=folder / "statistics", max_bytes=10**9)
    return ScoreSpec(**common, models=models, store=store, shard_seconds=shard_seconds)


def shard_spec(job: ScoreSpec, work: ShardWork) -> ShardSpec:
    models = [model for model in job.models if model.name == work.model]
    return ShardSpec(
        name="shard", recipe={}, folder=job.folder, store=job.store, models=models, method=work.method, work=work
    )


def cut(job: ScoreSpec) -> Cut:
    with pytest.raises(Cut) as raised:
        Engine().score(job, silent)
    return raised.value


def scores(job: ScoreSpec) -> dict[str, torch.Tensor]:
    """All that the artifact has of the models' mask nodes."""
    files = sorted((job.folder / "scores").glob("*.safetensors"))
    return {f"{file.stem} {name}": of for file in files for name, of in load_file(file).items()}


def kept_pieces(job: ScoreSpec) -> int:
    assert job.store is not None
    return sum(NODE_SUMS in about.read_text() for about in job.store.folder.glob("*/about.json"))


@pytest.fixture(scope="module")
def whole(pair: list[Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    """The scores as one process computes them, which has no reason to cut anything."""
    job = score_spec(pair, tmp_path_factory.mktemp("whole"), NEVER_S)
    Engine().score(job, silent)
    return scores(job)


def finished(job: ScoreSpec, found: Cut) -> ScoreResult:
    shared = SharedScoring(seconds={"m0": 20.0, "m1": 20.0}, elapsed_seconds=30.0, batch_tokens=found.batch_tokens)
    return Engine().score(job.model_copy(update={"shard_seconds": NEVER_S, "shared": shared}), silent)


def assert_same_bits(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert len(expected) > 8
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_shards_of_any_workers_in_any_order_give_the_bits_of_one_process(
    pair: list[Path], whole: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    job = score_spec(pair, tmp_path, SHARD_S)
    found = cut(job)
    assert len(found.shards) > 4
    assert {shard.model for shard in found.shards} == {"m0", "m1"}
    assert sum(shard.examples for shard in found.shards) <= 2 * ROWS
    shards = list(found.shards)
    random.Random(0).shuffle(shards)
    engines = [Engine() for _ in range(3)]
    for number, work in enumerate([*shards, shards[0]]):  # one is made twice, which changes nothing
        assert engines[number % 3].shard(shard_spec(job, work), silent).seconds >= 0
    assert kept_pieces(job) > 0
    result = finished(job, found)
    assert_same_bits(scores(job), whole)
    assert kept_pieces(job) == 0  # they are part of the scores now
    assert [(model.score_cached, model.score_seconds >= 20) for model in result.models] == [(False, True)] * 2
    assert result.timings.score_seconds >= 30


def test_what_a_lost_shard_did_not_keep_is_computed_by_the_one_that_adds_up(
    pair: list[Path], whole: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    job = score_spec(pair, tmp_path, SHARD_S)
    found = cut(job)
    for work in found.shards[::2]:
        Engine().shard(shard_spec(job, work), silent)
    finished(job, found)
    assert_same_bits(scores(job), whole)


def test_a_job_that_is_cut_again_names_what_is_left_alone(pair: list[Path], tmp_path: Path) -> None:
    job = score_spec(pair, tmp_path, SHARD_S)
    found = cut(job)
    done = found.shards[: len(found.shards) // 2]
    for work in done:
        Engine().shard(shard_spec(job, work), silent)
    shared = SharedScoring(batch_tokens=found.batch_tokens)
    again = cut(job.model_copy(update={"shared": shared}))
    named = {(shard.model, n) for shard in again.shards if shard.pieces for n in range(*shard.pieces)}
    assert named
    assert not named & {(shard.model, n) for shard in done if shard.pieces for n in range(*shard.pieces)}


@pytest.mark.parametrize("method", [{"name": "fisher", "examples": 24}, {"name": "mask_regmean", "examples": 200}])
def test_what_is_more_than_scores_is_one_shard_a_model(
    pair: list[Path], tmp_path: Path, method: dict[str, Any]
) -> None:
    job = score_spec(pair, tmp_path / "cut", SHARD_S, **method)
    found = cut(job)
    assert [(shard.model, shard.pieces) for shard in found.shards] == [("m0", None), ("m1", None)]
    for work in reversed(found.shards):
        Engine().shard(shard_spec(job, work), silent)
    assert not any(model.score_cached for model in finished(job, found).models)
    alone = score_spec(pair, tmp_path / "alone", NEVER_S, **method)
    Engine().score(alone, silent)
    assert kept(job) == kept(alone)


def kept(job: ScoreSpec) -> set[tuple[str, bytes]]:
    """The files of all statistics, by address."""
    assert job.store is not None
    return {(file.parent.name, file.read_bytes()) for file in job.store.folder.glob("*/*.safetensors")}


class Clock:
    """Tells a time that grows by so many seconds each time that it is asked for."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._now = 0.0

    def __call__(self) -> float:
        self._now += self._seconds
        return self._now


@pytest.mark.parametrize(("shards", "is_cut"), [(1.5, False), (3.0, True)])
def test_what_would_take_less_than_two_shards_is_not_cut(
    pair: list[Path], tmp_path: Path, shards: float, is_cut: bool
) -> None:
    """Of two models, each is a shard at least; what counts is the time that both take."""
    job = score_spec(pair, tmp_path, 20.0)
    seen: list[int] = []
    device = torch.device("cpu")
    state = EngineState(device, ModelCache(device), BatchSizes(), Digests())
    with job_context(job, state, silent) as context:
        loaded = load(job, context)
        [method] = job.method.methods
        samples = [(model, model.rows.sample) for model in loaded.models]
        parts = [Part(method, model, own, 1, frozenset(), "float32") for model, own in samples if own is not None]
        cutter = Cutter(parts, context, Clock(1))
        rows = round(2 * ROWS / shards / 20)  # in a second
        with pytest.raises(Cut) if is_cut else nullcontext():
            for _ in range(10):
                cutter.computed(rows)
                seen.append(rows)
    assert (len(seen) == 10) is not is_cut


@pytest.mark.parametrize("method", [{"examples": "auto"}, {"preset": "paper"}])
def test_what_looks_at_all_rows_together_is_not_cut(pair: list[Path], tmp_path: Path, method: dict[str, str]) -> None:
    job = score_spec(pair, tmp_path, SHARD_S, **method)
    assert Engine().score(job, silent).models


def test_batches_belong_to_pieces_by_their_place() -> None:
    assert [piece.count for piece in pieces(300)] == [2, 2, 1]
    assert [piece.block for piece in pieces(300)] == [(0, 256), (0, 256), (256, 300)]

    def lengths(*sizes: int, count: int) -> list[list[int]]:
        rows: Any = [[0] * size for size in sizes]
        return [list(map(len, batches)) for batches in in_pieces(rows, count)]

    assert lengths(100, 30, 70, 56, count=2) == [[100, 30], [70, 56]]
    assert lengths(4 * PIECE_ROWS, count=4) == [[4 * PIECE_ROWS], [], [], []]
