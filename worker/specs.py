"""Turns requests into what the engine takes. Contracts become the engine's input here alone."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from app.contracts.jobs import JobKind, PhaseName, Record
from app.contracts.models import Dataset, Evaluation, MeasuredModelRequest, ModelRequest
from app.contracts.predictions import PredictionRequest
from app.contracts.requests import MergeRequest, ScoreRequest, as_recipe
from app.storage.sources.source import FetchedInput, InputKind
from worker.engine.catalog.contracts.prediction import PredictionSpec
from worker.engine.catalog.contracts.spec import (
    JobSpec,
    MergeSpec,
    OutputSpec,
    ScoreSpec,
    ShardSpec,
    ShardWork,
    StoreSpec,
)
from worker.engine.catalog.data.spec import Columns, Generation


@dataclass(frozen=True)
class Inputs:
    """A job's inputs as the engine takes them.

    Args:
        fetch: fetches an input, by its reference, its kind and its state when the job was accepted.
    """

    record: Record
    fetch: Callable[[str, InputKind, str | None], FetchedInput]

    def model(self, model: MeasuredModelRequest) -> dict[str, object]:
        spec = {"name": model.name, **self.checkpoint(model.checkpoint), "dataset": self._rows(model.dataset)}
        if isinstance(model, ModelRequest):
            own = model.model_dump(include={"weight", "parameters", "min_retention"})
            spec |= {**own, "evaluation": self._rows(model.evaluation)}
            spec["statistics"] = {name: self._statistics(reference) for name, reference in model.given.items()}
        return spec

    def checkpoint(self, reference: str) -> dict[str, object]:
        found = self.fetch(reference, "checkpoint", self.record.inputs.get(reference))
        return {
            "source": reference,
            **_where(found),
            "state": found.state,
            "license": found.license,
            "sha256": found.sha256,
        }

    def _statistics(self, reference: str) -> dict[str, object]:
        return {"source": reference, **_where(self.fetch(reference, "statistics", self.record.inputs.get(reference)))}

    def _rows(self, rows: Dataset | Evaluation | None) -> dict[str, object] | None:
        if rows is None:
            return None
        spec = rows.model_dump(include={*Columns.model_fields, *Generation.model_fields, "config", "split", "metric"})
        found = self.fetch(rows.source, "rows", self.record.inputs.get(rows.source))
        return {**spec, "source": rows.source, **_where(found)}


def _where(found: FetchedInput) -> dict[str, object]:
    """Say where an input is: its path and root, or its repository and commit."""
    return {"hub": found.hub} if found.place is None else {"path": found.place.path, "root": found.place.root}


def phases_of(spec: JobSpec) -> list[PhaseName]:
    """Return the phases that this job goes through."""
    phases = [PhaseName.DOWNLOADING] if spec.names_the_hub else []
    phases.append(PhaseName.LOADING)
    if spec.method.statistics - spec.given_of_all:
        phases.append(PhaseName.SCORING)
    if spec.method.search is not None:
        phases.append(PhaseName.SEARCHING)
    if isinstance(spec, MergeSpec):
        phases.append(PhaseName.MERGING)
        if spec.aligns:
            phases.append(PhaseName.ALIGNING)
        if spec.evaluates:
            phases.append(PhaseName.EVALUATING)
        if spec.compares:
            phases.append(PhaseName.COMPARING)
    return [*phases, PhaseName.PUBLISHING]


def job_spec(
    record: Record, inputs: Inputs, common: dict[str, Any], journal: Callable[[], Path]
) -> MergeSpec | ScoreSpec:
    """Make the engine's input for all of a job's work.

    Args:
        common: fields of the specification that are not the request's.
        journal: begins the journal of a search.
    """
    common = {"name": record.name, "recipe": as_recipe(record.request), **common}
    request = request_of(record)
    if isinstance(request, ScoreRequest):
        models = [inputs.model(model) for model in request.models]
        return ScoreSpec.model_validate({**common, "method": request.method.model_dump(), "models": models})
    searches = request.method.search is not None
    return MergeSpec.model_validate(
        {
            **common,
            "models": [inputs.model(model) for model in request.models],
            "base": None if request.base is None else inputs.checkpoint(request.base),
            "method": request.method.model_dump(),
            "output": request.output.model_dump(include=set(OutputSpec.model_fields)),
            **request.model_dump(include={"slices", "notes", "strict_filters"}),
            "evaluate": request.evaluate,
            "accept": request.accept and request.accept.model_dump(),
            "journal": journal() if searches else None,
        }
    )


def shard_spec(record: Record, work: ShardWork, inputs: Inputs, store: StoreSpec) -> ShardSpec:
    """Make the engine's input for one shard; of the job's inputs it has those of its model alone."""
    request = request_of(record)
    [model] = [model for model in request.models if model.name == work.model]
    own = MeasuredModelRequest.model_validate(model.model_dump(include=set(MeasuredModelRequest.model_fields)))
    base = request.base if isinstance(request, MergeRequest) else None
    return ShardSpec.model_validate(
        {
            "name": record.name,
            "recipe": {},
            "folder": store.folder,  # it leaves statistics and nothing else
            "store": store,
            "models": [inputs.model(own)],
            "base": None if base is None else inputs.checkpoint(base),
            "method": work.method.model_dump(),
            "work": work,
        }
    )


def prediction_spec(
    record: Record, asked: PredictionRequest, merged: FetchedInput, inputs: Inputs, store: StoreSpec
) -> PredictionSpec:
    """Make the engine's input for rows that a merge is tried on, from what its job was made of.

    Args:
        merged: the model of the merge in the job's artifact.
    """
    request = MergeRequest.model_validate(record.request)
    models = [
        {"name": model.name, **inputs.checkpoint(model.checkpoint), "weight": model.weight} for model in request.models
    ]
    return PredictionSpec.model_validate(
        {
            "name": record.name,
            "recipe": {},
            "folder": store.folder,  # it leaves nothing
            "models": models,
            "base": None if request.base is None else inputs.checkpoint(request.base),
            "method": request.method.model_dump(),
            "output": request.output.model_dump(include=set(OutputSpec.model_fields)),
            **request.model_dump(include={"slices"}),
            "model": asked.model,
            "merged": {"source": "the merge", **_where(merged), "sha256": merged.sha256},
            "rows": asked.rows,
            "new_tokens": asked.max_new_tokens,
        }
    )


def request_of(record: Record) -> MergeRequest | ScoreRequest:
    return (ScoreRequest if record.kind is JobKind.SCORES else MergeRequest).model_validate(record.request)


def checkpoints_of(record: Record) -> dict[str, str]:
    """Return the reference of each model's checkpoint, by the model's name."""
    return {model.name: model.checkpoint for model in request_of(record).models}
