"""The engine process from the worker's end: a real one, started, fed, killed."""

import json
import os
import resource
import signal
from collections.abc import Iterator
from dataclasses import replace
from itertools import count
from pathlib import Path
from threading import Thread
from typing import Any

import psutil
import pytest
import torch

from tests.conftest import running, wait_until
from tests.tiny import (
    POSITIONS,
    dataset_spec,
    merge_spec,
    model_spec,
    tiny_checkpoint,
    tiny_texts,
    write_lines,
    write_rows,
)
from tests.tiny_language_models import tiny_model
from worker.engine.catalog.checkpoints.inspection import inspect_checkpoint
from worker.engine.catalog.contracts.spec import EvaluationSpec, MergeSpec, ScoreSpec
from worker.engine.catalog.data.spec import DatasetSpec
from worker.engine.catalog.methods import AverageParameters
from worker.engine.catalog.planning.holding import Holding
from worker.engine.catalog.planning.memory import RUN_BYTES, RUNTIME_BYTES, MemoryNeeds, estimate
from worker.engine.catalog.planning.planner import plan_merge
from worker.engine_process import EngineDied, EngineHung, EngineProcess, Failed, Finished, Progressed


@pytest.fixture(scope="module")
def startable() -> Iterator[EngineProcess]:
    engine = EngineProcess(threads=1)
    yield engine
    engine.kill()


def warm(engine: EngineProcess) -> EngineProcess:
    """One that takes no more memory by itself."""

    def is_warm() -> bool:
        assert not engine.poll(0.1)
        return engine.is_warm

    wait_until(is_warm, "all libraries")
    return engine


@pytest.fixture
def engine(startable: EngineProcess) -> EngineProcess:
    """One that runs: that of the test before, unless it died there."""
    try:
        startable.poll(0)
    except EngineDied:
        startable.start()
    return startable


@pytest.fixture
def fresh(startable: EngineProcess) -> EngineProcess:
    """One that has merged nothing yet."""
    startable.start()
    return warm(startable)


def spec(inputs: Path, folder: Path, checkpoint: str = "a") -> MergeSpec:
    folder.mkdir()
    return MergeSpec.model_validate(
        {
            "name": "test",
            "models": [
                {"name": "a", "source": "local:a", "path": inputs / "checkpoints" / checkpoint, "weight": 1.0},
            ],
            "method": {"name": "average"},
            "output": {},
            "evaluate": False,
            "recipe": {},
            "folder": folder,
        }
    )


def last_event(engine: EngineProcess) -> Finished | Failed:
    def ended() -> Finished | Failed | None:
        for event in engine.poll(0.1):
            if isinstance(event, Finished | Failed):
                return event
            assert isinstance(event, Progressed)
        return None

    event: Finished | Failed = wait_until(ended, "the merge to end")
    return event


def test_one_process_runs_merge_after_merge(engine: EngineProcess, tiny_inputs: Path, tmp_path: Path) -> None:
    pid = engine.pid
    for number in range(3):
        engine.run(spec(tiny_inputs, tmp_path / str(number)))
        assert isinstance(last_event(engine), Finished)
    assert engine.pid == pid
    assert engine.resident_bytes() > 100_000_000


def test_a_failed_merge_leaves_the_process_in_place(engine: EngineProcess, tiny_inputs: Path, tmp_path: Path) -> None:
    pid = engine.pid
    engine.run(spec(tiny_inputs, tmp_path / "bad", checkpoint="none"))
    event = last_event(engine)
    assert isinstance(event, Failed)
    assert event.error.code == "invalid_checkpoint"
    engine.run(spec(tiny_inputs, tmp_path / "good"))
    assert isinstance(last_event(engine), Finished)
    assert engine.pid == pid


def test_its_death_is_noticed_and_is_not_taken_for_want_of_memory(engine: EngineProcess) -> None:
    os.kill(engine.pid, signal.SIGKILL)
    with pytest.raises(EngineDied) as caught:
        wait_until(lambda: engine.poll(0.1), "an event that never comes")
    assert not caught.value.out_of_memory
    with pytest.raises(EngineDied):
        engine.poll(0)


@pytest.mark.long
def test_it_can_be_started_again_after_its_death(engine: EngineProcess, tiny_inputs: Path, tmp_path: Path) -> None:
    os.kill(engine.pid, signal.SIGKILL)
    engine.start()
    engine.run(spec(tiny_inputs, tmp_path / "again"))
    assert isinstance(last_event(engine), Finished)


@pytest.mark.long
@pytest.mark.parametrize("checkpoint", ["a", "none"])
def test_what_not_every_job_needs_is_imported_after_one_that_is_there_first(
    engine: EngineProcess, tiny_inputs: Path, tmp_path: Path, checkpoint: str
) -> None:
    engine.start()
    engine.run(spec(tiny_inputs, tmp_path / "first", checkpoint))
    assert isinstance(last_event(engine), Finished if checkpoint == "a" else Failed)
    assert warm(engine).is_warm


