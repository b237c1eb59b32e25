"""Checks a request without reading weights: inspects the inputs that it names, and plans the job."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from app.contracts.errors import FieldError, Problem, ProblemError
from app.contracts.models import Dataset, Evaluation
from app.contracts.plans import Plan, PlannedModel
from app.contracts.references import Reference, ReferenceError
from app.contracts.requests import MergeRequest, ScoreRequest
from app.contracts.suitability import LEAST_EVALUATED
from app.storage.inputs import RootedPath
from app.storage.sources import Sources
from app.storage.sources.source import SourceUnavailable, StorageUnavailable
from worker.engine.catalog.checkpoints.adapters import inspect_model
from worker.engine.catalog.checkpoints.architectures import use_of
from worker.engine.catalog.checkpoints.companion_checks import check_generation, check_run_tokenizer
from worker.engine.catalog.checkpoints.info import CheckpointInfo
from worker.engine.catalog.checkpoints.inspection import inspect_checkpoint
from worker.engine.catalog.checkpoints.views import Views
from worker.engine.catalog.contracts.spec import given_of_all, models_beside
from worker.engine.catalog.data.rows import RowReader, check_first_rows
from worker.engine.catalog.data.spec import Columns, DatasetSpec
from worker.engine.catalog.families import Family
from worker.engine.catalog.methods import METHODS
from worker.engine.catalog.planning.given import given_tensors
from worker.engine.catalog.planning.holding import holdings
from worker.engine.catalog.planning.memory import MemoryNeeds, estimate, most_new_tokens
from worker.engine.catalog.planning.parameters import parameter_problems
from worker.engine.catalog.planning.plan import (
    MergePlan,
    require_reader,
    required_family,
    required_task,
    unavailable_setting,
    usable_sizes,
)
from worker.engine.catalog.planning.planner import misfit, plan_job, plan_merge
from worker.engine.catalog.planning.stacking import layers_of_models
from worker.engine.catalog.primitives.errors import EngineError
from worker.engine.catalog.primitives.notes import in_order
from worker.engine.catalog.tasks import (
    LabelMap,
    Task,
    check_estimator,
    check_metric,
    column_problems,
    family_of,
    label_map,
)

NO_ADAPTERS = "takes no adapters; merge it into its base first (method average with one model)"

Inspect = Callable[[Path, str], CheckpointInfo]
At = Callable[[str], None]
"""Called with the field of the request that is checked next."""


class Accepted(BaseModel):
    """A request that was accepted, with the facts that its job needs."""

    request: dict[str, Any]
    """The request with its defaults filled in."""
    states: dict[str, str]
    """States of inputs by their references, except those that never change or are not watched."""
    plan: Plan | None
    """The plan of a merge; None for other kinds of job."""


class Checker:
    """Inspects the inputs that one request names. It needs no Redis, and leaves nothing behind.

    Args:
        at: is called before each step.
        scratch: folder for temporary files, which its owner removes; None for one that is removed before the answer.
    """

    def __init__(self, sources: Sources, at: At, scratch: Path | None = None) -> None:
        self._sources = sources
        self._at = at
        self._views = Views(scratch)
        self._beside: list[Reference] = []  # rows and statistics

    def check(self, request: MergeRequest | ScoreRequest) -> Accepted:
        """Check a request. Raises ProblemError when the recipe or an input is refused."""
        with self._views:
            return self._merge(request) if isinstance(request, MergeRequest) else self._scores(request)

    def _scores(self, request: ScoreRequest) -> Accepted:
        accepted = request.model_dump(mode="json")
        accepted["name"] = request.title
        checkpoints = [self._checkpoint(_checkpoint_field(i), m.checkpoint) for i, m in enumerate(request.models)]
        for index, (model, info) in enumerate(zip(request.models, checkpoints, strict=True)):
            with _refusing(_checkpoint_field(index)):
                plan = plan_merge([info])
                task = required_task(plan)
                require_reader(info)
                check_run_tokenizer(info)
                usable_sizes(info, required_family(plan))
            _refuse(parameter_problems(plan, request.method))
            kept = accepted["models"][index]
            kept["checkpoint"] = info.source
            _check_estimators(request, task)
            where = f"models.{index}.dataset"
            source = self._rows(where, model.dataset, task, info, request.method.needs_labels)
            kept["dataset"] |= {"source": source, **task.rows.columns(model.dataset)}
        return Accepted(request=accepted, states=self._states(checkpoints), plan=None)

    def _merge(self, request: MergeRequest) -> Accepted:
        base = self._checkpoint("base", request.base) if request.base else None
        inspect = partial(inspect_model, base=base)
        if request.method.stacked_slices:
            inspect = partial(inspect, without_base=f"method {request.method.name} {NO_ADAPTERS}")
        checkpoints = [
            self._checkpoint(_checkpoint_field(index), model.checkpoint, inspect)
            for index, model in enumerate(request.models)
        ]
        self._at("models")
        family = family_of(checkpoints[0])
        if request.method.search and request.output.heads == "merged" and family and not family.head.merges:
            why = "method auto evaluates every model with a head of its own; leave it out, or say per_model"
            _refuse([("output.heads", why)])
        request, left_out = _runnable(request, family)
        plan = _planned(request, checkpoints, base)
        with _refusing("output.chat_template"):
            doubts = _check_templates(plan, request.output.chat_template)
        plan = replace(plan, notes=tuple(in_order([*doubts, *left_out, *plan.notes])))
        if plan.family is None:
            _refuse_rows(request, plan)
        _refuse(_unbeatable(request, plan))
        if request.layers is not None:
            counts = layers_of_models(plan) if plan.is_of_slices else [plan.layers]
            if set(counts) != {request.layers}:
                found = " and ".join(map(str, sorted(set(counts))))
                _refuse([("layers", f"the models have {found} layers, the recipe says {request.layers}")])
        weights, own = [m.weight for m in request.models], [m.parameters for m in request.models]
        _refuse(parameter_problems(plan, request.method, weights, own, strict_filters=request.strict_filters))
        if plan.merges_heads:
            why = "has no effect where heads are merged; leave it out"
            _refuse((f"output.{name}", why) for name in request.output.alignment)
        if _loads_models(request, plan):
            for index, info in enumerate(plan.checkpoints):
                with _refusing(_checkpoint_field(index)):
                    require_reader(info)
                    check_run_tokenizer(info)
                    check_generation(info)
                    usable_sizes(info, required_family(plan))
        accepted = request.model_dump(mode="json")
        accepted["name"] = request.title
        accepted["notes"] += left_out
        accepted["base"] = None if plan.base is None else plan.base.source
        accepted["output"]["heads"] = "merged" if plan.merges_heads else "per_model"
        accepted["output"]["align_heads"] = _aligns(request, plan)
        given_bytes = 0
        for index, (model, task) in enumerate(zip(request.models, plan.tasks, strict=True)):
            where = f"models.{index}"
            kept = accepted["models"][index]
            kept["checkpoint"] = plan.checkpoints[index].source
            for name, reference in model.given.items():
                nbytes, found = self._statistics(f"{where}.statistics.{name}", reference, plan, index)
                kept["statistics"][name] = found
                given_bytes += nbytes if model.takes_part else 0
            if task is None:
                continue
            _check_estimators(request, task)
            info = plan.checkpoints[index]
            if model.dataset is not None:
                reads_labels = request.method.reads_labels(model.given)
                source = self._rows(f"{where}.dataset", model.dataset, task, info, reads_labels)
                kept["dataset"] |= {"source": source, **task.rows.columns(model.dataset)}
            if model.evaluation is not None:
                metric = model.evaluation.metric or task.metrics[0]
                with _refusing(f"{where}.evaluation.metric"):
                    check_metric(metric, task, model.evaluation.source)
                kept["evaluation"]["metric"] = metric
                least = LEAST_EVALUATED if request.method.search else 1
                evaluation = model.evaluation
                reader = task.reader(metric)
                if reader.label is not None and reader.label_column(evaluation) is None:
                    evaluation = evaluation.model_copy(update={reader.label: reader.label})
                kept["evaluation"] |= reader.columns(evaluation)
                source = self._rows(f"{where}.evaluation", evaluation, task, info, True, least, metric)
                kept["evaluation"]["source"] = source
        return Accepted(
            request=accepted,
            states=self._states(plan.all_checkpoints),
            plan=_plan(request, accepted, plan, given_bytes),
        )

    def _checkpoint(self, field: str, reference: str, inspect: Inspect = inspect_checkpoint) -> CheckpointInfo:
        """Read the headers of a checkpoint; its source is the reference to keep."""
        self._at(field)
        with _refusing(field):
            kept = self._sources.resolve(reference, "checkpoint")
            with self._sources.inspect(kept) as place:
                return inspect(self._views.open(place.path, str(kept), place.root), str(kept))

    def _statistics(self, field: str, reference: str, plan: MergePlan, index: int) -> tuple[int, str]:
        """Check the headers of a model's statistics. Returns the tensors' bytes, and the reference to keep."""
        self._at(field)
        with _refusing(field):
            kept = self._sources.resolve(reference, "statistics")
            with self._sources.inspect(kept) as place:
                tensors = given_tensors(plan, index, self._views, place.path, str(kept), place.root)
                self._beside.append(kept)
                return sum(tensor.nbytes for tensor in tensors.values()), str(kept)

    def _rows(
        self,
        field: str,
        rows: Dataset | Evaluation,
        task: Task,
        info: CheckpointInfo,
        needs_labels: bool,
        least_texts: int = 1,
        metric: str | None = None,
    ) -> str:
        """Check rows, and return the reference to keep. The worker checks rows of the hub."""
        self._at(field)
        _refuse((f"{field}.{name}", why) for name, why in column_problems(rows, task, needs_labels, metric))
        if rows.messages is not None:
            with _refusing(f"{field}.messages"):
                _check_conversations(rows.source, info)
        labels = None
        if needs_labels and task.rows.label is not None:
            with _refusing(f"{field}.label_names"):
                labels, _ = label_map(task, rows.source, rows.label_names)
        with ExitStack() as held:
            with _refusing(f"{field}.source"):
                kept = self._sources.resolve(rows.source, "rows")
                place = held.enter_context(self._sources.inspect_rows(kept))
                self._beside.append(kept)
            if place is not None:
                self._check_rows(field, rows, place, labels, least_texts, task.reader(metric))
        return str(kept)

    def _check_rows(
        self,
        field: str,
        rows: Dataset | Evaluation,
        place: RootedPath,
        labels: LabelMap | None,
        least_texts: int,
        reader: RowReader,
    ) -> None:
        for name in ("config", "split"):
            if getattr(rows, name) is not None:
                message = "is for data sets of the hub; a file is one split"
                errors = [FieldError(field=f"{field}.{name}", message=message)]
                raise ProblemError(Problem.INVALID_REQUEST, _sentence(errors), errors)
        columns = rows.model_dump(include=set(Columns.model_fields))
        with _refusing(field):
            file = self._views.open_file(place.path, rows.source, place.root)
            spec = DatasetSpec(source=rows.source, path=file, folder=place.path.parent, root=place.root, **columns)
            check_first_rows(spec, labels, least_texts, reader)

    def _states(self, checkpoints: Sequence[CheckpointInfo]) -> dict[str, str]:
        with _refusing("models"):
            states = {info.source: self._sources.state(Reference.parse(info.source), info) for info in checkpoints}
            states = {**{str(other): self._sources.state(other, None) for other in self._beside}, **states}
        return {source: state for source, state in states.items() if state is not None}


def _check_estimators(request: MergeRequest | ScoreRequest, task: Task) -> None:
    with _refusing("method.estimator"):
        for asked in (method.gradients for method in request.method.methods):
            if asked is not None:
                check_estimator(asked.estimator, task)


def _runnable(request: MergeRequest, family: Family | None) -> tuple[MergeRequest, list[str]]:
    """Leave out default candidates of `auto` that cannot merge models of a family, and return notes of them.

    Candidates that were asked for stay, and are refused.
    """
    search = request.method.search
    if search is None or search.asks_for_candidates:
        return request, []
    left_out = {one.name: why for one in search.methods if (why := misfit(one, family)) is not None}
    if not left_out:
        return request, []
    names = [one.name for one in search.methods if one.name not in left_out]
    reduced = request.model_copy(update={"method": search.with_default_candidates(names)})
    return reduced, [f"auto did not try a candidate: {why}" for why in left_out.values()]


def _planned(request: MergeRequest, checkpoints: Sequence[CheckpointInfo], base: CheckpointInfo | None) -> MergePlan:
    """Plan the merge. If that fails, the fault is the base's if the models alone can be planned.

    Where the base's vocabulary or settings count, the models alone may have no plan, and the fault is theirs.
    """
    output, names = request.output, [model.name for model in request.models]
    planned = partial(plan_job, request.method, names, checkpoints, output.spec, slices=request.slices)
    try:
        return planned(base)
    except EngineError:
        base_counts = output.vocabulary != "error" or (output.config_from == "base" and "base" not in names)
        if base is not None and not base_counts:
            with _refusing("models"):
                planned()
        with _refusing("models" if base is None or base_counts else "base"):
            raise


def _check_templates(plan: MergePlan, asked: str | None) -> list[str]:
    from worker.engine.catalog.planning.templates import (
        check_templates,  # imported here because it loads Jinja, which only inspectors need
    )

    return check_templates(plan, asked)


def _check_conversations(source: str, info: CheckpointInfo) -> None:
    from worker.engine.catalog.planning.templates import check_conversations  # here for the same reason

    check_conversations(source, info)


def _plan(request: MergeRequest, accepted: dict[str, Any], plan: MergePlan, given_bytes: int) -> Plan:
    vocabulary, method = plan.vocabulary, request.method
    measured = _measured(request)
    evaluates = _evaluates(request)
    aligns = _aligns(request, plan) and any(model.dataset for model in request.models)
    aligned_on = _aligned_on(request) if aligns else 0
    longest = plan.family.max_tokens(plan.checkpoints[0].config) if plan.family else 0
    needs = MemoryNeeds(
        method,
        given=given_of_all(model.given for model in request.models if model.takes_part),
        loads_models=_loads_models(request, plan),
        models_beside=models_beside(evaluates, aligns, method),
        tokens_held=measured * longest if method.refits_layers else 0,
        outputs_held=aligned_on if method.search else 0,
        new_tokens=most_new_tokens(plan, [model.evaluation if evaluates else None for model in request.models]),
    )
    return Plan(
        bytes_to_read=plan.bytes_to_read + given_bytes,
        bytes_to_write=plan.bytes_to_write,
        peak_memory_bytes=estimate(plan, needs),
        least_memory_bytes=min(estimate(plan, replace(needs, holding=way)) for way in holdings(plan, method)),
        examples=measured,
        aligned_examples=aligned_on,
        candidates=[candidate.name for candidate in method.methods] if method.search else None,
        trials=method.search.trials if method.search else None,
        tensors=len(plan.backbone),
        owners=dict(plan.owners()),
        models=[
            PlannedModel(
                name=model.name,
                architecture=info.architecture,
                task=f"{task.name}, {task.outputs} outputs" if task else use_of(info.config).pipeline_tag or "",
                head=_becomes(request, plan, index),
                tokens=vocabulary and vocabulary.shared[index],
                new_tokens=vocabulary and vocabulary.introduced[index],
            )
            for index, (model, info, task) in enumerate(zip(request.models, plan.checkpoints, plan.tasks, strict=True))
        ],
        tokens=vocabulary and vocabulary.tokens,
        notes=list(plan.notes),
        request=accepted,
    )


def _checkpoint_field(index: int) -> str:
    return f"models.{index}.checkpoint"


def _refuse_rows(request: MergeRequest, plan: MergePlan) -> None:
    """Refuse measuring, alignment and evaluation where the architecture has no table, which they need."""
    first = plan.checkpoints[0]
    name, family = first.architecture or first.model_type, family_of(first)
    setting = None if family is None else unavailable_setting(first, family)
    errors = []
    does = "evaluates" if request.method.search else "measures"
    given = given_of_all(model.given for model in request.models if model.takes_part)
    if request.method.statistics - given or request.method.search:
        others = ", ".join(other for other, entry in METHODS.items() if "dataset" not in entry.needs)
        why = f"for which {name} has no table" if setting is None else f"and cannot here: {setting}"
        message = f"{request.method.name} {does} models, {why}; methods without are {others}"
        errors.append(FieldError(field="method.name", message=message))
    for index, model in enumerate(request.models):
        for part, rows in (("dataset", model.dataset), ("evaluation", model.evaluation)):
            if rows is not None:
                why = f"{name}, for which there is no table" if setting is None else f"{name}: {setting}"
                message = f"nothing is measured of {why}; leave it out"
                errors.append(FieldError(field=f"models.{index}.{part}", message=message))
    if errors:
        raise ProblemError(Problem.NOT_AVAILABLE, _sentence(errors), errors)


def _unbeatable(request: MergeRequest, plan: MergePlan) -> Iterator[tuple[str, str]]:
    """Yield a problem if the merge must beat a base that cannot be evaluated."""
    if request.method.search is None or request.base is None or plan.lacking_in_base is None:
        return
    for index, baseline in enumerate(request.method.search.must_beat):
        if baseline == "base":
            why = f"the base cannot be evaluated, since it lacks tensor {plan.lacking_in_base}; leave it out"
            yield f"method.must_beat.{index}", why


def _aligns(request: MergeRequest, plan: MergePlan) -> bool:
    """Return whether heads are aligned if the models have rows for it."""
    return request.output.align_heads and not plan.merges_heads


def _measured(request: MergeRequest) -> int:
    """Return the largest number of rows that would be measured, over all models."""
    measured = [model for model in request.models if model.dataset and model.takes_part]
    counts = ((request.method.rows_measured(model.given), model.dataset) for model in measured)
    return sum(min(examples, (rows and rows.limit) or examples) for examples, rows in counts)


def _aligned_on(request: MergeRequest) -> int:
    """Return the largest number of rows that heads would be aligned on, over all models."""
    most = request.output.alignment_rows
    return sum(min(most, rows.limit or most) for model in request.models if (rows := model.dataset) is not None)


def _evaluates(request: MergeRequest) -> bool:
    return request.evaluate and any(model.evaluation for model in request.models)


def _loads_models(request: MergeRequest, plan: MergePlan) -> bool:
    """Return whether the job runs its models, instead of only merging their weights."""
    aligns = _aligns(request, plan) and any(model.dataset for model in request.models)
    return bool(_measured(request)) or _evaluates(request) or aligns


def _becomes(request: MergeRequest, plan: MergePlan, index: int) -> str:
    """Say how a model's head is treated in the result."""
    if plan.merges_heads:
        return "merged like the rest into model"
    model = request.models[index]
    names = ", ".join(tensor.slot.stored for tensor in plan.heads[index])
    if not request.output.align_heads:
        return f"{names}: kept as it is in models/{model.name}"
    if model.dataset is None:
        return f"{names}: kept as it is in models/{model.name}, since the model has no dataset to align it on"
    return f"{names}: kept in models/{model.name}, its last layer aligned to the merged backbone"


