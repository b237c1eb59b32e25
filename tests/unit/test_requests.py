"""What a request says of itself before anything is looked up."""

from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator
from pydantic import SecretStr, ValidationError

from app.contracts.requests import MergeRequest, ScoreRequest
from app.contracts.settings import Settings
from app.main import create_app
from app.services.bodies import field_of
from worker.engine.catalog.methods import AutoParameters


def titled(*names: str) -> str:
    models = [{"name": name, "checkpoint": "local:x"} for name in names]
    return MergeRequest.model_validate({"method": {"name": "average"}, "models": models}).title


@pytest.mark.parametrize("count", [1, 3, 4, 64])
def test_the_name_of_many_models_is_one_that_a_request_may_have(count: int) -> None:
    names = [f"{number:060}" for number in range(count)]
    title = titled(*names)
    joined = "+".join(names)
    assert title == (joined if len(joined) <= 200 else joined[:199] + "…")
    models = [{"name": "a", "checkpoint": "local:x"}]
    again = MergeRequest.model_validate({"name": title, "method": {"name": "average"}, "models": models})
    assert again.title == title


def model(name: str, **fields: Any) -> dict[str, Any]:
    rows = {"source": f"local:{name}.jsonl", "label": "label"}
    return {"name": name, "checkpoint": f"local:{name}", "dataset": rows, "evaluation": rows, **fields}


def searched(*models: dict[str, Any], candidates: list[Any] | None = None, **fields: Any) -> dict[str, Any]:
    method = {"name": "auto", "candidates": candidates, **fields.pop("method", {})}
    return {"method": method, "models": list(models) or [model("a"), model("b")], **fields}


def candidates_of(request: dict[str, Any]) -> list[str]:
    method = MergeRequest.model_validate(request).method
    assert isinstance(method, AutoParameters)
    return [candidate.name for candidate in method.methods]


def refusals(request: dict[str, Any]) -> dict[str, str]:
    """Messages by field."""
    with pytest.raises(ValidationError) as caught:
        MergeRequest.model_validate(request)
    return {field_of(("body", *error["loc"])): error["msg"] for error in caught.value.errors()}


def test_the_settings_that_count_are_those_of_an_input() -> None:
    request = {"method": {"name": "average"}, "models": [{"name": n, "checkpoint": "local:x"} for n in ("one", "two")]}
    for name in ("one", "two"):
        assert MergeRequest.model_validate({**request, "output": {"config_from": name}}).output.config_from == name
    assert refusals({**request, "output": {"config_from": "too"}}) == {
        "output.config_from": "is no model's name; did you mean 'two'?"
    }
    of_base = {**request, "output": {"config_from": "base"}}
    assert "output.config_from" in refusals(of_base)
    assert MergeRequest.model_validate({**of_base, "base": "local:x"}).output.config_from == "base"


MEASURING = ["mask_fisher", "regmean", "mask_regmean", "aligned_regmean"]


def test_auto_tries_what_the_models_name_enough_for() -> None:
    assert candidates_of(searched()) == ["average", *MEASURING]
    with_base = ["average", "mask_fisher", "task_arithmetic", "ties", "tsv_m", *MEASURING[1:]]
    assert candidates_of(searched(base="local:base")) == with_base
    without_rows = model("b", dataset=None)
    assert candidates_of(searched(model("a"), without_rows)) == ["average"]
    assert candidates_of(searched(model("a"), {**without_rows, "weight": 0})) == ["average", *MEASURING]
    assert candidates_of(searched(candidates=["slerp"])) == ["slerp"]


def test_the_accepted_request_names_the_candidates_as_they_were_given() -> None:
    given = ["average", {"name": "ties", "density": [0.5, 0.2]}, {"name": "mask_fisher", "examples": "auto"}]
    request = MergeRequest.model_validate(searched(candidates=given, base="local:base"))
    accepted = request.model_dump(mode="json")
    assert accepted["method"]["candidates"] == [
        {"name": "average"},
        {"name": "ties", "density": [0.5, 0.2]},
        {"name": "mask_fisher", "examples": "auto", "tolerance": 0.1},
    ]
    again = MergeRequest.model_validate(accepted)
    assert (again, again.model_dump(mode="json")) == (request, accepted)
    of_defaults = MergeRequest.model_validate(searched()).model_dump(mode="json")
    assert of_defaults["method"]["candidates"] == [{"name": name} for name in ["average", *MEASURING]]
    assert MergeRequest.model_validate(of_defaults).model_dump(mode="json") == of_defaults


