"""The merge that a method which refits layers starts from: how a recipe names it, and what it needs."""

from typing import Any

import pytest
from pydantic import TypeAdapter, ValidationError

from worker.engine.catalog.methods import GRAM, NODE_FISHER, AlignedRegMeanParameters, AutoParameters, Method
from worker.engine.catalog.methods.merging import METHODS, STARTS

METHOD: TypeAdapter[Any] = TypeAdapter(Method)


def aligned(**given: Any) -> AlignedRegMeanParameters:
    found = METHOD.validate_python({"name": "aligned_regmean", **given})
    assert isinstance(found, AlignedRegMeanParameters)
    return found


def test_a_start_is_a_name_or_a_recipe_and_is_regmean_by_default() -> None:
    assert aligned() == aligned(start="regmean") == aligned(start={"name": "regmean"})
    ties = aligned(start={"name": "ties", "density": 0.3}, examples=7)
    assert (ties.starts_from.name, ties.starts_from.model_dump()["density"]) == ("ties", 0.3)
    for method in (aligned(), ties, aligned(shrink=0.9), aligned(start="mask_fisher", examples=9)):
        assert METHOD.validate_python(method.model_dump()) == method
        assert METHOD.validate_json(method.model_dump_json()) == method
    search = AutoParameters(candidates=[{"name": "aligned_regmean", "start": "ties"}, {"name": "regmean"}])
    assert [method.starts_from and method.starts_from.name for method in search.methods] == ["ties", None]
    assert "aligned_regmean" not in STARTS
    assert "passthrough" not in STARTS


def test_what_a_start_needs_the_whole_needs() -> None:
    assert aligned().statistics == {GRAM}
    assert not aligned().needs_base
    ties = aligned(start="ties")
    assert (ties.statistics, ties.needs_base, ties.needs_base_by) == (frozenset(), True, "start ties")
    assert ties.selects_by_rank
    assert ties.rows_measured(()) == 512
    scored = aligned(start={"name": "mask_fisher", "estimator": "empirical"}, examples=9, precision="float32")
    assert scored.statistics == {NODE_FISHER}
    assert scored.needs_labels
    assert scored.scoring is not None
    assert (scored.scoring.examples, scored.scoring.precision) == (9, "float32")
    assert (aligned(shrink=0.9).starts_from.model_dump()["shrink"], aligned(shrink=0.9).start) == (0.9, aligned().start)
    by_layer = aligned(start={"name": "ties", "density": [{"filter": "*.query.*", "value": 0.2}]})
    assert "start.density" in by_layer.settings
    assert METHODS["aligned_regmean"].describe()["parameters"]["properties"]["start"]["default"] == "regmean"


def test_what_has_no_effect_is_neither_told_nor_taken() -> None:
    """Every dump can be asked for again, and leads to the same merge."""
    of_regression, of_sums = aligned(), aligned(start="tsv_m")
    assert {"shrink", "ridge", "hold"} <= of_regression.model_dump().keys()
    assert of_sums.model_dump().keys() == of_regression.model_dump().keys() - {"shrink", "ridge"}
    own = aligned(start={"name": "regmean", "shrink": 0.9}, ridge=0.2).model_dump()
    assert ("shrink" in own, own["ridge"], own["start"]) == (False, 0.2, {"name": "regmean", "shrink": 0.9})
    deltas = METHOD.validate_python({"name": "regmean", "gram": "deltas"})
    assert "examples" not in deltas.model_dump()
    empirical = METHOD.validate_python({"name": "fisher", "estimator": "empirical"})
    assert "seed" not in empirical.model_dump()
    assert METHOD.validate_python({"name": "fisher", "seed": 3}).model_dump()["seed"] == 3
    for method in (of_regression, of_sums, deltas, empirical, METHOD.validate_python(own)):
        assert METHOD.validate_python(method.model_dump()) == method
    no_effect: list[tuple[dict[str, Any], str]] = [
        ({"name": "regmean", "gram": "deltas", "examples": 64}, "examples counts rows to measure, and gram 'deltas'"),
        ({"name": "fisher", "estimator": "expected", "seed": 3}, "seed draws labels, and the estimator 'expected'"),
    ]
    for given, why in no_effect:
        with pytest.raises(ValidationError, match=why):
            METHOD.validate_python(given)


@pytest.mark.parametrize(
    ("given", "why"),
    [
        ({"start": "aligned_regmean"}, "cannot be a start, because it refits or stacks layers itself"),
        ({"start": "regmean_plus"}, "cannot be a start, because it refits or stacks layers itself"),
        ({"start": {"name": "passthrough"}}, "cannot be a start, because it refits or stacks layers itself"),
        ({"start": "tie"}, "unknown method 'tie'; did you mean 'ties'?"),
        ({"start": 3}, "a start is a method's name, or an object that has it"),
        ({"start": {"density": 0.5}}, "a start is a method's name, or an object that has it"),
        ({"start": {"name": "ties", "density": 5}}, "less than or equal to 1"),
        ({"start": "ties", "shrink": 0.5}, "shrink is of a start that is a regression, and the start is ties"),
        ({"start": {"name": "regmean", "ridge": 0.5}, "ridge": 0.4}, "ridge is given twice"),
        ({"start": {"name": "regmean", "examples": 5}}, "examples is of the whole method"),
        ({"start": {"name": "mask_fisher", "preset": "paper"}}, "a preset reads rows in an order of its own"),
        ({"start": "mask_fisher", "examples": "auto"}, "give a number"),
    ],
    ids=str,
)
def test_what_is_no_start_is_refused(given: dict[str, Any], why: str) -> None:
    with pytest.raises(ValidationError) as caught:
        aligned(**given)
    assert why in str(caught.value)
