"""bench/precision.py: ancestors that are the packaged BERT, and what the targets make of given numbers."""

from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr

from bench.experts import base_model_folder
from bench.families import ENCODERS, write_ancestor
from bench.precision import Comparison, Expert, Family, agreement, compared_on, rows_of
from tests.score_names import named
from tests.tiny import tiny_checkpoint
from worker.engine.catalog.checkpoints.inspection import inspect_checkpoint
from worker.engine.catalog.families import FAMILIES, ScoreName
from worker.engine.catalog.primitives.errors import Place
from worker.engine.inputs.examples import Example
from worker.engine.models.loading import load
from worker.engine.tasks.metrics import Array

ROWS = 100
TEXTS = ["the cat", "a much longer row, so that the first is padded"]


@pytest.mark.parametrize("family", ENCODERS)
def test_an_ancestor_is_the_packaged_bert_under_another_name(family: str, tmp_path: Path) -> None:
    from transformers import AutoModel, AutoModelForSequenceClassification, AutoTokenizer

    assert write_ancestor(family, tmp_path) < 1e-4
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    model = AutoModel.from_pretrained(tmp_path, attn_implementation="eager").eval()
    bert = AutoModel.from_pretrained(base_model_folder(), attn_implementation="eager").eval()
    inputs = tokenizer(TEXTS, padding=True, return_tensors="pt")
    with torch.inference_mode():
        ours, reference = (run(**inputs).last_hidden_state[inputs["attention_mask"].bool()] for run in (model, bert))
    difference = float((ours - reference).norm() / reference.norm())
    assert 1e-3 < difference < 0.5 if family == "deberta-v2" else difference < 1e-5
    _, report = AutoModelForSequenceClassification.from_pretrained(tmp_path, output_loading_info=True)
    assert all(name.startswith(FAMILIES[family].head.modules) for name in report["missing_keys"])


def test_agreement_is_the_lower_experts_over_all_nodes_and_in_the_worst_layer() -> None:
    rng = np.random.default_rng(0)
    shapes = {
        named("layers.0.neurons"): 30,
        named("layers.1.neurons"): 30,
        named("layers.0.heads"): 6,
        named("layers.1.heads"): 6,
    }
    exact = {task: {site: torch.tensor(rng.exponential(size=n)) for site, n in shapes.items()} for task in ("a", "b")}
    rough = {task: {site: of * torch.tensor(rng.normal(1, 0.2, len(of))).abs() for site, of in sites.items()}
             for task, sites in exact.items()}  # fmt: skip
    found = agreement(exact, rough)

    def correlation(task: str, *sites: ScoreName) -> float:
        both = [np.concatenate([of[task][site].numpy() for site in sites]) for of in (exact, rough)]
        return float(spearmanr(*both)[0])

    neurons, heads = (
        (named("layers.0.neurons"), named("layers.1.neurons")),
        (named("layers.0.heads"), named("layers.1.heads")),
    )
    assert found.neurons == pytest.approx(min(correlation(task, *neurons) for task in exact))
    assert found.heads == pytest.approx(min(correlation(task, *heads) for task in exact))
    assert found.layer == pytest.approx(min(correlation(task, site) for task in exact for site in neurons))
    shares = []
    for of in (exact, rough):
        one, other = ({site: scores / scores.mean() for site, scores in of[task].items()} for task in ("a", "b"))
        shares.append({site: one[site] / (one[site] + other[site]) for site in one})
    change = max(float((shares[0][site] - shares[1][site]).abs().max()) for site in shapes)
    assert found.weights == pytest.approx(change, rel=0.05)  # the floor moves the smallest scores


@pytest.fixture(scope="module")
def expert(tmp_path_factory: pytest.TempPathFactory) -> Expert:
    folder = tiny_checkpoint(tmp_path_factory.mktemp("expert"))
    model = load(inspect_checkpoint(folder, "expert"), torch.device("cpu"))
    held_out = [Example(i, Place("line", i + 1), {"input_ids": [1]}, 1) for i in range(ROWS)]
    return Expert("a", folder, model, held_out, 1.0)


def right(count: int) -> Array:
    """Predictions of rows of label 1 of which so many are right."""
    return (np.arange(ROWS) < count).astype(np.float64)


@pytest.mark.parametrize(("bfloat16", "is_noise"), [(80, True), (79, True), (40, False)])
def test_a_difference_is_noise_where_its_interval_has_zero(expert: Expert, bfloat16: int, is_noise: bool) -> None:
    found = compared_on(expert, right(80), right(bfloat16))
    assert (found.float32, found.bfloat16, found.changed) == (0.8, bfloat16 / 100, 80 - bfloat16)
    assert found.interval[0] <= found.bfloat16 - found.float32 <= found.interval[1]
    assert found.is_noise is is_noise


def test_the_targets_name_what_misses_them(expert: Expert) -> None:
    rng = np.random.default_rng(0)
    sites = {named(f"layers.0.{nodes}"): torch.tensor(rng.exponential(size=50)) for nodes in ("neurons", "heads")}
    swapped = {**sites, named("layers.0.heads"): sites[named("layers.0.heads")].flip(0)}
    merges = {("kept", "a"): Comparison(0.8, 0.4, (-0.5, -0.3), 40), ("aligned", "a"): Comparison(0.8, 0.8, (0, 0), 0)}
    rows = rows_of({"bert": Family([expert], agreement({"a": sites}, {"a": swapped}), merges)})
    assert [row["what"] for row in rows if not row["met"]] == [
        "bert: Spearman of scores by bfloat16, heads",
        "bert: accuracy on a merged by bfloat16, heads kept",
    ]
    assert all(row["ratio"] == row["ours"] / row["reference"] for row in rows)
    assert len(rows) == 5
