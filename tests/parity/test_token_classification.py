"""Labels of words: scores, metrics and merges of every family against independent computations."""

import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow
import pytest
import torch
from pyarrow.parquet import write_table
from sklearn import metrics as sk
from torch import Tensor
from transformers import AutoModelForTokenClassification, AutoTokenizer
from transformers.models.auto.modeling_auto import MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES as CLASSES

from tests.score_names import assert_same_in_norm
from tests.siblings import (
    TOLERANCE,
    Siblings,
    assert_batches_do_not_matter,
    assert_same_model,
    assert_squares,
    examples_of,
    merged_with_itself,
    scores_by_masks,
    write_objects,
)
from tests.tiny import (
    dataset_spec,
    insert_masks,
    merge_spec,
    model_spec,
    silent,
    tiny_checkpoint,
    write_lines,
)
from tests.tiny_families import OF_EACH_FORM, TINY_FAMILIES, WORDS, TinyFamily
from worker.engine.catalog.data.rows import RowFile, sample
from worker.engine.catalog.families import ScoreName
from worker.engine.catalog.primitives.errors import InvalidDataset, Place
from worker.engine.catalog.tasks import LabelMap, TokenClassification, check_metric, label_map
from worker.engine.evaluation.metrics import bootstrap, metric_for
from worker.engine.inputs.examples import tokenize
from worker.engine.inputs.tables import read_parquet
from worker.engine.jobs.engine import Engine
from worker.engine.scoring.estimators import Estimator, estimator_for
from worker.engine.scoring.scorer import paper_scores, score
from worker.engine.tasks.drawing import uniform

NAMES = ("O", "B-PER", "I-PER", "B-LOC", "I-LOC")
OTHERS = ("noun", "verb", "other")
TASK = TokenClassification(len(NAMES), {name: index for index, name in enumerate(NAMES)})
ROWS = 24
WITH_HEAD = [name for name in OF_EACH_FORM if TINY_FAMILIES[name].model_type in CLASSES]
"""Families of each form of which the library has such a class."""
LONG = "xylophonic"  # several tokens in most tokenizers
Row = dict[str, list[str]]


def rows_of(seed: int, names: Sequence[str] = NAMES, count: int = ROWS) -> list[Row]:
    rng = random.Random(seed)
    rows = []
    for _ in range(count):
        words = [LONG if rng.random() < 0.1 else rng.choice(WORDS) for _ in range(rng.randint(1, 9))]
        rows.append({"tokens": words, "label": [rng.choice(names) for _ in words]})
    return rows


def made(root: Path, tiny: TinyFamily) -> Siblings:
    """Two taggers of other labels."""
    for seed, (name, labels) in enumerate((("one", NAMES), ("two", OTHERS)), start=1):
        tiny_checkpoint(root / name, family=tiny, seed=seed, names=labels, task="TokenClassification")
        write_objects(root / f"{name}.jsonl", rows_of(seed, labels))
        write_objects(root / f"{name}-held-out.jsonl", rows_of(10 + seed, labels))
    return Siblings(tiny, root, AutoModelForTokenClassification)


@pytest.fixture(scope="module", params=WITH_HEAD)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Siblings:
    return made(tmp_path_factory.mktemp(request.param), TINY_FAMILIES[request.param])


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Siblings:
    return made(tmp_path_factory.mktemp("bert-alone"), TINY_FAMILIES["bert"])


# As transformers reads them


def first_tokens(tokenizer: Any, words: Sequence[str]) -> tuple[Tensor, list[int]]:
    """The tokens of a row, and the positions of the first one of each word."""
    encoded = tokenizer(list(words), is_split_into_words=True)
    ids = encoded.word_ids()
    return torch.tensor([encoded["input_ids"]]), [ids.index(word) for word in range(len(words))]


def logits_of_words(model: Any, tokenizer: Any, words: Sequence[str]) -> Tensor:
    tokens, positions = first_tokens(tokenizer, words)
    logits: Tensor = model(input_ids=tokens).logits[0, positions]
    return logits


