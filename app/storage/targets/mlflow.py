"""`mlflow:SERVER/MODEL`: a run with metrics and report, and a version of a registered model, on a server of MLflow.

It speaks MLflow's REST API (https://mlflow.org/docs/latest/rest-api.html) to the address that the settings give the
server. Files go through the server itself, so that neither it nor anybody else says where this service writes.
"""

import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

import httpx

from app.contracts.settings import MlflowServer, Settings
from app.contracts.targets import Target
from app.storage.targets.target import REQUEST_TIMEOUT_S, NotPublished, Receipt, WholeArtifact, quoted, token_in

API = "/api/2.0/mlflow"
CHUNK_BYTES = 1 << 20
LONGEST_VALUE = 500  # characters of a parameter, which older servers take


def publish(target: Target, artifact: WholeArtifact, settings: Settings) -> Receipt:
    """Log a run, and register its models: `MODEL`, or `MODEL-NAME` for each where heads are kept per model.

    The alias is set where the merge is accepted, and nowhere else.
    """
    name, _, model = target.name.partition("/")
    server = settings.mlflow_servers.get(name)
    if server is None:
        raise NotPublished("refused", f"this service knows no MLflow server '{name}' (MASKMERGE_MLFLOW_SERVERS)")
    if target.at is not None and artifact.accepted is not True:
        raise NotPublished(
            "refused", f"the alias {target.at} is set for a merge that is accepted, and this is not judged"
        )
    with _client(server) as client, _translated(name):
        registry = _Registry(client)
        run = registry.run(server.experiment, artifact)
        names = registered_models(model, artifact)
        found = {registered: registry.version(registered, run["run_id"]) for registered in names.values()}
        is_new = run["status"] != "FINISHED" or None in found.values()
        if run["status"] != "FINISHED":
            registry.log(run, artifact)
        versions = {
            registered: found[registered] or registry.register(registered, run, artifact.models[own], artifact)
            for own, registered in names.items()
        }
        for registered, version in versions.items() if target.at is not None else ():
            registry.call(
                "POST", "registered-models/alias", {"name": registered, "alias": target.at, "version": version}
            )
        page = f"{server.url.rstrip('/')}/#/experiments/{run['experiment_id']}/runs/{run['run_id']}"
        return Receipt(versions, page, is_new)


def registered_models(model: str, artifact: WholeArtifact) -> dict[str, str]:
    """Return the name of the registered model that each of the artifact's models is a version of."""
    return {own: f"{model}-{own}" if own else model for own in artifact.models}


class _Registry:
    """The calls of the REST API that publishing needs."""

    def __init__(self, client: httpx.Client) -> None:
        self._client = client

    def call(
        self, method: str, path: str, body: Mapping[str, Any], missing: str | None = None
    ) -> dict[str, Any] | None:
        """Call the API. Returns None where the server answers with the error code `missing`."""
        options: dict[str, Any] = {"params": body} if method == "GET" else {"json": body}
        response = self._client.request(method, f"{API}/{path}", **options)
        if response.is_error and missing is not None and _code(response) == missing:
            return None
        response.raise_for_status()
        found: dict[str, Any] = response.json()
        return found

    def _answer(self, method: str, path: str, body: Mapping[str, Any]) -> dict[str, Any]:
        return self.call(method, path, body) or {}

    def run(self, experiment: str, artifact: WholeArtifact) -> dict[str, Any]:
        """Return the run that an earlier attempt began for the same files, or a new one."""
        found = self.call("GET", "experiments/get-by-name", {"experiment_name": experiment}, "RESOURCE_DOES_NOT_EXIST")
        if found is None:
            made = self.call("POST", "experiments/create", {"name": experiment}, "RESOURCE_ALREADY_EXISTS")
            if made is None:  # another job has made it meanwhile
                found = self._answer("GET", "experiments/get-by-name", {"experiment_name": experiment})
            else:
                found = {"experiment": made}
        number = found["experiment"]["experiment_id"]
        marks = {"maskmerge_job": artifact.job, "maskmerge_content": artifact.content}
        wanted = " and ".join(f"tags.{key} = '{value}'" for key, value in marks.items())
        runs = self._answer("POST", "runs/search", {"experiment_ids": [number], "filter": wanted, "max_results": 1})
        for earlier in runs.get("runs", ()):
            return dict(earlier["info"])
        begun = self._answer(
            "POST",
            "runs/create",
            {
                "experiment_id": number,
                "run_name": quoted(artifact.name),
                "start_time": _now_ms(),
                "tags": [{"key": key, "value": value} for key, value in marks.items()],
            },
        )
        return dict(begun["run"]["info"])

    def log(self, run: Mapping[str, Any], artifact: WholeArtifact) -> None:
        """Log parameters, metrics and files, and end the run."""
        at = _now_ms()
        metrics = [{"key": key, "value": value, "timestamp": at, "step": 0} for key, value in _metrics(artifact.report)]
        params = [{"key": key, "value": str(value)[:LONGEST_VALUE]} for key, value in _parameters(artifact.report)]
        self.call(
            "POST", "runs/log-batch", {"run_id": run["run_id"], "metrics": metrics[:1000], "params": params[:100]}
        )
        root = _place(run["artifact_uri"])
        for name in sorted(artifact.digests):
            self._put(f"{root}/{name}", artifact.folder / name)
        self.call("POST", "runs/update", {"run_id": run["run_id"], "status": "FINISHED", "end_time": _now_ms()})

    def _put(self, place: str, path: Path) -> None:
        with path.open("rb") as stream:
            chunks = iter(lambda: stream.read(CHUNK_BYTES), b"")
            headers = {"Content-Length": str(path.stat().st_size), "Content-Type": "application/octet-stream"}
            address = f"/api/2.0/mlflow-artifacts/artifacts/{quote(place)}"
            self._client.put(address, content=chunks, headers=headers).raise_for_status()

    def version(self, name: str, run: str) -> str | None:
        """Return the version of a registered model that a run has made, if it has."""
        wanted = {"filter": f"name = '{name}' and run_id = '{run}'", "max_results": 1}
        for found in self._answer("GET", "model-versions/search", wanted).get("model_versions", ()):
            return str(found["version"])
        return None

    def register(self, name: str, run: Mapping[str, Any], folder: str, artifact: WholeArtifact) -> str:
        self.call("POST", "registered-models/create", {"name": name}, "RESOURCE_ALREADY_EXISTS")
        made = self._answer(
            "POST",
            "model-versions/create",
            {
                "name": name,
                "source": f"{run['artifact_uri']}/{folder}",
                "run_id": run["run_id"],
                "tags": [{"key": "maskmerge_job", "value": artifact.job}],
            },
        )
        return str(made["model_version"]["version"])


