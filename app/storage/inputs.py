"""References to inputs: what they name, and paths of those that lie in the operator's folders or in artifacts."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Protocol

from app.contracts.jobs import Gone, Status, absence
from app.storage.artifacts import ArtifactFolder
from app.storage.files import Damaged

SCHEMES = ("local", "hf", "s3", "job")
HUB = re.compile(r"(?P<repository>[\w.-]+(/[\w.-]+)?)(@(?P<revision>[\w.-][\w./-]*))?", re.ASCII)
COMMIT = re.compile(r"[0-9a-f]{40}")
JOB = re.compile(r"(?P<job>[0-9a-f]{28})/(?P<model>(?!\.+$)[A-Za-z0-9._-]{1,64})")


class ReferenceError(ValueError):
    """The reference is malformed, not allowed, or names nothing. `available` is False for what comes later."""

    def __init__(self, message: str, *, available: bool = True) -> None:
        super().__init__(message)
        self.available = available


@dataclass(frozen=True)
class HubReference:
    """`hf:ORG/NAME@REVISION`; the revision is a branch, a tag or a commit."""

    repository: str
    revision: str

    def __str__(self) -> str:
        return f"hf:{self.repository}@{self.revision}"


def hub_reference(reference: str) -> HubReference | None:
    """The source that an `hf:` reference names; None for other kinds. Raises ReferenceError when it is malformed."""
    scheme, _, rest = reference.partition(":")
    if scheme != "hf":
        return None
    match = HUB.fullmatch(rest)
    if match is None or ".." in rest:
        raise ReferenceError(f"'{reference}' is no repository on the hub; write hf:ORG/NAME or hf:ORG/NAME@REVISION")
    return HubReference(match["repository"], match["revision"] or "main")


@dataclass(frozen=True)
class JobReference:
    """`job:ID/MODEL`; a model of another job's artifact."""

    job: str
    model: str

    def __str__(self) -> str:
        return f"job:{self.job}/{self.model}"


def job_reference(reference: str) -> JobReference | None:
    """The model that a `job:` reference names; None for other kinds. Raises ReferenceError when it is malformed."""
    scheme, _, rest = reference.partition(":")
    if scheme != "job":
        return None
    match = JOB.fullmatch(rest)
    if match is None:
        raise ReferenceError(f"'{reference[:200]}' is no model of a job; write job:ID/MODEL")
    return JobReference(match["job"], match["model"])


class Outcome(Protocol):
    """The status of a job, and its artifact if there is one."""

    @property
    def status(self) -> Status: ...

    @property
    def artifact(self) -> str | None: ...


class JobInputs:
    """Resolves `job:ID/MODEL` in the artifacts of jobs that succeeded.

    Args:
        outcome: of the job with an id; or why it is gone, or None where there is no such job.
    """

    def __init__(self, outcome: Callable[[str], Outcome | Gone | None], artifacts: ArtifactFolder) -> None:
        self._outcome = outcome
        self._artifacts = artifacts

    def resolve(self, reference: JobReference) -> tuple[Path, Path]:
        """(path, the artifact's folder).

        Raises:
            ReferenceError: there is no such job, it did not succeed, its artifact has no such model, or not all of it.
        """
        job = self._outcome(reference.job)
        if job is None or isinstance(job, Gone):
            raise ReferenceError(f"'{reference}': {absence(reference.job, job)}")
        if job.status is not Status.SUCCEEDED or job.artifact is None:
            raise ReferenceError(
                f"'{reference}': job {reference.job} is {job.status}, and has no models before it succeeded"
            )
        models = self._artifacts.models(job.artifact)
        if reference.model not in models:
            there = f"there are {', '.join(models)}" if models else "it made none"
            raise ReferenceError(f"'{reference}': job {reference.job} has no model {reference.model}; {there}")
        try:
            self._artifacts.check(job.artifact, models[reference.model])
        except (FileNotFoundError, Damaged) as error:
            why = str(error) if isinstance(error, Damaged) else "it is gone"
            raise ReferenceError(f"'{reference}': the artifact of job {reference.job} is damaged: {why}") from error
        return models[reference.model], self._artifacts.folder(job.artifact)


class LocalInputs:
    """`local:PATH` under the local roots, searched in order."""

    def __init__(self, roots: Sequence[Path]) -> None:
        self._roots = [root.resolve() for root in roots]

    def resolve(self, reference: str) -> tuple[Path, Path]:
        """(path, the root it lies under).

        Raises:
            ReferenceError: says what is wrong without saying where the roots are.
        """
        scheme, colon, rest = reference.partition(":")
        if not colon or scheme not in SCHEMES:
            raise ReferenceError(
                f"'{reference}' is no reference; write local:PATH, hf:ORG/NAME@REVISION or job:ID/MODEL"
            )
        if scheme == "job":
            raise ReferenceError(f"'{reference}' names a model of a job, which has no rows; use local: or hf:")
        if scheme != "local":
            others = "use local: or hf:, or job: for a model"
            raise ReferenceError(f"'{scheme}:' references are not available yet; {others}", available=False)
        if not rest or "\0" in rest:
            raise ReferenceError(f"'{reference}' names no path")
        relative = PurePosixPath(rest)
        if relative.is_absolute() or ".." in relative.parts:
            raise ReferenceError(f"'{reference}' must be a relative path without '..'")
        if not self._roots:
            raise ReferenceError("this service has no local roots; start it with --local-root DIR")
        try:
            for root in self._roots:
                path = root / relative
                if path.exists() or path.is_symlink():
                    resolved = path.resolve(strict=True)
                    if not resolved.is_relative_to(root):
                        raise ReferenceError(f"'{reference}' is a symbolic link out of its local root")
                    return resolved, root
        except FileNotFoundError as error:
            raise ReferenceError(f"'{reference}' is a symbolic link to nothing") from error
        except (OSError, RuntimeError) as error:  # a name too long, links in a circle
            raise ReferenceError(f"'{reference[:100]}' cannot be looked up") from error
        raise ReferenceError(f"'{reference}' does not exist under any local root")
