"""The whole schema of requests, including fields that are refused because they are not available yet."""

import json
from collections.abc import Iterable, Iterator, Sequence
from difflib import get_close_matches
from itertools import islice
from typing import Annotated, Any, Generic, Literal, Self, TypeVar

from pydantic import AnyHttpUrl, BeforeValidator, Field, ValidationError, field_validator, model_validator
from pydantic_core import InitErrorDetails, PydanticCustomError

from worker.engine.catalog.contracts.spec import ALIGN_RIDGE, Dtype, Heads, OutputSpec, VocabularyPolicy
from worker.engine.catalog.data.spec import Columns, Name
from worker.engine.catalog.methods import (
    AUTO,
    MASK_FISHER,
    METHODS,
    AutoParameters,
    BaseParameters,
    Method,
    MethodParameters,
    check_name,
    default_candidates,
)
from worker.engine.catalog.primitives.slices import OutputSlice
from worker.engine.catalog.primitives.strict import LONGEST_NAME, Strict, did_you_mean
from worker.engine.catalog.primitives.tokens import Tokens
from worker.engine.catalog.primitives.values import (
    DEFAULT_WEIGHT,
    PerTensor,
    Weight,
    filters_of,
    is_ever_negative,
    takes_part,
)
from worker.engine.catalog.tasks import MetricName

LONGEST_TITLE = 200
LONGEST_DEADLINE_S = 366 * 86_400
MOST_FILTERS = 1000  # filters of a request; each is matched against the names of all tensors
MOST_ERRORS = 20  # errors that one answer tells
LEAST_EVALUATED = 2  # evaluation rows, if `auto` splits them

LATER_COLUMNS = ("target", "messages", "tokens", "question", "context", "answers", "image")


class Dataset(Columns):
    """Rows of text, with or without labels."""

    source: str
    """Reference to a JSON lines, CSV or Parquet file, or to a data set on the hub."""
    config: Name | None = None
    """Configuration of a data set on the hub, if it has several."""
    split: Name | None = None
    """Split of a data set on the hub, if it has several."""
    target: str | None = None
    messages: str | None = None
    tokens: str | None = None
    question: str | None = None
    context: str | None = None
    answers: str | None = None
    image: str | None = None


class Evaluation(Dataset):
    """Rows on which expert, plain average and merge are compared."""

    label: Name = "label"
    """Column of the labels."""
    metric: MetricName | None = None
    """Metric to compare; default: accuracy for classification, f1 for several labels at once, pearson for
    regression."""


class MeasuredModelRequest(Strict):
    """A model as every kind of job names it."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]{1,64}$")]
    """Unique name, which is also that of the model's folder or file in the artifact."""
    checkpoint: str
    """Reference to a folder written by `save_pretrained`, to a repository on the hub, or to a model of an earlier job;
    in a merge also to a LoRA adapter of `base`."""
    dataset: Dataset | None = None

    @field_validator("name")
    @classmethod
    def _is_a_folder_name(cls, name: str) -> str:
        if set(name) == {"."}:
            raise ValueError("a name of dots alone cannot be a folder")
        return name

    @property
    def takes_part(self) -> bool:
        return True


class ModelRequest(MeasuredModelRequest):
    weight: PerTensor[Weight] = DEFAULT_WEIGHT
    """Weight of this model in the merge, lambda; 0 leaves it out. Below 0 it is subtracted, in methods that add up
    models or task vectors. `auto` tries a third to three times of it, unless a model has a list or filters."""
    parameters: Annotated[dict[str, PerTensor[float]], Field(default_factory=dict)]
    """This model's own values of the method's parameters that `per_model` of `GET /methods` names. Where none of its
    filters matches a tensor, the method's value counts."""
    evaluation: Evaluation | None = None
    min_retention: Annotated[float, Field(ge=0, le=2)] | None = None
    """Share of this expert's metric that a merge chosen by `auto` must keep, if any trial does."""

    @property
    def takes_part(self) -> bool:
        return takes_part(self.weight)


