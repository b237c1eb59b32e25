"""Head alignment against the closed form solved another way, and in the artifact that it leaves."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoTokenizer

from tests.tiny import (
    dataset_spec,
    float64_model,
    merge_spec,
    model_spec,
    read_model,
    silent,
    tiny_checkpoint,
    tiny_texts,
    write_lines,
    write_rows,
)
from worker.engine.catalog.contracts.report import MergeResult
from worker.engine.catalog.contracts.spec import EvaluationSpec
from worker.engine.catalog.data.rows import RowFile, sample
from worker.engine.catalog.primitives.errors import InvalidDataset
from worker.engine.jobs.engine import Engine
from worker.engine.merging.head_alignment import aligned

ROWS = 40
LABELS = {"two": 2, "three": 3, "grade": 1}
MU = 0.1


def ridge_by_stacking(features: Tensor, outputs: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The same minimum as an ordinary least squares problem: a row more for every coefficient that is held back."""
    x = np.column_stack([features.numpy(), np.ones(len(features))])
    expert = np.column_stack([weight.numpy(), bias.numpy()])
    ridge = MU * np.trace(x.T @ x / len(x)) / x.shape[1]
    held = np.sqrt(len(x) * ridge)
    stacked = np.vstack([x, held * np.eye(x.shape[1])])
    target = np.vstack([outputs.numpy(), held * expert.T])
    return torch.from_numpy(np.linalg.lstsq(stacked, target, rcond=None)[0].T)


@pytest.mark.parametrize("outputs", [1, 2, 5])
@pytest.mark.parametrize("rows", [3, 200])
def test_the_aligned_head_is_the_ridge_regression_towards_the_expert(rows: int, outputs: int) -> None:
    generator = torch.Generator().manual_seed(rows)
    x, y, weight, bias = (
        torch.randn(*shape, generator=generator, dtype=torch.float64)
        for shape in ((rows, 16), (rows, outputs), (outputs, 16), (outputs,))
    )
    new_weight, new_bias = aligned(x, y, weight, bias)
    assert new_bias is not None
    expected = ridge_by_stacking(x, y, weight, bias)
    torch.testing.assert_close(new_weight, expected[:, :-1], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(new_bias, expected[:, -1], rtol=1e-9, atol=1e-9)


def test_a_head_that_still_fits_stays_as_it_is() -> None:
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((50, 16), (3, 16)))
    bias = torch.ones(3, dtype=torch.float64)
    new_weight, new_bias = aligned(x, x @ weight.T + bias, weight, bias)
    assert new_bias is not None
    torch.testing.assert_close(new_weight, weight, rtol=0, atol=1e-12)
    torch.testing.assert_close(new_bias, bias, rtol=0, atol=1e-12)
    without, none = aligned(x, x @ weight.T, weight, None)
    torch.testing.assert_close(without, weight, rtol=0, atol=1e-12)
    assert none is None


@pytest.fixture(scope="module")
def experts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("aligned")
    for seed, (name, labels) in enumerate(LABELS.items()):
        tiny_checkpoint(root / name, labels=labels, seed=seed)
        write_rows(root / f"{name}.jsonl", count=ROWS, labels=labels, seed=seed)
    return {name: root / name for name in LABELS}


def merge(engine: Engine, folder: Path, experts: dict[str, Path], **options: Any) -> MergeResult:
    models = [model_spec(path, path.with_suffix(".jsonl")) for path in experts.values()]
    method = {"name": "average", **options.pop("method", {})}
    return engine.merge(merge_spec(folder, options.pop("models", models), method, **options), silent)


def head(folder: Path) -> Tensor:
    """Weight and bias side by side."""
    tensors = read_model(folder)
    return torch.cat([tensors["classifier.weight"], tensors["classifier.bias"][:, None]], dim=1)


def head_reads(folder: Path, texts: list[str]) -> Tensor:
    """What the head reads, in float64, one example at a time."""
    model, tokenizer = float64_model(folder), AutoTokenizer.from_pretrained(folder)
    read: list[Tensor] = []
    model.classifier.register_forward_pre_hook(lambda _, inputs: read.append(inputs[0]))
    with torch.no_grad():
        for text in texts:
            model(**tokenizer(text, return_tensors="pt"))
    return torch.cat(read)


