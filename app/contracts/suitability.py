"""Checks that models, data sets, weights and slices of a request suit its method."""

from collections.abc import Iterable, Iterator, Sequence
from difflib import get_close_matches
from itertools import islice
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError
from pydantic_core import InitErrorDetails, PydanticCustomError

from app.contracts.models import MeasuredModelRequest, ModelRequest
from worker.engine.catalog.contracts.spec import ALIGN_RIDGE, Acceptance
from worker.engine.catalog.methods import AUTO, METHODS, BaseParameters, MethodParameters
from worker.engine.catalog.methods.auto import NEED_BASE
from worker.engine.catalog.primitives.slices import OutputSlice
from worker.engine.catalog.primitives.strict import LONGEST_NAME, Strict, did_you_mean
from worker.engine.catalog.primitives.values import PerTensor, Weight, filters_of, is_ever_negative

if TYPE_CHECKING:
    from app.contracts.requests import MergeRequest

MOST_ERRORS = 20  # errors that one answer tells
LEAST_EVALUATED = 2  # evaluation rows, if `auto` splits them


def problem(where: tuple[str | int, ...], why: str, value: Any) -> InitErrorDetails:
    return InitErrorDetails(type=PydanticCustomError("refused", "{why}", {"why": why}), loc=where, input=value)


def refuse(request: type[Strict], problems: Iterable[InitErrorDetails]) -> None:
    """Raise ValidationError with the first problems, if there are any: nobody reads thousands, and each takes time."""
    found = list(islice(problems, MOST_ERRORS))
    if found:
        raise ValidationError.from_exception_data(request.__name__, found)


def _named(method: BaseParameters, those: Sequence[MethodParameters]) -> str:
    """Name the method, or those of its candidates."""
    if method.search is None:
        return f"method {method.name}"
    names = dict.fromkeys(one.name for one in those)
    return f"candidate{'s' if len(names) > 1 else ''} {', '.join(names)}"


def unmeasured(method: BaseParameters, index: int, model: MeasuredModelRequest) -> Iterator[InitErrorDetails]:
    """Yield the reasons why the model `index` cannot be measured."""
    if not model.takes_part:
        return
    measuring = [one for one in method.methods if one.most_examples and one.is_measured(model.given)]
    if measuring and model.dataset is None:
        why = f"model '{model.name}' has no dataset, and {_named(method, measuring)} cannot do without: it is measured"
        yield problem(("models", index, "dataset"), why, None)


def acceptance_problems(
    accept: Acceptance, evaluates: bool, models: Sequence[ModelRequest]
) -> Iterator[InitErrorDetails]:
    """Yield the reasons why nothing could be said of whether a merge reaches what it must."""
    evaluated = [model.name for model in models if model.evaluation is not None]
    if not evaluates or not evaluated:
        why = "needs models with an evaluation, and evaluate true: it is judged on evaluation rows"
        yield problem(("accept",), why, None)
        return
    if not accept.model_dump(exclude_defaults=True):
        yield problem(("accept",), "names nothing to reach; give min_mean_retention, min_retention or metrics", None)
    for name, value in accept.metrics.items():
        if name not in evaluated:
            known = [model.name for model in models]
            why = "has no evaluation" if name in known else f"is no model's name{did_you_mean(name, known)}"
            yield problem(("accept", "metrics", name), f"'{name[:100]}' {why}", value)


def unread_statistics(method: BaseParameters, index: int, model: ModelRequest) -> Iterator[InitErrorDetails]:
    """Yield an error for every file of statistics of the model `index` that no merge reads."""
    for name, reference in model.given.items():
        if name not in method.statistics:
            defaults = {other: entry.parameters.model_construct(name=other) for other, entry in METHODS.items()}
            readers = [other for other, parameters in defaults.items() if name in parameters.statistics]
            whose = "none of the candidates of auto goes" if method.search else f"method {method.name} does not go"
            why = f"{whose} by this statistic; leave it out. Methods that do: {', '.join(readers)}"
            yield problem(("models", index, "statistics", name), why, reference)


def unused_measuring(method: MethodParameters, models: Sequence[ModelRequest]) -> Iterator[InitErrorDetails]:
    """Yield an error for every parameter of measuring, of the method or its start, where files have all statistics."""
    for place, one in method.as_asked.items():
        if not one.statistics:
            continue
        if any(model.takes_part and one.is_measured(model.given) for model in models):
            continue
        for name in one.measuring:
            value = getattr(one, name)
            if value != type(one).model_fields[name].default:
                why = "says how models are measured, and files have the statistics of all of them; leave it out"
                yield problem(("method", method.name, *place, name), why, value)