@pytest.mark.long
def test_a_death_while_it_is_idle_is_noticed_by_the_next_merge(
    engine: EngineProcess, tiny_inputs: Path, tmp_path: Path
) -> None:
    os.kill(engine.pid, signal.SIGKILL)
    psutil.Process(engine.pid).wait()
    with pytest.raises(EngineDied):
        engine.run(spec(tiny_inputs, tmp_path / "never"))
    engine.start()
    engine.run(spec(tiny_inputs, tmp_path / "then"))
    assert isinstance(last_event(engine), Finished)


@pytest.fixture(scope="module")
def watched() -> Iterator[EngineProcess]:
    """One that is soon taken for hung."""
    engine = EngineProcess(threads=1, heartbeat_seconds=2, stall_seconds=4)
    yield engine
    engine.kill()


def suspend_next(others: set[int]) -> None:
    """Stop the next engine of this process as soon as it is there."""
    mine = {"worker.engine_process", str(os.getpid())}

    def found() -> psutil.Process | None:
        started = ((child, words) for child, words in running(psutil.Process()) if child.pid not in others)
        return next((child for child, words in started if mine.issubset(words)), None)

    wait_until(found, "the process", interval_s=0.01).suspend()


def test_one_that_is_stopped_is_noticed_and_killed_whatever_it_does_and_can_be_replaced(
    watched: EngineProcess, tiny_inputs: Path, tmp_path: Path
) -> None:
    stopping = Thread(target=suspend_next, args=({child.pid for child in psutil.Process().children()},))
    stopping.start()
    with pytest.raises(EngineHung, match="not heard of for"):  # while it starts
        watched.start()
    stopping.join()
    assert not watched.is_well()
    watched.start()
    assert watched.is_well()
    process = psutil.Process(watched.pid)
    process.suspend()
    with pytest.raises(EngineHung, match="not heard of for"):  # while it has nothing to do
        wait_until(lambda: watched.poll(0.1), "an event that never comes")
    assert not watched.is_well()
    assert not process.is_running()
    watched.start()
    psutil.Process(watched.pid).suspend()
    watched.run(spec(tiny_inputs, tmp_path / "never"))
    with pytest.raises(EngineHung, match="not heard of for"):  # at work
        wait_until(lambda: watched.poll(0.1), "an event that never comes")


def test_a_job_that_waits_for_ever_is_noticed_though_its_process_beats(
    watched: EngineProcess, tiny_inputs: Path, tmp_path: Path
) -> None:
    """It opens a pipe that nobody reads."""
    watched.start()
    waiting = spec(tiny_inputs, tmp_path / "out")
    os.mkfifo(tmp_path / "out" / "README.md")
    watched.run(waiting)

    def ended() -> bool:
        ends = [event for event in watched.poll(0.1) if isinstance(event, Finished | Failed)]
        assert not ends
        return False

    with pytest.raises(EngineHung, match="made no progress for"):
        wait_until(ended, "an event that never comes")


def test_it_may_open_as_many_files_as_allowed_and_says_when_that_is_too_few(
    engine: EngineProcess, tiny_inputs: Path, tmp_path: Path
) -> None:
    process = psutil.Process(engine.pid)
    soft, hard = process.rlimit(psutil.RLIMIT_NOFILE)
    assert soft == hard
    engine.run(spec(tiny_inputs, tmp_path / "enough"))
    assert isinstance(last_event(engine), Finished)
    warm(engine)
    is_open = {int(name) for name in os.listdir(f"/proc/{engine.pid}/fd")}
    free = next(number for number in count() if number not in is_open)
    process.rlimit(psutil.RLIMIT_NOFILE, (free + 1, hard))  # one at a time: input and output are two
    engine.run(spec(tiny_inputs, tmp_path / "few"))
    event = last_event(engine)
    assert isinstance(event, Failed)
    assert (event.error.code, event.error.retryable) == ("storage_error", True), event.error
    assert "ulimit -n" in event.error.message
    process.rlimit(psutil.RLIMIT_NOFILE, (soft, hard))


def test_killing_it_leaves_no_process(engine: EngineProcess) -> None:
    process = psutil.Process(engine.pid)
    engine.kill()
    assert not process.is_running()
    engine.kill()  # harmless when there is none


def test_a_merge_that_exceeds_its_memory_is_out_of_memory(
    fresh: EngineProcess, tiny_inputs: Path, tmp_path: Path
) -> None:
    """A real limit on a real process: the address space the kernel grants it."""
    limit = psutil.Process(fresh.pid).memory_info().vms + 1_000_000
    resource.prlimit(fresh.pid, resource.RLIMIT_AS, (limit, limit))
    fresh.run(spec(tiny_inputs, tmp_path / "large"))
    event = last_event(fresh)
    fresh.kill()
    assert isinstance(event, Failed)
    assert event.error.code == "out_of_memory", event.error


