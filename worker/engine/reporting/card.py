"""The model card in the hub's format: the model's origins, its metrics, and how to load it."""

import json
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

import yaml

from worker.engine.catalog.checkpoints.architectures import use_of
from worker.engine.catalog.contracts.report import MergeResult, MetricResult
from worker.engine.catalog.contracts.spec import EvaluationSpec, MergeSpec
from worker.engine.catalog.data.spec import DatasetSpec
from worker.engine.catalog.planning.plan import MergePlan
from worker.engine.reporting.words import (
    ABOUT_METRICS,
    SLICE_COLUMNS,
    about_candidates,
    candidate_remarks,
    candidate_table,
    metric_table,
    number,
    slice_rows,
)

METRIC_TYPES = {"matthews": "matthews_correlation", "pearson": "pearsonr", "spearman": "spearmanr"}
"""The hub's names of metrics, where they differ from ours."""


def model_card(spec: MergeSpec, plan: MergePlan, result: MergeResult) -> str:
    auto_class, tag = use_of(plan.published[0].config)
    where = "model" if plan.merges_heads else f"models/{result.models[0].name}"
    what = "`model/` is the merged model, head and all."
    if not plan.merges_heads:
        what = "Each folder under `models/` is a whole model: the merged backbone and that model's own head."
    loading = ["```python", f"from transformers import {auto_class}", ""]
    loading.append(f'model = {auto_class}.from_pretrained("{where}")')
    if plan.tokens_of(plan.published[0]).vocabulary:
        loading[1] += ", AutoTokenizer"
        loading.append(f'tokenizer = AutoTokenizer.from_pretrained("{where}")')
    elif any(task is not None and task.reads_images for task in plan.tasks):
        loading[1] += ", AutoImageProcessor"
        loading.append(f'processor = AutoImageProcessor.from_pretrained("{where}")')
    library = "transformers"
    if any(plan.modules):
        library, tag = "sentence-transformers", "sentence-similarity"
        loading = ["```python", "from sentence_transformers import SentenceTransformer", ""]
        loading.append(f'model = SentenceTransformer("{where}")')
    about = yaml.safe_dump(_metadata(spec, result, library, tag), sort_keys=False, allow_unicode=True, width=1000)
    lines = [
        "---",
        about.rstrip(),
        "---",
        "",
        f"# {' '.join(escape(spec.name).split())}",
        "",
        f"{_card_summary(spec, result)} {what}",
        "",
        *loading,
        "```",
        "",
        *_card_models(spec, result),
        "",
        *_card_parameters(spec, result),
    ]
    if spec.base is not None:
        lines += [f"The base, which they were fine-tuned from, is {_code(spec.base.source)}.", ""]
    if result.notes:
        lines += [*(f"- {' '.join(escape(note, quote=False).split())}" for note in result.notes), ""]
    if result.metrics:
        lines += [*_markdown_table(*metric_table(result)), "", ABOUT_METRICS, ""]
    if result.candidates:
        lines += [*_markdown_table(*candidate_table(result)), "", about_candidates(result.candidates), ""]
        lines += [escape(" ".join(candidate_remarks(result)), quote=False).replace("*", "\\*"), ""]
    lines += ["`recipe.json` is the request that made this; `report.html` says more.", ""]
    return "\n".join(lines)


def _metadata(spec: MergeSpec, result: MergeResult, library: str, tag: str | None) -> dict[str, Any]:
    """Make the card's metadata, by which the hub finds the model and links it to those of its origins that it has."""
    repositories = list(dict.fromkeys(c.hub.repository for c in spec.checkpoints if c.hub))
    read = [rows for model in spec.models for rows in (model.dataset, model.evaluation) if rows]
    datasets = list(dict.fromkeys(rows.hub.repository for rows in read if rows.hub))
    return {
        "library_name": library,
        **({"pipeline_tag": tag} if tag else {}),
        **({"base_model": repositories, "base_model_relation": "merge"} if repositories else {}),
        **({"datasets": datasets} if datasets else {}),
        "tags": ["merge", "maskmerge"],
        **({"model-index": [_evaluated(spec, result.metrics, tag)]} if result.metrics else {}),
    }


def _evaluated(spec: MergeSpec, metrics: Mapping[str, MetricResult], tag: str | None) -> dict[str, Any]:
    """Return evaluations of the published models in the hub's form, one for each model that has one."""
    evaluations = {model.name: model.evaluation for model in spec.models if model.evaluation}
    results = [
        {
            "task": {"type": tag or "other", "name": name},
            "dataset": _dataset(evaluations[name]),
            "metrics": [
                {
                    "type": METRIC_TYPES.get(found.metric, found.metric),
                    "value": round(found.merged, 6),
                    "name": f"{found.metric} on {found.examples} rows, "
                    f"95 % interval {found.interval[0]:.4f} to {found.interval[1]:.4f}",
                }
            ],
        }
        for name, found in metrics.items()
    ]
    return {"name": spec.name, "results": results}


def _dataset(rows: EvaluationSpec | DatasetSpec) -> dict[str, str]:
    named = {"type": rows.hub.repository if rows.hub else "local", "name": rows.source}
    return {**named, **{key: value for key, value in (("config", rows.config), ("split", rows.split)) if value}}


def _card_summary(spec: MergeSpec, result: MergeResult) -> str:
    names = ", ".join(model.name for model in spec.models)
    models = f"{len(spec.models)} models ({names})" if len(spec.models) > 1 else f"one model ({names})"
    if spec.method.stacked_slices:
        return f"Layers of {models}, stacked by `{spec.method.name}`."
    return f"A merge of {models} by `{result.method['name']}`."


def _card_models(spec: MergeSpec, result: MergeResult) -> list[str]:
    models = [[m.name, _code(m.checkpoint)] for m in result.models]
    if spec.method.stacked_slices:
        stack = _markdown_table(SLICE_COLUMNS, slice_rows(spec.method.stacked_slices))
        return [*_markdown_table(["model", "checkpoint"], models), "", *stack]
    columns = ["model", "checkpoint", "mean merge weight"]
    rows = [[*row, number(m.weight_share, 3)] for row, m in zip(models, result.models, strict=True)]
    if any(m.parameters for m in result.models):
        columns.append("its own parameters")
        given = [m.model_dump(mode="json")["parameters"] for m in result.models]
        rows = [[*row, _card_values(own)] for row, own in zip(rows, given, strict=True)]
    return _markdown_table(columns, rows)


def _card_parameters(spec: MergeSpec, result: MergeResult) -> list[str]:
    if spec.method.stacked_slices:  # the slices are its parameters
        return []
    given = {key: value for key, value in result.method.items() if key != "name" and value is not None}
    return [f"Parameters of the method: {_card_values(given)}.", ""]


def _code(text: str) -> str:
    """Format a text as code, which a backtick would end."""
    return f"`{' '.join(text.split()).replace('`', chr(39))}`"


def _card_values(values: Mapping[str, Any]) -> str:
    texts = {key: json.dumps(value, ensure_ascii=False).replace("`", "'") for key, value in values.items()}
    return ", ".join(f"{key} `{text if len(text) <= 200 else text[:199] + '…'}`" for key, text in texts.items())


def _markdown_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    cells = [columns, ["---"] * len(columns), *rows]
    return ["| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in row) + " |" for row in cells]
