"""Values of given ranks, against sorting."""

import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.tiny import versions_of
from worker.engine.catalog.families.bert import BERT
from worker.engine.catalog.planning.memory import HELD_BLOCKS
from worker.engine.merging.methods import selection
from worker.engine.merging.methods.blocks import Block
from worker.engine.merging.methods.selection import nth_largest

SLOT = BERT.slot("bert.pooler.dense.weight")
assert SLOT is not None


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def found_and_reads(
    tensors: Sequence[Tensor], ranks: Sequence[int], block_elements: int = 64
) -> tuple[list[float], int]:
    """The values, and how often a block was read on average."""
    assert SLOT is not None
    versions = versions_of(SLOT, tensors, block_elements=block_elements)
    reads = 0

    def values(block: Block) -> list[Tensor]:
        nonlocal reads
        reads += 1
        return [version.abs() for version in block.versions]

    return nth_largest(versions, values, ranks), math.ceil(reads / versions.count)


def expected(tensors: Sequence[Tensor], ranks: Sequence[int]) -> list[float]:
    return [float(np.sort(abs(t.numpy()).ravel())[-rank]) for t, rank in zip(tensors, ranks, strict=True)]


ROWS, COLUMNS = 700, 10
CASES = {
    "normal": torch.randn(ROWS, COLUMNS, generator=rng()),
    "float64": torch.randn(ROWS, COLUMNS, generator=rng(), dtype=torch.float64),
    "rounded": torch.randn(ROWS, COLUMNS, generator=rng()).mul(3).round().div(3),
    "mostly zero": torch.randn(ROWS, COLUMNS, generator=rng()).clamp_min(1) - 1,
    "equal": torch.full((ROWS, COLUMNS), -2.5),
    "zero": torch.zeros(ROWS, COLUMNS),
    "sorted": torch.arange(ROWS * COLUMNS, dtype=torch.float32).view(ROWS, COLUMNS),
    "rows of different sizes": torch.randn(ROWS, COLUMNS, generator=rng()) * torch.logspace(-6, 6, ROWS)[:, None],
    "infinite in part": torch.randn(ROWS, COLUMNS, generator=rng()).masked_fill(
        torch.rand(ROWS, COLUMNS, generator=rng(1)) < 0.3, -math.inf
    ),
    "beside the sample": torch.randn(ROWS, COLUMNS, generator=rng()) + 100 * (torch.arange(ROWS) % 7 > 0)[:, None],
}


@pytest.mark.parametrize("sample", [64, 1 << 16])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("share", [1e-9, 0.001, 0.2, 0.5, 0.87, 1.0])
def test_a_rank_is_what_sorting_says(case: str, share: float, sample: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selection, "SAMPLE_ELEMENTS", sample)
    tensors, rank = [CASES[case], CASES["normal"].to(CASES[case].dtype)], max(1, round(share * ROWS * COLUMNS))
    ranks = [rank, ROWS * COLUMNS + 1 - rank]
    assert found_and_reads(tensors, ranks)[0] == expected(tensors, ranks)
    assert found_and_reads(tensors, ranks, 10**6)[0] == expected(tensors, ranks)


@pytest.mark.parametrize("shape", [(), (1,), (2,), (1, 40), (40, 1), (5, 3, 2), (2000,)])
def test_shapes(shape: tuple[int, ...]) -> None:
    tensor = torch.randn(shape, generator=rng())
    for rank in {1, (tensor.numel() + 1) // 2, tensor.numel()}:
        assert found_and_reads([tensor], [rank])[0] == expected([tensor], [rank])


def test_a_large_tensor_is_read_once_and_a_sample_of_it() -> None:
    """To find where the rank lies in some rows from all over the tensor, and then to gather what lies there."""
    assert found_and_reads([CASES["normal"]], [1400])[1] == 2
    assert found_and_reads([CASES["normal"]], [1400], 1000)[1] == 1, "of so few blocks, all is held"


def test_values_are_not_held_beyond_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selection, "SAMPLE_ELEMENTS", 16)
    held = 0
    narrow = selection._Search.narrow

    def watched(search: selection._Search) -> None:
        nonlocal held
        held = max(held, sum(part.size for part in search.gathered))
        narrow(search)

    monkeypatch.setattr(selection._Search, "narrow", watched)
    for case, tensor in CASES.items():
        assert found_and_reads([tensor], [3500])[0] == expected([tensor], [3500]), case
    assert 0 < held <= HELD_BLOCKS * 64


@pytest.mark.parametrize("share", [0.001, 0.5, 1.0])
def test_not_a_number_ends_the_search(share: float) -> None:
    nan = torch.rand(ROWS, COLUMNS, generator=rng()) < share
    tensors = [CASES["normal"].masked_fill(nan, math.nan), CASES["normal"]]
    found, _ = found_and_reads(tensors, [ROWS * COLUMNS, 1400])
    assert math.isnan(found[0])
    assert found[1:] == expected(tensors[1:], [1400])


def test_many_series_share_what_is_held() -> None:
    tensors, ranks = list(CASES.values()) * 3, list(range(1, 6001, 200))
    assert found_and_reads(tensors, ranks)[0] == expected(tensors, ranks)


@pytest.mark.parametrize("seed", range(4))
def test_infinite_values_have_ranks_too(seed: int) -> None:
    infinite = torch.rand(ROWS, COLUMNS, generator=rng(seed)) < 0.3
    tensor = torch.randn(ROWS, COLUMNS, generator=rng(seed)).masked_fill(infinite, -math.inf)
    count = int(infinite.sum())
    for rank in (1, count - 1, count, count + 1, count + 30, ROWS * COLUMNS):
        assert found_and_reads([tensor], [rank])[0] == expected([tensor], [rank])