@pytest.mark.long
def test_a_merge_that_loads_no_model_holds_rows_alone(fresh: EngineProcess, tmp_path: Path) -> None:
    models = [tiny_model(tmp_path / n, seed=s, vocab_size=2_200_000, layers=1) for s, n in enumerate("ab", 1)]
    plan = plan_merge([inspect_checkpoint(folder, folder.name) for folder in models])
    size = plan.checkpoints[0].nbytes
    assert size > RUN_BYTES  # else the merge is run once
    idle = fresh.resident_bytes()
    fresh.run(merge_spec(tmp_path / "out", [model_spec(folder) for folder in models], {"name": "average"}))
    event = last_event(fresh)
    assert isinstance(event, Finished), event
    planned = estimate(plan, MemoryNeeds(AverageParameters(), loads_models=False, threads=1))
    assert event.result.peak_memory_bytes < planned < RUNTIME_BYTES + size
    assert event.result.peak_memory_bytes - idle < size


@pytest.mark.parametrize(
    "method",
    [
        {"precision": "float32"},
        pytest.param({"precision": "bfloat16"}, marks=pytest.mark.long),
        pytest.param({"preset": "paper"}, marks=pytest.mark.long),
        pytest.param({"name": "average"}, marks=pytest.mark.long),
        {"name": "aligned_regmean"},
    ],
    ids=str,
)
def test_the_plans_memory_is_what_a_merge_takes(fresh: EngineProcess, tmp_path: Path, method: dict[str, str]) -> None:
    """No less is announced than is taken; and beyond what the libraries take, not much more."""
    names = ("x", "y", "z")
    rows = write_rows(tmp_path / "rows.jsonl", count=200)
    checkpoints = [tiny_checkpoint(tmp_path / name, hidden=512, seed=seed) for seed, name in enumerate(names)]
    plan = plan_merge([inspect_checkpoint(folder, folder.name) for folder in checkpoints])
    held_out = write_rows(tmp_path / "held-out.jsonl", count=200, seed=1)
    evaluation = EvaluationSpec(**dataset_spec(held_out).model_dump(), metric="accuracy")
    models = [model_spec(folder, rows, evaluation=evaluation) for folder in checkpoints]
    spec = merge_spec(tmp_path / "out", models, method, evaluate=True)
    idle = fresh.resident_bytes()
    fresh.run(spec)
    event = last_event(fresh)
    assert isinstance(event, Finished), event
    needs = MemoryNeeds(
        spec.method,
        models_beside=spec.models_beside,
        tokens_held=len(names) * 200 * POSITIONS if spec.method.refits_layers else 0,
        value_bytes=2 if spec.method.precision == "bfloat16" else 4,
    )
    planned = estimate(plan, needs)
    assert event.result.peak_memory_bytes < planned
    assert event.result.peak_memory_bytes - idle > 0.35 * (planned - RUNTIME_BYTES)


def test_a_model_larger_than_the_memory_that_is_left_is_measured_layer_by_layer(
    startable: EngineProcess, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A real limit on a real process, which could not load the model in float32."""
    monkeypatch.setenv("MALLOC_ARENA_MAX", "1")  # else each thread reserves address space that it does not use
    startable.start()
    fresh = warm(startable)
    rows = write_lines(tmp_path / "rows.jsonl", [json.dumps({"text": text}) for text in tiny_texts(4, 1)])
    method = {"name": "mask_fisher", "precision": "float32", "batch_tokens": 256}

    def score_spec(folder: Path) -> ScoreSpec:
        model = model_spec(folder).model_copy(update={"dataset": DatasetSpec(source="rows", path=rows)})
        out = tmp_path / f"{folder.name}-scores"
        given = {"name": "tiny", "models": [model], "method": method, "folder": out, "recipe": {}}
        return ScoreSpec.model_validate(given)

    fresh.run(score_spec(tiny_model(tmp_path / "small")))  # by which threads reserve their address space
    assert isinstance(last_event(fresh), Finished)
    sizes: dict[str, Any] = {"hidden_size": 1024, "intermediate_size": 3072, "num_attention_heads": 8}
    folder = tiny_model(tmp_path / "model", layers=20, dtype=torch.bfloat16, **sizes)
    plan = plan_merge([inspect_checkpoint(folder, "model")])
    spec = score_spec(folder)
    needs = MemoryNeeds(spec.method, longest_row=POSITIONS, publishes=False)
    whole, stored, streamed = (estimate(plan, replace(needs, holding=holding)) for holding in Holding)
    in_float32 = 2 * plan.checkpoints[0].nbytes
    process = psutil.Process(fresh.pid).memory_info()
    further = in_float32 + in_float32 // 4  # of which the open file, half as large, takes its part
    assert streamed < process.rss + further < min(stored, whole)
    resource.prlimit(fresh.pid, resource.RLIMIT_AS, (process.vms + further, process.vms + further))
    fresh.run(spec)
    event = last_event(fresh)
    fresh.kill()
    assert isinstance(event, Finished), event
    assert "layers were read from the files" in event.result.notes[0]
    assert event.result.peak_memory_bytes < streamed


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_an_engine_does_not_start_on_a_device_that_is_not_there(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(EngineDied, match="ended with 2"):
        EngineProcess(threads=1, device="cuda").start()
    assert "PyTorch sees no CUDA GPU" in capfd.readouterr().err


def test_an_engine_tells_its_device(engine: EngineProcess) -> None:
    assert engine.device == ("cuda" if torch.cuda.is_available() else "cpu")
