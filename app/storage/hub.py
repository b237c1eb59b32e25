"""The Hugging Face hub as the API sees it: which commit a revision is, and a checkpoint's headers without its weights.

Endpoint and token are the hub library's own variables, HF_ENDPOINT and HF_TOKEN.
"""

import struct
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
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

from app.storage.inputs import COMMIT, HubReference, ReferenceError
from worker.engine.catalog.checkpoints.headers import (
    ADAPTER_PICKLE,
    MAX_DESCRIPTION_BYTES,
    MAX_HEADER_BYTES,
    PICKLES,
    WEIGHTS,
    described_files,
    weights_among,
)
from worker.engine.catalog.primitives.errors import InvalidCheckpoint

REQUEST_TIMEOUT_S = 10.0
DEADLINE_S = 30.0  # for all that one request names; whoever posts it waits
Kind = Literal["model", "dataset"]
PREFIX = struct.Struct("<Q")


class HubUnavailable(Exception):
    """The hub does not answer, or not in time."""


class Hub:
    """Asks the hub for one request: each thing once, and all within `DEADLINE_S`.

    Args:
        waiting: is entered while the hub is waited for.
    """

    def __init__(self, waiting: Callable[[], AbstractContextManager[None]] = nullcontext) -> None:
        self._waiting = waiting
        self._deadline = time.monotonic() + DEADLINE_S
        self._pinned: dict[tuple[HubReference, Kind], HubReference] = {}

    def pinned(self, reference: HubReference, kind: Kind) -> HubReference:
        """The same repository at the commit that the revision is now.

        Raises:
            ReferenceError: there is no such repository or revision, or the token may not see it.
            HubUnavailable: the hub does not answer, or not in time.
        """
        if (reference, kind) not in self._pinned:
            with _translated(reference), self._waiting():
                info = HfApi().repo_info(
                    reference.repository,
                    repo_type=kind,
                    revision=reference.revision,
                    timeout=self._seconds_left(reference),
                )
            if not isinstance(info.sha, str) or not COMMIT.fullmatch(info.sha):
                raise HubUnavailable(f"the hub does not say which commit {reference} is")
            self._pinned[reference, kind] = replace(reference, revision=info.sha)
        return self._pinned[reference, kind]

    def outline(self, reference: HubReference, folder: Path) -> None:
        """Write the outline of a pinned checkpoint: what describes it whole, and weight files as their headers alone.

        Weight files have their true size but, as sparse files, no weights, so that `inspect_checkpoint` finds in
        `folder` what it would find in the checkpoint itself.

        Raises:
            ReferenceError, HubUnavailable: as `pinned`.
            InvalidCheckpoint: a file is too large to be what it is named.
        """
        with _translated(reference):
            with self._waiting():
                info = HfApi().model_info(
                    reference.repository,
                    revision=reference.revision,
                    files_metadata=True,
                    timeout=self._seconds_left(reference),
                )
            sizes = {file.rfilename: file.size or 0 for file in info.siblings or ()}

            described = described_files(sizes)
            whole = [name for name in described if not name.endswith(WEIGHTS)]

            def read(name: str) -> bytes:
                if sum(sizes[name] for name in whole) > MAX_DESCRIPTION_BYTES:
                    problem = f"configuration, tokenizer and index are larger than {MAX_DESCRIPTION_BYTES} bytes"
                    raise InvalidCheckpoint(str(reference), problem)
                return self._read(reference, name, 0, sizes[name])

            for name in described:
                (folder / name).parent.mkdir(exist_ok=True)
            for name in whole:
                (folder / name).write_bytes(read(name))
            of_modules = [name for name in described if name.endswith(WEIGHTS)]
            for name in (*weights_among(sizes, lambda name: (folder / name).read_bytes()), *of_modules):
                with (folder / name).open("wb") as stream:
                    prefix = self._read(reference, name, 0, min(PREFIX.size, sizes[name]))
                    stream.write(prefix)
                    header = PREFIX.unpack(prefix)[0] if len(prefix) == PREFIX.size else 0
                    if header <= MAX_HEADER_BYTES:
                        end = min(PREFIX.size + header, sizes[name])
                        stream.write(self._read(reference, name, len(prefix), end))
                    stream.truncate(sizes[name])
            for name in (*PICKLES, ADAPTER_PICKLE):
                if name in sizes:
                    (folder / name).touch()

    def _read(self, reference: HubReference, name: str, begin: int, end: int) -> bytes:
        """Bytes `begin` to `end` of a file, which a server without ranges precedes with all before them."""
        if begin >= end:
            return b""
        url = hf_hub_url(reference.repository, name, revision=reference.revision)
        headers = {**build_hf_headers(), "Range": f"bytes={begin}-{end - 1}"}
        found = bytearray()
        timeout = self._seconds_left(reference)
        get = get_session().stream("GET", url, headers=headers, timeout=timeout, follow_redirects=True)
        with self._waiting(), get as response:
            hf_raise_for_status(response)
            skip = begin if response.status_code == httpx2.codes.OK else 0
            for chunk in response.iter_bytes():
                found += chunk
                if len(found) >= skip + end - begin:
                    break
                self._seconds_left(reference)
        if len(found) < skip + end - begin:
            raise HubUnavailable(f"the hub sends only a part of {name} of {reference}")
        return bytes(found[skip : skip + end - begin])

    def _seconds_left(self, reference: HubReference) -> float:
        """For the next step. Raises HubUnavailable when none are."""
        left = self._deadline - time.monotonic()
        if left <= 0:
            raise HubUnavailable(f"the hub takes more than {DEADLINE_S:.0f} s to describe {reference}")
        return min(left, REQUEST_TIMEOUT_S)


@contextmanager
def _translated(reference: HubReference) -> Iterator[None]:
    try:
        yield
    except (RepositoryNotFoundError, RevisionNotFoundError) as error:
        raise ReferenceError(f"'{reference}' is not on the hub, or this service's HF_TOKEN may not see it") from error
    except OfflineModeIsEnabled as error:
        raise HubUnavailable("this service is kept from the hub by HF_HUB_OFFLINE; use local: references") from error
    except HFValidationError as error:
        raise ReferenceError(f"'{reference}' is no repository on the hub; write hf:ORG/NAME@REVISION") from error
    except HfHubHTTPError as error:
        if error.response.status_code in (401, 403, 404):
            raise ReferenceError(f"'{reference}' is not for this service's HF_TOKEN to see") from error
        raise HubUnavailable(f"the hub answers {error.response.status_code} for {reference}") from error
    except (httpx2.HTTPError, ConnectionError, TimeoutError) as error:
        raise HubUnavailable(f"the hub does not answer for {reference} ({type(error).__name__})") from error
    except (ReferenceError, HubUnavailable, InvalidCheckpoint):
        raise
    except (ValueError, TypeError, LookupError, AttributeError, OSError) as error:  # a page of a proxy, say
        raise HubUnavailable(f"the hub's answer for {reference} makes no sense ({type(error).__name__})") from error