@pytest.mark.parametrize("method", [{}, {"name": "mask_fisher"}, {"name": "regmean"}], ids=str)
def test_the_artifact_holds_the_aligned_heads(
    engine: Engine, experts: dict[str, Path], tmp_path: Path, method: dict[str, Any]
) -> None:
    result = merge(engine, tmp_path, experts, method=method, align_heads=True)
    assert [model.aligned_examples for model in result.models] == [ROWS] * 3
    assert result.timings.align_seconds > 0
    backbones = []
    for name, path in experts.items():
        texts = [json.loads(line)["text"] for line in path.with_suffix(".jsonl").read_text().splitlines()]
        kept = head(path).double()
        outputs = head_reads(path, texts) @ kept[:, :-1].T + kept[:, -1]
        merged = tmp_path / "models" / name
        expected = ridge_by_stacking(head_reads(merged, texts), outputs, kept[:, :-1], kept[:, -1])
        assert (head(merged) - expected).norm() < 1e-4 * expected.norm()
        assert (head(merged) - kept).norm() > 1e-2 * kept.norm()
        backbones.append({k: v for k, v in read_model(merged).items() if not k.startswith("classifier")})
        manifest = {file["name"]: file for file in json.loads((tmp_path / "manifest.json").read_text())["files"]}
        assert {f"models/{name}/{shard.name}" for shard in merged.glob("*.safetensors")} <= manifest.keys()
    assert all(torch.equal(backbones[0][key], other[key]) for other in backbones for key in backbones[0])


def first_texts(rows: Path, count: int) -> list[str]:
    """The texts of the first rows in the seeded order."""
    read = sample(RowFile(spec := dataset_spec(rows)), spec, count)
    return [str(row.text) for row in read]


@pytest.mark.parametrize("method", ["average", "aligned_regmean"])
def test_heads_are_aligned_on_as_many_rows_as_are_asked_for(
    engine: Engine, experts: dict[str, Path], tmp_path: Path, method: str
) -> None:
    """What is measured, and what layers are refitted to, does not depend on it."""
    asked = {"name": method, **({"examples": 20} if method == "aligned_regmean" else {})}
    for rows in (16, 30):
        folder = tmp_path / str(rows)
        result = merge(engine, folder, experts, method=asked, align_heads=True, alignment_rows=rows)
        assert [model.aligned_examples for model in result.models] == [rows] * 3
        assert "| rows its head was aligned on |" in (folder / "README.md").read_text()
        for name, path in experts.items():
            texts, kept, merged = first_texts(path.with_suffix(".jsonl"), rows), head(path).double(), folder / "models"
            outputs = head_reads(path, texts) @ kept[:, :-1].T + kept[:, -1]
            expected = ridge_by_stacking(head_reads(merged / name, texts), outputs, kept[:, :-1], kept[:, -1])
            assert (head(merged / name) - expected).norm() < 1e-4 * expected.norm()
    few, many = (read_model(tmp_path / str(rows) / "models" / "two") for rows in (16, 30))
    differing = {name for name in few if not torch.equal(few[name], many[name])}
    assert differing == {"classifier.weight", "classifier.bias"}


def test_heads_are_kept_to_the_bit_when_nothing_is_to_be_aligned(
    engine: Engine, experts: dict[str, Path], tmp_path: Path
) -> None:
    result = merge(engine, tmp_path / "off", experts, align_heads=False)
    assert [model.aligned_examples for model in result.models] == [0, 0, 0]
    same = {"two": experts["two"]}
    merge(engine, tmp_path / "alone", same, align_heads=True)
    for name in experts:
        assert torch.equal(head(tmp_path / "off" / "models" / name), head(experts[name]))
    alone, own = head(tmp_path / "alone" / "models" / "two"), head(experts["two"])
    torch.testing.assert_close(alone, own, rtol=0, atol=1e-6)


def test_a_model_without_rows_keeps_its_head_and_the_result_says_so(
    engine: Engine, experts: dict[str, Path], tmp_path: Path
) -> None:
    models = [model_spec(path, path.with_suffix(".jsonl") if n == "two" else None) for n, path in experts.items()]
    result = merge(engine, tmp_path, experts, models=models, align_heads=True)
    assert [model.aligned_examples for model in result.models] == [ROWS, 0, 0]
    assert [note for note in result.notes if "kept as it was: no dataset" in note] == [
        f"the head of {name} was kept as it was: no dataset names rows to align it on" for name in ("three", "grade")
    ]
    assert torch.equal(head(tmp_path / "models" / "three"), head(experts["three"]))
    assert not torch.equal(head(tmp_path / "models" / "two"), head(experts["two"]))


def test_a_model_of_weight_0_is_aligned_too(engine: Engine, experts: dict[str, Path], tmp_path: Path) -> None:
    models = [
        model_spec(path, path.with_suffix(".jsonl"), weight=0.0 if name == "three" else 1.0)
        for name, path in experts.items()
    ]
    result = merge(engine, tmp_path, experts, models=models, align_heads=True)
    assert [model.aligned_examples for model in result.models] == [ROWS] * 3
    assert not torch.equal(head(tmp_path / "models" / "three"), head(experts["three"]))


