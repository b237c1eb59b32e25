"""What is published, and what comes of it."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from worker.engine.catalog.contracts.report import MANIFEST

REQUEST_TIMEOUT_S = 60.0
LONGEST_QUOTE = 200  # characters of a server's words


class NotPublished(Exception):
    """The place does not have the merge.

    Args:
        code: see `PublicationError`.
    """

    def __init__(
        self,
        code: Literal["denied", "refused", "unavailable", "timeout", "internal"],
        message: str,
        *,
        retryable: bool = False,
    ) -> None:
        super().__init__(message)
        self.code = code
        self.retryable = retryable


@dataclass(frozen=True)
class Receipt:
    versions: Mapping[str, str]
    """The commit or version, by the name of the repository or registered model."""
    url: str
    """Page of the result."""
    is_new: bool = True
    """False where an earlier attempt had published the same files."""


@dataclass(frozen=True)
class WholeArtifact:
    """A complete artifact in a folder of this machine."""

    folder: Path
    job: str
    name: str
    """The job's title."""
    accepted: bool | None
    """Whether the merge reaches what its request asks for; None where it asks for nothing."""

    @cached_property
    def digests(self) -> dict[str, str]:
        """sha256 of every file, by name."""
        manifest = (self.folder / MANIFEST).read_bytes()
        return {**digests_of(manifest), MANIFEST: hashlib.sha256(manifest).hexdigest()}

    @cached_property
    def models(self) -> dict[str, str]:
        """Folders of the models, by name; `model`, with an empty name, where there is one."""
        folders = {"/".join(name.split("/")[:2]) for name in self.digests if name.startswith("models/")}
        return {folder.partition("/")[2]: folder for folder in sorted(folders)} or {"": "model"}

    @cached_property
    def report(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.folder / "report.json").read_bytes())
        return found

    @cached_property
    def content(self) -> str:
        """See `content_of`."""
        return content_of(self.digests)


def digests_of(manifest: bytes) -> dict[str, str]:
    """Return the sha256 of every file that a manifest lists, by name. Raises ValueError where it is no manifest."""
    try:
        return {str(file["name"]): str(file["sha256"]) for file in json.loads(manifest)["files"]}
    except (KeyError, TypeError, RecursionError) as error:
        raise ValueError("it is no manifest") from error


def content_of(digests: Mapping[str, str]) -> str:
    """Return a sha256 over names and sha256 of the models' files. It tells an attempt's result from another's."""
    listed = [f"{digest} {name}" for name, digest in sorted(digests.items()) if name.startswith("model")]
    return hashlib.sha256("\n".join(listed).encode()).hexdigest()


def quoted(text: str) -> str:
    """Return somebody else's words in one line, cut where they are long."""
    return " ".join(text.split())[:LONGEST_QUOTE]


def token_in(path: Path, whose: str) -> str:
    """Return the token in a file. Raises NotPublished where there is none: libraries would look for another one."""
    try:
        token = path.read_text(encoding="ascii").strip()
    except (OSError, ValueError) as error:
        message = f"the file of the token for {whose} cannot be read ({type(error).__name__})"
        raise NotPublished("denied", message) from error
    if not token.isprintable() or not token or " " in token:
        raise NotPublished("denied", f"the file of the token for {whose} holds no token")
    return token