def scores_one_by_one(case: Siblings, estimator: Estimator) -> dict[ScoreName, Tensor]:
    """Scores by masks that are there: a row, a word and a label at a time, float64."""
    model, tokenizer = case.exact(), AutoTokenizer.from_pretrained(case.models["one"])
    masks = insert_masks(model, case.tiny)

    def likelihoods() -> Iterator[list[tuple[float, Tensor]]]:
        for index, row in enumerate(case.rows()):
            logp = logits_of_words(model, tokenizer, row["tokens"]).log_softmax(-1)
            p = logp.detach().exp()
            if estimator.name == "expected":
                yield [(float(p[word, k]), logp[word, k]) for word in range(len(p)) for k in range(len(NAMES))]
                continue
            labels = [NAMES.index(name) for name in row["label"]]
            if estimator.name == "sampled":
                _, positions = first_tokens(tokenizer, row["tokens"])
                draws = [uniform(estimator.seed, index, position) for position in positions]
                labels = [int((p[word].cumsum(0)[:-1] <= draw).sum()) for word, draw in enumerate(draws)]
            yield [(1.0, sum((logp[word, label] for word, label in enumerate(labels)), torch.zeros(())))]

    return scores_by_masks(case.tiny, masks, likelihoods())


@pytest.mark.parametrize("name", ["expected", "sampled", "empirical"])
def test_scores_are_those_of_masks_that_are_there(case: Siblings, name: Any) -> None:
    loaded = case.loaded()
    examples, estimator = examples_of(loaded, case.spec()), Estimator(name, seed=5)
    has_parts = any(len(example.labels) < example.length - 2 for example in examples)
    assert has_parts or len(loaded.tokenizer.tokenize(LONG)) == 1
    found = score(loaded, examples, estimator, "float32", "rows", silent).scores()
    assert_same_in_norm(found, scores_one_by_one(case, estimator), TOLERANCE)


@pytest.mark.parametrize("name", ["expected", "sampled"])
def test_scores_do_not_depend_on_batch_order_and_padding(case: Siblings, name: Any) -> None:
    loaded = case.loaded()
    assert_batches_do_not_matter(loaded, examples_of(loaded, case.spec()), Estimator(name, seed=3))


def test_a_model_merged_with_itself_is_itself(case: Siblings, engine: Engine, tmp_path: Path) -> None:
    folder = merged_with_itself(engine, tmp_path / "out", case)
    for name in ("first", "second"):
        assert_same_model(folder / "models" / name, case.models["one"])


@pytest.mark.parametrize("method", ["mask_fisher", "fisher", "regmean", "aligned_regmean"])
def test_taggers_of_other_labels_keep_their_heads_and_are_evaluated(
    case: Siblings, engine: Engine, tmp_path: Path, method: str
) -> None:
    """The metric is scikit-learn's, of the published model as transformers runs it."""
    models = case.evaluated("accuracy")
    result = engine.merge(merge_spec(tmp_path / "out", models, {"name": method}, evaluate=True), silent)
    assert result.metrics is not None
    for name in case.models:
        rows = case.rows(f"{name}-held-out")
        wanted = [label for row in rows for label in row["label"]]
        found = result.metrics[name]
        assert found.examples == ROWS
        for version, path in case.versions(name, tmp_path / "out" / "models" / name).items():
            model, tokenizer = case.exact(path), AutoTokenizer.from_pretrained(path)
            with torch.no_grad():
                said = [logits_of_words(model, tokenizer, row["tokens"]).argmax(-1).tolist() for row in rows]
            names = [model.config.id2label[label] for row in said for label in row]
            assert getattr(found, version) == pytest.approx(sk.accuracy_score(wanted, names), abs=1e-9)


