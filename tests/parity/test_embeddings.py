"""Embedding models: scores, metrics and merges against sentence-transformers, autograd and SciPy."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

from tests.score_names import assert_same_in_norm, by_name
from tests.tiny import edit_json, insert_masks, merge_spec, model_spec, read_model, silent, tiny_texts, write_lines
from tests.tiny_embeddings import embedding_model
from tests.tiny_families import DECODERS, TINY_BERT, TINY_FAMILIES, TinyFamily
from worker.engine.catalog.checkpoints.inspection import inspect_checkpoint
from worker.engine.catalog.contracts.spec import EvaluationSpec
from worker.engine.catalog.data.rows import RowFile, sample
from worker.engine.catalog.data.spec import DatasetSpec
from worker.engine.catalog.families import ScoreName
from worker.engine.catalog.primitives.errors import EngineError, InvalidCheckpoint, InvalidDataset
from worker.engine.catalog.tasks import LabelMap, column_problems
from worker.engine.inputs.examples import Example
from worker.engine.jobs.engine import Engine
from worker.engine.models.loading import LoadedModel, load
from worker.engine.scoring.estimators import Estimator
from worker.engine.scoring.scorer import score
from worker.engine.tasks.drawing import uniform

ROWS = 12
CPU = torch.device("cpu")
TOLERANCE = 1e-4  # of a score in norm, float32 against float64
BERT = replace(TINY_BERT, layers="encoder.layer")
LLAMA = replace(DECODERS["llama"], layers="layers")
MPNET = replace(TINY_FAMILIES["mpnet"], layers="encoder.layer")
FORMS: dict[str, tuple[TinyFamily, str, tuple[str, ...]]] = {
    "bert-cls": (BERT, "cls", ("normalize",)),
    "bert-dense": (BERT, "max+mean", ("dense", "layer norm", "normalize")),
    "mpnet-mean": (MPNET, "mean", ()),
    "llama-last": (LLAMA, "lasttoken", ("residual",)),
}
POOLINGS = [
    *((pooling, more) for _, pooling, more in FORMS.values()),
    ("weightedmean", ()),
    ("mean_sqrt_len_tokens", ()),
]


@dataclass(frozen=True)
class Case:
    """Two embedding models of the same modules, `one` and `two`."""

    tiny: TinyFamily
    root: Path

    @property
    def models(self) -> dict[str, Path]:
        return {name: self.root / name for name in ("one", "two")}

    def loaded(self) -> LoadedModel:
        return load(inspect_checkpoint(self.root / "one", "one"), CPU)


@pytest.fixture(scope="module", params=FORMS)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    tiny, pooling, more = FORMS[request.param]
    root = tmp_path_factory.mktemp(request.param)
    for seed, name in enumerate(("one", "two"), start=1):
        embedding_model(root / name, seed, pooling, *more, family=tiny)
    return Case(tiny, root)


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine(CPU)


def write_pairs(file: Path, count: int = ROWS, seed: int = 0) -> Path:
    texts = tiny_texts(2 * count, seed)
    rng = np.random.default_rng(seed)
    rows = [
        {"text": one, "text_pair": two, "label": round(float(rng.uniform(0, 1)), 3)}
        for one, two in zip(texts[:count], texts[count:], strict=True)
    ]
    return write_lines(file, [json.dumps(row) for row in rows])


def rows_of(folder: Path, pairs: bool, labels: bool = False) -> DatasetSpec:
    file = write_pairs(folder / "rows.jsonl")
    return DatasetSpec(
        source="rows", path=file, text_pair="text_pair" if pairs else None, label="label" if labels else None
    )


def examples_of(loaded: LoadedModel, spec: DatasetSpec) -> list[Example]:
    rows = sample(RowFile(spec, loaded.task.rows), spec, None, shuffle=False)
    labels = LabelMap(loaded.task) if spec.label else None
    return loaded.kind.tokenized(rows, spec, loaded.tokenizer, loaded.max_length, labels).examples


def library_model(folder: Path) -> Any:
    from sentence_transformers import SentenceTransformer

    return SentenceTransformer(str(folder), device="cpu", local_files_only=True)


@pytest.mark.parametrize(("pooling", "more"), POOLINGS, ids=str)
def test_embeddings_are_those_of_sentence_transformers(tmp_path: Path, pooling: str, more: tuple[str, ...]) -> None:
    for similarity in ("cosine", "dot"):
        folder = embedding_model(tmp_path / similarity, 1, pooling, *more)
        edit_json(folder / "config_sentence_transformers.json", similarity_fn_name=similarity)
        texts = tiny_texts(5, 3)
        expected = library_model(folder).encode(texts, convert_to_tensor=True)
        loaded = load(inspect_checkpoint(folder, "one"), CPU)
        encoded = loaded.tokenizer(texts, padding=True, truncation=True, max_length=loaded.max_length)
        with torch.no_grad():
            found = loaded.kind.run({n: torch.tensor(encoded[n]) for n in loaded.tokenizer.model_input_names})
        if similarity == "cosine":
            expected = torch.nn.functional.normalize(expected)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def exact(case: Case) -> tuple[Callable[[Sequence[int]], Tensor], tuple[Tensor, ...]]:
    """A function from a text's tokens to its direction, in float64 by the library's modules, and masks of its nodes."""
    model = library_model(case.root / "one").double()
    masks = insert_masks(model[0].model, case.tiny)

    def embed(tokens: Sequence[int]) -> Tensor:
        ids = torch.tensor([tokens])
        found = model({"input_ids": ids, "attention_mask": torch.ones_like(ids), "modality": "text"})
        direction: Tensor = torch.nn.functional.normalize(found["sentence_embedding"][0], dim=-1)
        return direction

    return embed, masks


def expected_scores(
    case: Case, examples: list[Example], sums: Callable[[Example, list[Tensor]], list[Tensor]]
) -> dict[ScoreName, Tensor]:
    """Mean squared gradients of `sums` of a row's directions, a row at a time, without padding."""
    embed, masks = exact(case)
    total = [torch.zeros_like(mask) for mask in masks]
    for example in examples:
        for one in sums(example, [embed(inputs["input_ids"]) for inputs in example.inputs]):
            found = torch.autograd.grad(one, masks, retain_graph=True)
            for sum_, gradient in zip(total, found, strict=True):
                sum_ += gradient**2 / len(examples)
    return by_name(case.tiny, total)


