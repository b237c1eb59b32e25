"""`job:ID/MODEL`: models of earlier jobs' artifacts, so that merges can be chained."""

import json
import re
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager

from app.contracts.jobs import Gone, Outcome, Status, absence
from app.contracts.references import Reference, ReferenceError
from app.storage.artifacts.store import Artifact, ArtifactStore
from app.storage.files import Damaged
from app.storage.inputs import OnBytes, RootedPath
from app.storage.objects.errors import StorageAway
from app.storage.sources.source import FetchedInput, InputKind, Source, SourceContext, StorageUnavailable
from worker.engine.catalog.checkpoints.info import CheckpointInfo
from worker.engine.catalog.checkpoints.licences import CARD, joined_licence
from worker.engine.catalog.contracts.report import MANIFEST

IS_REMOTE = False
JOB = re.compile(r"(?P<job>[0-9a-f]{28})/(?P<model>(?!\.+$)[A-Za-z0-9._-]{1,64})")


def opened(context: SourceContext) -> Source:
    return JobSource(context.outcome, context.artifacts, context.held)


def job_named(text: str) -> str | None:
    """Return the id of the job whose model a reference names; None for other schemes and malformed references."""
    try:
        reference = Reference.parse(text)
        return _parsed(reference)[0] if reference.scheme == "job" else None
    except ReferenceError:
        return None


class JobSource:
    """Finds models in the artifacts of jobs that succeeded.

    Args:
        outcome, held: see `SourceContext`.
    """

    def __init__(
        self, outcome: Callable[[str], Outcome | Gone | None], artifacts: ArtifactStore, held: ExitStack
    ) -> None:
        self._outcome = outcome
        self._artifacts = artifacts
        self._held = held

    def resolve(self, reference: Reference, kind: InputKind) -> Reference:
        if kind == "rows":
            raise ReferenceError(f"'{reference}' names a model of a job, which has no rows; use local: or hf:")
        if kind == "statistics":
            raise ReferenceError(
                f"'{reference}' names a model of a job, which has no statistics; those that this service measured are "
                "in GET /scores, to be downloaded into a local root"
            )
        return reference

    @contextmanager
    def inspect(self, reference: Reference) -> Iterator[RootedPath]:
        with ExitStack() as held:
            with _intact(reference):
                artifact, model = self._artifact(reference)
                place = held.enter_context(artifact.inspect(model))
            yield place

    def inspect_rows(self, reference: Reference) -> AbstractContextManager[RootedPath | None]:
        raise TypeError(f"{reference} was resolved, though it has no rows")

    def fetch(self, reference: Reference, kind: InputKind, state: str | None, on_bytes: OnBytes) -> FetchedInput:
        try:
            with _intact(reference):
                artifact, model = self._artifact(reference)
                place = artifact.fetch(model, on_bytes, self._held)
                return FetchedInput(place, license=_licence(artifact), sha256=_digests(artifact, model))
        except ReferenceError as error:
            job, _ = _parsed(reference)
            if isinstance(self._outcome(job), Outcome):
                raise
            raise ReferenceError(f"job {job} was deleted after this one was accepted") from error

    def state(self, reference: Reference, info: CheckpointInfo | None) -> str | None:
        return None  # an artifact never changes, while times of its files may, as when it is restored from a backup

    def _artifact(self, reference: Reference) -> tuple[Artifact, str]:
        """Return the artifact, and the model's name in it.

        Raises:
            ReferenceError: there is no such job, it did not succeed, or its artifact has no such model.
        """
        name, model = _parsed(reference)
        job = self._outcome(name)
        if job is None or isinstance(job, Gone):
            raise ReferenceError(f"'{reference}': {absence(name, job)}")
        if job.status is not Status.SUCCEEDED or job.artifact is None:
            raise ReferenceError(f"'{reference}': job {name} is {job.status}, and has no models before it succeeded")
        artifact = self._artifacts.open(job.artifact)
        if model not in artifact.models:
            there = f"there are {', '.join(artifact.models)}" if artifact.models else "it made none"
            raise ReferenceError(f"'{reference}': job {name} has no model {model}; {there}")
        return artifact, model


def _digests(artifact: Artifact, model: str) -> dict[str, str]:
    """Return the digests of a model's files, by their names. Its card is left out: it is read by people alone."""
    for folder in (f"models/{model}/", "model/"):
        found = {file.name.removeprefix(folder): file.sha256 for file in artifact.files if file.name.startswith(folder)}
        if found:
            return {name: digest for name, digest in found.items() if name != CARD}
    return {}


def _licence(artifact: Artifact) -> str | None:
    """Return the licence of an artifact's models, each of which is made of all of the artifact's inputs."""
    [file] = [file for file in artifact.files if file.name == MANIFEST]
    with file.open() as stream:
        manifest = json.load(stream)
    made_of = [*manifest.get("inputs", {}).values(), *([manifest["base"]] if manifest.get("base") else [])]
    return joined_licence(about.get("license") for about in made_of)


@contextmanager
def _intact(reference: Reference) -> Iterator[None]:
    """Turn any damage of an artifact into a ReferenceError."""
    try:
        yield
    except StorageAway as error:
        raise StorageUnavailable(f"{reference}: {error}") from error
    except (FileNotFoundError, Damaged) as error:
        why = str(error) if isinstance(error, Damaged) else "it is gone"
        job, _ = _parsed(reference)
        raise ReferenceError(f"'{reference}': the artifact of job {job} is damaged: {why}") from error


def _parsed(reference: Reference) -> tuple[str, str]:
    """Return (the job's id, the model's name). Raises ReferenceError."""
    match = JOB.fullmatch(reference.rest)
    if match is None:
        raise ReferenceError(f"'{str(reference)[:200]}' is no model of a job; write job:ID/MODEL")
    return match["job"], match["model"]
