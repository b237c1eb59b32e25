"""`hf:ORG/NAME`: one commit in a repository of the Hugging Face hub, or of the mirror in HF_ENDPOINT."""

import json
from collections.abc import Iterator, Set
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory

import httpx2
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, OfflineModeIsEnabled

from app.contracts.settings import Settings
from app.contracts.targets import Target
from app.storage.targets.card import CARD, card_at
from app.storage.targets.target import NotPublished, Receipt, WholeArtifact, digests_of, quoted, token_in
from worker.engine.catalog.contracts.report import MANIFEST

WEIGHTS = (".safetensors", ".safetensors.index.json")
ADAPTER = "adapter_config.json"
"""File with which transformers adds an adapter to the model beside it."""
OF_MERGES = {"files", "inputs", "method", "versions"}
"""Fields that the manifest of every merge has."""


def publish(target: Target, artifact: WholeArtifact, settings: Settings) -> Receipt:
    """Make one commit of the artifact, in a repository that is private if it is new.

    A model alone lies at the root of the repository, where libraries look for it; models with heads of their own are
    in `models/`, as in the artifact. Files of the merge that was there before are removed.
    """
    if settings.hub_token_file is None:
        raise NotPublished("denied", "this service has no token to publish on the hub with (MASKMERGE_HUB_TOKEN_FILE)")
    repository = target.name
    with _translated(target):
        api = HfApi(token=token_in(settings.hub_token_file, "the hub"), library_name="maskmerge")
        api.create_repo(repository, private=True, exist_ok=True)
        mark = f"maskmerge job {artifact.job}, content sha256:{artifact.content}"
        for commit in api.list_repo_commits(repository):
            if mark in f"{commit.title}\n{commit.message}":
                return Receipt({repository: commit.commit_id}, _page(api, repository, commit.commit_id), is_new=False)
        files = {name.removeprefix("model/"): artifact.folder / name for name in artifact.digests}
        there = set(api.list_repo_files(repository))
        gone = sorted(removed(there, _earlier_merge(api, repository, there), files.keys()))
        card = card_at((artifact.folder / CARD).read_text(encoding="utf-8"), repository)
        operations: list[CommitOperationAdd | CommitOperationDelete] = [
            *(CommitOperationAdd(name, card.encode() if name == CARD else path) for name, path in files.items()),
            *(CommitOperationDelete(name) for name in gone),
        ]
        made = api.create_commit(
            repository,
            operations,
            commit_message=f"Merge {quoted(artifact.name)}",
            commit_description=mark,
        )
        return Receipt({repository: made.oid}, _page(api, repository, made.oid))


def _page(api: HfApi, repository: str, commit: str) -> str:
    return f"{api.endpoint}/{repository}/tree/{commit}"


def _earlier_merge(api: HfApi, repository: str, there: Set[str]) -> set[str]:
    """Return the files that the manifest of the merge that was there before names; none where there was no merge."""
    if MANIFEST not in there:
        return set()
    with TemporaryDirectory() as folder:
        content = Path(api.hf_hub_download(repository, MANIFEST, local_dir=folder)).read_bytes()
    try:
        listed = digests_of(content)
    except ValueError:
        return set()
    is_merge = json.loads(content).keys() >= OF_MERGES  # other programs have manifests too
    return {name.removeprefix("model/") for name in listed} if is_merge else set()


def removed(there: Set[str], earlier: Set[str], files: Set[str]) -> set[str]:
    """Return the files that a commit removes: those of the merge before which this one does not have.

    Args:
        there: files of the repository.
        earlier: files of the merge before.
        files: files of this merge.

    Raises:
        NotPublished: beside this merge's models there would be weights of something else. Libraries would load these,
            or a mixture, and the service removes nothing that it did not publish.
    """
    folders = {str(PurePosixPath(name).parent) for name in files if name.endswith(WEIGHTS)}
    foreign = sorted(
        name
        for name in there - earlier - files
        if name.endswith((*WEIGHTS, ADAPTER)) and str(PurePosixPath(name).parent) in folders
    )
    if foreign:
        raise NotPublished(
            "refused",
            f"the repository has weights that are of no merge where this one goes ({', '.join(foreign[:3])}), which "
            "libraries would load with it; move or remove them, or name another repository",
        )
    return set((there & earlier) - files)


@contextmanager
def _translated(target: Target) -> Iterator[None]:
    try:
        yield
    except NotPublished:
        raise
    except OfflineModeIsEnabled as error:
        raise NotPublished("refused", "this service is kept from the hub by HF_HUB_OFFLINE") from error
    except EntryNotFoundError as error:
        raise NotPublished("unavailable", "the repository was changed meanwhile; try again", retryable=True) from error
    except HfHubHTTPError as error:
        status = error.response.status_code
        said = quoted(error.server_message or "")
        told = f"the hub answers {status}" + (f": {said}" if said else "")
        if status in (401, 403, 404):
            message = f"{told}; the service's token must be allowed to write to {target.name}"
            raise NotPublished("denied", message) from error
        if status >= 500 or status in (408, 409, 412, 429):
            raise NotPublished("unavailable", told, retryable=True) from error
        raise NotPublished("refused", told) from error
    except (httpx2.HTTPError, ConnectionError, TimeoutError) as error:
        message = f"the hub does not answer ({type(error).__name__})"
        raise NotPublished("unavailable", message, retryable=True) from error
    except (ValueError, RuntimeError) as error:
        raise NotPublished("refused", f"the hub does not take it: {quoted(str(error))}") from error
