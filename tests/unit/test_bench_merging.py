"""bench/merging.py: its inputs are checkpoints that merge, and its floor moves as many bytes as it says."""

import os
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.merging import (
    NO_FLOOR,
    SHAPES,
    SPREAD,
    STEP,
    Inputs,
    Shape,
    Turns,
    against_least,
    difference,
    move_bytes,
    read,
    tiny,
)
from tests.tiny import silent
from worker.engine.catalog.checkpoints.inspection import inspect_checkpoint
from worker.engine.jobs.engine import Engine

TINY_LLAMA = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 24}
QUERY = "bert.encoder.layer.0.attention.self.query.weight"


@pytest.mark.parametrize("method", ["average", "ties"])
def test_what_it_makes_merges(tmp_path: Path, method: str) -> None:
    inputs = Inputs.made(tiny(), tmp_path)
    Engine().merge(inputs.spec(method), silent)
    merged = [folder for folder in inputs.out.glob("models/*") if folder.is_dir()]
    assert len(merged) == 2
    assert inputs.written_bytes() > sum(file.stat().st_size for file in inputs.files([inputs.base]))
    assert difference(merged[0], merged[1], 0) == 0
    assert 0 < difference(merged[0], inputs.base, 0) < 10 * STEP


def test_experts_lie_around_the_base(tmp_path: Path) -> None:
    inputs = Inputs.made(tiny(), tmp_path)
    first, second, base = (read(folder / "model.safetensors", QUERY) for folder in (*inputs.experts, inputs.base))
    assert float(base.std()) == pytest.approx(SPREAD, rel=0.2)
    for expert in (first, second):
        assert float((expert - base).std()) == pytest.approx(STEP, rel=0.2)
    assert not torch.equal(first, second)


@pytest.mark.parametrize("holes", [False, True])
def test_a_language_model_is_written_in_shards_without_being_made(tmp_path: Path, holes: bool) -> None:
    shape = replace(SHAPES["llama-1.1b"], settings={**TINY_LLAMA, "vocab_size": 100}, holes=holes)
    inputs = Inputs.made(shape, tmp_path)
    info = inspect_checkpoint(inputs.experts[0], "a")
    assert {name: tensor.shape for name, tensor in info.tensors.items()} == shape.tensors()
    assert {tensor.dtype for tensor in info.tensors.values()} == {"BF16"}
    assert len(info.weight_files) == 5
    norm = read(info.tensors["model.norm.weight"].path, "model.norm.weight")
    assert bool(norm.any()) != holes
    assert bool(torch.isfinite(norm).all())


def test_the_shapes_are_those_that_they_are_named_after() -> None:
    def millions(shape: Shape) -> int:
        return round(sum(torch.Size(size).numel() for size in shape.tensors().values()) / 1e6)

    assert {name: millions(shape) for name, shape in SHAPES.items()} == {
        "bert-base": 109,
        "llama-1.1b": 1100,
        "llama-7b": 6738,
    }


@pytest.mark.parametrize("threads", [1, 3])
def test_the_floor_reads_and_writes_every_byte_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, threads: int
) -> None:
    monkeypatch.setattr("bench.merging.PIECE_BYTES", 300_000)
    monkeypatch.setattr("bench.merging.BLOCK_BYTES", 70_000)
    source = tmp_path / "source"
    source.write_bytes(bytes(range(256)) * 4_000)
    moved: dict[str, list[tuple[int, int]]] = {"preadv": [], "pwrite": []}

    def count(name: str) -> None:
        plain = getattr(os, name)

        def counting(descriptor: int, data: Any, place: int) -> int:
            done: int = plain(descriptor, data, place)
            moved[name].append((place, done))
            return done

        monkeypatch.setattr(os, name, counting)

    for name in moved:
        count(name)
    move_bytes([source, source], tmp_path / "out" / "copy", 1_500_001, threads)
    assert (tmp_path / "out" / "copy").stat().st_size == 1_500_001

    def places(runs: list[tuple[int, int]]) -> Counter[int]:
        return Counter(place for start, count in runs for place in range(start, start + count))

    assert places(moved["pwrite"]) == Counter(range(1_500_001))
    assert places(moved["preadv"]) == Counter(dict.fromkeys(range(1024000), 2))


@pytest.mark.parametrize(
    ("ours", "met", "target"), [(1.5, True, "<= 2.0"), (2.5, False, "<= 2.0"), (0.9, False, NO_FLOOR)]
)
def test_what_is_faster_than_its_floor_had_none(ours: float, met: bool, target: str) -> None:
    found = against_least("a job", ours, 1.0, 2.0)
    assert (found["ratio"], found["met"], found["target"]) == (ours, met, target)


def test_works_take_turns_and_leave_nothing(tmp_path: Path) -> None:
    out = tmp_path / "out"
    done: list[str] = []

    def work(name: str) -> None:
        out.mkdir()
        done.append(name)

    seconds = Turns(out, rounds=2).time(
        {"a": lambda: work("a"), "b": lambda: work("b")}, lambda: done.append("before"), lambda: done.append("after")
    )
    assert done == ["before", "a", "after", "before", "b", "after"] * 3
    assert all(0 < value < 60 for value in seconds.values())
    assert not out.exists()
