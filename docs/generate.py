"""Write docs/reference.md from the code, so that it cannot say anything else. A test holds it up to date."""

from collections.abc import Collection, Iterator
from pathlib import Path

from pydantic import BaseModel

from app.contracts.errors import Problem
from app.contracts.events import KINDS, EventKind, LogCode
from app.contracts.jobs import ErrorCode
from app.contracts.settings import Settings
from app.main import create_app
from app.observability.metrics import METRICS as SERVICE_METRICS
from worker.engine.catalog.families import FAMILIES
from worker.engine.catalog.methods import AUTO, METHODS, Range, SearchSpace
from worker.engine.catalog.tasks import architectures_of

TARGET = Path(__file__).parent / "reference.md"

JOB_ERRORS = {
    ErrorCode.INVALID_REQUEST: "the recipe asks for what cannot be done",
    ErrorCode.INVALID_CHECKPOINT: "a checkpoint is broken, unsafe or unknown; the message names file or tensor",
    ErrorCode.INCOMPATIBLE_CHECKPOINTS: "two checkpoints do not fit each other; the message names what differs",
    ErrorCode.INVALID_DATASET: "a file, column, row or label; the message names the line",
    ErrorCode.INVALID_STATISTICS: "a file of statistics is broken or not of its model; the message names the tensor",
    ErrorCode.NUMERICAL_ERROR: "a gradient or a prediction left the finite numbers",
    ErrorCode.OUT_OF_MEMORY: "the work needs more memory than the worker has",
    ErrorCode.DISK_FULL: "no space is left for the artifact",
    ErrorCode.TIMEOUT: "the job did not end within its `deadline_seconds`; a retry has as long again",
    ErrorCode.WORKER_LOST: "the job lost its worker too often; a retry may succeed",
    ErrorCode.STORAGE_ERROR: "the hub does not answer, the data folder cannot be used, or too many files are open",
    ErrorCode.INTERNAL: "a fault of the service; its log has the trace",
}


LOG_CODES = {
    LogCode.ATTEMPT_STARTED: "a worker took the job; the message names it",
    LogCode.ATTEMPT_LOST: "its worker or engine process ended, or hung, before the attempt ended",
    LogCode.ATTEMPT_HANDED_BACK: "its worker was stopped in good order",
    LogCode.SCORING_CUT: "the job's scoring goes on in shards, on all workers",
    LogCode.SHARDS_DONE: "all shards are done, and the job goes on with what they measured",
    LogCode.DELIVERY_DROPPED: "a delivery to the webhook was dropped, since a hundred newer ones wait",
    LogCode.NOTE: "what the work found worth saying, as that rows were truncated",
}


def reference(data_dir: Path) -> str:
    """The whole page. `data_dir` is where the app that is asked for its routes may make its folders."""
    return "\n".join(_lines(data_dir)) + "\n"


