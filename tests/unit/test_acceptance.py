"""What a merge must reach to be accepted: what a request may ask for, and when it is reached."""

from typing import Any

import pytest
from pydantic import ValidationError

from app.contracts.requests import MergeRequest
from app.services.bodies import field_of
from worker.engine.catalog.contracts.report import Difference, MetricResult
from worker.engine.catalog.contracts.spec import Acceptance
from worker.engine.jobs.acceptance import missed

MINIMISED = {"a": ("loss", "perplexity"), "b": ("loss", "perplexity")}


def metric(merged: float, retention: float | None, name: str = "accuracy") -> MetricResult:
    interval = (merged, merged)
    return MetricResult(
        metric=name,
        examples=10,
        expert=1.0,
        average=0.5,
        merged=merged,
        merged_kept_head=None,
        retention=retention,
        interval=interval,
        intervals={"merged": interval},
        differences={"expert": Difference(value=0.0, interval=(0.0, 0.0))},
    )


def found(accept: dict[str, Any], **metrics: MetricResult) -> list[str]:
    return list(missed(Acceptance.model_validate(accept), metrics, MINIMISED))


def test_retentions_are_reached_at_their_floors_and_not_below() -> None:
    a, b = metric(0.8, 0.8), metric(0.9, 1.0)
    assert found({"min_mean_retention": 0.9, "min_retention": 0.8}, a=a, b=b) == []
    assert found({"min_mean_retention": 0.9001}, a=a, b=b) == ["the mean retention is 0.9000, and 0.9001 is asked for"]
    assert found({"min_retention": 0.81}, a=a, b=b) == ["the retention of a is 0.8000, and 0.81 is asked for"]


def test_metrics_have_floors_or_ceilings() -> None:
    a, b = metric(0.8, 0.8), metric(2.5, 0.9, "perplexity")
    assert found({"metrics": {"a": 0.8, "b": 2.5}}, a=a, b=b) == []
    assert found({"metrics": {"a": 0.85, "b": 2.4}}, a=a, b=b) == [
        "the accuracy of a is 0.8, and at least 0.85 is asked for",
        "the perplexity of b is 2.5, and at most 2.4 is asked for",
    ]


@pytest.mark.parametrize("asked", [{"min_retention": 0.0}, {"min_mean_retention": 0.0}])
def test_what_is_not_known_is_not_reached(asked: dict[str, float]) -> None:
    assert found(asked, a=metric(0.8, 0.8), b=metric(0.0, None)) == ["no retention is known of b"]


def request(accept: Any, evaluated: str = "ab", **fields: Any) -> dict[str, Any]:
    rows = {"source": "local:rows.jsonl", "label": "label"}
    models = [
        {"name": name, "checkpoint": f"local:{name}", **({"evaluation": rows} if name in evaluated else {})}
        for name in "ab"
    ]
    return {"method": {"name": "average"}, "models": models, "accept": accept, **fields}


@pytest.mark.parametrize(
    ("asked", "field", "told"),
    [
        (request({"min_retention": 0.9}, evaluated=""), "accept", "needs models with an evaluation"),
        (request({"min_retention": 0.9}, evaluate=False), "accept", "needs models with an evaluation"),
        (request({}), "accept", "names nothing to reach"),
        (request({"metrics": {"c": 1.0}}), "accept.metrics.c", "is no model's name"),
        (request({"metrics": {"b": 1.0}}, evaluated="a"), "accept.metrics.b", "has no evaluation"),
        (request({"min_retention": 3}), "accept.min_retention", "less than or equal to 2"),
        (request({"min_retension": 0.9}), "accept", "min_retention"),
    ],
)
def test_what_cannot_be_judged_is_refused(asked: dict[str, Any], field: str, told: str) -> None:
    with pytest.raises(ValidationError) as caught:
        MergeRequest.model_validate(asked)
    [error] = caught.value.errors()
    assert field_of(("body", *error["loc"])) == field
    assert told in error["msg"]
