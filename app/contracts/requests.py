"""The whole schema of requests for jobs."""

import json
from collections.abc import Mapping
from typing import Annotated, Any, Generic, Self, TypeVar

from pydantic import BeforeValidator, Field, ValidationError, field_validator, model_validator
from pydantic_core import PydanticCustomError

from app.contracts.devices import Device
from app.contracts.limits import HIGHEST_PRIORITY, LOWEST_PRIORITY
from app.contracts.models import MeasuredModelRequest, ModelRequest, ScoredModelRequest
from app.contracts.output import Output
from app.contracts.suitability import (
    acceptance_problems,
    check_slices,
    misfits,
    negative_weights,
    own_parameter_errors,
    problem,
    refuse,
    search_problems,
    slice_problems,
    unmeasured,
    unread_statistics,
    unused_measuring,
)
from app.contracts.webhooks import Webhook
from worker.engine.catalog.contracts.spec import Acceptance
from worker.engine.catalog.methods import (
    AUTO,
    MASK_FISHER,
    METHODS,
    AutoParameters,
    Method,
    check_name,
    default_candidates,
)
from worker.engine.catalog.primitives.slices import OutputSlice
from worker.engine.catalog.primitives.strict import Strict, did_you_mean
from worker.engine.catalog.primitives.values import filters_of