def misfits(method: MethodParameters, models: Sequence[ModelRequest], *, counts: bool = True) -> Iterator[str]:
    """Yield how the models' number and weights do not suit the method, which is the subject of each sentence."""
    weights = [model.weight for model in models if model.takes_part]
    entry = METHODS[method.name]
    least, most = entry.models
    if counts and (len(weights) < least or (most is not None and len(weights) > most)):
        yield f"merges {entry.models_wanted} models; {len(weights)} take part, as those of weight 0 do not"
    if not method.weighs_models and any(weight != weights[0] for weight in weights):
        yield "does not go by the models' weights; leave them out, or make them equal"
    if method.starts_from is not None:
        for why in misfits(method.starts_from, models, counts=counts):
            yield f"starts from {method.starts_from.name}, which {why}"


def search_problems(method: BaseParameters, request: "MergeRequest") -> Iterator[InitErrorDetails]:
    """Yield the reasons why `auto` cannot try every candidate on rows of every model."""
    if not request.evaluate:
        why = "method auto chooses by what merges keep of every model, so it evaluates; leave evaluate out"
        yield problem(("evaluate",), why, request.evaluate)
    for index, model in enumerate(request.models):
        where = ("models", index)
        if model.evaluation is None:
            why = f"method auto tries merges on rows of every model, and model '{model.name}' has no evaluation"
            yield problem((*where, "evaluation"), why, None)
        elif model.evaluation.limit is not None and model.evaluation.limit < LEAST_EVALUATED:
            why = f"method auto searches on one half of the rows and reports on the other, {LEAST_EVALUATED} at least"
            yield problem((*where, "evaluation", "limit"), why, model.evaluation.limit)
        if model.parameters:
            why = "a model has no parameters of its own in method auto, which searches for those of all; leave them out"
            yield problem((*where, "parameters"), why, model.parameters)
    output = request.output
    if output.vocabulary != "error":
        why = "method auto tries merges in the models' own tokens, so they need one vocabulary; leave it out"
        yield problem(("output", "vocabulary"), why, output.vocabulary)
    if output.align_ridge != ALIGN_RIDGE:
        why = f"method auto searches for it; leave it out (its default, {ALIGN_RIDGE:g}, is tried too)"
        yield problem(("output", "align_ridge"), why, output.align_ridge)
    needing = [one for one in method.methods if one.needs_base]
    if needing and request.base is None:
        scaled = "" if "base" in METHODS[needing[0].name].needs else f", with {needing[0].needs_base_by},"
        why = f"{_named(method, needing)}{scaled} cannot do without the common ancestor; name it as base"
        yield problem(("base",), why, None)
    asked = method.search.must_beat if method.search else []
    for index, baseline in enumerate(asked):
        if baseline in NEED_BASE and request.base is None:
            why = f"there is no {baseline} to beat without the common ancestor; name it as base"
            yield problem(("method", AUTO.name, "must_beat", index), why, baseline)
    evaluations = [model.evaluation for model in request.models if model.evaluation is not None]
    written = [evaluation for evaluation in evaluations if evaluation.metric == "exact_match"]
    if method.search is not None and method.search.must_keep_length is not None and not written:
        why = "no model is judged by what it writes; name exact_match as the metric of an evaluation"
        yield problem(("method", AUTO.name, "must_keep_length"), why, method.search.must_keep_length)
    if method.search is not None and method.search.must_fit is not None and not any(one.answer for one in written):
        why = "no model writes answers that must fit a pattern; name exact_match and answer in an evaluation"
        yield problem(("method", AUTO.name, "must_fit"), why, method.search.must_fit)
    for index, candidate in enumerate(method.methods):
        for why in misfits(candidate, request.models):
            yield problem(
                ("method", AUTO.name, "candidates", index), f"candidate {candidate.name} {why}", candidate.name
            )