THREE = [model("a"), model("b"), model("c")]
REFUSED: dict[str, tuple[dict[str, Any], dict[str, list[str]]]] = {
    "a name with a typo": (searched(candidates=["tie"]), {"method.candidates.0": ["did you mean 'ties'?"]}),
    "itself": (searched(candidates=["auto"]), {"method.candidates.0": ["unknown method 'auto'"]}),
    "a parameter with a typo": (
        searched(candidates=["average", {"name": "ties", "denstiy": 1}]),
        {"method.candidates.1": ["did you mean 'density'?"]},
    ),
    "a parameter beyond its bounds": (
        searched(candidates=[{"name": "ties", "density": 4}]), {"method.candidates.0.density": ["less than or equal"]},
    ),
    "a stack": (searched(candidates=["passthrough"]), {"method.candidates.0": ["passthrough", "leave it out"]}),
    "a preset": (
        searched(candidates=[{"name": "mask_fisher", "preset": "paper"}]), {"method.candidates": ["preset"]},
    ),
    "no candidates": (searched(candidates=[]), {"method.candidates": ["at least 1 item"]}),
    "fewer trials than candidates": (
        searched(candidates=["average", "linear"], method={"trials": 1}),
        {"method.trials": ["2 candidates", "trials is 1"]},
    ),
    "fewer trials than candidates by default": (
        searched(method={"trials": 4}), {"method.trials": ["5 candidates", "trials is 4"]},
    ),
    "limits of lengths in the wrong order": (
        searched(method={"must_keep_length": [2, 0.5]}), {"method.must_keep_length": ["2, is above the largest, 0.5"]},
    ),
    "a limit of lengths where nothing is written": (
        searched(method={"must_keep_length": [0.5, 2]}), {"method.must_keep_length": ["name exact_match"]},
    ),
    "a pattern that must fit where none is stated": (
        searched(method={"must_fit": 0.9}), {"method.must_fit": ["name exact_match and answer"]},
    ),
    "a candidate that is no method": (
        searched(candidates=["average", 5]), {"method.candidates.1": ["a method's name"]},
    ),
    "a candidate without a name": (searched(candidates=[{"scale": 1}]), {"method.candidates.0": ["a method's name"]}),
    "no evaluation": (
        searched(model("a"), model("b", evaluation=None)), {"models.1.evaluation": ["'b'", "rows of every model"]},
    ),
    "no evaluation of a model that takes no part": (
        searched(model("a"), model("b", evaluation=None, weight=0)), {"models.1.evaluation": ["'b'"]},
    ),
    "no evaluating": (searched(evaluate=False), {"evaluate": ["leave evaluate out"]}),
    "one row": (
        searched(model("a", evaluation={"source": "local:a.jsonl", "limit": 1})),
        {"models.0.evaluation.limit": ["one half of the rows"]},
    ),
    "no base": (
        searched(candidates=["average", "ties", "sce"]), {"base": ["candidates ties, sce", "name it as base"]},
    ),
    "a scale without a base": (
        searched(candidates=[{"name": "average", "scale": 1.1}]), {"base": ["candidate average, with a scale"]},
    ),
    "no data set": (
        searched(model("a"), model("b", dataset=None), candidates=["average", "regmean", "fisher"]),
        {"models.1.dataset": ["model 'b'", "candidates regmean, fisher"]},
    ),
    "three models for slerp": (
        searched(*THREE, candidates=["average", "slerp"]),
        {"method.candidates.1": ["slerp merges exactly 2 models; 3"]},
    ),
    "weights that a candidate does not go by": (
        searched(model("a", weight=2), model("b"), candidates=["slerp"]),
        {"method.candidates.0": ["slerp does not go by the models' weights"]},
    ),
    "no weights": (searched(model("a", weight=0)), {"": ["weights of all models are 0"]}),
    "parameters of one model": (
        searched(model("a", parameters={"density": 1})), {"models.0.parameters": ["in method auto"]},
    ),
    "several things of the output at once": (
        searched(output={"vocabulary": "union", "align_ridge": 0.2}),
        {"output.vocabulary": ["one vocabulary"], "output.align_ridge": ["searches"]},
    ),
    "a floor beyond all": (
        searched(model("a", min_retention=3)), {"models.0.min_retention": ["less than or equal to 2"]},
    ),
    "a floor of a merge that is not searched for": (
        {"method": {"name": "average"}, "models": [model("a", min_retention=0.9)]},
        {"models.0.min_retention": ["method auto", "method average", "leave it out"]},
    ),
    "a ridge of nothing": (
        {"method": {"name": "average"}, "models": [model("a")], "output": {"align_ridge": 0}},
        {"output.align_ridge": ["greater than 0"]},
    ),
}  # fmt: skip