@contextmanager
def _refusing(field: str) -> Iterator[None]:
    """Turn refusals of inputs, hub and the engine's catalog into a problem that names the request's field."""
    try:
        yield
    except ReferenceError as error:
        problem = Problem.INVALID_REQUEST if error.available else Problem.NOT_AVAILABLE
        errors = [FieldError(field=field, message=str(error))]
        raise ProblemError(problem, _sentence(errors), errors) from error
    except SourceUnavailable as error:
        away = Problem.STORAGE_UNAVAILABLE if isinstance(error, StorageUnavailable) else Problem.HUB_UNAVAILABLE
        errors = [FieldError(field=field, message=str(error))]
        raise ProblemError(away, _sentence(errors), errors, **{"Retry-After": "10"}) from error
    except EngineError as error:
        problem = next(p for p in Problem if p.code == error.code)
        field = str(error.detail.get("field", field))
        raise ProblemError(problem, error.message, [FieldError(field=field, message=error.message)]) from error


def _refuse(problems: Iterable[tuple[str, str]]) -> None:
    """Raise ProblemError with the problems of the request, each (field, why), if there are any."""
    errors = [FieldError(field=field, message=message) for field, message in problems]
    if errors:
        raise ProblemError(Problem.INVALID_REQUEST, _sentence(errors), errors)


def _sentence(errors: list[FieldError]) -> str:
    return "; ".join(f"{error.field}: {error.message}" for error in errors)
