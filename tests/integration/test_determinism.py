"""The same recipe gives the same bytes, on however many threads."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.tiny import merge_spec, model_spec, silent, tiny_base, tiny_checkpoint, write_rows
from worker.engine.catalog.checkpoints.inspection import inspect_checkpoint
from worker.engine.catalog.contracts.spec import CheckpointSpec, StoreSpec
from worker.engine.catalog.methods import METHODS
from worker.engine.checkpoints.reader import digest_file
from worker.engine.checkpoints.row_blocks import row_blocks
from worker.engine.jobs.engine import Engine

HIDDEN = 1024  # square matrices of so many rows are several blocks
EXAMPLES = 8
SHARD_BYTES = 6_000_000  # one such matrix each, so that several shards are written at once

Bytes = dict[str, str]
"""sha256 of the weight files by their names in the artifact."""


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two models of one ancestor, which is the last."""
    root = tmp_path_factory.mktemp("determinism")
    for seed in range(2):
        tiny_checkpoint(root / f"m{seed}", seed=seed, hidden=HIDDEN, layers=1)
        write_rows(root / f"m{seed}.jsonl", count=EXAMPLES, seed=seed)
    return [root / "m0", root / "m1", tiny_base(root / "base", hidden=HIDDEN, layers=1)]


@pytest.fixture
def torch_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def merge(checkpoints: list[Path], folder: Path, method: str, store: Path) -> Bytes:
    *experts, base = checkpoints
    experts = experts[: METHODS[method].models[1]]
    measures = bool(METHODS[method].parameters.model_validate({"name": method}).statistics)
    parameters = {"name": method, **({"examples": EXAMPLES} if measures else {})}
    spec = merge_spec(
        folder,
        [model_spec(path, path.with_suffix(".jsonl"), weight=1.0 + i) for i, path in enumerate(experts)],
        parameters,
        max_shard_bytes=SHARD_BYTES,
    ).model_copy(
        update={
            "base": CheckpointSpec(source="base", path=base) if "base" in METHODS[method].needs else None,
            "store": StoreSpec(folder=store, max_bytes=1_000_000_000),
        }
    )
    Engine().merge(spec, silent)
    manifest = json.loads((folder / "manifest.json").read_text())
    return {file["name"]: file["sha256"] for file in manifest["files"] if file["name"].startswith("models/")}


def by_rows() -> list[str]:
    merging = METHODS.keys() - {"passthrough"}  # which copies rows, and is tested to copy every bit
    return [n for n in sorted(merging) if METHODS[n].parameters.model_validate({"name": n}).merges_rows]


@pytest.mark.usefixtures("torch_threads")
@pytest.mark.parametrize("method", by_rows())
def test_the_number_of_threads_does_not_change_a_bit(checkpoints: list[Path], tmp_path: Path, method: str) -> None:
    """Of the merge: statistics are measured once, and found by the merges after that."""
    found = {}
    for threads in (1, 3):
        torch.set_num_threads(threads)
        found[threads] = merge(checkpoints, tmp_path / str(threads), method, tmp_path / "store")
    assert found[1] == found[3]
    tensors = inspect_checkpoint(checkpoints[0], "m0").tensors.values()
    assert sum(len(row_blocks(tensor.shape)) > 1 for tensor in tensors) >= 5
    written = {name: digest_file(tmp_path / "3" / name) for name in found[3]}
    assert written == found[3]
    assert len([name for name in written if name.startswith("models/m0/model-")]) > 5