class ScoredModelRequest(MeasuredModelRequest):
    dataset: Dataset


class Output(Tokens):
    dtype: Dtype = "auto"
    """Data type in which merged tensors are stored; `auto` keeps the inputs' own."""
    heads: Heads | None = None
    """Treatment of heads. `per_model`: the merged backbone gets each model's own head, in `models/`. `merged`: heads
    are merged like all other tensors, to one model in `model/`, for which classifiers need equal labels. Default:
    `per_model` for classifiers of architectures with a table, `merged` for all others, such as language models."""
    align_heads: bool = True
    """Whether to refit each kept head to the merged backbone, on the model's own `dataset` and without labels. With the
    preset `paper` it is false by default. It has no effect, and is shown as false, where heads are merged."""
    align_ridge: Annotated[float, Field(gt=0, le=100)] = ALIGN_RIDGE
    """Strength that holds an aligned head to its former weights, in units of the mean square of its inputs. `auto`
    searches for it, and only accepts the default here."""
    max_shard_bytes: Annotated[int, Field(ge=1_000_000)] = 5_000_000_000
    vocabulary: VocabularyPolicy = "error"
    """Treatment of models whose tokenizers differ: `error` refuses them; `base` keeps the vocabulary of the base, or of
    the first model where no base is named; `union` appends the other models' further tokens to that."""
    config_from: str | None = None
    """Name of the model, or `base`, whose configuration and tokenizer are published. Models may then differ in settings
    that no shape shows, such as the base of rotary positions, their scaling, windows or the epsilon of norms; without
    it, such models are refused. Each published model keeps its own labels."""
    chat_template: Annotated[str, Field(min_length=1, max_length=100_000)] | None = None
    """The published chat template: Jinja, or `auto` for the one that most models have. Null: the published tokenizer's
    own."""
    interference: bool = True
    """Whether to compare the models' differences from the base for the report, which reads the checkpoints once more.
    It has no effect where no base is named."""
    publish: str | None = None

    @property
    def spec(self) -> OutputSpec:
        """The settings of the output that the engine needs."""
        return OutputSpec.model_validate(self.model_dump(include=set(OutputSpec.model_fields)))

    @field_validator("chat_template")
    @classmethod
    def _is_a_template(cls, template: str | None) -> str | None:
        if template is not None and template != "auto" and "{" not in template:
            raise ValueError("it is neither Jinja nor auto; give the template itself")
        return template

    @model_validator(mode="after")
    def _tokens_are_merged(self) -> Self:
        asked = [name for name in ("vocabulary_of", "tokens", "pad_to_multiple_of") if getattr(self, name)]
        if asked and self.vocabulary == "error":
            raise ValueError(f"{asked[0]} needs vocabulary 'base' or 'union', which merge tokens")
        if self.vocabulary_of is not None and self.vocabulary == "union":
            raise ValueError("vocabulary_of needs vocabulary 'base'; 'union' keeps all")
        return self


class Webhook(Strict):
    url: AnyHttpUrl
    events: tuple[Literal["job.succeeded", "job.failed", "job.cancelled"], ...] = ("job.succeeded", "job.failed")


LabelKey = Annotated[str, Field(pattern=r"^[A-Za-z0-9._/-]{1,64}$")]
LabelValue = Annotated[str, Field(max_length=256)]


RequestedMethod = Annotated[
    Method | AutoParameters,
    Field(discriminator="name"),
    BeforeValidator(lambda method: check_name(method, (*METHODS, AUTO.name))),
]
Model = TypeVar("Model", bound=MeasuredModelRequest)