def test_heads_are_aligned_to_words(case: Siblings, engine: Engine, tmp_path: Path) -> None:
    """By normal equations over the first tokens of words, float64."""
    specs = [model_spec(folder, case.file(name)) for name, folder in case.models.items()]
    spec = merge_spec(tmp_path / "out", specs, {"name": "average"}, align_heads=True)
    result = engine.merge(spec, silent)
    assert [model.aligned_examples for model in result.models] == [ROWS, ROWS]
    model, merged = case.exact(), case.exact(tmp_path / "out" / "models" / "one")
    tokenizer = AutoTokenizer.from_pretrained(case.models["one"])
    [head] = [name for name in ("classifier", "score") if hasattr(model, name)]
    seen: list[Tensor] = []
    getattr(merged, head).register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0][0]))
    x, y = [], []
    for row in case.rows():
        tokens, positions = first_tokens(tokenizer, row["tokens"])
        with torch.no_grad():
            y.append(model(input_ids=tokens).logits[0, positions])
            merged(input_ids=tokens)
        x.append(seen.pop()[positions])
    features, outputs = torch.cat(x), torch.cat(y)
    own, new = getattr(model, head), getattr(merged, head)
    before, after = own.weight.data, new.weight.data
    if own.bias is not None:
        features = torch.cat([features, features.new_ones(len(features), 1)], dim=1)
        before, after = (torch.cat([m.weight.data, m.bias.data[:, None]], dim=1) for m in (own, new))
    moment = features.T @ features / len(features)
    held = 0.1 * moment.diagonal().mean() * torch.eye(len(moment), dtype=moment.dtype)
    wanted = torch.linalg.solve(moment + held, features.T @ outputs / len(features) + held @ before.T).T
    torch.testing.assert_close(after, wanted, rtol=1e-3, atol=1e-4)


# Rows and labels


@pytest.mark.parametrize("kind", ["texts", "ids", "csv", "parquet", "class labels"])
def test_rows_are_the_same_however_they_are_written(bert: Siblings, tmp_path: Path, kind: str) -> None:
    rows = rows_of(1)
    asked = {"label": "label", "tokens": "tokens"}
    texts = [{name: " ".join(values) for name, values in row.items()} for row in rows]
    ids = [{**row, "label": [NAMES.index(one) for one in row["label"]]} for row in rows]
    file = tmp_path / ("rows.csv" if kind == "csv" else "rows.jsonl")
    if kind == "csv":
        write_lines(file, ["tokens,label", *(f"{row['tokens']},{row['label']}" for row in texts)])
    elif kind == "parquet":
        file = tmp_path / "rows.parquet"
        write_table(pyarrow.Table.from_pylist(rows), file)
    elif kind == "class labels":
        other_order = [*reversed(NAMES)]
        of_words = datasets.List(datasets.ClassLabel(names=other_order))
        features = datasets.Features({"tokens": datasets.List(datasets.Value("string")), "label": of_words})
        file = tmp_path / "rows.parquet"
        datasets.Dataset.from_list(rows, features=features).to_parquet(file)
    else:
        write_objects(file, texts if kind == "texts" else ids)
    loaded = bert.loaded()
    spec = dataset_spec(file, **asked)
    reader = loaded.task.rows
    read = read_parquet(spec, reader) if file.suffix == ".parquet" else RowFile(spec, reader)
    labels, _ = label_map(loaded.task, "rows", None, read.label_names, "one")
    examples = tokenize(
        sample(read, spec, None, shuffle=False), spec, loaded.tokenizer, loaded.max_length, labels, reading=loaded.kind
    ).examples
    expected = examples_of(loaded, bert.spec())
    assert [(e.encoding, e.label, e.positions) for e in examples] == [
        (e.encoding, e.label, e.positions) for e in expected
    ]


def test_words_beyond_the_limit_have_no_labels(bert: Siblings, tmp_path: Path) -> None:
    loaded = bert.loaded()
    file = write_objects(tmp_path / "rows.jsonl", [{"tokens": ["one", LONG, *WORDS[:60]], "label": ["O"] * 62}])
    spec = dataset_spec(file)
    rows = sample(RowFile(spec, loaded.task.rows), spec, None)
    found = tokenize(rows, spec, loaded.tokenizer, loaded.max_length, LabelMap(loaded.task), reading=loaded.kind)
    [example] = found.examples
    assert found.truncated == 1
    assert example.length == loaded.max_length
    assert example.outputs == len(example.labels) < 62