def _client(server: MlflowServer) -> httpx.Client:
    headers = {}
    if server.token_file is not None:
        headers["Authorization"] = f"Bearer {token_in(server.token_file, 'the MLflow server')}"
    return httpx.Client(base_url=server.url, headers=headers, timeout=REQUEST_TIMEOUT_S, follow_redirects=False)


def _place(uri: str) -> str:
    """Return where the server keeps a run's files. Raises NotPublished where it does not keep them itself."""
    parts = urlsplit(uri)
    if parts.scheme != "mlflow-artifacts" or ".." in parts.path.split("/"):
        message = f"the server keeps files at {parts.scheme}:, not itself; start it with --serve-artifacts"
        raise NotPublished("refused", message)
    return parts.path.strip("/")


def _metrics(report: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    for name in ("mean_retention", "min_retention"):
        if report.get(name) is not None:
            yield name, report[name]
    for model, found in (report.get("metrics") or {}).items():
        yield f"{model}/{found['metric']}", found["merged"]
        for version in ("expert", "average", "retention"):
            if found.get(version) is not None:
                yield f"{model}/{version}", found[version]


def _parameters(report: Mapping[str, Any]) -> Iterable[tuple[str, object]]:
    yield from ((f"method.{key}", value) for key, value in report["method"].items() if value is not None)
    yield from ((f"checkpoint.{model['name']}", model["checkpoint"]) for model in report["models"])


def _now_ms() -> int:
    return int(time.time() * 1000)


def _code(response: httpx.Response) -> str | None:
    try:
        found = response.json()
    except ValueError:
        return None
    return found.get("error_code") if isinstance(found, dict) else None


@contextmanager
def _translated(server: str) -> Iterator[None]:
    try:
        yield
    except httpx.HTTPStatusError as error:
        status = error.response.status_code
        told = f"the MLflow server {server} answers {status}"
        code = _code(error.response)
        told += f" ({quoted(code)})" if code else ""
        if status in (401, 403):
            raise NotPublished("denied", f"{told}; its token must be allowed to register models") from error
        if status >= 500 or status in (408, 429):
            raise NotPublished("unavailable", told, retryable=True) from error
        raise NotPublished("refused", told) from error
    except httpx.TransportError as error:
        message = f"the MLflow server {server} does not answer ({type(error).__name__})"
        raise NotPublished("unavailable", message, retryable=True) from error
    except (KeyError, TypeError, ValueError) as error:
        message = f"what answers as the MLflow server {server} does not speak its API ({type(error).__name__})"
        raise NotPublished("refused", message) from error
