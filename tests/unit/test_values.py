"""Parameters that may differ between tensors: what is taken, what is refused and how, and what they come to."""

from typing import Any

import pytest
from pydantic import TypeAdapter, ValidationError

from worker.engine.catalog.methods import METHODS, MaskFisherParameters, TaskArithmeticParameters, TiesParameters
from worker.engine.catalog.primitives.values import (
    Filtered,
    PerTensor,
    Share,
    TensorPlace,
    takes_part,
    value_at,
    values_at,
    values_of,
)

SHARE: TypeAdapter[Any] = TypeAdapter(PerTensor[Share])
QUERY = "bert.encoder.layer.1.attention.self.query.weight"


def at(setting: Any, depth: float = 0.0, name: str = QUERY, default: float = 0.9) -> float:
    return value_at(SHARE.validate_python(setting), TensorPlace(name, depth), default)


@pytest.mark.parametrize(
    ("setting", "depth", "expected"),
    [
        (0.3, 0.5, 0.3),
        ("1e-3", 0.5, 0.001),  # as YAML reads it
        ([0.3], 0.5, 0.3),
        ([0.3], 1.0, 0.3),
        ([0, 1], 0.0, 0.0),
        ([0, 1], 0.25, 0.25),
        ([0, 1], 1.0, 1.0),
        ([0, 0.5, 0.1], 0.5, 0.5),
        ([0, 0.5, 0.1], 0.75, 0.3),
        ([0, 0.5, 0.1], 1.0, 0.1),
        ([{"filter": "*attention*", "value": 0.2}, {"filter": "*query*", "value": 0.4}], 0.0, 0.2),  # the first
        ([{"filter": "*query*", "value": 0.4}, {"filter": "*attention*", "value": 0.2}], 0.0, 0.4),
        ([{"filter": "query", "value": 0.4}], 0.0, 0.9),  # the whole name, or it does not match
        ([{"filter": "*QUERY*", "value": 0.4}], 0.0, 0.9),
        ([{"filter": "*.layer.[01].*", "value": 0.4}], 0.0, 0.4),
        ([{"filter": "*query*", "value": [0, 1]}, {"filter": "*", "value": 0.5}], 0.25, 0.25),
        ([{"filter": "*key*", "value": [0, 1]}, {"filter": "*", "value": 0.5}], 0.25, 0.5),
    ],
)
def test_a_tensor_has_the_value_of_its_place(setting: Any, depth: float, expected: float) -> None:
    assert at(setting, depth) == pytest.approx(expected)


def test_several_settings_have_the_values_that_each_has() -> None:
    query = "*query*"
    written = [0.1, [0, 1], [{"filter": query, "value": 0.2}], [{"filter": query, "value": [0.4, 0.6]}]]
    settings = [SHARE.validate_python(setting) for setting in written]
    assert values_at(settings, TensorPlace(QUERY, 0.5), 0.9) == [0.1, 0.5, 0.2, 0.5]
    assert values_at(settings, TensorPlace("other", 1.0), 0.9) == [0.1, 1, 0.9, 0.9]


FORMS = 'give a number, a list of numbers from the first layer to the last, or a list of {"filter": glob, '
BAD: dict[str, tuple[Any, str]] = {
    "too large": (1.5, "less than or equal to 1"),
    "too large in a list": ([0, 1.5], "less than or equal to 1"),
    "too large in a filter": ([{"filter": "*", "value": 1.5}], "less than or equal to 1"),
    "too large in a list in a filter": ([{"filter": "*", "value": [0, -1]}], "greater than or equal to 0"),
    "no number": ("much", FORMS),
    "null": (None, FORMS),
    "true": (True, FORMS),
    "an underscore": ("1_0", FORMS),
    "true in a list": ([0.5, True], "give a number"),
    "an underscore in a list": ([0.5, "0_1"], "give a number"),
    "true in a filter": ([{"filter": "*", "value": True}], "give a number, or a list of numbers"),
    "true in a list in a filter": ([{"filter": "*", "value": [True]}], "give a number"),
    "one filter without its list": ({"filter": "*", "value": 1}, FORMS),
    "numbers and filters": ([0.5, {"filter": "*", "value": 1}], FORMS),
    "nothing": ([], "at least 1 item"),
    "not finite": (float("nan"), "Input should be"),
    "lists in a list": ([[0, 1]], "valid number"),
    "no filter": ([{"filter": "", "value": 1}], "at least 1 character"),
    "no value": ([{"filter": "*"}], "Field required"),
    "value of another kind": ([{"filter": "*", "value": {"x": 1}}], "give a number, or a list of numbers"),
    "another field": ([{"fitler": "*", "value": 1}], "unknown field 'fitler'; did you mean 'filter'?"),
    "endless": ([0.5] * 1001, "at most 1000 items"),
}


