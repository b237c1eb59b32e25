"""The model card in the hub's format: the model's origins, its metrics, and how to load it."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import yaml
from markupsafe import Markup

from worker.engine.catalog.checkpoints.architectures import use_of
from worker.engine.catalog.checkpoints.licences import LICENCES, common_licence
from worker.engine.catalog.contracts.report import MergeResult, MetricResult
from worker.engine.catalog.contracts.spec import EvaluationSpec, MergeSpec
from worker.engine.catalog.data.spec import DatasetSpec
from worker.engine.catalog.planning.plan import MergePlan
from worker.engine.reporting.markdown import code, escaped, rendered
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

ONE_MODEL = Markup("`model/` is the merged model, head and all.")
EACH_MODEL = Markup("Each folder under `models/` is a whole model: the merged backbone and that model's own head.")
LONGEST_VALUE = 200  # characters of a parameter's value

Table = tuple[list[str], list[list[str]]]
"""Names of columns, and rows of cells."""


def model_card(spec: MergeSpec, plan: MergePlan, result: MergeResult) -> str:
    """Return the text of `README.md`: Markdown, with YAML in front that the hub reads."""
    folder = "model" if plan.merges_heads else f"models/{result.models[0].name}"
    library, tag, loading = _use(plan, folder)
    metadata = _metadata(spec, plan, result, library, tag)
    slices, base = spec.method.stacked_slices, spec.base
    return rendered(
        "card.md",
        metadata=Markup(yaml.safe_dump(metadata, sort_keys=False, allow_unicode=True, width=1000)),  # noqa: S704 - YAML
        name=spec.name,
        models=_listed([model.name for model in spec.models]),
        method=spec.method.name if slices else result.method["name"],
        folders=ONE_MODEL if plan.merges_heads else EACH_MODEL,
        loading=Markup("\n".join(loading)),  # noqa: S704 - Python, with names of folders that are plain words
        origins=_origins(spec, result),
        slices=(SLICE_COLUMNS, slice_rows(slices)) if slices else None,
        parameters=_values({key: v for key, v in result.method.items() if key != "name" and v is not None}),
        base=_base(base.source, spec, plan) if base else None,
        notes=result.notes,
        metrics=metric_table(result) if result.metrics else None,
        about_metrics=ABOUT_METRICS,
        candidates=candidate_table(result) if result.candidates else None,
        about_candidates=about_candidates(result.candidates or ()),
        remarks=" ".join(candidate_remarks(result)),
    )


def _use(plan: MergePlan, folder: str) -> tuple[str, str | None, list[str]]:
    """Return the library that loads the model in a folder, the hub's tag of its use, and lines of Python to load it."""
    if any(plan.modules):
        lines = [
            "from sentence_transformers import SentenceTransformer",
            "",
            f'model = SentenceTransformer("{folder}")',
        ]
        return "sentence-transformers", "sentence-similarity", lines
    auto_class, tag = use_of(plan.published[0].config)
    classes = {auto_class: "model"}
    if plan.tokens_of(plan.published[0]).vocabulary:
        classes["AutoTokenizer"] = "tokenizer"
    elif any(task is not None and task.reads_images for task in plan.tasks):
        classes["AutoImageProcessor"] = "processor"
    loads = [f'{name} = {loader}.from_pretrained("{folder}")' for loader, name in classes.items()]
    return "transformers", tag, [f"from transformers import {', '.join(classes)}", "", *loads]


def _metadata(spec: MergeSpec, plan: MergePlan, result: MergeResult, library: str, tag: str | None) -> dict[str, Any]:
    """Make the card's metadata, by which the hub finds the model and links it to those of its origins that it has."""
    repositories = list(dict.fromkeys(c.hub.repository for c in spec.checkpoints if c.hub))
    read = [rows for model in spec.models for rows in (model.dataset, model.evaluation) if rows]
    datasets = list(dict.fromkeys(rows.hub.repository for rows in read if rows.hub))
    licence = common_licence(_licences(spec, plan, result))
    return {
        **({"license": licence} if licence in LICENCES else {}),
        "library_name": library,
        **({"pipeline_tag": tag} if tag else {}),
        **({"base_model": repositories, "base_model_relation": "merge"} if repositories else {}),
        **({"datasets": datasets} if datasets else {}),
        "tags": ["merge", "maskmerge"],
        **({"model-index": [_evaluated(spec, plan, result.metrics, tag)]} if result.metrics else {}),
    }


def _evaluated(
    spec: MergeSpec, plan: MergePlan, metrics: Mapping[str, MetricResult], tag: str | None
) -> dict[str, Any]:
    """Return evaluations of the published models in the hub's form, one for each model that has one."""
    on_hub = {name: known for task in plan.tasks if task is not None for name, known in task.hub_metrics.items()}
    evaluations = {model.name: model.evaluation for model in spec.models if model.evaluation}
    results = [
        {
            "task": {"type": tag or "other", "name": name},
            "dataset": _dataset(evaluations[name]),
            "metrics": [
                {
                    "type": on_hub.get(found.metric, found.metric),
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


def _licences(spec: MergeSpec, plan: MergePlan, result: MergeResult) -> dict[str, str | None]:
    own = {model.name: model.license for model in result.models}
    return {**own, "base": spec.base.licence(plan.base)} if spec.base and plan.base else own


def _base(source: str, spec: MergeSpec, plan: MergePlan) -> Markup:
    """Name the base, and the licence that it states."""
    licence = spec.base.licence(plan.base) if spec.base and plan.base else None
    return code(source) if licence is None else Markup("{} (licence {})").format(code(source), code(licence))


def _listed(names: Sequence[str]) -> str:
    return f"{len(names)} models ({', '.join(names)})" if len(names) > 1 else f"one model ({names[0]})"


def _origins(spec: MergeSpec, result: MergeResult) -> Table:
    """Return the table of the models that were merged."""
    columns = ["model", "checkpoint", "digest"]
    rows: list[list[str]] = [[model.name, code(model.checkpoint), code(model.digest)] for model in result.models]
    if any(model.license for model in result.models):
        columns.append("licence")
        stated = [model.license for model in result.models]
        rows = [[*row, code(licence) if licence else "not stated"] for row, licence in zip(rows, stated, strict=True)]
    if spec.method.stacked_slices:
        return columns, rows
    columns.append("mean merge weight")
    rows = [[*row, number(model.weight_share, 3)] for row, model in zip(rows, result.models, strict=True)]
    if any(model.aligned_examples for model in result.models):
        columns.append("rows its head was aligned on")
        rows = [[*row, str(model.aligned_examples)] for row, model in zip(rows, result.models, strict=True)]
    if any(model.parameters for model in result.models):
        columns.append("its own parameters")
        own = [model.model_dump(mode="json")["parameters"] for model in result.models]
        rows = [[*row, _values(values)] for row, values in zip(rows, own, strict=True)]
    return columns, rows


def _values(values: Mapping[str, Any]) -> Markup:
    """List names with their values, of which long ones are cut off."""
    texts = ((key, json.dumps(value, ensure_ascii=False)) for key, value in values.items())
    shown = ((key, text if len(text) <= LONGEST_VALUE else f"{text[: LONGEST_VALUE - 1]}…") for key, text in texts)
    return Markup(", ").join(Markup("{} {}").format(escaped(key), code(text)) for key, text in shown)
