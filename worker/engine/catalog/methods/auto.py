"""`auto`: several methods and their coefficients are tried on rows that each model names, and the best is published."""

from collections.abc import Sequence
from typing import Annotated, Any, Literal, get_args

from pydantic import BeforeValidator, Field, ValidationInfo, field_serializer, field_validator

from worker.engine.catalog.methods.entry import MethodEntry, Range, SearchSpace
from worker.engine.catalog.methods.merging import METHODS, Method, check_name
from worker.engine.catalog.methods.parameters import BaseParameters, MethodParameters
from worker.engine.catalog.methods.statistic import Statistic

MOST_CANDIDATES = 50
DEFAULT_CANDIDATES = (
    "average",
    "mask_fisher",
    "task_arithmetic",
    "ties",
    "tsv_m",
    "regmean",
    "mask_regmean",
    "aligned_regmean",
)
"""Candidates by default, as far as the models name what they need. Each is the best of its kind on some set of tasks
(docs/quality.md), and a trial of it takes seconds; `fisher` is left out, because measuring every parameter takes
minutes, and `featcal`, which takes as long as `aligned_regmean` and was above it on no combination beyond chance."""
WEIGHTS = Range(1 / 3, 3, log=True)
"""Factors of the weight that the recipe gives."""
ALIGN_RIDGE = Range(0.01, 1.0, log=True)
Baseline = Literal["base", "best_expert", "average", "task_arithmetic"]
NEED_BASE: tuple[Baseline, ...] = ("base", "task_arithmetic")
"""Baselines that there are only with the common ancestor."""


def _as_recipe(candidate: Any) -> Any:
    recipe = {"name": candidate} if isinstance(candidate, str) else candidate
    if not isinstance(recipe, dict | MethodParameters) or (isinstance(recipe, dict) and "name" not in recipe):
        raise ValueError('a candidate is a method\'s name, or an object that has it: "ties" or {"name": "ties"}')
    if isinstance(recipe, dict) and recipe.get("name") == "passthrough":
        raise ValueError("passthrough stacks layers, which has no coefficients to be searched for; leave it out")
    return check_name(recipe, CANDIDATES)


CANDIDATES = tuple(name for name in METHODS if name != "passthrough")
Candidate = Annotated[Method, BeforeValidator(_as_recipe, json_schema_input_type=Literal[CANDIDATES] | Method)]
"""A method by its name, or as it would be in a recipe: given parameters are kept, the others are searched for."""