def normal(seed: int, example: Example, width: int) -> Tensor:
    draws = [uniform(seed, example.index, axis) for axis in range(width)]
    return torch.from_numpy(stats.norm.ppf(draws))


OBJECTIVES: dict[str, tuple[Any, bool, Callable[[Example, list[Tensor]], list[Tensor]]]] = {
    "expected": ("expected", False, lambda _, e: list(e[0])),
    "sampled": ("sampled", False, lambda row, e: [e[0] @ normal(5, row, len(e[0]))]),
    "expected of pairs": ("expected", True, lambda _, e: [e[0] @ e[1]]),
    "sampled of pairs": ("sampled", True, lambda _, e: [e[0] @ e[1]]),
    "empirical of pairs": ("empirical", True, lambda row, e: [(row.label - (e[0] @ e[1]).detach()) * (e[0] @ e[1])]),  # type: ignore[operator]
}


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_scores_are_those_of_masks_that_are_there(case: Case, tmp_path: Path, objective: str) -> None:
    name, pairs, sums = OBJECTIVES[objective]
    loaded, estimator = case.loaded(), Estimator(name, seed=5)
    examples = examples_of(loaded, rows_of(tmp_path, pairs, labels=name == "empirical"))
    found = score(loaded, examples, estimator, "float32", "rows", silent).scores()
    assert_same_in_norm(found, expected_scores(case, examples, sums), TOLERANCE)
    apart = [[one] for one in reversed(examples)]
    assert_same_in_norm(score(loaded, examples, estimator, "float32", "rows", silent, apart).scores(), found, 1e-5)


def test_one_drawn_vector_has_on_average_the_expected_scores(case: Case, tmp_path: Path) -> None:
    loaded = case.loaded()
    [example, *_] = examples_of(loaded, rows_of(tmp_path, pairs=False))
    drawn = [replace(example, index=index) for index in range(4000)]
    exact_scores = score(loaded, [example], Estimator("expected"), "float32", "rows", silent).scores()
    found = score(loaded, drawn, Estimator("sampled", seed=1), "float32", "rows", silent).scores()
    assert_same_in_norm(found, exact_scores, 0.15)