def evaluated(path: Path, rows: Path, **columns: Any) -> Any:
    evaluation = EvaluationSpec(source=rows.name, path=rows, label="label", metric="accuracy", **columns)
    return model_spec(path, path.with_suffix(".jsonl"), evaluation=evaluation)


def test_no_row_that_is_evaluated_on_is_aligned_on(engine: Engine, experts: dict[str, Path], tmp_path: Path) -> None:
    path = experts["two"]
    some = evaluated(path, path.with_suffix(".jsonl"), limit=15, seed=5)
    result = merge(engine, tmp_path / "some", experts, models=[some], align_heads=True, evaluate=True)
    lines = path.with_suffix(".jsonl").read_text().splitlines()
    assert len({json.loads(line)["text"] for line in lines}) == ROWS
    assert result.models[0].aligned_examples == ROWS - 15
    every = evaluated(path, path.with_suffix(".jsonl"))
    result = merge(engine, tmp_path / "every", experts, models=[every], align_heads=True, evaluate=True)
    assert result.models[0].aligned_examples == 0
    assert any("two.jsonl has 0 rows that it is not evaluated on" in note for note in result.notes)
    assert torch.equal(head(tmp_path / "every" / "models" / "two"), head(path))


def test_rows_after_those_that_are_evaluated_make_up_for_them(
    engine: Engine, experts: dict[str, Path], tmp_path: Path
) -> None:
    """The first rows of the seeded order are evaluated on; as many others are there, and are fitted to."""
    path = experts["two"]
    first = evaluated(path, path.with_suffix(".jsonl"), limit=18)
    options: dict[str, Any] = {"models": [first], "align_heads": True, "evaluate": True}
    for method in ("regmean", "aligned_regmean"):
        asked = {"name": method, "examples": 18}
        result = merge(engine, tmp_path / method, experts, method=asked, **options)
        assert (result.models[0].examples, result.models[0].aligned_examples) == (18, ROWS - 18)
    options["models"] = [evaluated(path, path.with_suffix(".jsonl"))]
    with pytest.raises(InvalidDataset, match=r"two.jsonl: every row is one that two is evaluated on"):
        merge(engine, tmp_path / "every", experts, method={"name": "aligned_regmean"}, **options)


def test_both_heads_are_measured_on_the_same_rows(engine: Engine, experts: dict[str, Path], tmp_path: Path) -> None:
    texts = tiny_texts(60, seed=77)
    models, by_hand = [], {}
    for name, path in experts.items():
        if name == "grade":
            continue
        rows = tmp_path / f"{name}.jsonl"
        labels = float64_predictions(path, texts)
        write_lines(rows, [json.dumps({"text": t, "label": y}) for t, y in zip(texts, labels, strict=True)])
        models.append(evaluated(path, rows))
    result = merge(engine, tmp_path / "out", experts, models=models, align_heads=True, evaluate=True)
    kept = merge(engine, tmp_path / "kept", experts, models=models, align_heads=False, evaluate=True)
    assert result.metrics is not None
    assert kept.metrics is not None
    for name in ("two", "three"):
        labels = float64_predictions(experts[name], texts)
        for folder in ("out", "kept"):
            predicted = float64_predictions(tmp_path / folder / "models" / name, texts)
            by_hand[folder] = sum(a == b for a, b in zip(predicted, labels, strict=True)) / len(texts)
        found = result.metrics[name]
        assert (found.expert, found.merged) == (1.0, by_hand["out"])
        assert found.merged_kept_head == kept.metrics[name].merged == by_hand["kept"] == found.average
        assert found.retention == found.merged


def float64_predictions(folder: Path, texts: list[str]) -> list[int]:
    kept = head(folder).double()
    return (head_reads(folder, texts) @ kept[:, :-1].T + kept[:, -1]).argmax(-1).tolist()


def test_statistics_and_heads_do_not_disturb_each_other(
    engine: Engine, experts: dict[str, Path], tmp_path: Path
) -> None:
    """Scores are of the experts as they are, whether or not their heads will be aligned."""
    for folder, align in (("with", True), ("without", False)):
        merge(engine, tmp_path / folder, experts, method={"name": "mask_fisher"}, align_heads=align)
    for name in experts:
        found = [load_file(tmp_path / folder / "scores" / f"{name}.safetensors") for folder in ("with", "without")]
        assert all(torch.equal(found[0][key], found[1][key]) for key in found[1])