def negative_weights(method: str, index: int, weight: PerTensor[Weight]) -> Iterator[InitErrorDetails]:
    """Yield an error for every weight below 0 of the model `index`."""
    if not is_ever_negative(weight):
        return
    takers = ", ".join(name for name, entry in METHODS.items() if entry.parameters.takes_negative_weights)
    why = f"must be greater than or equal to 0 in method {method}; methods that take others are {takers}"
    filters = filters_of(weight)
    parts: list[tuple[tuple[str | int, ...], Any]] = [((), weight)]
    if filters:
        parts = [((number, "value"), entry.value) for number, entry in enumerate(filters)]
    for place, value in parts:
        numbers = [((*place, i), one) for i, one in enumerate(value)] if isinstance(value, list) else [(place, value)]
        for at, number in numbers:
            if number < 0:
                yield problem(("models", index, "weight", *at), why, number)


def own_parameter_errors(method: MethodParameters, index: int, model: ModelRequest) -> Iterator[InitErrorDetails]:
    """Yield errors in the own parameters of the model `index`."""
    where = ("models", index, "parameters")
    unknown = [name for name in model.parameters if name not in method.per_model]
    for name in unknown:
        short = name[:LONGEST_NAME]
        why = f"a model has no parameters of its own in method {method.name}; leave it out"
        if method.per_model:
            near = get_close_matches(short, method.per_model, n=1)
            hint = f"; did you mean '{near[0]}'?" if near else ""
            listed = " and ".join(method.per_model)
            why = f"in method {method.name} a model can have its own {listed}, not '{short}'{hint}"
        error = PydanticCustomError("unknown_parameter", "{why}", {"why": why})
        yield InitErrorDetails(type=error, loc=(*where, short), input=model.parameters[name])
    if unknown:
        return
    try:
        method.of_model(model.parameters)
    except ValidationError as invalid:
        for found in invalid.errors():
            error = PydanticCustomError("invalid_parameter", "{why}", {"why": found["msg"]})
            yield InitErrorDetails(type=error, loc=(*where, *found["loc"]), input=found["input"])


def check_slices(method: BaseParameters, request: "MergeRequest") -> None:
    """Raise ValueError where slices and models do not name each other, or models have fields that stacking ignores."""
    models = [model.name for model in request.models]
    used = {part.model for part in method.stacked_slices}
    for name in sorted(used - set(models)):
        raise ValueError(f"a slice is of model '{name}'{did_you_mean(name, models)}")
    for model in request.models:
        if model.name not in used:
            raise ValueError(f"no slice is of model '{model.name}'; leave the model out")
        if model.weight != 1 or model.dataset is not None or model.evaluation is not None:
            raise ValueError(
                f"method {method.name} copies layers: weight, dataset and evaluation of model "
                f"'{model.name}' would have no effect; leave them out"
            )
    if request.slices is not None:
        raise ValueError(f"method {method.name} has slices of its own, method.slices; leave slices out")
    if request.base is not None:
        raise ValueError(f"method {method.name} copies layers, a base would have no effect; leave it out")


def slice_problems(
    method: MethodParameters, slices: Sequence[OutputSlice], request: "MergeRequest"
) -> Iterator[InitErrorDetails]:
    """Yield the reasons why the models cannot be merged slice by slice."""
    if method.statistics:
        why = f"method {method.name} measures whole models, and merges no slices of them; leave it out"
        yield problem(("slices",), why, None)
    if method.needs_table:
        why = f"with {method.needs_base_by}, method {method.name} merges whole models, and no slices; leave it out"
        yield problem(("slices",), why, None)
    models = {model.name: model for model in request.models}
    used = {source.model for part in slices for source in part.sources}
    for name in sorted(models.keys() - used):
        yield problem(("slices",), f"no slice is of model '{name}'; leave the model out", name)
    least, most = METHODS[method.name].models
    for index, part in enumerate(slices):
        for number, source in enumerate(part.sources):
            if source.model not in models:
                why = f"there is no model '{source.model}'{did_you_mean(source.model, list(models))}"
                yield problem(("slices", index, "sources", number, "model"), why, source.model)
        taking = [source for source in part.sources if source.model in models and models[source.model].takes_part]
        if len(taking) < max(1, least) or (most is not None and len(taking) > most):
            why = (
                f"method {method.name} merges {METHODS[method.name].models_wanted} models; this slice has {len(taking)}"
            )
            yield problem(("slices", index, "sources"), why, len(taking))
        if part.base_layers is not None and request.base is None:
            why = "there is no base; leave it out, or name the common ancestor as base"
            yield problem(("slices", index, "base_layers"), why, part.base_layers)