@pytest.mark.parametrize(("request_", "expected"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_searched_is_refused_by_its_field(
    request_: dict[str, Any], expected: dict[str, list[str]]
) -> None:
    found = refusals(request_)
    assert set(found) == set(expected)
    for field, says in expected.items():
        assert all(words in found[field] for words in says), found


@pytest.mark.parametrize("method", [{"name": "average"}, {"name": "mask_fisher", "preset": "paper"}])
def test_rows_that_no_head_is_aligned_on_are_refused(method: dict[str, Any]) -> None:
    asked = {"alignment_rows": 64, "align_ridge": 0.2}
    kept = {"method": method, "models": [model("a")]}
    defaults: list[dict[str, Any]] = [{}, {"alignment_rows": 512, "align_ridge": 0.1}]
    for output in defaults:
        found = MergeRequest.model_validate({**kept, "output": {"align_heads": False, **output}}).output
        assert (found.alignment_rows, found.align_ridge) == (512, 0.1), "a recipe has all defaults, and is posted again"
    said = refusals({**kept, "output": {"align_heads": False, **asked}})
    assert set(said) == {"output.alignment_rows", "output.align_ridge"}
    assert all("no effect where heads are kept as they are" in why for why in said.values())
    by_default = {**kept, "output": asked}
    if "preset" in method:
        assert set(refusals(by_default)) == set(said)
    else:
        assert MergeRequest.model_validate(by_default).output.alignment_rows == 64


GIVEN = {"statistics": {"fisher": "local:squares.safetensors"}}


def test_how_to_measure_is_not_said_of_models_whose_statistics_files_have() -> None:
    fisher = {"name": "fisher", "estimator": "sampled", "seed": 3, "examples": 64}
    given = [model("a", **GIVEN), model("b", **GIVEN)]
    said = refusals({"method": fisher, "models": given})
    assert set(said) == {"method.estimator", "method.seed", "method.examples"}
    assert all("files have the statistics of all of them; leave it out" in why for why in said.values())
    MergeRequest.model_validate({"method": fisher, "models": [given[0], model("b")]})
    started = {"name": "aligned_regmean", "start": {"name": "fisher", "estimator": "expected"}, "examples": 64}
    said = refusals({"method": started, "models": given})
    assert set(said) == {"method.start.estimator"}


@pytest.mark.parametrize(("rows", "says"), [(15, "equal to 16"), (100_001, "equal to 100000"), ("64", "valid integer")])
def test_a_head_is_aligned_on_a_number_of_rows_that_suffices_and_can_be_held(rows: Any, says: str) -> None:
    asked = {"method": {"name": "average"}, "models": [model("a")], "output": {"alignment_rows": rows}}
    assert says in refusals(asked)["output.alignment_rows"]


def test_filters_of_candidates_count() -> None:
    density = [{"filter": "*", "value": 0.5}] * 600
    candidates = [{"name": name, "density": density} for name in ("ties", "dare_ties")]
    assert "1200 filters" in refusals(searched(candidates=candidates, base="local:base"))[""]


def test_nothing_is_searched_where_nothing_is_merged() -> None:
    request = {"method": {"name": "auto"}, "models": [{"name": "a", "checkpoint": "x", "dataset": {"source": "y"}}]}
    with pytest.raises(ValidationError, match="nothing is merged here; name one that measures: mask_fisher"):
        ScoreRequest.model_validate(request)


def test_the_published_schema_takes_candidates_by_name_and_as_recipes(tmp_path: Path) -> None:
    app = create_app(Settings(redis_url=SecretStr("redis://127.0.0.1:1"), data_dir=tmp_path))
    schemas = app.openapi()["components"]["schemas"]
    validator = Draft202012Validator({"$ref": "#/components/schemas/MergeRequest", "components": {"schemas": schemas}})
    valid = searched(candidates=["average", {"name": "ties", "density": [0.2, 0.5]}], base="local:base")
    assert validator.is_valid(valid)
    assert MergeRequest.model_validate(valid)
    for candidate in ("tie", {"name": "tie"}, {"name": "ties", "denstiy": 1}, 3):
        assert not validator.is_valid(searched(candidates=[candidate])), candidate
