"""The folder that a job publishes: models, scores, report, card, recipe, and the manifest, which is written last."""

import json
import platform
from collections.abc import Mapping, Sequence
from html import escape
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from worker.engine.catalog.architectures import use_of
from worker.engine.catalog.methods import PassthroughParameters
from worker.engine.catalog.planning import MergePlan
from worker.engine.catalog.report import MANIFEST, JobResult, MeasuredModel, MergeResult, ScoreResult
from worker.engine.catalog.spec import JobSpec, MergeSpec, ScoreSpec
from worker.engine.checkpoints.reader import digest_file
from worker.engine.checkpoints.writer import save_tensors, write_json
from worker.engine.scoring.measure import Measured

NOT_KNOWN_YET = {"queue_seconds", "publish_seconds"}  # while the report is written; the job's result has them
REPEATING = {"checkpoint", "digest", "examples", "batch_tokens"}  # what the same bits need, of each model
PACKAGES = ("maskmerge", "torch", "transformers", "safetensors", "tokenizers", "numpy", "scipy", "scikit-learn")


def model_folders(folder: Path, names: Sequence[str], *, is_one: bool) -> dict[str, Path]:
    """Create `models/<name>/` for every model, or `model/` for all of them."""
    folders = {name: folder / "model" if is_one else folder / "models" / name for name in names}
    for path in set(folders.values()):
        path.mkdir(parents=True)
    return folders


def write_scores(folder: Path, name: str, digest: str, measured: Measured) -> None:
    """`scores/<model>.safetensors`: float64, (nodes,) per name, and `<name>.stderr` where errors are known."""
    scores = measured.scores_and_errors
    if not scores:
        return
    (folder / "scores").mkdir(exist_ok=True)
    about = {"estimator": measured.estimator, "examples": measured.rows, "checkpoint": digest}
    # One key: the library writes several in any order.
    save_tensors(scores, folder / "scores" / f"{name}.safetensors", {"maskmerge": json.dumps(about)})


def write_documents(
    spec: MergeSpec, plan: MergePlan, result: MergeResult, base: str | None, digests: Mapping[Path, str]
) -> None:
    """Everything for people and programs beside the weights; the manifest names every other file.

    Args:
        base: digest of the plan's base.
        digests: sha256 of files that were digested as they were written, which need not be read again.
    """
    ancestor = {"checkpoint": plan.base.source, "digest": base} if plan.base else None
    _write_report(spec, result, _merge_parts(spec, plan, result, base), owners=plan.owners(), base=ancestor)
    (spec.folder / "README.md").write_text(_model_card(spec, plan, result), encoding="utf-8")
    _write_manifest(spec.folder, result, result.models, digests, base=ancestor)


def write_score_documents(spec: ScoreSpec, result: ScoreResult) -> None:
    """Everything for people and programs beside the scores; the manifest names every other file."""
    _write_report(spec, result, _score_parts(result))
    _write_manifest(spec.folder, result, result.models, {})


def _write_report(spec: JobSpec, result: JobResult, parts: Sequence[str], **more: object) -> None:
    """Recipe and report; `parts` are the page's tables that are peculiar to the kind of job."""
    write_json(spec.folder / "recipe.json", spec.recipe)
    report = result.model_dump(mode="json", exclude={"timings": NOT_KNOWN_YET})
    write_json(spec.folder / "report.json", {"name": spec.name, **more, **report})
    (spec.folder / "report.html").write_text(_report_page(spec, result, parts), encoding="utf-8")


def _write_manifest(
    folder: Path, result: JobResult, models: Sequence[MeasuredModel], digests: Mapping[Path, str], **more: object
) -> None:
    known = {_inode(path): digest for path, digest in digests.items()}
    files = []
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        inode = _inode(path)
        if inode not in known:
            known[inode] = digest_file(path)
        name = path.relative_to(folder).as_posix()
        files.append({"name": name, "bytes": path.stat().st_size, "sha256": known[inode]})
    manifest = {
        "files": files,
        "inputs": {model.name: model.model_dump(include=REPEATING) for model in models},
        **more,
        "method": result.method,
        "device": result.device,
        "threads": torch.get_num_threads(),
        "versions": {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}},
    }
    write_json(folder / MANIFEST, manifest)


