"""Asks the Hugging Face hub which commit a revision is, and for a checkpoint's headers without its weights.

Endpoint and token are the hub library's own variables, HF_ENDPOINT and HF_TOKEN.
"""

import re
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Literal

import httpx2
from huggingface_hub import HfApi, get_session, hf_hub_url
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import build_hf_headers, hf_raise_for_status  # type: ignore[attr-defined]

from app.contracts.references import ReferenceError
from app.storage.outlines import write_outline
from app.storage.sources.hf import Repository
from app.storage.sources.source import DEADLINE_S, REQUEST_TIMEOUT_S, SourceUnavailable
from worker.engine.catalog.primitives.errors import InvalidCheckpoint

COMMIT = re.compile(r"[0-9a-f]{40}")
RepositoryType = Literal["model", "dataset"]


class Hub:
    """Asks the hub for one request: each thing once, and all within `DEADLINE_S`.

    Args:
        waiting: makes a context that is entered while the hub is waited for.
    """

    def __init__(self, waiting: Callable[[], AbstractContextManager[None]] = nullcontext) -> None:
        self._waiting = waiting
        self._deadline = time.monotonic() + DEADLINE_S
        self._pinned: dict[tuple[Repository, RepositoryType], Repository] = {}

    def pinned(self, repository: Repository, kind: RepositoryType) -> Repository:
        """Return the same repository, by the hub's own spelling, at the commit that the revision is now.

        The hub takes a name in any case. With one spelling, a repository is one input however often it is named.

        Raises:
            ReferenceError: there is no such repository or revision, or the token may not see it.
            SourceUnavailable: the hub does not answer, or not in time.
        """
        if (repository, kind) not in self._pinned:
            with _translated(repository), self._waiting():
                info = HfApi().repo_info(
                    repository.name,
                    repo_type=kind,
                    revision=repository.revision,
                    timeout=self._seconds_left(repository),
                )
            if not isinstance(info.sha, str) or not COMMIT.fullmatch(info.sha):
                raise SourceUnavailable(f"the hub does not say which commit {repository} is")
            name = info.id if info.id.lower() == repository.name.lower() else repository.name
            self._pinned[repository, kind] = Repository(name, info.sha)
        return self._pinned[repository, kind]

    def outline(self, repository: Repository, folder: Path) -> None:
        """Write the outline of a pinned checkpoint, see `write_outline`.

        Raises:
            ReferenceError, SourceUnavailable: as `pinned`.
            InvalidCheckpoint: a file is larger than any file of its name can be.
        """
        with _translated(repository):
            with self._waiting():
                info = HfApi().model_info(
                    repository.name,
                    revision=repository.revision,
                    files_metadata=True,
                    timeout=self._seconds_left(repository),
                )
            sizes = {file.rfilename: file.size or 0 for file in info.siblings or ()}

            write_outline(
                str(repository), sizes, folder, lambda name, begin, end: self._read(repository, name, begin, end)
            )

    def _read(self, repository: Repository, name: str, begin: int, end: int) -> bytes:
        """Return bytes `begin` to `end` of a file; a server without ranges sends all bytes before them too."""
        if begin >= end:
            return b""
        url = hf_hub_url(repository.name, name, revision=repository.revision)
        headers = {**build_hf_headers(), "Range": f"bytes={begin}-{end - 1}"}
        found = bytearray()
        timeout = self._seconds_left(repository)
        get = get_session().stream("GET", url, headers=headers, timeout=timeout, follow_redirects=True)
        with self._waiting(), get as response:
            hf_raise_for_status(response)
            skip = begin if response.status_code == httpx2.codes.OK else 0
            for chunk in response.iter_bytes():
                found += chunk
                if len(found) >= skip + end - begin:
                    break
                self._seconds_left(repository)
        if len(found) < skip + end - begin:
            raise SourceUnavailable(f"the hub sends only a part of {name} of {repository}")
        return bytes(found[skip : skip + end - begin])

    def _seconds_left(self, repository: Repository) -> float:
        """Return the seconds that are left for the next request. Raises SourceUnavailable when there are none."""
        left = self._deadline - time.monotonic()
        if left <= 0:
            raise SourceUnavailable(f"the hub takes more than {DEADLINE_S:.0f} s to describe {repository}")
        return min(left, REQUEST_TIMEOUT_S)


@contextmanager
def _translated(repository: Repository) -> Iterator[None]:
    try:
        yield
    except (RepositoryNotFoundError, RevisionNotFoundError) as error:
        raise ReferenceError(f"'{repository}' is not on the hub, or this service's HF_TOKEN may not see it") from error
    except OfflineModeIsEnabled as error:
        raise ReferenceError("this service is kept from the hub by HF_HUB_OFFLINE; use local: references") from error
    except HFValidationError as error:
        raise ReferenceError(f"'{repository}' is no repository on the hub; write hf:ORG/NAME@REVISION") from error
    except HfHubHTTPError as error:
        if error.response.status_code in (401, 403, 404):
            raise ReferenceError(f"'{repository}' is not for this service's HF_TOKEN to see") from error
        raise SourceUnavailable(f"the hub answers {error.response.status_code} for {repository}") from error
    except (httpx2.HTTPError, ConnectionError, TimeoutError) as error:
        raise SourceUnavailable(f"the hub does not answer for {repository} ({type(error).__name__})") from error
    except (ReferenceError, SourceUnavailable, InvalidCheckpoint):
        raise
    except (ValueError, TypeError, LookupError, AttributeError, OSError) as error:  # a page of a proxy, say
        raise SourceUnavailable(f"the hub's answer for {repository} makes no sense ({type(error).__name__})") from error
