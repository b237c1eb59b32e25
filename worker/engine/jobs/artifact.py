"""Writes the folder that a job publishes: models, scores, report, card, recipe, and at last the manifest."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from worker.engine.catalog.contracts.report import MANIFEST, JobResult, MergeResult, ModelReport, ScoreResult
from worker.engine.catalog.contracts.spec import JobSpec, MergeSpec, ScoreSpec
from worker.engine.catalog.planning.plan import MergePlan
from worker.engine.checkpoints.reader import digest_file
from worker.engine.checkpoints.writer import save_tensors, write_json
from worker.engine.merging.interference import Interference
from worker.engine.merging.job_models import JobModel
from worker.engine.reporting import contents
from worker.engine.reporting.card import model_card
from worker.engine.reporting.contents import Contents, ScoresByModel
from worker.engine.reporting.page import NOT_KNOWN_YET, merge_page, score_page

OF_INPUTS = {"checkpoint", "commit", "digest", "license", "examples", "batch_tokens", "statistics"}
"""Fields of each model that say what the artifact was made of."""


def model_folders(folder: Path, names: Sequence[str], *, is_one: bool) -> dict[str, Path]:
    """Create `models/<name>/` for every model, or `model/` for all of them."""
    folders = {name: folder / "model" if is_one else folder / "models" / name for name in names}
    for path in set(folders.values()):
        path.mkdir(parents=True)
    return folders


def write_scores(folder: Path, model: JobModel) -> None:
    """Write `scores/<model>.safetensors`: float64, (nodes,) per name, and `<name>.stderr` where errors are known."""
    measured = model.measured
    scores = measured.scores_and_errors
    if not scores:
        return
    (folder / "scores").mkdir(exist_ok=True)
    about = {"estimator": measured.estimator, "examples": measured.rows, "checkpoint": model.digest}
    # There is only one key, because the library writes several in any order.
    save_tensors(scores, folder / "scores" / f"{model.name}.safetensors", {"maskmerge": json.dumps(about)})


def write_documents(
    spec: MergeSpec,
    plan: MergePlan,
    result: MergeResult,
    base: str | None,
    digests: Mapping[Path, str],
    scores: ScoresByModel,
    interference: Interference | None,
) -> None:
    """Write everything for people and programs beside the weights; the manifest names every other file.

    Args:
        spec: the job, with the method and the weights as they were run.
        base: digest of the plan's base.
        digests: sha256 of files that were digested while they were written, which need not be read again.
        scores: scores of the models that were scored.
        interference: interference of the models' task vectors, where they were compared.
    """
    ancestor = _ancestor(spec, plan, base)
    found = contents.of_merge(spec, plan, scores, interference)
    _write_report(spec, result, found, merge_page(spec, plan, result, found, base), owners=plan.owners(), base=ancestor)
    (spec.folder / "README.md").write_text(model_card(spec, plan, result), encoding="utf-8")
    _write_manifest(spec.folder, result, result.models, digests, found, base=ancestor)


def _ancestor(spec: MergeSpec, plan: MergePlan, digest: str | None) -> dict[str, str | None] | None:
    """Return what is known of the base that the models were fine-tuned from, if one is named."""
    if plan.base is None or spec.base is None:
        return None
    commit = {"commit": spec.base.hub.commit} if spec.base.hub else {}
    return {"checkpoint": plan.base.source, **commit, "digest": digest, "license": spec.base.licence(plan.base)}


def write_score_documents(spec: ScoreSpec, result: ScoreResult, scores: ScoresByModel) -> None:
    """Write everything for people and programs beside the scores; the manifest names every other file."""
    found = contents.of_scores(spec, scores)
    _write_report(spec, result, found, score_page(spec, result, found))
    _write_manifest(spec.folder, result, result.models, {}, found)


def _write_report(spec: JobSpec, result: JobResult, found: Contents, page: str, **more: object) -> None:
    write_json(spec.folder / "recipe.json", spec.recipe)
    report = result.model_dump(mode="json", exclude={"timings": NOT_KNOWN_YET, "published": True})
    write_json(spec.folder / "report.json", {"name": spec.name, **more, **report, **found.model_dump(mode="json")})
    (spec.folder / "report.html").write_text(page, encoding="utf-8")


def _write_manifest(
    folder: Path,
    result: JobResult,
    models: Sequence[ModelReport],
    digests: Mapping[Path, str],
    found: Contents,
    **more: object,
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
        "inputs": {model.name: model.model_dump(include=OF_INPUTS) for model in models},
        **more,
        "method": result.method,
        "device": result.device,
        "threads": found.threads,
        "versions": found.versions,
    }
    write_json(folder / MANIFEST, manifest)


def _inode(path: Path) -> tuple[int, int]:
    """Identify a file under whichever name: the shared backbone has a name in every model's folder."""
    stat = path.stat()
    return stat.st_dev, stat.st_ino