LONGEST_TITLE = 200
LONGEST_DEADLINE_S = 366 * 86_400
MOST_FILTERS = 1000  # filters of a request; each is matched against the names of all tensors

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
    """Method and its parameters, as `GET /methods` lists them."""
    models: Annotated[list[Model], Field(min_length=1, max_length=64)]
    """The models, in their order."""
    labels: Annotated[dict[LabelKey, LabelValue], Field(max_length=32, default_factory=dict)]
    """Labels by which `GET /jobs` can be filtered."""
    priority: Annotated[int, Field(ge=LOWEST_PRIORITY, le=HIGHEST_PRIORITY)] = 0
    """Waiting jobs of a higher priority start first; among equal ones tenants take turns. A tenant's limits may forbid
    high priorities."""
    deadline_seconds: Annotated[float, Field(gt=0, le=LONGEST_DEADLINE_S)] | None = None
    """Seconds that the job has from its acceptance, including its time in the queue and all attempts. A job that has
    not ended by then fails with `timeout` and publishes nothing. A retry has the same time again. Null: no limit."""
    webhook: Webhook | None = None
    """Receiver that is told of the job's events, signed with the secret of the caller's key."""
    device: Device | None = None
    """Device to compute on: only workers that have it take the job, and it waits while none is alive. Null: any
    worker."""

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
        refuse(
            type(self), (e for index, model in enumerate(self.models) for e in unmeasured(self.method, index, model))
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
    """How the result is written."""
    strict_filters: bool = True
    """Whether a filter that matches no tensor is refused; otherwise the result has a note of it."""
    notes: Annotated[list[Annotated[str, Field(max_length=1000)]], Field(max_length=100, default_factory=list)]
    """Notes with which the result begins, such as those of a translation about what it left out of a recipe."""
    accept: Acceptance | None = None
    """What the merge must reach on the evaluation rows for the result to be `accepted`; of `auto`, on their held-out
    half."""
    evaluate: bool = True
    """Whether to compare expert, plain average and merge on each model's evaluation rows."""

    @model_validator(mode="after")
    def _method_may_keep_heads(self) -> Self:
        if self.method.aligns_heads or "align_heads" in self.output.model_fields_set:
            return self
        return self.model_copy(update={"output": self.output.model_copy(update={"align_heads": False})})

    @model_validator(mode="after")
    def _alignment_has_an_effect(self) -> Self:
        if not self.output.align_heads:
            why = "has no effect where heads are kept as they are; leave it out, or set align_heads to true"
            refuse(type(self), (problem(("output", name), why, v) for name, v in self.output.alignment.items()))
        return self

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
            method = search.with_default_candidates(names)
        except ValidationError as invalid:
            errors = [problem(("method", AUTO.name, *error["loc"]), error["msg"], names) for error in invalid.errors()]
            raise ValidationError.from_exception_data(type(self).__name__, errors) from invalid
        return self.model_copy(update={"method": method})

    @model_validator(mode="after")
    def _can_be_searched(self) -> Self:
        if self.method.search is not None:
            if self.slices is not None:
                why = "method auto merges whole models; leave it out"
                refuse(type(self), [problem(("slices",), why, None)])
            refuse(type(self), search_problems(self.method, self))
            return self
        for index, model in enumerate(self.models):
            if model.min_retention is not None:
                why = f"is for the method auto, and method {self.method.name} makes but one merge; leave it out"
                refuse(type(self), [problem(("models", index, "min_retention"), why, model.min_retention)])
        return self

    @model_validator(mode="after")
    def _statistics_suit_the_method(self) -> Self:
        refuse(type(self), (e for i, model in enumerate(self.models) for e in unread_statistics(self.method, i, model)))
        if self.method.search is None:
            [method] = self.method.methods
            refuse(type(self), unused_measuring(method, self.models))
        return self

    @model_validator(mode="after")
    def _models_can_be_merged(self) -> Self:
        if self.method.search is not None:
            return self
        if self.method.needs_base and self.base is None:
            [method] = self.method.methods
            why = f"method {method.name}" if "base" in METHODS[method.name].needs else method.needs_base_by
            raise ValueError(f"{why} merges differences from the common ancestor; name it as base")
        if self.method.refits_layers and self.output.vocabulary != "error":
            raise ValueError(
                f"method {self.method.name} compares experts and merge token by token, so they need one vocabulary; "
                "leave out output.vocabulary"
            )
        if self.method.stacked_slices:
            check_slices(self.method, self)
        elif self.slices is not None:
            [method] = self.method.methods
            refuse(type(self), slice_problems(method, self.slices, self))
        return self

    @model_validator(mode="after")
    def _settings_are_of_an_input(self) -> Self:
        named, names = self.output.config_from, [model.name for model in self.models]
        known = [*names, *(["base"] if self.base is not None else [])]
        if named is not None and named not in known:
            why = f"is no model's name{did_you_mean(named, known)}"
            refuse(type(self), [problem(("output", "config_from"), why, named)])
        return self

    @model_validator(mode="after")
    def _acceptance_can_be_judged(self) -> Self:
        if self.accept is not None:
            refuse(type(self), acceptance_problems(self.accept, self.evaluate, self.models))
        return self

    @model_validator(mode="after")
    def _filters_are_few(self) -> Self:
        settings = [value for method in self.method.methods for value in method.settings.values()]
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
            refuse(type(self), (e for i, m in enumerate(self.models) for e in negative_weights(name, i, m.weight)))
        return self

    @model_validator(mode="after")
    def _own_parameters_suit_the_method(self) -> Self:
        if self.method.search is None:
            [method] = self.method.methods
            refuse(type(self), (e for i, m in enumerate(self.models) for e in own_parameter_errors(method, i, m)))
        return self

    @model_validator(mode="after")
    def _models_suit_the_method(self) -> Self:
        if self.method.search is None:
            [method] = self.method.methods
            for why in misfits(method, self.models, counts=self.slices is None):
                raise ValueError(f"method {method.name} {why}")
        return self


MEASURING = ", ".join(
    name
    for name, entry in METHODS.items()
    if "dataset" in entry.needs and entry.parameters.model_validate({"name": name}).statistics
)


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


def as_recipe(request: Mapping[str, Any]) -> dict[str, Any]:
    """Return a request as the artifact's `recipe.json` has it: without whom its job tells.

    Artifacts are passed on, and a webhook's URL may hold secrets.
    """
    return {name: value for name, value in request.items() if name != "webhook"}