def _inode(path: Path) -> tuple[int, int]:
    """What a file is, under whichever name: the shared backbone has one in every model's folder."""
    stat = path.stat()
    return stat.st_dev, stat.st_ino


def _number(value: float | None, digits: int = 4) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


METRIC_COLUMNS = [
    "model",
    "metric",
    "expert",
    "plain average",
    "merged, kept head",
    "merged (95 % interval)",
    "merged minus average (95 % interval)",
    "retention",
    "rows",
]
ABOUT_METRICS = (
    "All versions predict the same rows. The plain average and the merge with kept head use the expert's head as it "
    "was; merged is the model as published here. Retention is merged over expert. Intervals are bootstrap percentile "
    "intervals over rows; for the difference, both versions are resampled together."
)
ABOUT_ERRORS = (
    "Standard errors of the merge weights: the root mean square over the nodes of a layer and kind, of the layer, kind "
    "and model where it is largest. Scores are heavy-tailed: errors from fewer than a few hundred rows are too small."
)


def _metric_rows(result: MergeResult) -> list[list[str]]:
    rows = []
    for name, m in (result.metrics or {}).items():
        gain = m.differences["average"]
        rows.append(
            [
                name,
                m.metric,
                _number(m.expert),
                _number(m.average),
                _number(m.merged_kept_head),
                f"{m.merged:.4f} ({m.interval[0]:.4f} to {m.interval[1]:.4f})",
                f"{gain.value:+z.4f} ({gain.interval[0]:+z.4f} to {gain.interval[1]:+z.4f})",
                _number(m.retention, 3),
                str(m.examples),
            ]
        )
    return rows


def _html_table(columns: Sequence[str], rows: Sequence[Sequence[str]], caption: str) -> str:
    head = "".join(f'<th scope="col">{escape(column)}</th>' for column in columns)
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    caption = f"<caption>{escape(caption)}</caption>"
    return f"<div><table>{caption}<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"


def _merge_parts(spec: MergeSpec, plan: MergePlan, result: MergeResult, base: str | None) -> list[str]:
    """`base` is the digest of the plan's base."""
    parts = []
    if result.metrics:
        parts.append(_html_table(METRIC_COLUMNS, _metric_rows(result), "What the merge kept of each expert"))
        parts.append(
            f"<p>Mean retention {_number(result.mean_retention, 3)}, lowest {_number(result.min_retention, 3)}.</p>"
        )
        parts.append(f"<p>{escape(ABOUT_METRICS)}</p>")
    is_stack = isinstance(spec.method, PassthroughParameters)
    measured = any(m.examples for m in result.models)
    columns = {
        "model": [m.name for m in result.models],
        "checkpoint": [m.checkpoint for m in result.models],
        "rows measured": [str(m.examples) if measured else "-" for m in result.models],
        "rows the head was aligned on": [str(m.aligned_examples) if spec.aligns else "-" for m in result.models],
        "share of the bytes" if is_stack else "mean merge weight": [_number(m.weight_share, 3) for m in result.models],
        "its error": [_number(m.weight_error, 3) for m in result.models],
        "seconds": [_number(m.score_seconds, 1) if measured else "-" for m in result.models],
        "digest": [m.digest[:19] for m in result.models],
    }
    columns = {name: cells for name, cells in columns.items() if set(cells) != {"-"}}
    if plan.base is not None and base is not None:
        of_base = {"model": "base", "checkpoint": plan.base.source, "digest": base[:19]}
        columns = {name: [*cells, of_base.get(name, "-")] for name, cells in columns.items()}
    rows = list(zip(*columns.values(), strict=True))
    parts.append(_html_table(list(columns), rows, "What was merged"))
    if result.stopping and result.stopping.curve:
        looks = [[str(look.examples), _number(look.error)] for look in result.stopping.curve]
        named = ["rows of each model", "largest error"]
        parts.append(_html_table(named, looks, "How well the merge weights are known"))
        parts.append(f"<p>{escape(ABOUT_ERRORS)}</p>")
    owners = [[owner, str(count)] for owner, count in sorted(plan.owners().items())]
    if len(owners) > 1:
        parts.append(_html_table(["owner", "tensors"], owners, "Who owns the merged tensors"))
    return parts