def _lines(data_dir: Path) -> Iterator[str]:
    yield "# Reference"
    yield ""
    yield "Written by `make docs`. The schema of every body is at `/openapi.json`, to try out at `/docs`."
    yield ""
    yield "## Routes"
    yield ""
    yield from _table(["request", "what it does"], _routes(data_dir))
    yield ""
    yield "## Events"
    yield ""
    yield "`GET /jobs/{job_id}/events` sends server-sent events of three kinds; ids count up, and `data` is JSON."
    yield ""
    yield from _table(["event", "data"], [[f"`{kind.value}`", _fields(KINDS[kind])] for kind in EventKind])
    yield ""
    yield from _table(["code of a log event", "meaning"], [[f"`{code.value}`", LOG_CODES[code]] for code in LogCode])
    yield ""
    yield "## Methods"
    yield ""
    yield (
        "A parameter that differs by tensor is a number, a list of numbers from the first layer to the last, or a "
        "list of filters with values: see [Weights and parameters by tensor](methods.md#weights-and-parameters-by-"
        "tensor). So is `weight` of a model. A parameter that differs by model too can be in `parameters` of a model."
        " The column *tried* has the values that `auto` tries; it tries `scale` only if there is a base."
    )
    for entry in (*METHODS.values(), AUTO):
        yield ""
        yield f"### {entry.name}"
        yield ""
        yield f"`{entry.formula}`"
        yield ""
        needs = ", ".join(entry.needs) or "checkpoints alone"
        yield f"Source: {entry.source}. Needs: {needs}. Models: {entry.models_wanted}."
        yield ""
        properties = entry.parameters.model_json_schema()["properties"]
        rows = [
            [
                f"`{n}`",
                f"`{p.get('default')}`",
                _differs(n, "oneOf" in p, entry.parameters.per_model),
                _tried(entry.search, n),
                _meaning(p),
            ]
            for n, p in properties.items()
            if n != "name"
        ]
        yield from _table(["parameter", "default", "differs by", "tried", "meaning"], rows)
    yield ""
    yield "## Architectures"
    yield ""
    families = [
        [f"`{name}`", ", ".join(f"`{one}`" for one in architectures_of(family))] for name, family in FAMILIES.items()
    ]
    yield from _table(["model_type", "architectures"], families)
    yield ""
    yield "## Settings"
    yield ""
    yield "`maskmerge settings` prints them with their current values."
    yield ""
    settings = [
        [f"`{name}`", f"`{value}`" if value else "", meaning]
        for name, value, meaning in Settings.model_construct().describe()
    ]
    yield from _table(["variable", "default", "meaning"], settings)
    yield ""
    yield "## Metrics"
    yield ""
    yield (
        "`GET /metrics` tells them, see [monitoring](monitoring.md#metrics), beside those about the API's process that "
        "begin with `process_`."
    )
    yield ""
    metrics = [
        [f"`{metric.name}`", metric.kind, ", ".join(f"`{name}`" for name in metric.label_names), metric.meaning]
        for metric in SERVICE_METRICS
    ]
    yield from _table(["metric", "type", "labels", "meaning"], metrics)
    yield ""
    yield "## Answers that are not a success"
    yield ""
    yield "All are `application/problem+json` (RFC 9457) with these stable codes."
    yield ""
    yield from _table(["code", "status", "title"], [[f"`{p.code}`", str(p.status), p.title] for p in Problem])
    yield ""
    yield "## Errors of a failed job"
    yield ""
    yield from _table(["code", "meaning"], [[f"`{code.value}`", JOB_ERRORS[code]] for code in ErrorCode])


def _routes(data_dir: Path) -> list[list[str]]:
    app = create_app(Settings(redis_url="redis://127.0.0.1:1", data_dir=data_dir))
    return [
        [f"`{method.upper()} {path}`", operation.get("description", operation["summary"]).partition("\n")[0]]
        for path, operations in app.openapi()["paths"].items()
        for method, operation in operations.items()
    ]


def _fields(model: type[BaseModel]) -> str:
    return ", ".join(f"`{name}`" for name in model.model_fields)


def _differs(name: str, by_tensor: bool, per_model: Collection[str]) -> str:
    return "tensor, model" if name in per_model else "tensor" if by_tensor else ""


def _tried(space: SearchSpace, name: str) -> str:
    tried = space.get(name)
    if tried is None:
        return ""
    if isinstance(tried, Range):
        return f"{tried.low:g} to {tried.high:g}{', by ratio' if tried.log else ''}"
    return ", ".join(f"`{value}`" for value in tried.values)


def _meaning(schema: dict[str, object]) -> str:
    return str(schema.get("description", ""))


def _table(columns: list[str], rows: list[list[str]]) -> Iterator[str]:
    for row in (columns, ["---"] * len(columns), *rows):
        yield "| " + " | ".join(" ".join(cell.split()).replace("|", "\\|") for cell in row) + " |"


if __name__ == "__main__":
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        TARGET.write_text(reference(Path(folder)), encoding="utf-8")