REFUSED: dict[str, tuple[dict[str, Any], list[str]]] = {
    "a number": ({"tokens": 3, "label": ["O"]}, ["line 2", "column 'tokens' is not a list of words"]),
    "no words": ({"tokens": [], "label": []}, ["line 2", "column 'tokens' has no words"]),
    "a text of spaces": ({"tokens": "  ", "label": []}, ["line 2", "column 'tokens' has no words"]),
    "a word that is none": ({"tokens": ["one", None], "label": ["O", "O"]}, ["line 2", "column 'tokens' is not text"]),
    "no column": ({"words": ["one"], "label": ["O"]}, ["line 2", "no column 'tokens'"]),
    "fewer labels": ({"tokens": ["one", "two"], "label": ["O"]}, ["line 2", "2 words have 1 labels"]),
    "one label": ({"tokens": ["one"], "label": 1}, ["line 2", "label is int, not a list of the words' labels"]),
    "no label": ({"tokens": ["one"], "label": None}, ["line 2", "label is NoneType, not a list"]),
    "an unknown label": ({"tokens": ["one"], "label": ["B-PERS"]}, ["line 2", "did you mean 'B-PER'"]),
    "an id out of range": ({"tokens": ["one"], "label": [5]}, ["line 2", "ids are 0 to 4"]),
    "an ignored word": ({"tokens": ["one"], "label": [-100]}, ["line 2", "label -100 is out of range"]),
    "words without tokens": ({"tokens": ["\u200b"], "label": ["O"]}, ["line 2", "no token is of a word"]),
}


@pytest.mark.parametrize("fault", REFUSED)
def test_rows_that_are_none_are_refused_by_line(bert: Siblings, tmp_path: Path, fault: str) -> None:
    row, words = REFUSED[fault]
    loaded = bert.loaded()
    spec = dataset_spec(write_objects(tmp_path / "rows.jsonl", [{"tokens": ["one"], "label": ["O"]}, row]))

    with pytest.raises(InvalidDataset) as caught:
        examples_of(loaded, spec)
    assert all(word in caught.value.message for word in words), caught.value.message


# Metrics


def drawn_rows(seed: int, names: Sequence[str], rows: int) -> list[list[str]]:
    rng = random.Random(seed)
    return [[rng.choice(names) for _ in range(1 + place % 7)] for place in range(rows)]


def task_of_names(names: Sequence[str]) -> TokenClassification:
    return TokenClassification(len(names), {name: index for index, name in enumerate(names)})


def of_words(task: TokenClassification, rows: Sequence[Sequence[str]]) -> tuple[np.ndarray, np.ndarray]:
    ids = np.array([float(task.label_ids[name]) for row in rows for name in row])
    first = np.array([float(place == 0) for row in rows for place in range(len(row))])
    return ids, np.stack([ids, first], axis=1)


def entities(row: Sequence[str]) -> set[tuple[str, int, int]]:
    """Type, first and last word of each, word by word by the rules of conlleval's `startOfChunk` and `endOfChunk`."""
    found, start = set(), 0
    before, type_before = "O", ""
    for place, name in enumerate([*row, "O"]):
        part, _, kind = name.partition("-")
        changes = kind != type_before
        if before != "O" and (part in "OBS" or before in "ES" or changes):
            found.add((type_before, start, place - 1))
        if part != "O" and (part in "BS" or before in "OES" or changes):
            start = place
        before, type_before = part, kind
    return found


def conlleval_f1(wanted: Sequence[Sequence[str]], said: Sequence[Sequence[str]]) -> float:
    true, given = (
        {(row, *entity) for row, of in enumerate(rows) for entity in entities(of)} for rows in (wanted, said)
    )
    return 2 * len(true & given) / (len(true) + len(given))


