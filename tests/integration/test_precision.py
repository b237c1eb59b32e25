"""Models run in the number format that is asked for, and who asks for a slow one is told so."""

from pathlib import Path

import pytest

from tests.tiny import merge_spec, model_spec, silent, tiny_checkpoint, write_rows
from worker.engine.jobs.context import SLOW_BFLOAT16
from worker.engine.jobs.engine import Engine

EXAMPLES = 8


@pytest.fixture(scope="module")
def experts(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    root = tmp_path_factory.mktemp("precision")
    for seed in range(2):
        tiny_checkpoint(root / f"m{seed}", seed=seed)
        write_rows(root / f"m{seed}.jsonl", count=EXAMPLES, seed=seed)
    return [root / "m0", root / "m1"]


def flags_of_the_processor() -> set[str]:
    line = next(line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("flags"))
    return set(line.split())


@pytest.mark.parametrize("precision", ["auto", "float32", "bfloat16"])
def test_bfloat16_on_a_processor_without_it_is_told_to_be_slow(
    experts: list[Path], tmp_path: Path, precision: str
) -> None:
    models = [model_spec(path, path.with_suffix(".jsonl")) for path in experts]
    method = {"name": "mask_fisher", "examples": EXAMPLES, "precision": precision}
    result = Engine().merge(merge_spec(tmp_path / "merged", models, method), silent)
    if precision != "auto":
        assert result.method["precision"] == precision
    lacks = flags_of_the_processor().isdisjoint({"avx512_bf16", "amx_bf16"})
    assert (SLOW_BFLOAT16 in result.notes) == (precision == "bfloat16" and lacks)