def evaluations(case: Case, tmp_path: Path, metric: str) -> dict[str, EvaluationSpec]:
    label = None if metric == "retrieval_accuracy" else "label"
    return {
        name: EvaluationSpec(
            source=name,
            path=write_pairs(tmp_path / f"{name}-rows.jsonl", 20, seed),
            text_pair="text_pair",
            label=label,
            metric=metric,
        )
        for seed, name in enumerate(case.models, start=7)
    }


def library_metric(folder: Path, rows: Path, metric: str) -> float:
    """The metric by the library's own embeddings."""
    from sentence_transformers.util import pairwise_cos_sim

    model = library_model(folder)
    lines = [json.loads(line) for line in rows.read_text().splitlines()]
    first, second = (
        model.encode([line[column] for line in lines], convert_to_tensor=True) for column in ("text", "text_pair")
    )
    if metric == "retrieval_accuracy":
        return float((model.similarity(first, second).argmax(1) == torch.arange(len(lines))).float().mean())
    correlation = stats.spearmanr if metric == "spearman" else stats.pearsonr
    return float(correlation(pairwise_cos_sim(first, second), [line["label"] for line in lines]).statistic)


@pytest.mark.parametrize("correlates", [True, False], ids=["correlation", "retrieval"])
def test_metrics_are_those_of_the_librarys_embeddings(
    case: Case, engine: Engine, tmp_path: Path, correlates: bool
) -> None:
    correlation = "pearson" if case.tiny is LLAMA else "spearman"
    metric = correlation if correlates else "retrieval_accuracy"
    rows = evaluations(case, tmp_path, metric)
    specs = [
        model_spec(folder, evaluation=rows[name], weight=w) for w, (name, folder) in enumerate(case.models.items(), 1)
    ]
    result = engine.merge(merge_spec(tmp_path / "out", specs, {"name": "linear"}, evaluate=True), silent)
    plain = [model_spec(folder) for folder in case.models.values()]
    engine.merge(merge_spec(tmp_path / "average", plain, {"name": "average"}), silent)
    assert result.metrics is not None
    for name, folder in case.models.items():
        found = result.metrics[name]
        versions = {"expert": folder, "merged": tmp_path / "out" / "model", "average": tmp_path / "average" / "model"}
        for version, model in versions.items():
            expected = library_metric(model, rows[name].path, metric)  # type: ignore[arg-type]
            assert getattr(found, version) == pytest.approx(expected, abs=1e-4), version
        other = next(path for own, path in case.models.items() if own != name)
        best = max(library_metric(path, rows[name].path, metric) for path in (folder, other))  # type: ignore[arg-type]
        assert found.best_expert is not None
        assert found.best_expert.value == pytest.approx(best, abs=1e-4)


METHODS = [
    ("mask_fisher", True),
    ("fisher", False),
    ("regmean", True),
    ("mask_regmean", False),
    ("aligned_regmean", True),
]


@pytest.mark.parametrize(("method", "pairs"), METHODS)
def test_measured_merges_load_and_a_model_with_itself_is_itself(
    case: Case, engine: Engine, tmp_path: Path, method: str, pairs: bool
) -> None:
    dataset = rows_of(tmp_path, pairs)
    own = case.models["one"]
    same = [model_spec(own, name=name, dataset=dataset) for name in ("first", "second")]
    engine.merge(merge_spec(tmp_path / "same", same, {"name": method}), silent)
    found = read_model(tmp_path / "same" / "model")
    assert [name for name, tensor in read_model(own).items() if not torch.equal(found[name], tensor)] == []
    specs = [model_spec(folder, dataset=dataset) for folder in case.models.values()]
    engine.merge(merge_spec(tmp_path / "out", specs, {"name": method}), silent)
    merged = read_model(tmp_path / "out" / "model")
    one, two = map(read_model, case.models.values())
    assert any(not torch.allclose(merged[name], (one[name] + two[name]) / 2, atol=1e-4) for name in merged)
    assert bool(library_model(tmp_path / "out" / "model").encode(["one two"], convert_to_tensor=True).isfinite().all())