class JobRequest(Strict, Generic[Model]):
    """The common part of requests for every kind of job."""

    name: Annotated[str, Field(max_length=LONGEST_TITLE)] | None = None
    """Title for people; default: the models' names joined by +, as far as there is room."""
    method: RequestedMethod
    models: Annotated[list[Model], Field(min_length=1, max_length=64)]
    labels: Annotated[dict[LabelKey, LabelValue], Field(max_length=32, default_factory=dict)]
    deadline_seconds: Annotated[float, Field(gt=0, le=LONGEST_DEADLINE_S)] | None = None
    """Seconds that the job has from its acceptance, including its time in the queue and all attempts. A job that has
    not ended by then fails with `timeout` and publishes nothing. A retry has the same time again. Null: no limit."""

    @model_validator(mode="before")
    @classmethod
    def _is_unicode(cls, data: Any) -> Any:
        """Refuse halves of surrogate pairs, which JSON can spell but UTF-8 cannot encode."""
        try:
            json.dumps(data if isinstance(data, dict) else None, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise PydanticCustomError(
                "not_unicode", "a text holds half a surrogate pair, which is no character"
            ) from None
        return data

    @model_validator(mode="after")
    def _models_can_be_measured(self) -> Self:
        names = [model.name for model in self.models]
        twice = {name for name in names if names.count(name) > 1}
        if twice:
            raise ValueError(f"models have the same name: {', '.join(sorted(twice))}")
        _refuse(
            type(self), (e for index, model in enumerate(self.models) for e in _unmeasured(self.method, index, model))
        )
        return self

    @property
    def title(self) -> str:
        joined = "+".join(model.name for model in self.models)
        return self.name or (joined if len(joined) <= LONGEST_TITLE else joined[: LONGEST_TITLE - 1] + "…")


class MergeRequest(JobRequest[ModelRequest]):
    """Body of `POST /merge`."""

    base: Annotated[str, Field(min_length=1)] | None = None
    """Reference to the checkpoint from which all models, adapters too, were fine-tuned, with any head or none."""
    layers: Annotated[int, Field(ge=1)] | None = None
    """Number of layers that the models must have; null: any. Translations of recipes that name all layers set it."""
    slices: Annotated[list[OutputSlice], Field(min_length=1, max_length=1000)] | None = None
    """Slices that become the layers 0, 1, … of the result; the method merges each of them from layers of its sources.
    Tensors before the layers are merged from the first slice's models, and those after them from the last slice's.
    Null: all layers of all models, or `method.slices`."""
    output: Output = Output()
    strict_filters: bool = True
    """Whether a filter that matches no tensor is refused; otherwise the result has a note of it."""
    notes: Annotated[list[Annotated[str, Field(max_length=1000)]], Field(max_length=100, default_factory=list)]
    """Notes with which the result begins, such as those of a translation about what it left out of a recipe."""
    evaluate: bool = True
    """Whether to compare expert, plain average and merge on each model's evaluation rows."""
    webhook: Webhook | None = None
    priority: Annotated[int, Field(ge=-10, le=10)] = 0
    device: Literal["cpu", "cuda"] | None = None

    @model_validator(mode="after")
    def _method_may_keep_heads(self) -> Self:
        if self.method.aligns_heads or "align_heads" in self.output.model_fields_set:
            return self
        return self.model_copy(update={"output": self.output.model_copy(update={"align_heads": False})})

    @model_validator(mode="after")
    def _some_model_takes_part(self) -> Self:
        if not any(model.takes_part for model in self.models):
            raise ValueError("the weights of all models are 0; at least one must be positive")
        return self

    @model_validator(mode="after")
    def _auto_has_candidates(self) -> Self:
        search = self.method.search
        if search is None or search.candidates is not None:
            return self
        taking_part = [model for model in self.models if model.takes_part]
        names = default_candidates(
            has_base=self.base is not None,
            has_datasets=all(model.dataset is not None for model in taking_part),
            models=len(taking_part),
        )
        try:
            method = search.with_candidates(names)
        except ValidationError as invalid:
            errors = [_problem(("method", AUTO.name, *error["loc"]), error["msg"], names) for error in invalid.errors()]
            raise ValidationError.from_exception_data(type(self).__name__, errors) from invalid
        return self.model_copy(update={"method": method})

    @model_validator(mode="after")
    def _can_be_searched(self) -> Self:
        if self.method.search is not None:
            if self.slices is not None:
                why = "method auto merges whole models; leave it out"
                _refuse(type(self), [_problem(("slices",), why, None)])
            _refuse(type(self), _search_problems(self.method, self))
            return self
        for index, model in enumerate(self.models):
            if model.min_retention is not None:
                why = f"is for the method auto, and method {self.method.name} makes but one merge; leave it out"
                _refuse(type(self), [_problem(("models", index, "min_retention"), why, model.min_retention)])
        return self

    @model_validator(mode="after")
    def _models_can_be_merged(self) -> Self:
        if self.method.search is not None:
            return self
        if self.method.needs_base and self.base is None:
            named = "base" in METHODS[self.method.name].needs
            why = f"method {self.method.name}" if named else "a scale other than 1"
            raise ValueError(f"{why} merges differences from the common ancestor; name it as base")
        if self.method.refits_layers and self.output.vocabulary != "error":
            raise ValueError(
                f"method {self.method.name} compares experts and merge token by token, so they need one vocabulary; "
                "leave out output.vocabulary"
            )
        if self.method.stacked_slices:
            _check_slices(self.method, self)
        elif self.slices is not None:
            [method] = self.method.methods
            _refuse(type(self), _slice_problems(method, self.slices, self))
        return self

    @model_validator(mode="after")
    def _settings_are_of_an_input(self) -> Self:
        named, names = self.output.config_from, [model.name for model in self.models]
        known = [*names, *(["base"] if self.base is not None else [])]
        if named is not None and named not in known:
            why = f"is no model's name{did_you_mean(named, known)}; known are {', '.join(known)}"
            _refuse(type(self), [_problem(("output", "config_from"), why, named)])
        return self

    @model_validator(mode="after")
    def _filters_are_few(self) -> Self:
        settings = [getattr(method, name) for method in self.method.methods for name in type(method).model_fields]
        for model in self.models:
            settings += [model.weight, *model.parameters.values()]
        count = sum(len(filters_of(setting)) for setting in settings)
        if count > MOST_FILTERS:
            raise ValueError(f"there are {count} filters, in the method and the models; {MOST_FILTERS} are allowed")
        return self

    @model_validator(mode="after")
    def _weights_suit_the_method(self) -> Self:
        least = [method for method in self.method.methods if not method.takes_negative_weights]
        if least:
            name = least[0].name
            _refuse(type(self), (e for i, m in enumerate(self.models) for e in _negative_weights(name, i, m.weight)))
        return self

    @model_validator(mode="after")
    def _own_parameters_suit_the_method(self) -> Self:
        if self.method.search is None:
            [method] = self.method.methods
            _refuse(type(self), (e for i, m in enumerate(self.models) for e in _own_parameter_errors(method, i, m)))
        return self

    @model_validator(mode="after")
    def _models_suit_the_method(self) -> Self:
        if self.method.search is None:
            [method] = self.method.methods
            for why in _misfits(method, self.models, counts=self.slices is None):
                raise ValueError(f"method {method.name} {why}")
        return self


def _problem(where: tuple[str | int, ...], why: str, value: Any) -> InitErrorDetails:
    return InitErrorDetails(type=PydanticCustomError("refused", "{why}", {"why": why}), loc=where, input=value)


def _refuse(request: type[Strict], problems: Iterable[InitErrorDetails]) -> None:
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


def _unmeasured(method: BaseParameters, index: int, model: MeasuredModelRequest) -> Iterator[InitErrorDetails]:
    """Yield the reasons why the model `index` cannot be measured."""
    if not model.takes_part:
        return
    measuring = [one for one in method.methods if one.statistics]
    if measuring and model.dataset is None:
        why = f"model '{model.name}' has no dataset, and {_named(method, measuring)} cannot do without: it is measured"
        yield _problem(("models", index, "dataset"), why, None)
    reading = [one for one in method.methods if one.needs_labels]
    if reading and model.dataset is not None and model.dataset.label is None:
        why = f"the estimator of {_named(method, reading)} reads labels, and model '{model.name}' names no label"
        yield _problem(("models", index, "dataset", "label"), why, None)


def _misfits(method: MethodParameters, models: Sequence[ModelRequest], *, counts: bool = True) -> Iterator[str]:
    """Yield how the models' number and weights do not suit the method, which is the subject of each sentence."""
    weights = [model.weight for model in models if model.takes_part]
    entry = METHODS[method.name]
    least, most = entry.models
    if counts and (len(weights) < least or (most is not None and len(weights) > most)):
        yield f"merges {entry.models_wanted} models; {len(weights)} take part, as those of weight 0 do not"
    if not method.weighs_models and any(weight != weights[0] for weight in weights):
        yield "does not go by the models' weights; leave them out, or make them equal"


def _search_problems(method: BaseParameters, request: MergeRequest) -> Iterator[InitErrorDetails]:
    """Yield the reasons why `auto` cannot try every candidate on rows of every model."""
    if not request.evaluate:
        why = "method auto chooses by what merges keep of every model, so it evaluates; leave evaluate out"
        yield _problem(("evaluate",), why, request.evaluate)
    for index, model in enumerate(request.models):
        where = ("models", index)
        if model.evaluation is None:
            why = f"method auto tries merges on rows of every model, and model '{model.name}' has no evaluation"
            yield _problem((*where, "evaluation"), why, None)
        elif model.evaluation.limit is not None and model.evaluation.limit < LEAST_EVALUATED:
            why = f"method auto searches on one half of the rows and reports on the other, {LEAST_EVALUATED} at least"
            yield _problem((*where, "evaluation", "limit"), why, model.evaluation.limit)
        if model.parameters:
            why = "a model has no parameters of its own in method auto, which searches for those of all; leave them out"
            yield _problem((*where, "parameters"), why, model.parameters)
    output = request.output
    if output.vocabulary != "error":
        why = "method auto tries merges in the models' own tokens, so they need one vocabulary; leave it out"
        yield _problem(("output", "vocabulary"), why, output.vocabulary)
    if output.heads == "merged":
        why = "method auto evaluates every model with a head of its own; leave it out, or say per_model"
        yield _problem(("output", "heads"), why, output.heads)
    if output.align_ridge != ALIGN_RIDGE:
        why = f"method auto searches for it; leave it out (its default, {ALIGN_RIDGE:g}, is tried too)"
        yield _problem(("output", "align_ridge"), why, output.align_ridge)
    needing = [one for one in method.methods if one.needs_base]
    if needing and request.base is None:
        scaled = "" if "base" in METHODS[needing[0].name].needs else ", with a scale other than 1,"
        why = f"{_named(method, needing)}{scaled} cannot do without the common ancestor; name it as base"
        yield _problem(("base",), why, None)
    for index, candidate in enumerate(method.methods):
        for why in _misfits(candidate, request.models):
            yield _problem(
                ("method", AUTO.name, "candidates", index), f"candidate {candidate.name} {why}", candidate.name
            )


def _negative_weights(method: str, index: int, weight: PerTensor[Weight]) -> Iterator[InitErrorDetails]:
    """Yield an error for every weight below 0 of the model `index`."""
    if not is_ever_negative(weight):
        return
    takers = ", ".join(name for name, entry in METHODS.items() if entry.parameters.takes_negative_weights)
    why = f"Input should be greater than or equal to 0 in method {method}; methods that take others are {takers}"
    filters = filters_of(weight)
    parts: list[tuple[tuple[str | int, ...], Any]] = [((), weight)]
    if filters:
        parts = [((number, "value"), entry.value) for number, entry in enumerate(filters)]
    for place, value in parts:
        numbers = [((*place, i), one) for i, one in enumerate(value)] if isinstance(value, list) else [(place, value)]
        for at, number in numbers:
            if number < 0:
                yield _problem(("models", index, "weight", *at), why, number)


def _own_parameter_errors(method: MethodParameters, index: int, model: ModelRequest) -> Iterator[InitErrorDetails]:
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


def _check_slices(method: BaseParameters, request: MergeRequest) -> None:
    """Raise ValueError where slices and models do not name each other, or models have fields that stacking ignores."""
    models = [model.name for model in request.models]
    used = {part.model for part in method.stacked_slices}
    for name in sorted(used - set(models)):
        raise ValueError(f"a slice is of model '{name}'{did_you_mean(name, models)}; models are {', '.join(models)}")
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


def _slice_problems(
    method: MethodParameters, slices: Sequence[OutputSlice], request: MergeRequest
) -> Iterator[InitErrorDetails]:
    """Yield the reasons why the models cannot be merged slice by slice."""
    if method.statistics:
        why = f"method {method.name} measures whole models, and merges no slices of them; leave it out"
        yield _problem(("slices",), why, None)
    models = {model.name: model for model in request.models}
    used = {source.model for part in slices for source in part.sources}
    for name in sorted(models.keys() - used):
        yield _problem(("slices",), f"no slice is of model '{name}'; leave the model out", name)
    least, most = METHODS[method.name].models
    for index, part in enumerate(slices):
        for number, source in enumerate(part.sources):
            if source.model not in models:
                why = f"there is no model '{source.model}'{did_you_mean(source.model, list(models))}"
                yield _problem(("slices", index, "sources", number, "model"), why, source.model)
        taking = [source for source in part.sources if source.model in models and models[source.model].takes_part]
        if len(taking) < max(1, least) or (most is not None and len(taking) > most):
            why = (
                f"method {method.name} merges {METHODS[method.name].models_wanted} models; this slice has {len(taking)}"
            )
            yield _problem(("slices", index, "sources"), why, len(taking))
        if part.base_layers is not None and request.base is None:
            why = "there is no base; leave it out, or name the common ancestor as base"
            yield _problem(("slices", index, "base_layers"), why, part.base_layers)


MEASURING = ", ".join(name for name, entry in METHODS.items() if "dataset" in entry.needs)


def _measurable(method: Any) -> Any:
    if isinstance(method, dict) and method.get("name") == AUTO.name:
        raise ValueError(f"method auto tries merges, and nothing is merged here; name one that measures: {MEASURING}")
    return check_name(method)


class ScoreRequest(JobRequest[ScoredModelRequest]):
    """Body of `POST /scores`. The models need not fit each other."""

    method: Annotated[Method, BeforeValidator(_measurable)] = MASK_FISHER.parameters()
    """Method whose statistics are computed. Parameters of merging alone only change where `examples: "auto"` stops: it
    stops for each model by itself, as if merged with one of the same scores, errors and weight."""

    @field_validator("method")
    @classmethod
    def _measures(cls, method: Method) -> Method:
        if not method.statistics:
            raise ValueError(f"method {method.name} measures nothing of a model; methods that do are {MEASURING}")
        return method


def not_available_yet(request: MergeRequest | ScoreRequest) -> list[tuple[str, str]]:
    """Return (field, why) of everything that the schema knows and this version cannot do, which is refused."""
    return [(field, "is not available yet; leave it out") for field in _later(request)]


def _later(request: MergeRequest | ScoreRequest) -> Iterator[str]:
    if isinstance(request, MergeRequest):
        used = {
            "webhook": request.webhook is not None,
            "priority": request.priority != 0,
            "device": request.device == "cuda",
            "output.publish": request.output.publish is not None,
        }
        yield from (field for field, is_used in used.items() if is_used)
    for index, model in enumerate(request.models):
        parts = {"dataset": model.dataset}
        if isinstance(model, ModelRequest):
            parts["evaluation"] = model.evaluation
        for part, rows in parts.items():
            for column in LATER_COLUMNS:
                if rows is not None and getattr(rows, column) is not None:
                    yield f"models.{index}.{part}.{column}"