@pytest.mark.parametrize(("setting", "says"), BAD.values(), ids=BAD)
def test_what_is_wrong_is_said_once_and_of_the_form_that_was_meant(setting: Any, says: str) -> None:
    with pytest.raises(ValidationError) as refused:
        SHARE.validate_python(setting)
    [error] = refused.value.errors()
    assert says in error["msg"]


@pytest.mark.parametrize("setting", [0.5, [0.0, 1.0], [{"filter": "*a*", "value": [0.0, 1.0]}]])
def test_what_is_written_is_read_again(setting: Any) -> None:
    method = MaskFisherParameters(floor=setting)
    assert method.model_dump(mode="json")["floor"] == setting
    assert MaskFisherParameters.model_validate_json(method.model_dump_json()) == method
    assert type(method).model_validate(method.model_dump()) == method


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        (0.5, [0.5]),
        ([0.5, 0.6], [0.5, 0.6]),
        ([{"filter": "*a", "value": [0.5, 0.6]}], [0.5, 0.6, 0.9]),
        ([{"filter": "*a", "value": 0.5}, {"filter": "*", "value": 0.6}], [0.5, 0.6]),
    ],
)
def test_all_values_that_a_tensor_may_have(setting: Any, expected: list[float]) -> None:
    assert list(values_of(SHARE.validate_python(setting), 0.9)) == expected


@pytest.mark.parametrize(
    ("weight", "expected"),
    [
        (0.0, False),
        ([0.0, 0.0], False),
        ([0.0, 1.0], True),
        ([Filtered(filter="*", value=0.0)], False),
        ([Filtered(filter="*a*", value=0.0)], True),  # all others have the default
    ],
)
def test_a_model_takes_part_if_its_weight_is_not_0_anywhere(weight: Any, expected: bool) -> None:
    assert takes_part(weight) is expected


@pytest.mark.parametrize(
    ("scale", "needs_base"),
    [
        (1, False),
        (0.5, True),
        ([1, 1], False),
        ([1, 0.5], True),
        ([{"filter": "*a*", "value": 1}], False),
        ([{"filter": "*a*", "value": 2}], True),
    ],
)
def test_a_scale_needs_a_base_if_it_is_not_1_anywhere(scale: Any, needs_base: bool) -> None:
    assert METHODS["average"].parameters(name="average", scale=scale).needs_base is needs_base


def test_a_tensor_that_no_filter_names_has_the_methods_own_scale() -> None:
    named = [{"filter": "*query*", "value": 2}]
    assert MaskFisherParameters(scale=named).at("scale", TensorPlace(QUERY, 0.0)) == 2
    assert MaskFisherParameters(scale=named).at("scale", TensorPlace("other", 0.0)) == 1
    assert TaskArithmeticParameters(scale=named).at("scale", TensorPlace("other", 0.0)) == 0.4


@pytest.mark.parametrize(
    ("of_all", "own", "of_query", "elsewhere"),
    [
        (0.3, 0.7, 0.7, 0.7),
        (0.3, [0.75, 0.25], 0.25, 0.25),
        (0.3, [{"filter": "*query*", "value": 0.7}], 0.7, 0.3),
        ([0.5, 0.3], [{"filter": "*query*", "value": 0.7}], 0.7, 0.3),
        ([{"filter": "*", "value": 0.3}], [{"filter": "*query*", "value": 0.7}], 0.7, 0.3),
        ([{"filter": "*query*", "value": 0.3}], [{"filter": "*query*", "value": 0.7}], 0.7, 0.2),
        ([{"filter": "*query*", "value": 0.3}], [{"filter": "*key*", "value": 0.7}], 0.3, 0.2),
    ],
)
def test_where_no_filter_of_a_model_matches_the_methods_value_counts(
    of_all: Any, own: Any, of_query: float, elsewhere: float
) -> None:
    parameters = TiesParameters(density=of_all).of_model({"density": SHARE.validate_python(own)})
    assert parameters.at("density", TensorPlace(QUERY, 1.0)) == of_query
    assert parameters.at("density", TensorPlace("other", 1.0)) == elsewhere


def test_the_schema_of_a_parameter_shows_its_three_forms_with_their_bounds() -> None:
    schema = METHODS["mask_fisher"].describe()["parameters"]
    assert "$defs" not in schema
    number, layers, filters = schema["properties"]["floor"]["oneOf"]
    assert number == {"type": "number", "minimum": 0, "maximum": 1}
    assert layers["items"] == number
    assert filters["items"]["required"] == ["filter", "value"]
    assert filters["items"]["properties"]["value"]["oneOf"][0] == number