@pytest.mark.parametrize("letters", ["BI", "I", "BIES"])
def test_f1_of_entities_is_that_of_conlleval(letters: str) -> None:
    """Labels at random, so that every order of parts occurs, also those that no tagger should give."""
    names = ["O", *(f"{letter}-{kind}" for kind in ("PER", "LOC", "B-X") for letter in letters)]
    task = task_of_names(names)
    for seed in range(20):
        wanted, said = (drawn_rows(7 * seed + k, names, 40) for k in (0, 1))
        said = [own if place % 3 else other for place, (own, other) in enumerate(zip(wanted, said, strict=True))]
        _, labels = of_words(task, wanted)
        predictions, _ = of_words(task, said)
        found = metric_for("entity_f1", task)(labels, predictions)
        assert 0 < found < 1
        assert found == pytest.approx(conlleval_f1(wanted, said), abs=1e-12)


@pytest.mark.parametrize("name", ["accuracy", "f1", "matthews", "entity_f1"])
def test_intervals_are_those_of_the_libraries_on_the_same_resamples(name: str) -> None:
    wanted, said = drawn_rows(1, NAMES, 40), drawn_rows(2, NAMES, 40)
    _, labels = of_words(TASK, wanted)
    predictions, _ = of_words(TASK, said)
    found = bootstrap(name, TASK, labels, [predictions], 7, [len(row) for row in wanted])
    again = np.random.default_rng(7)
    for resample in range(20):
        rows = again.integers(0, 40, 40)
        true, given = ([drawn[row] for row in rows] for drawn in (wanted, said))
        flat_true, flat_given = ([name for row in of for name in row] for of in (true, given))
        values = {
            "accuracy": sk.accuracy_score(flat_true, flat_given),
            "f1": sk.f1_score(flat_true, flat_given, average="macro", zero_division=0),
            "matthews": sk.matthews_corrcoef(flat_true, flat_given),
            "entity_f1": conlleval_f1(true, given),
        }
        assert found[0, resample] == pytest.approx(values[name], abs=1e-9)


@pytest.mark.parametrize(
    ("names", "words"),
    [(OTHERS, "one is named 'noun'"), (("LABEL_0", "LABEL_1"), "'LABEL_0'"), (("O", "B-PER", "per"), "'per'")],
)
def test_f1_of_entities_needs_names_of_their_parts(names: Sequence[str], words: str) -> None:
    with pytest.raises(InvalidDataset, match=words):
        check_metric("entity_f1", task_of_names(names), "rows.jsonl")
    check_metric("entity_f1", TASK, "rows.jsonl")


def test_the_default_draws_labels() -> None:
    assert estimator_for("auto", TASK, 0) == Estimator("sampled", 0)


def test_a_head_with_a_published_rule_is_scored_by_its_own_loss(bert: Siblings, engine: Engine, tmp_path: Path) -> None:
    """One batch of all rows: the squared gradient of the model's loss, the mean over their words."""
    loaded, model = bert.loaded(), bert.exact()
    examples = examples_of(loaded, bert.spec())
    masks = insert_masks(model, bert.tiny)
    losses, words = [], 0
    for example in examples:
        labels = torch.full((1, example.length), -100)
        labels[0, list(example.positions or ())] = torch.tensor(example.label)
        ids = {name: torch.tensor([values]) for name, values in example.encoding.items()}
        losses.append(model(**ids, labels=labels).loss * example.outputs)
        words += example.outputs
    gradients = torch.autograd.grad(torch.stack(losses).sum() / words, masks)
    found = paper_scores(loaded, examples, "rows", silent)
    assert_squares(found, gradients)


def test_places_of_labels(bert: Siblings) -> None:
    assert TASK.value("O B-PER", LabelMap(TASK), "rows", Place("line", 1)) == (0, 1)
    assert LabelMap(TASK).begins_at_one([[1, 2], "3 4", [4]])
    assert not LabelMap(TASK).begins_at_one([[1, 2], "3 4", [0]])