def _score_parts(result: ScoreResult) -> list[str]:
    models = [
        [m.name, m.checkpoint, str(m.examples), m.estimator or "-", _number(m.score_seconds, 1), m.digest[:19]]
        for m in result.models
    ]
    looks = [
        [m.name, str(look.examples), _number(look.error)]
        for m in result.models
        if m.stopping
        for look in m.stopping.curve
    ]
    kept = [[m.name, s.statistic, str(s.bytes), s.digest] for m in result.models for s in m.scores]
    columns = ["model", "checkpoint", "rows measured", "estimator", "seconds", "digest"]
    parts = [_html_table(columns, models, "What was measured")]
    if looks:
        caption = "How well merge weights would be known, of each model and one as uncertain with the same scores"
        parts.append(_html_table(["model", "rows", "largest error"], looks, caption))
        parts.append(f"<p>{escape(ABOUT_ERRORS)}</p>")
    parts.append(_html_table(["model", "statistic", "bytes", "digest"], kept, "What is kept for later jobs"))
    return parts


def _report_page(spec: JobSpec, result: JobResult, parts: Sequence[str]) -> str:
    measured = result.timings.model_dump(exclude=NOT_KNOWN_YET)
    timings = [[name.removesuffix("_seconds"), _number(seconds, 2)] for name, seconds in measured.items() if seconds]
    parts = [*parts, _html_table(["phase", "seconds"], timings, "Where the time went")]
    if result.notes:
        parts.append("<h2>Notes</h2><ul>" + "".join(f"<li>{escape(note)}</li>" for note in result.notes) + "</ul>")
    for title, content in (("Method as run", result.method), ("Recipe to repeat it", spec.recipe)):
        text = escape(json.dumps(content, indent=2, ensure_ascii=False))
        parts.append(f'<h2>{title}</h2><pre tabindex="0">{text}</pre>')
    return PAGE.format(title=escape(spec.name), body="\n".join(parts))


PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title} - maskmerge report</title>
<style>
:root {{ color-scheme: light dark; font-family: system-ui, sans-serif; line-height: 1.5; }}
body {{ max-width: 70rem; margin: 2rem auto; padding: 0 1rem; }}
div {{ overflow-x: auto; }}
table {{ border-collapse: collapse; margin: 1rem 0; }}
caption {{ text-align: left; font-weight: 600; padding: .5rem 0; white-space: nowrap; }}
th, td {{ text-align: left; padding: .3rem .9rem .3rem 0; border-bottom: 1px solid #8886; white-space: nowrap;
  font-variant-numeric: tabular-nums; }}