class AutoParameters(BaseParameters):
    name: Literal["auto"] = "auto"
    candidates: Annotated[list[Candidate], Field(min_length=1, max_length=MOST_CANDIDATES)] | None = None
    """Methods, by name or with parameters that are kept as they are given; null: those that are good at most tasks, and
    for which the models name enough."""
    trials: Annotated[int, Field(ge=1, le=1000, validate_default=True)] = 40
    """Number of merges that are tried; each candidate's defaults come first."""
    objective: Literal["mean_retention", "min_retention"] = "mean_retention"
    """Number to maximise: mean or least retention over the models."""
    examples: Annotated[int, Field(ge=1, le=10_000_000)] = 512
    """Number of rows of each data set that are measured for candidates that name no number of their own."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """Seed that splits the evaluation rows and draws the merges to try."""
    must_beat: list[Baseline] = Field(default_factory=list, max_length=len(get_args(Baseline)))
    """Baselines that the chosen merge must do better than on the held-out rows for the result to be `accepted`: the
    base; every single expert; the plain average; task arithmetic, plain or tuned. What does not beat them is written
    all the same, and the first of the notes says what it does not beat."""
    must_beat_on: Literal["mean", "each"] = "mean"
    """Measure by which it must beat them: the mean retention over all models, or the metric on each model's rows."""
    must_keep_length: Annotated[list[Annotated[float, Field(ge=0)]], Field(min_length=2, max_length=2)] | None = None
    """Least and largest ratio of the mean length of the chosen merge's answers to that of the expert's, on each model's
    held-out rows, for the result to be `accepted`; where a language model writes them (metric `exact_match`)."""
    must_fit: Annotated[float, Field(ge=0, le=1)] | None = None
    """Least share of the chosen merge's answers in which the evaluation's pattern `answer` is found, on each model's
    held-out rows, for the result to be `accepted`."""

    @field_validator("candidates")
    @classmethod
    def _can_be_searched(cls, candidates: list[MethodParameters] | None) -> list[MethodParameters] | None:
        if any(getattr(candidate, "preset", None) is not None for candidate in candidates or ()):
            raise ValueError("a preset reads rows in an order of its own, so it cannot be a candidate; leave it out")
        if any("precision" in candidate.model_fields_set for candidate in candidates or ()):
            raise ValueError("precision is of the whole search; give it to auto instead of a candidate")
        return candidates

    @field_validator("trials")
    @classmethod
    def _each_is_tried(cls, trials: int, given: ValidationInfo) -> int:
        candidates = given.data.get("candidates")
        if candidates is not None and trials < len(candidates):
            raise ValueError(f"{len(candidates)} candidates need as many trials at least, and trials is {trials}")
        return trials

    @field_validator("must_keep_length")
    @classmethod
    def _is_in_order(cls, limits: list[float] | None) -> list[float] | None:
        if limits is not None and limits[0] > limits[1]:
            raise ValueError(f"the least ratio, {limits[0]:g}, is above the largest, {limits[1]:g}")
        return limits

    @field_serializer("candidates")
    def _as_given(self, candidates: list[MethodParameters] | None) -> list[dict[str, Any]] | None:
        """Leave defaults out, because these parameters are searched for."""
        if candidates is None:
            return None
        return [{"name": c.name, **c.model_dump(mode="json", exclude_unset=True)} for c in candidates]

    @property
    def methods(self) -> Sequence[MethodParameters]:
        """The candidates, with the search's precision, and with its `examples` where a candidate names none."""
        return [with_values(candidate, self._common(candidate)) for candidate in self.candidates or ()]

    @property
    def search(self) -> "AutoParameters":
        return self

    def with_default_candidates(self, names: Sequence[str]) -> "AutoParameters":
        """Return the same search over the candidates of these names, which nobody asked for. Raises ValidationError."""
        found = self.model_validate({**self.model_dump(exclude_unset=True), "candidates": names})
        found.model_fields_set.discard("candidates")
        return found

    @property
    def asks_for_candidates(self) -> bool:
        """Whether the candidates are those that a request names; otherwise those that do not suit may be left out."""
        return "candidates" in self.model_fields_set

    def _common(self, candidate: MethodParameters) -> dict[str, Any]:
        common: dict[str, Any] = {"precision": self.precision}
        if candidate.most_examples and "examples" not in candidate.model_fields_set:
            common["examples"] = self.examples
        return common

    @property
    def statistics(self) -> frozenset[Statistic]:
        return frozenset().union(*(method.statistics for method in self.methods))

    @property
    def most_examples(self) -> int:
        return max((method.most_examples for method in self.methods), default=0)

    @property
    def needs_base(self) -> bool:
        return any(method.needs_base for method in self.methods)

    @property
    def needs_labels(self) -> bool:
        return any(method.needs_labels for method in self.methods)

    @property
    def merges_rows(self) -> bool:
        return all(method.merges_rows for method in self.methods)

    def solving_bytes(self, outputs: int, inputs: int) -> int:
        return max((method.solving_bytes(outputs, inputs) for method in self.methods), default=0)

    @property
    def selects_by_rank(self) -> bool:
        return any(method.selects_by_rank for method in self.methods)

    @property
    def refits_layers(self) -> bool:
        return any(method.refits_layers for method in self.methods)

    @property
    def models_beside(self) -> int:
        """Number of models besides those of other methods: one in which merges are tried, and refitted merges."""
        return 3 + sum(method.refits_layers for method in self.methods)

    @property
    def most_batch_tokens(self) -> int:
        return max((method.most_batch_tokens for method in self.methods), default=super().most_batch_tokens)


def with_values(method: MethodParameters, values: dict[str, Any]) -> MethodParameters:
    """Return the method with further parameters set. Raises ValidationError."""
    return type(method).model_validate({"name": method.name, **method.model_dump(exclude_unset=True), **values})


def default_candidates(*, has_base: bool, has_datasets: bool, models: int) -> list[str]:
    """Return the names of the default candidates that can be run with a recipe's inputs."""
    given = {"base": has_base, "dataset": has_datasets, "evaluation": True}
    entries = [METHODS[name] for name in DEFAULT_CANDIDATES]
    return [e.name for e in entries if e.models[0] <= models and all(given[need] for need in e.needs)]


def space_of(candidate: MethodParameters, *, has_base: bool) -> SearchSpace:
    """Return the search space of a candidate, by parameter, in a fixed order."""
    space = METHODS[candidate.name].search
    open_ = {name: tried for name, tried in space.items() if name not in candidate.model_fields_set}
    return {name: tried for name, tried in open_.items() if name != "scale" or has_base}


AUTO = MethodEntry(
    name="auto",
    formula="argmax over candidates and their coefficients of the mean (or least) smoothed retention on search rows",
    source="this project's; candidates are proposed by Bergstra et al. 2011, Algorithms for Hyper-Parameter "
    "Optimization (TPE), and given up by Li et al. 2020, arXiv 1810.05934 (asynchronous successive halving)",
    needs=("evaluation",),
    parameters=AutoParameters,
)