def test_auto_tries_merges_with_their_own_modules(engine: Engine, tmp_path: Path) -> None:
    specs = []
    for seed, name in enumerate(("one", "two"), start=1):
        folder = embedding_model(tmp_path / name, seed, "mean", "dense")
        texts = tiny_texts(40, seed)
        lines = [json.dumps({"text": text, "text_pair": f"{text} one"}) for text in texts]
        rows = EvaluationSpec(
            source=name,
            path=write_lines(tmp_path / f"{name}.jsonl", lines),
            text_pair="text_pair",
            label=None,
            metric="retrieval_accuracy",
        )
        specs.append(model_spec(folder, evaluation=rows))
    method = {"name": "auto", "trials": 2, "candidates": [{"name": "average"}]}
    result = engine.merge(merge_spec(tmp_path / "out", specs, method, evaluate=True), silent)
    assert result.candidates is not None
    [tried] = [candidate for candidate in result.candidates if candidate.kind == "average"]
    [published] = [candidate for candidate in result.candidates if candidate.chosen]
    assert len(tried.metrics) == 2
    for name, found in tried.metrics.items():
        assert 0 < found.value == pytest.approx(published.metrics[name].value)


def refused(loaded: LoadedModel, spec: DatasetSpec) -> str:
    with pytest.raises(InvalidDataset) as caught:
        examples_of(loaded, spec)
    return caught.value.message


def test_labels_that_are_no_similarity_are_refused_by_their_row(tmp_path: Path) -> None:
    loaded = load(inspect_checkpoint(embedding_model(tmp_path / "one", 1, "mean"), "one"), CPU)
    file = write_lines(tmp_path / "rows.jsonl", [json.dumps({"text": "one", "text_pair": "two", "label": 4.2})])
    spec = DatasetSpec(source="rows", path=file, text_pair="text_pair", label="label")
    assert "rows, line 1: its label 4.2 is no cosine" in refused(loaded, spec)
    assert "a label is the similarity of two texts" in refused(loaded, spec.model_copy(update={"text_pair": None}))
    write_lines(file, [json.dumps({"text": "one", "text_pair": "two", "label": "near"})])
    assert "the label of two texts is a finite number" in refused(loaded, spec)


def test_labels_are_only_read_of_two_texts(tmp_path: Path) -> None:
    loaded = load(inspect_checkpoint(embedding_model(tmp_path / "one", 1, "mean"), "one"), CPU)
    spec = DatasetSpec(source="rows", path=tmp_path, label="label")
    [(column, problem)] = column_problems(spec, loaded.task, needs_labels=True)
    assert (column, "two texts" in problem) == ("text_pair", True)
    assert not list(column_problems(spec.model_copy(update={"text_pair": "other"}), loaded.task, needs_labels=True))
    assert not list(column_problems(spec.model_copy(update={"label": None}), loaded.task))


def otherwise_compared(folder: Path) -> None:
    edit_json(folder / "config_sentence_transformers.json", similarity_fn_name="euclidean")


def prompted(folder: Path) -> None:
    edit_json(folder / "config_sentence_transformers.json", default_prompt_name="query")


def without_prompt(folder: Path) -> None:
    edit_json(folder / "1_Pooling" / "config.json", include_prompt=False)


@pytest.mark.parametrize("edit", [otherwise_compared, prompted, without_prompt])
def test_what_is_not_computed_here_is_merged_but_not_measured(
    engine: Engine, tmp_path: Path, edit: Callable[[Path], None]
) -> None:
    folders = [embedding_model(tmp_path / name, seed, "mean") for seed, name in enumerate(("one", "two"), start=1)]
    for folder in folders:
        edit(folder)
    engine.merge(merge_spec(tmp_path / "out", [model_spec(path) for path in folders], {"name": "average"}), silent)
    assert (tmp_path / "out" / "model" / "modules.json").is_file()
    dataset = rows_of(tmp_path, pairs=False)
    measured = [model_spec(path, dataset=dataset) for path in folders]
    with pytest.raises(EngineError, match="has no table to measure it by") as caught:
        engine.merge(merge_spec(tmp_path / "measured", measured), silent)
    assert isinstance(caught.value, InvalidCheckpoint)
