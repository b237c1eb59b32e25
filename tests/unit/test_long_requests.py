"""Requests with as many values or mistakes as fit into a body are answered at once, since the API waits meanwhile."""

import json
import time
from collections.abc import Iterator
from typing import Any

import pytest
from fastapi.testclient import TestClient
from pydantic import SecretStr

from app.contracts.settings import Settings
from app.contracts.suitability import MOST_ERRORS
from app.main import create_app
from tests.conftest import BASE_URL, HERE, keeps_within

PROMISE_S = 0.5
MODELS = [{"name": name, "checkpoint": f"local:{name}"} for name in ("a", "b")]
LONG = [{"name": f"m{i:02}" + "x" * 60, "checkpoint": "local:rec/a"} for i in range(64)]


def request(**fields: Any) -> dict[str, Any]:
    return {"method": {"name": "linear"}, "models": MODELS, **fields}


def of_model(**fields: Any) -> dict[str, Any]:
    return request(models=[{**MODELS[0], **fields}, MODELS[1]])


def sliced(slices: int, sources: int, names: str) -> dict[str, Any]:
    parts = [
        {"sources": [{"model": names.format(slices=i, sources=j), "layers": [0, 4]} for j in range(sources)]}
        for i in range(slices)
    ]
    right = {"sources": [{"model": model["name"], "layers": [0, 4]} for model in LONG]}
    return request(models=LONG, slices=[right, *parts])


def tokens(count: int, row: dict[str, Any]) -> dict[str, Any]:
    return request(output={"vocabulary": "union", "tokens": {f"t{i}": row for i in range(count)}})


LARGE = {
    "slices of unknown models": sliced(999, 8, "m{sources:02}y" + "x" * 59),
    "many sources": sliced(999, 28, "m{sources:02}"),
    "own parameters": of_model(parameters={f"k{i}": 1 for i in range(70_000)}),
    "fields": request(**{f"k{i}": 1 for i in range(80_000)}),
    "weights": of_model(weight=[1] * 490_000),
}
WRONG = {
    "slices of unknown models": sliced(999, 3, "m{sources:02}y" + "x" * 59),
    "slices of unknown models, each another": sliced(999, 3, "m{slices:03}{sources:02}" + "x" * 40),
    "unknown fields of slices": request(slices=[{"sources": [{"model": "a", f"modek{i}": 1}]} for i in range(1000)]),
    "unknown fields of tokens": tokens(9_900, {"sourcf": "own"}),
    "too many tokens": tokens(18_000, {}),
    "own parameters": of_model(parameters={f"k{i}": 1 for i in range(19_000)}),
    "fields": request(**{f"k{i}": 1 for i in range(19_000)}),
    "weights": of_model(weight=[1] * 19_000),
    "wrong weights": of_model(weight=["x"] * 19_000),
    "unknown fields of filters": of_model(weight=[{"filter": "a", "valuf": 1} for _ in range(6_000)]),
}


@pytest.fixture(scope="module")
def api(redis_url: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestClient]:
    folder = tmp_path_factory.mktemp("data")
    settings = Settings(redis_url=SecretStr(redis_url), data_dir=folder)
    with TestClient(create_app(settings), BASE_URL, client=HERE) as client:
        yield client


def answered(api: TestClient, content: dict[str, Any], status: int) -> dict[str, Any]:
    body = json.dumps(content, separators=(",", ":"))
    assert len(body) < 1_000_000
    answers = []

    def attempt() -> float:
        begun = time.process_time()  # of all threads, so of the API too
        answers.append(api.post("/merge/validate", content=body, headers={"Content-Type": "application/json"}))
        return time.process_time() - begun

    keeps_within(PROMISE_S, attempt)
    assert answers[-1].status_code == status, answers[-1].text[:1000]
    problem: dict[str, Any] = answers[-1].json()
    return problem


@pytest.mark.parametrize("case", LARGE)
def test_more_values_than_a_request_has_are_refused_at_once(api: TestClient, case: str) -> None:
    assert "more than 20000 values" in answered(api, LARGE[case], 400)["detail"]


@pytest.mark.parametrize("case", WRONG)
def test_of_very_many_mistakes_the_first_are_told_at_once(api: TestClient, case: str) -> None:
    problem = answered(api, WRONG[case], 422)
    assert 1 <= len(problem["errors"]) <= MOST_ERRORS


def test_a_hint_is_there_for_the_first_of_many_mistakes(api: TestClient) -> None:
    slices = answered(api, WRONG["slices of unknown models"], 422)["errors"]
    assert slices[0]["field"] == "slices.1.sources.0.model"
    assert "did you mean 'm00" in slices[0]["message"]
    wrong = answered(api, request(slices=[{"sources": [{"model": "a", "modek": 1}]}] * 1000), 422)
    assert "did you mean 'model'?" in wrong["errors"][0]["message"]
    assert f"; and {1000 - MOST_ERRORS} more" in wrong["detail"]
