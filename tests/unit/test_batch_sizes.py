"""How many tokens are computed at once: tried once for a situation, and never where it would not pay."""

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch

from tests.tiny import dataset_spec, silent, tiny_checkpoint, write_rows
from worker.engine.catalog.checkpoints.inspection import inspect_checkpoint
from worker.engine.catalog.data.rows import RowFile, sample
from worker.engine.catalog.families import ScoreName
from worker.engine.catalog.methods import BATCH_TOKENS
from worker.engine.catalog.tasks import LabelMap
from worker.engine.inputs.examples import Example, plan_batches, tokenize
from worker.engine.models.loading import LoadedModel, load
from worker.engine.scoring.batching import CANDIDATES, BatchSizes, _fastest
from worker.engine.scoring.estimators import Estimator
from worker.engine.scoring.scorer import score

MANY = 10**6  # rows: their time is far more than that of trying


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    folder = tiny_checkpoint(tmp_path_factory.mktemp("batch-sizes") / "tiny", labels=2, seed=1)
    return load(inspect_checkpoint(folder, "tiny"), torch.device("cpu"))


@pytest.fixture(scope="module")
def examples(loaded: LoadedModel, tmp_path_factory: pytest.TempPathFactory) -> list[Example]:
    spec = dataset_spec(write_rows(tmp_path_factory.mktemp("rows") / "rows.jsonl", count=60))
    rows = sample(RowFile(spec), spec, None)
    return tokenize(rows, spec, loaded.tokenizer, loaded.max_length, LabelMap(loaded.task)).examples


class Passes:
    """Counts forward passes of a model while in context."""

    def __init__(self, loaded: LoadedModel) -> None:
        self.count = 0
        self._handle = loaded.model.register_forward_pre_hook(self._one_more)

    def _one_more(self, *_: object) -> None:
        self.count += 1

    def __enter__(self) -> "Passes":
        return self

    def __exit__(self, *_: object) -> None:
        self._handle.remove()


def find(sizes: BatchSizes, loaded: LoadedModel, examples: Sequence[Example], rows: int = MANY) -> int:
    return sizes.find(loaded, examples, rows, Estimator("expected"), "float32", "rows", silent)


def test_it_is_tried_once_and_remembered(loaded: LoadedModel, examples: list[Example]) -> None:
    sizes = BatchSizes()
    with Passes(loaded) as first:
        found = find(sizes, loaded, examples)
    assert found in CANDIDATES["cpu"]
    assert first.count == len(CANDIDATES["cpu"]) + 1
    with Passes(loaded) as again:
        assert find(sizes, loaded, examples) == found
    assert again.count == 0


def test_rows_of_another_length_are_tried_anew(loaded: LoadedModel, examples: list[Example]) -> None:
    sizes = BatchSizes()
    find(sizes, loaded, examples)
    short = [replace(e, encoding={name: ids[:3] for name, ids in e.encoding.items()}) for e in examples]
    with Passes(loaded) as passes:
        find(sizes, loaded, short)
    assert passes.count > 0


def test_little_work_is_not_worth_trying(loaded: LoadedModel, examples: list[Example]) -> None:
    with Passes(loaded) as passes:
        assert find(BatchSizes(), loaded, examples, rows=len(examples)) == BATCH_TOKENS
    assert passes.count == 0


def test_a_job_can_be_stopped_while_it_tries(loaded: LoadedModel, examples: list[Example]) -> None:
    class Stop(Exception):
        pass

    def stop(rows: int) -> None:
        assert rows == 0  # trying is no progress
        raise Stop

    with pytest.raises(Stop):
        BatchSizes().find(loaded, examples, MANY, Estimator("expected"), "float32", "rows", stop)


def test_the_fastest_is_chosen_and_the_smaller_of_equals(
    examples: list[Example], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 0.0
    tokens_a_second = {64: 100.0, 128: 200.0, 256: 204.0}  # 2 % more is not worth twice the memory
    monkeypatch.setattr("worker.engine.scoring.batching.time.perf_counter", lambda: now)

    def attempt(batch: Sequence[Example]) -> None:
        nonlocal now
        tokens = len(batch) * max(example.length for example in batch)
        now += tokens / next(rate for size, rate in tokens_a_second.items() if tokens <= size)

    same = [examples[0]] * 8
    assert _fastest(attempt, same, list(tokens_a_second)) == 128


def test_trying_ends_where_memory_does(examples: list[Example]) -> None:
    def attempt(batch: Sequence[Example]) -> None:
        if sum(example.length for example in batch) > 200:
            raise torch.OutOfMemoryError("can't allocate memory")

    assert _fastest(attempt, examples, (100, 200, 400, 800)) in (100, 200)
    with pytest.raises(torch.OutOfMemoryError):
        _fastest(attempt, examples, (400, 800))


def test_scores_depend_on_it_by_rounding_only_and_the_same_number_gives_the_same_bits(
    loaded: LoadedModel, examples: list[Example]
) -> None:
    def scores(tokens: int) -> dict[ScoreName, torch.Tensor]:
        batches = plan_batches(examples, tokens)
        return score(loaded, examples, Estimator("expected"), "float32", "rows", silent, batches).scores()

    one, other, again = scores(64), scores(512), scores(64)
    for name, of in one.items():
        assert torch.equal(of, again[name])
        assert float((of - other[name]).norm() / of.norm()) < 1e-5