thead th {{ white-space: normal; vertical-align: bottom; }}
pre {{ overflow-x: auto; padding: 1rem; border: 1px solid #8886; }}
</style>
</head>
<body>
<h1>{title}</h1>
{body}
</body>
</html>
"""


def _model_card(spec: MergeSpec, plan: MergePlan, result: MergeResult) -> str:
    auto_class, tag = use_of(plan.published[0].config)
    where = "model" if plan.merges_heads else f"models/{result.models[0].name}"
    what = "`model/` is the merged model, head and all."
    if not plan.merges_heads:
        what = "Each folder under `models/` is a whole model: the merged backbone and that model's own head."
    loading = ["```python", f"from transformers import {auto_class}", ""]
    loading.append(f'model = {auto_class}.from_pretrained("{where}")')
    if plan.published[0].vocabulary:
        loading[1] += ", AutoTokenizer"
        loading.append(f'tokenizer = AutoTokenizer.from_pretrained("{where}")')
    lines = [
        "---",
        "library_name: transformers",
        *([f"pipeline_tag: {tag}"] if tag else []),
        *_card_origins(spec),
        "tags:",
        "- merge",
        "- maskmerge",
        "---",
        "",
        f"# {' '.join(escape(spec.name).split())}",
        "",
        f"{_card_summary(spec)} {what}",
        "",
        *loading,
        "```",
        "",
        *_card_models(spec, result),
        "",
        *_card_parameters(spec, result),
    ]
    if spec.base is not None:
        lines += [f"The base, which they were fine-tuned from, is `{spec.base.source}`.", ""]
    if result.metrics:
        lines += [*_markdown_table(METRIC_COLUMNS, _metric_rows(result)), "", ABOUT_METRICS, ""]
    if result.notes:
        lines += [*(f"- {' '.join(escape(note, quote=False).split())}" for note in result.notes), ""]
    lines += ["`recipe.json` is the request that made this; `report.html` says more.", ""]
    return "\n".join(lines)


def _card_origins(spec: MergeSpec) -> list[str]:
    """The lines by which the hub links a model to those that it was made of, as far as they are there."""
    repositories = dict.fromkeys(c.hub.repository for c in spec.checkpoints if c.hub)
    if not repositories:
        return []
    return ["base_model:", *(f"- {name}" for name in repositories), "base_model_relation: merge"]


def _card_summary(spec: MergeSpec) -> str:
    names = ", ".join(model.name for model in spec.models)
    models = f"{len(spec.models)} models ({names})" if len(spec.models) > 1 else f"one model ({names})"
    if isinstance(spec.method, PassthroughParameters):
        return f"Layers of {models}, stacked by `passthrough`."
    return f"A merge of {models} by `{spec.method.name}`."


def _card_models(spec: MergeSpec, result: MergeResult) -> list[str]:
    models = [[m.name, f"`{m.checkpoint}`"] for m in result.models]
    if isinstance(spec.method, PassthroughParameters):
        slices, first = [], 0
        for part in spec.method.slices:
            start, stop = part.layers
            slices.append([f"{first} to {first + stop - start - 1}", part.model, f"{start} to {stop - 1}"])
            first += stop - start
        stack = _markdown_table(["layers here", "model", "its layers"], slices)
        return [*_markdown_table(["model", "checkpoint"], models), "", *stack]
    columns = ["model", "checkpoint", "mean merge weight"]
    rows = [[*row, _number(m.weight_share, 3)] for row, m in zip(models, result.models, strict=True)]
    if any(m.parameters for m in result.models):
        columns.append("its own parameters")
        given = [m.model_dump(mode="json")["parameters"] for m in result.models]
        rows = [[*row, _card_values(own)] for row, own in zip(rows, given, strict=True)]
    return _markdown_table(columns, rows)


def _card_parameters(spec: MergeSpec, result: MergeResult) -> list[str]:
    if isinstance(spec.method, PassthroughParameters):  # they are its slices
        return []
    given = {key: value for key, value in result.method.items() if key != "name" and value is not None}
    return [f"Parameters of the method: {_card_values(given)}.", ""]


def _card_values(values: Mapping[str, Any]) -> str:
    texts = {key: json.dumps(value, ensure_ascii=False).replace("`", "'") for key, value in values.items()}
    return ", ".join(f"{key} `{text if len(text) <= 200 else text[:199] + '…'}`" for key, text in texts.items())


def _markdown_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    cells = [columns, ["---"] * len(columns), *rows]
    return ["| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in row) + " |" for row in cells]
